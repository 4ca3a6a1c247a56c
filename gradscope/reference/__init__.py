"""The residual transformer of the depth study, with every placement of skips and norms.

>>> from gradscope import reference
>>> model = reference.Transformer("pre_norm", depth=2)
>>> model.branches[0]
'blocks.0.attention.branch'
"""

from gradscope.reference.transformer import (
    INITIALIZATIONS,
    Attention,
    Block,
    Branch,
    FeedForward,
    Sublayer,
    Transformer,
    next_token_loss,
)
from gradscope.reference.variants import LAYERSCALE_START, VARIANTS, Variant, deepnorm_constants

__all__ = [
    "INITIALIZATIONS",
    "LAYERSCALE_START",
    "VARIANTS",
    "Attention",
    "Block",
    "Branch",
    "FeedForward",
    "Sublayer",
    "Transformer",
    "Variant",
    "deepnorm_constants",
    "next_token_loss",
]
