"""Dropout layers for Keras: `keras.layers` under keys, with runs that resume.

Keras documentation: keras.layers.Dropout, keras.layers.AlphaDropout,
keras.layers.SpatialDropout1D/2D/3D, keras.layers.Embedding,
keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention, keras.layers.Attention,
keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN (Keras 3).
"""

from unidrop.adapters.keras.drop_connect import DropConnect
from unidrop.adapters.keras.drop_head import DropHead
from unidrop.adapters.keras.embedding import Embedding
from unidrop.adapters.keras.layer_drop import LayerDrop
from unidrop.adapters.keras.layers import (
    AlphaDropout,
    Attention,
    DropBlock2D,
    DropBlock3D,
    DropKey,
    Dropout,
    DropPath,
    GaussianDropout,
    GaussianNoise,
    GroupQueryAttention,
    MultiHeadAttention,
    PatchDropout,
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
from unidrop.adapters.keras.word_dropout import WordDropout
from unidrop.adapters.keras.zoneout import Zoneout

__all__ = [
    "GRU",
    "LSTM",
    "AlphaDropout",
    "Attention",
    "DropBlock2D",
    "DropBlock3D",
    "DropConnect",
    "DropHead",
    "DropKey",
    "DropPath",
    "Dropout",
    "Embedding",
    "GRUCell",
    "GaussianDropout",
    "GaussianNoise",
    "GroupQueryAttention",
    "LSTMCell",
    "LayerDrop",
    "MultiHeadAttention",
    "PatchDropout",
    "SimpleRNN",
    "SimpleRNNCell",
    "SpatialDropout1D",
    "SpatialDropout2D",
    "SpatialDropout3D",
    "WordDropout",
    "Zoneout",
    "assign_seeds",
]
