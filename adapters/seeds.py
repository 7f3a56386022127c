"""Warns of layers that have one seed and one call number, and so drop the same units."""

import warnings
from collections.abc import Iterable
from itertools import pairwise

from unidrop.key import Key

__all__ = ["warn_of_equal_seeds"]


def warn_of_equal_seeds(
    layers: Iterable[tuple[str, Key, int]], adapter: str, *, known: bool = True, stacklevel: int = 2
) -> None:
    """Warn of the first two layers of a model that would drop the same units.

    Parameters
    ----------
    layers : iterable of (name, seed, number)
        The layers that drop in training, with their call numbers.
    adapter : str
        The module that has `assign_seeds`.
    known : bool, default True
        If False, the call numbers are not known, and the warning is careful.
    stacklevel : int, default 2
        As in `warnings.warn`, counted from the caller.
    """
    # Equal seeds become neighbors, and among these the nearest call numbers.
    places = enumerate(layers)
    ordered = sorted((int(seed), number, at, name) for at, (name, seed, number) in places)
    for (seed, a, *one), (other, b, *two) in pairwise(ordered):
        if seed == other and b - a <= 1:  # one may have run in this call of the model already
            (_, first), (_, second) = sorted((one, two))
            perhaps, may = (" and", "") if known else (", and perhaps", "may ")
            warnings.warn(
                f"the layers {first!r} and {second!r} have one seed{perhaps} one call number, so "
                f"they {may}drop the same units: call {adapter}.assign_seeds(model, seed), or set "
                f"layer.seed = Key(42).fold_in({second!r})",
                stacklevel=stacklevel + 1,
            )
            return
