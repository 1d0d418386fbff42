"""How a cache changes: new tokens are written, tokens are forgotten, sequences are selected."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.axes import align_ranks
from attnlib._core.explicit_axes import sharded_like
from attnlib._core.nan_where import nan_where
from attnlib._core.operand_checks import is_concrete
from attnlib._core.sizes import decide, is_static
from attnlib._core.validation import check_array, check_integer
from attnlib.cache import _storage
from attnlib.cache._storage import StoredKeyValue

if TYPE_CHECKING:
    from attnlib.cache._kv_cache import KVCache


def write(cache: KVCache, tokens: StoredKeyValue, num_valid: int | jax.Array) -> KVCache:
    """The cache with the first `num_valid` of the tokens appended."""
    length, capacity, num_new = cache.length, cache.capacity, tokens.key.shape[-3]
    uniform = not isinstance(num_valid, jax.Array) and length.ndim == 0
    if num_new == 0:
        storage = cache._arrays
    elif uniform and _writes_slice(cache, num_new):
        start = length if cache.window is None else length % capacity
        storage = jax.tree.map(partial(_storage.write_slice, start), cache._storage_for(tokens), tokens)
    else:
        valid_length = jnp.asarray(num_valid, jnp.int32)[..., None]
        index, start, valid_length = align_ranks(jnp.arange(num_new, dtype=jnp.int32), length[..., None], valid_length)
        slots = start + index
        is_written = index < valid_length
        if cache.window is not None:  # the ring keeps the newest tokens
            slots, is_written = slots % capacity, is_written & (index >= valid_length - capacity)
        # The other tokens get distinct slots beyond the end, so that the scatter drops them and indices stay unique.
        # Each sequence has its own slots even if all are equal: XLA of jax 0.8 copies the cache otherwise.
        slots = jnp.broadcast_to(jnp.where(is_written, slots, capacity + index), (*cache.batch_shape, num_new))
        slots = sharded_like(slots, tokens.key)
        storage = jax.tree.map(partial(_storage.scatter_slots, slots), cache._storage_for(tokens), tokens)
    return dataclasses.replace(cache, **storage._asdict(), length=jnp.asarray(length + num_valid, jnp.int32))


def _writes_slice(cache: KVCache, num_new: int) -> bool:
    """Whether the slots of so many new tokens are a slice of the cache, for every symbolic number."""
    return num_new == 1 if cache.window is not None else decide(lambda: num_new <= cache.capacity, otherwise=False)


def check_lengths(lengths: Any, shape: tuple[int, ...], remedy: str = "") -> jax.Array:
    """How many tokens stay, as int32 `()` or `shape`, at least 0."""
    check_integer(lengths, "lengths")
    if np.shape(lengths) not in ((), shape):
        raise ValueError(f"lengths must have shape () or {shape}; got {np.shape(lengths)}.{remedy}")
    if is_concrete(lengths) and np.any(np.asarray(lengths) < 0):
        raise ValueError(f"lengths must be at least 0; got {lengths}.")
    return jnp.maximum(jnp.asarray(lengths, jnp.int32), 0)


def truncated(cache: KVCache, lengths: Any) -> KVCache:
    """The cache without the tokens after the first `lengths`."""
    ragged = "" if cache.length.shape else " A cache with ragged=True has a length for each sequence."
    lengths = check_lengths(lengths, cache.length.shape, ragged)
    if cache.window is None:
        # Tokens beyond the capacity may have overwritten others, so these do not become valid again.
        is_spoilt = (cache.length > cache.capacity) & (lengths > 0)
        return dataclasses.replace(cache, length=jnp.where(is_spoilt, cache.length, jnp.minimum(cache.length, lengths)))
    length = jnp.minimum(cache.length, lengths)
    num_lost = jnp.maximum(0 if cache.num_lost is None else cache.num_lost, cache.length - cache.capacity)
    num_lost = jnp.clip(num_lost, 0, length)  # the tokens after these will be written again
    _check_ring(cache.capacity, cache.window, length, num_lost)
    return dataclasses.replace(cache, length=length, num_lost=num_lost)


def _check_ring(capacity: int, window: int, length: jax.Array, num_lost: jax.Array) -> None:
    """Raises ValueError if the next query of a ring is known to need a lost token."""
    if not (is_concrete(length) and is_concrete(num_lost)):
        return
    kept, lost = (np.atleast_1d(x).reshape(-1) for x in (np.asarray(length), np.asarray(num_lost)))
    is_spoilt = np.maximum(kept - window + 1, 0) < lost
    if np.any(is_spoilt):
        worst = np.argmax(is_spoilt)
        raise ValueError(
            f"truncate to {kept[worst]} tokens needs tokens in the window of {window} that newer ones have "
            f"overwritten: the first {lost[worst]} are lost. A full ring goes back by at most capacity - window + 1 = "
            f"{capacity - window + 1} tokens. Create the cache with a larger capacity, or truncate to 0."
        )


def nan_at_lost(cache: KVCache, query_positions: jax.Array, results: list[jax.Array]) -> list[jax.Array]:
    """The output `(*batch, n, N, E)`, weights and log-sum-exp, with NaN for queries whose window has a lost token."""
    if cache.window is None or cache.num_lost is None:
        return results
    position, num_lost = align_ranks(query_positions, jnp.asarray(cache.num_lost)[..., None])
    is_spoilt = (position >= 0) & (jnp.maximum(position - cache.window + 1, 0) < num_lost)
    rank = results[0].ndim

    def marked(array: jax.Array, spoilt: jax.Array) -> jax.Array:
        array, spoilt = align_ranks(array, spoilt)
        return nan_where(sharded_like(spoilt, array), array)

    output, *others = results
    heads_first = is_spoilt[..., None, :]
    return [
        marked(output, is_spoilt[..., None, None]),
        *(marked(x, heads_first[..., None] if x.ndim == rank else heads_first) for x in others),
    ]


def check_indices(indices: Any, name: str, count: int) -> jax.Array:
    """Indices of sequences as int32 `(n,)`, of which those beyond the `count` sequences are `count` or more."""
    check_array(indices, name, kind="integer")
    if indices.ndim != 1:
        raise ValueError(f"{name} must have shape (n,), one for each selected sequence; got {indices.shape}.")
    if (
        is_static(count)
        and is_concrete(indices)
        and not np.all((np.asarray(indices) >= 0) & (np.asarray(indices) < count))
    ):
        raise ValueError(f"{name} must be in 0..{count - 1}, for {count} sequences; got {np.asarray(indices)}.")
    indices = jnp.asarray(indices, jnp.int32)
    return jnp.where(indices < 0, count, indices)  # which JAX would count from the end


def forked_indices(source: Any, target: Any, count: int) -> jax.Array:
    """For each of `count` sequences, the sequence whose tokens it has after `target` became like `source`."""
    shapes = [np.shape(check_integer(indices, name)) for indices, name in ((source, "source"), (target, "target"))]
    if shapes[0] != shapes[1]:
        raise ValueError(f"source and target must have the same shape, () or (n,); got {shapes[0]} and {shapes[1]}.")
    sources, targets = (
        check_indices(jnp.atleast_1d(jnp.asarray(indices)), name, count)
        for indices, name in ((source, "source"), (target, "target"))
    )
    if is_concrete(targets) and len(np.unique(targets)) < len(targets):
        raise ValueError(f"target must have distinct sequences; got {target}.")
    return jnp.arange(count, dtype=jnp.int32).at[targets].set(sources, mode="drop")


def selected_sequences(cache: KVCache, indices: Any) -> KVCache:
    """The cache of some sequences along the first batch axis."""
    check_array(indices, "indices", kind="integer")
    if not cache.batch_shape:
        raise ValueError("select needs a cache with a batch axis; batch_shape is ().")
    indices = check_indices(indices, "indices", cache.batch_shape[0])

    def selected(array: jax.Array) -> jax.Array:
        return jnp.take(array, indices, axis=0, mode="fill")  # NaN beyond the batch

    cache = dataclasses.replace(cache, **jax.tree.map(selected, cache._arrays)._asdict())
    if not np.shape(cache.length):
        return cache
    # A length beyond the capacity makes the outputs NaN.
    length = jnp.take(jnp.asarray(cache.length), indices, axis=0, mode="fill", fill_value=cache.capacity + 1)
    if cache.num_lost is None:
        return dataclasses.replace(cache, length=length)
    num_lost = jnp.take(jnp.asarray(cache.num_lost), indices, axis=0, mode="fill", fill_value=0)
    return dataclasses.replace(cache, length=length, num_lost=num_lost)
