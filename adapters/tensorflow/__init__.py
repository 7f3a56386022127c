"""Dropout for TensorFlow, and members of its family: functions of a tensor and a key."""

from unidrop.adapters.tensorflow.family import alpha_dropout, drop_key, drop_path, locked_dropout
from unidrop.adapters.tensorflow.functional import dropout

__all__ = ["alpha_dropout", "drop_key", "drop_path", "dropout", "locked_dropout"]
