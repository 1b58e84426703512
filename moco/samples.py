"""What a data worker does for one sample: read the file, draw, cut out the views, and write them into a
batch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moco.bad_images import BadImages
from moco.decoders import pixels_of, read_pixels
from moco.draws import VIEW, Recipe, draw
from moco.errors import UserError
from moco.views import center_resize, crop_resize, photometric_pil


@dataclass
class Photographs:
    """The images of a data set, from their files or from a cache (moco.cache), and their classes."""

    paths: list
    targets: np.ndarray  # (N,) int64
    decode: Any  # moco.decoders.decoder's
    cache: Any = None

    def pixels(self, index):
        """uint8 (H, W, 3) in RGB. Raises UserError that names the file when it cannot be read."""
        if self.cache is None:
            return read_pixels(self.paths[index], self.decode)
        kept = self.cache.read(index)
        return pixels_of(kept, self.paths[index], self.decode) if isinstance(kept, bytes) else kept


@dataclass
class TrainingSample:
    """Writes the views of key (epoch, index), drawn from (seed, epoch, index), into a batch of moco.slots.

    size: side of a view in pixels. resize: "pil" or "torch" (moco.views). photometric: jitter, grayscale,
    blur and flip here, by PIL; otherwise whoever takes the batch does them (moco.photometric), after the
    records. bad_images: what to do about an image that cannot be read; one that stands in for it is drawn
    at its place, unlike in its own turn.
    """

    photographs: Photographs
    recipe: Recipe
    size: int
    resize: str
    seed: int
    photometric: bool
    bad_images: BadImages = BadImages()

    def __call__(self, batch, position, key):
        epoch, index = key
        taken, image = self.bad_images.read(self.photographs, epoch, index)
        height, width = image.shape[:2]
        records = draw(self.recipe, width, height, self.seed, epoch, index, len(batch.pixels))
        for record, view in zip(records, torch.from_numpy(batch.pixels[:, position]).unbind(), strict=True):
            crop_resize(image, record, self.size, self.resize, out=view)
            if self.photometric:
                view.copy_(photometric_pil(view, record, self.recipe.gray_first))
        batch.records[:, position] = records
        batch.targets[position] = self.photographs.targets[taken]


@dataclass
class ValidationSample:
    """Writes the central view of key `index` into a batch of moco.slots.

    optional: below this index an image that cannot be read is no error; its target is -1.
    """

    photographs: Photographs
    size: int
    resize: str
    optional: int = 0

    def __call__(self, batch, position, key):
        view = torch.from_numpy(batch.pixels[0, position])
        batch.records[:, position] = np.zeros((), VIEW)
        batch.targets[position] = self.photographs.targets[key]
        try:
            image = self.photographs.pixels(key)
        except UserError as error:
            if key < self.optional:
                view.zero_()
                batch.targets[position] = -1
                return
            raise UserError(f"{error.sentence} (validation counts every image, so it skips none)") from error
        center_resize(image, self.size, self.resize, out=view)
