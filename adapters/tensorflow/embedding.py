"""Embedding dropout for TensorFlow."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import tensorflow as tf

from unidrop.adapters.tensorflow.functional import as_tensor
from unidrop.embedding import check_indices, look_up, plan_embedding_dropout
from unidrop.key import Key, check_key
from unidrop.rate import Rate

__all__ = ["embedding_dropout"]


def embedding_dropout(
    params: Any,
    ids: Any,
    rate: float,
    *,
    key: Key,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
    name: str | None = None,
) -> Any:
    """Look up embeddings of words, and drop words everywhere with probability rate.

    `unidrop.family.embedding_dropout` has the details. The first two parameters have the names of
    `tf.nn.embedding_lookup`, and the others and the errors are as in `dropout`. Indices out of
    range are an error of `tf.gather`, which a GPU does not report.

    Examples
    --------
    >>> import tensorflow as tf
    >>> from unidrop import Key
    >>> from unidrop.adapters.tensorflow import embedding_dropout
    >>> embedding_dropout(tf.ones((6, 1)), tf.constant([0, 1, 1, 5, 0]), 0.5, key=Key(42))[:, 0]
    <tf.Tensor: shape=(5,), dtype=float32, numpy=array([2., 0., 0., 2., 2.], dtype=float32)>
    """
    with nullcontext() if name is None else tf.name_scope(name):
        params, ids = as_tensor(params), as_tensor(ids)
        check_key(key)
        check_indices(ids, "ids")
        options: dict[str, Any] = {"global_shape": global_shape, "start": start, "name": "params"}
        plan = plan_embedding_dropout(params, Rate.from_p(rate, "rate"), **options)
        return look_up(plan, params, ids, key, return_mask)
