"""A pool of pages: which sequence holds which page, how pages are given to sequences, and how tokens are written.

`table (B, W)` has the pages of each sequence in the order of its tokens, then P, the number of pages, where it holds
none. How many sequences hold a page follows from the table, so no count can become wrong. A page may be held by
several sequences. A sequence writes only to a page that no other sequence holds.

A sequence is spoilt if it has more tokens than its pages have room for. Its outputs are NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from attnlib._core.explicit_axes import is_sharded, on_auto_axes, partition
from attnlib._core.sizes import is_static


class Growth(NamedTuple):
    """What an append does to the pages.

    Attributes:
      table: afterwards.
      source, target: `(B,)`, the shared page that is copied for each sequence, and the page that it is copied to; P
        for none.
      page, offset: `(B, n)`, where each new token is written; distinct pages from P on for a token that is not written.
      is_out_of_pages: `(B,)`, the sequences for which too few pages are free.
    """

    table: jax.Array
    source: jax.Array
    target: jax.Array
    page: jax.Array
    offset: jax.Array
    is_out_of_pages: jax.Array


def count_holders(table: jax.Array, num_pages: int) -> jax.Array:
    """`(P,)`: how many sequences hold each page."""
    return jnp.zeros(num_pages, jnp.int32).at[table].add(1, mode="drop")


def is_spoilt(table: jax.Array, length: jax.Array, num_pages: int, page_size: int) -> jax.Array:
    """`(B,)`: whether a sequence has more tokens than its pages have room for."""
    return length > jnp.sum(table < num_pages, -1, dtype=jnp.int32) * page_size


def keep_pages(table: jax.Array, length: jax.Array, num_pages: int, page_size: int) -> jax.Array:
    """The table with the pages of the first `length (B,)` tokens alone."""
    columns = np.arange(table.shape[1], dtype=np.int32)[None]
    return jnp.where(columns < _pages_for(length, page_size)[:, None], table, num_pages)


@functools.partial(jax.jit, static_argnames=("num_new", "num_pages", "page_size"))  # many small operations
def grow(
    table: jax.Array, length: jax.Array, num_valid: jax.Array, num_new: int, num_pages: int, page_size: int
) -> Growth:
    """The pages for the first `num_valid (B,)` of `num_new` tokens.

    The sequences get their pages in order. From the first for which too few are free, none gets any. A sequence without
    its pages gives back its last page, unless the page is full, so that all tokens whose pages it holds are there.
    """
    num_sequences, num_columns = table.shape
    index = jnp.arange(num_sequences, dtype=jnp.int32)
    total = length + num_valid
    held, wanted = _pages_for(length, page_size), _pages_for(total, page_size)
    is_growing = num_valid > 0
    fits = is_growing & (wanted <= num_columns) & ~is_spoilt(table, length, num_pages, page_size)

    # A sequence that writes to a shared page gets a copy. If all that hold the page write, the first keeps it instead.
    holders = count_holders(table, num_pages)
    last = jnp.take_along_axis(table, jnp.clip(held - 1, 0, num_columns - 1)[:, None], 1)[:, 0]
    last = jnp.where(fits & (length % page_size > 0), last, num_pages)
    writers = count_holders(last, num_pages)
    first_writer = jnp.full(num_pages, num_sequences, jnp.int32).at[last].min(index, mode="drop")
    num_holders, num_writers, first = (
        x.at[last].get(mode="fill", fill_value=0) for x in (holders, writers, first_writer)
    )
    copies = ((num_holders > 1) & ~((num_writers == num_holders) & (first == index))).astype(jnp.int32)

    needed = jnp.where(fits, wanted - held, 0) + copies
    end = jnp.cumsum(needed, dtype=jnp.int32)
    is_free = holders == 0
    is_out_of_pages = (needed > 0) & (end > jnp.sum(is_free, dtype=jnp.int32))
    is_served = fits & ~is_out_of_pages
    granted = jnp.where(is_served, needed, 0)

    most = min(-(-num_new // page_size) + 1, num_columns) if is_static(num_new) else num_columns
    (free,) = jnp.nonzero(is_free, size=num_pages, fill_value=num_pages)
    turn = jnp.arange(most, dtype=jnp.int32)[None]
    is_granted = turn < granted[:, None]
    new = free.astype(jnp.int32).at[(end - needed)[:, None] + turn].get(mode="fill", fill_value=num_pages)
    new = jnp.where(is_granted, new, num_pages)
    columns = jnp.where(is_granted, (held - copies)[:, None] + turn, num_columns)
    kept = keep_pages(
        table, jnp.where(is_growing & ~is_served, length // page_size * page_size, length), num_pages, page_size
    )
    grown = kept.at[index[:, None], columns].set(new, mode="drop")

    is_copied = (copies > 0) & is_served
    source, target = (jnp.where(is_copied, page, num_pages) for page in (last, new[:, 0]))

    token = jnp.arange(num_new, dtype=jnp.int32)[None]
    position = length[:, None] + token
    page = grown.at[index[:, None], position // page_size].get(mode="fill", fill_value=num_pages)
    is_written = (token < num_valid[:, None]) & is_served[:, None] & (page < num_pages)
    page = jnp.where(is_written, page, num_pages + index[:, None] * num_new + token)
    return Growth(grown, source, target, page, position % page_size, is_out_of_pages)


def write(growth: Growth, pool: jax.Array, new: jax.Array) -> jax.Array:
    """The pool `(P, page_size, K, D)` with shared pages copied, and with new tokens `(B, n, K, D)`."""

    def written(source: Any, target: Any, page: Any, offset: Any, pool: jax.Array, new: jax.Array) -> jax.Array:
        pool = pool.at[target].set(pool.at[source].get(mode="clip"), mode="drop")
        return pool.at[page, offset].set(new, mode="drop", unique_indices=True)

    return _by_heads(written, growth.source, growth.target, growth.page, growth.offset, pool, new)


def read(table: jax.Array, pool: jax.Array) -> jax.Array:
    """The tokens of each sequence, `(B, capacity, K, D)`. Where there are none, the content is any page's."""

    def gathered(table: jax.Array, pool: jax.Array) -> jax.Array:
        num_sequences, num_columns = table.shape
        return pool.at[table].get(mode="clip").reshape(num_sequences, num_columns * pool.shape[1], *pool.shape[2:])

    return _by_heads(gathered, table, pool)


def _by_heads(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`function(*arrays)`. On Explicit mesh axes the result is sharded by heads alone, like tokens or the pool."""
    if not is_sharded(arrays):
        return function(*arrays)
    heads = next((partition(x)[2] for x in arrays if x.ndim == 4 and partition(x)[2] is not None), None)
    result: jax.Array = on_auto_axes(function, arrays, PartitionSpec(None, None, heads))
    return result


def _pages_for(length: jax.Array, page_size: int) -> jax.Array:
    return (length + (page_size - 1)) // page_size
