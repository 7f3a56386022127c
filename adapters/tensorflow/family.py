"""Members of the family of dropout for TensorFlow."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import tensorflow as tf

from unidrop.adapters.tensorflow.functional import as_tensor, get_axes
from unidrop.drop_block import plan_drop_block
from unidrop.family import (
    Mode,
    plan_alpha_dropout,
    plan_drop_key,
    plan_drop_path,
    plan_locked_dropout,
)
from unidrop.gaussian import NOISE_RATE, plan_gaussian_dropout, plan_gaussian_noise
from unidrop.key import Key, check_key
from unidrop.permutation import check_patch_rate, plan_patch_dropout
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.schedule import make_rate

__all__ = [
    "alpha_dropout",
    "drop_block",
    "drop_key",
    "drop_path",
    "gaussian_dropout",
    "gaussian_noise",
    "locked_dropout",
    "patch_dropout",
]


def alpha_dropout(
    x: Any,
    rate: float,
    noise_shape: Sequence[int | None] | None = None,
    *,
    key: Key,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    name: str | None = None,
) -> Any:
    """Set elements to the negative limit of SELU with probability rate; keep mean 0 and variance 1.

    `unidrop.family.alpha_dropout` has the formula. Parameters, returns and errors are as in
    `dropout`; a complex x raises TypeError.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import alpha_dropout
    >>> alpha_dropout(tf.zeros(3), 0.5, key=Key(42)).numpy().round(4)
    array([ 0.7792, -0.7792, -0.7792], dtype=float32)
    """

    def make_plan(x: Any, rate: Rate) -> DropoutPlan:
        options: dict[str, Any] = {"global_shape": global_shape, "start": start}
        return plan_alpha_dropout(x, rate, broadcast_axes=get_axes(noise_shape, x), **options)

    return _run(make_plan, x, rate, key, return_mask, name)


def drop_block(
    x: Any,
    rate: float,
    *,
    block_size: int,
    axes: Sequence[int],
    key: Key,
    return_mask: bool = False,
    name: str | None = None,
) -> Any:
    """Drop blocks of neighboring elements, such that a share of about rate is dropped.

    Parameters
    ----------
    block_size : int
        The length of a block along each of the axes.
    axes : sequence of int
        The axes of a block, such as ``(1, 2)`` for images of shape ``(N, H, W, C)``. Their lengths
        must be known.
    x, rate, key, return_mask, name
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
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import drop_block
    >>> drop_block(tf.ones((1, 6)), 0.5, block_size=2, axes=(1,), key=Key(42)).numpy().round(4)
    array([[3., 0., 0., 3., 0., 0.]], dtype=float32)
    """

    def make_plan(x: Any, rate: Rate) -> DropoutPlan:
        return plan_drop_block(x, rate, block_size=block_size, axes=axes)

    return _run(make_plan, x, rate, key, return_mask, name)


def gaussian_dropout(
    x: Any,
    rate: float,
    *,
    key: Key,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    name: str | None = None,
) -> Any:
    """Multiply each element by a normal number of mean 1 and variance rate / (1 - rate).

    `unidrop.family.gaussian_dropout` has the formula. Parameters and errors are as in `dropout`; a
    complex x raises TypeError, and a rate of 1 raises ValueError.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import gaussian_dropout
    >>> gaussian_dropout(tf.ones(3), 0.5, key=Key(42)).numpy().round(4)
    array([1.3708, 1.0438, 0.4998], dtype=float32)
    """

    def make_plan(x: Any, rate: Rate) -> DropoutPlan:
        return plan_gaussian_dropout(x, rate, global_shape=global_shape, start=start)

    return _run(make_plan, x, rate, key, False, name)


def gaussian_noise(
    x: Any,
    stddev: float,
    *,
    key: Key,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    name: str | None = None,
) -> Any:
    """Add a normal number of mean 0 and standard deviation stddev to each element.

    The other parameters and the errors are as in `gaussian_dropout`.
    """

    def make_plan(x: Any, rate: Rate) -> DropoutPlan:
        options: dict[str, Any] = {"global_shape": global_shape, "start": start}
        return plan_gaussian_noise(x, rate, stddev=stddev, **options)

    return _run(make_plan, x, NOISE_RATE, key, False, name)


def patch_dropout(
    x: Any,
    rate: float,
    *,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    key: Key,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_indices: bool = False,
    name: str | None = None,
) -> Any:
    """Remove a share of the tokens of each example, the second axis of a tensor.

    `unidrop.family.patch_dropout` describes the parameters and the results; the number of tokens
    must be known.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import patch_dropout
    >>> patch_dropout(tf.range(9.0)[None], 0.5, key=Key(42), ordered=True).numpy()
    array([[0., 1., 3., 5., 7.]], dtype=float32)
    """
    check_patch_rate(rate, "rate")

    def make_plan(x: Any, rate: Rate) -> DropoutPlan:
        options: dict[str, Any] = {"num_prefix_tokens": num_prefix_tokens, "ordered": ordered}
        return plan_patch_dropout(x, rate, global_shape=global_shape, start=start, **options)

    return _run(make_plan, x, rate, key, return_indices, name)


def drop_key(
    x: Any,
    rate: float,
    noise_shape: Sequence[int | None] | None = None,
    *,
    key: Key,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    name: str | None = None,
) -> Any:
    """Set scores of attention to minus infinity with probability rate, before the softmax.

    `unidrop.family.drop_key` has the details. Parameters, returns and errors are as in `dropout`; a
    complex x raises TypeError.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import drop_key
    >>> drop_key(tf.ones(6), 0.5, key=Key(42)).numpy()
    array([  1., -inf, -inf, -inf, -inf,   1.], dtype=float32)
    """

    def make_plan(x: Any, rate: Rate) -> DropoutPlan:
        options: dict[str, Any] = {"global_shape": global_shape, "start": start}
        return plan_drop_key(x, rate, broadcast_axes=get_axes(noise_shape, x), **options)

    return _run(make_plan, x, rate, key, return_mask, name)


def drop_path(
    x: Any,
    rate: float | tf.Tensor | tf.Variable,
    *,
    mode: Mode = "row",
    scale_by_keep: bool = True,
    key: Key,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    name: str | None = None,
) -> Any:
    """Drop whole examples of a residual branch with probability rate: stochastic depth.

    Parameters
    ----------
    mode : {"row", "batch"}, default "row"
        "row" decides for each element of the first axis, and "batch" once for all.
    scale_by_keep : bool, default True
        If False, kept examples are unchanged; otherwise they are scaled by 1 / (1 - rate).
    x, rate, key, global_shape, start, return_mask, name
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
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import drop_path
    >>> drop_path(tf.ones((4, 1)), 0.5, key=Key(42)).numpy().ravel()
    array([2., 0., 0., 0.], dtype=float32)
    """

    def make_plan(x: Any, rate: Rate) -> DropoutPlan:
        options: dict[str, Any] = {
            "global_shape": global_shape,
            "start": start,
            "scale_by_keep": scale_by_keep,
        }
        return plan_drop_path(x, rate, mode=mode, **options)

    return _run(make_plan, x, rate, key, return_mask, name, has_schedule=True)


def locked_dropout(
    x: Any,
    rate: float | tf.Tensor | tf.Variable,
    *,
    axis: int,
    key: Key,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    name: str | None = None,
) -> Any:
    """Apply dropout with one mask for all timesteps, which are the elements along an axis.

    `unidrop.family.locked_dropout` has the details. The other parameters, returns and errors are as
    in `dropout`; ValueError if x has no such axis.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import locked_dropout
    >>> locked_dropout(tf.ones((1, 2, 6)), 0.5, axis=1, key=Key(42))[0].numpy()
    array([[2., 0., 0., 0., 0., 2.],
           [2., 0., 0., 0., 0., 2.]], dtype=float32)
    """

    def make_plan(x: Any, rate: Rate) -> DropoutPlan:
        options: dict[str, Any] = {"global_shape": global_shape, "start": start}
        return plan_locked_dropout(x, rate, axis=axis, **options)

    return _run(make_plan, x, rate, key, return_mask, name, has_schedule=True)


def _run(
    make_plan: Callable[[Any, Rate], DropoutPlan],
    x: Any,
    rate: Any,
    key: Key,
    return_mask: bool,
    name: str | None,
    *,
    has_schedule: bool = False,
) -> Any:
    """Run a member in a name scope; ``has_schedule`` is whether its rate may be a tensor."""
    with nullcontext() if name is None else tf.name_scope(name):
        x = as_tensor(x)
        check_key(key)
        one_rate = make_rate(rate, x, "rate") if has_schedule else Rate.from_p(rate, "rate")
        return make_plan(x, one_rate).call(x, key, return_mask)
