"""Members of the family of dropout for TensorFlow."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import tensorflow as tf

from unidrop.adapters.tensorflow.functional import as_tensor, get_axes
from unidrop.family import (
    Mode,
    plan_alpha_dropout,
    plan_drop_key,
    plan_drop_path,
    plan_locked_dropout,
)
from unidrop.key import Key, check_key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = ["alpha_dropout", "drop_key", "drop_path", "locked_dropout"]


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
    rate: float,
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

    return _run(make_plan, x, rate, key, return_mask, name)


def locked_dropout(
    x: Any,
    rate: float,
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

    return _run(make_plan, x, rate, key, return_mask, name)


def _run(
    make_plan: Callable[[Any, Rate], DropoutPlan],
    x: Any,
    rate: float,
    key: Key,
    return_mask: bool,
    name: str | None,
) -> Any:
    """Run a member in a name scope."""
    with nullcontext() if name is None else tf.name_scope(name):
        x = as_tensor(x)
        check_key(key)
        return make_plan(x, Rate.from_p(rate, "rate")).call(x, key, return_mask)
