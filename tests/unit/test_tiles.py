"""`classify_tiles` against `evaluate`: an empty tile has no True, a full one no False, and it does find such tiles."""

import jax
import mask_catalogue
import numpy as np
import pytest
from cases import kinds_of_tiles
from fuzzing import Drawing, Sizes, masks_of
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlib import masks
from attnlib._core.tile_kinds import EMPTY, FULL, PARTIAL, TileRanges

LENGTH = 23  # of the longest axis


def leaves(axes):
    """Masks of every kind that knows tiles, over `axes` attention axes; and one that never does."""
    sizes = Sizes((), 1, (LENGTH if axes == 1 else 5,) * axes, (LENGTH if axes == 1 else 5,) * axes)
    drawing = Drawing(sizes, numbers=("static",), concrete=True, far=9, longest=LENGTH)
    rows = [row for row in mask_catalogue.ROWS if row.knows_tiles or row.kind is masks.Predicate]
    return st.one_of([masks_of(row, drawing) for row in rows])


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
    shape = st.tuples(*[st.integers(1, LENGTH if axes == 1 else 5)] * axes)
    return draw(algebra(axes)), draw(shape), draw(shape), (draw(st.integers(1, 9)), draw(st.integers(1, 9)))


def dense_of(mask, query_shape, key_shape):
    """All pairs, from one program: evaluated as it stands, a mask is a program for each of its operations."""
    return np.asarray(jax.jit(lambda: mask.as_array(query_shape, key_shape))())


def blocks(dense, tile):
    """The parts of a dense mask that tiles cover, with their place in the grid."""
    for row, start in enumerate(range(0, dense.shape[0], tile[0])):
        for column, key_start in enumerate(range(0, dense.shape[1], tile[1])):
            yield (row, column), dense[start : start + tile[0], key_start : key_start + tile[1]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_tiles_never_contradict_the_mask(problem):
    mask, query_shape, key_shape, tile = problem
    dense = dense_of(mask, query_shape, key_shape).reshape(np.prod(query_shape), np.prod(key_shape))
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
    [
        *(row.kind(**arguments) for row in mask_catalogue.ROWS for arguments in row.exact),
        masks.Causal() & masks.SlidingWindow(5, None),
        ~masks.Causal(2),
        masks.Causal() | masks.Prefix(9),
    ],
    ids=lambda mask: repr(mask).partition(" at 0x")[0],  # the same in each process
)
def test_tile_is_exact_along_one_axis(mask):
    """For masks along one axis nothing is left to be asked that could be known."""
    dense = dense_of(mask, 32, 32)
    for tile in ((4, 8), (1, 2), (1, 1)):
        kinds = kinds_of_tiles(mask, (32,), (32,), tile)
        for place, block in blocks(dense, tile):
            expected = EMPTY if not block.any() else FULL if block.all() else PARTIAL
            assert kinds[place] == expected, (place, block)


def test_neighborhood_of_an_image_skips_most_tiles():
    kinds = kinds_of_tiles(masks.Neighborhood(7), (64, 64), (64, 64), (256, 256))
    assert (kinds != EMPTY).sum() <= 16 * 5  # four rows of the image a tile: itself and two neighbours on each side


TRACED = [
    (name, row.kind(**arguments))
    for row in mask_catalogue.ROWS
    for name, arguments in row.examples.items()
    if jax.tree.leaves(row.kind(**arguments))
]


@pytest.mark.parametrize("mask", [mask for _, mask in TRACED], ids=[name for name, _ in TRACED])
def test_traced_values_decide_nothing(mask):
    def kinds(mask):
        found.append(kinds_of_tiles(mask, (mask_catalogue.QUERIES,), (mask_catalogue.KEYS,), (2, 2)))

    found = []
    kinds(mask)
    jax.eval_shape(kinds, mask)  # where they have no values
    if not isinstance(mask, masks.Registers):  # whose number is static
        assert (found[0] == PARTIAL).all()
    np.testing.assert_array_equal(*found)


def test_every_kind_that_is_traced_is_tried():
    """A kind of which tiles are known by static values, but not by traced ones, has an example of these."""
    assert {type(mask) for _, mask in TRACED} >= {
        masks.Causal, masks.Lengths, masks.Prefix, masks.KeyPadding, masks.Segments, masks.Dense
    }  # fmt: skip


def test_a_short_last_tile_is_never_full():
    kinds = kinds_of_tiles(None, (10,), (12,), (4, 4))
    np.testing.assert_array_equal(kinds, [[FULL] * 3, [FULL] * 3, [PARTIAL] * 3])
