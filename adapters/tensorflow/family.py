"""Members of the family of dropout for TensorFlow."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import tensorflow as tf

from unidrop.adapters.tensorflow.functional import as_tensor, get_axes
from unidrop.family import Mode, plan_alpha_dropout, plan_drop_path
from unidrop.key import Key, check_key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = ["alpha_dropout", "drop_path"]


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
