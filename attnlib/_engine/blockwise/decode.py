"""Few queries against many keys on a CPU, as in decoding: one product for all heads, without moving keys and values.

The batched products of attention take keys (K, S, D). If keys lie in memory as (S, K, D), XLA moves all of them first,
which takes longer than attention itself. Here the keys of all heads are one matrix (S, K * D). The queries form a
block-diagonal matrix (N * T, K * D): the features of a head, and zeros for the other heads. Values are multiplied
likewise, and each head keeps its own block of the product. This takes K times as many multiplications, and moves
nothing.

A traced mask may leave few of the keys, as in a cache that has room for more keys than it holds. Keys are then
multiplied in chunks, and chunks without a key that attends are not read. If many chunks have such a key, one product of
all keys is faster.

Non-finite inputs are not replaced beforehand. They show up as NaN in the product (0 * inf), so the result is checked
once, and recomputed tile by tile if it is not finite. That path is slower and agrees with the fast one up to rounding.
The gradients by query, key and value are computed likewise; other gradients and tangents are computed tile by tile.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlib._autodiff.exponential import exp
from attnlib._autodiff.linear_map import unbroadcast
from attnlib._core.problem import AttentionProblem
from attnlib._core.sizes import static_product
from attnlib._core.tile_kinds import EMPTY, tile_kinds
from attnlib._engine import softmax as _softmax
from attnlib._engine.blockwise.layout import pin_layout
from attnlib._engine.blockwise.plan import BlockwiseStrategy
from attnlib._engine.blockwise.tile import BlockwisePlan, Tile, TileArrays, TileIndex, whole
from attnlib._engine.nonfinite import finite_rows
from attnlib._engine.softmax import SoftmaxState
from attnlib.scores import Score

# Numbers in the keys of a chunk (docs/performance/tuning.md), and keys that it has at least.
_CHUNK, _MIN_CHUNK = 2**19, 64
# The fraction of the chunks beyond which one product of all keys is as fast, or faster with groups of heads.
_MOST_CHUNKS = 0.4

UpdateState = Callable[[SoftmaxState, Tile], SoftmaxState]


def numbers(problem: AttentionProblem, strategy: BlockwiseStrategy) -> int:
    """The approximate number of numbers in the temporaries of a forward pass."""
    features = problem.key.shape[-1] + problem.value.shape[-1]
    pairs_and_rows = problem.rows * (2 * problem.key_length + problem.kv_heads * features)
    moved = math.prod(problem.batch) * problem.kv_heads * min(strategy.fallback_keys, problem.key_length) * features
    converted = 0 if problem.key.dtype == problem.dtype else problem.key.size + problem.value.size
    return pairs_and_rows + moved + converted


def attend(plan: BlockwisePlan, arrays: TileArrays, start: SoftmaxState, update_state: UpdateState) -> SoftmaxState:
    """The state after all keys; the plan has one tile. `update_state` adds one tile to a state."""
    if _kind(plan, arrays) == EMPTY:
        return start
    # The layout is pinned before the branches, or XLA would move keys and values for both.
    arrays = _swap_heads_and_keys(arrays)
    arrays = arrays._replace(key=pin_layout(arrays.key), value=pin_layout(arrays.value))
    state, finite = _attend_used_keys(plan, arrays, start)
    finite = _in_whole_batch(jnp.all(finite))
    return jax.lax.cond(finite, lambda: state, lambda: _fallback_tiles(plan, arrays, start, update_state))


def transpose(
    plan: BlockwisePlan,
    arrays: TileArrays,
    output: jax.Array,
    lse: jax.Array,
    cotangents: Any,
    tiled: Callable[[TileArrays], Any],
) -> list[jax.Array]:
    """Cotangents of query, key and value from those of output and lse; `tiled` computes them tile by tile.

    JAX does not differentiate this function; `implementation.py` gives its rule.
    """
    if _kind(plan, arrays) == EMPTY:
        return tiled(arrays)
    arrays = _swap_heads_and_keys(arrays)
    (query, key, value), finite = _transpose(plan, arrays, output, lse, *cotangents)

    def recompute() -> tuple[jax.Array, ...]:
        query, key, value = tiled(_swap_heads_and_keys(arrays))
        return query, pin_layout(jnp.swapaxes(key, -3, -2)), pin_layout(jnp.swapaxes(value, -3, -2))

    finite = _in_whole_batch(jnp.all(finite))
    query, key, value = jax.lax.cond(finite, lambda: (query, key, value), recompute)
    return [query, jnp.swapaxes(key, -3, -2), jnp.swapaxes(value, -3, -2)]


def _attend_used_keys(plan: BlockwisePlan, arrays: TileArrays, start: SoftmaxState) -> tuple[SoftmaxState, jax.Array]:
    """`_attend` of all keys; where a traced mask decides, chunk by chunk, without the chunks that it leaves out."""
    everything, chunk = whole(arrays, apply_mask=False), _chunk_length(arrays)
    traced = jax.tree.leaves((arrays.mask, arrays.query_positions, arrays.key_positions))
    attends = Tile(plan, arrays, everything).mask if arrays.mask is not None and traced else jnp.ones(1, bool)
    if chunk == everything.sizes[1] or attends.shape[-1] == 1:
        return _attend(plan, arrays, everything)
    attends = jnp.any(attends, range(attends.ndim - 1))
    used = ~_in_whole_batch(~jnp.any(attends.reshape(-1, chunk), -1))
    chunks = jnp.argsort(~used)  # those in use come first

    def add_chunk(n: jax.Array, carry: tuple[SoftmaxState, jax.Array]) -> tuple[SoftmaxState, jax.Array]:
        index = TileIndex((), (0, chunks[n] * chunk), (everything.sizes[0], chunk), apply_mask=False)
        key, value = (index.cut(x, (None, -3)) for x in (arrays.key, arrays.value))
        bias = None if arrays.bias is None else index.cut(arrays.bias, (None, -1))
        state, finite = _attend(plan, arrays._replace(key=key, value=value, bias=bias), index)
        return _softmax.join(carry[0], state), carry[1] & finite

    count = jnp.sum(used, dtype=jnp.int32)
    # The loop is not differentiated: `implementation.py` gives the derivatives, which have loops of their own.
    return jax.lax.cond(
        count > int(_MOST_CHUNKS * len(used)),
        lambda: _attend(plan, arrays, everything),
        lambda: jax.lax.fori_loop(0, count, add_chunk, (start, start.row_sum == 0)),
    )


def _chunk_length(arrays: TileArrays) -> int:
    """The largest divisor of the number of keys for a chunk that fits in the cache; the number of keys if none does."""
    *_, length, heads, features = arrays.key.shape
    largest = _CHUNK // static_product((*arrays.key.shape[:-3], heads, features))
    largest = max(largest, _MIN_CHUNK)
    return max((n for n in range(_MIN_CHUNK, min(largest, length) + 1) if length % n == 0), default=length)


def _attend(plan: BlockwisePlan, arrays: TileArrays, index: TileIndex) -> tuple[SoftmaxState, jax.Array]:
    """(state, which rows are finite wherever they attend), for keys and values `(*batch, S, K, D)`."""
    product = _qk_product(plan, arrays.query, arrays.key)
    tile, logits = _logits(plan, arrays, product, index)
    logits, finite = jnp.where(tile.mask, logits, -jnp.inf), jnp.isfinite(product) | ~tile.mask
    row_max = _softmax.finite_row_max(logits)
    weights = exp(logits - row_max[..., None])
    output = _pv_product(plan, tile.drop(weights), arrays.value)
    return SoftmaxState(row_max, jnp.sum(weights, -1), output), finite_rows(output) & jnp.all(finite, -1)


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
    index = whole(arrays, apply_mask=False)
    logits, pull = jax.vjp(lambda product: _logits(plan, arrays, product, index)[1], product)
    tile, _ = _logits(plan, arrays, product, index)
    logits = jnp.where(tile.mask, logits, -jnp.inf)
    weights = exp(logits - _softmax.finite_max(lse)[..., None])
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


def _logits(plan: BlockwisePlan, arrays: TileArrays, product: jax.Array, index: TileIndex) -> tuple[Tile, jax.Array]:
    """(the tile, its logits from these products, not yet masked)."""
    tile = Tile(plan, arrays._replace(score=_PrecomputedLogits(product)), index)
    return tile, tile.split_rows(tile.terms()[0])


# The products of _autodiff/matmul.py for keys and values `(*batch, S, K, D)`. All three are fastest when the pairs of a
# key are adjacent in memory, `(*batch, S, N * T)`.


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
    """(*batch, K, G, T, S), (*batch, K, G, T, D) -> (*batch, S, K, D), summed over batch axes of size one in `like`."""
    total = jnp.einsum("...sr,...rc->...sc", _pairs_as_columns(pairs), _block_diagonal(query), precision=plan.precision)
    return unbroadcast(total.reshape(*total.shape[:-1], *like.shape[-2:]), like.shape)


def _block_diagonal(query: jax.Array) -> jax.Array:
    """(*batch, K, G, T, D) -> (*batch, N * T, K * D), zero except for each head's own features."""
    diagonal = jnp.eye(query.shape[-4], dtype=bool)[:, None, None, :, None]
    return _merge_axes(_merge_axes(jnp.where(diagonal, query[..., None, :], 0), -2, -1), -4, -2)


def _pairs_as_columns(pairs: jax.Array) -> jax.Array:
    """(*batch, K, G, T, S) -> (*batch, S, N * T)."""
    return jax.lax.optimization_barrier(jnp.swapaxes(_merge_axes(pairs, -4, -2), -1, -2))


def _swap_heads_and_keys(arrays: TileArrays) -> TileArrays:
    """The arrays with keys and values (*batch, S, K, D) in place of (*batch, K, S, D), or the reverse."""
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
    """A score whose logits are already computed."""

    logits: jax.Array

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        return self.logits


@jax.custom_batching.custom_vmap
def _in_whole_batch(array: jax.Array) -> jax.Array:
    """The bools; under vmap, those of which the whole batch is true.

    One answer then serves the whole batch. With one for each entry, `cond` would compute both branches.
    """
    return array


@_in_whole_batch.def_vmap
def _all_of_batch(axis_size: int, in_batched: Any, array: jax.Array) -> tuple[jax.Array, bool]:
    return _in_whole_batch(jnp.all(array, 0)), False


def _merge_axes(array: jax.Array, first: int, last: int) -> jax.Array:
    """The array with the axes from `first` to `last`, both counted from the end, merged into one."""
    shape, stop = array.shape, last + array.ndim + 1
    return array.reshape(*shape[:first], math.prod(shape[first:stop]), *shape[stop:])
