"""Few queries against many keys on a CPU, as in decoding: all heads in one product, keys and values as they lie.

The batched products of attention want keys (K, S, D), and where they lie as (S, K, D) XLA moves them all first, which
takes longer than to attend. Here the keys of all heads are one matrix (S, K * D); the queries stand block-diagonally in
another, (N * T, K * D), a head's features beside zeros for the other heads. Likewise for the values, of whose product
only each head's own block is kept. That multiplies K times more, and moves nothing.

Nor is anything cleared of what is not finite. A zero makes NaN of it, in every head, and so it cannot go unseen: then
all is computed again, tile by tile, as ever: slower, and where it was a masked key, the same but for rounding. So it is
with the gradients by query, key and value; those by others, and tangents, run over tiles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from attnlib._autodiff.linear_map import unbroadcast
from attnlib._core.problem import AttentionProblem
from attnlib._core.tile_kinds import EMPTY, tile_kinds
from attnlib._engine import softmax as _softmax
from attnlib._engine.blockwise.plan import BlockwiseStrategy
from attnlib._engine.blockwise.tile import BlockwisePlan, Tile, TileArrays, whole
from attnlib._engine.nonfinite import finite_rows
from attnlib._engine.softmax import SoftmaxState
from attnlib.scores import Score

UpdateState = Callable[[SoftmaxState, Tile], SoftmaxState]


def numbers(problem: AttentionProblem, strategy: BlockwiseStrategy) -> int:
    """About how many numbers the temporaries of a forward pass hold."""
    features = problem.key.shape[-1] + problem.value.shape[-1]
    pairs_and_rows = problem.rows * (2 * problem.key_length + problem.kv_heads * features)
    moved = math.prod(problem.batch) * problem.kv_heads * min(strategy.fallback_keys, problem.key_length) * features
    converted = 0 if problem.key.dtype == problem.dtype else problem.key.size + problem.value.size
    return pairs_and_rows + moved + converted


def attend(plan: BlockwisePlan, arrays: TileArrays, start: SoftmaxState, update_state: UpdateState) -> SoftmaxState:
    """The sums over all keys, the plan's tile being all queries and all keys; `update_state` adds one tile to them."""
    if _kind(plan, arrays) == EMPTY:
        return start
    # As they lie, before the branches: else XLA moves them for both.
    arrays = _swap_heads_and_keys(arrays)
    arrays = arrays._replace(key=_pin_layout(arrays.key), value=_pin_layout(arrays.value))
    running, finite = _attend(plan, arrays)
    return jax.lax.cond(_all(finite), lambda: running, lambda: _fallback_tiles(plan, arrays, start, update_state))


def transpose(
    plan: BlockwisePlan,
    arrays: TileArrays,
    output: jax.Array,
    lse: jax.Array,
    cotangents: Any,
    tiled: Callable[[TileArrays], Any],
) -> list[jax.Array]:
    """Cotangents of query, key and value from those of output and lse; `tiled` gives them of any arrays.

    Written out beside the loop of tiles in blockwise.py, and not differentiable itself.
    """
    if _kind(plan, arrays) == EMPTY:
        return tiled(arrays)
    arrays = _swap_heads_and_keys(arrays)
    (query, key, value), finite = _transpose(plan, arrays, output, lse, *cotangents)

    def recompute() -> tuple[jax.Array, ...]:
        query, key, value = tiled(_swap_heads_and_keys(arrays))
        return query, _pin_layout(jnp.swapaxes(key, -3, -2)), _pin_layout(jnp.swapaxes(value, -3, -2))

    query, key, value = jax.lax.cond(_all(finite), lambda: (query, key, value), recompute)
    return [query, jnp.swapaxes(key, -3, -2), jnp.swapaxes(value, -3, -2)]


def _attend(plan: BlockwisePlan, arrays: TileArrays) -> tuple[SoftmaxState, jax.Array]:
    """(the sums, which rows are finite wherever they attend), of keys and values `(*batch, S, K, D)`."""
    product = _qk_product(plan, arrays.query, arrays.key)
    tile, logits = _logits(plan, arrays, product)
    logits, finite = jnp.where(tile.mask, logits, -jnp.inf), jnp.isfinite(product) | ~tile.mask
    highest = jnp.max(logits, -1)
    weights = jnp.exp(logits - _softmax.finite_max(highest)[..., None])
    output = _pv_product(plan, tile.drop(weights), arrays.value)
    return SoftmaxState(highest, jnp.sum(weights, -1), output), finite_rows(output) & jnp.all(finite, -1)


def _transpose(
    plan: BlockwisePlan,
    arrays: TileArrays,
    output: jax.Array,
    lse: jax.Array,
    output_ct: jax.Array,
    lse_ct: jax.Array,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    query, key, value = arrays[:3]
    product = _qk_product(plan, query, key)
    logits, pull = jax.vjp(lambda product: _logits(plan, arrays, product)[1], product)
    tile, _ = _logits(plan, arrays, product)
    logits = jnp.where(tile.mask, logits, -jnp.inf)
    weights = jnp.exp(logits - _softmax.finite_max(lse)[..., None])
    delta = lse_ct - jnp.sum(output * output_ct, -1)
    weights_ct = tile.drop(_qk_product(plan, output_ct, value)) + delta[..., None]
    (product_ct,) = pull(jnp.where(tile.mask, weights * weights_ct, 0))
    dropped = tile.drop(weights)
    query_ct = _pv_product(plan, product_ct, key)
    cotangents = (
        query_ct,
        _pt_o_product(plan, product_ct, query, key),
        _pt_o_product(plan, dropped, output_ct, value),
    )
    finite = jnp.all(jnp.isfinite(product) | ~tile.mask, -1) & finite_rows(query) & finite_rows(output_ct)
    return cotangents, finite & finite_rows(query_ct) & finite_rows(product_ct) & finite_rows(dropped)


def _logits(plan: BlockwisePlan, arrays: TileArrays, product: jax.Array) -> tuple[Tile, jax.Array]:
    """(the tile of all, its logits from those products), not yet masked."""
    arrays = arrays._replace(score=_PrecomputedLogits(product))
    tile = Tile(plan, arrays, whole(arrays, apply_mask=False))
    return tile, tile.terms()[0]


# The products of _product.py, of keys and values as they lie. Pairs of one key stand side by side, (*batch, S, N * T),
# with which all three run fastest.


def _qk_product(plan: BlockwisePlan, query: jax.Array, key: jax.Array) -> jax.Array:
    """(*batch, K, G, T, D), (*batch, S, K, D) -> (*batch, K, G, T, S)."""
    pairs = jnp.einsum("...sc,...rc->...sr", _merge_axes(key, -2, -1), _block_diagonal(query), precision=plan.precision)
    return jnp.swapaxes(pairs, -1, -2).reshape(*pairs.shape[:-2], *query.shape[-4:-1], key.shape[-3])


def _pv_product(plan: BlockwisePlan, pairs: jax.Array, value: jax.Array) -> jax.Array:
    """(*batch, K, G, T, S), (*batch, S, K, D) -> (*batch, K, G, T, D)."""
    blocks = jnp.einsum(
        "...sr,...sc->...rc", _pairs_as_columns(pairs), _merge_axes(value, -2, -1), precision=plan.precision
    )
    blocks = blocks.reshape(*blocks.shape[:-2], *pairs.shape[-4:-1], *value.shape[-2:])  # (*batch, K, G, T, K, D)
    return jnp.stack([blocks[..., head, :, :, head, :] for head in range(value.shape[-2])], -4)


def _pt_o_product(plan: BlockwisePlan, pairs: jax.Array, query: jax.Array, like: jax.Array) -> jax.Array:
    """(*batch, K, G, T, S), (*batch, K, G, T, D) -> (*batch, S, K, D), the sum over what batch axes are one of."""
    total = jnp.einsum("...sr,...rc->...sc", _pairs_as_columns(pairs), _block_diagonal(query), precision=plan.precision)
    return unbroadcast(total.reshape(*total.shape[:-1], *like.shape[-2:]), like.shape)


def _block_diagonal(query: jax.Array) -> jax.Array:
    """(*batch, K, G, T, D) -> (*batch, N * T, K * D), zero but for each head's own features."""
    own = jnp.eye(query.shape[-4], dtype=bool)[:, None, None, :, None]
    return _merge_axes(_merge_axes(jnp.where(own, query[..., None, :], 0), -2, -1), -4, -2)


def _pairs_as_columns(pairs: jax.Array) -> jax.Array:
    """(*batch, K, G, T, S) -> (*batch, S, N * T)."""
    return jax.lax.optimization_barrier(jnp.swapaxes(_merge_axes(pairs, -4, -2), -1, -2))


def _swap_heads_and_keys(arrays: TileArrays) -> TileArrays:
    """Keys and values from (*batch, K, S, D) to how they lie, (*batch, S, K, D), or back."""
    return arrays._replace(key=jnp.swapaxes(arrays.key, -3, -2), value=jnp.swapaxes(arrays.value, -3, -2))


def _kind(plan: BlockwisePlan, arrays: TileArrays) -> int:
    kinds, _ = tile_kinds(arrays.mask, arrays.query_positions, arrays.key_positions, plan.block_sizes)
    return int(kinds[0, 0])


def _fallback_tiles(
    plan: BlockwisePlan, arrays: TileArrays, state: SoftmaxState, update_state: UpdateState
) -> SoftmaxState:
    """The sums over all keys, computed tile by tile, with NaN where rows attend what is not finite."""
    length, size = arrays.key.shape[-3], plan.strategy.fallback_keys
    end = length // size * size
    for keys, starts in ((size, range(0, end, size)), (length - end, range(end, length, size))):
        strategy = dataclasses.replace(plan.strategy, block_sizes=(plan.block_sizes[0], keys))
        smaller = dataclasses.replace(plan, strategy=strategy)

        def step(state: SoftmaxState, row: Any, plan: BlockwisePlan = smaller) -> tuple[SoftmaxState, None]:
            index = plan.index(row, apply_mask=arrays.mask is not None)
            key, value = (jnp.moveaxis(index.cut(x, (None, -3)), -3, -2) for x in (arrays.key, arrays.value))
            bias = None if arrays.bias is None else index.cut(arrays.bias, (None, -1))
            return update_state(state, Tile(plan, arrays._replace(key=key, value=value, bias=bias), index)), None

        if starts:
            state, _ = jax.lax.scan(step, state, jnp.asarray([(0, start) for start in starts], jnp.int32))
    return state


@dataclasses.dataclass(frozen=True, eq=False)
class _PrecomputedLogits(Score):
    """Logits that were computed before."""

    logits: jax.Array

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        return self.logits


def _pin_layout(array: jax.Array) -> jax.Array:
    """The array, its last axis innermost in memory: else XLA may lay out the results of both branches another way."""
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


@jax.custom_batching.custom_vmap
def _all(array: jax.Array) -> jax.Array:
    """Whether all are true; in a batch too one answer for all of it, since a branch for each would compute both."""
    return jnp.all(array)


@_all.def_vmap
def _all_of_batch(axis_size: int, in_batched: Any, array: jax.Array) -> tuple[jax.Array, bool]:
    return _all(array), False


def _merge_axes(array: jax.Array, first: int, last: int) -> jax.Array:
    """With the axes from `first` to `last`, both counted from the end, merged into one."""
    shape, stop = array.shape, last + array.ndim + 1
    return array.reshape(*shape[:first], -1, *shape[stop:])
