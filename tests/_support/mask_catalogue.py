"""Every kind of mask: its definition in NumPy, examples, random arguments, and arguments that it refuses.

A new kind is a new row of ROWS. The tests of masks, tiles, errors, cases, exports and the fuzz tests read the rows.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
from attention_case import GROUPED, SQUARE, VALUES, WHOLE, Case
from hypothesis import strategies as st
from refusals import Wrong, wrong

from attnlib import masks
from attnlib.masks import _base

ABSTRACT = ("Mask", "BlockPositions", "TileRanges")  # what those use who write a mask

# What examples are laid out over.
QUERIES, KEYS = 5, 7
GRID_QUERY, GRID_KEY = (2, 3), (4, 2)


class Pairs:
    """All pairs of a query and a key in NumPy, for definitions: queries are columns `(T, 1)`, keys are rows `(1, S)`.

    Attributes:
      query, key: flat positions in row-major order.
      along: (query position, key position) along each attention axis.
      query_axes, key_axes: lengths of the attention axes.
      batch: the index along each batch axis, against `(*batch, N, T, S)`.
      head: the number of the query head, likewise.
    """

    def __init__(self, query_axes: Sequence[int], key_axes: Sequence[int], batch: Sequence[int] = (1,), heads: int = 1):
        self.query_axes, self.key_axes = tuple(query_axes), tuple(key_axes)
        *self.batch, self.head = (x[..., None, None] for x in np.indices((*batch, heads), sparse=True))
        self.query, self.key = np.arange(math.prod(query_axes))[:, None], np.arange(math.prod(key_axes))[None]
        queries, keys = (np.indices(axes).reshape(len(axes), -1) for axes in (query_axes, key_axes))
        self.along = [(query[:, None], key[None]) for query, key in zip(queries, keys, strict=True)]

    def each(self, value):
        """A number for each attention axis, of one for all or of one for each."""
        return value if isinstance(value, tuple) else (value,) * len(self.key_axes)

    def of_batch(self, value):
        """A whole number `()` or `(*batch,)` against `(*batch, N, T, S)`."""
        value = np.asarray(value).astype(np.int64)
        return value[..., None, None, None] if value.ndim else value

    def of_head(self, value):
        """A whole number `()` or `(N,)` against `(*batch, N, T, S)`."""
        value = np.asarray(value).astype(np.int64)
        return value[:, None, None] if value.ndim else value

    def of_query(self, array):
        """An array `(*batch, *query axes)` against `(*batch, N, T, S)`."""
        return self._of_side(array, self.query_axes, -1)

    def of_key(self, array):
        return self._of_side(array, self.key_axes, -2)

    def of_pair(self, array):
        """An array that broadcasts to `(*batch, N, *query axes, *key axes)`, against `(*batch, N, T, S)`."""
        axes = (*self.query_axes, *self.key_axes)
        lead = array.shape[: max(array.ndim - len(axes), 0)]
        return np.broadcast_to(array, (*lead, *axes)).reshape(*lead, self.query.size, self.key.size)

    def _of_side(self, array, axes, beside):
        array = np.asarray(array)
        lead = array.shape[: array.ndim - len(axes)]
        flat = np.expand_dims(array.reshape(*lead, math.prod(axes)), beside)
        return flat[..., None, :, :] if lead else flat


@dataclasses.dataclass(frozen=True, eq=False)
class MaskKind:
    """What the tests know of a kind of mask.

    Attributes:
      kind: the class.
      attends: the definition: of `Pairs` and the arguments of the class, bools that broadcast to `(*batch, N, T, S)`.
      random: of a `fuzzing.Drawing`, a strategy for each argument, or one for a dictionary of them.
      examples: arguments by name, over 5 queries and 7 keys. Every argument of the first is also replaced by nonsense.
      grid_examples: arguments by name over two attention axes, of 2 x 3 queries and 4 x 2 keys.
      exact: arguments with which every tile is known to be empty, full or mixed, along one axis of 32.
      cases: calls that all implementations run; by default the first example.
      refused_when_made, refused_in_calls: wrong arguments; those of calls are for (2, 5, 4, 8) and (2, 7, 2, 8).
    """

    kind: type[masks.Mask]
    attends: Callable[..., Any]
    random: Callable[[Any], Any]
    examples: dict[str, dict[str, Any]]
    grid_examples: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    exact: Sequence[dict[str, Any]] = ()
    cases: Sequence[Case] | None = None
    refused_when_made: Sequence[Wrong] = ()
    refused_in_calls: Sequence[Wrong] = ()

    @property
    def name(self) -> str:
        return self.kind.__name__

    @property
    def first_example(self) -> dict[str, Any]:
        return next(iter(self.examples.values()))

    @property
    def knows_tiles(self) -> bool:
        return self.kind.classify_tiles is not masks.Mask.classify_tiles

    def all_cases(self) -> Sequence[Case]:
        if self.cases is not None:
            return self.cases
        return [Case(next(iter(self.examples)), **VALUES, mask=lambda draw: self.kind(**self.first_example))]


# Definitions


def causal(pairs, offset=0, axis=None):
    query, key = (pairs.query, pairs.key) if axis is None else pairs.along[axis]
    return key <= query + pairs.of_batch(offset)


def sliding_window(pairs, left, right):
    left, right = (math.inf if side is None else pairs.of_head(side) for side in (left, right))
    return (pairs.query - left <= pairs.key) & (pairs.key <= pairs.query + right)


def neighborhood(pairs, size, dilation=1, border="shift", stride=1):
    near = oracle.neighborhood(pairs.query_axes, pairs.key_axes, size, dilation, border, stride)
    return near.reshape(pairs.query.size, pairs.key.size)


def block_local(pairs, size, before=0, after=0):
    before, after = (math.inf if side is None else side for side in (before, after))
    near = np.bool_(True)
    for (query, key), length in zip(pairs.along, pairs.each(size), strict=True):
        distance = key // length - query // length
        near = near & (-before <= distance) & (distance <= after)
    return near


def block_sparse(pairs, blocks, size):
    table = np.array([[entry in ("1", True) for entry in row] for row in blocks])
    wide = np.repeat(np.repeat(table, size, 0), size, 1)
    attends = np.zeros((max(pairs.query.size, len(wide)), max(pairs.key.size, wide.shape[1])), bool)
    attends[: len(wide), : wide.shape[1]] = wide  # nothing attends beyond the table
    return attends[: pairs.query.size, : pairs.key.size]


def dilated(pairs, step):
    near = np.bool_(True)
    for (query, key), size in zip(pairs.along, pairs.each(step), strict=True):
        near = near & ((key - query) % size == 0)
    return near


def lengths(pairs, query=None, key=None):
    query, key = (math.inf if length is None else pairs.of_batch(length) for length in (query, key))
    return (pairs.query < query) & (pairs.key < key)


def segments(pairs, query_ids, key_ids=None, padding_id=None):
    query, key = (np.asarray(ids).astype(np.int64) for ids in (query_ids, query_ids if key_ids is None else key_ids))
    same = pairs.of_query(query) == pairs.of_key(key)
    return same if padding_id is None else same & (pairs.of_query(query) != np.int64(padding_id))


def registers(pairs, keys, mask=None, *, queries=None, grid=None):
    """The mask over the other positions, with rows and columns of registers before it."""
    counts = keys if queries is None else queries, keys
    later = [max(side.size - count, 0) for side, count in zip((pairs.query, pairs.key), counts, strict=True)]
    if mask is None:
        return np.bool_(True)
    shapes = ([length] if grid is None else pairs_of(grid) for length in later)
    inner = np.asarray(attends(mask if isinstance(mask, masks.Mask) else masks.Dense(mask), Pairs(*shapes)))
    inner = np.broadcast_to(inner, np.broadcast_shapes(inner.shape, later))
    padding = [(0, 0)] * (inner.ndim - 2) + [(pairs.query.size - later[0], 0), (pairs.key.size - later[1], 0)]
    return np.pad(inner, padding, constant_values=True)


def pairs_of(grid):
    return grid if isinstance(grid, tuple) else (grid,)


def predicate(pairs, fn):
    return np.asarray(fn(*(side[0] if len(side) == 1 else side for side in zip(*pairs.along, strict=True))))


def function(pairs, fn):
    def single(indices):
        return indices[0] if len(indices) == 1 else tuple(indices)

    return np.asarray(fn(single(pairs.batch), pairs.head, *map(single, zip(*pairs.along, strict=True))))


# Examples


def draw(*shape, rate=0.5, seed=0):
    return np.random.default_rng(seed).random(shape) < rate


def every_third(query, key):
    query, key = (sum(x) if isinstance(x, tuple) else x for x in (query, key))
    return (query + key) % 3 != 1


def all_pairs(query, key):
    return True


def every_third_of_each(batch, head, query, key):
    batch, query, key = (sum(x) if isinstance(x, tuple) else x for x in (batch, query, key))
    return (query + key + batch + 2 * head) % 3 != 1


def random_function(of):
    """Masks without arrays are also drawn over nothing but positions."""
    functions = [lambda batch, head, query, key: every_third(query, key), lambda *where: True]
    return dict(fn=st.sampled_from(functions if of.concrete else [*functions, every_third_of_each]))


def reach_of_each(draw):
    """A function of one batch axis, 3 heads and one attention axis, which captures arrays, also one of floats."""
    reach, height, table = draw.integers(0, 4, 3), jnp.array([-1.5, 2.5]), draw.bools(5, 7, rate=0.8)
    return lambda batch, head, query, key: (
        table[query, key] & ((abs(query - key) <= reach[head]) | ((height[batch] > 0) & (key < 2)))
    )


IDS = np.array([1, 1, 2, 0, 2, 3, 0])
QUERY_IDS = np.array([2, 0, 1, 3, 9])
REAL = draw(KEYS)
GRID_REAL = draw(*GRID_KEY, seed=1)


def zeros(*shape, dtype=bool):
    return np.zeros(shape, dtype)


def random_neighborhood(of):
    """The stride is at most the size: a size for each axis, from the stride on."""
    small = st.integers(1, 6)

    def more_than(stride):
        size = st.tuples(*[st.integers(s, 7) for s in stride]) if isinstance(stride, tuple) else st.integers(stride, 7)
        return st.fixed_dictionaries(dict(size=size, stride=st.just(stride), dilation=of.each, border=border))

    each = st.sampled_from(("shift", "clip"))
    border = each | st.tuples(*[each] * of.axes)
    return (small | st.tuples(*[small] * of.axes)).flatmap(more_than)


def random_registers(of):
    """Over one axis only; the mask is one of its positions or an array."""
    if of.axes > 1:
        return st.nothing()
    (queries,), (keys,) = of.sizes.query, of.sizes.key

    def with_mask(counts):
        mask = st.none() | st.builds(masks.Causal, st.integers(-of.far, of.far)) | st.builds(
            masks.SlidingWindow, of.reach, of.reach
        )  # fmt: skip
        if counts[0] < queries and counts[1] < keys and not of.concrete:
            later = queries - counts[0], keys - counts[1]
            mask |= st.integers(0, 99).map(lambda seed: masks.Dense(draw(*later, seed=seed)))
        return st.fixed_dictionaries(dict(keys=st.just(counts[1]), queries=st.just(counts[0]), mask=mask))

    return st.tuples(st.integers(0, queries + 1), st.integers(0, keys + 1)).flatmap(with_mask)


def random_segments(of):
    padding = st.sampled_from((None, 0, np.int64(2))) | of.array((), of.integers)
    of_keys = of.of_keys(of.integers)
    return dict(
        query_ids=of.of_queries(of.integers), padding_id=padding,
        key_ids=st.none() | of_keys if of.sizes.query == of.sizes.key else of_keys,
    )  # fmt: skip


ROWS = [
    MaskKind(
        masks.Causal, causal,
        random=lambda of: dict(offset=of.number(-of.far, of.far),
                               axis=st.none() | st.integers(-of.axes, of.axes - 1)),
        examples={
            "causal ahead along its only axis": dict(offset=2, axis=0),
            "causal": {},
            "causal ahead": dict(offset=2),
            "causal behind": dict(offset=-1),
            "causal, traced": dict(offset=jnp.int32(1)),
            "causal along its only axis": dict(axis=-1),
        },
        grid_examples={
            "causal, row-major": {},
            "causal along the first": dict(axis=0),
            "causal along the last": dict(offset=1, axis=-1),
        },
        exact=[{}, dict(offset=3)],
        cases=[
            Case("causal", mask=lambda draw: masks.Causal()),
            Case("is_causal and a mask", **VALUES, mask=lambda draw: draw.bools(2, 1, 5, 7),
                 options=dict(is_causal=True)),
            Case("causal, offset a batch index", **VALUES,
                 mask=lambda draw: masks.Causal(offset=draw.integers(-2, 5, 2))),
            Case("causal, negative offset", **VALUES, mask=lambda draw: masks.Causal(offset=-2)),
        ],
        refused_when_made=[
            wrong("causal offset a float", TypeError, "Causal offset must be an int or an integer array", offset=1.5),
            wrong("causal offset a bool", TypeError, "Causal offset must be an int or an integer array", offset=True),
            wrong("causal offset a string", TypeError, "Causal offset must be an int or an integer array", offset="1"),
            wrong("causal axis a float", TypeError, "Causal axis must be an int or None", axis=0.5),
        ],
        refused_in_calls=[
            wrong("offset of other batch", ValueError, "Causal offset", "(3,)", offset=np.ones(3, int)),
            wrong("causal axis", ValueError, "Causal axis", "1 attention axes", "got 1", axis=1),
        ],
    ),
    MaskKind(
        masks.SlidingWindow, sliding_window,
        random=lambda of: dict(left=of.reach | of.of_heads, right=of.reach | of.of_heads),
        examples={
            "window": dict(left=2, right=1),
            "window of one": dict(left=0, right=0),
            "window open on the left": dict(left=None, right=1),
            "window open on the right": dict(left=1, right=None),
            "window open": dict(left=None, right=None),
            "window, traced": dict(left=jnp.int32(2), right=np.array(1, np.uint8)),
            "window of nothing, traced": dict(left=jnp.int32(-1), right=jnp.int32(0)),
        },
        grid_examples={"window": dict(left=2, right=1)},
        exact=[dict(left=7, right=2)],
        cases=[
            Case("sliding window", **VALUES, mask=lambda draw: masks.SlidingWindow(2, 1)),
            Case("sliding windows a head", **VALUES,
                 mask=lambda draw: masks.SlidingWindow(draw.integers(-1, 4, 3), jnp.array([1, 0, -1]))),
            Case("sliding windows a head, grouped", **GROUPED, **VALUES,
                 mask=lambda draw: masks.SlidingWindow(draw.integers(0, 4, 6), 2)),
            Case("sliding window, one side open", **VALUES, mask=lambda draw: masks.SlidingWindow(None, 1)),
        ],
        refused_when_made=[
            wrong("window negative", ValueError, "SlidingWindow left must be an int >= 0 or None", left=-1, right=0),
            wrong("window an array of floats", TypeError, "SlidingWindow left must be an int or an integer array",
                  left=np.ones(4), right=0),
            wrong("window a float", TypeError, "SlidingWindow right must be an int >= 0 or None", left=1, right=1.5),
        ],
        refused_in_calls=[
            wrong("windows of other heads", ValueError, "each of the 4 query heads", "(3,)", left=np.ones(3, int),
                  right=0),
        ],
    ),
    MaskKind(
        masks.Neighborhood, neighborhood,
        random=random_neighborhood,
        examples={
            "neighborhood, clipped and dilated": dict(size=3, dilation=2, border="clip"),
            "neighborhood": dict(size=3),
            "neighborhood, strided": dict(size=4, stride=3),
            "neighborhood, strided, dilated and clipped": dict(size=3, dilation=2, border="clip", stride=2),
        },
        grid_examples={
            "neighborhood": dict(size=(1, 2)),
            "neighborhood of one size": dict(size=2, border="clip"),
            "neighborhood, borders and strides": dict(size=(3, 2), border=("clip", "shift"), stride=(1, 2)),
        },
        exact=[dict(size=7), dict(size=9, stride=4), dict(size=8, stride=8)],
        cases=[
            Case("neighborhood", **VALUES, **SQUARE, mask=lambda draw: masks.Neighborhood(3)),
            Case("neighborhood, clipped and dilated", **VALUES, **SQUARE,
                 mask=lambda draw: masks.Neighborhood(3, 2, "clip")),
            Case("neighborhood, strided", **VALUES, **SQUARE, mask=lambda draw: masks.Neighborhood(4, stride=3)),
        ],
        refused_when_made=[
            wrong("neighborhood 0", ValueError, "Neighborhood size must be an int >= 1", size=0),
            wrong("neighborhood None", TypeError, "Neighborhood size must be an int", size=None),
            wrong("dilation 0", ValueError, "Neighborhood dilation must be an int >= 1", size=3, dilation=(1, 0)),
            wrong("stride 0", ValueError, "Neighborhood stride must be an int >= 1", size=3, stride=0),
            wrong("stride above size", ValueError, "stride must be at most size", "stride=4 and size=3", size=3,
                  stride=4),
            wrong("stride above one size", ValueError, "at most size", "stride=2 and size=(3, 1)", size=(3, 1),
                  stride=2),
            wrong("borders", ValueError, "one of these for each axis", size=3, border=("shift", "wrap")),
            wrong("no border", ValueError, "one of these for each axis", size=3, border=None),
            wrong("border", ValueError, 'border must be "shift" or "clip"', "got 'wrap'", size=3, border="wrap"),
        ],
        refused_in_calls=[
            wrong("neighborhood sizes", ValueError, "Neighborhood size", "1 attention axes", size=(3, 3)),
            wrong("dilations", ValueError, "Neighborhood dilation", size=3, dilation=(1, 2)),
            wrong("strides", ValueError, "Neighborhood stride", size=3, stride=(1, 2)),
            wrong("borders of axes", ValueError, "Neighborhood border must be a string", "1 attention axes", size=3,
                  border=("clip", "shift")),
        ],
    ),
    MaskKind(
        masks.BlockLocal, block_local,
        random=lambda of: dict(size=of.each, before=of.reach, after=of.reach),
        examples={
            "blocks and neighbours": dict(size=2, before=1, after=1),
            "blocks": dict(size=3),
            "blocks, causal": dict(size=2, before=None),
            "blocks, later ones": dict(size=2, after=None),
            "blocks of one": dict(size=1),
        },
        grid_examples={"boxes": dict(size=(1, 2)), "boxes of one size": dict(size=2, before=1)},
        exact=[dict(size=8), dict(size=5, before=1), dict(size=7, before=None)],
        cases=[Case("block local", **VALUES, mask=lambda draw: masks.BlockLocal(3, before=1))],
        refused_when_made=[
            wrong("block of nothing", ValueError, "BlockLocal size must be an int >= 1", size=0),
            wrong("blocks before", ValueError, "BlockLocal before must be an int >= 0 or None", size=2, before=-1),
            wrong("blocks after", TypeError, "BlockLocal after must be an int >= 0 or None", size=2, after=1.5),
        ],
        refused_in_calls=[
            wrong("block sizes of axes", ValueError, "BlockLocal size", "1 attention axes", size=(3, 3)),
        ],
    ),
    MaskKind(
        masks.BlockSparse, block_sparse,
        random=lambda of: st.integers(1, 4 + of.far // 2).flatmap(
            lambda size: st.fixed_dictionaries(dict(blocks=of.table(size), size=st.just(size)))
        ),
        examples={
            "blocks by a table": dict(blocks=["1010", "0111", "1001"], size=2),
            "blocks by a bool table": dict(blocks=draw(2, 3), size=3),
            "nothing beyond a table": dict(blocks=["11", "11"], size=2),
        },
        grid_examples={"blocks by a table": dict(blocks=["101", "010"], size=3)},
        exact=[
            dict(blocks=["1001000", "0110000", "1111000", "0000111", "0100000", "1100000", "0111001"], size=5)
        ],
        cases=[Case("block sparse", **VALUES, mask=lambda draw: masks.BlockSparse(["101", "011"], 3))],
        refused_when_made=[
            wrong("table of ints", TypeError, "must be a bool array of rank 2", blocks=np.eye(2), size=3),
            wrong("table of one row", TypeError, "must be a bool array of rank 2", blocks=[True], size=3),
            wrong("table of a text", TypeError, "must be a bool array of rank 2", blocks="101", size=3),
            wrong("table of nothing", ValueError, "at least one row and rows of equal length", blocks=[], size=3),
            wrong("table of ragged text", ValueError, "rows of equal length", blocks=["1", "10"], size=3),
            wrong("table of blocks of 0", ValueError, "BlockSparse size must be an int >= 1", blocks=["1"], size=0),
            wrong("table without size", TypeError, "BlockSparse size must be an int", blocks=["1"], size=None),
        ],
        refused_in_calls=[
            wrong("table of other lengths", ValueError, "BlockSparse blocks", "(2, 3)", "got (1, 1)",
                  blocks=["1"], size=3),
        ],
    ),
    MaskKind(
        masks.Dilated, dilated,
        random=lambda of: dict(step=of.each),
        examples={"dilated": dict(step=3), "dilated by one": dict(step=1)},
        grid_examples={"dilated": dict(step=(2, 1)), "dilated along all": dict(step=2)},
        exact=[dict(step=1), dict(step=11), dict(step=16)],
        cases=[Case("dilated", **VALUES, mask=lambda draw: masks.Dilated(2))],
        refused_when_made=[wrong("step 0", ValueError, "Dilated step must be an int >= 1", step=0)],
        refused_in_calls=[wrong("steps of axes", ValueError, "Dilated step", "1 attention axes", step=(1, 2))],
    ),
    MaskKind(
        masks.Prefix, lambda pairs, length: pairs.key < pairs.of_batch(length),
        random=lambda of: dict(length=of.number(-1, of.longest + 2)),
        examples={
            "prefix": dict(length=3), "prefix of nothing": dict(length=0), "prefix, traced": dict(length=jnp.int32(3)),
        },
        exact=[dict(length=19)],
        cases=[
            Case("prefix", **VALUES, mask=lambda draw: masks.Prefix(draw.integers(0, 8, 2))),
            Case("causal or prefix", **VALUES, mask=lambda draw: masks.Causal() | masks.Prefix(3)),
        ],
        refused_in_calls=[wrong("prefix of other batch", ValueError, "Prefix length", "(3,)", length=np.ones(3, int))],
    ),
    MaskKind(
        masks.Lengths, lengths,
        random=lambda of: dict(query=st.none() | of.number(-1, of.longest + 2),
                               key=st.none() | of.number(-1, of.longest + 2)),
        examples={
            "lengths": dict(query=3, key=5),
            "lengths of keys": dict(key=jnp.int32(4)),
            "lengths of nothing": {},
        },
        grid_examples={"lengths": dict(key=5)},
        exact=[dict(query=11, key=29)],
        cases=[
            Case("lengths", mask=lambda draw: masks.Lengths(draw.integers(0, 6, 2), draw.integers(0, 8, 2))),
        ],
        refused_when_made=[
            wrong("lengths of floats", TypeError, "Lengths key must be an int, an integer array", key=np.ones(2)),
            wrong("a length of 41 bits", ValueError, "Lengths query must fit in 32 bits", query=2**40),
        ],
        refused_in_calls=[wrong("lengths of other batch", ValueError, "Lengths key", "(2,)", "(3,)",
                                key=np.ones(3, int))],
    ),
    MaskKind(
        masks.KeyPadding, lambda pairs, mask: pairs.of_key(mask),
        random=lambda of: dict(mask=of.of_keys("bool")),
        examples={"key padding": dict(mask=REAL)},
        grid_examples={"key padding": dict(mask=GRID_REAL)},
        cases=[Case("key padding", mask=lambda draw: masks.KeyPadding(draw.bools(2, 7)))],
        refused_when_made=[
            wrong("padding of ints", TypeError, "KeyPadding mask must be a bool array", mask=np.ones((2, 7), int)),
        ],
        refused_in_calls=[
            wrong("key padding of query length", ValueError, "KeyPadding mask must have shape", "(2, 7) or (7,)",
                  "(2, 5)", mask=zeros(2, 5)),
        ],
    ),
    MaskKind(
        masks.QueryPadding, lambda pairs, mask: pairs.of_query(mask),
        random=lambda of: dict(mask=of.of_queries("bool")),
        examples={"query padding": dict(mask=REAL[:5])},
        cases=[Case("query padding", **VALUES, mask=lambda draw: masks.QueryPadding(draw.bools(2, 5)))],
        refused_when_made=[wrong("padding None", TypeError, "QueryPadding mask must be a bool array", mask=None)],
        refused_in_calls=[
            wrong("query padding of key length", ValueError, "QueryPadding mask", "(2, 5) or (5,)", mask=zeros(2, 7)),
        ],
    ),
    MaskKind(
        masks.Segments, segments,
        random=random_segments,
        examples={
            "segments with padding": dict(query_ids=QUERY_IDS, key_ids=IDS, padding_id=0),
            "segments": dict(query_ids=QUERY_IDS, key_ids=IDS),
        },
        cases=[
            Case("segments", **VALUES, **SQUARE,
                 mask=lambda draw: masks.Segments(draw.integers(0, 3, 2, 7), padding_id=0)),
            Case("segments of two sides", **VALUES,
                 mask=lambda draw: masks.Segments(draw.integers(0, 3, 2, 5), draw.integers(0, 3, 2, 7))),
        ],
        refused_when_made=[
            wrong("segments of floats", TypeError, "Segments query_ids must be an integer array", query_ids=np.ones(5)),
            wrong("two padding ids", ValueError, "Segments padding_id must be one integer; got shape (2,)",
                  query_ids=np.ones(5, int), padding_id=np.zeros(2, int)),
        ],
        refused_in_calls=[
            wrong("segments without key ids", ValueError, "Segments needs key_ids", query_ids=np.ones((2, 5), int)),
            wrong("segments of other length", ValueError, "Segments key_ids", "(2, 6)",
                  query_ids=np.ones((2, 5), int), key_ids=np.ones((2, 6), int)),
        ],
    ),
    MaskKind(
        masks.Registers, registers,
        random=random_registers,
        examples={
            "registers before a window": dict(keys=2, mask=masks.SlidingWindow(1, 0), queries=1, grid=None),
            "registers": dict(keys=3),
            "registers before causal": dict(keys=2, mask=masks.Causal()),
            "keys without queries": dict(keys=3, mask=masks.Causal(), queries=0),
            "queries without keys": dict(keys=0, mask=masks.Causal(-1), queries=2),
            "no register": dict(keys=0, mask=masks.SlidingWindow(1, 1)),
            "registers alone": dict(keys=9, mask=masks.Causal()),
            "registers before padding": dict(keys=1, mask=masks.KeyPadding(REAL[1:]) & masks.Causal(2)),
            "registers before an array": dict(keys=2, mask=draw(4, 5, seed=3), queries=1),
            "registers before ids": dict(keys=2, mask=masks.Segments(QUERY_IDS[2:], IDS[2:])),
            "registers before registers": dict(keys=1, mask=masks.Registers(2, masks.Causal(), queries=0)),
        },
        exact=[dict(keys=3, mask=masks.SlidingWindow(5, 2)), dict(keys=8, mask=masks.Causal(), queries=0)],
        cases=[
            Case("registers before a window", **VALUES,
                 mask=lambda draw: masks.Registers(2, masks.SlidingWindow(1, 0))),
            Case("registers before a grid", **VALUES, **SQUARE,
                 mask=lambda draw: masks.Registers(1, masks.Neighborhood((1, 2)), grid=(2, 3))),
            Case("registers before an array", **VALUES,
                 mask=lambda draw: masks.Registers(2, draw.bools(2, 1, 4, 5), queries=1)),
        ],
        refused_when_made=[
            wrong("registers a float", TypeError, "Registers keys must be an int >= 0", keys=1.5),
            wrong("registers below 0", ValueError, "Registers queries must be an int >= 0", keys=1, queries=-1),
            wrong("registers before numbers", TypeError, "must be a bool array", keys=1, mask=np.ones((4, 6))),
            wrong("registers before a name", TypeError, "mask must be a bool array or a Mask", keys=1, mask="causal"),
            wrong("grid of nothing", ValueError, "Registers grid must be an int >= 1", keys=1, grid=(0, 3)),
        ],
        refused_in_calls=[
            wrong("registers before another grid", ValueError, "need 7 queries and 7 keys", "got 5 and 7", keys=1,
                  grid=(2, 3)),
            wrong("registers before another array", ValueError, "mask must broadcast", keys=1, mask=zeros(5, 7)),
        ],
    ),
    MaskKind(
        masks.Predicate, predicate,
        random=lambda of: dict(fn=st.sampled_from((every_third, all_pairs))),
        examples={
            "predicate": dict(fn=lambda q, k: (q * k) % 3 == 0),
            "predicate of queries": dict(fn=lambda q, k: q > 1),
        },
        grid_examples={"predicate": dict(fn=lambda q, k: (q[0] == k[0]) | (q[1] == k[1]))},
        cases=[Case("predicate", **VALUES, mask=lambda draw: masks.Predicate(lambda q, k: (q + k) % 3 != 1))],
        refused_when_made=[wrong("predicate", TypeError, "Predicate fn must be a function", fn=True)],
        refused_in_calls=[
            wrong("predicate of numbers", TypeError, "Predicate fn must return bool", fn=lambda q, k: q - k),
            wrong("predicate of other shape", ValueError, "Predicate fn must return an array that broadcasts",
                  "(3, 3)", fn=lambda q, k: jnp.ones((3, 3), bool)),
        ],
    ),
    MaskKind(
        masks.Function, function,
        random=random_function,
        examples={
            "function": dict(fn=lambda batch, head, q, k: (q * k) % 3 == 0),
            "function that captures an array": dict(fn=lambda batch, head, q, k: jnp.asarray(REAL)[k] | (q > 2)),
            "function of nothing": dict(fn=lambda *where: True),
        },
        grid_examples={"function": dict(fn=lambda batch, head, q, k: (q[0] == k[0]) | (q[1] == k[1]))},
        exact=[dict(fn=lambda batch, head, q, k: (q - k < 5) & (k - q < 3))],
        cases=[
            Case("function that captures arrays", mask=lambda draw: masks.Function(reach_of_each(draw))),
            Case("function of heads, or a window", **GROUPED, **VALUES,
                 mask=lambda draw: masks.Function(lambda batch, head, q, k: q - k == head - 2) | masks.SlidingWindow(
                     1, 0)),
        ],
        refused_when_made=[
            wrong("function", TypeError, "Function fn must be a function", fn=True),
            wrong("function, a mask", TypeError, "Function fn must be a function", fn=masks.Causal()),
        ],
        refused_in_calls=[
            wrong("function of numbers", TypeError, "Function fn must return bool", "score_mod",
                  fn=lambda batch, head, q, k: q - k),
            wrong("function of arrays", ValueError, "Function fn must return a scalar",
                  fn=lambda batch, head, q, k: jnp.arange(3) < q),
            wrong("function of two", TypeError, "takes 2 positional arguments but 4 were given", fn=lambda q, k: q < k),
        ],
    ),
    MaskKind(
        masks.Dense, lambda pairs, array: pairs.of_pair(array),
        random=lambda of: dict(array=of.of_pairs("bool")),
        examples={
            "dense": dict(array=draw(5, 7)),
            "dense, keys alone": dict(array=REAL),
            "dense, one": dict(array=np.array(True)),
        },
        grid_examples={"dense, partly broadcast": dict(array=draw(3, 4, 1, seed=2))},
        cases=[
            Case("dense, whole", mask=lambda draw: draw.bools(*WHOLE)),
            Case("dense, a key row", **VALUES, mask=lambda draw: draw.bools(7)),
            Case("dense, a query column", **VALUES, mask=lambda draw: draw.bools(5, 1)),
            Case("dense, batch and head", mask=lambda draw: draw.bools(2, 3, 1, 1)),
        ],
        refused_in_calls=[
            wrong("dense of other shape", ValueError, "mask must broadcast", "(5, 6)", "Use 1", array=zeros(5, 6)),
        ],
    ),
]  # fmt: skip
BY_KIND = {row.kind: row for row in ROWS}


def attends(mask: masks.Mask, pairs: Pairs) -> Any:
    """Which pairs a mask admits by the definitions of its parts, as bools that broadcast to `(*batch, N, T, S)`."""
    match mask:
        case _base.And():
            return attends(mask.left, pairs) & attends(mask.right, pairs)
        case _base.Or():
            return attends(mask.left, pairs) | attends(mask.right, pairs)
        case _base.Not():
            return ~attends(mask.mask, pairs)
    fields = {field.name: getattr(mask, field.name) for field in dataclasses.fields(mask)}
    return BY_KIND[type(mask)].attends(pairs, **fields)
