"""Random arguments of the public functions and classes beside attention itself: they are taken, or refused in words.

As in test_fuzz.py, whose laws these are.
"""

import functools
import inspect as signatures

import fuzzing_calls
import jax
import jax.numpy as jnp
import mask_catalogue
import modifier_catalogue
import numpy as np
import pytest
import score_catalogue
from conftest import fuzz
from fuzzing import few_and_many, wide
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import outcome, whole_tracebacks

import attnlib
from attnlib import inspect, masks, modifiers, positions, scores

__all__ = ["whole_tracebacks"]  # a fixture

OPERANDS = dict(
    query=jax.ShapeDtypeStruct((2, 5, 4, 6), jnp.float32),
    key=jax.ShapeDtypeStruct((2, 7, 2, 6), jnp.float32),
    value=jax.ShapeDtypeStruct((2, 7, 2, 3), jnp.float32),
)
QUERY, KEY, VALUE = (jax.ShapeDtypeStruct((2, 3, *x.shape[2:]), x.dtype) for x in OPERANDS.values())
QUERY_KEY = dict(query=OPERANDS["query"], key=OPERANDS["key"])
RESULT = [((2, 5, 4, 3), "float32")]
ATTENDED = jax.ShapeDtypeStruct((2, 5, 4, 3), jnp.float32)
LSE = jax.ShapeDtypeStruct((2, 4, 5), jnp.float32)
X = jax.ShapeDtypeStruct((2, 5, 12), jnp.float32)
PARAMS = jax.eval_shape(functools.partial(attnlib.init_multi_head_attention, query_features=12, num_heads=4),
                        jax.random.key(0))  # fmt: skip


def used(name, make):
    """What makes a mask, score or modifier, and calls attention with it."""

    def call(operands, **arguments):
        return attnlib.attention(**operands, **{"score": scores.Dot(), name: make(**arguments)})

    return call


def cached(method):
    """A method of a cache that is made in the call."""

    def call(**arguments):
        cache = attnlib.KVCache.create((2,), 9, num_kv_heads=2, key_dim=6, value_dim=3, ragged=True)
        results = getattr(cache, method)(**arguments)
        return jax.tree.leaves(results)

    return call


def paged(method):
    """A method of a cache in pages that is made in the call."""

    def call(**arguments):
        cache = attnlib.PagedKVCache.create(3, 6, 2, 3, num_pages=4, page_size=3)
        return jax.tree.leaves(getattr(cache, method)(**arguments))

    return call


def module(kind, **fields):
    """A module that is made, initialised and applied in the call."""

    def call(inputs, **arguments):
        made = kind(**fields, **arguments)
        return made.init_with_output(jax.random.key(0), inputs, deterministic=True)[0]

    return call


def initialised(**arguments):
    params = attnlib.init_multi_head_attention(**arguments)
    return attnlib.multi_head_attention(params, jnp.ones((1, 3, 12)))


def numbers(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def made(name, row, make, given):
    """What makes a mask, score or modifier and calls attention with it; all its arguments."""
    parameters = signatures.signature(row.kind).parameters.values()
    return used(name, make), {p.name: p.default for p in parameters if p.default is not p.empty} | given


def right_arguments(row):
    """Of a score, with all parameters that are given by name."""
    form = row.last_form if row.make is None else row.forms[row.name]
    return form(numbers, score_catalogue.Fits(4, 6, 6))


# By name: a function, and arguments that are right, any of which may be spoilt.
OF_ATTENTION = {
    row.kind.__name__: made(name, row, make, given)
    for name, row, make, given in [
        *(("mask", row, row.kind, row.first_example) for row in mask_catalogue.ROWS),
        *(("score", row, row, right_arguments(row)) for row in score_catalogue.ROWS),
        *(("score_mod", row, row.kind, row.arguments(numbers, modifier_catalogue.Fits(4, (3,))))
          for row in modifier_catalogue.ROWS),
    ]
}  # fmt: skip
TABLE = OF_ATTENTION | {
    "as_array": (masks.Causal().as_array, dict(query_shape=3, key_shape=(4,))),
    "alibi_slopes": (modifiers.alibi_slopes, dict(num_heads=4)),
    "rotary_embedding": (positions.rotary_embedding,
                         dict(x=OPERANDS["query"], positions=np.arange(5), attention_axes=1, base=100.0, features=4,
                              interleaved=True, scaling=positions.NTKScaling(2.0))),
    "scalings": (lambda x, **fields: positions.rotary_embedding(x, scaling=positions.YaRNScaling(**fields)),
                 dict(x=OPERANDS["query"], factor=2.0, original_length=16, fast=32.0, slow=1.0)),
    "merge_attention": (attnlib.merge_attention,
                        dict(outputs=[ATTENDED, ATTENDED], lses=(LSE, LSE), attention_axes=None)),
    "attention_rows": (inspect.attention_rows,
                       dict(**QUERY_KEY, rows=[0, -1], score=scores.Dot(), implementation="reference")),
    "attention_received": (inspect.attention_received, dict(**QUERY_KEY, mean=True, mask=masks.Causal())),
    "top_keys": (inspect.top_keys, dict(**QUERY_KEY, k=2, implementation="reference")),
    "attention_entropy": (inspect.attention_entropy, dict(**QUERY_KEY, score_mod=None)),
    "init_multi_head_attention": (initialised,
        dict(rng=jax.random.key(0), query_features=12, num_heads=4, key_dim=3, value_dim=2, num_kv_heads=2,
             output_shape=(3, 2), use_bias=True, use_gate=True)),
    "multi_head_attention": (attnlib.multi_head_attention,
        dict(params=PARAMS, query=X, key=X, value=X, attention_axes=1, query_mask=np.ones((2, 5), bool),
             key_mask=np.ones((2, 1), bool), sliding_window=3, rotary=False, normalize_qk=False, query_positions=None,
             key_positions=np.arange(5), dtype=None, bias=None, is_causal=True)),
    "KVCache.create": (lambda **arguments: jax.tree.leaves(attnlib.KVCache.create(**arguments)),
        dict(batch_shape=(2,), capacity=5, num_kv_heads=2, key_dim=3, value_dim=4, dtype="int8", window=3,
             ragged=True)),
    "PagedKVCache.create": (lambda **arguments: jax.tree.leaves(attnlib.PagedKVCache.create(**arguments)),
        dict(num_sequences=2, capacity=6, num_kv_heads=2, key_dim=3, num_pages=4, page_size=3, value_dim=4,
             dtype="bfloat16")),
    "fork": (paged("fork"), dict(source=np.array([0, 1]), target=[2, 0])),
    "release": (paged("release"), dict(which=np.array([True, False, False]))),
    "append": (cached("append"), dict(key=KEY, value=VALUE, lengths=np.array([3, 1]), attention_axes=None)),
    "attend": (cached("attend"), dict(query=OPERANDS["query"], lengths=None, mask=None, is_causal=True,
                                      attention_axes=-3, sink=1.0)),
    "decode": (cached("decode"), dict(query=QUERY, key=KEY, value=VALUE, lengths=None, score=None)),
    "AdditiveAttention": (module(attnlib.AdditiveAttention),
        dict(inputs=X, use_scale=True, attention_axes=1, dropout_rate=0.1, implementation="reference")),
    "DotProductAttention": (module(attnlib.DotProductAttention),
        dict(inputs=X, use_scale=True, score_mode="concat", dropout_rate=0.1, block_sizes=None)),
    "MultiHeadAttention": (module(attnlib.MultiHeadAttention),
        dict(inputs=X, num_heads=4, key_dim=3, value_dim=2, num_kv_heads=2, output_shape=(3, 2), use_bias=False,
             dropout_rate=0.1, use_gate=True, sliding_window=2, rotary=False, normalize_qk="rms", use_sink=True)),
}  # fmt: skip
for name in OF_ATTENTION:
    TABLE[name][1].update(operands=OPERANDS)
WORDS = {name for _, arguments in TABLE.values() for name in arguments}


@pytest.mark.parametrize("name", TABLE)
def test_right_arguments_are_taken(name):
    function, arguments = TABLE[name]
    got = outcome(function, arguments, WORDS)
    assert not isinstance(got, Exception), got


@st.composite
def spoilt(draw):
    name = draw(st.sampled_from(tuple(TABLE)))
    arguments = dict(TABLE[name][1])
    own = [word for word in arguments if word != "operands"]
    for word in draw(st.lists(st.sampled_from(own), min_size=1, max_size=2, unique=True)):
        value = draw(fuzzing_calls.nonsense())
        huge = isinstance(value, int) and abs(value) > 10**6 and name == "alibi_slopes"  # which makes them all
        called = word in ("score_mod", "rotary", "fn") and isinstance(value, type)  # one can be, with its own errors
        arguments[word] = 3 if huge else arguments[word] if called else value
    return name, arguments


@few_and_many(450, 1000)
def test_wrong_arguments_are_refused(examples):
    @fuzz(examples)
    @given(drawn=spoilt())
    def law(drawn):
        name, arguments = drawn
        with wide(arguments):
            got = outcome(TABLE[name][0], arguments, WORDS)
        if name in OF_ATTENTION and not isinstance(got, Exception):
            assert got == RESULT, got

    law()
