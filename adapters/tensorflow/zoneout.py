"""Zoneout for TensorFlow."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import tensorflow as tf

from unidrop.adapters.tensorflow.functional import as_tensor
from unidrop.key import Key, check_key
from unidrop.rate import Rate
from unidrop.zoneout import run_zoneout

__all__ = ["zoneout"]


def zoneout(
    new: Any,
    old: Any,
    rate: float,
    *,
    key: Key,
    training: bool = True,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    name: str | None = None,
) -> Any:
    """Keep the old value of each unit of a recurrent state with probability rate.

    `unidrop.family.zoneout` describes new, old, training and the results. The other parameters and
    the errors are as in `dropout`.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import zoneout
    >>> zoneout(tf.ones(6), tf.zeros(6), 0.5, key=Key(42)).numpy()
    array([1., 0., 0., 0., 0., 1.], dtype=float32)
    """
    options: dict[str, Any] = {"training": training, "global_shape": global_shape, "start": start}
    with nullcontext() if name is None else tf.name_scope(name):
        new, options["old"] = as_tensor(new), as_tensor(old)
        check_key(key)
        return run_zoneout(new, Rate.from_p(rate, "rate"), key, return_mask, **options)
