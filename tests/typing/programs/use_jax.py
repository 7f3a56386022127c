"""Uses the JAX adapter."""

from typing import assert_type

import jax
import numpy as np

import unidrop
from unidrop import Key
from unidrop.adapters.jax import as_key, dot_product_attention, dropout

key = Key(42)
x = jax.numpy.ones((2, 3))


def drop(return_mask: bool) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Return the output, and the mask too if requested."""
    return dropout(x, 0.1, key, return_mask=return_mask)


assert_type(dropout(x, 0.1, key), jax.Array)
assert_type(dropout(np.ones(3), 0.1, jax.random.key(1), broadcast_dims=(0,)), jax.Array)
assert_type(dropout(x, 0.1, deterministic=True), jax.Array)
assert_type(dropout(x, 0.1, key, global_shape=(4, 3), start=(2, 0)), jax.Array)
assert_type(dropout(x, 0.1, key, return_mask=True), tuple[jax.Array, jax.Array])
assert_type(as_key(jax.random.key(1)), Key)
assert_type(unidrop.adapters.jax.dropout(x, 0.1, key), jax.Array)

q = jax.numpy.ones((1, 3, 2, 4))
assert_type(dot_product_attention(q, q, q, dropout_rate=0.1, dropout_key=key), jax.Array)
assert_type(dot_product_attention(q, q, q, return_residual=True), tuple[jax.Array, jax.Array])

dot_product_attention(q, q, q, dropout_rate="0.1", dropout_key=key)  # type: ignore
dropout(x, 0.1, 42)  # type: ignore
dropout(x, "0.1", key)  # type: ignore
