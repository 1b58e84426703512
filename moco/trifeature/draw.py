"""How a Trifeature image is drawn: a textured, colored shape on gray.

Hermann & Lampinen 2020 (arXiv 2006.12433) give the names of the values, the colors and the proportions:
a 128-pixel template, rotated in +-45 degrees, somewhere on a 224-pixel canvas. The outlines and patterns are
our own.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

TEMPLATE = 128 / 224  # side of the square template that holds the shape, as a part of the image's side
PERIODS = 13  # texture periods along the template's side ...
FINEST = 6.0  # ... unless they get shorter than this many pixels: the eye then takes a texture for a tint
GAP = 0.25  # how much of the color shows between the strokes of a texture, so that the outline stays visible
TURN = math.pi / 4  # shape and texture are each rotated by an angle from -TURN to TURN
GRAY = 0.5  # the background; between the strokes of a texture it is mixed with the color
SAMPLES = 4  # per pixel and axis, averaged, for smooth edges

COLORS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "pink": (1, 0.4, 1),
    "cyan": (0, 1, 1),
    "purple": (0.3, 0, 0.5),
    "ocean": (0.1, 0.4, 0.5),
    "orange": (1, 0.6, 0),
    "white": (1, 1, 1),
}


def _box(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _star(points, inner):
    # `points` tips at radius 0.5, the first one up; the corners between them at radius 0.5 * inner
    angles = [i * math.pi / points for i in range(2 * points)]
    radii = [0.5, 0.5 * inner] * points
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


# A shape is a list of polygons in template units: x to the right, y down, both from -0.5 to 0.5.
SHAPES = {
    "triangle": [[(0, -0.45), (0.5, 0.42), (-0.5, 0.42)]],
    "square": [_box(-0.42, -0.42, 0.42, 0.42)],
    "plus": [_box(-0.16, -0.5, 0.16, 0.5), _box(-0.5, -0.16, 0.5, 0.16)],
    "circle": [_star(60, inner=1)],
    "tee": [_box(-0.5, -0.5, 0.5, -0.18), _box(-0.16, -0.5, 0.16, 0.5)],
    "rhombus": [[(0, -0.5), (0.3, 0), (0, 0.5), (-0.3, 0)]],
    "pentagon": [_star(5, inner=math.cos(math.pi / 5))],
    "star": [_star(5, inner=0.42)],
    "fivesquare": [  # as on a die
        _box(x - 1 / 6, y - 1 / 6, x + 1 / 6, y + 1 / 6)
        for x, y in [(-1 / 3, -1 / 3), (1 / 3, -1 / 3), (0, 0), (-1 / 3, 1 / 3), (1 / 3, 1 / 3)]
    ],
    "trapezoid": [[(-0.22, -0.32), (0.22, -0.32), (0.5, 0.32), (-0.5, 0.32)]],
}


def _fraction(x):
    return x - np.floor(x)


def _off_center(x):
    # distance to the middle of the unit cell that x lies in: 0 to 0.5
    return np.abs(_fraction(x) - 0.5)


def _hexgrid(u, v):
    # The cells' centers form two interleaved rectangular lattices. A point that is far from the nearest one,
    # measured in hexagons, lies on a wall.
    def from_center(shift):
        x = _off_center(u / 1.25 + shift)
        y = _off_center(v / (1.25 * math.sqrt(3)) + shift) * math.sqrt(3)
        return np.maximum(x, x / 2 + y * (math.sqrt(3) / 2))

    return np.minimum(from_center(0), from_center(0.5)) > 0.36


def _noise(u, v):
    cells = np.random.Generator(np.random.PCG64(0)).random((64, 64)) < 0.5
    return cells[np.floor(2 * v).astype(np.int32) % 64, np.floor(2 * u).astype(np.int32) % 64]


def _triangles(u, v):
    height = _fraction(v / 1.25)
    return (_off_center(u / 1.25) < 0.5 * height) & (height < 0.85)


def _rain(u, v):
    # dashes of different heights in neighboring columns
    column = u * 1.25
    return (_fraction(column) < 0.5) & (_fraction(v / 2 + 0.382 * np.floor(column)) < 0.6)


def _pluses(u, v):
    x, y = _off_center(u / 1.4), _off_center(v / 1.4)
    return (np.minimum(x, y) < 0.13) & (np.maximum(x, y) < 0.42)


# A texture takes points (u to the right, v down, in periods, float32 arrays) and says where there is ink.
TEXTURES = {
    "solid": lambda u, v: np.ones(u.shape, bool),
    "stripes": lambda u, v: _fraction(v) < 0.5,
    "grid": lambda u, v: (_fraction(u) < 0.3) | (_fraction(v) < 0.3),
    "hexgrid": _hexgrid,
    "dots": lambda u, v: _off_center(u) ** 2 + _off_center(v) ** 2 < 0.36**2,
    "noise": _noise,
    "triangles": _triangles,
    "zigzags": lambda u, v: _fraction(v / 1.1 + 2 * _off_center(u / 2.2)) < 0.5,
    "rain": _rain,
    "pluses": _pluses,
}


def render(shape, texture, color, size, rng):
    """Draw one image: uint8 (size, size, 3), RGB.

    `rng` (numpy Generator) gives the two rotations, the texture's phase and the place, at which at least one
    pixel of background is left on every side. KeyError for a name that is not in SHAPES, TEXTURES or COLORS.
    """
    shape_angle, texture_angle = rng.uniform(-TURN, TURN, 2)
    phase = rng.uniform(0, 32, 2)
    polygons = [size * TEMPLATE * np.array(polygon) @ _rotation(shape_angle) for polygon in SHAPES[shape]]
    corners = np.concatenate(polygons)
    center = rng.uniform(1 - corners.min(0), size - 1 - corners.max(0))
    corner = np.floor(center + corners.min(0)).astype(int)  # of the window that is drawn
    width, height = np.ceil(center + corners.max(0)).astype(int) - corner

    outline = Image.new("L", (width * SAMPLES, height * SAMPLES))
    for polygon in polygons:
        points = (polygon + center - corner) * SAMPLES - 0.5  # Pillow's integers are sample centers
        ImageDraw.Draw(outline).polygon(points.ravel().tolist(), fill=255)

    period = max(size * TEMPLATE / PERIODS, FINEST)
    x = (np.arange(width * SAMPLES) / SAMPLES + corner[0] - center[0]) / period
    y = (np.arange(height * SAMPLES) / SAMPLES + corner[1] - center[1]) / period
    (x_to_u, x_to_v), (y_to_u, y_to_v) = _rotation(texture_angle)
    u = np.float32(x_to_u * x + phase[0]) + np.float32(y_to_u * y)[:, None]
    v = np.float32(x_to_v * x + phase[1]) + np.float32(y_to_v * y)[:, None]
    ink = np.where(TEXTURES[texture](u, v), np.uint8(255), np.uint8(255 * GAP)) & np.asarray(outline)

    image = Image.new("RGB", (size, size), _bytes((GRAY, GRAY, GRAY)))
    image.paste(_bytes(COLORS[color]), tuple(corner.tolist()), Image.fromarray(ink).reduce(SAMPLES))
    return np.array(image)


def _rotation(angle):
    # right-multiplies row vectors (x, y)
    return np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])


def _bytes(color):
    return tuple(round(255 * part) for part in color)
