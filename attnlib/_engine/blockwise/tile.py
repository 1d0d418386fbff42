"""What is static of a tiled computation, where a tile is, and what is computed on one tile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._autodiff.leaves import TreeStructure, partial_in
from attnlib._core import axes as _axes
from attnlib._core.block_positions import BlockPositions
from attnlib._core.problem import AttentionProblem
from attnlib._core.tile_kinds import FULL, PARTIAL, TileRanges
from attnlib._engine import dropout as _dropout
from attnlib._engine import softmax as _softmax
from attnlib._engine.blockwise.plan import BlockwiseStrategy
from attnlib._engine.nonfinite import sanitize
from attnlib.masks._base import Mask
from attnlib.modifiers._base import TracedScoreMod
from attnlib.scores import Score


class TileArrays(NamedTuple):
    """The arrays of a call, prepared by the score: whole, or those of one tile."""

    query: jax.Array  # (*batch, K, G, T, D)
    key: jax.Array  # (*batch, K, S, D)
    value: jax.Array  # (*batch, K, S, E)
    bias: jax.Array | None  # (..., T | 1, S | 1)
    score: Score
    score_mod: TracedScoreMod | None
    mask: Mask | None  # never cut: it answers from positions
    seeds: jax.Array | None


Cut = tuple[int | None, int | None] | None
# Along which axis each array is cut by the query tile and by the key tile; None: along none. What is not named here is
# not cut by batch index and head either.
_CUTS: dict[str, Cut] = {
    "query": (-2, None),
    "key": (None, -2),
    "value": (None, -2),
    "bias": (-2, -1),
}


class TileIndex(NamedTuple):
    """Where a tile is, and whether the mask is to be asked there."""

    lead: tuple[jax.Array, ...]  # index along each batch axis and of the key head; empty: the tile has them all
    query: BlockPositions
    key: BlockPositions
    asked: bool

    def cut(self, array: jax.Array, axes: Cut) -> jax.Array:
        """The tile's part of an array whose axes of queries and keys are these; an axis of one broadcasts and stays."""
        if axes is None:
            return array
        starts, sizes = self._window(array.shape, axes)
        return array if sizes == array.shape else jax.lax.dynamic_slice(array, starts, sizes)

    def put(self, total: jax.Array, part: jax.Array, axes: Cut) -> jax.Array:
        """Replaces the tile's part."""
        if axes is None:
            return part
        starts, sizes = self._window(total.shape, axes)
        return part if sizes == total.shape else jax.lax.dynamic_update_slice(total, part, starts)

    def add(self, total: jax.Array, part: jax.Array, axes: Cut) -> jax.Array:
        """The transpose of `cut`, added to a total."""
        return self.put(total, self.cut(total, axes) + part, axes)

    def cut_mask(self, block: jax.Array, groups: int) -> jax.Array:
        """The tile's part of a block `(*batch, N, T, S)`, of which leading axes may be missing."""
        for n, index in enumerate(self.lead):
            axis = n - len(self.lead) - 2
            size = groups if axis == -3 else 1
            if block.ndim >= -axis and block.shape[axis] > size:
                block = jax.lax.dynamic_slice_in_dim(block, index * size, size, axis)
        return block

    def _window(
        self, shape: tuple[int, ...], axes: tuple[int | None, int | None]
    ) -> tuple[list[jax.Array], tuple[int, ...]]:
        """(starts, sizes) of the tile's part."""
        starts, sizes = [jnp.int32(0)] * len(shape), list(shape)
        if len(shape) >= len(self.lead) + 2:  # else of pairs alone
            for axis, index in enumerate(self.lead):
                if shape[axis] > 1:
                    starts[axis], sizes[axis] = index, 1
        for positions, of in zip((self.query, self.key), axes, strict=True):
            if of is not None and shape[of] not in (1, positions.length):
                starts[of], sizes[of] = jnp.asarray(positions.start, jnp.int32), positions.length
        return starts, tuple(sizes)


@dataclasses.dataclass(frozen=True)
class BlockwisePlan:
    """All that is static of a call; equal plans are equal programs."""

    structure: TreeStructure  # of the arrays
    axes: tuple[Cut, ...]  # how its leaves are cut
    strategy: BlockwiseStrategy
    heads: tuple[int, ...]  # (*batch, K, G)
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    dropout_rate: float
    logits_soft_cap: float | None
    precision: Any

    @classmethod
    def of(cls, problem: AttentionProblem, strategy: BlockwiseStrategy, arrays: TileArrays) -> BlockwisePlan:
        axes = tuple(_CUTS.get(path[0].name) for path, _ in jax.tree_util.tree_leaves_with_path(arrays))
        return cls(
            TreeStructure.of(arrays), axes, strategy, problem.heads, problem.query_shape, problem.key_shape,
            problem.dropout_rate, problem.logits_soft_cap, problem.precision,
        )  # fmt: skip

    @property
    def tile(self) -> tuple[int, int]:
        return self.strategy.block_sizes

    def schedule(self, mask: Mask | None) -> list[tuple[bool, np.ndarray]]:
        """(whether to ask the mask, starts `(tiles, leads + 2)`): the tiles that it fills, then those it may cut."""
        kinds = tile_kinds(mask, self.query_shape, self.key_shape, self.tile)
        looped = self.strategy.kind == "loop_over_heads"
        leads = np.argwhere(np.ones(self.heads[:-1])) if looped else np.zeros((1, 0), int)
        runs = []
        for kind in (FULL, PARTIAL):
            tiles = np.argwhere(kinds == kind) * np.array(self.tile)
            starts = np.hstack([np.repeat(leads, len(tiles), 0), np.tile(tiles, (len(leads), 1))])
            runs.append((kind == PARTIAL, starts.astype(np.int32)))
        return [(asked, starts) for asked, starts in runs if len(starts)]

    def place(self, start: jax.Array, asked: bool) -> TileIndex:
        *lead, query_start, key_start = start
        query = BlockPositions(self.query_shape, "query", query_start, self.tile[0])
        return TileIndex(tuple(lead), query, BlockPositions(self.key_shape, "key", key_start, self.tile[1]), asked)

    def everywhere(self, asked: bool) -> TileIndex:
        return TileIndex((), BlockPositions(self.query_shape, "query"), BlockPositions(self.key_shape, "key"), asked)

    def tile_at(self, at: TileIndex, leaves: Sequence[Any]) -> Tile:
        """The tile there, of the leaves of the whole."""
        own = [at.cut(leaf, axes) for leaf, axes in zip(leaves, self.axes, strict=True)]
        return Tile(self, self.structure.unflatten(own), at)


def tile_kinds(
    mask: Mask | None, query_shape: tuple[int, ...], key_shape: tuple[int, ...], tile: tuple[int, int]
) -> np.ndarray:
    """EMPTY, PARTIAL or FULL for each tile `(query tiles, key tiles)`; one reaching beyond the end is never FULL."""
    query, key = TileRanges.of(query_shape, tile[0], "query"), TileRanges.of(key_shape, tile[1], "key")
    kinds = np.full((query.first.size, key.first.size), FULL)
    if mask is not None:
        kinds = np.minimum(kinds, mask.classify_tiles(query, key))
    short = (query.last - query.first + 1 < tile[0]) | (key.last - key.first + 1 < tile[1])
    return np.where(short, np.minimum(kinds, PARTIAL), kinds)


class Tile:
    """One tile: its arrays, and what is computed of them."""

    def __init__(self, plan: BlockwisePlan, arrays: TileArrays, at: TileIndex):
        self.plan, self.arrays, self.at = plan, arrays, at

    def terms(self) -> tuple[jax.Array, jax.Array]:
        """(logits, values); what the mask leaves out is -inf, and cannot matter, NaN or not."""
        query, key, value, bias, score, score_mod, *_ = self.arrays
        if self.at.asked:
            query, key, value, bad_queries, bad_keys = sanitize(query, key, value)
        logits = score.block(query, key, self.plan.precision)
        if bias is not None:
            logits = logits + bias
        if self.plan.logits_soft_cap is not None:
            if self.at.asked:
                logits = jnp.where(self.mask, logits, 0)  # a masked bias may be NaN, and so the cap's derivative
            logits = self.plan.logits_soft_cap * jnp.tanh(logits / self.plan.logits_soft_cap)
        if score_mod is not None:
            if self.at.asked:
                logits = jnp.where(self.mask, logits, 0)
            cut = partial(self.at.cut, axes=(None, None))
            logits = score_mod.apply(logits, self.plan.heads, self.at.query, self.at.key, cut)
        if self.at.asked:
            poison = bad_queries[..., None] | bad_keys[..., None, None, :]
            logits = jnp.where(self.mask, jnp.where(poison, jnp.nan, logits), -jnp.inf)
        return logits, value

    def terms_of(
        self, perturbed: tuple[int, ...]
    ) -> tuple[Callable[..., tuple[jax.Array, jax.Array]], list[jax.Array]]:
        """(`terms` as a function of the active leaves, their values)."""

        def terms(leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
            return Tile(self.plan, self.plan.structure.unflatten(leaves), self.at).terms()

        return partial_in(terms, perturbed, jax.tree.leaves(self.arrays))

    @cached_property
    def mask(self) -> jax.Array:
        query, key = self.at.query, self.at.key
        inside = jnp.ones((1, 1), bool)
        if query.total % query.length or key.total % key.length:  # the last tiles reach beyond the end
            inside = (query.array_index < query.total) & (key.array_index < key.total)
        if self.arrays.mask is None:
            return inside
        kv_heads, groups = self.arrays.query.shape[-4:-2]
        block = self.at.cut_mask(self.arrays.mask.evaluate(query, key), groups)
        return inside & _axes.split_heads(block, kv_heads)

    def softmax(self, logits: jax.Array, lse: jax.Array) -> jax.Array:
        weights = jnp.exp(logits - _softmax.finite_max(lse)[..., None])
        # A row that attends NaN is NaN, but not where it does not attend.
        return jnp.where(logits == -jnp.inf, 0, weights) if self.at.asked else weights

    @cached_property
    def keep(self) -> jax.Array:
        assert self.arrays.seeds is not None
        lead = self.at.cut(_dropout.batch_head_index(self.plan.heads[:-2], *self.plan.heads[-2:]), (None, None))
        query, key = self.at.query.array_index, self.at.key.array_index
        return _dropout.keep_mask(self.arrays.seeds, self.plan.dropout_rate, lead, query, key)

    def drop(self, weights: jax.Array) -> jax.Array:
        """Weights after dropout; linear."""
        if self.arrays.seeds is None:
            return weights
        return jnp.where(self.keep, weights / (1 - self.plan.dropout_rate), 0)
