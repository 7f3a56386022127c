"""Word dropout for TensorFlow."""

from collections.abc import Sequence
from typing import Any

from unidrop.adapters.tensorflow.family import _run
from unidrop.key import Key
from unidrop.plan import DropoutPlan
from unidrop.rate import Rate
from unidrop.word_dropout import plan_word_dropout

__all__ = ["word_dropout"]


def word_dropout(
    x: Any,
    rate: float,
    *,
    unk_id: int,
    special_ids: Sequence[int] = (),
    key: Key,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    name: str | None = None,
) -> Any:
    """Replace tokens by the one for unknown words with probability rate.

    `unidrop.family.word_dropout` describes x, the tokens and the results. The other parameters are
    as in `dropout`.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import word_dropout
    >>> tokens = tf.constant([5, 6, 7, 8, 0, 0])
    >>> word_dropout(tokens, 0.5, unk_id=1, special_ids=(0,), key=Key(42)).numpy()
    array([5, 1, 1, 1, 0, 0], dtype=int32)
    """
    options: dict[str, Any] = {"unk_id": unk_id, "special_ids": special_ids}
    options |= {"global_shape": global_shape, "start": start}

    def make_plan(x: Any, rate: Rate) -> DropoutPlan:
        return plan_word_dropout(x, rate, **options)

    return _run(make_plan, x, rate, key, return_mask, name)
