"""Dropout and attention for PyTorch, under the names of `torch.nn` and `torch.nn.functional`.

PyTorch documentation: torch.nn.Dropout, torch.nn.functional.dropout,
scaled_dot_product_attention, MultiheadAttention (2.13).
"""

from unidrop.adapters.torch.attention import MultiheadAttention, scaled_dot_product_attention
from unidrop.adapters.torch.functional import dropout, dropout1d, dropout2d, dropout3d
from unidrop.adapters.torch.modules import Dropout, Dropout1d, Dropout2d, Dropout3d
from unidrop.adapters.torch.seeds import assign_seeds

__all__ = [
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "MultiheadAttention",
    "assign_seeds",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "scaled_dot_product_attention",
]
