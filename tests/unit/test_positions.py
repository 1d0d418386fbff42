"""Rotary embedding against complex numbers in float64, its laws, its scalings, and its errors."""

import cmath
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, x64

import attnlib
from attnlib.positions import LinearScaling, NTKScaling, RotaryScaling, YaRNScaling, rotary_embedding


def rotated(x, positions, base, pairs):
    """x `(..., D)` with the features of each pair turned as the parts of a complex number."""
    out = np.array(x, np.float64)
    size = 2 * len(pairs)
    for index in np.ndindex(x.shape[:-1]):
        for i, (a, b) in enumerate(pairs):
            angle = float(positions[index]) * base ** (-2 * i / size)
            turned = complex(x[(*index, a)], x[(*index, b)]) * cmath.exp(1j * angle)
            out[(*index, a)], out[(*index, b)] = turned.real, turned.imag
    return out


PAIRS = {True: [(0, 1), (2, 3), (4, 5)], False: [(0, 3), (1, 4), (2, 5)]}


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("given", ["default", "row", "batch", "float", "traced"])
def test_against_complex_numbers(interleaved, given):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)  # 6 of 8 features turn
    made = {"row": rng.integers(0, 90, 5), "batch": rng.integers(0, 90, (2, 5)), "float": rng.normal(size=(2, 1))}
    positions = made.get(given, np.arange(5))
    static = ("base", "features", "interleaved")
    run = jax.jit(rotary_embedding, static_argnames=static) if given == "traced" else rotary_embedding
    out = run(x, None if given == "default" else positions, base=70.0, features=6, interleaved=interleaved)
    everywhere = np.broadcast_to(positions, (2, 5))[..., None].repeat(3, -1)
    assert_close(out, rotated(x, everywhere, 70.0, PAIRS[interleaved]).astype(np.float32), length=64)


@pytest.mark.parametrize("axes", [(1, 2), (2, 1), (-4, -3)])
def test_axial(axes):
    """Each axis turns its own part of the features, as if it were the only one."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 2, 8))
    out = rotary_embedding(x, attention_axes=axes)
    for n, axis in enumerate(axes):
        part = x[..., 4 * n : 4 * n + 4]
        assert_close(out[..., 4 * n : 4 * n + 4], rotary_embedding(part, attention_axes=axis))
    explicit = rotary_embedding(x, [np.arange(x.shape[axis]) for axis in axes], attention_axes=axes)
    assert_close(out, explicit)


def test_dot_products_depend_on_distances():
    with x64():
        q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8))
        logits = [
            float(jnp.sum(rotary_embedding(q, np.array([[a]])) * rotary_embedding(k, np.array([[a - 3]]))))
            for a in (3, 50, 4000)
        ]
    np.testing.assert_allclose(logits, logits[0], rtol=1e-9)


def test_attention_does_not_see_a_shift_and_decodes():
    """The same for positions counted from anywhere; and a query of the end alone gives the last row."""
    q, k, v = jax.random.normal(jax.random.key(1), (3, 2, 7, 3, 8))

    def attend(q, k, query_at, key_at, **options):
        q, k = rotary_embedding(q, query_at), rotary_embedding(k, key_at)
        return attnlib.dot_product_attention(q, k, v, **options)

    at = jnp.arange(7)
    whole = attend(q, k, at, at, is_causal=True)
    assert_close(attend(q, k, at + 100, at + 100, is_causal=True), whole, length=1024)
    assert_close(attend(q[:, -1:], k, at[-1:], at), whole[:, -1:], length=7)


def test_the_two_orders_differ_by_an_order_of_features():
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 6))
    order = np.array([0, 2, 4, 1, 3, 5])
    assert_close(rotary_embedding(x[..., order])[..., np.argsort(order)], rotary_embedding(x, interleaved=True))


@pytest.mark.parametrize(("scaling", "expected"), [
    (LinearScaling(4.0), lambda i: 100.0 ** (-2 * i / 16) / 4),
    (NTKScaling(4.0), lambda i: (100.0 * 4 ** (16 / 14)) ** (-2 * i / 16)),
])  # fmt: skip
def test_scalings(scaling, expected):
    np.testing.assert_allclose(scaling.frequencies(100.0, 16), [expected(i) for i in range(8)], rtol=1e-12)
    assert scaling.magnitude == 1


def test_ntk_slows_the_slowest_pair_by_the_factor_and_the_fastest_not():
    ratio = NTKScaling(8.0).frequencies(1e4, 64) / (1e4 ** (-np.arange(0, 64, 2) / 64))
    np.testing.assert_allclose(ratio[[0, -1]], [1, 1 / 8], rtol=1e-12)


def test_yarn():
    """Pairs that turn 32 times are kept, those that turn less than once are slowed, the others are between."""
    scaling = YaRNScaling(4.0, original_length=2048)
    plain = 1e4 ** (-np.arange(0, 128, 2) / 128)
    turns, ratio = 2048 * plain / (2 * math.pi), scaling.frequencies(1e4, 128) / plain
    step = 1e4 ** (2 / 128)  # ends of the ramp are whole pairs
    np.testing.assert_allclose(ratio[turns > 32 * step], 1)
    np.testing.assert_allclose(ratio[turns < 1 / step], 1 / 4)
    ramp = ratio[(turns <= 32) & (turns >= 1)]
    assert np.all(np.diff(ramp) < 0) and len(ramp) > 20
    np.testing.assert_allclose(np.diff(ramp), np.diff(ramp)[0])
    assert scaling.magnitude == pytest.approx(1 + math.log(4) / 10)
    x = jnp.ones((1, 2, 1, 128))
    assert_close(rotary_embedding(x, scaling=scaling)[:, 0], x[:, 0] * scaling.magnitude)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(dtype):
    """Turned in float32 at least, rounded once."""
    with x64(dtype == "float64"):
        x = jax.random.normal(jax.random.key(0), (1, 50, 2, 8), dtype)
        out = rotary_embedding(x)
        assert out.dtype == dtype
        at = np.arange(50)[None, :, None].repeat(2, -1)
        pairs = [(i, i + 4) for i in range(4)]
        exact = rotated(np.asarray(x, np.float64), at, 1e4, pairs)
        np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=0, atol=4 * float(jnp.finfo(dtype).eps))


def test_derivatives():
    """It is linear in x and keeps lengths: its pullback turns back."""
    x, bar = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 8))
    out, pull = jax.vjp(rotary_embedding, x)
    assert_close(pull(bar)[0], rotary_embedding(bar, -jnp.arange(5)))
    assert_close(jax.jvp(rotary_embedding, (x,), (bar,))[1], rotary_embedding(bar))
    assert_close(jnp.sum(out**2, -1), jnp.sum(x**2, -1), length=8)


X = np.ones((2, 5, 3, 6), np.float32)


@pytest.mark.parametrize(("error", "text", "call"), [
    (TypeError, "x must be a floating-point array; got int32[2, 5, 3, 6]. Write x.astype(jnp.float32).",
     lambda: rotary_embedding(np.ones((2, 5, 3, 6), np.int32))),
    (ValueError, "x must be (*batch and attention axes, heads, features); got shape (5, 6).",
     lambda: rotary_embedding(X[0, :, 0])),
    (ValueError, "features must be a multiple of 2 (pairs for each of 1 attention axes) and at most the 6 of x; got 5. "
     "Rotate fewer with features=4.", lambda: rotary_embedding(X, features=5)),
    (ValueError, "features must be a multiple of 4 (pairs for each of 2 attention axes) and at most the 6 of x; got 6. "
     "Rotate fewer with features=4.", lambda: rotary_embedding(X, attention_axes=(0, 1))),
    (ValueError, "positions must broadcast to the axes of x before heads and features, (2, 5), or have shape (5,), "
     "the length of axis 1; got shape (4,).", lambda: rotary_embedding(X, np.arange(4))),
    (ValueError, "positions must be one array for each of 2 attention axes; got 1.",
     lambda: rotary_embedding(X, [np.arange(5)], attention_axes=(0, 1), features=4)),
    (TypeError, "positions must be a number or an array of real numbers; got bool[5]. Write "
     "positions.astype(jnp.float32).", lambda: rotary_embedding(X, np.ones(5, bool))),
    (ValueError, "factor must be at least 1, new length over old length; got 0.5.", lambda: LinearScaling(0.5)),
    (TypeError, "scaling must be None or a RotaryScaling such as NTKScaling(2.0); got 2.0.",
     lambda: rotary_embedding(X, scaling=2.0)),
    (ValueError, "base must be above 1 with YaRNScaling, so that frequencies differ; got 1.0.",
     lambda: rotary_embedding(X, base=1.0, scaling=YaRNScaling(2.0, 8))),
])  # fmt: skip
def test_errors(error, text, call):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text


def test_scalings_are_static_values():
    """They can be static arguments of a jitted function: equal ones are one program."""
    for a, b in itertools.combinations_with_replacement([LinearScaling(2.0), NTKScaling(2.0), YaRNScaling(2.0, 8)], 2):
        assert isinstance(a, RotaryScaling)
        assert (a == b) == (type(a) is type(b))
        assert a != b or hash(a) == hash(b)
