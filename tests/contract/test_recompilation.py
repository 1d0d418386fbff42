"""Contract line 9: traced values never recompile; only shapes, dtypes and static options do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NAMES, by_name, unsupported

import attnlib
from attnlib import masks, modifiers, scores
from attnlib._engine.call import attend

SHAPES = dict(query=(2, 5, 2, 4), key=(2, 5, 2, 4), value=(2, 5, 2, 3))
BATCH, LENGTH = 2, 5


def distance(query, key, sharpness):
    return -sharpness * jnp.sum((query - key) ** 2)


def tilted_by(table):
    return lambda logit, batch, head, i, j: logit + table[head] * j.astype(logit.dtype)


# Each gives the options of a call, with values that depend on n only in traced places.
TRACED = {
    "operands": lambda n: {},
    "scale": lambda n: dict(score=scores.Dot(0.5 + n)),
    "scale, a Python number": lambda n: dict(score=scores.Additive(float(n))),
    "custom parameters": lambda n: dict(score=scores.Custom(distance, jnp.float32(n))),
    "bias": lambda n: dict(bias=np.full((LENGTH,), n, np.float32)),
    "mask array": lambda n: dict(mask=np.arange(LENGTH) <= n),
    "causal offset": lambda n: dict(mask=masks.Causal(np.array(n))),
    "causal offset a batch index": lambda n: dict(mask=masks.Causal(np.array([n, n + 1]))),
    "lengths": lambda n: dict(mask=masks.Lengths(query=np.array([n, 3]), key=np.array(n))),
    "prefix": lambda n: dict(mask=masks.Prefix(np.array([n, n]))),
    "key padding": lambda n: dict(mask=masks.KeyPadding(np.arange(LENGTH) <= n)),
    "query padding": lambda n: dict(mask=masks.QueryPadding(np.arange(LENGTH) <= n)),
    "segments": lambda n: dict(mask=masks.Segments(np.arange(LENGTH) // (n + 1), padding_id=np.array(n))),
    "composed": lambda n: dict(mask=~masks.Dense(np.full((1, LENGTH), n > 1)) | masks.Causal(np.array(n))),
    "captured table": lambda n: dict(score_mod=tilted_by(jnp.full(2, n, jnp.float32))),
    "slopes": lambda n: dict(score_mod=modifiers.ALiBi(np.full(2, n, np.float32))),
    "sink": lambda n: dict(sink=float(n)),
    "positions": lambda n: dict(mask=masks.Causal(), query_positions=np.arange(LENGTH) // n),
    "dropout key": lambda n: dict(dropout_rate=0.5, dropout_rng=jax.random.key(n)),
    "raw dropout key": lambda n: dict(dropout_rate=0.5, dropout_rng=jax.random.PRNGKey(n)),
}  # fmt: skip

STATIC = {
    "causal": lambda n: dict(is_causal=bool(n % 2)),
    "offset, a Python int": lambda n: dict(mask=masks.Causal(n)),
    "rate": lambda n: dict(dropout_rate=0.1 + 0.1 * n, dropout_rng=jax.random.key(0)),
    "shape of the bias": lambda n: dict(bias=np.zeros((1,) * n, np.float32)),
}


def call(options, n, implementation):
    draw = np.random.default_rng(n)
    operands = {name: draw.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    arguments = {"score": scores.Dot(), **operands, **options}
    reason = unsupported(implementation, **arguments)
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")
    return attnlib.attention(**arguments, **by_name(implementation))


def compiled_by(options_of, implementation, calls):
    """How many programs each call adds, and the results."""
    counts, results = [], []
    for n in calls:
        before = attend._cache_size()
        results.append(np.asarray(call(options_of(n), n, implementation)))
        counts.append(attend._cache_size() - before)
    return counts, results


@pytest.fixture(autouse=True)
def empty_cache():
    attend.clear_cache()


# What is static and what is traced is settled before the implementation, but that tiles are planned by what is static:
# `reference` is asked by default for one option of each argument.
OF_REFERENCE = ("operands", "scale", "bias", "composed", "captured table", "sink", "positions", "dropout key")


def slow_or_not(name, implementation):
    return pytest.mark.slow if implementation == "reference" and name not in OF_REFERENCE else ()


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(name, implementation, marks=slow_or_not(name, implementation))
        for name in TRACED
        for implementation in NAMES
    ],
)
def test_traced_values_do_not_recompile(implementation, name):
    counts, results = compiled_by(TRACED[name], implementation, (1, 2, 3))
    assert counts == [1, 0, 0]
    assert not np.array_equal(results[0], results[1])


@pytest.mark.parametrize("name", STATIC)
def test_static_options_do_recompile(name):
    """So that the test above can fail."""
    counts, _ = compiled_by(STATIC[name], "reference", (1, 2))
    assert counts == [1, 1]


def test_the_same_call_does_not_recompile():
    """Equal static options made anew, and functions passed again, are the same program."""

    def predicate(q, k):
        return k <= q

    def options(n):
        del n
        return dict(mask=masks.Predicate(predicate) & masks.SlidingWindow(2, 1) & masks.Neighborhood((3,)),
                    attention_axes=[1], logits_soft_cap=5)  # fmt: skip

    assert compiled_by(options, "reference", (1, 2))[0] == [1, 0]


def test_layers_do_not_recompile():
    """A jitted step over the module compiles once for any lengths, parameters and dropout keys."""
    layer = attnlib.MultiHeadAttention(num_heads=2, dropout_rate=0.5)
    x = np.ones((2, 5, 4), np.float32)
    variables = layer.init(jax.random.key(0), x, deterministic=True)
    traces = []

    @jax.jit
    def step(variables, x, lengths, key):
        traces.append(None)
        mask = masks.Lengths(key=lengths)
        return layer.apply(variables, x, mask=mask, deterministic=False, rngs={"dropout": key})

    for n in range(1, 4):
        step(jax.tree.map(lambda p, n=n: p * n, variables), x * n, np.array([n, 5]), jax.random.key(n))
    assert len(traces) == 1
    assert step._cache_size() == 1


def test_lowering_traces_nothing_again():
    """What a call traces is traced once: differentiating and lowering find it."""
    traced = []

    class Counted(scores.Score):
        def block(self, query, key, precision=None):
            traced.append(query.shape)
            return scores.Dot().block(query, key, precision)

    def gradient(operands):
        results, pullback = jax.vjp(lambda operands: attend_counted(operands), operands)
        return pullback(results)

    def attend_counted(operands):
        return attnlib.attention(**operands, score=Counted(), **by_name("blockwise"))

    operands = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    jax.eval_shape(attend_counted, operands)
    forward = len(traced)
    assert forward >= 1
    jax.jit(attend_counted).lower(operands)
    assert len(traced) == forward
    jax.jit(gradient).trace(operands)
    assert len(traced) == forward
