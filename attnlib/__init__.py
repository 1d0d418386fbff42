"""attnlib: attention for JAX, any score, any mask, any axes, in one engine."""

import importlib
import typing

from attnlib import convert, inspect, masks, modifiers, positions, scores
from attnlib._api import Explanation, additive_attention, attention, dot_product_attention, explain, merge_attention
from attnlib._attention_fn import attention_fn
from attnlib._core.context import Context
from attnlib.cache import KVCache, PagedKVCache
from attnlib.layers import init_multi_head_attention, multi_head_attention
from attnlib.linen import (
    AdditiveAttention,
    BucketedPositionBias,
    DotProductAttention,
    MultiHeadAttention,
    RelativePositionBias,
)
from attnlib.regularization import apply_constraints, constrain, parameter_penalty, regularization_loss

if typing.TYPE_CHECKING:
    from attnlib import nnx

__all__ = [
    "AdditiveAttention",
    "BucketedPositionBias",
    "Context",
    "DotProductAttention",
    "Explanation",
    "KVCache",
    "MultiHeadAttention",
    "PagedKVCache",
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


def __getattr__(name: str) -> typing.Any:
    if name == "nnx":  # imported where it is used, since flax.nnx takes a quarter of the time of all imports
        return importlib.import_module("attnlib.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
