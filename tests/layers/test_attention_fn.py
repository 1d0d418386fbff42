"""The drop-in for Flax's own modules: the same numbers as with Flax's function, and errors for what it cannot do."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from flax import nnx

import attnlib

X, Y = (jax.device_put(np.random.default_rng(0).normal(size=(2, n, 12)).astype(np.float32)) for n in (5, 7))
CAUSAL = jax.jit(nn.make_causal_mask)(np.asarray(X)[..., 0])
PADDING = jax.jit(nn.make_attention_mask)(np.arange(5) < np.array([[5], [3]]), np.arange(7) < np.array([[6], [2]]))
PADDING = jax.jit(lambda mask: mask.at[..., 0].set(1))(PADDING)  # no empty rows, which Flax averages


def linen(function, **fields):
    return nn.MultiHeadDotProductAttention(num_heads=3, **fields, **({"attention_fn": function} if function else {}))


def both(run):
    """What `run` gives with ours and with Flax's function, of one program."""
    return jax.jit(lambda: (run(attnlib.attention_fn), run(None)))()


@pytest.mark.parametrize(("inputs", "mask"), [((X,), None), ((X,), CAUSAL), ((X, Y), PADDING), ((X, Y), PADDING != 0),
                                              ((X, Y), np.arange(7) < 4)])  # fmt: skip
def test_linen(inputs, mask):
    """Both implementations and Flax's function in one program."""
    assert CAUSAL.dtype == jnp.float32, "Flax's masks are numbers"

    @jax.jit
    def each(*inputs):
        variables = linen(None).init(jax.random.key(2), *inputs)

        def run(function):
            def loss(variables):
                output = linen(function).apply(variables, *inputs, mask=mask)
                return jnp.sum(jnp.sin(output)), output

            return jax.grad(loss, has_aux=True)(variables)

        ours = [functools.partial(attnlib.attention_fn, implementation=name) for name in ("blockwise", "reference")]
        return [run(function) for function in (None, *ours)]

    expected, *ours = each(*inputs)
    for made in ours:
        assert_close(made, expected, length=14)


def test_linen_sows_weights():
    def run(function):
        layer = linen(function)
        variables = layer.init(jax.random.key(2), X)
        return layer.apply(variables, X, mask=CAUSAL, sow_weights=True, mutable="intermediates")

    assert_close(*both(run), length=12)


def test_linen_decodes():
    def run(function):
        layer = linen(function, decode=True)
        variables = layer.init(jax.random.key(2), X)
        outputs = []
        for t in range(5):
            output, updated = layer.apply(variables, X[:, t : t + 1], mutable="cache")
            variables = variables | updated
            outputs.append(output)
        return jnp.concatenate(outputs, 1)

    ours, theirs = both(run)
    assert_close(ours, theirs, length=12)
    whole = jax.jit(lambda: linen(None).init_with_output(jax.random.key(2), X, mask=CAUSAL)[0])()
    assert_close(ours, whole, length=12)


@pytest.mark.parametrize("mask", [None, CAUSAL, np.asarray(CAUSAL, bool)])
def test_nnx(mask):
    def run(function):
        options = {"attention_fn": function} if function else {}
        layer = nnx.MultiHeadAttention(3, 12, decode=False, rngs=nnx.Rngs(0), **options)

        def loss(layer):
            output = layer(X, mask=mask)
            return jnp.sum(jnp.sin(output)), output

        gradients, output = nnx.grad(loss, has_aux=True)(layer)
        return jax.tree.leaves(nnx.state(gradients)), output

    assert_close(*both(run), length=14)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")  # of nnx itself
def test_nnx_sows_weights():
    def run(function):
        options = {"attention_fn": function} if function else {}
        layer = nnx.MultiHeadAttention(3, 12, decode=False, rngs=nnx.Rngs(0), **options)
        layer(X, mask=CAUSAL, sow_weights=True)
        (weights,) = jax.tree.leaves(nnx.state(layer, nnx.Intermediate))
        return weights

    ours, theirs = both(run)
    assert ours.shape == (2, 3, 5, 5)
    assert_close(ours, theirs, length=12)


@pytest.mark.usefixtures("allow_promotion")
def test_bias_and_missing_axes():
    """Whatever broadcasts from the right, as in Flax."""
    rng = np.random.default_rng(3)
    q, k = rng.normal(size=(2, 2, 4, 5, 3, 8)).astype(np.float32)
    for shape in [(5,), (5, 5), (3, 1, 5), (4, 1, 5, 5), (2, 1, 3, 5, 1)]:
        bias = rng.normal(size=shape).astype(np.float32)
        mask = bias > -0.5
        mask[..., :1] = True
        each = jax.jit(lambda *x: [function(*x) for function in (attnlib.attention_fn, nn.dot_product_attention)])
        assert_close(*each(q, k, k, bias, mask), length=8)


@pytest.mark.usefixtures("allow_promotion")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_dtype(dtype):
    q = X.reshape(2, 5, 3, 4)
    ours, theirs = (
        f(q.astype(jnp.float16), q, q, dtype=dtype) for f in (attnlib.attention_fn, nn.dot_product_attention)
    )
    assert_close(ours, theirs, eps=float(jnp.finfo(ours.dtype).eps), length=5)
    half = attnlib.attention_fn(q, q, q, promote_dtype=lambda arrays, dtype: [x.astype(jnp.float16) for x in arrays])
    assert half.dtype == jnp.float16


def test_is_causal():
    q = X.reshape(2, 5, 3, 4)
    assert_close(attnlib.attention_fn(q, q, q, is_causal=True), attnlib.attention_fn(q, q, q, mask=CAUSAL), length=5)


def test_dropout():
    """Its mean over many keys is the output without, and the same key gives the same."""
    layer = linen(attnlib.attention_fn, dropout_rate=0.3, broadcast_dropout=False)
    variables = jax.jit(lambda: layer.init(jax.random.key(2), X, deterministic=True))()
    run = jax.jit(jax.vmap(lambda rng: layer.apply(variables, X, deterministic=False, rngs={"dropout": rng})))
    outputs = run(jax.random.split(jax.random.key(5), 2000))
    expected, off = jax.jit(
        lambda variables: (linen(None).apply(variables, X), layer.apply(variables, X, deterministic=True))
    )(variables)
    outputs, expected = np.asarray(outputs), np.asarray(expected)
    error = np.abs(np.mean(outputs, 0) - expected) / (np.std(outputs, 0) / 2000**0.5)
    assert np.max(error) < 5
    assert np.min(np.std(outputs, 0)) > 0
    assert_close(np.asarray(run(jax.random.split(jax.random.key(5), 2000)))[7], outputs[7])
    assert_close(off, expected, length=12)


@pytest.mark.parametrize(("text", "options"), [
    ("attnlib.attention_fn drops each weight independently, not the same weights for all batch indices and heads; set "
     "broadcast_dropout=False in the module.", dict(dropout_rate=0.1)),
    *((f"attnlib.attention_fn computes its matrix products itself; leave {name}=None.", {name: jnp.einsum})
      for name in ("einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum")),
    ("attnlib.attention_fn has no rotary embedding; leave input_positions=None. Apply "
     "attnlib.positions.rotary_embedding to query and key, or use attnlib.MultiHeadAttention(rotary=True).",
     dict(input_positions=np.arange(5))),
])  # fmt: skip
def test_errors(text, options):
    q = X.reshape(2, 5, 3, 4)
    with pytest.raises(ValueError) as caught:
        attnlib.attention_fn(q, q, q, **options)
    assert str(caught.value) == text
