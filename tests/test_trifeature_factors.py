"""The combinations of Trifeature that are held out, and the factors in a folder's name."""

import collections

import pytest

from moco import trifeature
from moco.errors import UserError
from moco.factors import COMBINATIONS, FACTORS, factor_of


def test_held_out_combinations_are_balanced():
    assert [len(names) for names in FACTORS.values()] == [10, 10, 10]
    held = trifeature.held_out(3)
    assert len(held) == 200 and held <= set(COMBINATIONS)
    for position in range(3):
        values = collections.Counter(combination[position] for combination in held)
        pairs = collections.Counter((*c[:position], *c[position + 1 :]) for c in held)
        assert len(values) == 10 and set(values.values()) == {20}
        assert len(pairs) == 100 and set(pairs.values()) == {2}
    assert held == trifeature.held_out(3) != trifeature.held_out(4)


def test_factor_of_reads_each_factor_from_a_folder_name():
    for i, combination in enumerate(COMBINATIONS):
        name = "_".join(combination)
        values = [factor_of(name, factor) for factor in ("shape", "texture", "color")]
        assert values == [i // 100, i // 10 % 10, i % 10]
    for name in ("n01440764", "triangle_solid", "solid_triangle_red", "triangle_solid_red_", "tee_rain_Red"):
        with pytest.raises(UserError, match=f"'{name}' is not named shape_texture_color"):
            factor_of(name, "shape")
    with pytest.raises(UserError, match="no factor 'colour'; choose one of shape, texture, color"):
        factor_of("triangle_solid_red", "colour")
