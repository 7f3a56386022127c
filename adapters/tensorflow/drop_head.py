"""DropHead for TensorFlow."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from unidrop.adapters.tensorflow.family import _run
from unidrop.drop_head import plan_drop_head
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate

__all__ = ["drop_head"]


def drop_head(
    x: Any,
    rate: float | tf.Tensor | tf.Variable,
    *,
    axis: int = -2,
    key: Key,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    name: str | None = None,
) -> Any:
    """Drop whole heads of attention, which are the elements along an axis.

    The default axis is the one of outputs of shape ``(batch, length, heads, features)``, as in
    Keras's attention. `unidrop.family.drop_head` has the details. The other parameters, returns and
    errors are as in `dropout`; ValueError if x has no such axis.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import drop_head
    >>> drop_head(tf.ones((1, 2, 6, 1)), 0.5, key=Key(42))[0, :, :, 0].numpy()
    array([[2., 0., 0., 0., 0., 2.],
           [2., 0., 0., 0., 0., 2.]], dtype=float32)
    """

    def make_plan(x: Any, rate: Rate) -> DropoutPlan:
        return plan_drop_head(x, rate, axis=axis, global_shape=global_shape, start=start)

    return _run(make_plan, x, rate, key, return_mask, name, has_schedule=True)
