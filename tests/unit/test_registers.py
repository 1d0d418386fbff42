"""Registers before a grid: arrays of the grid, tiles as long as the grid, explicit positions, caches and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import kinds_of_tiles
from conftest import assert_close

import attnlib
from attnlib import masks
from attnlib._core.tile_kinds import EMPTY, FULL

GRID = (4, 4)
RANDOM = np.random.default_rng(0)
INNER = {
    "neighborhood": masks.Neighborhood((3, 2)),
    "causal along an axis": masks.Causal(axis=0),
    "windows": masks.BlockLocal((2, 4)),
    "an array": masks.Dense(RANDOM.random((*GRID, *GRID)) < 0.5),
    "an array of batch and head": masks.Dense(RANDOM.random((2, 1, *GRID, *GRID)) < 0.5),
    "padding": masks.KeyPadding(RANDOM.random((2, *GRID)) < 0.6) & ~masks.QueryPadding(RANDOM.random(GRID) < 0.3),
    "ids": masks.Segments(RANDOM.integers(0, 3, GRID)),
    "a function": masks.Predicate(lambda query, key: (query[0] + key[1]) % 3 != 0),
}


def expected(mask, queries, keys):
    """The mask of the grid, flattened, with rows and columns of registers before it."""
    array = np.asarray(mask.as_array(GRID, GRID))
    array = array.reshape(*array.shape[:-4], 16, 16)
    padding = [(0, 0)] * (array.ndim - 2) + [(queries, 0), (keys, 0)]
    return np.pad(array, padding, constant_values=True)


@pytest.mark.parametrize("counts", [(0, 0), (1, 1), (0, 3), (3, 2)], ids=str)
@pytest.mark.parametrize("name", INNER)
def test_a_grid_follows_the_registers(name, counts):
    queries, keys = counts
    mask = masks.Registers(keys, INNER[name], queries=queries, grid=GRID)
    allowed = expected(INNER[name], queries, keys)
    np.testing.assert_array_equal(mask.as_array(16 + queries, 16 + keys), allowed)
    for tile in ((16, 16), (3, 5), (1, 2)):
        kinds = kinds_of_tiles(mask, (16 + queries,), (16 + keys,), tile)
        for row, column in np.ndindex(kinds.shape):
            block = allowed[..., row * tile[0] :, column * tile[1] :][..., : tile[0], : tile[1]]
            assert block.any() or kinds[row, column] != FULL
            assert not (block.any() and kinds[row, column] == EMPTY)
            assert block.all() or kinds[row, column] != FULL


@pytest.mark.parametrize("name", INNER)
def test_tiles_as_long_as_the_grid(name, keys):
    """A tile of 16 positions among 19 is no slice of an array over 16."""
    query, key, value = keys.normal(2, 19, 2, 4), keys.normal(2, 18, 2, 4), keys.normal(2, 18, 2, 3)
    mask = masks.Registers(2, INNER[name], queries=3, grid=GRID)

    @jax.jit
    def run(query, key, value, mask):
        return [attnlib.dot_product_attention(query, key, value, mask=each, implementation=how, block_sizes=block)
                for each, how, block in ((mask, "blockwise", (16, 16)), (dense, "reference", None))]  # fmt: skip

    allowed = expected(INNER[name], 3, 2)
    dense = jnp.asarray(allowed)
    assert_close(*run(query, key, value, mask), length=18)


def test_explicit_positions_say_which_are_registers(keys):
    query, key, value = keys.normal(3, 2, 9, 2, 4)
    mask = masks.Registers(2, masks.SlidingWindow(1, 0))
    places = jnp.asarray(np.random.default_rng(1).permutation(9))
    run = jax.jit(lambda *operands, **positions: attnlib.dot_product_attention(*operands, mask=mask, **positions))
    shuffled = run(*(x[:, places] for x in (query, key, value)), query_positions=places, key_positions=places)
    assert_close(shuffled, run(query, key, value)[:, places], length=9)


def test_registers_in_a_cache(keys):
    """The first tokens stay visible beside a causal window, as attention sinks do."""
    query, key, value = keys.normal(3, 2, 9, 2, 4)
    mask = masks.Registers(2, masks.SlidingWindow(2, 0), queries=0)
    cache = attnlib.KVCache.create((2,), 9, 2, 4)
    made = []
    for cut in (slice(0, 5), slice(5, 6), slice(6, 9)):
        output, cache = cache.decode(query[:, cut], key[:, cut], value[:, cut], mask=mask)
        made.append(output)
    whole = attnlib.dot_product_attention(query, key, value, mask=mask, is_causal=True)
    assert_close(jnp.concatenate(made, 1), whole, length=9)


def test_padding_stands_beside_registers(keys):
    """A register sees padding unless a mask around the registers says what is real; NaN behind it stays there."""
    x = np.array(keys.normal(2, 9, 2, 4))
    lengths = jnp.array([9, 6])
    mask = masks.Registers(1, masks.SlidingWindow(2, 2)) & masks.Lengths(lengths, lengths)
    short = attnlib.dot_product_attention(*[x[1:, :6]] * 3, mask=masks.Registers(1, masks.SlidingWindow(2, 2)))
    x[1, 6:] = np.nan
    made = attnlib.dot_product_attention(x, x, x, mask=mask)
    assert_close(made[1:, :6], short, length=9)
    assert not np.any(made[1, 6:])


def test_several_attention_axes_are_refused():
    x = jnp.ones((1, 3, 4, 2, 8))
    with pytest.raises(ValueError, match="Flatten the axes of query, key and value"):
        attnlib.dot_product_attention(x, x, x, mask=masks.Registers(1))
