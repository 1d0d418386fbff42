"""The Flax modules without heads and projections, as AdditiveAttention and Attention in Keras."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from attnlib._core.context import Context
from attnlib._modules.single_head import AdditiveCall, DotProductCall, SingleHeadCall
from attnlib.layers._projections import Initializer, vector_glorot_uniform
from attnlib.linen._base import AttentionModule, explains_errors


class SingleHeadAttention(SingleHeadCall, AttentionModule):
    """The base class of the modules without heads: their parameters."""

    def _params(self, query_features: int, key_features: int, value_features: int) -> dict[str, Any]:
        del key_features, value_features
        specs = self._parameter_specs(query_features)
        return {name: self.param(name, spec.initialize, self.param_dtype) for name, spec in specs.items()}


@explains_errors
class AdditiveAttention(AdditiveCall, SingleHeadAttention):
    """Additive (Bahdanau) attention: softmax(sum_d scale_d tanh(query_d + key_d)) value, without heads.

    Parameters: `scale (D,)` with use_scale.

    Attributes:
      use_scale: whether to learn the scale; otherwise it is 1. Default True.
      scale_init: initialiser of the scale; default: glorot uniform.
      param_dtype: dtype of the scale; default float32.
      attention_axes, dropout_rate, deterministic, precision, implementation, block_sizes, context,
        normalize: as in `MultiHeadAttention`.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> layer = attnlib.AdditiveAttention()
      >>> query, key = jnp.ones((2, 5, 8)), jnp.ones((2, 7, 8))
      >>> variables = layer.init(jax.random.key(0), query, key)
      >>> output, weights = layer.apply(variables, query, key, return_weights=True)
      >>> output.shape, weights.shape
      ((2, 5, 8), (2, 5, 7))

    Source: Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2015).
    """

    use_scale: bool = True
    attention_axes: int | Sequence[int] | None = None
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    scale_init: Initializer = vector_glorot_uniform
    param_dtype: Any = jnp.float32
    precision: Any = None
    implementation: str | Sequence[str] | None = None
    block_sizes: tuple[int, int] | None = None
    context: str | Context | None = dataclasses.field(default=None, kw_only=True)
    normalize: bool = dataclasses.field(default=True, kw_only=True)


@explains_errors
class DotProductAttention(DotProductCall, SingleHeadAttention):
    """Dot-product (Luong) attention without heads or projections: softmax(scale * query key^T) value.

    Parameters: `scale ()`, ones, with use_scale; `concat_score_weight ()`, ones, with score_mode="concat".

    Attributes:
      use_scale: whether to learn a scalar scale; otherwise it is 1, as in Keras' Attention. Default False.
      score_mode: "dot", or "concat": concat_score_weight * sum_d tanh(scale * (query_d + key_d)).
      param_dtype: dtype of the scalars; default float32.
      attention_axes, dropout_rate, deterministic, precision, implementation, block_sizes, context,
        normalize: as in `MultiHeadAttention`.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> layer = attnlib.DotProductAttention()
      >>> layer.apply({}, jnp.ones((2, 5, 8)), jnp.ones((2, 7, 8))).shape
      (2, 5, 8)

    Source: Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation" (2015).
    """

    use_scale: bool = False
    score_mode: str = "dot"
    attention_axes: int | Sequence[int] | None = None
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    implementation: str | Sequence[str] | None = None
    block_sizes: tuple[int, int] | None = None
    context: str | Context | None = dataclasses.field(default=None, kw_only=True)
    normalize: bool = dataclasses.field(default=True, kw_only=True)
