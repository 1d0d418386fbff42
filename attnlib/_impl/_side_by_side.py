"""Few queries against many keys on a CPU, as in decoding: all heads in one product, keys and values as they lie.

The batched products of attention want keys (K, S, D), and where they lie as (S, K, D) XLA moves them all first, which
takes longer than to attend. Here the keys of all heads are one matrix (S, K * D); the queries stand block-diagonally in
another, (N * T, K * D), a head's features beside zeros for the other heads. Likewise for the values, of whose product
only each head's own block is kept. That multiplies K times more, and moves nothing.

Nor is anything cleared of what is not finite. A zero makes NaN of it, in every head, and so it cannot go unseen: then
all is computed again, tile by tile, as ever. This is the forward pass only; derivatives run over tiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlib import _online_softmax
from attnlib._impl._tile import Arrays, Plan, Tile, tile_kinds
from attnlib._online_softmax import Running
from attnlib._tiles import EMPTY, FULL
from attnlib.scores import Score

# Keys in a tile of what is computed again: small, so that what moves is small.
_TILE = 512

Absorb = Callable[[Running, Tile], Running]


def attend(plan: Plan, arrays: Arrays, start: Running, absorb: Absorb) -> Running:
    """The sums over all keys, the plan's tile being all queries and all keys; `absorb` adds one tile to them."""
    kind = tile_kinds(arrays.mask, plan.query_shape, plan.key_shape, plan.tile)[0, 0]
    if kind == EMPTY:
        return start
    # As they lie, before the branches: else XLA moves them for both.
    arrays = arrays._replace(key=jnp.moveaxis(arrays.key, -3, -2), value=jnp.moveaxis(arrays.value, -3, -2))
    running, finite = _at_once(plan, arrays, asked=kind != FULL)
    return jax.lax.cond(_all(finite), lambda: running, lambda: _in_tiles(plan, arrays, start, absorb))


def _at_once(plan: Plan, arrays: Arrays, asked: bool) -> tuple[Running, jax.Array]:
    """(the sums, which rows are finite wherever they attend), of keys and values `(*batch, S, K, D)`."""
    query, key, value = arrays[:3]
    heads, length = query.shape[-4:-1], key.shape[-3]  # (K, G, T), S
    own = jnp.eye(heads[0], dtype=bool)[:, None, None, :, None]
    rows = _merged(_merged(jnp.where(own, query[..., None, :], 0), -2, -1), -4, -2)  # (*batch, N * T, K * D)
    # Pairs of one key side by side: both products run fastest with (*batch, S, N * T).
    pairs = jnp.einsum("...sc,...rc->...sr", _merged(key, -2, -1), rows, precision=plan.precision)
    product = jnp.swapaxes(pairs, -1, -2).reshape(*pairs.shape[:-2], *heads, length)
    tile = Tile(plan, arrays._replace(score=_Given(product)), plan.everywhere(asked=False))
    logits, _ = tile.terms()
    finite = jnp.isfinite(product)
    if asked:
        logits, finite = jnp.where(tile.mask, logits, -jnp.inf), finite | ~tile.mask
    highest = jnp.max(logits, -1)
    weights = jnp.exp(logits - _online_softmax.base(highest)[..., None])
    columns = jax.lax.optimization_barrier(jnp.swapaxes(_merged(tile.drop(weights), -4, -2), -1, -2))
    blocks = jnp.einsum("...sr,...sc->...rc", columns, _merged(value, -2, -1), precision=plan.precision)
    blocks = blocks.reshape(*blocks.shape[:-2], *heads, *value.shape[-2:])  # (*batch, K, G, T, K, E)
    output = jnp.stack([blocks[..., head, :, :, head, :] for head in range(heads[0])], -4)
    return Running(highest, jnp.sum(weights, -1), output), jnp.all(finite, -1) & jnp.all(jnp.isfinite(output), -1)


def _in_tiles(plan: Plan, arrays: Arrays, running: Running, absorb: Absorb) -> Running:
    """The same as any tiles have it, NaN and all."""
    length = arrays.key.shape[-3]
    whole = length // _TILE * _TILE
    for size, starts in ((_TILE, range(0, whole, _TILE)), (length - whole, range(whole, length, _TILE))):
        smaller = dataclasses.replace(plan, tile=(plan.tile[0], size))

        def step(running: Running, start: Any, plan: Plan = smaller) -> tuple[Running, None]:
            at = plan.place(start, asked=arrays.mask is not None)
            key, value = (jnp.moveaxis(at.cut(x, (None, -3)), -3, -2) for x in (arrays.key, arrays.value))
            bias = None if arrays.bias is None else at.cut(arrays.bias, (None, -1))
            return absorb(running, Tile(plan, arrays._replace(key=key, value=value, bias=bias), at)), None

        if starts:
            running, _ = jax.lax.scan(step, running, jnp.asarray([(0, start) for start in starts], jnp.int32))
    return running


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Given(Score):
    """Logits that were computed before."""

    logits: jax.Array

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        return self.logits


@jax.custom_batching.custom_vmap
def _all(array: jax.Array) -> jax.Array:
    """Whether all are true; in a batch too one answer for all of it, since a branch for each would compute both."""
    return jnp.all(array)


@_all.def_vmap
def _all_of_batch(axis_size: int, in_batched: Any, array: jax.Array) -> tuple[jax.Array, bool]:
    return _all(array), False


def _merged(array: jax.Array, first: int, last: int) -> jax.Array:
    """With the axes from `first` to `last`, both counted from the end, merged into one."""
    shape, stop = array.shape, last + array.ndim + 1
    return array.reshape(*shape[:first], -1, *shape[stop:])
