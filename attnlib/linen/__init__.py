"""Attention layers as Flax linen modules, which declare parameters and call `attnlib.layers`."""

from attnlib.linen._multi_head import MultiHeadAttention
from attnlib.linen._position_bias import BucketedPositionBias, RelativePositionBias
from attnlib.linen._single_head import AdditiveAttention, DotProductAttention

__all__ = [
    "AdditiveAttention",
    "BucketedPositionBias",
    "DotProductAttention",
    "MultiHeadAttention",
    "RelativePositionBias",
]
