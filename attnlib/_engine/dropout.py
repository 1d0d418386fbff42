"""Dropout by hashing: an entry is kept or dropped by a hash of (random key, batch index, head, query and key position).

Nothing is drawn in sequence, so each block of the weights can be computed alone, and every implementation, block size,
sharding and pass drops the same entries. Each row and each column gets a well mixed 32-bit word. The hash of an entry
is the finaliser of the exclusive or of both words, which costs a few integer operations in registers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.axes import align_ranks
from attnlib._core.sizes import as_scalar


def hash_seeds(rng: jax.Array) -> jax.Array:
    """Four 32-bit words from a JAX random key (typed or raw): what `keep_mask` hashes with."""
    return jax.random.bits(rng, (4,), jnp.uint32)


def keep_mask(
    seeds: jax.Array, rate: float, batch_head: jax.Array, query_index: jax.Array, key_index: jax.Array
) -> jax.Array:
    """Which entries of a block are kept.

    Args:
      seeds: words of `hash_seeds`, the first four of them.
      rate: the fraction to drop, in [0, 1).
      batch_head: the index of (batch, head), broadcastable against the two position indices.
      query_index: positions of the block's queries, e.g. `(T, 1)`.
      key_index: positions of the block's keys, e.g. `(1, S)`.

    Returns:
      bool of the broadcast shape, True with probability `1 - rate` (to within 2**-32).
    """
    words = (jnp.asarray(x).astype(jnp.uint32) for x in (batch_head, query_index, key_index))
    batch_head, query_index, key_index = align_ranks(*words)
    row = _hash32(_hash32(batch_head ^ seeds[0]) + _hash32(query_index ^ seeds[1]))
    column = _hash32(_hash32(batch_head ^ seeds[2]) + _hash32(key_index ^ seeds[3]))
    # Without the barrier, XLA would fuse the words into the block and compute them for every entry.
    row, column = jax.lax.optimization_barrier((row, column))
    threshold = np.uint32(min(round((1.0 - rate) * 2**32), 2**32 - 1))
    return _hash32(row ^ column) < threshold


def batch_head_index(batch: tuple[int, ...], kv_heads: int, groups: int, seeds: jax.Array | None = None) -> jax.Array:
    """The index of (batch, head), `(*batch, K, G, 1, 1)`, in row-major order, heads last.

    With six seeds, the heads are some of all heads: the last two seeds are the first head and the number of all.
    """
    if seeds is not None and seeds.shape == (6,):
        entries, heads = align_ranks(batch_head_index(batch, 1, 1), batch_head_index((), kv_heads, groups))
        return entries * seeds[5] + heads + seeds[4]
    shape = (*batch, kv_heads, groups)
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = index + as_scalar(stride, np.uint32) * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        stride *= shape[axis]
    return index[..., None, None]


def _hash32(x: jax.Array) -> jax.Array:
    """A 32-bit finaliser with low bias: two multiplications and three xor-shifts, a bijection (C. Wellons, 2018)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
