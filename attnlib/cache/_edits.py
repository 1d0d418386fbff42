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


def shorter_length(cache: KVCache, lengths: Any) -> jax.Array:
    """The length of a cache of which the first `lengths` tokens stay."""
    if cache.window is not None:
        raise ValueError(
            "truncate needs a cache without a window: a ring overwrites the tokens that would be the newest again. "
            "Create the cache without window and with a capacity for all tokens, and pass "
            "mask=attnlib.masks.SlidingWindow(window - 1, 0) to decode."
        )
    check_integer(lengths, "lengths")
    if np.shape(lengths) not in ((), cache.length.shape):
        ragged = "" if cache.length.shape else " A cache with ragged=True has a length for each sequence."
        raise ValueError(f"lengths must have shape () or {cache.length.shape}; got {np.shape(lengths)}.{ragged}")
    if is_concrete(lengths) and np.any(np.asarray(lengths) < 0):
        raise ValueError(f"lengths must be at least 0; got {lengths}.")
    lengths = jnp.maximum(jnp.asarray(lengths, jnp.int32), 0)
    # Tokens beyond the capacity may have overwritten others, so these do not become valid again.
    is_spoilt = (cache.length > cache.capacity) & (lengths > 0)
    return jnp.where(is_spoilt, cache.length, jnp.minimum(cache.length, lengths))


def selected_sequences(cache: KVCache, indices: Any) -> tuple[StoredKeyValue, jax.Array]:
    """(the stored arrays, the length) of some sequences along the first batch axis."""
    check_array(indices, "indices", kind="integer")
    if not cache.batch_shape:
        raise ValueError("select needs a cache with a batch axis; batch_shape is ().")
    if indices.ndim != 1:
        raise ValueError(f"indices must have shape (n,), one for each selected sequence; got {indices.shape}.")
    count = cache.batch_shape[0]
    if (
        is_static(count)
        and is_concrete(indices)
        and not np.all((np.asarray(indices) >= 0) & (np.asarray(indices) < count))
    ):
        raise ValueError(f"indices must be in 0..{count - 1}, for {count} sequences; got {indices}.")
    indices = jnp.asarray(indices, jnp.int32)
    indices = jnp.where(indices < 0, count, indices)  # which JAX would count from the end

    def selected(array: jax.Array) -> jax.Array:
        return jnp.take(array, indices, axis=0, mode="fill")  # NaN beyond the batch

    storage = jax.tree.map(selected, cache._arrays)
    if not cache.length.shape:
        return storage, jnp.asarray(cache.length)
    # A length beyond the capacity makes the outputs NaN.
    return storage, jnp.take(jnp.asarray(cache.length), indices, axis=0, mode="fill", fill_value=cache.capacity + 1)
