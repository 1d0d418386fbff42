"""Modes of JAX that forbid what JAX does silently: ranks that are promoted, dtypes that are promoted.

The modes change no number, so programs with their gradients are traced here and not run.
"""

import cases
import jax
import jax.numpy as jnp
import pytest

import attnlib
from attnlib import inspect, masks, modifiers, positions


@pytest.fixture(autouse=True)
def forbid_promotion():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def trace_gradient(function, *args):
    """Traces the function and its gradient by the floating-point leaves of the first argument."""

    def loss(first, *args):
        leaves = [x for x in jax.tree.leaves(function(first, *args)) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum(jnp.sum(x.astype(jnp.float32)) for x in leaves)

    jax.eval_shape(jax.grad(loss), *args)


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_attention_promotes_nothing(case):
    for name in cases.COMPLETE:
        if cases.refusal(case, name) is None:
            with cases.context(case):
                operands, traced, options = cases.build(case)
                trace_gradient(lambda *args: cases.run(*args, options, name), operands, traced)  # noqa: B023


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


LAYERS = {
    "plain": attnlib.MultiHeadAttention(4),
    "grouped, rotary, norms, sinks": attnlib.MultiHeadAttention(
        4, num_kv_heads=2, rotary=True, normalize_qk=True, use_sink=True
    ),
    "half precision": attnlib.MultiHeadAttention(4, rotary=True, normalize_qk=True, dtype=jnp.bfloat16),
    "relative bias": attnlib.MultiHeadAttention(4, score_mod=attnlib.RelativePositionBias(sizes=(10,))),
    "bucketed bias": attnlib.MultiHeadAttention(4, score_mod=attnlib.BucketedPositionBias()),
    "additive": attnlib.AdditiveAttention(),
    "concat": attnlib.DotProductAttention(score_mode="concat", use_scale=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_promote_nothing(name):
    layer, x = LAYERS[name], shape(2, 10, 16, dtype="bfloat16" if "half" in name else "float32")
    options = dict(query_mask=jnp.ones((2, 10), bool), is_causal=True)
    params = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x), x)
    trace_gradient(lambda x, params: layer.apply(params, x, **options), x, params)
    if params:
        trace_gradient(lambda params, x: layer.apply(params, x, **options), params, x)


OPERANDS = shape(2, 10, 4, 8), shape(2, 9, 2, 8)


FUNCTIONS = {
    "rotary": (positions.rotary_embedding, [shape(2, 10, 4, 8)]),
    "rotary, half precision": (positions.rotary_embedding, [shape(2, 10, 4, 8, dtype="bfloat16")]),
    "rotary, positions": (positions.rotary_embedding, [shape(2, 10, 4, 8), shape(2, 10, dtype="int32")]),
    "entropy": (lambda q, k: inspect.attention_entropy(q, k, is_causal=True, sink=jnp.zeros(4)), OPERANDS),
    "received": (lambda q, k: inspect.attention_received(q, k, is_causal=True, mean=True), OPERANDS),
    "top keys": (lambda q, k: inspect.top_keys(q, k, k=3, mask=masks.SlidingWindow(4, 0))[0], OPERANDS),
    "rows": (
        lambda q, k: inspect.attention_rows(
            q, k, rows=[1, 2], mask=masks.Lengths(key=jnp.array([3, 4])), score_mod=modifiers.ALiBi(jnp.ones(4))
        ),
        OPERANDS,
    ),
    "merge": (lambda o, lse: attnlib.merge_attention([o, o], [lse, lse]), [OPERANDS[0], shape(2, 4, 10)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_promote_nothing(name):
    function, args = FUNCTIONS[name]
    trace_gradient(function, *args)


@pytest.mark.parametrize("options", [{}, dict(window=8), dict(ragged=True), dict(dtype=jnp.bfloat16)], ids=str)
def test_caches_promote_nothing(options):
    def decode(query, key):
        key = key.astype(options.get("dtype", key.dtype))
        cache = attnlib.KVCache.create((2,), 16, 2, 8, **options).append(key, key)
        return cache.attend(query.astype(key.dtype))

    trace_gradient(decode, shape(2, 4, 4, 8), shape(2, 4, 2, 8))
