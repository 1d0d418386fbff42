"""The numbers of the adapter to cuDNN. What it lowers to and what it refuses: test_cudnn_calls.py.

Without a GPU they are those of a stand-in for `jax.nn.dot_product_attention(implementation="cudnn")`, which computes
the same with plain operations, and has the faults for which the adapter makes up; with one, cuDNN's own.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, Draw, build, like, unsupported
from conftest import assert_close, assert_finite, assert_same, assert_zero

import attnlib
from attnlib import masks, scores

ON_GPU = jax.default_backend() == "gpu"
EPS = float(jnp.finfo(jnp.bfloat16).eps)  # cuDNN's gradients are half-precision, and so what is made of them


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dense(options, *operands):
    is_causal, window, dtypes = options
    assert all(x.ndim == 4 for x in operands[:3]) and {x.dtype for x in operands[:3]} == {dtypes}
    return dense_attention(is_causal, window, *operands)


def dense_attention(is_causal, window, query, key, value, query_lengths, key_lengths):
    """As cuDNN: masked values are multiplied by zero, and rows without keys are undefined."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, 2) for x in (key, value))
    t, s = jnp.arange(query.shape[1])[:, None], jnp.arange(key.shape[1])[None]
    seen = jnp.ones((query.shape[1], key.shape[1]), bool)
    if is_causal:
        seen = seen & (s <= t)
    if window is not None:
        seen = seen & (s >= t - window[0]) & (s <= t + window[1])
    seen = seen[None, None] & (s[None, None] < key_lengths[:, None, None, None])
    logits = jnp.where(seen, jnp.einsum("btnd,bsnd->bnts", query, key) * query.shape[-1] ** -0.5, -jnp.inf)
    logits = jnp.where(key_lengths[:, None, None, None] > 0, logits, jnp.nan)
    output = jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(logits, -1), value)
    padded = query_lengths[:, None] <= t.T
    return jnp.where(padded[..., None, None], 7.0, output)  # anything


def dense_forward(options, *operands):
    return dense(options, *operands), operands


def dense_backward(options, operands, cotangent):
    *operands, query_lengths, key_lengths = operands
    call = functools.partial(dense_attention, *options[:2])
    _, pullback = jax.vjp(lambda *x: call(*x, query_lengths, key_lengths), *operands)
    gradients = [part.astype(options[2]) for part in pullback(cotangent.astype(jnp.float32))]
    return (*gradients, None, None)


dense.defvjp(dense_forward, dense_backward)


def stand_in(query, key, value, *, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size,
             implementation):  # fmt: skip
    """`jax.nn.dot_product_attention`, with a reverse mode alone."""
    assert implementation == "cudnn"
    batch = query.shape[0]
    lengths = [
        jnp.full(batch, array.shape[1]) if given is None else given
        for given, array in ((query_seq_lengths, query), (key_value_seq_lengths, key))
    ]
    assert all(given.shape == (batch,) for given in lengths)
    output = dense((is_causal, local_window_size, query.dtype), query, key, value, *lengths)
    return output.astype(query.dtype)


@pytest.fixture
def cudnn(monkeypatch):
    """A machine on which cuDNN runs, or seems to."""
    if ON_GPU:
        yield
        return
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    yield
    importlib.import_module("attnlib._engine.call").attend.clear_cache()  # what was traced with the stand-in


def half(name, **change):
    shapes = dict(query=(2, 6, 4, 8), key=(2, 8, 2, 8), value=(2, 8, 2, 8), dtype="bfloat16")
    return Case(name, **{**shapes, **change})


CASES = [
    half("plain", second_order=True),
    half("float16", dtype="float16"),
    half("scale", score=lambda draw: scores.Dot(jnp.float32(0.7)), second_order=True),
    half("scale a head", score=lambda draw: scores.Dot(jnp.asarray([0.1, 0.2, 0.7, -0.3]))),
    half("causal", options=dict(is_causal=True)),
    half("causal, more queries", query=(2, 10, 4, 8), options=dict(is_causal=True), second_order=True),
    half("window", mask=lambda draw: masks.SlidingWindow(2, 0)),
    half("window and causal", mask=lambda draw: masks.SlidingWindow(3, 2) & masks.Causal()),
    half("wide window", mask=lambda draw: masks.SlidingWindow(5, 7)),
    half("lengths", mask=lambda draw: masks.Lengths(jnp.asarray([0, 5]), jnp.asarray([7, 0])), second_order=True),
    half("lengths, causal",
         mask=lambda draw: masks.Lengths(jnp.asarray([4, 9]), jnp.asarray([3, -2])) & masks.Causal()),
    half("lengths of both, several", mask=lambda draw: masks.Lengths(4, 6) & masks.Prefix(jnp.asarray([2, 7]))),
    half("unsigned lengths", mask=lambda draw: masks.Lengths(key=jnp.asarray([3, 200], jnp.uint8))),
    half("no key", mask=lambda draw: masks.Prefix(0)),
    half("two axes", query=(2, 2, 3, 4, 8), key=(2, 4, 2, 2, 8), value=(2, 4, 2, 2, 8), options=dict(is_causal=True)),
    half("two batch axes", query=(2, 6, 3, 4, 8), key=(2, 8, 3, 2, 8), value=(2, 8, 3, 2, 8),
         options=dict(attention_axes=1), mask=lambda draw: masks.Lengths(key=draw.integers(0, 9, 2, 3))),
    half("no batch", query=(6, 4, 8), key=(8, 2, 8), value=(8, 2, 8), mask=lambda draw: masks.Lengths(key=5)),
    half("batch of one broadcasts", key=(1, 8, 2, 8), mask=lambda draw: masks.Lengths(key=jnp.asarray([3, 8]))),
]  # fmt: skip


def outputs(case, implementation):
    """(function of what can be differentiated, that)."""
    operands, traced, options = build(case)

    def function(operands):
        return attnlib.attention(**operands, **traced, **options, implementation=implementation)

    return function, operands


# What the adapter makes of a mask are arguments of one call with one derivative: by default one case of each argument
# is derived, and of what the adapter does around the call; the values are compared of all.
DERIVED = (
    "plain", "float16", "scale a head", "causal, more queries", "window", "lengths, causal", "no key", "two batch axes",
    "batch of one broadcasts",
)  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in DERIVED], ids=str)
def test_values(case, cudnn):
    def output(implementation):
        function, operands = outputs(case, implementation)
        return function(operands)

    made, expected = jax.jit(lambda: (output("cudnn"), output("reference")))()
    assert_finite(made)
    assert_close(made, expected, length=8, eps=EPS)


def test_linear_transpose(cudnn):
    """In the value; the table of modes (test_modes.py) has the implementations that take every call."""
    case = next(case for case in CASES if case.name == "lengths, causal")
    function, operands = outputs(case, "cudnn")
    value, cotangent = operands["value"], like(jax.eval_shape(function, operands), 1)

    def of_value(value):
        return function({**operands, "value": value})

    made = jax.jit(jax.linear_transpose(of_value, value))(cotangent)
    assert_close(made, jax.jit(jax.vjp(of_value, value)[1])(cotangent), length=6, eps=EPS)


@pytest.mark.parametrize(
    "case",
    [case if case.name in DERIVED else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_values_and_derivatives(case, cudnn):
    """Forward and reverse mode, against the reference."""

    def everything(implementation):
        function, operands = outputs(case, implementation)
        output, pullback = jax.vjp(function, operands)
        _, tangent = jax.jvp(function, (operands,), (like(operands, 1),))
        return dict(output=output, gradients=pullback(like(output, 2))[0], tangent=tangent)

    made, expected = jax.jit(lambda: (everything("cudnn"), everything("reference")))()
    assert_finite(made)
    assert_close(made, expected, length=8, eps=EPS)


@pytest.mark.parametrize("case", [case for case in CASES if case.second_order], ids=str)
def test_second_derivatives(case, cudnn):
    """Forward over reverse, reverse over reverse and reverse over forward, against the reference."""

    def everything(implementation):
        function, operands = outputs(case, implementation)
        tangents = like(operands, 3)

        def loss(operands):
            return jnp.sum(jnp.sin(function(operands).astype(jnp.float32)))

        def slope(operands):
            return jax.jvp(loss, (operands,), (tangents,))[1]

        _, forward = jax.jvp(jax.grad(loss), (operands,), (tangents,))
        _, pullback = jax.vjp(jax.grad(loss), operands)
        return dict(forward=forward, reverse=pullback(tangents)[0], mixed=jax.grad(slope)(operands))

    made, expected = jax.jit(lambda: (everything("cudnn"), everything("reference")))()
    assert_finite(made)
    assert_close(made, expected, length=16, eps=EPS)


def test_it_ran(cudnn):
    """The suite above did not run something else."""
    for case in CASES:
        operands, traced, options = build(case)
        assert unsupported("cudnn", **operands, **traced, **options) is None, case


@pytest.mark.parametrize(
    "mask",
    [lambda: masks.Causal(), lambda: masks.SlidingWindow(2, 0), lambda: masks.Lengths(jnp.asarray([4, 5]), 5),
     lambda: masks.Lengths(None, jnp.asarray([0, 5])) & masks.Causal()],
    ids=["causal", "window", "lengths", "causal, lengths"],
)  # fmt: skip
def test_what_is_masked_cannot_matter(mask, cudnn):
    """NaN reaches exactly the rows that attend it, and no gradient of the others."""
    draw = Draw(0, "bfloat16")
    clean = draw(2, 8, 4, 8), draw(2, 8, 2, 8), draw(2, 8, 2, 8)
    query, key, value = clean
    query = query.at[1, 2, 3, 0].set(jnp.nan)
    key, value = key.at[:, 6, 1, 0].set(-jnp.inf), value.at[:, 4, 0, 3].set(jnp.nan)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, operands, kept):
        def call(*operands):
            return attnlib.dot_product_attention(*operands, mask=mask(), implementation=implementation)

        output, pullback = jax.vjp(call, *operands)
        return output, pullback(kept.astype(output.dtype))

    expected, _ = run("reference", (query, key, value), jnp.zeros(query.shape, bool))
    kept = ~jnp.isnan(expected)
    assert 0 < np.sum(kept) < kept.size
    output, gradients = run("cudnn", (query, key, value), kept)
    assert_close(output, expected, length=8)
    assert_close(gradients, run("reference", clean, kept)[1], length=8)


def test_padded_rows_are_zero(cudnn):
    draw = Draw(0, "bfloat16")
    query, key = draw(2, 6, 4, 8), draw(2, 8, 2, 8)
    mask = masks.Lengths(jnp.asarray([4, 6]), jnp.asarray([8, 0]))

    def call(query, key):
        return attnlib.dot_product_attention(query, key, key, mask=mask, implementation="cudnn")

    @jax.jit
    def run(query, key):
        output, pullback = jax.vjp(call, query, key)
        return output, *pullback(jnp.ones_like(output))

    output, query_bar, key_bar = map(np.asarray, run(query, key))
    assert_zero((output[0, 4:], output[1], query_bar[0, 4:], query_bar[1], key_bar[1]))
    assert np.all(np.asarray(output[0, :4], np.float32) != 0)


@pytest.mark.parametrize("axes", [(0, None, None, None), (None, 1, 1, None), (2, None, 0, 0), (None, None, None, 0)])
def test_vmap_of_some_operands(axes, cudnn):
    """Values and gradients are those of a loop."""
    draw = Draw(0, "bfloat16")
    shapes = [(2, 6, 4, 8), (2, 8, 2, 8), (2, 8, 2, 8), (2,)]
    shapes = [s if a is None else (*s[:a], 3, *s[a:]) for s, a in zip(shapes, axes, strict=True)]
    *operands, lengths = (*(draw(*shape) for shape in shapes[:3]), draw.integers(0, 9, *shapes[3]))

    def call(query, key, value, lengths):
        def output(*operands):
            mask = masks.Lengths(key=lengths)
            return attnlib.dot_product_attention(*operands, mask=mask, implementation="cudnn")

        made, pullback = jax.vjp(output, query, key, value)
        return made, pullback(jnp.cos(made))

    def one(n):
        pick = [x if a is None else jnp.take(x, n, a) for x, a in zip((*operands, lengths), axes, strict=True)]
        return call(*pick)

    mapped = jax.jit(jax.vmap(call, axes))(*operands, lengths)
    call = jax.jit(call)
    expected = jax.tree.map(lambda *parts: jnp.stack(parts), *map(one, range(3)))
    assert_close(mapped, expected, length=8)


def test_inside_other_transformations(cudnn):
    """The gradient of a gradient of a scan over a rematerialised layer, mapped."""
    draw = Draw(0, "bfloat16")

    def loss(x, implementation):
        @jax.checkpoint
        def layer(x, _):
            return attnlib.dot_product_attention(x, x, x, is_causal=True, implementation=implementation), None

        return jnp.sum(jax.lax.scan(layer, x, None, length=2)[0].astype(jnp.float32) ** 2)

    def squared(x, implementation):
        return jnp.sum(jax.grad(loss)(x, implementation).astype(jnp.float32) ** 2)

    @functools.partial(jax.jit, static_argnums=1)
    def mapped(x, implementation):
        return jax.vmap(lambda x: jax.grad(squared)(x, implementation))(x)

    x = draw(3, 2, 6, 2, 8)
    assert_close(mapped(x, "cudnn"), mapped(x, "reference"), length=64)


def test_lengths_are_traced(cudnn):
    """Other lengths, one compilation."""
    traces = []

    @jax.jit
    def call(query, lengths):
        traces.append(None)
        return attnlib.dot_product_attention(query, query, query, mask=masks.Lengths(lengths), implementation="cudnn")

    query = Draw(0, "bfloat16")(2, 6, 2, 8)
    first, second = (call(query, jnp.asarray(lengths)) for lengths in ([2, 3], [6, 1]))
    assert len(traces) == 1
    assert_zero((first[0, 2:], second[1, 1:]))
    assert_same(first[0, :2], second[0, :2])
