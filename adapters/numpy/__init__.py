"""Dropout for NumPy, and members of its family, each with its backward pass."""

from unidrop.adapters.numpy.drop_head import drop_head, drop_head_backward
from unidrop.adapters.numpy.embedding import embedding_dropout, embedding_dropout_backward
from unidrop.adapters.numpy.family import (
    alpha_dropout,
    alpha_dropout_backward,
    drop_block,
    drop_block_backward,
    drop_key,
    drop_key_backward,
    drop_path,
    drop_path_backward,
    feature_alpha_dropout,
    feature_alpha_dropout_backward,
    gaussian_dropout,
    gaussian_dropout_backward,
    gaussian_noise,
    locked_dropout,
    locked_dropout_backward,
    patch_dropout,
    patch_dropout_backward,
)
from unidrop.adapters.numpy.functional import dropout, dropout_backward
from unidrop.adapters.numpy.layer_drop import layer_drop
from unidrop.adapters.numpy.word_dropout import word_dropout
from unidrop.adapters.numpy.zoneout import zoneout, zoneout_backward

__all__ = [
    "alpha_dropout",
    "alpha_dropout_backward",
    "drop_block",
    "drop_block_backward",
    "drop_head",
    "drop_head_backward",
    "drop_key",
    "drop_key_backward",
    "drop_path",
    "drop_path_backward",
    "dropout",
    "dropout_backward",
    "embedding_dropout",
    "embedding_dropout_backward",
    "feature_alpha_dropout",
    "feature_alpha_dropout_backward",
    "gaussian_dropout",
    "gaussian_dropout_backward",
    "gaussian_noise",
    "layer_drop",
    "locked_dropout",
    "locked_dropout_backward",
    "patch_dropout",
    "patch_dropout_backward",
    "word_dropout",
    "zoneout",
    "zoneout_backward",
]
