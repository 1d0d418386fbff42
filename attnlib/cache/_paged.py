"""A cache in pages, which sequences take from a common pool as they grow, and which they can share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.array_types import Array, BoolMask, Key, MaskFunction, Query, Value
from attnlib._core.explicit_axes import replicated
from attnlib._core.operand_checks import is_concrete
from attnlib._core.options import CacheOptions
from attnlib._core.pytree import register, serializable
from attnlib._core.validation import check_array, check_int
from attnlib.cache import _pool, _storage
from attnlib.cache._edits import check_indices, check_lengths, forked_indices
from attnlib.cache._kv_cache import KVCache, takes_cache_options
from attnlib.cache._tokens import (
    canonical_tokens,
    check_capacity,
    check_new_tokens,
    common_token_count,
    valid_token_count,
)
from attnlib.masks import Mask
from attnlib.scores import Score

__all__ = ["PagedKVCache"]


@serializable
@register
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Keys and values of past tokens in pages of a common pool, an immutable pytree like `KVCache`.

    Each sequence has its own length and takes pages as it grows, so the pool may be smaller than all sequences at their
    greatest length. `fork` and `select` copy no tokens: sequences share pages, and a sequence that writes to a shared
    page gets a copy of this page first. All methods work under `jax.jit` (donate the cache), `jax.lax.scan` and
    `jax.vmap`. The memory of the cache is that of its pool. `attend` copies the pages of each sequence into one array,
    so on one device a step is slower than that of a `KVCache`, and it takes memory for all sequences at their capacity.

    If too few pages are free, appending is a ValueError if that is known. Under `jax.jit` the sequences get pages in
    order, and the outputs of a sequence that gets none become NaN, until it is released or truncated to its last full
    page. Other sequences are not affected.

    Attributes:
      key: `(P, page_size, K, D)`, for P pages.
      value: `(P, page_size, K, E)`.
      table: int32 `(B, pages)`, the pages of each sequence in order, then P.
      length: int32 `(B,)`, the number of tokens of each sequence.
      key_scale, value_scale: factors of an int8 cache, float32 `(P, page_size, K, 1)`; otherwise None.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 8))  # each (B, T, N, D)
      >>> cache = attnlib.PagedKVCache.create(2, capacity=12, num_kv_heads=4, key_dim=8, num_pages=6, page_size=4)
      >>> prompt, cache = cache.decode(query[:, :9], key[:, :9], value[:, :9])
      >>> last, cache = cache.decode(query[:, 9:], key[:, 9:], value[:, 9:])
      >>> full = attnlib.dot_product_attention(query, key, value, is_causal=True)
      >>> bool(jnp.allclose(jnp.concatenate([prompt, last], 1), full, atol=1e-5))
      True

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023).
    """

    key: Any
    value: Any
    table: Any
    length: Any
    key_scale: Any = None
    value_scale: Any = None

    @classmethod
    def create(
        cls,
        num_sequences: int,
        capacity: int,
        num_kv_heads: int,
        key_dim: int,
        *,
        num_pages: int,
        page_size: int = 16,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
    ) -> PagedKVCache:
        """An empty cache, in which all pages are free.

        Args:
          num_sequences: B.
          capacity: maximum number of tokens of one sequence, a multiple of page_size.
          num_kv_heads: K.
          key_dim: D.
          num_pages: P, the number of pages for all sequences.
          page_size: the number of tokens of a page; default 16.
          value_dim: E; default key_dim.
          dtype: float32, bfloat16, float16 or int8, as in `KVCache.create`.

        Raises:
          ValueError, TypeError: an argument does not fit.
        """
        num_sequences = check_int(num_sequences, "num_sequences", minimum=0)
        capacity = check_int(capacity, "capacity", minimum=1)
        page_size = check_int(page_size, "page_size", minimum=1)
        num_pages = check_int(num_pages, "num_pages", minimum=1)
        heads = check_int(num_kv_heads, "num_kv_heads", minimum=1)
        key_dim = check_int(key_dim, "key_dim", minimum=0)
        value_dim = key_dim if value_dim is None else check_int(value_dim, "value_dim", minimum=0)
        dtype = _storage.check_dtype(dtype)
        if capacity % page_size:
            raise ValueError(
                f"capacity must be a multiple of page_size={page_size}; got {capacity}. Write "
                f"capacity={-(-capacity // page_size) * page_size}."
            )
        if num_pages * page_size >= 2**31:
            raise ValueError(f"num_pages * page_size must be below 2**31; got {num_pages * page_size}.")
        storage = _storage.empty_storage((num_pages, page_size, heads), key_dim, value_dim, dtype)
        table = jnp.full((num_sequences, capacity // page_size), num_pages, jnp.int32)
        return cls(**storage._asdict(), table=table, length=jnp.zeros(num_sequences, jnp.int32))

    replace = dataclasses.replace

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """`(B,)`."""
        return tuple(self.table.shape[:1])

    @property
    def capacity(self) -> int:
        """Maximum number of tokens of one sequence."""
        capacity: int = self.table.shape[1] * self.page_size
        return capacity

    @property
    def num_pages(self) -> int:
        """The number of pages for all sequences."""
        num_pages: int = self.key.shape[0]
        return num_pages

    @property
    def page_size(self) -> int:
        """The number of tokens of a page."""
        page_size: int = self.key.shape[1]
        return page_size

    @property
    def free_pages(self) -> jax.Array:
        """How many pages no sequence holds, int32 `()`."""
        holders = _pool.count_holders(self._pages[0], self.num_pages)
        return jnp.sum(holders == 0, dtype=jnp.int32)

    def append(
        self, key: Key, value: Value, lengths: Array | None = None, *, attention_axes: int | Sequence[int] | None = None
    ) -> PagedKVCache:
        """The cache with n more tokens; under `jax.jit` the update of a donated cache is in place.

        Args:
          key: `(B, n, K, D)`, for any n; stored in the cache's dtype.
          value: `(B, n, K, E)`.
          lengths: ints `(B,)` in 0..n: the first lengths[b] of the n tokens are real. Traced lengths are clipped to
            this range. Default: all tokens are real.
          attention_axes: the axis of the n tokens in key and value; default: -3.

        Raises:
          ValueError, TypeError: an argument does not fit, or it is known that a sequence exceeds its capacity or that
            too few pages are free.

        >>> import jax.numpy as jnp, attnlib
        >>> cache = attnlib.PagedKVCache.create(2, 12, num_kv_heads=1, key_dim=8, num_pages=4, page_size=4)
        >>> cache = cache.append(jnp.ones((2, 5, 1, 8)), jnp.ones((2, 5, 1, 8)), jnp.array([5, 3]))
        >>> cache.length.tolist(), int(cache.free_pages)
        ([5, 3], 1)
        """
        arrays = self._arrays
        key = check_new_tokens(key, "key", self.batch_shape, arrays.key.shape[-2:], attention_axes)
        value = check_new_tokens(value, "value", self.batch_shape, arrays.value.shape[-2:], attention_axes)
        num_new = common_token_count(key=key, value=value)
        num_valid = valid_token_count(self, lengths, num_new)
        check_capacity(self, num_valid, num_new, "Create the cache with a larger capacity, or release the sequence.")
        table, length, num_valid = replicated((*self._pages, jnp.asarray(num_valid, jnp.int32)))
        num_valid = jnp.broadcast_to(num_valid, length.shape)
        growth = _pool.grow(table, length, num_valid, num_new, self.num_pages, self.page_size)
        if is_concrete(growth.is_out_of_pages) and np.any(growth.is_out_of_pages):
            raise ValueError(
                f"too few pages are free: {int(self.free_pages)} of {self.num_pages}, for the new tokens of sequence "
                f"{int(np.argmax(growth.is_out_of_pages))}. Release or truncate sequences, or create the cache with "
                "more num_pages."
            )
        storage = jax.tree.map(partial(_pool.write, growth), arrays, _storage.quantize_like(key, value, arrays))
        return dataclasses.replace(self, **storage._asdict(), table=growth.table, length=length + num_valid)

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
        """Attention of the last n tokens of each sequence over all its tokens.

        Args:
          query: `(B, n, N, D)`, the queries of the last n tokens, N a multiple of K.
          lengths: as in the `append` of these tokens. Queries after the first lengths[b] attend nothing.
          score: default `scores.Dot()`.
          is_causal: whether keys at positions after the query are masked.
          mask: a `masks.Mask`, a function as in `masks.Function`, or bool that broadcasts to `(B, N, n, capacity)`.
            All masks, biases and weights have `capacity` keys, the positions of a sequence.
          attention_axes: the axis of the n tokens in query and output, as in `append`.
          {names}: as in `attnlib.attention`.

        Returns:
          As `attnlib.attention`, with the output `(B, n, N, E)` in the query's dtype.

        Raises:
          ValueError, TypeError: an argument does not fit.

        >>> import jax.numpy as jnp, attnlib
        >>> tokens = jnp.ones((1, 3, 1, 4))
        >>> cache = attnlib.PagedKVCache.create(1, 4, num_kv_heads=1, key_dim=4, num_pages=2, page_size=2)
        >>> _, weights = cache.append(tokens, tokens).attend(tokens[:, :2], return_weights=True)
        >>> (6 * weights[0, 0]).round().astype(int)
        Array([[3, 3, 0, 0],
               [2, 2, 2, 0]], dtype=int32)
        """
        return self._gathered().attend(
            query, lengths, score=score, is_causal=is_causal, mask=mask, attention_axes=attention_axes, **options
        )

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
    ) -> tuple[Any, PagedKVCache]:
        """`append` followed by `attend`, for any number of tokens.

        Args:
          query: `(B, n, N, D)`.
          key: `(B, n, K, D)`.
          value: `(B, n, K, E)`.
          lengths: as in `append`.
          score, is_causal, mask, attention_axes: as in `attend`.
          {names}: as in `attnlib.attention`.

        Returns:
          (the result of `attend`, the cache with the tokens appended).

        Raises:
          ValueError, TypeError: as in `append` and `attend`.

        >>> import jax, jax.numpy as jnp, attnlib
        >>> tokens = jax.random.normal(jax.random.key(0), (2, 7, 1, 4))
        >>> cache = attnlib.PagedKVCache.create(2, 8, num_kv_heads=1, key_dim=4, num_pages=4, page_size=4)
        >>> output, cache = cache.decode(tokens, tokens, tokens)
        >>> output.shape, cache.key.shape, cache.length.tolist()
        ((2, 7, 1, 4), (4, 4, 1, 4), [7, 7])
        """
        arrays = dict(query=query, key=key, value=value)
        common_token_count(**{name: canonical_tokens(x, name, 4, attention_axes)[0] for name, x in arrays.items()})
        cache = self.append(key, value, lengths, attention_axes=attention_axes)
        results = cache.attend(
            query, lengths, score=score, is_causal=is_causal, mask=mask, attention_axes=attention_axes, **options
        )
        return results, cache

    def truncate(self, lengths: int | Array) -> PagedKVCache:
        """The cache without the tokens after the first `lengths`; pages without tokens become free.

        Args:
          lengths: an int or ints `()` or `(B,)`: how many tokens of each sequence stay, at least 0. A sequence with
            fewer tokens stays as it is.

        Raises:
          ValueError, TypeError: an argument does not fit.

        >>> import jax.numpy as jnp, attnlib
        >>> cache = attnlib.PagedKVCache.create(2, 12, num_kv_heads=1, key_dim=8, num_pages=6, page_size=4)
        >>> cache = cache.append(jnp.ones((2, 9, 1, 8)), jnp.ones((2, 9, 1, 8)))
        >>> int(cache.free_pages), int(cache.truncate(4).free_pages)
        (0, 4)
        """
        return self._truncated(check_lengths(lengths, self.batch_shape))

    def release(self, which: Array) -> PagedKVCache:
        """The cache with some sequences empty. Their pages become free, except for those that other sequences share.

        Args:
          which: bool `(B,)`, the sequences to empty. An empty sequence stays empty.

        Raises:
          ValueError, TypeError: which does not fit.

        >>> import jax.numpy as jnp, attnlib
        >>> cache = attnlib.PagedKVCache.create(2, 12, num_kv_heads=1, key_dim=8, num_pages=6, page_size=4)
        >>> cache = cache.append(jnp.ones((2, 9, 1, 8)), jnp.ones((2, 9, 1, 8)))
        >>> cache = cache.release(jnp.array([True, False]))
        >>> cache.length.tolist(), int(cache.free_pages)
        ([0, 9], 3)
        """
        check_array(which, "which", kind="bool", shapes=[self.batch_shape], remedy="Write jnp.array([True, False]).")
        return self._truncated(jnp.where(jnp.asarray(which), 0, jnp.iinfo(jnp.int32).max))

    def fork(self, source: int | Array, target: int | Array) -> PagedKVCache:
        """The cache in which sequences `target` have the tokens of sequences `source`, in the same pages.

        What the targets held is released. No token is copied until one of two sequences writes to a shared page.

        Args:
          source: an int, or ints `()` or `(n,)`: indices of sequences. An index beyond the sequences gives NaN if it is
            traced.
          target: like source. The targets are distinct.

        Raises:
          ValueError, TypeError: an index is not in 0..B - 1, two targets are equal, or an argument does not fit.

        >>> import jax.numpy as jnp, attnlib
        >>> cache = attnlib.PagedKVCache.create(3, 12, num_kv_heads=1, key_dim=8, num_pages=6, page_size=4)
        >>> cache = cache.append(jnp.ones((3, 5, 1, 8)), jnp.ones((3, 5, 1, 8)), jnp.array([5, 0, 0]))
        >>> cache = cache.fork(0, 2)
        >>> cache.length.tolist(), int(cache.free_pages)
        ([5, 0, 5], 4)
        """
        return self._selected(forked_indices(source, target, self.batch_shape[0]))

    def select(self, indices: Array) -> PagedKVCache:
        """The cache of some sequences, for beam search. No token is copied: repeated sequences share their pages.

        Args:
          indices: ints `(n,)`, the sequences by their index, in any order, also repeatedly. The result has n sequences.
            An index beyond the sequences gives NaN if it is traced.

        Raises:
          ValueError, TypeError: an index is not in 0..B - 1, or indices do not fit.

        >>> import jax.numpy as jnp, attnlib
        >>> cache = attnlib.PagedKVCache.create(2, 12, num_kv_heads=1, key_dim=8, num_pages=6, page_size=4)
        >>> cache = cache.append(jnp.ones((2, 9, 1, 8)), jnp.ones((2, 9, 1, 8)), jnp.array([9, 3]))
        >>> cache.select(jnp.array([1, 0, 0])).length.tolist()
        [3, 9, 9]
        """
        return self._selected(check_indices(indices, "indices", self.batch_shape[0]))

    _arrays = property(_storage.arrays_of)

    @property
    def _pages(self) -> tuple[jax.Array, jax.Array]:
        """(table, length), of which each device has all."""
        pages: tuple[jax.Array, jax.Array] = replicated((jnp.asarray(self.table), jnp.asarray(self.length)))
        return pages

    def _gathered(self) -> KVCache:
        """The tokens of each sequence in one array. A sequence that is spoilt is beyond its capacity there."""
        table, length = self._pages
        is_spoilt = _pool.is_spoilt(table, length, self.num_pages, self.page_size)
        storage = jax.tree.map(partial(_pool.read, table), self._arrays)
        return KVCache(**storage._asdict(), length=jnp.where(is_spoilt, self.capacity + 1, length))

    def _truncated(self, lengths: jax.Array) -> PagedKVCache:
        table, length = self._pages
        length = jnp.minimum(length, replicated(lengths))
        table = _pool.keep_pages(table, length, self.num_pages, self.page_size)
        return dataclasses.replace(self, table=table, length=length)

    def _selected(self, indices: jax.Array) -> PagedKVCache:
        (table, length), indices = self._pages, replicated(indices)
        table = table.at[indices].get(mode="fill", fill_value=self.num_pages)
        length = length.at[indices].get(mode="fill", fill_value=self.capacity + 1)
        return dataclasses.replace(self, table=table, length=length)
