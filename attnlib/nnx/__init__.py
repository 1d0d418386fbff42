"""Attention layers as Flax NNX modules, which hold parameters, caches and random streams, and call `attnlib.layers`.

They are the layers of `attnlib.linen` with the same parameters: `nnx.to_pure_dict(nnx.state(layer, nnx.Param))` is the
tree of the linen module.
"""

from attnlib.nnx._multi_head import MultiHeadAttention
from attnlib.nnx._position_bias import BucketedPositionBias, RelativePositionBias
from attnlib.nnx._single_head import AdditiveAttention, DotProductAttention

__all__ = [
    "AdditiveAttention",
    "BucketedPositionBias",
    "DotProductAttention",
    "MultiHeadAttention",
    "RelativePositionBias",
]
