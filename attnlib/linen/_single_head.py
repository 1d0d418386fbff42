"""The Flax modules without heads or projections: Keras' AdditiveAttention and Attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from attnlib._core.array_types import Array, Bias, BoolMask, Rng
from attnlib._core.validation import check_bool
from attnlib.layers._inputs import default_operands
from attnlib.layers._projections import Initializer, vector_glorot_uniform
from attnlib.layers._single_head import single_head_attention
from attnlib.linen._base import AttentionModule
from attnlib.masks._base import Mask
from attnlib.scores import Additive, Concat, Dot, Score


class SingleHeadAttention(AttentionModule):
    """What the two share: everything but their fields and their scores."""

    @nn.compact
    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        query_mask: BoolMask | None = None,
        key_mask: BoolMask | None = None,
        mask: BoolMask | Mask | None = None,
        bias: Bias | None = None,
        is_causal: bool = False,
        deterministic: bool | None = None,
        dropout_rng: Rng | None = None,
        return_weights: bool = False,
        sow_weights: bool = False,
    ) -> Any:
        """Applies the layer.

        Args:
          query: `(*batch and attention axes, D)`; for one sequence axis `(B, T, D)`.
          key: `(..., D)`; default: query.
          value: `(..., E)`, with the key's positions; default: key. (Keras' layers take value before key.)
          query_mask, key_mask: bool, the shape of query / key without features, True = real; a masked query row
            gives zero output.
          mask: bool array or `Mask` over `(*batch, *query axes, *key axes)`, or of the last two kinds of axes alone.
          bias: added to the logits, shapes as for mask.
          is_causal, deterministic, dropout_rng, return_weights, sow_weights: as in `MultiHeadAttention`.

        Returns:
          output `(*query's leading axes, E)`, or (output, weights), weights being `(*batch, *query axes, *key axes)`.
        """
        key, value = default_operands(query, key, value)
        results = single_head_attention(
            self._score(query), query, key, value, attention_axes=self.attention_axes, query_mask=query_mask,
            key_mask=key_mask, mask=mask, bias=bias, is_causal=is_causal,
            return_weights=self.wants_weights(return_weights, sow_weights), precision=self.precision,
            implementation=self.implementation, block_sizes=self.block_sizes,
            **self.dropout_options(deterministic, dropout_rng),
        )  # fmt: skip
        return self.finish(results, return_weights, sow_weights)

    def _score(self, query: Array) -> Score:
        """The score for queries of such features, whose parameters it declares."""
        raise NotImplementedError


class AdditiveAttention(SingleHeadAttention):
    """Additive (Bahdanau) attention: softmax(sum_d scale_d tanh(query_d + key_d)) value, without heads.

    Parameters: `scale (D,)` with use_scale.

    Attributes:
      use_scale: whether to learn the scale; without it every feature counts 1. Default True.
      scale_init: initialiser of the scale; default: glorot uniform.
      attention_axes: axes attended over, numbered in the arrays passed (the last sequence axis is -2); default: every
        axis but the first and the features.
      dropout_rate: fraction of attention weights dropped in training, in [0, 1); default 0.
      deterministic: whether dropout is off; here or in the call, needed where dropout_rate > 0.
      param_dtype: of the scale; default float32.
      precision, implementation, block_sizes: as in `attnlib.additive_attention`.

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

    def _score(self, query: Array) -> Score:
        use_scale, shape = check_bool(self.use_scale, "use_scale"), query.shape[-1:]
        return Additive(self.param("scale", self.scale_init, shape, self.param_dtype) if use_scale else None)


class DotProductAttention(SingleHeadAttention):
    """Dot-product (Luong) attention without heads or projections: softmax(scale * query key^T) value.

    Parameters: `scale ()`, ones, with use_scale; `concat_score_weight ()`, ones, with score_mode="concat".

    Attributes:
      use_scale: whether to learn a scalar scale; without it the scale is 1, as in Keras' Attention. Default False.
      score_mode: "dot", or "concat": concat_score_weight * sum_d tanh(scale * (query_d + key_d)).
      attention_axes: axes attended over, numbered in the arrays passed (the last sequence axis is -2); default: every
        axis but the first and the features.
      dropout_rate: fraction of attention weights dropped in training, in [0, 1); default 0.
      deterministic: whether dropout is off; here or in the call, needed where dropout_rate > 0.
      param_dtype: of the scalars; default float32.
      precision, implementation, block_sizes: as in `attnlib.dot_product_attention`.

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

    def _score(self, query: Array) -> Score:
        del query
        if self.score_mode not in ("dot", "concat"):
            raise ValueError(f'score_mode must be "dot" or "concat"; got {self.score_mode!r}.')
        ones = nn.initializers.ones
        use_scale = check_bool(self.use_scale, "use_scale")
        scale = self.param("scale", ones, (), self.param_dtype) if use_scale else None
        if self.score_mode == "dot":
            return Dot(1.0 if scale is None else scale)
        return Concat(self.param("concat_score_weight", ones, (), self.param_dtype), scale)
