"""Dropout for JAX: a pure function of an array, a rate and a key, under every transformation."""

from unidrop.adapters.jax.attention import dot_product_attention
from unidrop.adapters.jax.drop_head import drop_head
from unidrop.adapters.jax.embedding import embedding_dropout
from unidrop.adapters.jax.family import (
    alpha_dropout,
    drop_block,
    drop_key,
    drop_path,
    feature_alpha_dropout,
    gaussian_dropout,
    gaussian_noise,
    locked_dropout,
    patch_dropout,
)
from unidrop.adapters.jax.functional import as_key, dropout
from unidrop.adapters.jax.layer_drop import layer_drop
from unidrop.adapters.jax.word_dropout import word_dropout
from unidrop.adapters.jax.zoneout import zoneout

__all__ = [
    "alpha_dropout",
    "as_key",
    "dot_product_attention",
    "drop_block",
    "drop_head",
    "drop_key",
    "drop_path",
    "dropout",
    "embedding_dropout",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "gaussian_noise",
    "layer_drop",
    "locked_dropout",
    "patch_dropout",
    "word_dropout",
    "zoneout",
]
