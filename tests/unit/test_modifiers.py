"""Modifiers, sinks and explicit positions against formulas of their own: dense biases and masks made in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import modifier_catalogue
import numpy as np
import oracle
import pytest
from cases import BLOCK_SIZES, COMPLETE
from conftest import assert_close

import attnlib
from attnlib import masks, modifiers

HEADS, QUERIES, KEYS = 3, 13, 17
on_every_implementation = pytest.mark.parametrize("implementation", COMPLETE)


def operands(keys, *lead, heads=HEADS, queries=(QUERIES,), keys_shape=(KEYS,)):
    return (
        keys.normal(*lead, *queries, heads, 4), keys.normal(*lead, *keys_shape, heads, 4),
        keys.normal(*lead, *keys_shape, heads, 5),
    )  # fmt: skip


def attend(*args, implementation, **options):
    options = dict(implementation=implementation, block_sizes=BLOCK_SIZES.get(implementation)) | options
    return attnlib.dot_product_attention(*args, return_weights=True, return_lse=True, **options)


# Modifiers by their papers: their definitions are in modifier_catalogue.py


def alibi_of_paper(heads):
    """Press et al.: for a power of two, start and ratio 2**(-8 / n); else the closest one below and the next's."""
    if math.log2(heads).is_integer():
        ratio = 2 ** (-8 / heads)
        return [ratio * ratio**i for i in range(heads)]
    closest = 2 ** math.floor(math.log2(heads))
    return alibi_of_paper(closest) + alibi_of_paper(2 * closest)[0::2][: heads - closest]


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 20])
def test_slopes_are_those_of_the_paper(heads):
    np.testing.assert_allclose(modifiers.alibi_slopes(heads), alibi_of_paper(heads), rtol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (6, 7)])
def test_buckets_are_those_of_the_paper(buckets, max_distance, bidirectional):
    bias = modifiers.BucketedBias(jnp.zeros((buckets, 1)), bidirectional, max_distance)
    distances = np.arange(-300, 300)
    made = bias.bucket(jnp.asarray(distances), buckets)
    expected = [modifier_catalogue.bucket(int(d), buckets, bidirectional, max_distance) for d in distances]
    np.testing.assert_array_equal(made, expected)
    # With two directions distance 0 counts as earlier, and its bucket among the later ones is never used.
    assert set(expected) == set(range(buckets)) - ({buckets // 2} if bidirectional else set())


SCHEMES = {row.name: row for row in modifier_catalogue.ROWS if row.is_bias}


def bias_of(row, arguments):
    """What a modifier adds to the logits, (N, T, S), in NumPy."""
    places = np.ndindex(HEADS, QUERIES, KEYS)
    return np.reshape([row.modified(0.0, *place, **arguments) for place in places], (HEADS, QUERIES, KEYS))


@jax.jit
def with_bias(mask, bias, arrays, cotangent):
    """Results and gradients by the reference: one program for each mask."""

    def loss(bias, arrays):
        results = attend(*arrays, bias=bias, mask=mask, implementation="reference")
        return jnp.sum(results[0] * cotangent), results

    return jax.grad(loss, (0, 1), has_aux=True)(bias, arrays)


MASKS = {"all": None, "window": masks.SlidingWindow(3, 1)}
# A scheme knows nothing of masks: each has one of the two by default.
PAIRS = [(scheme, list(MASKS)[n % len(MASKS)]) for n, scheme in enumerate(SCHEMES)]


@pytest.mark.parametrize(
    ("scheme", "mask"),
    [
        pytest.param(scheme, mask, marks=() if (scheme, mask) in PAIRS else pytest.mark.slow)
        for scheme in SCHEMES
        for mask in MASKS
    ],
)
def test_schemes_are_their_biases(mask, scheme, keys):
    """Values and every gradient, of the scheme's own arrays too, which the bias's gradient adds up."""
    row, mask = SCHEMES[scheme], MASKS[mask]
    given = row.arguments(keys.normal, modifier_catalogue.Fits(HEADS, (6,)))
    tables = {name: value for name, value in given.items() if isinstance(value, jax.Array)}
    arrays, cotangent = operands(keys, 2), keys.normal(2, QUERIES, HEADS, 5)

    def by_entry(bias_bar, name):
        """The gradient of a table, by the bias that each of its entries alone makes."""
        nothing = {other: np.zeros(table.shape) for other, table in tables.items()}
        shape = tables[name].shape
        units = [bias_of(row, given | nothing | {name: unit}) for unit in np.eye(tables[name].size).reshape(-1, *shape)]
        return np.einsum("pnts,nts->p", units, bias_bar).reshape(shape).astype(np.float32)

    @jax.jit
    def with_modifier(tables, arrays):
        def loss(tables, arrays, implementation):
            modifier = row.kind(**(given | tables))
            results = attend(*arrays, score_mod=modifier, mask=mask, implementation=implementation)
            return jnp.sum(results[0] * cotangent), results

        return [jax.grad(loss, (0, 1), has_aux=True)(tables, arrays, implementation) for implementation in COMPLETE]

    bias = jnp.asarray(bias_of(row, jax.tree.map(np.asarray, given)), jnp.float32)[None]
    (bias_bar, expected_bar), expected = with_bias(mask, bias, arrays, cotangent)
    expected_tables_bar = {name: by_entry(np.asarray(bias_bar)[0], name) for name in tables}
    for (tables_bar, arrays_bar), results in with_modifier(tables, arrays):
        assert_close(results, expected)
        assert_close(arrays_bar, expected_bar)
        assert_close(tables_bar, expected_tables_bar, length=QUERIES * KEYS)


@on_every_implementation
def test_swin_bias_over_two_axes(implementation, keys):
    """Against the definition of the paper, cell by cell."""
    height, width = 3, 4
    table = keys.normal(5, 7, 2)
    arrays = operands(keys, 2, heads=2, queries=(height, width), keys_shape=(height, width))
    cells = [(y, x) for y in range(height) for x in range(width)]
    bias = np.array([[[table[a[0] - b[0] + 2, a[1] - b[1] + 3, n] for b in cells] for a in cells] for n in range(2)])
    bias = bias.reshape(1, 2, height, width, height, width)
    made = attend(*arrays, score_mod=modifiers.RelativeBias(table), implementation=implementation)
    assert_close(made, attend(*arrays, bias=jnp.asarray(bias), implementation="reference"))


@on_every_implementation
def test_a_function_of_the_user_sees_each_pair(implementation, keys):
    """The function's arguments, read off the logits that it gives, against what they are."""
    query, key, value = operands(keys, 2)
    for name, expected in {
        "batch": np.arange(2).reshape(2, 1, 1, 1),
        "head": np.arange(HEADS).reshape(1, HEADS, 1, 1),
        "query": np.arange(QUERIES).reshape(1, 1, QUERIES, 1),
        "key": np.arange(KEYS).reshape(1, 1, 1, KEYS),
    }.items():

        def told(logit, batch, head, query_position, key_position, name=name):
            where = dict(batch=batch, head=head, query=query_position, key=key_position)
            return 0.0 * logit + 0.1 * where[name].astype(logit.dtype)

        _, weights, _ = attend(query, key, value, score_mod=told, implementation=implementation)
        logits = np.broadcast_to(0.1 * expected, weights.shape)
        np.testing.assert_allclose(weights, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), rtol=1e-5)


@on_every_implementation
def test_modifiers_come_after_bias_and_cap(implementation, keys):
    query, key, value = operands(keys, 1)
    bias = keys.normal(QUERIES, KEYS)
    _, weights, _ = attend(
        query, key, value, bias=bias, logits_soft_cap=0.7, score_mod=lambda logit, *where: 3 * logit,
        implementation=implementation,
    )  # fmt: skip
    logits = 3 * 0.7 * np.tanh((np.einsum("btnd,bsnd->bnts", query, key) / 2 + np.asarray(bias)) / 0.7)
    np.testing.assert_allclose(weights, np.asarray(jax.nn.softmax(logits)), rtol=2e-5, atol=1e-6)


def test_a_learned_soft_cap_has_a_gradient(keys):
    arrays = operands(keys, 2)

    def loss(cap, implementation):
        return jnp.sum(attend(*arrays, score_mod=modifiers.SoftCap(cap), implementation=implementation)[0])

    both = jax.jit(lambda cap: [jax.grad(loss)(cap, name) for name in ("reference", "blockwise")])
    expected, got = map(float, both(jnp.float32(0.8)))
    assert expected != 0 and abs(got - expected) < 1e-5 * max(abs(expected), 1)


def test_captured_arrays_do_not_recompile(keys):
    """Not another table, not another function object that reads the same; another formula does."""
    from attnlib._engine.call import attend as program

    arrays = operands(keys, 2)

    def call(table, factor=1.0):
        return attnlib.dot_product_attention(*arrays, score_mod=lambda logit, b, n, i, j: logit + factor * table[n])

    first = call(keys.normal(HEADS))
    count = program._cache_size()
    again = call(keys.normal(HEADS))
    assert program._cache_size() == count
    assert bool(jnp.any(first != again))
    call(keys.normal(HEADS), 2.0)
    assert program._cache_size() == count + 1


# Sinks


@pytest.mark.parametrize("sink", [0.0, -1.5, -1e30, "a head"])
@on_every_implementation
def test_a_sink_is_a_key_without_value(implementation, sink, keys):
    """Against the oracle with one more key, of logit `sink` by its bias, and value 0."""
    query, key, value = (x.astype(np.float64) for x in map(np.asarray, operands(keys, 2)))
    sink = np.asarray(keys.normal(HEADS)) if sink == "a head" else sink
    mask = np.arange(KEYS) <= np.arange(QUERIES)[:, None] - 2  # the first two rows attend nothing
    more = [np.concatenate([x, np.zeros_like(x[:, :1])], 1) for x in (key, value)]
    bias = np.zeros((1, HEADS, 1, KEYS + 1))
    bias[..., -1] = np.reshape(sink, (1, -1, 1))
    wide = np.concatenate([mask, np.ones((QUERIES, 1), bool)], 1)
    output, weights, lse = oracle.attention(query, *more, bias=bias, mask=wide)
    arrays = (x.astype(np.float32) for x in (query, key, value))
    made = attend(
        *arrays, mask=jnp.asarray(mask), sink=jnp.float32(sink) if np.ndim(sink) else sink,
        implementation=implementation,
    )  # fmt: skip
    assert_close(made, tuple(x.astype(np.float32) for x in (output, weights[..., :-1], lse)))


@on_every_implementation
def test_infinite_sinks_take_nothing_or_all(implementation, keys):
    arrays, mask = operands(keys, 2), jnp.arange(KEYS)[None] <= jnp.arange(QUERIES)[:, None] - 2
    without = attend(*arrays, mask=mask, implementation=implementation)
    assert_close(attend(*arrays, mask=mask, sink=-jnp.inf, implementation=implementation), without)
    output, weights, lse = attend(*arrays, mask=mask, sink=jnp.inf, implementation=implementation)
    assert not output.any() and not weights.any() and bool(jnp.all(lse == jnp.inf))


def test_derivatives_of_a_sink(keys):
    """First and second, against the same sink as a key of the call."""
    query, key, value = operands(keys, 2)
    sink = keys.normal(HEADS)
    mask = jnp.arange(KEYS)[None] <= jnp.arange(QUERIES)[:, None] - 2

    def direct(sink, query, implementation):
        return attend(query, key, value, mask=mask, sink=sink, implementation=implementation)[0]

    def as_a_key(sink, query):
        more = [jnp.concatenate([x, jnp.zeros_like(x[:, :1])], 1) for x in (key, value)]
        bias = jnp.concatenate([jnp.zeros((1, HEADS, 1, KEYS)), jnp.reshape(sink, (1, -1, 1, 1))], -1)
        wide = jnp.concatenate([mask, jnp.ones((QUERIES, 1), bool)], 1)
        return attend(query, *more, mask=wide, bias=bias, implementation="reference")[0]

    direction = keys.normal(HEADS), keys.normal(*query.shape)
    ways = [as_a_key, *(functools.partial(direct, implementation=name) for name in COMPLETE)]

    @jax.jit
    def derivatives(*args):
        losses = [lambda *args, function=function: jnp.sum(jnp.sin(function(*args))) for function in ways]
        return [jax.jvp(jax.grad(loss, (0, 1)), args, direction) for loss in losses]

    expected, *made = derivatives(sink, query)
    for each in made:
        assert_close(each, expected, length=QUERIES)


# Explicit positions


@on_every_implementation
def test_positions_place_masks_and_modifiers(implementation, keys):
    query, key, value = operands(keys, 2)
    places = np.array(keys.integers(-1, 20, 2, QUERIES)), np.array(keys.integers(-1, 20, 2, KEYS))
    places[0][:, :3], places[1][:, :2] = (-1, 0, 5), (-1, 0)  # padding within the window of a query, and of padding
    i, j = places[0][:, None, :, None], places[1][:, None, None, :]
    slopes = modifiers.alibi_slopes(HEADS)
    mask = (i >= 0) & (j >= 0) & (j <= i) & (j >= i - 6)
    made = attend(
        query, key, value, query_positions=places[0], key_positions=places[1], mask=masks.SlidingWindow(6, None),
        is_causal=True, score_mod=modifiers.ALiBi(slopes), implementation=implementation,
    )  # fmt: skip
    bias = -slopes[:, None, None] * np.abs(i - j)
    assert_close(made, attend(query, key, value, mask=mask, bias=bias.astype(np.float32), implementation="reference"))


@on_every_implementation
def test_what_belongs_to_a_place_in_the_array_stays_there(implementation, keys):
    """Padding, segments and dense masks go by places, whatever the positions are."""
    query, key, value = operands(keys, 2)
    real, ids = keys.bools(2, KEYS), (keys.integers(0, 3, 2, QUERIES), keys.integers(0, 3, 2, KEYS))
    some = keys.bools(QUERIES, KEYS)
    mask = masks.KeyPadding(real) & masks.Segments(*ids) & masks.Dense(some)
    places = jnp.arange(QUERIES)[::-1], jnp.arange(KEYS)[::-1]
    made = attend(
        query, key, value, mask=mask, query_positions=places[0], key_positions=places[1],
        implementation=implementation,
    )  # fmt: skip
    assert_close(made, attend(query, key, value, mask=mask, implementation=implementation))
