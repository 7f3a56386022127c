"""Compute members of the family from a mask by NumPy, rounded as docs/spec.md specifies."""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["drop_member", "get_axes"]

# SELU's limit at minus infinity, without its sign.
_LIMIT: Final = 1.7580993408473766


def get_axes(member: str, rank: int) -> tuple[int, ...]:
    """Return the axes along which a member shares decisions."""
    first = {"drop_path": 1, "feature_alpha_dropout": 2}.get(member, rank)
    return tuple(range(first, rank))


def drop_member(
    x: NDArray[Any],
    keep: NDArray[np.bool],
    p: float,
    member: str,
    *,
    scale_by_keep: bool = True,
    is_gradient: bool = False,
) -> NDArray[Any]:
    """Return the output of a member for x, or its gradient for the upstream gradient x.

    Parameters
    ----------
    x : numpy.ndarray
        Of a real dtype.
    keep : numpy.ndarray of bool
        The mask, with length 1 along the axes of `get_axes`.
    p : float
        In (0, 1).
    member : str
        The name of a function of `unidrop.family`.
    scale_by_keep : bool, default True
        As in `unidrop.family.drop_path`.
    is_gradient : bool, default False
        If True, return the gradient.
    """
    compute: Any = np.float64 if x.dtype == np.float64 else np.float32
    shift, fill = 0.0, 0.0
    scale = 1 / (1 - p) if scale_by_keep else 1.0
    if member.endswith("alpha_dropout"):
        scale = 1 / math.sqrt((1 - p) * (1 + p * _LIMIT**2))
        shift, fill = _LIMIT * p, -_LIMIT * (1 - p) * scale
    if is_gradient or member == "drop_path":
        y = np.where(keep, x.astype(compute) * compute(scale), compute(0))
    else:
        kept = (x.astype(compute) + compute(shift)) * compute(scale) + compute(0)
        y = np.where(keep, kept, compute(fill))
    output: NDArray[Any] = y.astype(x.dtype)
    return output
