"""Members of the family of dropout, under the names of `torch.nn`, timm and torchvision.

PyTorch documentation: torch.nn.AlphaDropout, torch.nn.FeatureAlphaDropout (2.13); timm:
timm.layers.DropPath (1.0); torchvision: torchvision.ops.StochasticDepth (0.28); PyTorch-NLP:
torchnlp.nn.LockedDropout (0.5).
"""

from unidrop.adapters.torch.family.alpha import (
    AlphaDropout,
    FeatureAlphaDropout,
    alpha_dropout,
    feature_alpha_dropout,
)
from unidrop.adapters.torch.family.attention import DropHead, DropKey, drop_head, drop_key
from unidrop.adapters.torch.family.drop_block import (
    DropBlock2d,
    DropBlock3d,
    drop_block2d,
    drop_block3d,
)
from unidrop.adapters.torch.family.drop_connect import DropConnect
from unidrop.adapters.torch.family.embedding import EmbeddingDropout, embedding_dropout
from unidrop.adapters.torch.family.gaussian import (
    GaussianDropout,
    GaussianNoise,
    gaussian_dropout,
    gaussian_noise,
)
from unidrop.adapters.torch.family.sequences import LockedDropout, locked_dropout
from unidrop.adapters.torch.family.stochastic_depth import (
    DropPath,
    StochasticDepth,
    drop_path,
    stochastic_depth,
)
from unidrop.adapters.torch.family.tokens import (
    PatchDropout,
    PatchDropoutWithIndices,
    patch_dropout,
)

__all__ = [
    "AlphaDropout",
    "DropBlock2d",
    "DropBlock3d",
    "DropConnect",
    "DropHead",
    "DropKey",
    "DropPath",
    "EmbeddingDropout",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "GaussianNoise",
    "LockedDropout",
    "PatchDropout",
    "PatchDropoutWithIndices",
    "StochasticDepth",
    "alpha_dropout",
    "drop_block2d",
    "drop_block3d",
    "drop_head",
    "drop_key",
    "drop_path",
    "embedding_dropout",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "gaussian_noise",
    "locked_dropout",
    "patch_dropout",
    "stochastic_depth",
]
