"""The sparse shapes of the literature as named examples of the mask algebra, each against loops over all pairs.

`notebooks/masks.ipynb` draws them. Lengths are odd and blocks are not those of the tiles.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import COMPLETE, like
from conftest import assert_close

import attnlib
from attnlib import masks, positions

LENGTH, TILE, BATCH = 37, 8, 2  # 5 x 5 tiles
GRID = (5, 7)  # two axes, 35 positions, 5 x 5 tiles too
TABLE = np.random.default_rng(0).random((7, 7)) < 0.15  # which blocks of 6 see which, besides the others of BigBird
IDS = np.repeat([[1, 2, 3, 0], [5, 5, 7, 8]], [14, 9, 12, 2], axis=1)
REAL = np.random.default_rng(1).random((BATCH, LENGTH)) < 0.7
LENGTHS = np.array([17, 36])
SCORES = ("dot", "additive")
OPERANDS = {"query": 4, "key": 4, "value": 3}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A mask, the rule on a query and a key position that it shall be, and how many of 25 tiles are computed."""

    mask: masks.Mask
    rule: Callable[..., bool]  # of query and key; or of batch index, query and key; tuples where there are two axes
    tiles: int
    axes: tuple[int, ...] = (LENGTH,)
    exact: bool = True  # no tile without a pair is computed

    @functools.cached_property
    def allowed(self):
        """`(batch or 1, positions, positions)`."""
        places = [place[0] if len(self.axes) == 1 else place for place in np.ndindex(self.axes)]
        if self.rule.__code__.co_argcount == 2:
            return np.array([[[self.rule(q, k) for k in places] for q in places]])
        return np.array([[[self.rule(b, q, k) for k in places] for q in places] for b in range(BATCH)])


def one_of_nearest(place, key, length, size):
    """Whether a key is in the window of an odd size that is nearest to a place on a line."""
    start = min(max(place - size // 2, 0), length - size)
    return key in range(start, start + size)


SHAPES = {
    "prefix LM": Shape(masks.Causal() | masks.Prefix(9), lambda q, k: k <= q or k < 9, 16),
    "block-local": Shape(masks.BlockLocal(6), lambda q, k: q // 6 == k // 6, 11),
    "block-local and one before": Shape(masks.BlockLocal(6, before=1), lambda q, k: q // 6 - k // 6 in (0, 1), 13),
    "causal from block to block": Shape(masks.BlockLocal(6, before=None), lambda q, k: k // 6 <= q // 6, 18),
    "dilated window": Shape(
        masks.SlidingWindow(8, 8) & masks.Dilated(4), lambda q, k: k - q in (-8, -4, 0, 4, 8), 13
    ),
    "strided (Sparse Transformer)": Shape(
        masks.Causal() & (masks.SlidingWindow(6, 0) | masks.Dilated(6)),
        lambda q, k: 0 <= q - k <= 6 or (q > k and (q - k) % 6 == 0), 15
    ),
    "fixed (Sparse Transformer)": Shape(
        masks.Causal() & (masks.BlockLocal(6) | masks.Predicate(lambda q, k: k % 6 >= 4)),
        lambda q, k: k <= q and (k // 6 == q // 6 or k % 6 in (4, 5)), 15
    ),
    "dilated blocks (LongNet)": Shape(
        masks.BlockLocal(12) & masks.Dilated(3), lambda q, k: q // 12 == k // 12 and abs(q - k) in (0, 3, 6, 9), 11
    ),
    "window and global tokens (Longformer)": Shape(
        masks.SlidingWindow(3, 3) | masks.Prefix(2) | masks.Lengths(query=2),
        lambda q, k: abs(q - k) <= 3 or q < 2 or k < 2, 19
    ),
    "BigBird": Shape(
        masks.BlockLocal(6, 1, 1) | masks.Prefix(6) | masks.Lengths(query=6) | masks.BlockSparse(TABLE, 6),
        lambda q, k: abs(q // 6 - k // 6) <= 1 or q < 6 or k < 6 or bool(TABLE[q // 6][k // 6]), 22
    ),
    "random blocks": Shape(masks.BlockSparse(TABLE, 6), lambda q, k: bool(TABLE[q // 6][k // 6]), 10),
    "sinks (StreamingLLM)": Shape(
        masks.Causal() & (masks.SlidingWindow(5, 0) | masks.Prefix(4)),
        lambda q, k: k <= q and (q - k <= 5 or k < 4), 12
    ),
    "checkerboard": Shape(masks.Predicate(lambda q, k: (q + k) % 2 == 0), lambda q, k: (q + k) % 2 == 0, 25),
    "half of the keys": Shape(masks.Lengths(key=20), lambda q, k: k < 20, 15),
    # traced values skip no tile
    "documents": Shape(
        masks.Segments(IDS, padding_id=0), lambda b, q, k: IDS[b, q] == IDS[b, k] and IDS[b, q] != 0, 25, exact=False
    ),
    "padding": Shape(masks.KeyPadding(REAL), lambda b, q, k: bool(REAL[b, k]), 25),
    "lengths": Shape(
        masks.Lengths(LENGTHS, LENGTHS), lambda b, q, k: max(q, k) < LENGTHS[b], 25
    ),
    # two axes; a tile that ends in the middle of a row of the grid is known by whole rows
    "neighborhood": Shape(
        masks.Neighborhood((3, 5)),
        lambda q, k: one_of_nearest(q[0], k[0], 5, 3) and one_of_nearest(q[1], k[1], 7, 5), 20, GRID, exact=False
    ),
    "neighborhood, strided (GNA)": Shape(
        masks.Neighborhood((3, 5), stride=(1, 4)),
        lambda q, k: one_of_nearest(q[0], k[0], 5, 3) and one_of_nearest(min(q[1] // 4 * 4 + 2, 6), k[1], 7, 5),
        20, GRID, exact=False,
    ),
    "own row and own column": Shape(
        masks.BlockLocal((1, 7)) | masks.BlockLocal((5, 1)), lambda q, k: q[0] == k[0] or q[1] == k[1], 25, GRID
    ),
    "windows of an image (Swin)": Shape(
        masks.BlockLocal((2, 3)), lambda q, k: q[0] // 2 == k[0] // 2 and q[1] // 3 == k[1] // 3, 15, GRID, exact=False
    ),
    "causal in time": Shape(masks.Causal(axis=0), lambda q, k: k[0] <= q[0], 19, GRID),
}  # fmt: skip


def operands(axes, keys):
    return {name: keys.normal(BATCH, *axes, 2, size) for name, size in OPERANDS.items()}


def attend(score, query, key, value, **options):
    function = attnlib.dot_product_attention if score == "dot" else attnlib.additive_attention
    return function(query, key, value, **options)


def outputs_of_all_pairs(operands, allowed, scores, xp):
    """Outputs of each score from all pairs at once, written down here."""
    query, key, value = (operands[name].reshape(BATCH, -1, *operands[name].shape[-2:]) for name in OPERANDS)
    every = query[:, :, None], key[:, None]  # (B, T, 1, N, D), (B, 1, S, N, D)
    made = []
    for score in scores:
        dot = score == "dot"
        logits = xp.sum(every[0] * every[1], -1) / xp.float32(2) if dot else xp.sum(xp.tanh(every[0] + every[1]), -1)
        powers = xp.where(allowed[..., None], xp.exp(logits), 0)  # (B, T, S, N); small numbers: no maximum needed
        total = xp.sum(powers, 2)
        output = xp.einsum("btsn,bsne->btne", powers, value) / xp.where(total == 0, 1, total)[..., None]
        made.append(output.reshape(operands["value"].shape))
    return made


@jax.jit
def plain(operands, allowed, cotangents):
    """Outputs and gradients of both scores from all pairs at once."""
    made, pullback = jax.vjp(lambda operands: outputs_of_all_pairs(operands, allowed, SCORES, jnp), operands)
    return made, pullback(cotangents)[0]


def outputs_of(implementation, scores, operands, mask):
    blocks = (TILE, TILE) if implementation == "blockwise" else None
    return [
        attend(score, **operands, mask=mask, implementation=implementation, block_sizes=blocks) for score in scores
    ]  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_attention_over_the_pairs_of_its_rule(name, keys):
    """Outputs of dot products, of all implementations in one program."""
    shape = SHAPES[name]

    @jax.jit
    def run(operands, mask):
        return [outputs_of(implementation, ["dot"], operands, mask) for implementation in COMPLETE]

    given = operands(shape.axes, keys)
    arrays = {each: np.asarray(x) for each, x in given.items()}
    expected = outputs_of_all_pairs(arrays, shape.allowed, ["dot"], np)
    for made in run(given, shape.mask):
        assert_close(made, expected, length=LENGTH)


# A score knows nothing of masks, and a derivative goes through the tiles that the values go through. So additive scores
# and gradients are by default of one shape of each kind: static and composed, empty tiles, traced, traced by key, axes.
DERIVED = ("BigBird", "dilated blocks (LongNet)", "documents", "padding", "neighborhood")


@pytest.mark.parametrize("implementation", COMPLETE)
@pytest.mark.parametrize(
    "name", [name if name in DERIVED else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]
)
def test_gradients_over_the_pairs_of_a_rule(name, implementation, keys):
    """Outputs and gradients of dot and of additive scores."""
    shape = SHAPES[name]

    @jax.jit
    def run(operands, mask, cotangents):
        made, pullback = jax.vjp(lambda operands: outputs_of(implementation, SCORES, operands, mask), operands)
        return made, pullback(cotangents)[0]

    given = operands(shape.axes, keys)
    cotangents = like([given["value"]] * 2, 0)
    expected = plain(given, np.broadcast_to(shape.allowed, (BATCH, *shape.allowed.shape[1:])), cotangents)
    assert_close(run(given, shape.mask, cotangents), expected, length=LENGTH)


@pytest.mark.parametrize("name", SHAPES)
def test_tiles_that_a_shape_skips(name):
    """As many as there are tiles without a pair, where the shape is static and known by tile."""
    shape = SHAPES[name]
    like_all = jax.ShapeDtypeStruct((BATCH, *shape.axes, 2, 4), jnp.float32)
    explained = attnlib.explain(
        like_all, like_all, like_all, mask=shape.mask, implementation="blockwise", block_sizes=(TILE, TILE)
    )
    assert explained.tiles == (shape.tiles, 25)
    starts = range(0, shape.allowed.shape[1], TILE)
    with_pairs = sum(shape.allowed[:, i : i + TILE, j : j + TILE].any() for i in starts for j in starts)
    if shape.exact:
        assert shape.tiles == with_pairs
    else:
        assert shape.tiles > with_pairs, "exact=False is out of date"


def test_a_dilated_window_is_a_clipped_neighborhood():
    window = masks.SlidingWindow(8, 8) & masks.Dilated(4)
    np.testing.assert_array_equal(window.as_array(37, 37), masks.Neighborhood(5, 4, "clip").as_array(37, 37))


# Shapes that are better folded than masked


def test_strided_attention_is_attention_along_an_axis(keys):
    """Steps of 6 from rows of 6: `Dilated(6)` without a mask; joined with a window it is the strided pattern."""
    given = operands((36,), keys)
    rows = {name: x.reshape(BATCH, 6, 6, *x.shape[-2:]) for name, x in given.items()}

    def flat(x):
        return x.reshape(BATCH, 36, *x.shape[3:])

    @jax.jit
    def pairs(given, rows):
        masked = attend("dot", **given, mask=masks.Causal() & masks.Dilated(6))
        folded = flat(attend("dot", **rows, attention_axes=1, is_causal=True)), masked

        near = attend("dot", **given, mask=masks.SlidingWindow(5, 0), return_lse=True)
        output, lse = attend("dot", **rows, attention_axes=1, mask=masks.Causal(-1), return_lse=True)
        far = flat(output), jnp.moveaxis(lse, 1, 3).reshape(BATCH, 2, 36)  # (B, column, N, row) to (B, N, T)
        joined, _ = attnlib.merge_attention(*zip(near, far, strict=True))
        strided = masks.Causal() & (masks.SlidingWindow(6, 0) | masks.Dilated(6))
        return folded, (joined, attend("dot", **given, mask=strided))

    for made, expected in pairs(given, rows):
        assert_close(made, expected, length=36)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_axial_attention_is_masked_attention_step_by_step(score, keys):
    """Attention along some axes is attention over all under a mask of boxes. One after the other is not one softmax."""
    size = (3, 4, 5)
    query, key, value = (keys.normal(BATCH, *size, 2, 4) for _ in range(3))
    in_frame, in_time = masks.BlockLocal((1, 4, 5)), masks.BlockLocal((3, 1, 1))

    def axial(value):
        space = attend(score, query, key, value, attention_axes=(2, 3))
        return attend(score, query, key, space, attention_axes=1)

    def masked(value):
        space = attend(score, query, key, value, mask=in_frame)
        return attend(score, query, key, space, mask=in_time)

    @jax.jit
    def each(value):
        at_once = attend(score, query, key, value, mask=in_frame | in_time)
        return axial(value), masked(value), at_once, attend(score, query, key, value)

    made, expected, *others = map(np.asarray, each(value))
    assert_close(made, expected, length=60)
    for other in others:
        assert np.max(np.abs(made - other)) > 0.1


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_packed_documents_are_the_documents_one_by_one(score, keys):
    """Segments keep them apart, and positions that start anew keep their rotation."""
    lengths = [14, 9, 12]
    packed = operands((LENGTH,), keys)  # two positions of padding at the end
    ids = np.repeat([1, 2, 3, 0], [*lengths, 2])
    place = np.concatenate([np.arange(length) for length in [*lengths, 2]])

    def rotated(query, key, value, place, **options):
        turned = (positions.rotary_embedding(x, place) for x in (query, key))
        return attend(score, *turned, value, **options)

    mask = masks.Causal() & masks.Segments(ids, padding_id=0)
    starts = np.cumsum([0, *lengths])

    @jax.jit
    def each(packed):
        together = rotated(**packed, place=jnp.asarray(place), mask=mask)
        alone = [
            rotated(*(packed[name][:, first:last] for name in OPERANDS), place=None, is_causal=True)
            for first, last in itertools.pairwise(starts)
        ]
        return together, alone, rotated(**packed, place=jnp.arange(LENGTH), mask=mask)

    together, alone, elsewhere = jax.tree.map(np.asarray, each(packed))
    assert_close(together[:, : starts[-1]], np.concatenate(alone, 1), length=LENGTH)
    assert (together[:, starts[-1] :] == 0).all()
    if score == "additive":  # dot products know distances alone, so there the place of a document does not matter
        assert np.max(np.abs(elsewhere - together)) > 0.1


# Strided neighbourhoods, and tiles that attend to tiles


def window_of_natten(length, size, stride, dilation):
    """`(length, length)` bools by NATTEN's rule for a window that fits, with its window_left and window_right."""
    allowed = np.zeros((length, length), bool)
    for index in range(length):
        residue, place = index % dilation, index // dilation
        group = length // dilation + (residue < length % dilation)
        leader = min(place // stride * stride + stride // 2, group - 1)
        left, right = size // 2, size // 2 + size % 2 - 1
        start = max(leader - left, 0) + ((group - leader - right - 1) if leader + right >= group else 0)
        allowed[index, [residue + dilation * (start + n) for n in range(size)]] = True
    return allowed


@pytest.mark.parametrize("length", [7, 12, 13, 24])
def test_every_stride_is_that_of_natten(length):
    """All sizes, strides and dilations whose windows fit."""
    count = 0
    for dilation in (1, 2, 3):
        for size in range(1, length // dilation + 1):
            for stride in range(1, size + 1):
                mask = masks.Neighborhood(size, dilation, stride=stride)
                coordinate = np.arange(length)
                ((_, window),) = mask._along_axes(1)
                start = window.start(coordinate, length)[:, None]
                seen = (coordinate // dilation >= start) & (coordinate // dilation < start + size)
                seen &= coordinate % dilation == coordinate[:, None] % dilation
                assert np.array_equal(seen, window_of_natten(length, size, stride, dilation)), mask
                count += 1
    assert count > 30
    for mask in (masks.Neighborhood(3, 2, stride=2), masks.Neighborhood(2, stride=2)):  # evaluated as it is known
        np.testing.assert_array_equal(
            mask.as_array(length, length), window_of_natten(length, mask.size, mask.stride, mask.dilation)
        )


def tiles_of(array, tile):
    """`(height, width, ...)` as `(rows of tiles, columns of tiles, tile, tile, ...)`."""
    height, width, *rest = array.shape
    return array.reshape(height // tile, tile, width // tile, tile, *rest).swapaxes(1, 2)


@pytest.mark.parametrize("tiles", [2, 3, 5])
def test_sliding_tiles_are_a_neighborhood_of_tiles(tiles):
    """Sliding tile attention (Zhang et al. 2025): a tile attends to the nearest tiles, of an odd or even number."""
    height, width, tile = 6, 5, 3
    mask = masks.Neighborhood((tiles, tiles, tile, tile)).as_array(*[(height, width, tile, tile)] * 2)
    near = [window_of_natten(length, tiles, 1, 1) for length in (height, width)]
    expected = np.einsum("ab,cd->acbd", *near)[:, :, None, None, :, :, None, None]
    np.testing.assert_array_equal(mask, np.broadcast_to(expected, mask.shape))
    # An odd number of tiles is a strided window of positions.
    strided = masks.Neighborhood(tiles * tile, stride=tile).as_array(*[(height * tile, width * tile)] * 2)
    strided = tiles_of(np.asarray(strided), tile)
    strided = np.moveaxis(tiles_of(np.moveaxis(strided, (4, 5), (0, 1)), tile), (0, 1, 2, 3), (4, 5, 6, 7))
    assert np.array_equal(strided, mask) == (tiles % 2 == 1)


def test_sliding_tiles_without_transposes(keys):
    """Attention over tile axes of a reshaped image is attention over its own axes, and skips more tiles."""
    tile, shape = 4, (12, 16)
    query, key, value = (keys.normal(2, *shape, 2, size) for size in OPERANDS.values())
    over_tiles = masks.Neighborhood((3, 3, tile, tile))

    @jax.jit
    def both(query, key, value):
        split = (x.reshape(2, 3, tile, 4, tile, 2, -1) for x in (query, key, value))
        options = dict(implementation="blockwise", block_sizes=(16, 16))
        tiled = attnlib.dot_product_attention(*split, attention_axes=(1, 3, 2, 4), mask=over_tiles, **options)
        own = attnlib.dot_product_attention(query, key, value, mask=masks.Neighborhood(12, stride=tile))
        return tiled.reshape(own.shape), own

    assert_close(*both(query, key, value), length=144)
    operand = jax.ShapeDtypeStruct((1, 24, 24, 1, 4), jnp.float32)
    tiled = jax.ShapeDtypeStruct((1, 6, 4, 6, 4, 1, 4), jnp.float32)
    options = dict(block_sizes=(16, 16), implementation="blockwise")
    rows = attnlib.explain(*[operand] * 3, mask=masks.Neighborhood(12, stride=4), **options).tiles
    blocks = attnlib.explain(
        *[tiled] * 3, mask=masks.Neighborhood((3, 3, 4, 4)), attention_axes=(1, 3, 2, 4), **options
    ).tiles
    assert (rows, blocks) == ((648, 1296), (324, 1296))
