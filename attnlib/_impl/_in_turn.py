"""One batch index and one key head after another, so that tiles can be large and a core's cache still holds one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlib._impl._tile import Arrays
from attnlib._mask import Mask, register
from attnlib._positions import Positions
from attnlib._tiles import Kinds, Ranges

Attend = Callable[[Arrays], tuple[jax.Array, jax.Array]]

_CUT = ("query", "key", "value", "bias", "lead")  # the arrays that have batch and head axes


def in_turn(arrays: Arrays, attend: Attend) -> tuple[jax.Array, jax.Array]:
    """`attend(arrays)`, (output, lse), computed from one leading index at a time: batch axes, then key heads.

    `attend` gets arrays without batch axes and with one key head.
    """
    over_heads = arrays.query.ndim == 4
    size = arrays.query.shape[0]
    if over_heads and size == 1:
        return attend(arrays)
    ranks = dict(query=0, key=-1, value=-1, bias=0, lead=0)
    common: dict[str, Any] = {}
    stacked: dict[str, jax.Array] = {}
    for name in _CUT:
        array = getattr(arrays, name)
        if array is None or array.ndim < arrays.query.ndim + ranks[name]:  # pairs alone, the same for all
            common[name] = array
        elif array.shape[0] == size > 1:
            stacked[name] = array
        else:
            common[name] = array if over_heads else array[0]

    def one(index: jax.Array, cut: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        part: Any = common | {name: array[None] if over_heads else array for name, array in cut.items()}
        if arrays.mask is not None:
            rank, groups = arrays.query.ndim - 1, arrays.query.shape[1]
            part["mask"] = OfHeads(arrays.mask, index, groups) if over_heads else OfBatch(arrays.mask, index, rank)
        if not over_heads:
            return in_turn(arrays._replace(**part), attend)
        output, lse = attend(arrays._replace(**part))
        return output[0], lse[0]

    if size == 1:
        output, lse = one(jnp.int32(0), {})
        return output[None], lse[None]
    output, lse = jax.lax.map(lambda part: one(*part), (jnp.arange(size, dtype=jnp.int32), stacked))
    return output, lse


@dataclasses.dataclass(frozen=True, eq=False)
class _Part(Mask):
    """The part of a mask at one leading index."""

    mask: Mask
    index: jax.Array

    def tile(self, query: Ranges, key: Ranges) -> Kinds:
        return self.mask.tile(query, key)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class OfBatch(_Part):
    """A mask at one index of the first batch axis; `rank` is that of blocks `(*batch, N, T, S)`."""

    rank: int

    def at(self, query: Positions, key: Positions) -> jax.Array:
        block = self.mask.at(query, key)
        return _at(block, self.index, 0, 1)[0] if block.ndim == self.rank else block


@register
@dataclasses.dataclass(frozen=True, eq=False)
class OfHeads(_Part):
    """A mask of the query heads that share one key head."""

    groups: int

    def at(self, query: Positions, key: Positions) -> jax.Array:
        block = self.mask.at(query, key)
        return _at(block, self.index * self.groups, -3, self.groups) if block.ndim >= 3 else block


def _at(block: jax.Array, start: Any, axis: int, size: int) -> jax.Array:
    return block if block.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(block, start, size, axis)
