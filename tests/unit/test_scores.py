"""Scores: each kind against a loop over pairs, `prepare` against `block`, parameters, and scores of a user's own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import score_catalogue
from cases import COMPLETE, NAMES, by_name, unsupported
from conftest import assert_close, assert_finite, x64
from score_catalogue import Fits

import attnlib
from attnlib import scores

# Folded: query (*batch, K, G, T, D), key (*batch, K, S, D); query head n = k * G + g reads key head k.
QUERY, KEY, HEADS = (2, 3, 2, 5, 4), (2, 3, 7, 4), 6


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def euclidean(q, k, sharpness):
    return -sharpness * ((q - k) ** 2).sum()


# name: (row, arguments)
SCORES = {
    name: (row, form(numbers, Fits(HEADS, 4, 4))) for row in score_catalogue.ROWS for name, form in row.forms.items()
}


@pytest.mark.parametrize("name", SCORES)
def test_block_is_a_loop_over_pairs(name):
    """In float64, directly and after `prepare`, which may move work but no number."""
    row, arguments = SCORES[name]
    score = row(**arguments)
    query, key = numbers(*QUERY), numbers(*KEY)
    expected = np.zeros((*QUERY[:-1], KEY[-2]))
    for b, k, g, t, s in np.ndindex(*expected.shape):
        expected[b, k, g, t, s] = row.logit(query[b, k, g, t], key[b, k, s], k * QUERY[2] + g, **arguments)
    with x64():
        score.check(HEADS, 4, 4)
        operands = jnp.asarray(query), jnp.asarray(key)
        np.testing.assert_allclose(score.block(*operands), expected, atol=1e-13)
        *prepared, rest = score.prepare(*operands)
        np.testing.assert_allclose(rest.block(*prepared), expected, atol=1e-13)
        assert rest.features_per_pair(4) >= 1


def test_features_may_differ_where_the_score_allows_it():
    query, key = (jax.device_put(numbers(*shape).astype(np.float32)) for shape in (QUERY, (2, 3, 7, 3)))
    kernel = jnp.asarray(numbers(4, 3), jnp.float32)
    for score in (scores.Bilinear(kernel), scores.Custom(lambda q, k, w: q @ w @ k, kernel)):
        score.check(HEADS, 4, 3)
        expected = np.einsum("bkgtd,de,bkse->bkgts", query, kernel, key)
        np.testing.assert_allclose(score.block(query, key), expected, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def additive_and_gradients(implementation, query, key, value, scale):
    """One program for all sizes."""

    def function(query, key):
        return attnlib.attention(query, key, value, score=scores.Additive(scale), **by_name(implementation))

    output, pullback = jax.vjp(function, query, key)
    return output, pullback(jnp.ones_like(output))


@pytest.mark.parametrize("size", [1.0, 30.0, 100.0, 3e4, 1e30])
@pytest.mark.parametrize("implementation", NAMES)
def test_additive_is_exact_for_large_inputs(implementation, size, keys):
    """tanh saturates; what computes it through exponentials must not overflow, cancel, or lose the derivative."""
    query, key, value = (keys.normal(*shape) for shape in ((1, 3, 1, 4), (1, 5, 1, 4), (1, 5, 1, 2)))
    query, key = size * query, size * key
    key = np.array(key)
    key[0, 0] = np.float32(0.25) - np.asarray(query)[0, 0]  # sums of moderate size from large parts
    key = jnp.asarray(key)
    score = scores.Additive(keys.normal(4))
    reason = unsupported(implementation, query, key, value, score=score)
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")

    output, gradients = additive_and_gradients(implementation, query, key, value, score.scale)
    logits = np.tanh(np.asarray(query[0, :, 0, None] + key[0, None, :, 0], np.float64)) @ np.asarray(score.scale)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(output[0, :, 0], weights @ np.asarray(value[0, :, 0], np.float64), atol=3e-6)
    assert_finite(gradients)

    slope = 1 - np.tanh(np.asarray(query[0, :, 0, None] + key[0, None, :, 0], np.float64)) ** 2
    moved = np.asarray(value[0, :, 0], np.float64).sum(-1)
    logits_bar = weights * (moved - (weights * moved).sum(-1, keepdims=True))
    query_bar = np.einsum("ts,tsd,d->td", logits_bar, slope, np.asarray(score.scale))
    np.testing.assert_allclose(gradients[0][0, :, 0], query_bar, atol=3e-6)


@pytest.mark.parametrize("name", SCORES)
def test_parameters_are_leaves(name):
    row, arguments = SCORES[name]
    assert_leaves(row(**arguments), sum(not callable(leaf) for leaf in jax.tree.leaves(arguments)))


def test_parameters_may_be_trees():
    assert_leaves(scores.Custom(euclidean, {"a": jnp.ones(2), "b": [jnp.ones(3)]}, jnp.float32(2)), 3)


def assert_leaves(score, count):
    leaves, structure = jax.tree.flatten(score)
    assert len(leaves) == count
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(score)
    assert jax.tree.structure(again) == structure


@pytest.mark.parametrize("implementation", NAMES)
def test_parameters_have_gradients(implementation, keys):
    """Of trees of arrays too, against finite differences in float64."""
    with x64():
        draw = iter([numbers(1, 5, 2, 3), numbers(1, 4, 1, 3), numbers(1, 4, 1, 2)])
        query, key, value = (jnp.asarray(next(draw)) for _ in range(3))
        params = {"matrix": jnp.asarray(numbers(3, 3)), "power": jnp.float64(1.3)}

        def fn(q, k, params):
            return -jnp.sum(((q - k @ params["matrix"]) ** 2 + 1) ** params["power"])

        reason = unsupported(implementation, query, key, value, score=scores.Custom(fn, params))
        if reason is not None:
            pytest.skip(f"{implementation}: {reason}")

        @jax.jit
        def program(params):
            def loss(params):
                score = scores.Custom(fn, params)
                return jnp.sum(jnp.sin(attnlib.attention(query, key, value, score=score, **by_name(implementation))))

            return jax.value_and_grad(loss)(params)

        _, gradient = program(params)
        direction = {"matrix": jnp.asarray(numbers(3, 3, seed=1)), "power": jnp.float64(0.7)}
        step = 1e-5
        up, down = (
            program(jax.tree.map(lambda p, d, s=sign: p + s * step * d, params, direction))[0] for sign in (1, -1)
        )
        slope = sum(jnp.vdot(gradient[name], direction[name]) for name in params)
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-7)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cosine(scores.Score):
    """A user's own score, written for blocks."""

    sharpness: jax.Array

    def block(self, query, key, precision=None):
        query, key = (x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6) for x in (query, key))
        return self.sharpness * jnp.einsum("...kgtd,...ksd->...kgts", query, key, precision=precision)


@pytest.mark.parametrize("implementation", NAMES)
def test_a_users_own_score(implementation, keys):
    """A subclass of Score works as Custom does, with masks, grouped heads, gradients."""
    query, key, value = (keys.normal(*shape) for shape in ((2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 6)))

    def one_pair(q, k, sharpness):
        q, k = (x / jnp.sqrt(jnp.sum(x * x) + 1e-6) for x in (q, k))
        return sharpness * jnp.dot(q, k)

    reason = unsupported(implementation, query, key, value, score=Cosine(jnp.float32(2)))
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")

    @jax.jit
    def program(sharpness):
        def loss(make):
            def function(query, sharpness):
                return attnlib.attention(
                    query, key, value, score=make(sharpness), is_causal=True, **by_name(implementation)
                )

            output, pullback = jax.vjp(function, query, sharpness)
            return output, pullback(jnp.cos(output))

        return loss(Cosine), loss(lambda sharpness: scores.Custom(one_pair, sharpness))

    own, custom = program(jnp.float32(2))
    assert_close(own, custom, length=7)


def test_no_features():
    """Logits of nothing are zero, and attention is the mean."""
    value = jnp.arange(6.0).reshape(1, 3, 1, 2)
    for score in (scores.Dot(), scores.Additive()):
        output = attnlib.attention(jnp.zeros((1, 2, 1, 0)), jnp.zeros((1, 3, 1, 0)), value, score=score)
        assert_close(output, jnp.broadcast_to(value.mean(1, keepdims=True), (1, 2, 1, 2)))


def test_custom_functions_may_capture_arrays(keys):
    """What they capture is as good as a parameter: traced, differentiated twice, not recompiled for."""
    query, key, value = keys.normal(2, 5, 3, 4), keys.normal(2, 7, 3, 4), keys.normal(2, 7, 3, 2)
    matrix, offset = keys.normal(4, 4), keys.normal(4)

    def capturing(matrix, offset):
        return scores.Custom(lambda q, k, shift: jnp.tanh(q @ matrix @ (k + shift["key"])), {"key": offset})

    def explicit(matrix, offset):
        return scores.Custom(lambda q, k, matrix, shift: jnp.tanh(q @ matrix @ (k + shift)), matrix, offset)

    def derivatives(make, implementation, params):
        def loss(*params):
            output = attnlib.attention(query, key, value, score=make(*params), **by_name(implementation))
            return jnp.sum(jnp.sin(output))

        return loss(*params), jax.jvp(jax.grad(loss, (0, 1)), params, params)

    @jax.jit
    def each(*params):
        return [[derivatives(make, name, params) for name in COMPLETE] for make in (capturing, explicit)]

    captured, expected = each(matrix, offset)
    assert_close(captured, expected, length=7)


def test_captured_arrays_may_be_float64():
    with x64(True):
        query, key = (np.random.default_rng(n).normal(size=(1, 3, 1, 4)) for n in range(2))
        table = jax.device_put(np.random.default_rng(2).normal(size=4))
        score = scores.Custom(lambda q, k: jnp.sum(q * k * table))
        output = attnlib.attention(query, key, key, score=score)
        assert_close(output, attnlib.dot_product_attention(query * np.asarray(table), key, key, scale=1.0), length=4)
