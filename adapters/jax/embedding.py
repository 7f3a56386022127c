"""Embedding dropout for JAX."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike

from unidrop.adapters.jax.functional import as_array, as_key
from unidrop.embedding import check_indices, look_up, plan_embedding_dropout
from unidrop.key import Key
from unidrop.rate import Rate

__all__ = ["embedding_dropout"]


def embedding_dropout(
    weight: ArrayLike,
    indices: ArrayLike,
    rate: float,
    key: Key | jax.Array | None = None,
    *,
    deterministic: bool = False,
    global_shape: Sequence[int] | None = None,
    start: Sequence[Any] | None = None,
    return_mask: bool = False,
) -> Any:
    """Look up embeddings of words, and drop words everywhere with probability rate.

    `unidrop.family.embedding_dropout` has the details. The other parameters and errors are as in
    `dropout`. As in `jax.numpy.take`, an index out of range has a row of NaN.

    Examples
    --------
    >>> import jax
    >>> from unidrop import Key
    >>> from unidrop.adapters.jax import embedding_dropout
    >>> indices = jax.numpy.array([0, 1, 1, 5, 0])
    >>> embedding_dropout(jax.numpy.ones((6, 1)), indices, 0.5, Key(42))[:, 0]
    Array([2., 0., 0., 2., 2.], dtype=float32)
    """
    weight, indices = as_array(weight, "weight"), jnp.asarray(indices)
    check_indices(indices)
    options: dict[str, Any] = {"global_shape": global_shape, "start": start}
    options["training"] = not deterministic
    plan = plan_embedding_dropout(weight, Rate.from_p(rate, "rate"), **options)
    return look_up(plan, weight, indices, as_key(key) if plan.drops else key, return_mask)
