"""attnlib against jax.nn and flax.linen where they can do the same: outputs, weights, and gradients of all inputs.

Differences on purpose follow, one test for each.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import COMPLETE
from conftest import assert_close, assert_zero

import attnlib
from attnlib import masks

BATCH, QUERIES, KEYS, FEATURES = 3, 5, 7, 4


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def random_mask(*shape):
    """Each row may attend the first key at least: an empty row is a difference, tested below."""
    mask = np.random.default_rng(shape).random(shape) < 0.6
    mask[..., 0] = True
    return mask


def operands(heads, kv_heads, queries=QUERIES):
    """BTNH, as jax.nn has it; jax.nn needs as many value features as key features."""
    shapes = (BATCH, queries, heads, FEATURES), (BATCH, KEYS, kv_heads, FEATURES)
    return normal(*shapes[0]), normal(*shapes[1], seed=1), normal(*shapes[1], seed=2)


def value_and_gradients(function, arrays):
    """The output, and the gradients of a random linear function of it."""

    def loss(arrays):
        output = function(*arrays)
        return (output * normal(*output.shape, seed=3)).sum(), output

    return jax.grad(loss, has_aux=True)(arrays)


def assert_same_function(ours, theirs, arrays):
    """`ours` is one function, or one for each implementation: all of them in one program with theirs."""
    ours = ours if isinstance(ours, list) else [ours]

    @jax.jit
    def each(arrays):
        return [value_and_gradients(function, arrays) for function in (theirs, *ours)]

    (their_gradients, expected), *made = each(arrays)
    for our_gradients, output in made:
        assert_close(output, expected, length=KEYS)
        assert_close(our_gradients, their_gradients, length=BATCH * QUERIES * KEYS)


def by_each_implementation(function):
    """A function of arrays for each implementation, by its keyword of that name."""
    return [functools.partial(function, implementation=name) for name in COMPLETE]


# Options of jax.nn, and the same in attnlib's words.
LENGTHS = np.asarray([2, 5, 3]), np.asarray([7, 1, 4])
OF_JAX_NN = {
    "plain": ({}, {}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "causal": ({"is_causal": True}, {"is_causal": True}),
    "mask": ({"mask": random_mask(BATCH, 4, QUERIES, KEYS)},) * 2,
    "mask of keys": ({"mask": random_mask(BATCH, 1, 1, KEYS)},) * 2,
    "mask of heads": ({"mask": random_mask(1, 4, 1, KEYS)},) * 2,
    "mask and causal": ({"mask": random_mask(1, 1, QUERIES, KEYS), "is_causal": True},) * 2,
    "window": ({"local_window_size": 2}, {"mask": masks.SlidingWindow(2, 2)}),
    "one-sided window": ({"local_window_size": (3, 0)}, {"mask": masks.SlidingWindow(3, 0)}),
    "window and causal": (
        {"local_window_size": (2, 1), "is_causal": True},
        {"mask": masks.SlidingWindow(2, 1), "is_causal": True},
    ),
    "key lengths": ({"key_value_seq_lengths": LENGTHS[1]}, {"mask": masks.Lengths(key=LENGTHS[1])}),
    "lengths": (
        {"query_seq_lengths": LENGTHS[0], "key_value_seq_lengths": LENGTHS[1]},
        {"mask": masks.Lengths(*LENGTHS)},
    ),
    "key lengths and causal": (
        {"key_value_seq_lengths": LENGTHS[1], "is_causal": True, "scale": 2.0},
        {"mask": masks.Lengths(key=LENGTHS[1]), "is_causal": True, "scale": 2.0},
    ),
}


# Only masks with an axis of heads meet the grouping of heads: they meet each one. The other options have each grouping
# in turn.
HEADS = [(4, 4), (4, 2), (4, 1)]
OF_HEADS = ("mask", "mask of heads")
IN_TURN = {(case, HEADS[n % 3]) for n, case in enumerate(OF_JAX_NN)} | set(itertools.product(OF_HEADS, HEADS))


@pytest.mark.parametrize(
    "case, heads",
    [
        each if each in IN_TURN else pytest.param(*each, marks=pytest.mark.slow)
        for each in itertools.product(OF_JAX_NN, HEADS)
    ],
)
def test_same_as_jax_nn(case, heads):
    their_options, our_options = OF_JAX_NN[case]
    assert_same_function(
        by_each_implementation(functools.partial(attnlib.dot_product_attention, **our_options)),
        lambda *x: jax.nn.dot_product_attention(*x, **their_options),
        operands(*heads),
    )


@pytest.mark.parametrize("shape", [(BATCH, 4, QUERIES, KEYS), (1, 4, QUERIES, KEYS), (BATCH, 1, 1, KEYS), (1, 1, 5, 1)])
def test_same_as_jax_nn_with_bias(shape):
    """The gradient of the bias too, at its own shape."""
    options = {"mask": random_mask(BATCH, 1, QUERIES, KEYS), "is_causal": True}
    assert_same_function(
        by_each_implementation(
            lambda q, k, v, b, implementation: attnlib.dot_product_attention(
                q, k, v, bias=b, **options, implementation=implementation
            )
        ),
        lambda q, k, v, b: jax.nn.dot_product_attention(q, k, v, bias=b, **options),
        (*operands(4, 2), normal(*shape)),
    )


def test_same_lse_as_jax_nn():
    """jax.nn returns (B, T, N), attnlib (B, N, T)."""
    options = {"is_causal": True, "scale": 0.5}

    @jax.jit
    def each(*x):
        ours = [
            attnlib.dot_product_attention(*x, **options, implementation=name, return_lse=True)[1] for name in COMPLETE
        ]
        return jax.nn.dot_product_attention(*x, **options, return_residual=True)[1].swapaxes(1, 2), ours

    expected, ours = each(*operands(4, 2))
    for lse in ours:
        assert_close(lse, expected, length=KEYS)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_same_as_flax_dot_product_attention(batch, masked):
    """Any number of batch axes, features of the values differing, a bias, and the weights."""
    query, key = normal(*batch, QUERIES, 4, FEATURES), normal(*batch, KEYS, 4, FEATURES, seed=1)
    value, bias = normal(*batch, KEYS, 4, 6, seed=2), normal(*batch, 4, QUERIES, KEYS)
    mask = random_mask(*batch, 1, QUERIES, KEYS) if masked else None
    ours = functools.partial(attnlib.dot_product_attention, mask=mask, attention_axes=-3)
    assert_same_function(
        by_each_implementation(lambda q, k, v, b, implementation: ours(q, k, v, bias=b, implementation=implementation)),
        lambda q, k, v, b: nn.dot_product_attention(q, k, v, b, mask, deterministic=True),
        (query, key, value, bias),
    )
    assert_same_function(
        by_each_implementation(
            lambda q, k, b, implementation: ours(
                q, k, value, bias=b, implementation=implementation, return_weights=True
            )[1]
        ),
        lambda q, k, b: nn.dot_product_attention_weights(q, k, b, mask, deterministic=True),
        (query, key, bias),
    )


OF_FLAX = [((3,), 1, None), ((3,), 3, 9), ((2, 3), 2, None), ((), 3, 5)]


@pytest.mark.parametrize(
    "batch, inputs, out_features, use_bias",
    [
        pytest.param(*each, use_bias, marks=() if use_bias == bool(n % 2) else pytest.mark.slow)
        for n, each in enumerate(OF_FLAX)
        for use_bias in (False, True)
    ],
)
def test_same_as_flax_multi_head_attention(batch, inputs, out_features, use_bias):
    """Flax's parameters fit attnlib's module as they are; gradients of inputs and parameters agree."""
    lengths, features = (QUERIES, KEYS, KEYS), (6, 8, 10)
    arrays = tuple(normal(*batch, n, c, seed=i) for i, (n, c) in enumerate(zip(lengths, features, strict=True)))[
        :inputs
    ]
    mask = random_mask(*batch, 1, QUERIES, KEYS if inputs > 1 else QUERIES)
    theirs = nn.MultiHeadDotProductAttention(
        num_heads=2, qkv_features=8, out_features=out_features, use_bias=use_bias, deterministic=True
    )
    ours = attnlib.MultiHeadAttention(
        num_heads=2, key_dim=4, output_shape=out_features, use_bias=use_bias, attention_axes=-2
    )
    params = jax.jit(theirs.init)(jax.random.key(0), *arrays)["params"]
    params = jax.tree.map(lambda p: np.asarray(p) + np.float32(0.1), params)  # biases start at zero
    own = jax.eval_shape(ours.init, jax.random.key(0), *arrays)["params"]
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, params)
    assert_same_function(
        lambda params, *x: ours.apply({"params": params}, *x, mask=mask),
        lambda params, *x: theirs.apply({"params": params}, *x, mask=mask),
        (params, *arrays),
    )


def test_empty_rows_are_averages_in_jax_nn_and_zero_in_ours():
    query, key, value = operands(4, 4)
    mask = random_mask(BATCH, 1, QUERIES, KEYS)
    mask[1, :, 2] = False
    theirs = np.array(jax.jit(jax.nn.dot_product_attention)(query, key, value, mask=mask))
    assert_close(theirs[1, 2], value[1].mean(0), length=KEYS)
    ours = np.asarray(attnlib.dot_product_attention(query, key, value, mask=mask))
    assert_zero(ours[1, 2])
    theirs[1, 2] = 0
    assert_close(ours, theirs, length=KEYS)


def test_empty_rows_are_averages_in_flax_and_zero_in_ours():
    query, key, value = operands(4, 4)
    mask = random_mask(BATCH, 1, QUERIES, KEYS)
    mask[1, :, 2] = False
    theirs = jax.jit(lambda *x: nn.dot_product_attention_weights(*x, mask=mask, deterministic=True))
    weights = np.array(theirs(query, key))
    assert_close(weights[1, :, 2], np.full((4, KEYS), 1 / KEYS, np.float32))
    made = attnlib.dot_product_attention(query, key, value, mask=mask, return_weights=True)
    output, ours = map(np.asarray, made)
    assert_zero((output[1, 2], ours[1, :, 2]))
    weights[1, :, 2] = 0
    assert_close(ours, weights, length=KEYS)


@pytest.mark.parametrize("library", ["jax.nn", "flax"])
def test_nan_in_masked_values_reaches_the_output_there_and_not_in_ours(library):
    query, key, value = operands(4, 4)
    mask = np.ones((1, 1, QUERIES, KEYS), bool)
    mask[..., 3] = False
    value[:, 3] = np.nan
    theirs = jax.nn.dot_product_attention if library == "jax.nn" else nn.dot_product_attention
    assert np.isnan(jax.jit(theirs)(query, key, value, mask=mask)).all()
    expected = oracle.attention(query, key, value, mask=mask)[0].astype(np.float32)
    assert np.isfinite(expected).all()
    assert_close(attnlib.dot_product_attention(query, key, value, mask=mask), jnp.asarray(expected), length=KEYS)


def test_batch_axes_and_value_features_that_jax_nn_refuses():
    """Rank 5, values of other features: refused there, the oracle's answer here."""
    query, key, value = normal(2, 3, 5, 4, 3), normal(2, 3, 7, 2, 3), normal(2, 3, 7, 2, 6)
    with pytest.raises(ValueError, match="too many values to unpack"):
        jax.nn.dot_product_attention(query, key, value)
    with pytest.raises(ValueError, match="value shape should be"):
        jax.nn.dot_product_attention(query[0], key[0], value[0])
    expected = oracle.attention(query, key, value, attention_axes=(2,))[0].astype(np.float32)
    assert_close(attnlib.dot_product_attention(query, key, value, attention_axes=2), jnp.asarray(expected), length=KEYS)
