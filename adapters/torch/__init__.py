"""Dropout and attention for PyTorch, under the names of `torch.nn` and `torch.nn.functional`.

PyTorch documentation: torch.nn.Dropout, torch.nn.functional.dropout,
scaled_dot_product_attention, MultiheadAttention (2.13).
"""

from unidrop.adapters.torch.attention import MultiheadAttention, scaled_dot_product_attention
from unidrop.adapters.torch.family import (
    AlphaDropout,
    DropBlock2d,
    DropBlock3d,
    DropKey,
    DropPath,
    FeatureAlphaDropout,
    GaussianDropout,
    GaussianNoise,
    LockedDropout,
    PatchDropout,
    PatchDropoutWithIndices,
    StochasticDepth,
    alpha_dropout,
    drop_block2d,
    drop_block3d,
    drop_key,
    drop_path,
    feature_alpha_dropout,
    gaussian_dropout,
    gaussian_noise,
    locked_dropout,
    patch_dropout,
    stochastic_depth,
)
from unidrop.adapters.torch.functional import dropout, dropout1d, dropout2d, dropout3d
from unidrop.adapters.torch.modules import Dropout, Dropout1d, Dropout2d, Dropout3d
from unidrop.adapters.torch.seeds import assign_seeds

__all__ = [
    "AlphaDropout",
    "DropBlock2d",
    "DropBlock3d",
    "DropKey",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "GaussianNoise",
    "LockedDropout",
    "MultiheadAttention",
    "PatchDropout",
    "PatchDropoutWithIndices",
    "StochasticDepth",
    "alpha_dropout",
    "assign_seeds",
    "drop_block2d",
    "drop_block3d",
    "drop_key",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "gaussian_noise",
    "locked_dropout",
    "patch_dropout",
    "scaled_dot_product_attention",
    "stochastic_depth",
]
