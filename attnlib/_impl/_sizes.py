"""How large tiles are: small enough that the largest array of one stays in cache, and even, so as to pad little."""

from __future__ import annotations

import math

import numpy as np

from attnlib._problem import Problem
from attnlib._tiles import EMPTY, Ranges

# Numbers in the largest array of a tile. Measured on 2 CPU cores: for 8 heads x 64 features, tiles of 256 x 256 (2**19)
# were faster than 128 and 512, forward and training; derivatives of additive scores, which make an array of
# (queries, keys, features), were fastest at 32 x 32 x 128 (2**17).
_NUMBERS, _NUMBERS_WITH_FEATURES = 2**19, 2**17


def tile_sizes(problem: Problem) -> tuple[int, int]:
    """(queries, keys) of a tile: what the user asked for, or what suits the cache."""
    lengths = problem.query_length, problem.key_length
    if problem.block_sizes is not None:
        return min(problem.block_sizes[0], lengths[0]), min(problem.block_sizes[1], lengths[1])
    rows = problem.rows // problem.query_length  # of all batch indices and heads at once
    side = _narrowed(problem, _side(rows, problem.score.prepared_pair_size(problem.query.shape[-1])))
    return _evenly(lengths[0], side), _evenly(lengths[1], side)


def _side(rows: int, pair_size: int) -> int:
    numbers = (_NUMBERS if pair_size == 1 else _NUMBERS_WITH_FEATURES) / max(rows * pair_size, 1)
    return min(max(2 ** round(math.log2(max(numbers, 1)) / 2), 16), 512)


def _narrowed(problem: Problem, side: int) -> int:
    """A smaller side, down to 128, where a static mask (a window, say) then leaves a fifth of the work out."""
    while problem.mask is not None and side >= 256 and _work(problem, side // 2) < 0.8 * _work(problem, side):
        side //= 2
    return side


def _work(problem: Problem, side: int) -> int:
    """Pairs in the tiles that the mask does not empty."""
    assert problem.mask is not None
    query, key = Ranges.of(problem.query_shape, side, "query"), Ranges.of(problem.key_shape, side, "key")
    kinds = np.broadcast_to(problem.mask.tile(query, key), (query.first.size, key.first.size))
    return int((kinds != EMPTY).sum()) * side**2


def _evenly(length: int, side: int) -> int:
    """About a side, a multiple of 8, such that the last tile is not much shorter than the others."""
    count = -(-length // side)
    return min(length, -(-length // (8 * count)) * 8)
