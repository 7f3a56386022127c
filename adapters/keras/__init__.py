"""Dropout layers for Keras: `keras.layers` under keys, with runs that resume.

Keras documentation: keras.layers.Dropout, keras.layers.AlphaDropout,
keras.layers.SpatialDropout1D/2D/3D,
keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention, keras.layers.Attention,
keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN (Keras 3).
"""

from unidrop.adapters.keras.layers import (
    AlphaDropout,
    Attention,
    DropKey,
    Dropout,
    DropPath,
    GroupQueryAttention,
    MultiHeadAttention,
    SpatialDropout1D,
    SpatialDropout2D,
    SpatialDropout3D,
    assign_seeds,
)
from unidrop.adapters.keras.rnn import (
    GRU,
    LSTM,
    GRUCell,
    LSTMCell,
    SimpleRNN,
    SimpleRNNCell,
)

__all__ = [
    "GRU",
    "LSTM",
    "AlphaDropout",
    "Attention",
    "DropKey",
    "DropPath",
    "Dropout",
    "GRUCell",
    "GroupQueryAttention",
    "LSTMCell",
    "MultiHeadAttention",
    "SimpleRNN",
    "SimpleRNNCell",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "assign_seeds",
]
