"""Uses the Flax adapter."""

from typing import assert_type

import jax
from flax import nnx
from jax import numpy as jnp

import unidrop
from unidrop import Key
from unidrop.adapters.flax import Dropout, DropoutCalls, assign_seeds

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

module.calls = "7"  # type: ignore
Dropout(0.1, seed="42")  # type: ignore
assign_seeds(module, "42")  # type: ignore
assign_seeds([module], 42)  # type: ignore
