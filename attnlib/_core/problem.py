"""The one canonical form in which every implementation receives attention, and what an implementation is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from attnlib._core.block_positions import BlockPositions, OperandPositions
from attnlib._core.options import FIELDS, Options
from attnlib._core.pytree import register
from attnlib._core.tile_kinds import EMPTY, tile_kinds

if TYPE_CHECKING:
    from attnlib.masks import Mask
    from attnlib.modifiers._base import LogitModifier
    from attnlib.scores import Score

_STATIC = {"static": True}


@register
@dataclasses.dataclass(frozen=True, eq=False)
class AttentionProblem:
    """Attention with axes folded, arguments checked, defaults resolved. Query head n = k * G + g reads key head k.

    Attributes:
      query: `(*batch, K, G, T, D)`; batch axes may be one where another operand's are larger.
      key: `(*batch, K, S, D)`.
      value: `(*batch, K, S, E)`.
      score: turns blocks of query and key into logits.
      mask: which pairs may attend, or None for all.
      modifiers: applied to the logits after the bias, one after another: the soft cap, the user's score_mod.
      bias: `(*batch | 1, K | 1, G | 1, T | 1, S | 1)`, or None.
      dropout_seeds: the words of `dropout.hash_seeds`, or None for no dropout; with two more words, the heads are some
        of all heads (`dropout.batch_head_index`).
      batch: sizes of the batch axes after broadcasting.
      query_positions, key_positions: the positions of the T queries and of the S keys.
      dtype: of the logits and of the softmax statistics: float32, or float64 if an operand is.
      to_support: names of the options that are set, which an implementation has to support.
      sink: `()` or `(N,)`, or None; `softmax.rescale_rows` adds the sink to the result of an implementation.
      options: those options that nothing above is made of, as they were given; the others have their defaults there.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    score: Score
    modifiers: tuple[LogitModifier, ...]
    mask: Mask | None
    bias: jax.Array | None
    dropout_seeds: jax.Array | None
    query_positions: OperandPositions
    key_positions: OperandPositions
    batch: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    dtype: Any = dataclasses.field(metadata=_STATIC)
    dropout_rate: float = dataclasses.field(metadata=_STATIC)
    return_weights: bool = dataclasses.field(metadata=_STATIC)
    block_sizes: tuple[int, int] | None = dataclasses.field(metadata=_STATIC)
    precision: Any = dataclasses.field(metadata=_STATIC)
    to_support: tuple[str, ...] = dataclasses.field(metadata=_STATIC)
    return_lse: bool = dataclasses.field(default=True, metadata=_STATIC)
    sink: Any = None
    options: Options = dataclasses.field(default_factory=Options)

    @property
    def kv_heads(self) -> int:
        return self.key.shape[-3]

    @property
    def groups(self) -> int:
        return self.query.shape[-3]

    @property
    def query_shape(self) -> tuple[int, ...]:
        return self.query_positions.shape

    @property
    def key_shape(self) -> tuple[int, ...]:
        return self.key_positions.shape

    @property
    def query_length(self) -> int:
        return self.query.shape[-2]

    @property
    def key_length(self) -> int:
        return self.key.shape[-2]

    @property
    def rows(self) -> int:
        """How many softmax rows: one for each batch index, head and query position."""
        return math.prod(self.batch) * self.kv_heads * self.groups * self.query_length

    @property
    def needs_lse(self) -> bool:
        """Whether an implementation has to give the lse."""
        return self.return_lse or self.rescales_rows

    @property
    def rescales_rows(self) -> bool:
        """Whether `softmax.rescale_rows` changes the result of an implementation."""
        return self.sink is not None or not self.options.normalize

    @property
    def heads(self) -> tuple[int, ...]:
        """(*batch, K, G)."""
        return (*self.batch, self.kv_heads, self.groups)

    @property
    def positions(self) -> tuple[BlockPositions, BlockPositions]:
        """All query positions and all key positions."""
        return self.query_positions.block(), self.key_positions.block()

    @property
    def bytes_accessed(self) -> int:
        """Bytes of the arrays that go in and of the results that come out."""
        size = self.value.shape[-1] * self.value.dtype.itemsize
        size += (self.return_lse + self.return_weights * self.key_length) * jnp.dtype(self.dtype).itemsize
        return self.rows * size + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def pairs_computed(self, queries: int, keys: int) -> int:
        """Pairs of a head in the tiles of so many queries and keys that the mask does not empty."""
        kinds, pairs = tile_kinds(self.mask, self.query_positions, self.key_positions, (queries, keys))
        return int(((kinds != EMPTY) * pairs).sum())


class AttentionResult(NamedTuple):
    """What an implementation gives, in the dtype of `AttentionProblem.dtype` and with full batch axes."""

    output: jax.Array  # (*batch, K, G, T, E)
    lse: jax.Array | None  # (*batch, K, G, T); always if asked for
    weights: jax.Array | None  # (*batch, K, G, T, S) if asked for


class Estimate(NamedTuple):
    """What a forward pass of an implementation would need."""

    memory: int  # bytes of temporaries
    flops: int  # operations, as `cost.operations` counts them
    block_sizes: tuple[int, int] | None = None  # (queries, keys) of a tile, where there are tiles
    tiles: tuple[int, int] | None = None  # (tiles computed, all tiles)


@dataclasses.dataclass(frozen=True, repr=False)
class Implementation:
    """A way to compute an `AttentionProblem`.

    Attributes:
      name: what users ask for.
      supports: the options that it computes; any other that is set is refused by name.
      unsupported: the reason why it cannot compute a problem whose options it supports, or None; ask `refusal`.
      run: computes a problem.
      estimate: what `run` would need.
      reasons: for options that it does not support, why, and what to write; the error gives the first one that is set.
    """

    name: str
    supports: frozenset[str]
    unsupported: Callable[[AttentionProblem], str | None]
    run: Callable[[AttentionProblem], AttentionResult]
    estimate: Callable[[AttentionProblem], Estimate]
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

    def refusal(self, problem: AttentionProblem) -> str | None:
        """The reason why it cannot compute a problem, in words for users; None where it can."""
        refused = [name for name in problem.to_support if name not in self.supports]
        for name, reason in self.reasons.items():
            if name in refused:
                return reason
        for name in refused:
            return f"it does not support {name}; leave {name}={FIELDS[name].default!r}"
        return self.unsupported(problem)

    def __repr__(self) -> str:
        return f"<{self.name}>"


# What a user may ask for: one by name or itself, or several to try in order; None: the library chooses.
Asked: TypeAlias = str | Implementation | Sequence[str | Implementation] | None
