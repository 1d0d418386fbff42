"""The call of the multi-head modules: their parameters, and decoding with a cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attnlib._api import attention
from attnlib._core.array_types import Array
from attnlib._core.axes import align_ranks
from attnlib._core.suggestions import require_static
from attnlib._modules.call import AttentionCall
from attnlib.cache import KVCache
from attnlib.layers._inputs import module_axes
from attnlib.layers._multi_head import apply_multi_head
from attnlib.layers._projections import ParameterGroups, multi_head_parameters

CACHE_NAMES = ("cached_key", "cached_value", "cache_index")  # as in Flax's own layers
# The fields that determine the parameters.
_PARAMETER_FIELDS = (
    "num_heads", "key_dim", "value_dim", "num_kv_heads", "output_shape", "use_bias", "use_gate", "use_scale",
    "normalize_qk", "use_sink", "num_memory", "kernel_init", "bias_init", "out_kernel_init", "out_bias_init",
    "scale_init",
)  # fmt: skip


class MultiHeadCall(AttentionCall):
    """The call of a multi-head module."""

    num_heads: Any
    attention_axes: Any
    sliding_window: Any
    rotary: Any
    normalize_qk: Any
    logits_soft_cap: Any
    dtype: Any
    decode: Any

    def _parameter_groups(self, query_features: int, key_features: int, value_features: int) -> ParameterGroups:
        fields = {name: getattr(self, name) for name in _PARAMETER_FIELDS}
        return multi_head_parameters(query_features, key_features, value_features, score=self._score(), **fields)

    def _attend(
        self,
        params: dict[str, Any],
        query: Array,
        key: Array | None,
        value: Array | None,
        *,
        decode: bool | None = None,
        lengths: Array | None = None,
        **options: Any,
    ) -> Any:
        if self.decode if decode is None else decode:
            self._check_decoding(query, key, value, options)
            cache = self._load_cache()
            options["attend"] = functools.partial(self._decode, cache, lengths)
            if cache is not None:
                (axis,) = module_axes(self.attention_axes, query.ndim).attention
                start = cache.length[..., None] if cache.length.ndim else cache.length
                start, new = align_ranks(start, jnp.arange(query.shape[axis], dtype=jnp.int32))
                options["query_positions"] = start + new
        elif lengths is not None:
            raise ValueError("lengths counts the tokens that decode=True appends to a cache; this call has none.")
        if options.get("logits_soft_cap") is None:
            options["logits_soft_cap"] = self.logits_soft_cap
        if options.get("score_mod") is None:
            options["score_mod"] = self._modifier()
        output, weights, activations = apply_multi_head(
            params, query, key, value, score=self._score(), sliding_window=self.sliding_window, rotary=self.rotary,
            normalize_qk=self.normalize_qk, dtype=self.dtype, **options,
        )  # fmt: skip
        self._sow_losses(params, activations)
        return output, weights

    # Decoding

    def _check_decoding(self, query: Array, key: Any, value: Any, options: dict[str, Any]) -> None:
        if key is not None or value is not None:
            raise ValueError(
                "decode=True is for self-attention: pass the query only. For the fixed keys of an encoder, use a layer "
                "with decode=False."
            )
        if options["key_mask"] is not None:
            raise ValueError(
                "decode=True takes no key_mask, which does not cover the keys in the cache. Pass a mask over the slots "
                "of the cache, mask=attnlib.masks.KeyPadding(real)."
            )
        if options.get("context") is not None:
            raise ValueError(
                "decode=True takes no context: a cache holds all tokens on each device. Leave context=None, and shard "
                "batch and heads."
            )
        if any(options.get(name) is not None for name in ("query_positions", "key_positions")):
            raise ValueError("decode=True takes no positions: the cache determines the positions of its tokens.")
        axes = module_axes(self.attention_axes, query.ndim)
        if len(axes.attention) != 1:
            raise ValueError(f"decode=True needs one attention axis; there are {len(axes.attention)}.")

    def _decode(
        self,
        cache: KVCache | None,
        lengths: Array | None,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        **options: Any,
    ) -> Any:
        """Appends keys and values to the cache, and attends over the cache; an `attention` for `apply_multi_head`."""
        if cache is None:  # linen's `init`, which makes the cache for an input of the greatest length
            (axis,) = options["attention_axes"]
            self._store_cache(self._empty_cache(key, value, axis))
            return attention(query, key, value, **options)
        for name in ("query_positions", "key_positions", "context"):
            del options[name]
        results, cache = cache.decode(query, key, value, lengths, **{**options, "is_causal": True})
        self._store_cache(cache)
        return results

    def _window(self, length: int) -> int | None:
        """The window of a cache for sequences of this length."""
        if self.sliding_window is None:
            return None
        require_static(length, "with a sliding_window, the length of the cache", "an int")
        return min(self.sliding_window, length)

    def _empty_cache(self, key: Any, value: Any, axis: int, ragged: bool = False) -> KVCache:
        """An empty cache for tokens like these along `axis`, or for sliding_window tokens if that is fewer."""
        window = self._window(key.shape[axis])
        batch = [size for n, size in enumerate(key.shape[:-2]) if n != axis]
        capacity = key.shape[axis] if window is None else window
        keys, values = (jnp.zeros((*batch, capacity, *x.shape[-2:]), x.dtype) for x in (key, value))
        return KVCache(keys, values, jnp.zeros(batch if ragged else (), jnp.int32), window=window)

    # Storage

    def _score(self) -> Any:
        """The field `score`."""
        raise NotImplementedError

    def _modifier(self) -> Any:
        """The field `score_mod`; if it is a module, the modifier that this returns."""
        raise NotImplementedError

    def _load_cache(self) -> KVCache | None:
        """The cache; None if this call makes it."""
        raise NotImplementedError

    def _store_cache(self, cache: KVCache) -> None:
        raise NotImplementedError

    def _sow_losses(self, params: dict[str, Any], activations: dict[str, jax.Array]) -> None:
        """Stores penalties on parameters and on the outputs of projections, if the module has fields for them."""
