"""Embedding dropout: drop words of an embedding, which are rows of its matrix.

The member is a look-up in the matrix after ordinary dropout with one decision for each row. Only
the rows that are looked up are multiplied.
"""

from collections.abc import Sequence
from typing import Any

from unidrop.dtypes import integer_bits
from unidrop.key import Key, check_key
from unidrop.library import get_library
from unidrop.output import select
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = [
    "check_indices",
    "drop_rows",
    "embedding_dropout",
    "look_up",
    "number_rows",
    "plan_embedding_dropout",
]


def plan_embedding_dropout(weight: Any, rate: Rate, **options: Any) -> DropoutPlan:
    """Return the plan of `embedding_dropout`; ``options`` are as in `DropoutPlan.from_args`."""
    name = options.setdefault("name", "weight")
    get_library(weight, name)  # raises TypeError if weight is not an array
    if len(weight.shape) != 2:
        raise ValueError(
            f"{name} must have axes of words and features, got shape {tuple(weight.shape)}"
        )
    return DropoutPlan.from_args(weight, rate, broadcast_axes=(1,), **options)


def check_indices(indices: Any, name: str = "indices") -> None:
    """Raise TypeError unless indices is an array of integers."""
    get_library(indices, name)
    if integer_bits(indices.dtype) is None:
        raise TypeError(f"{name} must be of an integer dtype, got {indices.dtype}")


def drop_rows(plan: DropoutPlan, rows: Any, mask: Any, indices: Any) -> Any:
    """Return rows of a matrix after its dropout, by differentiable operations of its library.

    Parameters
    ----------
    plan : DropoutPlan
        The plan of the matrix.
    rows : array
        Of shape ``(n, features)``.
    mask : array of bool
        The mask of the matrix, of shape ``(words, 1)``.
    indices : array of int
        The number of each row, of shape ``(n,)``.
    """
    kept = plan.library.arrays.namespace(rows).take(mask, indices, axis=0)
    # At a rate of 1 too, the zeros depend on the rows, whose gradient is zeros, not nothing.
    return select(plan.library, rows, kept, plan.rate._replace(threshold=0))


def number_rows(plan: DropoutPlan, indices: Any, length: Any) -> Any:
    """Return for each index the place where its value occurs first.

    A look-up of rows at these places adds the gradients of equal indices, in their order, before
    `drop_rows` scales the sum. A look-up in the dropped matrix does so too.

    Parameters
    ----------
    plan : DropoutPlan
        The plan of the matrix.
    indices : array of int
        Of shape ``(n,)``; negative ones count from the end.
    length : int
        The number of rows of the matrix.
    """
    xp = plan.library.arrays.namespace(indices)
    bits = integer_bits(indices.dtype)
    if bits is not None and bits < 32:  # the length might not fit
        indices = xp.astype(indices, xp.int32)
    if not isinstance(length, int):  # a graph computes it
        length = xp.astype(length, indices.dtype)
    indices = xp.where(indices < 0, indices + length, indices)
    order = xp.argsort(indices, axis=-1, stable=True)
    return xp.take(order, xp.searchsorted(xp.take(indices, order, axis=0), indices), axis=0)


def look_up(
    plan: DropoutPlan, weight: Any, indices: Any, key: Any, return_mask: bool = False
) -> Any:
    """Return the rows of a matrix after its dropout, and its mask if ``return_mask``.

    If the plan drops nothing, ``key`` may be anything; otherwise it is a `Key`.
    """
    xp = plan.library.arrays.namespace(weight)
    words, features = plan.library.arrays.shape(weight)
    shape = *plan.library.arrays.shape(indices), features
    flat = xp.reshape(indices, (-1,))
    rows = xp.take(weight, flat, axis=0)
    mask = None
    if plan.drops:
        mask = plan.mask(weight, key)
        rows = drop_rows(plan, rows, mask, flat)
        rows = xp.take(rows, number_rows(plan, flat, words), axis=0)
    elif return_mask:
        mask = plan.ones(weight)
    rows = xp.reshape(rows, shape)
    return (rows, mask) if return_mask else rows


def embedding_dropout(
    weight: Any,
    indices: Any,
    p: float,
    key: Key,
    *,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Look up embeddings of words, and drop words everywhere with probability p.

    Parameters
    ----------
    weight : array
        The matrix of shape ``(words, features)``; dtypes and libraries as in `dropout`.
    indices : array of int
        The words to look up, of any shape.
    p : int or float
        The probability of dropping a word, in [0, 1].
    key : Key
        The name of the mask. The mask is the one of `dropout` of the matrix with
        ``broadcast_axes=(1,)``.
    training : bool, default True
        If False, nothing is dropped.
    global_shape, start : sequence of int, optional
        As in `dropout`: the matrix may be a block of a larger one.
    return_mask : bool, default False
        If True, the mask of the matrix is returned too.

    Returns
    -------
    y : array
        Of the shape of the indices, with an axis of features added. It is equal to the look-up in
        the matrix after dropout. So is the gradient, unless the library adds the gradients of equal
        indices in another order. But only the rows that are looked up are multiplied.
    mask : array of bool
        Only with ``return_mask``: True for kept words, of shape ``(words, 1)``.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; TypeError if the indices are not integers, ValueError if weight is not a
        matrix. Indices out of range raise, or not, as in the library.

    Notes
    -----
    Y. Gal, Z. Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", NeurIPS 2016; S. Merity et al., "Regularizing and optimizing LSTM language models",
    ICLR 2018.

    Examples
    --------
    >>> import numpy
    >>> from unidrop import Key
    >>> from unidrop.family import embedding_dropout
    >>> embedding_dropout(numpy.ones((6, 1)), numpy.array([0, 1, 1, 5, 0]), 0.5, Key(42))[:, 0]
    array([2., 0., 0., 2., 2.])
    """
    check_key(key)
    check_indices(indices)
    window: dict[str, Any] = {"global_shape": global_shape, "start": start}
    plan = plan_embedding_dropout(weight, Rate.from_p(p), training=training, **window)
    return look_up(plan, weight, indices, key, return_mask)
