"""Dropout for JAX: a pure function of an array, a rate and a key, under every transformation."""

from unidrop.adapters.jax.attention import dot_product_attention
from unidrop.adapters.jax.functional import as_key, dropout

__all__ = ["as_key", "dot_product_attention", "dropout"]
