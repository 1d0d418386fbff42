"""Attention layers as Flax linen modules: they declare parameters and call `attnlib.layers`, nothing else."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attnlib import _checks, layers
from attnlib._dimensions import (
    Affine,
    Dimensions,
    Initializer,
    default_bias_init,
    default_kernel_init,
    projection_inits,
    vector_glorot_uniform,
)
from attnlib._mask import Mask
from attnlib._types import Array, Bias, BoolMask, Rng
from attnlib.scores import Additive, Concat, Dot, Score

__all__ = ["AdditiveAttention", "DotProductAttention", "MultiHeadAttention"]


class _Projection(nn.Module):
    """Declares the kernel and bias of one projection and gives them as a dict."""

    affine: Affine
    use_bias: bool
    kernel_init: Initializer
    bias_init: Initializer
    param_dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        params = {"kernel": self.param("kernel", self.affine.init_kernel, self.kernel_init, self.param_dtype)}
        if self.use_bias:
            params["bias"] = self.param("bias", self.affine.init_bias, self.bias_init, self.param_dtype)
        return params


class _ScoreScale(nn.Module):
    """Declares the learned scale `(N, D)` of an additive score."""

    shape: tuple[int, ...]
    scale_init: Initializer
    param_dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {"scale": self.param("scale", self.scale_init, self.shape, self.param_dtype)}


class _Attention(nn.Module):
    """What the three modules share: options of the call, dropout and its key."""

    def _dropout(self, deterministic: bool | None, rng: Rng | None) -> dict[str, Any]:
        """The rate and key to use: none where deterministic, else the call's key or the "dropout" stream."""
        rate = _checks.dropout_rate(self.dropout_rate)
        if rate == 0.0:
            return {"dropout_rate": 0.0, "dropout_rng": None}
        declared = self.deterministic
        if nn.merge_param("deterministic", declared, deterministic):
            return {"dropout_rate": 0.0, "dropout_rng": None}
        return {"dropout_rate": rate, "dropout_rng": self.make_rng("dropout") if rng is None else rng}

    def _finish(self, results: Any, return_weights: bool, sow_weights: bool) -> Any:
        if sow_weights:
            self.sow("intermediates", "attention_weights", results[1])
        return results if return_weights or not sow_weights else results[0]


class MultiHeadAttention(_Attention):
    """Multi-head attention with query, key, value and output projections, over any axes.

    Parameters: `query|key|value: {kernel (C, N, D), bias (N, D)}`, `out: {kernel (N, E, *O), bias (*O)}`, with
    use_gate `gate: {kernel (C, N, E), bias (N, E)}`, with score="additive" `score: {scale (N, D)}`.

    Attributes:
      num_heads: query heads N.
      key_dim: features D of a head of query and key; default: query features / num_heads.
      value_dim: features E of a head of value; default: key_dim.
      num_kv_heads: key/value heads K, a divisor of N (grouped-query attention; 1: multi-query); default: N.
      use_bias: whether projections have a bias; default True.
      output_shape: the output's last axis, or several; default: query features.
      attention_axes: axes attended over, numbered in the arrays passed (the last sequence axis is -2); default: every
        axis but the first and the features.
      dropout_rate: fraction of attention weights dropped in training, in [0, 1); default 0.
      deterministic: whether dropout is off; here or in the call, needed where dropout_rate > 0.
      use_gate: whether a sigmoid gate from the query multiplies the attention output (Qiu et al. 2025).
      sliding_window: w masks keys w or more positions away on either side; default: none.
      score: "dot" (scaled by 1 / sqrt(key_dim)), "additive" (with a learned scale) or an `attnlib.scores.Score`.
      logits_soft_cap: c bounds the logits to (-c, c) by c * tanh(x / c); default: none.
      kernel_init, bias_init: initialisers; kernels are initialised as matrices, so fans are those of the projection.
        Axes named by `nn.with_partitioning` are those of the parameters above, whose axes differ in `out`.
      out_kernel_init, out_bias_init: those of the output projection; default: kernel_init, bias_init.
      scale_init: of the scale of score="additive"; default: glorot uniform.
      kernel_regularizer, bias_regularizer, activity_regularizer: functions from a kernel, a bias, a projection's
        output to a scalar (the last divided by the size of the first axis, as in Keras); sown into "losses", summed by
        `attnlib.regularization_loss`.
      dtype: to compute in; default: promoted from inputs and parameters.
      param_dtype: of the parameters; default float32.
      precision: of matrix products.
      implementation, block_sizes: as in `attnlib.dot_product_attention`.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> layer = attnlib.MultiHeadAttention(num_heads=4, key_dim=16, num_kv_heads=2)
      >>> x = jnp.ones((2, 10, 32))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> layer.apply(variables, x, is_causal=True).shape
      (2, 10, 32)

    Source: Vaswani et al., "Attention Is All You Need" (2017); Ainslie et al., "GQA" (2023).
    """

    num_heads: int
    key_dim: int | None = None
    value_dim: int | None = None
    num_kv_heads: int | None = None
    use_bias: bool = True
    output_shape: int | Sequence[int] | None = None
    attention_axes: int | Sequence[int] | None = None
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    use_gate: bool = False
    sliding_window: int | None = None
    score: str | Score = "dot"
    logits_soft_cap: float | None = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init
    out_kernel_init: Initializer | None = None
    out_bias_init: Initializer | None = None
    scale_init: Initializer = vector_glorot_uniform
    kernel_regularizer: Callable[[jax.Array], jax.Array] | None = None
    bias_regularizer: Callable[[jax.Array], jax.Array] | None = None
    activity_regularizer: Callable[[jax.Array], jax.Array] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    implementation: str | Sequence[str] | None = None
    block_sizes: tuple[int, int] | None = None

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
          query: `(*batch and attention axes, C)`; for one sequence axis `(B, T, C)`.
          key: `(..., C_key)`; default: query.
          value: `(..., C_value)`, with the key's positions; default: key.
          query_mask, key_mask: bool, the shape of query / key without features, True = real.
          mask: bool array or `Mask` over `(*batch, N, *query axes, *key axes)`; a Keras `(B, T, S)` mask is
            `mask[:, None]`.
          bias: added to the logits, shapes as for mask.
          is_causal: also mask keys after the query.
          deterministic: whether dropout is off.
          dropout_rng: a key for dropout; default: from the "dropout" stream.
          return_weights: also return the weights `(*batch, N, *query axes, *key axes)`.
          sow_weights: sow them into "intermediates" as "attention_weights".

        Returns:
          output `(*query's leading axes, *output_shape)`, or (output, weights).
        """
        key, value = layers.default_operands(query, key, value)
        params = self._declare(query.shape[-1], key.shape[-1], value.shape[-1])
        output, weights, activities = layers.project_and_attend(
            params, query, key, value, score=self.score, attention_axes=self.attention_axes, query_mask=query_mask,
            key_mask=key_mask, mask=mask, bias=bias, is_causal=is_causal, sliding_window=self.sliding_window,
            return_weights=return_weights or sow_weights, dtype=self.dtype, precision=self.precision,
            logits_soft_cap=self.logits_soft_cap, implementation=self.implementation, block_sizes=self.block_sizes,
            **self._dropout(deterministic, dropout_rng),
        )  # fmt: skip
        self._sow_losses(params, activities)
        return self._finish((output, weights) if return_weights or sow_weights else output, return_weights, sow_weights)

    def _declare(self, query_features: int, key_features: int, value_features: int) -> dict[str, Any]:
        dimensions = Dimensions.resolve(
            query_features, num_heads=self.num_heads, key_dim=self.key_dim, value_dim=self.value_dim,
            num_kv_heads=self.num_kv_heads, output_shape=self.output_shape, use_gate=self.use_gate,
        )  # fmt: skip
        inits = (self.kernel_init, self.bias_init, self.out_kernel_init, self.out_bias_init)
        params = {
            name: _Projection(affine, self.use_bias, *projection_inits(name, *inits), self.param_dtype, name=name)()
            for name, affine in dimensions.projections(query_features, key_features, value_features).items()
        }
        if layers.has_score_parameters(self.score):
            shape = (dimensions.num_heads, dimensions.key_dim)
            params["score"] = _ScoreScale(shape, self.scale_init, self.param_dtype, name="score")()
        return params

    def _sow_losses(self, params: dict[str, Any], activities: dict[str, jax.Array]) -> None:
        if self.is_initializing():
            return  # so that `init` gives parameters alone
        terms = [(self.kernel_regularizer, p["kernel"]) for p in params.values() if "kernel" in p]
        terms += [(self.bias_regularizer, p["bias"]) for p in params.values() if "bias" in p]
        losses = [regularizer(array) for regularizer, array in terms if regularizer is not None]
        if self.activity_regularizer is not None:  # a mean over the batch, as in Keras
            losses += [self.activity_regularizer(x) / max(x.shape[0], 1) for x in activities.values()]
        if losses:
            self.sow("losses", "regularization", sum(losses), reduce_fn=operator.add, init_fn=lambda: 0.0)


class AdditiveAttention(_Attention):
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
          value: `(..., E)`, with the key's positions; default: key.
          query_mask, key_mask: bool, the shape of query / key without features, True = real; a masked query row
            gives zero output.
          mask: bool array or `Mask` over `(*batch, *query axes, *key axes)`, or of the last two kinds of axes alone.
          bias: added to the logits, shapes as for mask.
          is_causal, deterministic, dropout_rng, return_weights, sow_weights: as in `MultiHeadAttention`.

        Returns:
          output `(*query's leading axes, E)`, or (output, weights), weights being `(*batch, *query axes, *key axes)`.
        """
        key, value = layers.default_operands(query, key, value)
        shape = (query.shape[-1],)
        scale = (
            self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        )
        results = layers.single_head_attention(
            Additive(scale), query, key, value, attention_axes=self.attention_axes, query_mask=query_mask,
            key_mask=key_mask, mask=mask, bias=bias, is_causal=is_causal,
            return_weights=return_weights or sow_weights, precision=self.precision,
            implementation=self.implementation, block_sizes=self.block_sizes,
            **self._dropout(deterministic, dropout_rng),
        )  # fmt: skip
        return self._finish(results, return_weights, sow_weights)


class DotProductAttention(_Attention):
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
        """Applies the layer; arguments and results as in `AdditiveAttention`."""
        key, value = layers.default_operands(query, key, value)
        results = layers.single_head_attention(
            self._score(), query, key, value, attention_axes=self.attention_axes, query_mask=query_mask,
            key_mask=key_mask, mask=mask, bias=bias, is_causal=is_causal,
            return_weights=return_weights or sow_weights, precision=self.precision,
            implementation=self.implementation, block_sizes=self.block_sizes,
            **self._dropout(deterministic, dropout_rng),
        )  # fmt: skip
        return self._finish(results, return_weights, sow_weights)

    def _score(self) -> Score:
        if self.score_mode not in ("dot", "concat"):
            raise ValueError(f'score_mode must be "dot" or "concat"; got {self.score_mode!r}.')
        ones = nn.initializers.ones
        scale = self.param("scale", ones, (), self.param_dtype) if self.use_scale else None
        if self.score_mode == "dot":
            return Dot(1.0 if scale is None else scale)
        return Concat(self.param("concat_score_weight", ones, (), self.param_dtype), scale)
