"""The keys and values of the tokens so far, for decoding one or many tokens at a time.

A slot is a place in the cache; a position is that of a token in its sequence, from 0. Masks of positions, causality and
`score_mod` see positions, so that what a split pass gives is what the whole pass gives, however it is split.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._api import attention
from attnlib._core.array_types import Array, BoolMask, Key, Query, Value
from attnlib._core.operand_checks import check_integers, compute_dtype, is_concrete
from attnlib._core.options import CacheOptions, takes_options
from attnlib._core.pytree import register, serializable
from attnlib._core.validation import check_bool, check_size
from attnlib.cache import _storage as _held
from attnlib.cache._storage import StoredKeyValue
from attnlib.cache._tokens import canonical_tokens, common_token_count, new_positions
from attnlib.masks import Mask, SlidingWindow
from attnlib.masks._arrays import as_mask
from attnlib.scores import Dot, Score

__all__ = ["KVCache"]

_takes_options = takes_options(
    without={
        name: f"{name} cannot be given: positions are those of the tokens in the cache."
        for name in ("query_positions", "key_positions")
    }
)


@serializable
@register
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, a pytree to be passed on: `output, cache = cache.decode(...)`.

    Make one with `KVCache.create`. All methods work under `jax.jit`, where the cache should be donated, in
    `jax.lax.scan` and under `jax.vmap`. Which tokens it holds depends on `length` alone: what the other slots hold, NaN
    included, cannot matter. A query costs by the capacity, whether it is filled or not.

    Attributes:
      key: `(*batch, capacity, K, D)`.
      value: `(*batch, capacity, K, E)`.
      length: int32, how many tokens were appended, i.e. the position of the next: `()`, or `(*batch)` if ragged.
      key_scale, value_scale: of an int8 cache, float32 `(*batch, capacity, K, 1)`: what the integers are multiplied by.
      window: how many of the newest tokens a query sees, itself included; None: all.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 8))  # each (B, T, N, D)
      >>> cache = attnlib.KVCache.create((2,), capacity=10, num_kv_heads=4, key_dim=8)
      >>> prompt, cache = cache.decode(query[:, :9], key[:, :9], value[:, :9])
      >>> last, cache = cache.decode(query[:, 9:], key[:, 9:], value[:, 9:])
      >>> whole = attnlib.dot_product_attention(query, key, value, is_causal=True)
      >>> bool(jnp.allclose(jnp.concatenate([prompt, last], 1), whole, atol=1e-5))
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
          capacity: how many tokens it holds. Of a plain cache, the most that may ever be appended: appending more is a
            ValueError where the length is known, and under `jax.jit`, where nothing can be raised, makes NaN of every
            output of that sequence. With a window, at least the window: the oldest tokens make room.
          num_kv_heads: K.
          key_dim: D.
          value_dim: E; default key_dim.
          dtype: float32, bfloat16, float16 or int8. In int8 each token and head has a scale of its own, max|x| / 127
            over its features: a number is stored within max|x| / 254 of what it was (less than 1e-36 may become 0),
            and has no derivative.
          window: a query sees this many of the newest tokens, itself included: `masks.SlidingWindow(window - 1, None)`
            beside causality. The cache is a ring that does not grow. Default: a plain cache, all tokens.
          ragged: whether each sequence has a length of its own.

        Raises:
          ValueError, TypeError: an argument does not fit.
        """
        if not isinstance(batch_shape, Sequence) or isinstance(batch_shape, str):
            raise TypeError(f"batch_shape must be a sequence of ints, (2,) for two sequences; got {batch_shape!r}.")
        batch = tuple(check_size(size, "each size of batch_shape", 0) for size in batch_shape)
        lead = (*batch, check_size(capacity, "capacity", 1), check_size(num_kv_heads, "num_kv_heads", 1))
        key_dim = check_size(key_dim, "key_dim", 0)
        value_dim = key_dim if value_dim is None else check_size(value_dim, "value_dim", 0)
        dtype = _held.dtype(dtype)
        if window is not None and check_size(window, "window", 1) > lead[-2]:
            raise ValueError(
                f"capacity must be at least the window, the tokens that a query sees; got capacity={capacity} and "
                f"window={window}."
            )
        check_bool(ragged, "ragged")
        held = _held.empty_storage(lead, key_dim, value_dim, dtype)
        window = None if window is None else operator.index(window)
        return cls(**held._asdict(), length=jnp.zeros(batch if ragged else (), jnp.int32), window=window)

    replace = dataclasses.replace

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.key.shape[:-3])

    @property
    def capacity(self) -> int:
        """How many tokens it holds."""
        return int(self.key.shape[-3])

    def append(
        self, key: Key, value: Value, lengths: Array | None = None, *, attention_axes: int | Sequence[int] | None = None
    ) -> KVCache:
        """The cache with n more tokens; in place under `jax.jit` where it is donated.

        Args:
          key: `(*batch, n, K, D)`, for any n; stored in the cache's dtype.
          value: `(*batch, n, K, E)`.
          lengths: of a ragged cache, ints `(*batch)` in 0..n (traced ones are brought there): only the first lengths[b]
            of the n tokens are real. Default: all.
          attention_axes: where the axis of the n tokens is in key and value; batch axes may stand on both sides of it.
            Default: -3, after the batch axes, as it is in the cache.

        Raises:
          ValueError, TypeError: an argument does not fit; or a plain cache would hold more than its capacity.

        >>> import jax.numpy as jnp, attnlib
        >>> cache = attnlib.KVCache.create((2,), 6, num_kv_heads=1, key_dim=4, ragged=True)
        >>> cache.append(jnp.ones((2, 3, 1, 4)), jnp.ones((2, 3, 1, 4)), jnp.array([3, 1])).length.tolist()
        [3, 1]
        """
        key, value = self._tokens(key, "key", attention_axes), self._tokens(value, "value", attention_axes)
        count = self._valid_count(lengths, common_token_count(key=key, value=value))
        self._check_capacity(count, key.shape[-3])
        return self._write(_held.quantize_like(key, value, self._arrays), count)

    @_takes_options
    def attend(
        self,
        query: Query,
        lengths: Array | None = None,
        *,
        score: Score | None = None,
        is_causal: bool = True,
        mask: BoolMask | Mask | None = None,
        attention_axes: int | Sequence[int] | None = None,
        **options: Unpack[CacheOptions],
    ) -> Any:
        """Attention of the last n tokens appended to all that the cache holds.

        Args:
          query: `(*batch, n, N, D)`, those of the last n tokens, N a multiple of K. With a window, n is at most
            capacity - window + 1: beyond, the keys of the oldest are overwritten, and `decode` has to be used.
          lengths: as in the `append` of these tokens: the query's first lengths[b] are real, and the others attend
            nothing.
          score: default `scores.Dot()`.
          is_causal: keys after the query, by position, are masked.
          mask: a `masks.Mask`, in which masks of positions see positions; or bool, broadcasting to
            `(*batch, N, n, capacity)`, by slot: so does what a Mask holds for each key, and a `bias`. The slot of
            position p is p, with a window p % capacity.
          attention_axes: where the axis of the n tokens is in query and output, as in `append`; one axis. Weights, lse,
            masks and biases have the batch axes first, as ever.
          {names}: as in `attnlib.attention`. Positions are the cache's to give. Dropout goes by slot.

        Returns:
          As `attnlib.attention`; the output, `(*batch, n, N, E)`, is in the query's dtype.

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
        new = query.shape[-3]
        if self.window is not None and not self._retains_visible(new):
            raise ValueError(
                f"attend takes at most {self.capacity - self.window + 1} queries, capacity - window + 1, of a cache "
                f"with a window; got {new}. The keys that the oldest of them sees are overwritten: use decode, or "
                "create the cache with a larger capacity."
            )
        count = self._valid_count(lengths, new)
        at = new_positions(self.length - count, count, new), self._key_positions()
        overflowed = None if self.window is not None else self.length > self.capacity
        return self._attention(query, self._arrays, at, axis, score, is_causal, mask, overflowed, options)

    @_takes_options
    def decode(
        self,
        query: Query,
        key: Key,
        value: Value,
        lengths: Array | None = None,
        *,
        score: Score | None = None,
        is_causal: bool = True,
        mask: BoolMask | Mask | None = None,
        attention_axes: int | Sequence[int] | None = None,
        **options: Unpack[CacheOptions],
    ) -> tuple[Any, KVCache]:
        """`append` and `attend` in one, for any number of tokens; with a window too.

        It takes time as n * capacity, the length being traced. A long prompt into an empty cache is faster by the whole
        pass, `attnlib.attention(query, key, value, is_causal=True, ...)`, and `append`.

        Args:
          query: `(*batch, n, N, D)`.
          key: `(*batch, n, K, D)`.
          value: `(*batch, n, K, E)`.
          lengths: as in `append`; the query's tokens beyond attend nothing.
          score, is_causal, mask, attention_axes: as in `attend`. With a window and n greater than
            capacity - window + 1, the slots that masks, biases and weights speak of are `capacity + n`: those of the
            cache before, and after them the new tokens.
          {names}: as in `attend`.

        Returns:
          (what `attend` returns, the cache with the tokens appended).

        Raises:
          ValueError, TypeError: as `append` and `attend`.

        >>> import jax, jax.numpy as jnp, attnlib
        >>> tokens = jax.random.normal(jax.random.key(0), (2, 7, 1, 4))
        >>> cache = attnlib.KVCache.create((2,), 3, num_kv_heads=1, key_dim=4, window=3)
        >>> output, cache = cache.decode(tokens, tokens, tokens)
        >>> output.shape, cache.key.shape, int(cache.length)
        ((2, 7, 1, 4), (2, 3, 1, 4), 7)
        """
        key, value = self._tokens(key, "key", attention_axes), self._tokens(value, "value", attention_axes)
        query, axis = canonical_tokens(query, "query", self.key.ndim, attention_axes)
        new = common_token_count(query=query, key=key, value=value)
        count = self._valid_count(lengths, new)
        self._check_capacity(count, new)
        stored = _held.quantize_like(key, value, self._arrays)
        cache = self._write(stored, count)
        places = new_positions(self.length, count, new)
        if self._retains_visible(new):
            held, at = cache._arrays, (places, cache._key_positions())
        else:  # the newest tokens overwrite what the first of them see: the old ring, then the new tokens
            held = jax.tree.map(lambda *parts: jnp.concatenate(parts, -3), self._arrays, stored)
            at = places, jnp.concatenate([self._key_positions(), places], -1)
        overflowed = None if self.window is not None else cache.length > self.capacity
        return self._attention(query, held, at, axis, score, is_causal, mask, overflowed, options), cache

    # What the methods share. Arrays are as in the cache: the axis of tokens is -3.

    @property
    def _arrays(self) -> StoredKeyValue:
        parts = StoredKeyValue(self.key, self.value, self.key_scale, self.value_scale)
        return jax.tree.map(jnp.asarray, parts)  # NumPy's, as they come from a file

    def _retains_visible(self, new: int) -> bool:
        """Whether, after so many new tokens, all that the first of them sees is still held."""
        return self.window is None or new <= self.capacity - self.window + 1

    def _attention(
        self,
        query: Any,
        held: StoredKeyValue,
        at: Any,
        axis: int,
        score: Any,
        is_causal: Any,
        mask: Any,
        overflowed: Any,
        options: CacheOptions,
    ) -> Any:
        """Attention to stored tokens at positions (of the queries, of the keys); NaN for sequences that are lost."""
        mask = as_mask(mask)
        if self.window is not None:
            near = SlidingWindow(self.window - 1, None)
            mask = near if mask is None else mask & near
        key, value = _held.dequantize(held.key, held.key_scale), _held.dequantize(held.value, held.value_scale)
        if value.dtype != query.dtype:  # the output, which has the value's dtype, is not to be rounded twice
            value = value.astype(compute_dtype(query, value))
        results = attention(
            query, key, value, score=Dot() if score is None else score, is_causal=is_causal, mask=mask,
            attention_axes=-3, query_positions=at[0], key_positions=at[1], **options,
        )  # fmt: skip
        output, *others = results if isinstance(results, tuple) else (results,)
        if overflowed is not None:  # batch axes come first in all results
            overflowed = jnp.expand_dims(overflowed, tuple(range(overflowed.ndim, query.ndim)))
            output, *others = (
                jnp.where(overflowed.reshape(overflowed.shape[: x.ndim]), jnp.nan, x) for x in (output, *others)
            )
        output = jnp.moveaxis(output.astype(query.dtype), -3, axis)
        return (output, *others) if others else output

    def _key_positions(self) -> jax.Array:
        """The position of the token in each slot, below 0 where there is none: `(capacity,)`, `(*batch, capacity)`."""
        slots = jnp.arange(self.capacity, dtype=jnp.int32)
        newest = self.length[..., None] - 1
        if self.window is None:
            return jnp.where(slots <= newest, slots, -1)
        return newest - (newest - slots) % self.capacity

    def _tokens(self, array: Any, name: str, attention_axes: Any) -> jax.Array:
        """New keys or values, checked against those held."""
        array, _ = canonical_tokens(array, name, self.key.ndim, attention_axes)
        held = getattr(self, name)
        if array.shape[:-3] != held.shape[:-3] or array.shape[-2:] != held.shape[-2:]:
            batch = "".join(f"{size}, " for size in held.shape[:-3])
            raise ValueError(
                f"{name} must have shape (*batch, n, heads, features) = ({batch}n, {held.shape[-2]}, "
                f"{held.shape[-1]}) to fit the cache; got {array.shape}, the axis of tokens third from the end."
            )
        return array

    def _valid_count(self, lengths: Any, new: int) -> int | jax.Array:
        """How many of the new tokens are real: all, or ints `(*batch)`."""
        if lengths is None:
            return new
        check_integers(lengths, "lengths")
        if self.length.shape != self.batch_shape:
            raise ValueError("lengths needs a cache in which each sequence has its own: create it with ragged=True.")
        if lengths.shape != self.batch_shape:
            raise ValueError(f"lengths must have shape (*batch) = {self.batch_shape}; got {lengths.shape}.")
        if is_concrete(lengths) and not np.all((np.asarray(lengths) >= 0) & (np.asarray(lengths) <= new)):
            raise ValueError(f"lengths must be in 0..{new}, of the {new} tokens given; got {lengths}.")
        return jnp.clip(jnp.asarray(lengths, jnp.int32), 0, new)

    def _check_capacity(self, count: int | jax.Array, new: int) -> None:
        if self.window is not None:
            return
        total = new if isinstance(count, int) else 0  # known whatever the length
        if is_concrete(self.length) and is_concrete(count):
            total = int(np.max(np.asarray(self.length) + np.asarray(count), initial=0))
        if total > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} tokens; with those appended it would be {total}. Create it with a "
                "larger capacity, or with a window."
            )

    def _write(self, stored: StoredKeyValue, count: int | jax.Array) -> KVCache:
        """The cache with the first `count` of these tokens appended."""
        length, capacity, new = self.length, self.capacity, stored.key.shape[-3]
        uniform = isinstance(count, int) and length.ndim == 0
        if new == 0:
            held = self._arrays
        elif uniform and (self.window is None or new == 1):
            start = length if self.window is None else length % capacity
            held = jax.tree.map(partial(_held.write_slice, start), self._arrays, stored)
        else:
            place = jnp.arange(new, dtype=jnp.int32)
            slots, count_ = length[..., None] + place, jnp.asarray(count, jnp.int32)[..., None]
            real = place < count_
            if self.window is not None:  # of more than it holds, the newest
                slots, real = slots % capacity, real & (place >= count_ - capacity)
            # What is not to be written goes beyond the end, each to a slot of its own, and is dropped. The slots are
            # those of each sequence even where all are the same: XLA of jax 0.8 copies the cache otherwise.
            slots = jnp.broadcast_to(jnp.where(real, slots, capacity + place), (*self.batch_shape, new))
            held = jax.tree.map(partial(_held.scatter_slots, slots), self._arrays, stored)
        return dataclasses.replace(self, **held._asdict(), length=jnp.asarray(length + count, jnp.int32))
