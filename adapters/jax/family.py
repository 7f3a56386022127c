"""Members of the family of dropout for JAX."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from unidrop.adapters.jax.functional import run
from unidrop.drop_block import plan_drop_block
from unidrop.family import (
    Mode,
    plan_alpha_dropout,
    plan_drop_key,
    plan_drop_path,
    plan_feature_alpha_dropout,
    plan_locked_dropout,
)
from unidrop.gaussian import NOISE_RATE, plan_gaussian_dropout, plan_gaussian_noise
from unidrop.key import Key
from unidrop.permutation import check_patch_rate, plan_patch_dropout

__all__ = [
    "alpha_dropout",
    "drop_block",
    "drop_key",
    "drop_path",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "gaussian_noise",
    "locked_dropout",
    "patch_dropout",
]


def alpha_dropout(
    x: ArrayLike,
    rate: float,
    key: Key | jax.Array | None = None,
    *,
    deterministic: bool = False,
    broadcast_dims: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Set elements to the negative limit of SELU with probability rate; keep mean 0 and variance 1.

    `unidrop.family.alpha_dropout` has the formula. Parameters, returns and errors are as in
    `dropout`; a complex x raises TypeError.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.jax import alpha_dropout
    >>> alpha_dropout(jax.numpy.ones(6), 0.5, Key(42)) > 0
    Array([ True, False, False, False, False,  True], dtype=bool)
    """
    options: dict[str, Any] = {
        "broadcast_axes": broadcast_dims,
        "global_shape": global_shape,
        "start": start,
    }
    return run(plan_alpha_dropout, x, rate, key, deterministic, return_mask, **options)


def feature_alpha_dropout(
    x: ArrayLike,
    rate: float,
    key: Key | jax.Array | None = None,
    *,
    deterministic: bool = False,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Apply `alpha_dropout` to whole channels, the second axis of an array.

    Parameters, returns and errors are as there; ValueError if x has fewer than two axes.
    """
    options: dict[str, Any] = {"global_shape": global_shape, "start": start}
    return run(plan_feature_alpha_dropout, x, rate, key, deterministic, return_mask, **options)


def drop_key(
    x: ArrayLike,
    rate: float,
    key: Key | jax.Array | None = None,
    *,
    deterministic: bool = False,
    broadcast_dims: Sequence[int] = (),
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Set scores of attention to minus infinity with probability rate, before the softmax.

    `unidrop.family.drop_key` has the details. Parameters, returns and errors are as in `dropout`; a
    complex x raises TypeError.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.jax import drop_key
    >>> drop_key(jax.numpy.ones(6), 0.5, Key(42))
    Array([  1., -inf, -inf, -inf, -inf,   1.], dtype=float32)
    """
    options: dict[str, Any] = {
        "broadcast_axes": broadcast_dims,
        "global_shape": global_shape,
        "start": start,
    }
    return run(plan_drop_key, x, rate, key, deterministic, return_mask, **options)


def drop_block(
    x: ArrayLike,
    rate: float,
    key: Key | jax.Array | None = None,
    *,
    block_size: int,
    axes: Sequence[int],
    deterministic: bool = False,
    return_mask: bool = False,
) -> Any:
    """Drop blocks of neighboring elements, such that a share of about rate is dropped.

    Parameters
    ----------
    block_size : int
        The length of a block along each of the axes.
    axes : sequence of int
        The axes of a block, such as ``(1, 2)`` for images of shape ``(N, H, W, C)``.
    x, rate, key, deterministic, return_mask
        As in `dropout`.

    Returns
    -------
    y, mask
        As in `unidrop.family.drop_block`.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; ValueError if a block does not fit, or an axis does not exist.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.jax import drop_block
    >>> drop_block(jax.numpy.ones((1, 6)), 0.5, Key(42), block_size=2, axes=(1,)).round(4)
    Array([[3., 0., 0., 3., 0., 0.]], dtype=float32)
    """
    options: dict[str, Any] = {"block_size": block_size, "axes": axes}
    return run(plan_drop_block, x, rate, key, deterministic, return_mask, **options)


def gaussian_dropout(
    x: ArrayLike,
    rate: float,
    key: Key | jax.Array | None = None,
    *,
    deterministic: bool = False,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
) -> Any:
    """Multiply each element by a normal number of mean 1 and variance rate / (1 - rate).

    `unidrop.family.gaussian_dropout` has the formula. Parameters and errors are as in `dropout`; a
    complex x raises TypeError, and a rate of 1 raises ValueError.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.jax import gaussian_dropout
    >>> gaussian_dropout(jax.numpy.ones(3), 0.5, Key(42)).round(2)
    Array([1.37, 1.04, 0.5 ], dtype=float32)
    """
    options: dict[str, Any] = {"global_shape": global_shape, "start": start}
    return run(plan_gaussian_dropout, x, rate, key, deterministic, False, **options)


def gaussian_noise(
    x: ArrayLike,
    stddev: float,
    key: Key | jax.Array | None = None,
    *,
    deterministic: bool = False,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
) -> Any:
    """Add a normal number of mean 0 and standard deviation stddev to each element.

    The other parameters and the errors are as in `gaussian_dropout`.
    """
    options: dict[str, Any] = {"stddev": stddev, "global_shape": global_shape, "start": start}
    return run(plan_gaussian_noise, x, NOISE_RATE, key, deterministic, False, **options)


def patch_dropout(
    x: ArrayLike,
    rate: float,
    key: Key | jax.Array | None = None,
    *,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    deterministic: bool = False,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_indices: bool = False,
) -> Any:
    """Remove a share of the tokens of each example, the second axis of an array.

    `unidrop.family.patch_dropout` describes the parameters and the results.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.jax import patch_dropout
    >>> patch_dropout(jax.numpy.arange(9.0)[None], 0.5, Key(42), ordered=True)
    Array([[0., 1., 3., 5., 7.]], dtype=float32)
    """
    check_patch_rate(rate, "rate")
    options: dict[str, Any] = {"num_prefix_tokens": num_prefix_tokens, "ordered": ordered}
    options |= {"global_shape": global_shape, "start": start}
    return run(plan_patch_dropout, x, rate, key, deterministic, return_indices, **options)


def drop_path(
    x: ArrayLike,
    rate: float | jax.Array,
    key: Key | jax.Array | None = None,
    *,
    deterministic: bool = False,
    mode: Mode = "row",
    scale_by_keep: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Drop whole examples of a residual branch with probability rate: stochastic depth.

    Parameters
    ----------
    mode : {"row", "batch"}, default "row"
        "row" decides for each element of the first axis, and "batch" once for all.
    scale_by_keep : bool, default True
        If False, kept examples are unchanged; otherwise they are scaled by 1 / (1 - rate).
    x, rate, key, deterministic, global_shape, start, return_mask
        As in `dropout`.

    Returns
    -------
    y, mask
        As in `dropout`.

    Raises
    ------
    TypeError, ValueError
        As `dropout`; ValueError if mode is another one, or x has no axis of rows.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.jax import drop_path
    >>> drop_path(jax.numpy.ones((4, 1)), 0.5, Key(42)).ravel()
    Array([2., 0., 0., 0.], dtype=float32)
    """
    options: dict[str, Any] = {"mode": mode, "scale_by_keep": scale_by_keep}
    options |= {"global_shape": global_shape, "start": start, "has_schedule": True}
    return run(plan_drop_path, x, rate, key, deterministic, return_mask, **options)


def locked_dropout(
    x: ArrayLike,
    rate: float | jax.Array,
    key: Key | jax.Array | None = None,
    *,
    axis: int,
    deterministic: bool = False,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Apply dropout with one mask for all timesteps, which are the elements along an axis.

    `unidrop.family.locked_dropout` has the details. The other parameters, returns and errors are as
    in `dropout`; ValueError if x has no such axis.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.jax import locked_dropout
    >>> locked_dropout(jax.numpy.ones((2, 1, 6)), 0.5, Key(42), axis=0)[:, 0]
    Array([[2., 0., 0., 0., 0., 2.],
           [2., 0., 0., 0., 0., 2.]], dtype=float32)
    """
    options: dict[str, Any] = {"axis": axis, "global_shape": global_shape, "start": start}
    options["has_schedule"] = True
    return run(plan_locked_dropout, x, rate, key, deterministic, return_mask, **options)
