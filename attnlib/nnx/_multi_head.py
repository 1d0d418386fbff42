"""Multi-head attention as an NNX module: its parameters, its cache and its views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from attnlib._core.array_types import Array, BoolMask, ScoreMod
from attnlib._core.context import Context
from attnlib._core.options import CallOptions
from attnlib._core.validation import check_bool, check_int, check_int_or_ints, check_ints, per_axis
from attnlib._modules.multi_head import CACHE_NAMES, MultiHeadCall
from attnlib.cache import KVCache
from attnlib.layers._inputs import module_axes
from attnlib.layers._multi_head import Rotary
from attnlib.layers._projections import Initializer, default_bias_init, default_kernel_init
from attnlib.nnx._base import (
    AttentionModule,
    Metadata,
    ParameterGroup,
    Rngs,
    as_attribute,
    check_rngs,
    make_param,
    shows_call_options,
    suggests_remedies,
)
from attnlib.scores import Score

# The groups of parameters. `flax.nnx.MultiHeadAttention` has the first ones, and draws them in this order.
_GROUPS = ("query", "key", "value", "query_norm", "key_norm", "out", "gate", "score", "sink", "memory")


@suggests_remedies
class MultiHeadAttention(MultiHeadCall, AttentionModule):
    """Multi-head attention with query, key, value and output projections, over any axes.

    Parameters: `query|key|value: kernel (C, N, D), bias (N, D)`, `out: kernel (N, E, *O), bias (*O)`, with use_gate
    `gate: kernel (C, N, E), bias (N, E)`, with score="additive" `score: scale (N, D)`, with use_scale `score: scale
    (N,)`, with normalize_qk `query_norm|key_norm: scale (D,)`, with use_sink `sink: logit (N,)`, with num_memory
    `memory: key (M, K, D), value (M, K, E)`. Equal `nnx.Rngs` give the parameters that `flax.nnx.MultiHeadAttention`
    draws.

    Args:
      num_heads: query heads N.
      in_features: features C of the query.
      key_dim: features D of a head of query and key; default: in_features / num_heads.
      value_dim: features E of a head of value; default: key_dim.
      num_kv_heads: key/value heads K, a divisor of N (grouped-query attention; 1: multi-query); default: N.
      key_features, value_features: features of key and value; default: in_features and key_features.
      output_shape: the last axis or axes of the output; default: in_features.
      use_bias: whether projections have a bias; default True.
      attention_axes: axes attended over, numbered in the arrays passed (the last sequence axis is -2); default: every
        axis but the first and the features.
      dropout_rate: fraction of attention weights dropped in training, in [0, 1); default 0.
      deterministic: whether dropout is off; `train()`, `eval()` and `nnx.view` set it, and the call may replace it.
      use_gate: whether a sigmoid gate, computed from the query, multiplies the output of attention (Qiu et al. 2025).
      sliding_window: w masks keys w or more positions away on either side; default: none.
      score: "dot" (scaled by 1 / sqrt(key_dim)), "additive" (with a learned scale) or an `attnlib.scores.Score`. Arrays
        in a Score are constants, as are those in a score_mod: they are not `nnx.Param`.
      use_scale: whether score="dot" has a learned scale for each head, initially 1 / sqrt(key_dim).
      normalize_qk: learned norms of query and key: "layer" or True as in Flax (Dehghani et al. 2023), "rms" (Henry et
        al. 2020), or False.
      use_sink: whether each head has a learned sink, a logit without a value that takes a share of the weight.
      num_memory: the number M of learned keys and values that every query attends whatever the mask (Sukhbaatar et al.
        2019). Biases, score_mod and rotary positions do not apply to them, and normalize=False is refused. In weights,
        they come before the keys. Default 0.
      rotary: rotary positions of query and key (Su et al. 2021): True, or a function with the arguments of
        `attnlib.positions.rotary_embedding`, such as a `functools.partial` of it.
      score_mod: modifies logits, as in `attnlib.dot_product_attention`; or a module that returns such a function when
        it is called, such as `RelativePositionBias` and `BucketedPositionBias`, which layers may share.
      decode: whether the layer appends its tokens to a cache and attends causally to all tokens in the cache. It needs
        self-attention and one attention axis, and a cache from `init_cache` or `nnx.view`. The call takes any number of
        tokens, and its own decode replaces this one.
      logits_soft_cap: c bounds the logits to (-c, c) by c * tanh(x / c); default: none.
      kernel_init, bias_init: initialisers. Each kernel is initialised as a matrix, with the fans of the projection.
        Names of `nnx.with_partitioning` belong to the axes of the parameters above; those of `out` differ.
      out_kernel_init, out_bias_init: initialisers of the output projection; default: kernel_init, bias_init.
      scale_init: initialiser of the scale; default: glorot uniform with score="additive", 1 / sqrt(key_dim) with
        use_scale.
      kernel_metadata, bias_metadata: metadata of the variables of the projections, such as `{"out_sharding": names}`.
      out_kernel_metadata, out_bias_metadata: metadata of the output projection; default: kernel_metadata,
        bias_metadata.
      dtype: dtype of the computation; default: promoted from inputs and parameters.
      param_dtype: dtype of the parameters; default float32.
      precision: precision of matrix products.
      implementation, block_sizes, context, normalize: as in `attnlib.dot_product_attention`.
      rngs: `nnx.Rngs` with streams "params" and, with dropout, "dropout", or a default stream.
      keep_rngs: whether the module holds a stream of dropout keys; otherwise the call needs rngs. Default True.

    Example:
      >>> import attnlib, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = attnlib.nnx.MultiHeadAttention(num_heads=4, in_features=32, num_kv_heads=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 10, 32)), is_causal=True).shape
      (2, 10, 32)
      >>> layer.init_cache((2, 10, 32))
      >>> layer(jnp.ones((2, 3, 32)), decode=True).shape, int(layer.cache_index[...])
      ((2, 3, 32), 3)

    Source: Vaswani et al., "Attention Is All You Need" (2017); Ainslie et al., "GQA" (2023).
    """

    in_features: int
    key_features: int
    value_features: int
    param_dtype: Any
    score_mod: Any
    cached_key: Any

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        key_dim: int | None = None,
        *,
        value_dim: int | None = None,
        num_kv_heads: int | None = None,
        key_features: int | None = None,
        value_features: int | None = None,
        output_shape: int | Sequence[int] | None = None,
        use_bias: bool = True,
        attention_axes: int | Sequence[int] | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        use_gate: bool = False,
        sliding_window: int | None = None,
        score: str | Score = "dot",
        use_scale: bool = False,
        normalize_qk: bool | str = False,
        use_sink: bool = False,
        num_memory: int = 0,
        rotary: Rotary = False,
        score_mod: ScoreMod | nnx.Module | None = None,
        decode: bool = False,
        logits_soft_cap: float | None = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        out_kernel_init: Initializer | None = None,
        out_bias_init: Initializer | None = None,
        scale_init: Initializer | None = None,
        kernel_metadata: Metadata | None = None,
        bias_metadata: Metadata | None = None,
        out_kernel_metadata: Metadata | None = None,
        out_bias_metadata: Metadata | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        implementation: str | Sequence[str] | None = None,
        block_sizes: tuple[int, int] | None = None,
        context: str | Context | None = None,
        normalize: bool = True,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
    ) -> None:
        in_features = check_int(in_features, "in_features", minimum=1)
        key_features = in_features if key_features is None else check_int(key_features, "key_features", minimum=1)
        if value_features is None:
            value_features = key_features
        self._set_attributes(dict(
            num_heads=num_heads, in_features=in_features, key_dim=key_dim, value_dim=value_dim,
            num_kv_heads=num_kv_heads, key_features=key_features,
            value_features=check_int(value_features, "value_features", minimum=1), output_shape=output_shape,
            use_bias=use_bias, attention_axes=attention_axes, dropout_rate=dropout_rate, deterministic=deterministic,
            use_gate=use_gate, sliding_window=sliding_window, use_scale=use_scale, normalize_qk=normalize_qk,
            use_sink=use_sink, num_memory=num_memory, rotary=rotary, score_mod=score_mod,
            decode=check_bool(decode, "decode"), logits_soft_cap=logits_soft_cap, kernel_init=kernel_init,
            bias_init=bias_init, out_kernel_init=out_kernel_init, out_bias_init=out_bias_init, scale_init=scale_init,
            dtype=dtype, param_dtype=param_dtype, precision=precision, implementation=implementation,
            block_sizes=block_sizes,
            context=context, normalize=normalize,
        ))  # fmt: skip
        # The parameters of a score are the attribute `score`, which then has no place for the name of the score.
        self.score_name = score if isinstance(score, str) else None
        if self.score_name is None:
            self.score = as_attribute(score)
        metadata = {"kernel": kernel_metadata, "bias": bias_metadata}
        own = {"kernel": out_kernel_metadata, "bias": out_bias_metadata}
        out_metadata = {name: metadata[name] if own[name] is None else own[name] for name in own}
        groups = self._parameter_groups(self.in_features, self.key_features, self.value_features)
        for group in sorted(groups, key=_GROUPS.index):
            chosen = out_metadata if group == "out" else metadata
            params = {
                name: make_param(spec, check_rngs(rngs).params(), param_dtype, chosen.get(name))
                for name, spec in groups[group].items()
            }
            setattr(self, group, ParameterGroup(**params))
        self._set_stream(rngs, keep_rngs)
        for name in CACHE_NAMES:
            setattr(self, name, nnx.data(None))

    @shows_call_options
    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        query_mask: BoolMask | None = None,
        key_mask: BoolMask | None = None,
        deterministic: bool | None = None,
        rngs: Rngs | None = None,
        decode: bool | None = None,
        lengths: Array | None = None,
        sow_weights: bool = False,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Applies the layer.

        Args:
          query: `(*batch and attention axes, C)`; for one sequence axis `(B, T, C)`.
          key: `(..., C_key)`; default: query.
          value: `(..., C_value)`, with the key's positions; default: key. (Keras' layers take value before key.)
          query_mask, key_mask: bool, the shape of query / key without features, True = real.
          deterministic: whether dropout is off; default: the attribute, which `train()` and `eval()` set.
          rngs: `nnx.Rngs`, a stream of it or a JAX random key, for dropout; default: the stream of the module.
          decode: whether to append the tokens to the cache; default: the attribute.
          lengths: with a ragged cache, ints `(*batch)`: how many of the new tokens are real. Default: all.
          sow_weights: whether to sow the weights as `nnx.Intermediate`, "attention_weights".
          {names}: as in `attnlib.dot_product_attention`. A Keras mask `(B, T, S)` is `mask[:, None]`. logits_soft_cap
            and score_mod replace the attributes of these names. sink requires use_sink=False. Without key,
            key_positions default to query_positions; rotary uses both.

        Returns:
          output `(*query's leading axes, *output_shape)`, or (output, weights) with weights
          `(*batch, N, *query axes, *key axes)`.
        """
        return self._call(
            query, key, value, query_mask=query_mask, key_mask=key_mask, deterministic=deterministic, rng=rngs,
            sow_weights=sow_weights, decode=decode, lengths=lengths, **options,
        )  # fmt: skip

    def init_cache(self, input_shape: Sequence[int], dtype: Any = None, ragged: bool = False) -> None:
        """Creates an empty cache: `cached_key (*batch, length, K, D)`, `cached_value` and `cache_index`.

        Args:
          input_shape: the shape of an input of the greatest length, `(*batch, length, C)`. With a sliding_window below
            the length, the cache is a ring of sliding_window tokens, and inputs may be longer.
          dtype: dtype of cached keys and values; default: the dtype of the computation, else param_dtype.
          ragged: whether each sequence has its own length; cache_index is then `(*batch)`.

        Raises:
          ValueError, TypeError: an argument does not fit.
        """
        example = "(batch, length, features) of the longest input"
        shape = tuple(check_ints(input_shape, "input_shape", minimum=0, expected=example))
        if len(shape) < 2 or shape[-1] != self.in_features:
            raise ValueError(f"input_shape must be (*batch, length, in_features={self.in_features}); got {shape}.")
        axes = module_axes(self.attention_axes, len(shape))
        if len(axes.attention) != 1:
            raise ValueError(f"a cache needs one attention axis; there are {len(axes.attention)}.")
        dtype = self._cache_dtype() if dtype is None else jnp.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"dtype of a cache must be a floating-point dtype; got {dtype}. attnlib.KVCache has int8.")
        groups = self._parameter_groups(self.in_features, self.key_features, self.value_features)
        key, value = (
            jax.ShapeDtypeStruct((*shape[:-1], *groups[name]["kernel"].shape[1:]), dtype) for name in ("key", "value")
        )
        cache = self._empty_cache(key, value, axes.attention[0], check_bool(ragged, "ragged"))
        for name, array in zip(CACHE_NAMES, (cache.key, cache.value, cache.length), strict=True):
            setattr(self, name, nnx.Cache(array))

    def set_view(
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: int | Sequence[int] | None = None,
        max_length: int | None = None,
        cache_dtype: Any = None,
    ) -> None:
        """Sets attributes of a view, for `nnx.view`, and creates its cache. A view shares a cache that exists.

        Args:
          deterministic: whether dropout is off.
          decode: whether the view decodes; it creates a cache unless the module has one.
          batch_size: the batch axes of the cache.
          max_length: the greatest number of tokens.
          cache_dtype: dtype of the cache, as in `init_cache`.
        """
        super().set_view(deterministic)
        if decode is None:
            return
        self.decode = check_bool(decode, "decode")
        if not decode:
            return
        batch = None if batch_size is None else per_axis(check_int_or_ints(batch_size, "batch_size", minimum=0), 1)
        check_int(max_length, "max_length", minimum=1, optional=True)
        if self.cached_key is not None:
            self._check_shared_cache(batch, max_length)
            return
        if batch is None or max_length is None:
            raise ValueError(
                "a view with decode=True makes a cache, which needs batch_size and max_length: nnx.view(model, "
                "decode=True, batch_size=..., max_length=...). Or call init_cache on the module first."
            )
        self.init_cache(self._input_shape(batch, max_length), cache_dtype)

    def _input_shape(self, batch: tuple[int, ...], max_length: int) -> tuple[int, ...]:
        """The shape of an input with these batch axes and this length along the attention axis."""
        (axis,) = module_axes(self.attention_axes, len(batch) + 2).attention
        return (*batch[:axis], max_length, *batch[axis:], self.in_features)

    def _check_shared_cache(self, batch: tuple[int, ...] | None, max_length: int | None) -> None:
        """Raises ValueError if a view asks for another cache than the one that it shares."""
        *batch_axes, capacity, _, _ = self.cached_key.shape
        if batch is not None and batch != tuple(batch_axes):
            problem = f"batch_size={batch}, but the view shares a cache with the batch axes {tuple(batch_axes)}"
        elif max_length is not None and capacity != (self._window(max_length) or max_length):
            problem = f"max_length={max_length}, but the view shares a cache of {capacity} tokens"
        else:
            return
        raise ValueError(f"{problem}. Call init_cache on the module to replace its cache, or leave the argument out.")

    def _cache_dtype(self) -> Any:
        return jnp.dtype(self.param_dtype if self.dtype is None else self.dtype)

    # Storage

    def _params(self, query_features: int, key_features: int, value_features: int) -> dict[str, Any]:
        del query_features, key_features, value_features
        groups = {name: getattr(self, name, None) for name in _GROUPS}
        return {
            name: {entry: param[...] for entry, param in vars(group).items() if isinstance(param, nnx.Variable)}
            for name, group in groups.items()
            if isinstance(group, ParameterGroup)
        }

    def _score(self) -> str | Score:
        return self.score if self.score_name is None else self.score_name

    def _modifier(self) -> ScoreMod | None:
        return self.score_mod() if isinstance(self.score_mod, nnx.Module) else self.score_mod

    def _load_cache(self) -> KVCache:
        if self.cached_key is None:
            raise ValueError(
                "decode=True needs a cache: call init_cache((batch, length, features)) first, or make a view with "
                "nnx.view(model, decode=True, batch_size=..., max_length=...)."
            )
        key, value, length = (jnp.asarray(getattr(self, name)[...]) for name in CACHE_NAMES)
        return KVCache(key, value, length, window=self._window(key.shape[-3]))

    def _store_cache(self, cache: KVCache) -> None:
        for name, array in zip(CACHE_NAMES, (cache.key, cache.value, cache.length), strict=True):
            getattr(self, name)[...] = array
