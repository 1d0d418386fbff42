"""Masks: each kind against a definition in plain loops, the algebra, traced parameters, and masks as pytrees."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NAMES, by_name, unsupported
from conftest import assert_close, assert_same

import attnlib
from attnlib import masks
from attnlib._core.axes import AttentionShape

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def loop(rule, query_shape, key_shape):
    """The mask of a rule on one query position and one key position, each a tuple."""
    array = np.zeros((*query_shape, *key_shape), bool)
    for q, k in itertools.product(np.ndindex(*query_shape), np.ndindex(*key_shape)):
        array[(*q, *k)] = rule(q, k)
    return array


def flat(position, shape):
    index = 0
    for place, size in zip(position, shape, strict=True):
        index = index * size + place
    return index


def draw(*shape, rate=0.5, seed=0):
    return np.random.default_rng(seed).random(shape) < rate


IDS = np.array([1, 1, 2, 0, 2, 3, 0])
QUERY_IDS = np.array([2, 0, 1, 3, 9])
REAL = draw(7)
TABLE = ["1010", "0111", "1001"]

# name: (mask, rule on flat positions), over 5 queries and 7 keys
ONE_AXIS = {
    "causal": (masks.Causal(), lambda q, k: k <= q),
    "causal ahead": (masks.Causal(2), lambda q, k: k <= q + 2),
    "causal behind": (masks.Causal(-1), lambda q, k: k <= q - 1),
    "causal, traced": (masks.Causal(jnp.int32(1)), lambda q, k: k <= q + 1),
    "causal along its only axis": (masks.Causal(axis=-1), lambda q, k: k <= q),
    "window": (masks.SlidingWindow(2, 1), lambda q, k: q - 2 <= k <= q + 1),
    "window of one": (masks.SlidingWindow(0, 0), lambda q, k: k == q),
    "window open on the left": (masks.SlidingWindow(None, 1), lambda q, k: k <= q + 1),
    "window open on the right": (masks.SlidingWindow(1, None), lambda q, k: q - 1 <= k),
    "window open": (masks.SlidingWindow(None, None), lambda q, k: True),
    "blocks": (masks.BlockLocal(3), lambda q, k: k // 3 == q // 3),
    "blocks and neighbours": (masks.BlockLocal(2, 1, 1), lambda q, k: abs(k // 2 - q // 2) <= 1),
    "blocks, causal": (masks.BlockLocal(2, before=None), lambda q, k: k // 2 <= q // 2),
    "blocks, later ones": (masks.BlockLocal(2, after=None), lambda q, k: k // 2 >= q // 2),
    "blocks of one": (masks.BlockLocal(1), lambda q, k: k == q),
    "blocks by a table": (masks.BlockSparse(TABLE, 2), lambda q, k: TABLE[q // 2][k // 2] == "1"),
    "blocks by a bool table": (masks.BlockSparse(draw(2, 3), 3), lambda q, k: draw(2, 3)[q // 3, k // 3]),
    "dilated": (masks.Dilated(3), lambda q, k: (k - q) % 3 == 0),
    "dilated by one": (masks.Dilated(1), lambda q, k: True),
    "prefix": (masks.Prefix(3), lambda q, k: k < 3),
    "prefix of nothing": (masks.Prefix(0), lambda q, k: False),
    "lengths": (masks.Lengths(query=3, key=5), lambda q, k: q < 3 and k < 5),
    "lengths of keys": (masks.Lengths(key=jnp.int32(4)), lambda q, k: k < 4),
    "lengths of nothing": (masks.Lengths(), lambda q, k: True),
    "key padding": (masks.KeyPadding(REAL), lambda q, k: REAL[k]),
    "query padding": (masks.QueryPadding(REAL[:5]), lambda q, k: REAL[q]),
    "segments": (masks.Segments(QUERY_IDS, IDS), lambda q, k: QUERY_IDS[q] == IDS[k]),
    "segments with padding": (masks.Segments(QUERY_IDS, IDS, padding_id=0),
                              lambda q, k: QUERY_IDS[q] == IDS[k] != 0),
    "dense": (masks.Dense(draw(5, 7)), lambda q, k: draw(5, 7)[q, k]),
    "dense, keys alone": (masks.Dense(REAL), lambda q, k: REAL[k]),
    "dense, one": (masks.Dense(np.array(True)), lambda q, k: True),
    "predicate": (masks.Predicate(lambda q, k: (q * k) % 3 == 0), lambda q, k: (q * k) % 3 == 0),
    "predicate of queries": (masks.Predicate(lambda q, k: q > 1), lambda q, k: q > 1),
    "and": (masks.Causal() & masks.KeyPadding(REAL), lambda q, k: k <= q and REAL[k]),
    "or": (masks.Causal() | masks.Prefix(4), lambda q, k: k <= q or k < 4),
    "not": (~masks.Causal(), lambda q, k: not k <= q),
    "three": (masks.Causal(1) & ~(masks.Prefix(2) | masks.SlidingWindow(1, None)),
              lambda q, k: k <= q + 1 and not (k < 2 or q - 1 <= k)),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_AXIS)
def test_definition_over_one_axis(name):
    mask, rule = ONE_AXIS[name]
    array = mask.as_array(5, 7)
    assert array.dtype == jnp.bool_
    np.testing.assert_array_equal(array, loop(lambda q, k: rule(q[0], k[0]), (5,), (7,)))
    np.testing.assert_array_equal(mask.as_array((5,), [7]), array)


def test_segments_of_one_side():
    expected = loop(lambda q, k: IDS[q] == IDS[k], (7,), (7,))
    np.testing.assert_array_equal(masks.Segments(IDS).as_array(7, 7), expected)


@pytest.mark.parametrize("dtypes", [("int8", "int64", "int4"), ("int4", "uint8", "int8"), ("uint32", "int8", "uint4")])
def test_segment_ids_may_be_of_any_integers(dtypes):
    ids, other, padding = (np.asarray(x) for x in ([0, 1, 1, 2], [1, 0, 2], 0))
    expected = masks.Segments(ids, other, padding).as_array(4, 3)
    of_dtypes = (x.astype(jnp.dtype(dtype)) for x, dtype in zip((ids, other, padding), dtypes, strict=True))
    np.testing.assert_array_equal(masks.Segments(*of_dtypes).as_array(4, 3), expected)
    assert expected.sum() == 3


GRID_QUERY, GRID_KEY = (2, 3), (4, 2)
GRID_REAL = draw(4, 2, seed=1)
SEVERAL_AXES = {
    "causal, row-major": (masks.Causal(), lambda q, k: flat(k, GRID_KEY) <= flat(q, GRID_QUERY)),
    "causal along the first": (masks.Causal(axis=0), lambda q, k: k[0] <= q[0]),
    "causal along the last": (masks.Causal(1, axis=-1), lambda q, k: k[1] <= q[1] + 1),
    "window": (masks.SlidingWindow(2, 1),
               lambda q, k: flat(q, GRID_QUERY) - 2 <= flat(k, GRID_KEY) <= flat(q, GRID_QUERY) + 1),
    "boxes": (masks.BlockLocal((1, 2)), lambda q, k: k[0] == q[0] and k[1] // 2 == q[1] // 2),
    "boxes of one size": (masks.BlockLocal(2, before=1),
                          lambda q, k: all(0 <= q[axis] // 2 - k[axis] // 2 <= 1 for axis in (0, 1))),
    "blocks by a table": (masks.BlockSparse(["101", "010"], 3),
                          lambda q, k: (flat(q, GRID_QUERY) // 3 + flat(k, GRID_KEY) // 3) % 2 == 0),
    "dilated": (masks.Dilated((2, 1)), lambda q, k: (k[0] - q[0]) % 2 == 0),
    "dilated along all": (masks.Dilated(2), lambda q, k: (k[0] - q[0]) % 2 == 0 and (k[1] - q[1]) % 2 == 0),
    "lengths": (masks.Lengths(key=5), lambda q, k: flat(k, GRID_KEY) < 5),
    "key padding": (masks.KeyPadding(GRID_REAL), lambda q, k: GRID_REAL[k]),
    "predicate": (masks.Predicate(lambda q, k: (q[0] == k[0]) | (q[1] == k[1])),
                  lambda q, k: q[0] == k[0] or q[1] == k[1]),
    "dense, partly broadcast": (masks.Dense(draw(3, 4, 1, seed=2)), lambda q, k: draw(3, 4, 1, seed=2)[q[1], k[0], 0]),
    "composed": (masks.Causal(axis=1) & ~masks.KeyPadding(GRID_REAL), lambda q, k: k[1] <= q[1] and not GRID_REAL[k]),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL_AXES)
def test_definition_over_several_axes(name):
    mask, rule = SEVERAL_AXES[name]
    np.testing.assert_array_equal(mask.as_array(GRID_QUERY, GRID_KEY), loop(rule, GRID_QUERY, GRID_KEY))


# Neighborhoods


def natten_keys(query, length, size, dilation):
    """The keys of a query by the rule of NATTEN's kernels, `get_window_start`, for an odd size that fits."""
    reach = size // 2
    start = query - reach * dilation
    if start < 0:
        start = query % dilation
    elif query + reach * dilation >= length:
        residue, whole = query % dilation, length // dilation * dilation
        rest = length - whole
        start = length - rest + residue - 2 * reach * dilation if residue < rest else whole + residue - size * dilation
    return {start + step * dilation for step in range(size)}


@pytest.mark.parametrize(("size", "dilation", "length"), [(3, 1, 7), (5, 1, 8), (3, 2, 11), (3, 3, 10), (1, 2, 5)])
def test_neighborhood_is_natten(size, dilation, length):
    array = masks.Neighborhood(size, dilation).as_array(length, length)
    expected = loop(lambda q, k: k[0] in natten_keys(q[0], length, size, dilation), (length,), (length,))
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("border", ["shift", "clip"])
@pytest.mark.parametrize(
    ("size", "dilation", "length"), [(3, 1, 7), (4, 1, 7), (2, 2, 9), (4, 3, 7), (9, 1, 5), (3, 8, 5), (1, 1, 4)]
)
def test_neighborhood_is_a_shifted_or_clipped_window(size, dilation, length, border):
    """Among keys of the query's residue: the window of `size` whose middle is nearest; an even one reaches left."""

    def keys(query):
        group = [k for k in range(length) if k % dilation == query % dilation]
        place = group.index(query)
        if border == "clip":
            return {k for n, k in enumerate(group) if place - size // 2 <= n < place - size // 2 + size}
        windows = [group[n : n + size] for n in range(max(len(group) - size, 0) + 1)]
        return set(min(windows, key=lambda window: abs(group.index(window[0]) + size // 2 - place)))

    array = masks.Neighborhood(size, dilation, border).as_array(length, length)
    np.testing.assert_array_equal(array, loop(lambda q, k: k[0] in keys(q[0]), (length,), (length,)))
    if border == "shift" and dilation == 1:
        assert (array.sum(-1) == min(size, length)).all()


def test_neighborhood_over_several_axes_is_a_product():
    shape = (4, 5, 3)
    array = masks.Neighborhood((3, 2, 2), (1, 2, 1)).as_array(shape, shape)
    along = [masks.Neighborhood(s, d).as_array(n, n) for s, d, n in zip((3, 2, 2), (1, 2, 1), shape, strict=True)]
    expected = loop(lambda q, k: all(a[i, j] for a, i, j in zip(along, q, k, strict=True)), shape, shape)
    np.testing.assert_array_equal(array, expected)


def test_neighborhood_of_other_lengths():
    """Queries beyond the last key see the last window, and every query sees `size` keys."""
    array = masks.Neighborhood(3).as_array(9, 5)
    assert (array.sum(-1) == 3).all()
    assert array[8, 2:].all()


# Blocks by a table


def test_a_table_is_the_same_however_it_is_written():
    tables = [draw(2, 3), jnp.asarray(draw(2, 3)), draw(2, 3).tolist()]
    made = [masks.BlockSparse(table, 4) for table in tables]
    made.append(dataclasses.replace(made[0], size=4))
    assert len({jax.tree.structure(mask) for mask in made}) == 1
    assert jax.tree.leaves(made) == []
    assert jax.tree.structure(made[0]) != jax.tree.structure(masks.BlockSparse(~draw(2, 3), 4))


def test_nothing_attends_beyond_a_table():
    array = masks.BlockSparse(["11", "11"], 2).as_array(5, 6)
    np.testing.assert_array_equal(array, np.pad(np.ones((4, 4), bool), ((0, 1), (0, 2))))


# Per batch


def test_parameters_for_each_batch_entry():
    """Traced, one for each batch index, laid out in front of a head axis of one."""
    offsets, lengths, real, ids = np.array([0, 2, -1]), np.array([3, 0, 7]), draw(3, 7), np.tile(IDS, (3, 1))
    made = jax.jit(lambda mask: mask.as_array(7, 7))(
        (masks.Causal(offsets) & masks.Lengths(key=lengths)) | (masks.KeyPadding(real) & masks.Segments(ids))
    )
    assert made.shape == (3, 1, 7, 7)
    for b in range(3):
        expected = (masks.Causal(int(offsets[b])) & masks.Lengths(key=int(lengths[b]))) | (
            masks.KeyPadding(real[b]) & masks.Segments(IDS)
        )
        np.testing.assert_array_equal(made[b, 0], expected.as_array(7, 7))


def test_two_batch_axes():
    offsets = np.arange(6).reshape(2, 3)
    made = masks.Causal(offsets).as_array(4, 9)
    assert made.shape == (2, 3, 1, 4, 9)
    np.testing.assert_array_equal(made[1, 2, 0], masks.Causal(5).as_array(4, 9))


# Algebra


def test_laws_of_the_algebra():
    a, b, c = masks.Causal(), masks.KeyPadding(draw(3, 7)), masks.Dense(draw(3, 2, 5, 7, seed=3))
    everything, nothing = masks.Dense(np.array([[True]])), masks.Prefix(0)
    equal = [
        (~(a & b), ~a | ~b),
        (~(a | c), ~a & ~c),
        (~~b, b),
        (a & (b | c), (a & b) | (a & c)),
        (a | (b & c), (a | b) & (a | c)),
        ((a & b) & c, a & (b & c)),
        (a & b, b & a),
        (a | (a & b), a),
        (a & everything, a),
        (a | nothing, a),
        (a & ~a, nothing),
        (a | ~a, everything),
    ]
    for left, right in equal:
        np.testing.assert_array_equal(*np.broadcast_arrays(left.as_array(5, 7), right.as_array(5, 7)))


def test_no_truth_value():
    for wrong in (lambda: bool(masks.Causal()), lambda: masks.Causal() or masks.Prefix(1), lambda: not masks.Causal()):
        with pytest.raises(TypeError, match=r"combine masks with `&`, `\|` and `~`"):
            wrong()


# Masks as values


@pytest.mark.parametrize("name", ONE_AXIS)
def test_masks_are_pytrees(name):
    """Arrays are leaves, plain values are structure, and a round trip changes nothing."""
    mask, _ = ONE_AXIS[name]
    leaves, structure = jax.tree.flatten(mask)
    assert all(hasattr(leaf, "shape") for leaf in leaves)
    assert hash(structure) == hash(jax.tree.structure(mask))
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(mask)
    np.testing.assert_array_equal(again.as_array(5, 7), mask.as_array(5, 7))
    np.testing.assert_array_equal(jax.tree.map(jnp.asarray, mask).as_array(5, 7), mask.as_array(5, 7))
    with pytest.raises(AttributeError):  # frozen
        mask.offset = 3


def test_paths_of_leaves_are_readable():
    mask = masks.Causal(jnp.int32(1)) & ~masks.Segments(IDS)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(mask)]
    assert paths == [".left.offset", ".right.mask.query_ids"]


def test_ints_are_static_and_arrays_are_traced():
    assert jax.tree.leaves(masks.Causal(np.int64(3))) == []
    assert len(jax.tree.leaves(masks.Causal(np.array(3)))) == 1
    assert jax.tree.structure(masks.Causal(3)) != jax.tree.structure(masks.Causal(4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: masks.KeyPadding(draw(2, 7)) & masks.Causal(),
        lambda: masks.QueryPadding(draw(2, 5)),
        lambda: masks.Lengths(key=np.array([3, 6])) | masks.SlidingWindow(1, 1),
        lambda: masks.Dense(draw(1, 4, 1, 7)),
        lambda: ~masks.Segments(QUERY_IDS, IDS),
    ],
    ids=["key padding", "query padding", "lengths or window", "dense", "not segments"],
)
@pytest.mark.parametrize("implementation", NAMES)
def test_a_mask_is_its_array(implementation, make, keys):
    """`mask.as_array(...)` can be passed as `mask=`, and gives the same attention."""
    mask = make()
    query, key, value = (keys.normal(*shape) for shape in ((2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 3)))
    reason = unsupported(implementation, query, key, value, mask=mask)
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")
    array = mask.as_array(5, 7)
    masks.Dense(array).check(AttentionShape((2,), 4, (5,), (7,), (3, 3), jnp.float32))
    results = [
        attnlib.dot_product_attention(query, key, value, mask=m, return_lse=True, **by_name(implementation))
        for m in (mask, array)
    ]
    assert_close(*results)


def test_arrays_of_numpy_and_of_jax_are_alike():
    for make in (masks.KeyPadding, masks.QueryPadding, masks.Dense):
        assert_same(make(draw(5)).as_array(5, 5), make(jnp.asarray(draw(5))).as_array(5, 5))
    assert_same(masks.KeyPadding([True, False]).as_array(1, 2), jnp.array([[True, False]]))
    assert_same(masks.Lengths(key=[2, 1]).as_array(1, 2), jnp.array([[[[True, True]]], [[[True, False]]]]))


def test_lengths_of_nothing():
    for mask, _ in ONE_AXIS.values():
        if not jax.tree.leaves(mask):
            assert mask.as_array(0, 3).shape == (0, 3)
            assert mask.as_array(3, 0).shape == (3, 0)
    assert math.prod(masks.Causal().as_array((2, 0), (0, 3)).shape) == 0
