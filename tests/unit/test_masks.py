"""Masks: each kind against its definition, the algebra, traced parameters, and masks as pytrees."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import mask_catalogue
import numpy as np
import pytest
from cases import NAMES, by_name, unsupported
from conftest import assert_close, assert_same
from mask_catalogue import GRID_KEY, GRID_QUERY, GRID_REAL, IDS, KEYS, QUERIES, QUERY_IDS, REAL, Pairs, draw

import attnlib
from attnlib import masks
from attnlib._core.axes import AttentionShape


def loop(rule, query_shape, key_shape):
    """The mask of a rule on one query position and one key position, each a tuple."""
    array = np.zeros((*query_shape, *key_shape), bool)
    for q, k in itertools.product(np.ndindex(*query_shape), np.ndindex(*key_shape)):
        array[(*q, *k)] = rule(q, k)
    return array


# name: (mask, a function of pairs of positions that says which attend)
def examples(of_row):
    return {
        name: (row.kind(**arguments), functools.partial(row.attends, **arguments))
        for row in mask_catalogue.ROWS
        for name, arguments in of_row(row).items()
    }


ONE_AXIS = examples(lambda row: row.examples) | {
    "and": (masks.Causal() & masks.KeyPadding(REAL), lambda at: (at.key <= at.query) & REAL[at.key]),
    "or": (masks.Causal() | masks.Prefix(4), lambda at: (at.key <= at.query) | (at.key < 4)),
    "not": (~masks.Causal(), lambda at: ~(at.key <= at.query)),
    "three": (masks.Causal(1) & ~(masks.Prefix(2) | masks.SlidingWindow(1, None)),
              lambda at: (at.key <= at.query + 1) & ~((at.key < 2) | (at.query - 1 <= at.key))),
}  # fmt: skip


def assert_is_defined(mask, attends, query_axes, key_axes):
    pairs = Pairs(query_axes, key_axes)
    expected = np.broadcast_to(attends(pairs), (pairs.query.size, pairs.key.size)).reshape(*query_axes, *key_axes)
    array = mask.as_array(query_axes, key_axes)
    assert array.dtype == jnp.bool_
    np.testing.assert_array_equal(array, expected)
    return array


@pytest.mark.parametrize("name", ONE_AXIS)
def test_definition_over_one_axis(name):
    mask, attends = ONE_AXIS[name]
    array = assert_is_defined(mask, attends, (QUERIES,), (KEYS,))
    np.testing.assert_array_equal(mask.as_array(5, [7]), array)


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


SEVERAL_AXES = examples(lambda row: row.grid_examples) | {
    "composed": (masks.Causal(axis=1) & ~masks.KeyPadding(GRID_REAL),
                 lambda at: (at.along[1][1] <= at.along[1][0]) & ~GRID_REAL.reshape(-1)[at.key]),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL_AXES)
def test_definition_over_several_axes(name):
    assert_is_defined(*SEVERAL_AXES[name], GRID_QUERY, GRID_KEY)


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
    axes = zip((3, 2, 2), (1, 2, 1), shape, strict=True)
    along = [np.asarray(masks.Neighborhood(s, d).as_array(n, n)) for s, d, n in axes]
    expected = loop(lambda q, k: all(a[i, j] for a, i, j in zip(along, q, k, strict=True)), shape, shape)
    np.testing.assert_array_equal(array, expected)


def test_neighborhood_of_other_lengths():
    """Queries beyond the last key see the last window, and every query sees `size` keys."""
    array = np.asarray(masks.Neighborhood(3).as_array(9, 5))
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
            for sizes in ((0, 3), (3, 0)):
                assert jax.eval_shape(lambda mask=mask, sizes=sizes: mask.as_array(*sizes)).shape == sizes
    assert math.prod(masks.Causal().as_array((2, 0), (0, 3)).shape) == 0
