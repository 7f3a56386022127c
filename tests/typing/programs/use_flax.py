"""Uses the Flax adapter."""

from typing import assert_type

import jax
from flax import nnx
from jax import numpy as jnp

import unidrop
from unidrop import Key
from unidrop.adapters.flax import (
    Dropout,
    DropoutCalls,
    MultiHeadAttention,
    assign_seeds,
    dot_product_attention,
)

module = Dropout(0.1, seed=Key(42))
assert_type(module, Dropout)
assert_type(module(jnp.ones(3)), jax.Array)
assert_type(module(jnp.ones(3), rngs=nnx.Rngs(0)), jax.Array)
assert_type(module.calls, DropoutCalls)
assert_type(module.seed, Key | None)
module.calls = 7
module.calls = jnp.uint32(7)
assert_type(unidrop.adapters.flax.Dropout(0.1, rngs=nnx.Rngs(0)), Dropout)
assert_type(assign_seeds(module, 42), Dropout)
assert_type(assign_seeds(nnx.Sequential(module), Key(42)), nnx.Sequential)

attention = MultiHeadAttention(2, 4, dropout_rate=0.1, rngs=nnx.Rngs(0), seed=42)
assert_type(attention, MultiHeadAttention)
assert_type(attention(jnp.ones((1, 3, 4)), rngs=Key(7), is_causal=True), jax.Array)
assert_type(attention.calls, DropoutCalls)
attention.calls = 7
x = jnp.ones((1, 3, 2, 4))
assert_type(dot_product_attention(x, x, x, dropout_rate=0.1, dropout_rng=Key(7)), jax.Array)

MultiHeadAttention(2, 4, rngs=nnx.Rngs(0), seed="42")  # type: ignore
module.calls = "7"  # type: ignore
Dropout(0.1, seed="42")  # type: ignore
assign_seeds(module, "42")  # type: ignore
assign_seeds([module], 42)  # type: ignore
