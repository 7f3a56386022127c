"""The warning of layers that drop the same units, which several adapters share."""

import warnings

import pytest

from unidrop import Key
from unidrop.adapters.seeds import warn_of_equal_seeds

ONE, OTHER = Key(1), Key(2)


@pytest.mark.parametrize("numbers", [(0, 0), (3, 4), (0, 5, 0), (9, 0, 4, 8)], ids=str)
def test_warns_of_equal_seeds_at_near_call_numbers_anywhere(numbers):
    layers = [(f"layers.{i}", ONE, number) for i, number in enumerate(numbers)]
    with pytest.warns(UserWarning, match=r"'layers\.\d' and 'layers\.\d' have one seed and one"):
        warn_of_equal_seeds([("first", OTHER, 0), *layers], "some.adapter")


@pytest.mark.parametrize(
    "layers", [[("a", ONE, 0), ("b", OTHER, 0)], [("a", ONE, 0), ("b", ONE, 2)], []], ids=str
)
def test_warns_of_nothing_else(layers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_equal_seeds(layers, "some.adapter")
