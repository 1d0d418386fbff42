"""Weights that are not divided by their sum: sigmoid and squared ReLU attention against plain definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import COMPLETE, by_name
from conftest import assert_same, x64

import attnlib
from attnlib import inspect, masks, modifiers

HEADS, QUERIES, KEYS = 4, 11, 37
SHAPES = (2, QUERIES, HEADS, 8), (2, KEYS, 2, 8), (2, KEYS, 2, 5), (HEADS,)
ACTIVATIONS = {
    "sigmoid": (modifiers.LogSigmoid, lambda x, bias: jax.nn.sigmoid(x + bias[None, :, None, None])),
    "squared relu": (lambda bias: modifiers.LogRelu(), lambda x, bias: jnp.square(jnp.where(x > 0, x, 0))),
}


def drawn(dtype):
    return [jnp.asarray(np.random.default_rng(n).normal(size=shape), dtype) for n, shape in enumerate(SHAPES)]


def by_definition(activation, query, key, value, bias):
    """Every pair that a causal mask at the end leaves."""
    key, value = (jnp.repeat(x, HEADS // 2, -2) for x in (key, value))
    weights = activation(jnp.einsum("btnd,bsnd->bnts", query, key) / math.sqrt(query.shape[-1]), bias)
    seen = jnp.arange(KEYS)[None] <= jnp.arange(QUERIES)[:, None] + KEYS - QUERIES
    return jnp.einsum("bnts,bsne->btne", jnp.where(seen[None, None], weights, 0), value)


def derivatives(function, operands):
    """The output, the gradient of a sum, and a product of its second derivative."""
    weights = jnp.asarray(np.random.default_rng(9).normal(size=(2, QUERIES, HEADS, 5)), operands[0].dtype)

    @jax.jit
    def all_of(operands, tangents):
        def gradient(operands):
            return jax.grad(lambda operands: jnp.sum(function(*operands) * weights))(operands)

        return function(*operands), *jax.jvp(gradient, (operands,), (tangents,))

    return all_of(operands, [jnp.cos(x) for x in operands])


def largest_error(made, expected):
    """Of each part, in units of its largest number."""
    parts = zip(map(jax.tree.leaves, made), map(jax.tree.leaves, expected), strict=True)
    sizes = [(max(np.max(np.abs(np.asarray(y) - x)) for x, y in zip(a, b, strict=True)), b) for a, b in parts]
    return max(error / max(np.max(np.abs(y)) for y in b) for error, b in sizes)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_those_of_the_definition(name):
    """In float64 to 1e-10. In float32 to the rounding of a sum: of a plain float32 definition, 3e-7 too."""
    modifier, activation = ACTIVATIONS[name]

    def attend(query, key, value, bias, how):
        options = dict(mask=masks.Causal(KEYS - QUERIES), normalize=False, score_mod=modifier(bias), **how)
        return attnlib.dot_product_attention(query, key, value, **options)

    single = drawn(jnp.float32)
    with x64():
        double = [x.astype(jnp.float64) for x in single]
        expected = derivatives(lambda *operands: by_definition(activation, *operands), double)
        for implementation in COMPLETE:
            how = by_name(implementation)
            made = derivatives(lambda *operands, how=how: attend(*operands, how), double)
            assert largest_error(made, expected) < 1e-13
    made = derivatives(lambda *operands: attend(*operands, by_name("blockwise")), single)
    assert largest_error(made, expected) < 1.5e-6


def test_queries_without_a_positive_logit():
    """All logits 0 or below: 0, an lse of -inf, and derivatives of 0 that are not NaN; the other query has its own."""
    query = jnp.stack([jnp.zeros(3), -jnp.ones(3), jnp.ones(3)])[None, :, None]
    key, value = jnp.abs(drawn(jnp.float32)[1][:1, :5, :1, :3]), drawn(jnp.float32)[2][:1, :5, :1]

    @jax.jit
    def of_all(query):
        def results(query, name):
            options = dict(score_mod=modifiers.LogRelu(), normalize=False, return_lse=True, return_weights=True)
            output, weights, lse = attnlib.dot_product_attention(query, key, value, **options, **by_name(name))
            return output, weights, jnp.where(jnp.isfinite(lse), 0, lse)

        def loss(query, name):
            return sum(jnp.sum(part**2 + part) for part in results(query, name)[:2])

        return {name: (results(query, name), jax.grad(loss)(query, name), jax.hessian(loss)(query, name))
                for name in COMPLETE}  # fmt: skip

    for (output, weights, lse), gradient, hessian in of_all(query).values():
        assert np.all(output[:, :2] == 0) and np.all(weights[..., :2, :] == 0) and np.all(lse[..., :2] == -np.inf)
        assert np.all(gradient[:, :2] == 0) and np.all(hessian[:, :2] == 0)
        assert np.all(output[:, 2] != 0) and np.all(gradient[:, 2] != 0) and np.all(np.isfinite(hessian))


def function_and_derivatives(modifier, points):
    function = lambda x: modifier(x, 0, 0, 0, 0)  # noqa: E731
    by_order = function, jax.grad(function), jax.grad(jax.grad(function))
    return [np.asarray(jax.vmap(each)(jnp.asarray(points))) for each in by_order]


def test_log_sigmoid_of_one_logit():
    points = np.array([-np.inf, -300.0, -1.0, 0.0, 1.0, 300.0, np.inf], np.float32)
    value, first, second = function_and_derivatives(modifiers.LogSigmoid(0.0), points)
    sigmoid = np.array([0, 0, 0.26894142, 0.5, 0.73105858, 1, 1])
    np.testing.assert_allclose(value, [-np.inf, -300, -1.3132617, -0.6931472, -0.3132617, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(first, 1 - sigmoid, atol=1e-7)
    np.testing.assert_allclose(second, -sigmoid * (1 - sigmoid), atol=1e-7)
    assert np.isnan(modifiers.LogSigmoid(0.0)(jnp.float32(np.nan), 0, 0, 0, 0))


@pytest.mark.parametrize("power", [1, 2, 7.5])
def test_log_relu_of_one_logit(power):
    """Two derivatives are finite however small the logit is: those of a weight of 0 would be NaN otherwise."""
    points = np.array([-1.0, 0.0, 1e-38, 1e-22, 2e-19, 4e-19, 1.0, 3.0], np.float32)
    value, first, second = function_and_derivatives(modifiers.LogRelu(power), points)
    assert np.all(value[:4] == -np.inf) and np.all(first[:4] == 0) and np.all(second[:4] == 0)
    assert np.all(np.isfinite(first)) and np.all(np.isfinite(second))
    np.testing.assert_allclose(value[-3:], power * np.log(points[-3:]), rtol=1e-6)
    np.testing.assert_allclose(first[-3:], power / points[-3:], rtol=1e-6)
    assert np.isnan(modifiers.LogRelu(power)(jnp.float32(np.nan), 0, 0, 0, 0))


def traced(score_mod, **options):
    x = jax.ShapeDtypeStruct((2, 4, 6, 3, 8), jnp.float32)
    call = lambda x: attnlib.dot_product_attention(x, x, x, score_mod=score_mod, normalize=False, **options)  # noqa: E731
    return str(jax.make_jaxpr(call)(x))


def test_the_default_bias_is_of_all_keys():
    assert traced(modifiers.LogSigmoid()) == traced(modifiers.LogSigmoid(-math.log(24)))
    assert traced(modifiers.LogSigmoid(), attention_axes=1) == traced(
        modifiers.LogSigmoid(-math.log(4)), attention_axes=1
    )


def test_a_default_bias_is_refused_where_keys_may_be_empty():
    x = jnp.ones((1, 3, 1, 2))
    with pytest.raises(ValueError, match=r"does not know the number of keys inside another function.*bias=-math.log"):
        traced(lambda logit, *where: modifiers.LogSigmoid()(2 * logit, *where))
    cache = attnlib.KVCache.create((1,), 5, num_kv_heads=1, key_dim=2)
    with pytest.raises(ValueError, match=r"as in a cache, some of the keys may be empty slots.*bias=-math.log"):
        cache.decode(x, x, x, score_mod=modifiers.LogSigmoid(), normalize=False)


def test_weights_are_inspected_as_they_are():
    query, key, value, bias = drawn(jnp.float32)
    options = dict(score_mod=modifiers.LogSigmoid(bias), normalize=False, is_causal=True)
    _, weights = attnlib.dot_product_attention(query, key, value, return_weights=True, **options)
    np.testing.assert_allclose(inspect.attention_rows(query, key, rows=[2, 9], **options), weights[..., [2, 9], :],
                               rtol=1e-5, atol=1e-7)  # fmt: skip
    np.testing.assert_allclose(inspect.attention_received(query, key, **options), weights.sum(-2), rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="normalize cannot be given: the entropy is that of weights that add up to one"):
        inspect.attention_entropy(query, key, **options)


def test_an_overflow_keeps_masked_weights():
    """Documented: a weight beyond the dtype is infinite. What the mask leaves out is 0 all the same."""
    query, key = 40 * jnp.ones((1, 2, 1, 1)), 3 * jnp.ones((1, 2, 1, 1))
    options = dict(normalize=False, is_causal=True, return_weights=True)
    output, weights = attnlib.dot_product_attention(query, key, key, **options)
    assert np.all(np.isposinf(output)) and np.all(np.isposinf(weights) == np.tri(2, dtype=bool))
    assert weights[0, 0, 0, 1] == 0


def test_programs_without_it_stay_as_they_are():
    """normalize=True adds nothing."""
    x = jax.ShapeDtypeStruct((1, 5, 2, 4), jnp.float32)
    plain, asked = (
        str(jax.make_jaxpr(lambda x, options=options: attnlib.dot_product_attention(x, x, x, **options))(x))
        for options in ({}, dict(normalize=True))
    )
    assert plain == asked
    assert_same(*(attnlib.dot_product_attention(*[jnp.ones((1, 5, 2, 4))] * 3, **o) for o in ({}, {"normalize": True})))
