"""Multi-head attention as a Flax module: its parameters, its losses and its cache."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.core import max_dim

from attnlib._core.array_types import ScoreMod
from attnlib._core.context import Context
from attnlib._modules.multi_head import CACHE_NAMES, MultiHeadCall
from attnlib.cache import KVCache
from attnlib.layers._multi_head import Rotary
from attnlib.layers._projections import Initializer, default_bias_init, default_kernel_init
from attnlib.linen._base import AttentionModule, ParameterGroup, explains_errors
from attnlib.scores import Score


@explains_errors
class MultiHeadAttention(MultiHeadCall, AttentionModule):
    """Multi-head attention with query, key, value and output projections, over any axes.

    Parameters: `query|key|value: {kernel (C, N, D), bias (N, D)}`, `out: {kernel (N, E, *O), bias (*O)}`, with
    use_gate `gate: {kernel (C, N, E), bias (N, E)}`, with score="additive" `score: {scale (N, D)}`, with use_scale
    `score: {scale (N,)}`, with normalize_qk `query_norm|key_norm: {scale (D,)}`, with use_sink `sink: {logit (N,)}`,
    with num_memory `memory: {key (M, K, D), value (M, K, E)}`.

    Attributes:
      num_heads: query heads N. By position, fields are num_heads, key_dim, as in Keras (in PyTorch: features, heads).
      key_dim: features D of a head of query and key; default: query features / num_heads.
      value_dim: features E of a head of value; default: key_dim.
      num_kv_heads: key/value heads K, a divisor of N (grouped-query attention; 1: multi-query); default: N.
      use_bias: whether projections have a bias; default True.
      output_shape: the last axis or axes of the output; default: query features.
      attention_axes: axes attended over, numbered in the arrays passed (the last sequence axis is -2); default: every
        axis but the first and the features.
      dropout_rate: fraction of attention weights dropped in training, in [0, 1); default 0.
      deterministic: whether dropout is off; required if dropout_rate > 0, here or in the call.
      use_gate: whether a sigmoid gate, computed from the query, multiplies the output of attention (Qiu et al. 2025).
      sliding_window: w masks keys w or more positions away on either side; default: none.
      score: "dot" (scaled by 1 / sqrt(key_dim)), "additive" (with a learned scale) or an `attnlib.scores.Score`.
      use_scale: whether score="dot" has a learned scale for each head, initially 1 / sqrt(key_dim).
      normalize_qk: learned norms of query and key: "layer" or True as in Flax (Dehghani et al. 2023), "rms" (Henry et
        al. 2020), or False.
      use_sink: whether each head has a learned sink, a logit without a value that takes a share of the weight.
      num_memory: the number M of learned keys and values that every query attends whatever the mask (Sukhbaatar et al.
        2019). Biases, score_mod and rotary positions do not apply to them, and normalize=False is refused. In weights,
        they come before the keys. Default 0.
      rotary: rotary positions of query and key (Su et al. 2021): True, or a function with the arguments of
        `attnlib.positions.rotary_embedding`, such as a `functools.partial` of it.
      score_mod: modifies logits, as in `attnlib.dot_product_attention`; or a module that returns such a function for a
        number of heads, such as `RelativePositionBias` and `BucketedPositionBias`.
      decode: whether the layer appends its tokens to a cache and attends causally to all tokens in the cache, as in
        Flax. It needs self-attention and one attention axis. `init` with an input of the greatest length returns an
        empty cache, the collection "cache" with `cached_key (*batch, length, K, D)`, `cached_value` and `cache_index`;
        with a sliding_window below that length, a ring of sliding_window tokens. `apply` takes any number of tokens and
        needs `mutable=["cache"]`.
      logits_soft_cap: c bounds the logits to (-c, c) by c * tanh(x / c); default: none.
      kernel_init, bias_init: initialisers. Each kernel is initialised as a matrix, with the fans of the projection.
        Names of `nn.with_partitioning` belong to the axes of the parameters above; those of `out` differ.
      out_kernel_init, out_bias_init: initialisers of the output projection; default: kernel_init, bias_init.
      scale_init: initialiser of the scale; default: glorot uniform with score="additive", 1 / sqrt(key_dim) with
        use_scale.
      kernel_regularizer, bias_regularizer, activity_regularizer: functions from a kernel, a bias, or the output of a
        projection to a scalar. The layer sows their sum into "losses", for `attnlib.regularization_loss`; the activity
        loss is divided by the size of the first axis, as in Keras.
      dtype: dtype of the computation; default: promoted from inputs and parameters.
      param_dtype: dtype of the parameters; default float32.
      precision: precision of matrix products.
      implementation, block_sizes, context, normalize: as in `attnlib.dot_product_attention`.

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
    use_scale: bool = False
    normalize_qk: bool | str = False
    use_sink: bool = False
    rotary: Rotary = False
    score_mod: ScoreMod | nn.Module | None = None
    decode: bool = False
    logits_soft_cap: float | None = None
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init
    out_kernel_init: Initializer | None = None
    out_bias_init: Initializer | None = None
    scale_init: Initializer | None = None
    kernel_regularizer: Callable[[jax.Array], jax.Array] | None = None
    bias_regularizer: Callable[[jax.Array], jax.Array] | None = None
    activity_regularizer: Callable[[jax.Array], jax.Array] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    implementation: str | Sequence[str] | None = None
    block_sizes: tuple[int, int] | None = None
    context: str | Context | None = dataclasses.field(default=None, kw_only=True)
    normalize: bool = dataclasses.field(default=True, kw_only=True)
    num_memory: int = dataclasses.field(default=0, kw_only=True)

    def _params(self, query_features: int, key_features: int, value_features: int) -> dict[str, Any]:
        groups = self._parameter_groups(query_features, key_features, value_features)
        self._check_unused(groups)
        return {group: ParameterGroup(specs, self.param_dtype, name=group)() for group, specs in groups.items()}

    def _check_unused(self, declared: dict[str, Any]) -> None:
        """Refuses parameters that the fields do not declare, since Flax ignores them."""
        params = self.variables.get("params", {})
        optional = ("gate", "score", "query_norm", "key_norm", "sink", "memory")
        unused = [name for name in optional if name in params and name not in declared]
        if not self.use_bias:
            unused += [f"{name}/bias" for name in declared if "bias" in params.get(name, {})]
        if unused:
            raise ValueError(
                f"the fields of this layer do not use the parameters {', '.join(unused)}. Use the fields of these "
                "parameters: attnlib.MultiHeadAttention(**attnlib.convert.module_fields(params), ...)."
            )

    def _score(self) -> str | Score:
        return self.score

    def _modifier(self) -> ScoreMod | None:
        return self.score_mod(self.num_heads) if isinstance(self.score_mod, nn.Module) else self.score_mod

    def _sow_losses(self, params: dict[str, Any], activations: dict[str, jax.Array]) -> None:
        if self.is_initializing():
            return  # `init` returns parameters only
        terms = [(self.kernel_regularizer, p["kernel"]) for p in params.values() if "kernel" in p]
        terms += [(self.bias_regularizer, p["bias"]) for p in params.values() if "bias" in p]
        losses = [regularizer(array) for regularizer, array in terms if regularizer is not None]
        if self.activity_regularizer is not None:  # the mean over the batch, as in Keras
            losses += [self.activity_regularizer(x) / max_dim(x.shape[0], 1) for x in activations.values()]
        if losses:
            self.sow("losses", "regularization", sum(losses), reduce_fn=operator.add, init_fn=lambda: 0.0)

    def _load_cache(self) -> KVCache | None:
        if not self.has_variable("cache", "cached_key"):
            if self.is_initializing():
                return None
            raise ValueError(
                "decode=True needs a cache, which init creates for an input of the greatest length: cache = "
                'layer.init(rng, longest)["cache"]. Then layer.apply({"params": params, "cache": cache}, tokens, '
                'mutable=["cache"]) returns (output, {"cache": next_cache}).'
            )
        key, value, length = (jnp.asarray(self.get_variable("cache", name)) for name in CACHE_NAMES)
        return KVCache(key, value, length, window=self._window(key.shape[-3]))

    def _store_cache(self, cache: KVCache) -> None:
        for name, array in zip(CACHE_NAMES, (cache.key, cache.value, cache.length), strict=True):
            self.put_variable("cache", name, array)
