"""Memory is a promise: the compiler's own count of temporaries of the tiled implementation, growing with length."""

import functools

import jax
import jax.numpy as jnp
import pytest

import attnlib
from attnlib import masks, modifiers, scores
from attnlib._engine.blockwise.implementation import blockwise

pytestmark = pytest.mark.measured
HEADS, FEATURES = 2, 64
ALL_HEADS = blockwise("all_heads")
LENGTH = 16384
# Of a program for so many positions. One square of logits is 2147 MB, so a program within its limit makes none.
LIMITS_MB = {"forward": 60, "jvp": 90, "grad": 90, "forward over reverse": 200, "grad of grad": 250}
SCORES = {
    "dot": lambda: scores.Dot(),
    "additive": lambda: scores.Additive(jnp.ones(FEATURES)),
}
OPTIONS = {
    "plain": lambda length: {},
    "causal with dropout": lambda length: dict(is_causal=True, dropout_rate=0.1, dropout_rng=jax.random.key(0)),
    "modified, with a sink": lambda length: dict(score_mod=modifiers.ALiBi(modifiers.alibi_slopes(HEADS)), sink=0.5),
    "relative bias": lambda length: dict(score_mod=modifiers.RelativeBias(jnp.ones((65, HEADS))), is_causal=True),
    "one tile": lambda length: dict(block_sizes=(length, length)),
    "segments": lambda length: dict(mask=masks.Segments(jnp.arange(length) // 300) & masks.Causal()),
}


@functools.cache
def temporaries(length, score, option, derivative, implementation=None):
    """Megabytes of temporaries that the compiled program needs."""

    def forward(query, key, value):
        options = OPTIONS[option](length)
        return attnlib.attention(query, key, value, score=SCORES[score](), implementation=implementation, **options)

    def loss(*operands):
        return jnp.sum(jnp.sin(forward(*operands)))

    gradient = jax.grad(loss, (0, 1, 2))
    programs = {
        "forward": forward,
        "jvp": lambda q, k, v: jax.jvp(forward, (q, k, v), (k, v, q))[1],
        "grad": gradient,
        "forward over reverse": lambda q, k, v: jax.jvp(gradient, (q, k, v), (k, v, q))[1],
        "grad of grad": jax.grad(lambda *x: sum(jnp.sum(jnp.cos(g)) for g in gradient(*x)), (0, 1, 2)),
    }
    operand = jax.ShapeDtypeStruct((1, length, HEADS, FEATURES), jnp.float32)
    compiled = jax.jit(programs[derivative]).lower(operand, operand, operand).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


CASES = [("dot", option, d) for option in ("plain", "causal with dropout") for d in LIMITS_MB]
CASES += [("additive", "plain", d) for d in LIMITS_MB] + [("additive", "causal with dropout", "grad")]
CASES += [("dot", "segments", "grad"), ("dot", "relative bias", "grad")]
CASES += [("dot", "modified, with a sink", d) for d in ("forward", "jvp", "grad", "forward over reverse")]
# Each score, option and derivative, and by default each of them once or twice.
CHOSEN = [
    ("dot", "plain", "forward"), ("dot", "causal with dropout", "jvp"), ("dot", "plain", "forward over reverse"),
    ("dot", "segments", "grad"), ("dot", "modified, with a sink", "grad"),
    ("dot", "causal with dropout", "grad of grad"), ("additive", "plain", "grad"),
]  # fmt: skip


def or_slow(cases, chosen):
    assert set(chosen) <= set(cases)
    return [case if case in chosen else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("score", "option", "derivative"), or_slow(CASES, CHOSEN))
def test_no_square_of_logits(score, option, derivative):
    assert temporaries(LENGTH, score, option, derivative) <= LIMITS_MB[derivative]


AT_ONCE = [("plain", d) for d in LIMITS_MB] + [("causal with dropout", "grad")]


@pytest.mark.parametrize(
    ("option", "derivative"),
    or_slow(AT_ONCE, [("plain", "forward"), ("causal with dropout", "grad")]),
)
def test_no_square_of_logits_with_all_heads_at_once(option, derivative):
    """As on several devices; on this one, heads are computed in turn."""
    assert temporaries(LENGTH, "dot", option, derivative, ALL_HEADS) <= LIMITS_MB[derivative]


GROWTH = [(*case, None) for case in CASES] + [("dot", *case, ALL_HEADS) for case in AT_ONCE]


@pytest.mark.parametrize(
    ("score", "option", "derivative", "implementation"),
    or_slow(GROWTH, [("dot", "plain", "forward", None), ("dot", "segments", "grad", None)]),
)
def test_linear_in_length(score, option, derivative, implementation):
    long, half = (temporaries(n, score, option, derivative, implementation) for n in (LENGTH, LENGTH // 2))
    assert long <= 2.4 * half


@pytest.mark.parametrize(
    ("keys", "mask"),
    or_slow(
        [(keys, mask) for keys in (32768, 32771) for mask in (None, "lengths")], [(32768, None), (32771, "lengths")]
    ),
)
def test_decoding_copies_no_keys(keys, mask):
    """Not even where the length is no multiple of anything; in megabytes: the keys have 67."""
    query, key = (jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32) for length in (1, keys))
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)

    def program(query, key, value, lengths):
        return attnlib.dot_product_attention(query, key, value, mask=masks.Lengths(key=lengths) if mask else None)

    explained = attnlib.explain(query, key, key)
    assert explained.implementation == "blockwise"
    half = jax.ShapeDtypeStruct(key.shape, jnp.bfloat16)
    assert attnlib.explain(query, half, half).implementation == "reference"  # converting copies them anyhow
    compiled = jax.jit(program).lower(query, key, key, lengths).compile()
    counted = compiled.memory_analysis().temp_size_in_bytes
    assert counted / 1e6 <= 67 / 3
    assert counted / 2 <= explained.memory <= counted * 2


LOOPS = [("dot", False), ("dot", True), ("additive", False)]


@pytest.mark.parametrize(("score", "checkpoint"), or_slow(LOOPS, [("dot", True)]))
def test_no_square_of_logits_in_a_loop_of_the_user(score, checkpoint):
    """A model's loop over layers or examples is differentiated as a whole, twice: the tiles in it stay tiles."""

    def loss(examples):
        def one(x):
            options = dict(score=SCORES[score](), implementation="blockwise", block_sizes=(512, 512))
            return jnp.sum(jnp.sin(attnlib.attention(x, x, x, **options)))

        return jnp.sum(jax.lax.map(jax.checkpoint(one) if checkpoint else one, examples))

    program = jax.grad(lambda examples: jnp.sum(jnp.cos(jax.grad(loss)(examples))))
    compiled = jax.jit(program).lower(jax.ShapeDtypeStruct((2, 1, 8192, 1, FEATURES), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes / 1e6 <= 150  # a square of logits is 268 MB


def test_the_count_sees_a_square():
    """The assertion above can fail: of the reference, at an eighth of the length, one square of logits is counted."""
    square = HEADS * 2048**2 * 4 / 1e6
    assert temporaries(2048, "dot", "plain", "forward", implementation="reference") >= square


@pytest.mark.parametrize(
    ("score", "option", "length"),
    [("dot", "plain", 8192), ("dot", "causal with dropout", 8192), ("additive", "plain", 8192),
     ("dot", "one tile", 1024)],
)  # fmt: skip
def test_explain_estimates_it(score, option, length):
    """Of long operands most of it is the operands and sums over tiles, of one tile its logits and weights."""
    operand = jax.ShapeDtypeStruct((1, length, HEADS, FEATURES), jnp.float32)
    explained = attnlib.explain(operand, operand, operand, score=SCORES[score](), **OPTIONS[option](length))
    assert explained.implementation == "blockwise"
    counted = temporaries(length, score, option, "forward")
    assert counted / 2 <= explained.memory / 1e6 <= counted * 2


@pytest.mark.parametrize("mask", [None, "neighborhood", "dense bias"])
def test_window_and_bias_keep_it_linear(mask):
    """No array of all pairs is made unless the user gave one."""

    def program(query, key, value, bias):
        options = {"neighborhood": dict(mask=masks.Neighborhood(65)), "dense bias": dict(bias=bias)}.get(mask, {})
        return jax.grad(lambda q: jnp.sum(attnlib.dot_product_attention(q, key, value, **options)))(query)

    operand = jax.ShapeDtypeStruct((1, 8192, HEADS, FEATURES), jnp.float32)
    bias = jax.ShapeDtypeStruct((1, 8192), jnp.float32)  # the same for all queries: its own size is linear
    compiled = jax.jit(program).lower(operand, operand, operand, bias).compile()
    assert compiled.memory_analysis().temp_size_in_bytes / 1e6 < HEADS * 8192**2 * 4 / 1e6 / 8
