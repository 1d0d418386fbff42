"""The cache as a pytree, and its methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from attnlib._api import attention
from attnlib._core.array_types import Array, BoolMask, Key, MaskFunction, Query, Value
from attnlib._core.axes import align_ranks
from attnlib._core.explicit_axes import sharded_like
from attnlib._core.nan_where import nan_where
from attnlib._core.operand_checks import compute_dtype
from attnlib._core.options import CacheOptions, takes_options
from attnlib._core.pytree import register, serializable
from attnlib._core.sizes import decide
from attnlib._core.validation import check_bool, check_int, check_ints
from attnlib.cache import _storage
from attnlib.cache._edits import nan_at_lost, selected_sequences, truncated, write
from attnlib.cache._storage import StoredKeyValue
from attnlib.cache._tokens import (
    canonical_tokens,
    check_capacity,
    check_new_tokens,
    common_token_count,
    new_positions,
    valid_token_count,
)
from attnlib.masks import Mask, SlidingWindow
from attnlib.masks._arrays import as_mask
from attnlib.scores import Dot, Score

__all__ = ["KVCache"]

takes_cache_options = takes_options(
    without={
        name: f"{name} cannot be given: the cache determines the positions of its tokens."
        for name in ("query_positions", "key_positions")
    }
    | {"context": "context cannot be given: a cache holds all tokens on each device. Leave context=None."}
)


@serializable
@register
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of past tokens, an immutable pytree: `output, cache = cache.decode(...)`.

    `KVCache.create` returns an empty cache. All methods work under `jax.jit` (donate the cache), `jax.lax.scan` and
    `jax.vmap`. `length` alone determines which slots are valid; the content of other slots, NaN included, does not
    matter. A query takes the time of the whole capacity, except for few queries with a dot-product score on one CPU
    device, which take about that of the tokens in the cache.

    Attributes:
      key: `(*batch, capacity, K, D)`.
      value: `(*batch, capacity, K, E)`.
      length: int32 `()`, or `(*batch)` if ragged: the number of appended tokens, which is the next position.
      key_scale, value_scale: factors of an int8 cache, float32 `(*batch, capacity, K, 1)`; otherwise None.
      window: how many of the newest tokens a query attends, itself included; None: all.
      num_lost: after `truncate` of a cache with a window, int32 like length: how many of the first tokens are
        overwritten; otherwise None.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 8))  # each (B, T, N, D)
      >>> cache = attnlib.KVCache.create((2,), capacity=10, num_kv_heads=4, key_dim=8)
      >>> prompt, cache = cache.decode(query[:, :9], key[:, :9], value[:, :9])
      >>> last, cache = cache.decode(query[:, 9:], key[:, 9:], value[:, 9:])
      >>> full = attnlib.dot_product_attention(query, key, value, is_causal=True)
      >>> bool(jnp.allclose(jnp.concatenate([prompt, last], 1), full, atol=1e-5))
      True

    Source: Shazeer, "Fast Transformer Decoding" (2019); ring of a window: Beltagy et al., "Longformer" (2020), Jiang et
      al., "Mistral 7B" (2023).
    """

    key: Any
    value: Any
    length: Any
    key_scale: Any = None
    value_scale: Any = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    num_lost: Any = None

    @classmethod
    def create(
        cls,
        batch_shape: Sequence[int],
        capacity: int,
        num_kv_heads: int,
        key_dim: int,
        *,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
        window: int | None = None,
        ragged: bool = False,
    ) -> KVCache:
        """An empty cache.

        Args:
          batch_shape: sizes of the batch axes.
          capacity: maximum number of tokens, at least the window. Without a window, appending more tokens is a
            ValueError if the length is known; under `jax.jit` the outputs of that sequence become NaN. With a window,
            new tokens overwrite the oldest.
          num_kv_heads: K.
          key_dim: D.
          value_dim: E; default key_dim.
          dtype: float32, bfloat16, float16 or int8. int8 uses one scale for each token and head, max|x| / 127 over the
            features: the rounding error is at most max|x| / 254 (numbers below 1e-36 may become 0), and derivatives
            are not defined.
          window: how many of the newest tokens a query attends, itself included, as with
            `masks.SlidingWindow(window - 1, None)`. The cache is then a ring buffer. Default: all tokens.
          ragged: whether each sequence has its own length.

        Raises:
          ValueError, TypeError: an argument does not fit.
        """
        expected = "a sequence of ints >= 0, (2,) for two sequences"
        batch = check_ints(batch_shape, "batch_shape", minimum=0, expected=expected, symbolic=True)
        heads = check_int(num_kv_heads, "num_kv_heads", minimum=1)
        leading_shape = (*batch, check_int(capacity, "capacity", minimum=1), heads)
        key_dim = check_int(key_dim, "key_dim", minimum=0)
        value_dim = key_dim if value_dim is None else check_int(value_dim, "value_dim", minimum=0)
        dtype = _storage.check_dtype(dtype)
        window = check_int(window, "window", minimum=1, optional=True)
        if window is not None and window > leading_shape[-2]:
            raise ValueError(
                f"capacity must be at least the window, which a query attends; got capacity={capacity} and "
                f"window={window}."
            )
        check_bool(ragged, "ragged")
        storage = _storage.empty_storage(leading_shape, key_dim, value_dim, dtype)
        return cls(**storage._asdict(), length=jnp.zeros(batch if ragged else (), jnp.int32), window=window)

    replace = dataclasses.replace

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.key.shape[:-3])

    @property
    def capacity(self) -> int:
        """Maximum number of tokens."""
        capacity: int = self.key.shape[-3]
        return capacity

    def append(
        self, key: Key, value: Value, lengths: Array | None = None, *, attention_axes: int | Sequence[int] | None = None
    ) -> KVCache:
        """The cache with n more tokens; under `jax.jit` the update of a donated cache is in place.

        Args:
          key: `(*batch, n, K, D)`, for any n; stored in the cache's dtype.
          value: `(*batch, n, K, E)`.
          lengths: for a ragged cache, ints `(*batch)` in 0..n: the first lengths[b] of the n tokens are real. Traced
            lengths are clipped to this range. Default: all tokens are real.
          attention_axes: the axis of the n tokens in key and value; batch axes may be on both sides of it. Default: -3,
            after the batch axes.

        Raises:
          ValueError, TypeError: an argument does not fit, or the tokens exceed the capacity of a cache without window.

        >>> import jax.numpy as jnp, attnlib
        >>> cache = attnlib.KVCache.create((2,), 6, num_kv_heads=1, key_dim=4, ragged=True)
        >>> cache.append(jnp.ones((2, 3, 1, 4)), jnp.ones((2, 3, 1, 4)), jnp.array([3, 1])).length.tolist()
        [3, 1]
        """
        key, value = self._check_tokens(key, "key", attention_axes), self._check_tokens(value, "value", attention_axes)
        num_valid = valid_token_count(self, lengths, common_token_count(key=key, value=value))
        self._check_capacity(num_valid, key.shape[-3])
        return write(self, _storage.quantize_like(key, value, self._arrays), num_valid)

    @takes_cache_options
    def attend(
        self,
        query: Query,
        lengths: Array | None = None,
        *,
        score: Score | None = None,
        is_causal: bool = True,
        mask: BoolMask | Mask | MaskFunction | None = None,
        attention_axes: int | Sequence[int] | None = None,
        **options: Unpack[CacheOptions],
    ) -> Any:
        """Attention of the last n tokens over all tokens in the cache.

        Args:
          query: `(*batch, n, N, D)`, the queries of the last n tokens, N a multiple of K. With a window, n is at most
            capacity - window + 1; for more queries the keys of the oldest are overwritten, so use `decode`.
          lengths: as in the `append` of these tokens. Queries after the first lengths[b] attend nothing.
          score: default `scores.Dot()`.
          is_causal: whether keys at positions after the query are masked.
          mask: a `masks.Mask`, a function as in `masks.Function`, or bool that broadcasts to `(*batch, N, n,
            capacity)`. Masks of positions see positions.
            Arrays of keys, in a bool mask, a Mask or a `bias`, are indexed by slot. The slot of position p is p, with a
            window p % capacity.
          attention_axes: the axis of the n tokens in query and output, as in `append`. In weights, lse, masks and
            biases, batch axes come first.
          {names}: as in `attnlib.attention`. Dropout depends on the slot.

        Returns:
          As `attnlib.attention`, with the output `(*batch, n, N, E)` in the query's dtype.

        Raises:
          ValueError, TypeError: an argument does not fit.

        >>> import jax.numpy as jnp, attnlib
        >>> tokens = jnp.ones((2, 3, 1, 4))
        >>> cache = attnlib.KVCache.create((2,), 6, num_kv_heads=1, key_dim=4).append(tokens, tokens)
        >>> _, weights = cache.attend(tokens[:, :2], return_weights=True)  # of the last two tokens
        >>> (6 * weights[0, 0]).round().astype(int)
        Array([[3, 3, 0, 0, 0, 0],
               [2, 2, 2, 0, 0, 0]], dtype=int32)
        """
        query, axis = canonical_tokens(query, "query", self.key.ndim, attention_axes)
        num_new = query.shape[-3]
        if self.window is not None and not self._retains_visible(num_new):
            raise ValueError(
                f"attend takes at most {self.capacity - self.window + 1} queries, capacity - window + 1, if the cache "
                f"has a window; got {num_new}. The cache has overwritten keys of the oldest queries: use decode, or "
                "create the cache with a larger capacity."
            )
        num_valid = valid_token_count(self, lengths, num_new)
        query_positions = new_positions(self.length - num_valid, num_valid, num_new)
        return self._attention(
            query, self._arrays, axis, mask, query_positions=query_positions, key_positions=self._key_positions(),
            score=score, is_causal=is_causal, **options,
        )  # fmt: skip

    @takes_cache_options
    def decode(
        self,
        query: Query,
        key: Key,
        value: Value,
        lengths: Array | None = None,
        *,
        score: Score | None = None,
        is_causal: bool = True,
        mask: BoolMask | Mask | MaskFunction | None = None,
        attention_axes: int | Sequence[int] | None = None,
        **options: Unpack[CacheOptions],
    ) -> tuple[Any, KVCache]:
        """`append` followed by `attend`, for any number of tokens.

        The time of many tokens is proportional to n * capacity. For a long prompt and an empty cache,
        `attnlib.attention(query, key, value, is_causal=True, ...)` and `append` are faster.

        Args:
          query: `(*batch, n, N, D)`.
          key: `(*batch, n, K, D)`.
          value: `(*batch, n, K, E)`.
          lengths: as in `append`. Queries after the first lengths[b] attend nothing.
          score, is_causal, mask, attention_axes: as in `attend`. With a window and n > capacity - window + 1, masks,
            biases and weights have `capacity + n` slots: the slots of the cache before the call, then the new tokens.
          {names}: as in `attend`.

        Returns:
          (the result of `attend`, the cache with the tokens appended).

        Raises:
          ValueError, TypeError: as in `append` and `attend`.

        >>> import jax, jax.numpy as jnp, attnlib
        >>> tokens = jax.random.normal(jax.random.key(0), (2, 7, 1, 4))
        >>> cache = attnlib.KVCache.create((2,), 3, num_kv_heads=1, key_dim=4, window=3)
        >>> output, cache = cache.decode(tokens, tokens, tokens)
        >>> output.shape, cache.key.shape, int(cache.length)
        ((2, 7, 1, 4), (2, 3, 1, 4), 7)
        """
        key, value = self._check_tokens(key, "key", attention_axes), self._check_tokens(value, "value", attention_axes)
        query, axis = canonical_tokens(query, "query", self.key.ndim, attention_axes)
        num_new = common_token_count(query=query, key=key, value=value)
        num_valid = valid_token_count(self, lengths, num_new)
        self._check_capacity(num_valid, num_new)
        new_tokens = _storage.quantize_like(key, value, self._arrays)
        cache = write(self, new_tokens, num_valid)
        query_positions = new_positions(self.length, num_valid, num_new)
        if self._retains_visible(num_new):
            storage, key_positions = cache._arrays, cache._key_positions()
        else:  # the ring no longer has all keys of the first queries: attend over the previous ring and the new tokens
            previous = self._storage_for(new_tokens)
            storage = jax.tree.map(lambda *parts: jnp.concatenate(parts, -3), previous, new_tokens)
            key_positions = jnp.concatenate([self._key_positions(), query_positions], -1)
        results = cache._attention(
            query, storage, axis, mask, query_positions=query_positions, key_positions=key_positions, score=score,
            is_causal=is_causal, **options,
        )  # fmt: skip
        return results, cache

    def truncate(self, lengths: int | Array) -> KVCache:
        """The cache without the tokens after the first `lengths`, for speculative decoding and finished sequences.

        Nothing is copied: the content of empty slots does not matter. With a window, forgotten tokens may have
        overwritten tokens that the window needs again. The `capacity - window + 1` tokens that came furthest can always
        go. The first call adds `num_lost`: before `jax.lax.scan`, call `cache.truncate(cache.length)`.

        Args:
          lengths: an int or ints `()`, or `(*batch)` if ragged: how many tokens stay, at least 0. A sequence with fewer
            tokens stays as it is, and one beyond the capacity gives NaN until lengths is 0. With a window, queries
            whose window has an overwritten token give NaN.

        Raises:
          ValueError, TypeError: an argument does not fit, or the next token is known to need an overwritten one.

        >>> import jax.numpy as jnp, attnlib
        >>> cache = attnlib.KVCache.create((2,), 6, num_kv_heads=1, key_dim=4)
        >>> cache = cache.append(jnp.ones((2, 5, 1, 4)), jnp.ones((2, 5, 1, 4)))
        >>> int(cache.truncate(3).length)
        3
        """
        return truncated(self, lengths)

    def select(self, indices: Array) -> KVCache:
        """The cache of some sequences, for beam search and continuous batching.

        Args:
          indices: ints `(n,)`, the sequences by their index along the first batch axis, in any order, also repeatedly.
            The first batch axis of the result has n sequences. An index beyond the batch gives NaN if it is traced.

        Raises:
          ValueError, TypeError: an index is not in 0..batch - 1, or an argument does not fit.

        >>> import jax.numpy as jnp, attnlib
        >>> cache = attnlib.KVCache.create((2,), 6, num_kv_heads=1, key_dim=4, ragged=True)
        >>> cache = cache.append(jnp.ones((2, 3, 1, 4)), jnp.ones((2, 3, 1, 4)), jnp.array([3, 1]))
        >>> cache.select(jnp.array([1, 1, 0])).length.tolist()
        [1, 1, 3]
        """
        return selected_sequences(self, indices)

    # In the methods below, the token axis of every array is -3.

    _arrays = property(_storage.arrays_of)

    def _storage_for(self, tokens: StoredKeyValue) -> StoredKeyValue:
        """The stored arrays, sharded like new tokens over Explicit axes of a mesh."""
        return jax.tree.map(sharded_like, self._arrays, tokens)

    def _retains_visible(self, num_new: int) -> bool:
        """Whether the cache still has all keys of the first of `num_new` appended tokens."""
        window = self.window
        return window is None or decide(lambda: num_new <= self.capacity - window + 1, otherwise=False)

    def _attention(
        self,
        query: Any,
        storage: StoredKeyValue,
        axis: int,
        mask: Any,
        *,
        score: Score | None,
        query_positions: jax.Array,
        **options: Any,
    ) -> Any:
        """Attention over stored tokens; NaN beyond the capacity, and for queries that need lost tokens."""
        mask = as_mask(mask)
        if self.window is not None:
            window = SlidingWindow(self.window - 1, None)
            mask = window if mask is None else mask & window
        key = _storage.dequantize(storage.key, storage.key_scale)
        value = _storage.dequantize(storage.value, storage.value_scale)
        if value.dtype != query.dtype:  # the output has the value's dtype: avoid rounding it twice
            value = value.astype(compute_dtype(query, value))
        score = Dot() if score is None else score
        results: Any = attention(
            query, key, value, score=score, mask=mask, attention_axes=-3, query_positions=query_positions, **options
        )
        results = list(results) if isinstance(results, tuple) else [results]
        output, *others = nan_at_lost(self, query_positions, results)
        if self.window is None:
            overflow = self.length > self.capacity
            overflow = jnp.expand_dims(overflow, tuple(range(overflow.ndim, query.ndim)))
            output, *others = (  # batch axes come first in all results
                nan_where(sharded_like(overflow.reshape(overflow.shape[: x.ndim]), x), x) for x in (output, *others)
            )
        output = jnp.moveaxis(output.astype(query.dtype), -3, axis)
        return (output, *others) if others else output

    def _key_positions(self) -> jax.Array:
        """The position of the token in each slot, `([*batch,] capacity)`; negative for an empty slot."""
        slots, newest = align_ranks(jnp.arange(self.capacity, dtype=jnp.int32), self.length[..., None] - 1)
        if self.window is None:
            return jnp.where(slots <= newest, slots, -1)
        return newest - (newest - slots) % self.capacity

    def _check_tokens(self, array: Any, name: str, attention_axes: Any) -> jax.Array:
        return check_new_tokens(array, name, self.batch_shape, getattr(self, name).shape[-2:], attention_axes)

    def _check_capacity(self, num_valid: int | jax.Array, num_new: int) -> None:
        if self.window is None:  # a ring overwrites its oldest tokens
            check_capacity(self, num_valid, num_new, "Create the cache with a larger capacity, or with a window.")
