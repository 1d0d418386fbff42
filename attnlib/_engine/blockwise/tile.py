"""The static plan of a tiled computation, the index of a tile, and what is computed on one tile."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._autodiff.exponential import exp
from attnlib._autodiff.leaves import TreeStructure, partial_in
from attnlib._autodiff.matmul import Form, pv_product, qk_product
from attnlib._core import axes as _axes
from attnlib._core.block_positions import OperandPositions
from attnlib._core.nan_where import nan_where
from attnlib._core.problem import AttentionProblem
from attnlib._core.tile_kinds import PARTIAL
from attnlib._engine import dropout as _dropout
from attnlib._engine import softmax as _softmax
from attnlib._engine.blockwise.plan import PAIRS_OF_TRANSPOSE, BlockwiseStrategy, heads_at_once, tile_starts
from attnlib._engine.nonfinite import sanitize
from attnlib._engine.softmax import SoftmaxState
from attnlib.masks._base import Mask
from attnlib.modifiers._base import LogitModifier
from attnlib.scores import Score


class TileArrays(NamedTuple):
    """The arrays of a call, prepared by the score and padded to whole tiles, or those of one tile."""

    query: jax.Array  # (*batch, K, G, T, D)
    key: jax.Array  # (*batch, K, S, D)
    value: jax.Array  # (*batch, K, S, E)
    bias: jax.Array | None  # (*batch | 1, K | 1, G | 1, T | 1, S | 1)
    # Never sliced: these are evaluated at the tile's positions.
    score: Score
    modifiers: tuple[LogitModifier, ...]
    mask: Mask | None
    dropout_seeds: jax.Array | None
    query_positions: OperandPositions
    key_positions: OperandPositions


Axes = tuple[int | None, int | None] | None
RowAxes = tuple[int, None]  # of an array of rows
# The axis of queries and the axis of keys along which a tile is cut from each array; None: it is not cut.
_AXES: dict[str, Axes] = {
    "query": (-2, None),
    "key": (None, -2),
    "value": (None, -2),
    "bias": (-2, -1),
}


class TileIndex(NamedTuple):
    """Where a tile lies in the arrays, and whether the mask has to be applied to it."""

    batch_and_head: tuple[jax.Array, ...]  # first index along each batch axis and of key heads; empty: all of them
    starts: tuple[int | jax.Array, int | jax.Array]  # of queries and of keys
    sizes: tuple[int, int]
    apply_mask: bool
    heads_at_once: tuple[int, ...] = ()  # how many indices along each batch axis and of key heads

    def cut(self, array: jax.Array, axes: Axes) -> jax.Array:
        """The tile's part of an array with these axes of queries and keys; an axis of one broadcasts and stays."""
        if axes is None:
            return array
        starts, sizes = self._window(array.shape, axes)
        if sizes == array.shape:
            return array
        return jax.lax.dynamic_slice(array, starts, sizes, allow_negative_indices=False)

    def put(self, array: jax.Array, part: jax.Array, axes: Axes) -> jax.Array:
        """The array with the tile's part replaced."""
        if axes is None:
            return part
        starts, sizes = self._window(array.shape, axes)
        if sizes == array.shape:
            return part
        return jax.lax.dynamic_update_slice(array, part, starts, allow_negative_indices=False)

    def add(self, total: jax.Array, part: jax.Array, axes: Axes) -> jax.Array:
        """The transpose of `cut`, added to a total."""
        return self.put(total, self.cut(total, axes) + part, axes)

    def cut_mask(self, block: jax.Array, groups: int) -> jax.Array:
        """The part of the tile's batch indices and head in a block `(*batch, N, T, S)` or in its last axes."""
        for n, (index, size) in enumerate(zip(self.batch_and_head, self.heads_at_once, strict=True)):
            axis = n - len(self.batch_and_head) - 2
            heads = groups if axis == -3 else 1
            if block.ndim >= -axis and block.shape[axis] > heads * size:
                block = jax.lax.dynamic_slice_in_dim(
                    block, index * heads, size * heads, axis, allow_negative_indices=False
                )
        return block

    def _window(
        self, shape: tuple[int, ...], axes: tuple[int | None, int | None]
    ) -> tuple[list[jax.Array], tuple[int, ...]]:
        """(starts, sizes) of the tile's part."""
        starts, sizes = [jnp.int32(0)] * len(shape), list(shape)
        for axis, (index, count) in enumerate(zip(self.batch_and_head, self.heads_at_once, strict=True)):
            if shape[axis] > 1:
                starts[axis], sizes[axis] = index, count
        for start, size, side in zip(self.starts, self.sizes, axes, strict=True):
            if side is not None and shape[side] not in (1, size):
                starts[side], sizes[side] = jnp.asarray(start, jnp.int32), size
        return starts, tuple(sizes)


@dataclasses.dataclass(frozen=True)
class BlockwisePlan:
    """The static part of a call: equal plans are equal programs."""

    structure: TreeStructure  # of the `TileArrays`
    axes: tuple[Axes, ...]  # of their leaves
    strategy: BlockwiseStrategy
    heads: tuple[int, ...]  # (*batch, K, G)
    dropout_rate: float
    precision: Any
    pairs_by_keys: bool = False  # whether the pairs of a tile lie in memory by keys; see `_autodiff/matmul.py`

    @classmethod
    def of(cls, problem: AttentionProblem, strategy: BlockwiseStrategy, arrays: TileArrays) -> BlockwisePlan:
        axes = tuple(_AXES.get(path[0].name) for path, _ in jax.tree_util.tree_leaves_with_path(arrays))
        structure = TreeStructure.of(arrays)
        return cls(structure, axes, strategy, problem.heads, problem.dropout_rate, problem.precision)

    @property
    def block_sizes(self) -> tuple[int, int]:
        return self.strategy.block_sizes

    @property
    def form(self) -> Form:
        return Form(self.precision, self.pairs_by_keys)

    def of_transpose(self) -> BlockwisePlan:
        """The plan of the transpose loop, which has more arrays of pairs than the forward pass, and so fewer heads."""
        strategy = self.strategy
        if math.prod(strategy.heads_at_once) > 1:
            fewer = heads_at_once(self.heads, strategy.block_sizes, PAIRS_OF_TRANSPOSE)
            strategy = dataclasses.replace(strategy, heads_at_once=fewer)
        by_keys = strategy.kind != "dense" and jax.default_backend() == "cpu"
        return dataclasses.replace(self, strategy=strategy, pairs_by_keys=by_keys)

    def has_all_keys(self, arrays: TileArrays) -> bool:
        """Whether the softmax of a tile's rows is that of the tile, so that it has no earlier state."""
        return self.strategy.has_key_spans or self.block_sizes[1] >= arrays.key_positions.length

    def schedule(self, arrays: TileArrays) -> list[tuple[bool, np.ndarray]]:
        """Up to two lists of tiles: (False, those without a mask), (True, those to apply the mask to).

        A list has a row for each tile: the first indices along the batch axes and of key heads, if tiles do not have
        all of them, the first query and the first key. Tiles that the mask empties are left out.
        """
        batch_and_head = np.zeros((1, 0), int)
        if self.strategy.kind == "loop_over_heads":
            at_once = np.array(self.strategy.heads_at_once)
            batch_and_head = np.argwhere(np.ones(self.heads[:-1] // at_once)) * at_once
        lists = []
        for kind, tiles in tile_starts(
            self.strategy, arrays.mask, arrays.query_positions, arrays.key_positions
        ).items():
            rows = [np.repeat(batch_and_head, len(tiles), 0), np.tile(tiles, (len(batch_and_head), 1))]
            lists.append((kind == PARTIAL, np.hstack(rows).astype(np.int32)))
        return [(apply_mask, rows) for apply_mask, rows in lists if len(rows)]

    def index(self, row: Iterable[Any], apply_mask: bool) -> TileIndex:
        """The index of the tile in a row of the schedule."""
        *batch_and_head, query_start, key_start = row
        starts, at_once = (query_start, key_start), self.strategy.heads_at_once
        return TileIndex(tuple(batch_and_head), starts, self.block_sizes, apply_mask, at_once)

    def tile(self, index: TileIndex, leaves: Sequence[Any]) -> Tile:
        """The tile of the arrays with these leaves."""
        parts = [index.cut(leaf, axes) for leaf, axes in zip(leaves, self.axes, strict=True)]
        return Tile(self, self.structure.unflatten(parts), index)


def whole(arrays: TileArrays, apply_mask: bool) -> TileIndex:
    """The index of one tile of all queries and all keys."""
    return TileIndex((), (0, 0), (arrays.query_positions.length, arrays.key_positions.length), apply_mask)


class Tile:
    """One tile: its arrays, and what is computed of them."""

    def __init__(self, plan: BlockwisePlan, arrays: TileArrays, index: TileIndex):
        self.plan, self.arrays, self.index = plan, arrays, index
        sides = zip((arrays.query_positions, arrays.key_positions), index.starts, index.sizes, strict=True)
        self.query_positions, self.key_positions = (side.block(start, size) for side, start, size in sides)

    def terms(self) -> tuple[jax.Array, jax.Array]:
        """(logits of rows, values). Masked logits are -inf; masked content cannot matter, NaN or not."""
        query, key, value, bias, score, modifiers, *_ = self.arrays
        if self.index.apply_mask:
            query, key, value, bad_queries, bad_keys = sanitize(query, key, value)
        if score.is_inner_product:
            logits = qk_product(self.plan.form, _axes.merge_groups(query), key)
        else:
            logits = _axes.merge_groups(score.block(query, key, self.plan.precision))
        keeps_groups = bool(modifiers) or query.shape[-3] != 1

        def fit(pairs: jax.Array) -> jax.Array:
            """What meets the logits: with one group, rows are queries, so that it loses the axis of groups."""
            return pairs if keeps_groups else jnp.squeeze(pairs, -3)

        logits = self.split_rows(logits) if keeps_groups else logits
        if bias is not None:
            logits = logits + fit(bias)
        for modifier in modifiers:
            if self.index.apply_mask:
                logits = jnp.where(self.mask, logits, 0)  # a masked bias may be NaN, and so the modifier's derivative
            cut = partial(self.index.cut, axes=(None, None))
            logits = modifier.apply(logits, self.plan.heads, self.query_positions, self.key_positions, cut)
        if self.index.apply_mask:
            non_finite = fit(bad_queries[..., None] | bad_keys[..., None, None, :])
            logits = jnp.where(fit(self.mask), nan_where(non_finite, logits), -jnp.inf)
        return (_axes.merge_groups(logits) if keeps_groups else logits), value

    def terms_of(
        self, perturbed: tuple[int, ...]
    ) -> tuple[Callable[..., tuple[jax.Array, jax.Array]], list[jax.Array]]:
        """(`terms` as a function of the perturbed leaves, the values of these leaves)."""

        def terms(leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
            return Tile(self.plan, self.plan.structure.unflatten(leaves), self.index).terms()

        return partial_in(terms, perturbed, jax.tree.leaves(self.arrays))

    @cached_property
    def mask(self) -> jax.Array:
        query, key = self.arrays.query_positions, self.arrays.key_positions
        rank = self.arrays.query.ndim
        mask = jnp.ones((1,) * rank, bool)
        keys_have_padding = key.length % self.index.sizes[1] and not self.plan.strategy.has_key_spans
        if query.length % self.index.sizes[0] or keys_have_padding:
            mask = _axes.split_heads(query.contains(self.query_positions) & key.contains(self.key_positions), 1, rank)
        if self.arrays.mask is None:
            return mask
        kv_heads, groups = self.arrays.query.shape[-4:-2]
        cut = partial(self.index.cut_mask, groups=groups)
        block = self.arrays.mask.evaluate_heads(self.query_positions, self.key_positions, cut)
        return mask & _axes.split_heads(block, kv_heads, rank)

    # What is computed of logits has rows, R = G * T. With an axis of one group, the XLA of jax 0.10 takes up to three
    # times as long for a product and a sum in one operation (on a CPU).

    def cut_rows(self, array: jax.Array, axes: RowAxes) -> jax.Array:
        """The tile's rows of an array, or of its part for the tile: (..., G, queries, ...) -> (..., R, ...)."""
        return _axes.merge_groups(self.index.cut(array, axes), axes[0])

    def put_rows(self, array: jax.Array, rows: jax.Array, axes: RowAxes) -> jax.Array:
        """The array with the tile's rows replaced."""
        return self.index.put(array, self.split_rows(rows, axes[0]), axes)

    def add_rows(self, total: jax.Array, rows: jax.Array, axes: RowAxes) -> jax.Array:
        """The transpose of `cut_rows`, added to a total."""
        return self.index.add(total, self.split_rows(rows, axes[0]), axes)

    def split_rows(self, rows: jax.Array, axis: int = -2) -> jax.Array:
        """(..., R, ...) -> (..., G, T, ...), where `axis` is that of the rows."""
        return _axes.split_groups(rows, self.arrays.query.shape[-3:-1], axis)

    def softmax(self, logits: jax.Array, lse: jax.Array) -> jax.Array:
        weights = exp(logits - _softmax.finite_max(lse)[..., None])
        # A row that attends NaN is NaN, but not where it does not attend.
        return jnp.where(logits == -jnp.inf, 0, weights) if self.index.apply_mask else weights

    def state(self) -> SoftmaxState:
        """The state of the tile's rows after its keys alone."""
        logits, value = self.terms()
        row_max, weights = _unnormalized(logits)
        return SoftmaxState(row_max, jnp.sum(weights, -1), pv_product(self.plan.form, self.drop(weights), value))

    def result(self) -> tuple[jax.Array, jax.Array]:
        """(output, lse) of the tile's rows, if the tile has all their keys.

        XLA computes a batch of small products on one core, unless one operation also sums the weights (on a CPU). So
        the division by this sum stays beside the product.
        """
        return _softmax.normalize(self.state())

    def unnormalized_softmax(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(weights before the division by their sum, what to divide by) of a tile that has all keys."""
        _, weights = _unnormalized(logits)
        # Without the barrier XLA would take the sum from `result`, and compute it apart from the product there.
        row_sum = _softmax.divisor(jnp.sum(jax.lax.optimization_barrier(weights), -1))
        if self.index.apply_mask:
            # A row that attends NaN is NaN, but not where it does not attend, and its cotangent stays finite.
            weights, row_sum = jnp.where(logits == -jnp.inf, 0, weights), jnp.where(jnp.isnan(row_sum), 1, row_sum)
        return weights, row_sum

    @cached_property
    def keep(self) -> jax.Array:
        """Which weights dropout keeps."""
        seeds = self.arrays.dropout_seeds
        assert seeds is not None
        *batch, kv_heads, groups = self.plan.heads
        heads = _dropout.batch_head_index(tuple(batch), kv_heads, groups, seeds)
        heads = self.index.cut(heads, (None, None))
        query, key = self.query_positions.array_index, self.key_positions.array_index
        return _dropout.keep_mask(seeds, self.plan.dropout_rate, heads, query, key)

    def drop(self, weights: jax.Array) -> jax.Array:
        """The weights after dropout; linear."""
        if self.arrays.dropout_seeds is None:
            return weights
        return jnp.where(self.keep.reshape(weights.shape), weights / (1 - self.plan.dropout_rate), 0)


def _unnormalized(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the maximum of each row, exp(logits - maximum)). Any maximum gives the same softmax, so it has no derivative."""
    row_max = jax.lax.stop_gradient(_softmax.finite_row_max(logits))
    return row_max, exp(logits - row_max[..., None])
