"""Dropout for PyTorch, under the names of `torch.nn` and `torch.nn.functional`.

PyTorch documentation: torch.nn.Dropout, torch.nn.functional.dropout (2.13).
"""

from unidrop.adapters.torch.functional import dropout, dropout1d, dropout2d, dropout3d
from unidrop.adapters.torch.modules import Dropout, Dropout1d, Dropout2d, Dropout3d
from unidrop.adapters.torch.seeds import assign_seeds

__all__ = [
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "assign_seeds",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
]
