"""attnlib: attention for JAX, any score, any mask, any axes, in one engine."""

from attnlib import convert, inspect, masks, modifiers, nnx, positions, scores
from attnlib._api import Explanation, additive_attention, attention, dot_product_attention, explain, merge_attention
from attnlib._attention_fn import attention_fn
from attnlib.cache import KVCache
from attnlib.layers import init_multi_head_attention, multi_head_attention
from attnlib.linen import (
    AdditiveAttention,
    BucketedPositionBias,
    DotProductAttention,
    MultiHeadAttention,
    RelativePositionBias,
)
from attnlib.regularization import apply_constraints, constrain, parameter_penalty, regularization_loss

__all__ = [
    "AdditiveAttention",
    "BucketedPositionBias",
    "DotProductAttention",
    "Explanation",
    "KVCache",
    "MultiHeadAttention",
    "RelativePositionBias",
    "additive_attention",
    "apply_constraints",
    "attention",
    "attention_fn",
    "constrain",
    "convert",
    "dot_product_attention",
    "explain",
    "init_multi_head_attention",
    "inspect",
    "masks",
    "merge_attention",
    "modifiers",
    "multi_head_attention",
    "nnx",
    "parameter_penalty",
    "positions",
    "regularization_loss",
    "scores",
]
__version__ = "0.1.0"
