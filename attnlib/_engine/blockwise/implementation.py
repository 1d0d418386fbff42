"""Attention tile by tile, with memory linear in the lengths, for every score, mask, modifier and derivative.

The forward pass is an online softmax over the tiles that the mask does not empty (Rabe and Staats 2021; Dao et al.
2022). It gives the output o and the log-sum-exp of each row, and keeps no array of all pairs. With s the logits of a
tile, p = exp(s - lse) its softmax, d its dropout factors (0 or 1 / (1 - rate)) and v its values:

  tangent     a = sum_tiles (d p s') v + (d p) v',  c = sum_tiles p s';   o' = a - o c,  lse' = c
  transpose   with delta = lse~ - <o, o~>:   s~ = p (d <o~, v> + delta),  v~ = (d p)^T o~

The strategy `dense` has one tile. It carries nothing, and its transpose takes p = exp(s - max) and divides o~ and delta
by the sum of p, so that XLA can share p with the forward pass.

JAX's derivatives of the score give s' from (query', key', ...), and (query~, key~, ...) from s~. Both loops are scans
over checkpointed bodies, so JAX differentiates them again for higher orders, in linear memory too. A tile has all batch
indices and heads, or one of each; then the scans also run over batch indices and heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._autodiff.custom_rule import call_with_rule, linear_tangent
from attnlib._autodiff.exponential import exp
from attnlib._autodiff.leaves import partial_in
from attnlib._autodiff.linear_map import HashablePartial, unbroadcast
from attnlib._autodiff.matmul import pt_o_product, pv_product, qk_product
from attnlib._autodiff.zeros import zeros_like_varying
from attnlib._core import axes as _axes
from attnlib._core.problem import AttentionProblem, AttentionResult, Estimate, Implementation
from attnlib._engine import softmax as _softmax
from attnlib._engine.blockwise import decode as _decode
from attnlib._engine.blockwise.plan import (
    BlockwiseStrategy,
    Kind,
    plan_blocks,
    rows_per_query,
    tile_starts,
    unsupported,
)
from attnlib._engine.blockwise.tile import BlockwisePlan, Tile, TileArrays, whole
from attnlib._engine.cost import operations
from attnlib._engine.softmax import SoftmaxState

Leaves = Sequence[jax.Array]

# The axes of queries and keys, as `TileIndex.cut` takes them: of one number a row, of the output, of a `SoftmaxState`.
_ROWS, _OUTPUT = (-1, None), (-2, None)
_STATE = _ROWS, _ROWS, _OUTPUT
# Query, key and value among the leaves.
_OPERANDS = 0, 1, 2
# The output is linear in the value, and the lse does not depend on it.
_LINEAR = ((2, (0,)),)

_SUPPORTS = frozenset(
    "mask bias dropout_rate logits_soft_cap score_mod sink normalize return_weights return_lse block_sizes "
    "precision".split()
)


@functools.cache
def blockwise(kind: Kind | None = None, name: str = "blockwise") -> Implementation:
    """The implementation, by a strategy of that kind, or of the kind that is likely fastest on this machine."""
    return Implementation(
        name, _SUPPORTS, partial(unsupported, kind=kind), partial(_run, kind=kind), partial(_estimate, kind=kind)
    )


def _run(problem: AttentionProblem, kind: Kind | None) -> AttentionResult:
    if problem.query_length == 0 or problem.key_length == 0:
        return nothing(problem)
    return _run_blocks(problem, plan_blocks(problem, kind))


def _run_blocks(problem: AttentionProblem, strategy: BlockwiseStrategy) -> AttentionResult:
    problem = prepared(problem)
    arrays = _padded(problem, strategy)
    plan = BlockwisePlan.of(problem, strategy, arrays)
    leaves = jax.tree.leaves(arrays)
    output, lse = _attend(plan, leaves)
    output, lse = output[..., : problem.query_length, :], lse[..., : problem.query_length]
    return AttentionResult(output, lse, _weights(plan, leaves, lse) if problem.return_weights else None)


def prepared(problem: AttentionProblem) -> AttentionProblem:
    """The problem in its dtype, after the score's work on single positions."""
    query, key, value = (x.astype(problem.dtype) for x in (problem.query, problem.key, problem.value))
    query = jnp.broadcast_to(query, (*problem.batch, *query.shape[-4:]))  # rows are per batch index
    query, key, score = problem.score.prepare(query, key, problem.precision)
    bias = None if problem.bias is None else problem.bias.astype(problem.dtype)
    return dataclasses.replace(problem, query=query, key=key, value=value, score=score, bias=bias)


def _padded(problem: AttentionProblem, strategy: BlockwiseStrategy) -> TileArrays:
    """The arrays, padded to whole tiles; tiles of key spans begin anywhere, so that keys need no padding."""
    lengths = problem.query_length, problem.key_length
    queries, keys = (-(-length // size) * size for length, size in zip(lengths, strategy.block_sizes, strict=True))
    keys = problem.key_length if strategy.has_key_spans else keys
    positions = problem.query_positions, problem.key_positions
    mask = problem.mask
    if mask is not None:
        mask = mask.pad_to(*problem.positions, (positions[0].padded_length(queries), positions[1].padded_length(keys)))
    # Padding repeats real entries, so that a score gets no value outside of its domain. The mask leaves padding out.
    return TileArrays(
        query=_axes.pad_axis(problem.query, -2, queries),
        key=_axes.pad_axis(problem.key, -2, keys),
        value=_axes.pad_axis(problem.value, -2, keys),
        bias=None if problem.bias is None else _axes.pad_pairs(problem.bias, (queries, keys)),
        score=problem.score,
        modifiers=problem.modifiers,
        mask=mask,
        dropout_seeds=problem.dropout_seeds,
        query_positions=positions[0],
        key_positions=positions[1],
    )


def nothing(problem: AttentionProblem) -> AttentionResult:
    """The result if there are no queries or no keys."""
    rows = (*problem.batch, problem.kv_heads, problem.groups, problem.query_length)
    weights = jnp.zeros((*rows, problem.key_length), problem.dtype) if problem.return_weights else None
    output = jnp.zeros((*rows, problem.value.shape[-1]), problem.dtype)
    return AttentionResult(output, jnp.full(rows, -jnp.inf, problem.dtype), weights)


def _weights(plan: BlockwisePlan, leaves: Leaves, lse: jax.Array) -> jax.Array:
    """The weights of all pairs, from the lse; they take quadratic memory anyway, so they are one tile."""
    arrays = plan.structure.unflatten(leaves)
    tile = plan.tile(whole(arrays, apply_mask=arrays.mask is not None), leaves)
    logits, _ = tile.terms()
    return tile.split_rows(tile.drop(tile.softmax(logits, tile.cut_rows(lse, _ROWS))))


# Derivatives: the tangent loop is the derivative of (output, lse), and the transpose loop is its transpose.


def _attend(plan: BlockwisePlan, leaves: Leaves) -> tuple[jax.Array, jax.Array]:
    """(output, lse) of padded arrays."""
    forward, rule = HashablePartial(_forward, (plan,)), HashablePartial(_rule, (plan,))
    output, lse = call_with_rule(forward, rule, leaves, linear=_LINEAR)
    return output, lse


def _rule(plan: BlockwisePlan, perturbed: tuple[int, ...], leaves: Leaves, tangents: Leaves) -> Any:
    results = _attend(plan, leaves)
    forward, transpose = HashablePartial(_tangent, (plan,)), HashablePartial(_transpose, (plan,))
    return results, linear_tangent(forward, transpose, (*leaves, *results), perturbed, tangents, results)


class _TileLoop:
    """Runs a body over all tiles of the schedule."""

    def __init__(self, plan: BlockwisePlan, leaves: Leaves):
        self.plan, self.leaves = plan, leaves
        self.arrays = plan.structure.unflatten(leaves)
        self.schedule = plan.schedule(self.arrays)

    def run(self, body: Callable[[Any, Tile], Any], carry: Any, checkpoint: bool) -> Any:
        for apply_mask, rows in self.schedule:
            # Indices that all tiles share are constants, which XLA folds into what they cut.
            varying = np.flatnonzero((rows != rows[0]).any(0)).tolist()
            shared = dict(enumerate(rows[0]))

            def step(
                carry: Any,
                indices: Sequence[jax.Array],
                apply_mask: bool = apply_mask,
                varying: Sequence[int] = varying,
                shared: dict[int, Any] = shared,
            ) -> tuple[Any, None]:
                row = {**shared, **dict(zip(varying, indices, strict=True))}
                return body(carry, self.plan.tile(self.plan.index(row.values(), apply_mask), self.leaves)), None

            if checkpoint:  # derivatives of the loop recompute a tile rather than keep it
                step = jax.checkpoint(step, prevent_cse=len(rows) == 1)
            if len(rows) == 1:
                carry, _ = step(carry, [])
            else:
                carry, _ = jax.lax.scan(step, carry, [jnp.asarray(rows[:, column]) for column in varying])
        return carry


def _forward(plan: BlockwisePlan, *leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
    loop = _TileLoop(plan, leaves)
    arrays = loop.arrays

    def put(results: tuple[jax.Array, jax.Array], tile: Tile) -> tuple[jax.Array, jax.Array]:
        output, lse = tile.result()
        return tile.put_rows(results[0], output, _OUTPUT), tile.put_rows(results[1], lse, _ROWS)

    rows = jnp.sum(zeros_like_varying(arrays.query[..., :1]), -1)
    output = jnp.broadcast_to(rows[..., None], (*rows.shape, arrays.value.shape[-1]))
    start = SoftmaxState(rows + jnp.finfo(rows.dtype).min, rows, output)
    if plan.strategy.kind == "decode":
        return _softmax.normalize(_decode.attend(plan, arrays, start, joined))
    if plan.has_all_keys(arrays):
        return loop.run(put, (output, rows - jnp.inf), checkpoint=False)
    return _softmax.normalize(loop.run(joined, start, checkpoint=False))


def joined(state: SoftmaxState, tile: Tile) -> SoftmaxState:
    """The state, of all rows or of the tile's, with the tile's keys added to the tile's rows."""
    logits, value = tile.terms()
    # The state keeps its axis of groups here, or XLA would copy the tile's part of it.
    old = SoftmaxState(*(tile.index.cut(x, axes) for x, axes in zip(state, _STATE, strict=True)))
    row_max = jnp.maximum(old.row_max, tile.split_rows(_softmax.finite_row_max(logits), -1))
    rescale, weights = exp(old.row_max - row_max), exp(logits - _axes.merge_groups(row_max, -1)[..., None])
    row_sum = old.row_sum * rescale + tile.split_rows(jnp.sum(weights, -1), -1)
    sums = tile.split_rows(pv_product(tile.plan.form, tile.drop(weights), value))
    new = row_max, row_sum, old.output * rescale[..., None] + sums
    return SoftmaxState(*(tile.index.put(x, y, axes) for x, y, axes in zip(state, new, _STATE, strict=True)))


def _tangent(plan: BlockwisePlan, perturbed: tuple[int, ...], residuals: Leaves, tangents: Leaves) -> list[jax.Array]:
    """(output', lse') from the tangents of the perturbed leaves."""
    *leaves, output, lse = residuals
    loop = _TileLoop(plan, leaves)

    def body(carry: tuple[jax.Array, jax.Array], tile: Tile) -> tuple[jax.Array, jax.Array]:
        return tangent_of_tile(carry, tile, perturbed, tangents, lse)

    weighted_dot, lse_dot = loop.run(body, (zeros_like_varying(output), zeros_like_varying(lse)), checkpoint=True)
    return tangent_of_rows(output, weighted_dot, lse_dot)


def tangent_of_rows(output: jax.Array, weighted_dot: jax.Array, lse_dot: jax.Array) -> list[jax.Array]:
    """(output', lse') from the sums a and c over all tiles."""
    return [weighted_dot - output * lse_dot[..., None], lse_dot]


def tangent_of_tile(
    carry: tuple[jax.Array, jax.Array], tile: Tile, perturbed: tuple[int, ...], tangents: Leaves, lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(a, c) with the terms of a tile added."""
    axes, form = tile.plan.axes, tile.plan.form
    parts = [tile.index.cut(tangent, axes[n]) for tangent, n in zip(tangents, perturbed, strict=True)]
    terms, values = tile.terms_of(perturbed)
    (logits, value), (logits_dot, value_dot) = jax.jvp(terms, values, parts)
    weights = tile.softmax(logits, tile.cut_rows(lse, _ROWS))
    weighted_dot = weights * logits_dot
    sum_dot = pv_product(form, tile.drop(weighted_dot), value)
    sum_dot += pv_product(form, tile.drop(weights), value_dot)
    return tile.add_rows(carry[0], sum_dot, _OUTPUT), tile.add_rows(carry[1], jnp.sum(weighted_dot, -1), _ROWS)


def _transpose(
    plan: BlockwisePlan, perturbed: tuple[int, ...], residuals: Leaves, cotangents: Leaves
) -> list[jax.Array]:
    """Cotangents of the perturbed leaves from those of (output, lse)."""
    if plan.strategy.kind != "decode" or not set(perturbed) <= set(_OPERANDS):
        return _transpose_tiles(plan, perturbed, residuals, cotangents)
    bound = plan, perturbed, len(residuals)
    return call_with_rule(
        HashablePartial(_transpose_at_once, bound), HashablePartial(_transpose_rule, bound), (*residuals, *cotangents)
    )


def _transpose_at_once(
    plan: BlockwisePlan, perturbed: tuple[int, ...], count: int, *args: jax.Array
) -> list[jax.Array]:
    *leaves, output, lse = args[:count]

    def tiled(arrays: TileArrays) -> list[jax.Array]:
        return _transpose_tiles(plan, _OPERANDS, (*jax.tree.leaves(arrays), output, lse), args[count:])

    arrays = plan.structure.unflatten(leaves)
    cotangents = _decode.transpose(plan, arrays, output, lse, args[count:], tiled)
    return [cotangents[n] for n in perturbed]


def _transpose_rule(
    plan: BlockwisePlan, perturbed: tuple[int, ...], count: int, differentiable: Any, args: Any, tangents: Any
) -> Any:
    """The cotangents, and their tangents by tiles."""

    def tiled(args: Leaves) -> list[jax.Array]:
        return _transpose_tiles(plan, perturbed, args[:count], args[count:])

    _, tangents = jax.jvp(*partial_in(tiled, differentiable, args), list(tangents))
    return _transpose(plan, perturbed, args[:count], args[count:]), tangents


def _transpose_tiles(
    plan: BlockwisePlan, perturbed: tuple[int, ...], residuals: Leaves, cotangents: Leaves
) -> list[jax.Array]:
    *leaves, output, lse = residuals
    plan = plan.of_transpose()
    loop = _TileLoop(plan, leaves)
    masked = any(apply_mask for apply_mask, _ in loop.schedule)
    output_ct, delta = row_cotangents(output, lse, cotangents, masked)

    def body(totals: list[jax.Array], tile: Tile) -> list[jax.Array]:
        return transpose_of_tile(totals, tile, perturbed, output_ct, lse, delta)

    return loop.run(body, [zeros_like_varying(leaves[n]) for n in perturbed], checkpoint=True)


def row_cotangents(output: jax.Array, lse: jax.Array, cotangents: Leaves, masked: bool) -> tuple[jax.Array, jax.Array]:
    """(the cotangent of the output, delta)."""
    output_ct, lse_ct = cotangents
    if masked:
        # A row that attends NaN is NaN. Its cotangent must not be multiplied by the zero weights of masked keys.
        output_ct = jnp.where(jnp.isnan(lse)[..., None], 0, output_ct)
    products = _axes.merge_groups(output) * _axes.merge_groups(output_ct)
    return output_ct, lse_ct - jnp.sum(products, -1).reshape(lse.shape)


def transpose_of_tile(
    totals: list[jax.Array],
    tile: Tile,
    perturbed: tuple[int, ...],
    output_ct: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
) -> list[jax.Array]:
    """The cotangents of the perturbed leaves with the terms of a tile added."""
    axes, form = tile.plan.axes, tile.plan.form
    terms, values = tile.terms_of(perturbed)
    (logits, value), pull = jax.vjp(terms, *values)
    rows_ct, rows_delta = tile.cut_rows(output_ct, _OUTPUT), tile.cut_rows(delta, _ROWS)
    if tile.plan.strategy.kind == "dense":
        weights, row_sum = tile.unnormalized_softmax(logits)
        rows_ct, rows_delta = rows_ct / row_sum[..., None], rows_delta / row_sum
    else:
        weights = tile.softmax(logits, tile.cut_rows(lse, _ROWS))
    value_ct = unbroadcast(pt_o_product(form, tile.drop(weights), rows_ct), value.shape)
    weights_ct = qk_product(form, rows_ct, value)
    logits_ct = weights * (tile.drop(weights_ct) + rows_delta[..., None])
    parts = pull((logits_ct, value_ct))
    return [tile.index.add(total, part, axes[n]) for total, part, n in zip(totals, parts, perturbed, strict=True)]


def _estimate(problem: AttentionProblem, kind: Kind | None) -> Estimate:
    """What the prepared operands and the running sums of all rows take, and the logits and weights of one tile."""
    if problem.query_length == 0 or problem.key_length == 0:
        return Estimate(memory=0, flops=0)
    strategy = plan_blocks(problem, kind)
    tile = strategy.block_sizes
    starts = tile_starts(strategy, problem.mask, problem.query_positions, problem.key_positions)
    tiles = sum(map(len, starts.values())), -(-problem.query_length // tile[0]) * -(-problem.key_length // tile[1])
    numbers = problem.rows * (problem.query.shape[-1] + problem.value.shape[-1] + 2)
    pairs = math.prod((rows_per_query(problem, strategy.kind), *strategy.heads_at_once, *tile))
    numbers += problem.key.size + problem.value.size + 2 * pairs
    if strategy.kind == "decode":
        numbers = _decode.numbers(problem, strategy)
    flops = operations(partial(_run_blocks, strategy=strategy), problem)
    memory = numbers * jnp.dtype(problem.dtype).itemsize
    return Estimate(memory, flops, tile, tiles)
