"""Dropout for TensorFlow, and members of its family: functions of a tensor and a key."""

from unidrop.adapters.tensorflow.drop_head import drop_head
from unidrop.adapters.tensorflow.embedding import embedding_dropout
from unidrop.adapters.tensorflow.family import (
    alpha_dropout,
    drop_block,
    drop_key,
    drop_path,
    gaussian_dropout,
    gaussian_noise,
    locked_dropout,
    patch_dropout,
)
from unidrop.adapters.tensorflow.functional import dropout
from unidrop.adapters.tensorflow.layer_drop import layer_drop
from unidrop.adapters.tensorflow.word_dropout import word_dropout
from unidrop.adapters.tensorflow.zoneout import zoneout

__all__ = [
    "alpha_dropout",
    "drop_block",
    "drop_head",
    "drop_key",
    "drop_path",
    "dropout",
    "embedding_dropout",
    "gaussian_dropout",
    "gaussian_noise",
    "layer_drop",
    "locked_dropout",
    "patch_dropout",
    "word_dropout",
    "zoneout",
]
