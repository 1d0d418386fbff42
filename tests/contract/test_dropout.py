"""Contract line 5: what is dropped is a function of (key, batch index, head, query position, key position) alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BLOCK_SIZES, NAMES, unsupported
from conftest import assert_close, x64

import attnlib
from attnlib import masks

on_every_implementation = pytest.mark.parametrize("implementation", NAMES)
# Where the others are shown to drop the same, here and in test_cases.py.
on_the_reference = pytest.mark.parametrize(
    "implementation",
    ["reference", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "reference")],
)


def kept(key, batch, heads, queries, keys, *, rate=0.5, implementation=None, block_sizes=None, kv_heads=1):
    """Which weights are kept, bool (B, N, T, S): with no queries to speak of, weights are uniform or dropped.

    The values are unit vectors, so that the output, which tiles compute, must say the same as the weights.
    """
    query = jnp.zeros((batch, queries, heads, 1))
    key_operand = jnp.zeros((batch, keys, kv_heads, 1))
    options = dict(dropout_rate=rate, dropout_rng=key, return_weights=True)
    reason = unsupported(implementation, query, key_operand, key_operand, **options) if implementation else None
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")
    value = jnp.broadcast_to(jnp.eye(keys)[:, None], (batch, keys, kv_heads, keys))
    output, weights = attnlib.dot_product_attention(
        query, key_operand, value, implementation=implementation, block_sizes=block_sizes, **options
    )
    weights = np.asarray(weights)
    np.testing.assert_allclose(np.moveaxis(output, 1, 2), weights, rtol=1e-6)
    np.testing.assert_allclose(weights[weights != 0], 1 / (keys * (1 - rate)), rtol=1e-6)
    return weights != 0


# The same function everywhere


@pytest.mark.parametrize(
    ("implementation", "block_sizes"),
    [*((name, None) for name in NAMES if name not in BLOCK_SIZES), *(("blockwise", x) for x in ((4, 3), (11, 5))),
     *(pytest.param("blockwise", x, marks=pytest.mark.slow) for x in (None, (1, 1)))],
)  # fmt: skip
def test_same_entries_on_every_implementation_and_block_size(implementation, block_sizes):
    """In the weights that are returned, made at once, and in the output, made by tile: of unit vectors, the weights."""
    expected = kept(jax.random.key(3), 2, 4, 11, 13, implementation="reference", kv_heads=2)
    query, key = np.zeros((2, 11, 4, 1), np.float32), np.zeros((2, 13, 2, 1), np.float32)
    value = np.broadcast_to(np.eye(13, dtype=np.float32)[None, :, None], (2, 13, 2, 13))
    options = dict(dropout_rate=0.5, dropout_rng=jax.random.key(3), return_weights=True)
    reason = unsupported(implementation, query, key, value, **options)
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")
    output, weights = attnlib.dot_product_attention(
        query, key, value, implementation=implementation, block_sizes=block_sizes, **options
    )
    np.testing.assert_array_equal(np.asarray(weights) != 0, expected)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(output), 2, 1) != 0, expected)


@on_the_reference
def test_an_entry_depends_on_its_own_place_alone(implementation):
    """Longer sequences, more batch entries and grouped heads leave what was there; masks and biases too."""
    key = jax.random.key(3)
    whole = kept(key, 3, 4, 9, 10, implementation=implementation)
    np.testing.assert_array_equal(kept(key, 2, 4, 5, 7, implementation=implementation), whole[:2, :, :5, :7])
    np.testing.assert_array_equal(kept(key, 3, 4, 9, 10, implementation=implementation, kv_heads=2), whole)

    queries, zeros = jnp.zeros((3, 9, 4, 1)), jnp.zeros((3, 10, 1, 1))
    bias = np.linspace(-1.0, 1.0, 10, dtype=np.float32)
    _, weights = attnlib.dot_product_attention(
        queries, zeros, zeros, dropout_rate=0.5, dropout_rng=key, return_weights=True, bias=bias,
        mask=masks.Causal(), implementation=implementation,
    )  # fmt: skip
    np.testing.assert_array_equal(weights != 0, whole & np.tri(9, 10, dtype=bool))


@on_every_implementation
def test_axes_are_folded_before_positions_are_counted(implementation):
    whole = kept(jax.random.key(3), 2, 2, 6, 8, implementation=implementation)
    query, key = jnp.zeros((2, 2, 3, 2, 1)), jnp.zeros((2, 4, 2, 2, 1))
    _, weights = attnlib.dot_product_attention(
        query, key, key, dropout_rate=0.5, dropout_rng=jax.random.key(3), return_weights=True,
        implementation=implementation,
    )  # fmt: skip
    np.testing.assert_array_equal(weights.reshape(2, 2, 6, 8) != 0, whole)


def test_typed_and_raw_keys_are_the_same_key():
    np.testing.assert_array_equal(
        kept(jax.random.key(5), 1, 2, 8, 8), kept(jax.random.key_data(jax.random.key(5)), 1, 2, 8, 8)
    )


def test_rate_zero_needs_no_key_and_drops_nothing():
    query = jnp.ones((1, 3, 1, 2))
    expected = attnlib.dot_product_attention(query, query, query)
    for key in (None, jax.random.key(0)):
        output = attnlib.dot_product_attention(query, query, query, dropout_rate=0.0, dropout_rng=key)
        np.testing.assert_array_equal(output, expected)


# Statistics, over about a million draws each. A z-score is standard normal where the draws are fair.

FAIR = 4.5  # exceeded by chance once in 150,000 tests


def agreement(a, b, rate):
    """z-score of how often two independent masks agree."""
    likely = rate**2 + (1 - rate) ** 2
    return (np.mean(a == b) - likely) / np.sqrt(likely * (1 - likely) / a.size)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
def test_the_rate_is_kept(rate):
    """Over all, and as evenly over rows, columns, heads and batch entries as chance has it."""
    drawn = kept(jax.random.key(11), 2, 4, 256, 512, rate=rate)
    variance = rate * (1 - rate)
    for axes in ((0, 1, 2, 3), (2, 3), (0, 2, 3)):
        means = drawn.mean(axes)
        assert np.max(np.abs(means - (1 - rate))) / np.sqrt(variance * means.size / drawn.size) < FAIR
    for axes in ((3,), (2,), (0, 1), (0, 2), (1, 3)):
        means = drawn.mean(axes)
        count, of_each = means.size, drawn.size / means.size
        squares = (means - (1 - rate)) ** 2 / (variance / of_each)  # of mean 1, and with the variance of a binomial's:
        spread = np.sqrt((2 + (1 / variance - 6) / of_each) / count)
        assert abs(np.mean(squares) - 1) / spread < FAIR


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbours_are_independent(rate):
    """At distance 1, 2, ..., powers of two along queries, keys, both diagonals, heads and batch entries."""
    drawn = kept(jax.random.key(12), 2, 4, 256, 512, rate=rate)
    pairs = []
    for step in (1, 2, 3, 4, 8, 16, 64, 128):
        pairs += [
            (drawn[:, :, step:], drawn[:, :, :-step]),
            (drawn[..., step:], drawn[..., :-step]),
            (drawn[:, :, step:, step:], drawn[:, :, :-step, :-step]),
            (drawn[:, :, step:, :-step], drawn[:, :, :-step, step:]),
        ]
    pairs += [(drawn[0], drawn[1]), (drawn[:, 1:], drawn[:, :-1]), (drawn[:, 0], drawn[:, 3])]
    square = drawn[..., :256]
    upper = np.triu_indices(256, 1)
    pairs.append((square[..., upper[0], upper[1]], np.swapaxes(square, -1, -2)[..., upper[0], upper[1]]))
    assert max(abs(agreement(a, b, rate)) for a, b in pairs) < FAIR


def test_four_corners_are_independent():
    """The parity of the corners of rectangles is fair: rows and columns combine by more than an exclusive or."""
    drawn = kept(jax.random.key(13), 2, 4, 256, 512)
    for rows, columns in [(1, 1), (2, 1), (1, 16), (64, 128), (37, 101)]:
        corners = (
            drawn[:, :, :-rows, :-columns]
            ^ drawn[:, :, rows:, :-columns]
            ^ drawn[:, :, :-rows, columns:]
            ^ drawn[:, :, rows:, columns:]
        )
        assert abs(corners.mean() - 0.5) / (0.5 / np.sqrt(corners.size)) < FAIR


def test_keys_are_independent():
    """Consecutive seeds, and keys split from one another, draw unrelated masks."""
    keys = [jax.random.key(seed) for seed in range(4)] + list(jax.random.split(jax.random.key(0), 3))
    drawn = [kept(key, 1, 4, 256, 512) for key in keys]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert abs(agreement(a, b, 0.5)) < FAIR
    np.testing.assert_array_equal(drawn[0], kept(keys[0], 1, 4, 256, 512))


def test_no_two_rows_or_columns_are_alike():
    drawn = kept(jax.random.key(14), 1, 2, 512, 512)
    for head in drawn[0]:
        assert len(np.unique(head, axis=0)) == len(np.unique(head, axis=1)) == 512


# Weights and derivatives


@on_every_implementation
def test_weights_returned_are_the_weights_used(implementation, keys):
    """In the output, in the derivatives by the value, forward and reverse, and nothing is renormalised."""
    query, key, value, tangent = (
        keys.normal(*shape) for shape in ((2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 6), (2, 7, 2, 6))
    )
    options = dict(dropout_rate=0.4, dropout_rng=next(keys), is_causal=True, implementation=implementation)
    reason = unsupported(implementation, query, key, value, dropout_rate=0.4, dropout_rng=next(keys))
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")
    cotangent = keys.normal(2, 5, 4, 6)

    @jax.jit
    def program(value):
        def function(value):
            return attnlib.dot_product_attention(query, key, value, **options)

        output, pullback = jax.vjp(function, value)
        _, weights = attnlib.dot_product_attention(query, key, value, return_weights=True, **options)
        plain = dict(options, dropout_rate=0.0)
        _, undropped = attnlib.dot_product_attention(query, key, value, return_weights=True, **plain)
        tangents = jax.jvp(function, (value,), (tangent,))[1]
        return output, tangents, pullback(cotangent)[0], weights, undropped

    output, forward, reverse, weights, undropped = map(np.asarray, program(value))
    grouped = weights.reshape(2, 2, 2, 5, 7)
    assert_close(output, np.einsum("bkgts,bske->btkge", grouped, value).reshape(output.shape), length=7)
    assert_close(forward, np.einsum("bkgts,bske->btkge", grouped, tangent).reshape(output.shape), length=7)
    by_group = np.asarray(cotangent).reshape(2, 5, 2, 2, 6)
    assert_close(reverse, np.einsum("bkgts,btkge->bske", grouped, by_group), length=7)
    assert_close(weights, np.where(weights != 0, undropped / np.float32(0.6), 0), length=7)
    assert 0.2 < np.mean(weights[:, :, 4, :5] == 0) < 0.6


@on_every_implementation
def test_derivatives_are_of_the_function_with_that_mask(implementation, keys):
    """Against finite differences in float64, for every operand."""
    with x64():
        draw = np.random.default_rng(0)
        shapes = dict(query=(1, 5, 2, 3), key=(1, 6, 1, 3), value=(1, 6, 1, 2), bias=(2, 1, 6))
        operands = {name: jax.device_put(draw.normal(size=shape)) for name, shape in shapes.items()}
        operands["bias"] = operands["bias"][None]
        direction = {name: jax.device_put(draw.normal(size=x.shape)) for name, x in operands.items()}
        options = dict(dropout_rate=0.3, dropout_rng=next(keys), logits_soft_cap=2.0)
        reason = unsupported(implementation, **operands, **options)
        if reason is not None:
            pytest.skip(f"{implementation}: {reason}")

        @jax.jit
        def program(operands):
            def loss(operands):
                output = attnlib.dot_product_attention(
                    **operands, **options, implementation=implementation, block_sizes=BLOCK_SIZES.get(implementation)
                )
                return jnp.sum(jnp.sin(output))

            return jax.value_and_grad(loss)(operands)

        step = 1e-5
        operands, direction = (jax.tree.map(np.asarray, tree) for tree in (operands, direction))
        up, down = (
            program({name: x + sign * step * direction[name] for name, x in operands.items()})[0] for sign in (1, -1)
        )
        gradient = program(operands)[1]
        slope = sum(float(np.vdot(gradient[name], direction[name])) for name in operands)
        np.testing.assert_allclose(slope, float(up - down) / (2 * step), rtol=1e-7)
