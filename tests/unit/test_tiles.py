"""`Mask.tile` against `Mask.at`: a tile called empty holds no True, one called full no False; and it does see them."""

import jax.numpy as jnp
import numpy as np
import pytest
from cases import kinds_of_tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlib import masks
from attnlib._core.tile_kinds import EMPTY, FULL, PARTIAL, TileRanges

lengths = st.integers(1, 23)
offsets = st.integers(-9, 9)
reaches = st.none() | st.integers(0, 9)
tables = st.integers(1, 6).flatmap(
    lambda columns: st.lists(st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=1, max_size=6)
)


def leaves(axes):
    """Masks of every kind that knows tiles, over `axes` attention axes; and one that never does."""
    sizes = st.integers(1, 6) | st.tuples(*[st.integers(1, 6)] * axes)
    return st.one_of(
        st.builds(masks.Causal, offsets, st.none() | st.integers(0, axes - 1)),
        st.builds(masks.SlidingWindow, reaches, reaches),
        st.builds(masks.Neighborhood, sizes, sizes, st.sampled_from(["shift", "clip"])),
        st.builds(masks.BlockLocal, sizes, reaches, reaches),
        st.builds(masks.BlockSparse, tables, st.integers(1, 9)),
        st.builds(masks.Dilated, sizes),
        st.builds(masks.Prefix, st.integers(0, 25)),
        st.builds(masks.Lengths, st.none() | st.integers(0, 25), st.none() | st.integers(0, 25)),
        st.just(masks.Predicate(lambda q, k: (sum(q) if isinstance(q, tuple) else q) % 3 != 1)),
    )


def algebra(axes):
    return st.recursive(
        leaves(axes),
        lambda inner: st.one_of(
            st.builds(lambda x, y: x & y, inner, inner), st.builds(lambda x, y: x | y, inner, inner),
            st.builds(lambda x: ~x, inner),
        ),
        max_leaves=4,
    )  # fmt: skip


@st.composite
def problems(draw):
    axes = draw(st.integers(1, 3))
    shape = st.tuples(*[st.integers(1, 23 if axes == 1 else 5)] * axes)
    return draw(algebra(axes)), draw(shape), draw(shape), (draw(st.integers(1, 9)), draw(st.integers(1, 9)))


def blocks(dense, tile):
    """The parts of a dense mask that tiles cover, with their place in the grid."""
    for row, start in enumerate(range(0, dense.shape[0], tile[0])):
        for column, key_start in enumerate(range(0, dense.shape[1], tile[1])):
            yield (row, column), dense[start : start + tile[0], key_start : key_start + tile[1]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_tile_never_contradicts_at(problem):
    mask, query_shape, key_shape, tile = problem
    dense = np.asarray(mask.as_array(query_shape, key_shape)).reshape(np.prod(query_shape), np.prod(key_shape))
    query, key = TileRanges.of(query_shape, tile[0], "query"), TileRanges.of(key_shape, tile[1], "key")
    kinds = np.broadcast_to(mask.classify_tiles(query, key), (query.first.size, key.first.size))
    for place, block in blocks(dense, tile):
        assert kinds[place] in (EMPTY, PARTIAL, FULL)
        if kinds[place] == EMPTY:
            assert not block.any(), (place, block)
        if kinds[place] == FULL:
            assert block.all(), (place, block)


@pytest.mark.parametrize(
    "mask",
    [masks.Causal(), masks.Causal(3), masks.SlidingWindow(7, 2), masks.Prefix(19), masks.Lengths(11, 29),
     masks.Neighborhood(7), masks.Causal() & masks.SlidingWindow(5, None), ~masks.Causal(2),
     masks.Causal() | masks.Prefix(9), masks.BlockLocal(8), masks.BlockLocal(5, 1, 0), masks.BlockLocal(7, None),
     masks.BlockSparse(["1001000", "0110000", "1111000", "0000111", "0100000", "1100000", "0111001"], 5),
     masks.Dilated(1), masks.Dilated(11), masks.Dilated(16)],
    ids=repr,
)  # fmt: skip
def test_tile_is_exact_along_one_axis(mask):
    """For masks along one axis nothing is left to be asked that could be known."""
    dense = np.asarray(mask.as_array(32, 32))
    for tile in ((4, 8), (1, 2), (1, 1)):
        kinds = kinds_of_tiles(mask, (32,), (32,), tile)
        for place, block in blocks(dense, tile):
            expected = EMPTY if not block.any() else FULL if block.all() else PARTIAL
            assert kinds[place] == expected, (place, block)


def test_neighborhood_of_an_image_skips_most_tiles():
    kinds = kinds_of_tiles(masks.Neighborhood(7), (64, 64), (64, 64), (256, 256))
    assert (kinds != EMPTY).sum() <= 16 * 5  # four rows of the image a tile: itself and two neighbours on each side


TRACED = [
    masks.Causal(jnp.array(3)),
    masks.Lengths(key=jnp.array([3])),
    masks.Prefix(jnp.array(3)),
    masks.KeyPadding(jnp.ones(32, bool)),
    masks.Segments(jnp.zeros(32, int)),
    masks.Dense(jnp.zeros((32, 32), bool)),
]


@pytest.mark.parametrize("mask", TRACED, ids=lambda mask: type(mask).__name__)
def test_traced_values_decide_nothing(mask):
    assert (kinds_of_tiles(mask, (32,), (32,), (8, 8)) == PARTIAL).all()


def test_a_short_last_tile_is_never_full():
    kinds = kinds_of_tiles(None, (10,), (12,), (4, 4))
    np.testing.assert_array_equal(kinds, [[FULL] * 3, [FULL] * 3, [PARTIAL] * 3])
