"""Additive scores: as exact as tanh for every finite input, every derivative, and no array of all three axes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import x64
from hypothesis import given, settings
from hypothesis import strategies as st

import attnlib
from attnlib import scores
from attnlib.scores._tanh_sum import QUERY, PairSumSpec, PairSumTerm, additive_logits, pair_sum

EPS = float(np.finfo(np.float32).eps)
SIZES = (1e-6, 1e-2, 1.0, 16.0, 31.9, 32.1, 45.0, 100.0, 3e3, 1e6, 3e8, 1e30, 3e38)


def rows(rng, size, count, features):
    """Numbers of a size, float32."""
    return np.clip(size * rng.normal(size=(count, features)), -3e38, 3e38).astype(np.float32)


def cancelling(query, rng):
    """Keys that leave little, or a few tens, of a query: what is left is as exact as float32 holds it."""
    left = np.array([0, 0.25, -0.5, 3.0, 20.0, -40.0, 70.0, -130.0], np.float32)
    return np.concatenate([-query, left[:, None] - query[rng.integers(len(query), size=len(left))]]).astype(np.float32)


@jax.jit
def logits_and_gradients(query, key, scale, cotangent):
    logits, pullback = jax.vjp(additive_logits, query[None, None, None], key[None, None], scale[None, None])
    return logits[0, 0, 0], *(x.reshape(-1, x.shape[-1]) for x in pullback(cotangent[None, None, None]))


def compare(query, key, scale):
    """Logits and gradients of random cotangents against float64, relative to the sum of what is added up."""
    cotangent = np.random.default_rng(1).normal(size=(len(query), len(key))).astype(np.float32)

    logits, query_bar, key_bar, scale_bar = map(np.asarray, logits_and_gradients(query, key, scale, cotangent))
    tanh = np.tanh(query[:, None].astype(np.float64) + key[None])
    slope = (1 - tanh) * (1 + tanh)
    size, g = np.abs(scale.astype(np.float64)), np.abs(cotangent.astype(np.float64))
    assert np.all(np.abs(logits - tanh @ scale) <= 8 * EPS * size.sum())
    for got, wanted, bound in [
        (query_bar, np.einsum("ts,tsd->td", cotangent, slope) * scale, g.sum(1)[:, None] * size),
        (key_bar, np.einsum("ts,tsd->sd", cotangent, slope) * scale, g.sum(0)[:, None] * size),
        (scale_bar, np.einsum("ts,tsd->d", cotangent, tanh)[None], g.sum()),
    ]:
        assert np.all(np.abs(got - wanted) <= 8 * EPS * bound)


@pytest.mark.parametrize("size", SIZES)
def test_exact_at_every_size(size):
    """A few roundings of float32, in the score and all gradients, from 1e-6 up to the largest numbers there are."""
    rng = np.random.default_rng(0)
    query, scale = rows(rng, size, 19, 5), rng.normal(size=5).astype(np.float32)
    key = np.concatenate([rows(rng, size, 7, 5), rows(rng, 1.0, 2, 5), cancelling(query, rng)])
    compare(query, key, scale)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(finite, min_size=6, max_size=6), st.lists(finite, min_size=4, max_size=4), st.data())
def test_exact_for_any_finite_input(query, key, data):
    """The same for what hypothesis thinks of, each with keys that cancel a query to a few tens or less."""
    query, key = np.array(query, np.float32).reshape(3, 2), np.array(key, np.float32).reshape(2, 2)
    left = data.draw(st.lists(st.floats(-50, 50, width=32), min_size=6, max_size=6))
    near = np.array(left, np.float32).reshape(3, 2) - query
    compare(query, np.concatenate([key, near]), np.array([1.0, -0.5], np.float32))


def test_infinity_and_nan():
    """As tanh has it: infinities saturate, opposite ones and NaN give NaN, and no neighbour is touched."""
    numbers = np.array([np.inf, -np.inf, np.nan, 0.5], np.float32)
    query, key = jnp.asarray(numbers).reshape(1, 1, 4, 1), jnp.asarray(numbers).reshape(1, 4, 1)
    logits = additive_logits(query, key, jnp.ones((1, 1, 1)))
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(logits[0, 0], np.tanh(numbers[:, None] + numbers), atol=4 * EPS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_computes_in_float32_at_least(dtype, keys):
    """Against float64 with the same inputs: half precision costs no more than the rounding of the output."""
    with x64():
        query, key, value = (keys.normal(2, 9, 2, 8, dtype=dtype) for _ in range(3))
        scale = keys.normal(8, dtype=dtype)
        attend = jax.jit(lambda *x: attnlib.additive_attention(*x[:3], scale=x[3]))
        output = attend(query, key, value, scale)
        exact = attend(*(x.astype("float64") for x in (query, key, value, scale)))
        assert output.dtype == query.dtype
        eps = float(jnp.finfo(dtype).eps)
        floor = EPS if dtype != "float64" else eps
        np.testing.assert_allclose(output.astype("float64"), exact, rtol=eps / 2 * 1.01, atol=64 * floor)


@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_sums_of_every_order_and_axis(platform, keys, monkeypatch):
    """`pair_sum` against the array it does not make: each order, axis, set of weights and length, in float64.

    What other platforms compute is computed here too.
    """
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, **ways: ways[platform](*arrays))
    with x64():
        sizes = {"t": 5, "s": 18, "d": 33}
        arrays = {axes: keys.normal(2, *(sizes[a] for a in axes), dtype="float64") for axes in ("ts", "td", "sd")}
        query, key = keys.normal(2, 5, 33, dtype="float64"), keys.normal(1, 18, 33, dtype="float64")

        def logistic(y):
            return 1 / (1 + jnp.exp(2 * y))

        orders = [logistic]
        for _ in range(4):
            orders.append(jax.grad(orders[-1]))
        y = np.asarray(query)[:, :, None] + np.asarray(key)[:, None]
        rates = jax.jit(lambda y: [jax.vmap(f)(y.reshape(-1)).reshape(y.shape) for f in orders])(y)
        rates = list(map(np.asarray, rates))
        for axes in arrays:
            first, second = (other for other in arrays if other != axes)
            summed = ({*"tsd"} - {*axes}).pop()
            weights = (arrays[first], arrays[second])
            sums = [
                PairSumSpec(axes, (first, second), (PairSumTerm(order, (0,)), PairSumTerm(0, (1, 0))))
                for order in range(len(rates))
            ]
            made = jax.jit(lambda *x, sums=sums: [pair_sum(what, *x) for what in sums])(query, key, weights)
            for order, (got, rate) in enumerate(zip(made, rates, strict=True)):
                letters = f"btsd,b{first}->b{axes}", f"btsd,b{first},b{second}->b{axes}"
                want = np.einsum(letters[0], rate, weights[0]) + np.einsum(letters[1], rates[0], *weights)
                np.testing.assert_allclose(got, want, atol=1e-12, err_msg=f"order {order}, summed over {summed}")


def test_weights_may_broadcast():
    """One scale for all queries, as additive_logits has it, against the same repeated; gradients have its shape."""
    rng = np.random.default_rng(0)
    query, key, scale = (
        jax.device_put(rng.normal(size=s).astype(np.float32)) for s in ((1, 4, 3), (1, 6, 3), (1, 1, 3))
    )
    what = PairSumSpec("ts", (QUERY,), (PairSumTerm(0, (0,)),))

    def total(scale):
        return jnp.sum(jnp.sin(pair_sum(what, query, key, (scale,))))

    gradient = jax.jit(jax.grad(total))
    one, all_ = gradient(scale), gradient(jnp.broadcast_to(scale, query.shape))
    assert one.shape == scale.shape
    np.testing.assert_allclose(one, all_.sum(1, keepdims=True), rtol=1e-5)


DERIVATIVES = {
    "forward": lambda f: f,
    "jvp": lambda f: lambda *x: jax.jvp(f, x, x)[1],
    "gradient": lambda f: jax.grad(lambda *x: jnp.sum(f(*x) ** 2), (0, 1, 2)),
    "second order": lambda f: lambda *x: jax.jvp(jax.grad(lambda *x: jnp.sum(f(*x) ** 2), (0, 1, 2)), x, x)[1],
}


@pytest.mark.measured
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_no_array_of_queries_keys_and_features(derivative):
    """The largest array of the compiled program, fused ones included, holds far less than T * S * D numbers."""
    length, features = 160, 40

    def program(score):
        def attend(*operands):
            return attnlib.attention(*operands, score=score, implementation="blockwise")

        operand = jax.ShapeDtypeStruct((1, length, 1, features), jnp.float32)
        return jax.jit(DERIVATIVES[derivative](attend)).lower(operand, operand, operand).compile().as_text()

    def largest(text):
        return max(np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", text))

    assert largest(program(scores.Additive(jnp.ones(features)))) <= 4 * length * length
    if derivative == "forward":  # the count sees one where there is one
        assert largest(program(scores.Custom(lambda q, k: jnp.sum(jnp.tanh(q + k))))) >= 16 * 16 * features


def test_the_default_scale_is_planned_like_a_scale_of_ones():
    """The score makes the default while it is prepared. Tiles of one head at a time took 1.4 times as long."""
    operand = jax.ShapeDtypeStruct((4, 256, 1, 128), jnp.float32)
    default, given = (
        attnlib.explain(operand, operand, operand, score=score)
        for score in (scores.Additive(), scores.Additive(jnp.ones(128)))
    )
    assert default.block_sizes == given.block_sizes
    assert default.memory == given.memory
