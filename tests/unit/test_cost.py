"""What `explain` says of operations and bytes, against the compiler's own count of both.

XLA counts the body of a loop once, whatever its steps, so most programs here have one tile. It counts exponentials and
the like apart; `explain` counts them in. A program as it is written is counted alike within a few percent; of one that
is compiled, XLA counts too what its fusions compute again, and not what it could simplify.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from cases import BY_NAME, CASES, COMPLETE, build, context, features, refusal
from covering import covering

import attnlib
from attnlib import masks, scores
from attnlib._engine import dispatch as _choose
from attnlib._engine.blockwise.implementation import blockwise
from attnlib._engine.cost import operations

# Without pairs XLA has nothing left to count; `reference` prepares operands that nothing uses.
WITHOUT_PAIRS = ("0 queries, 7 keys", "5 queries, 0 keys", "no keys, causal", "no batch entries")
# A product with one number, a sum of one, and adding a zero (its batch index) are simplified away before XLA counts.
WITH_ONE = {"13 queries, 1 keys": 0.12, "one feature": 0.08, "score_mod, no batch": 0.08}


def of_xla(program):
    """What XLA counts of a program, lowered or compiled."""
    counts = program.cost_analysis()
    return counts[0] if isinstance(counts, list) else counts


def operations_of_xla(program):
    counts = of_xla(program)
    return counts.get("flops", 0) + counts.get("transcendentals", 0)


def both(*operands, **options):
    """(the lowered program of a call, of which arrays are arguments, what is explained of it)."""
    traced = {name: options.pop(name) for name in ("score", "mask", "bias", "dropout_rng") if name in options}
    traced.setdefault("score", scores.Dot())
    program = jax.jit(lambda operands, traced: attnlib.attention(*operands, **traced, **options))
    return program.lower(operands, traced), attnlib.explain(*operands, **traced, **options)


def of_case(case, **options):
    operands, traced, static = build(case)
    arrays = [operands.pop(name) for name in ("query", "key", "value")]
    return both(*arrays, **operands, **traced, **static, **options)


def one_tile(name, length=128):
    return dict(implementation=name, block_sizes=(length, length) if name == "blockwise" else None)


def operand(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


# By default each feature of a case is counted on each implementation, and each case with a tolerance of its own on one.
WITH_PAIRS = [case for case in CASES if case.name not in WITHOUT_PAIRS]
COUNTED = [(case, name) for name in COMPLETE for case in WITH_PAIRS if refusal(case, name) is None]


def counted(one):
    case, name = one
    return {(name, feature) for feature in features(case)} | ({case.name} & WITH_ONE.keys())


FEW = covering(COUNTED, counted)


@pytest.mark.parametrize(
    ("case", "name"), [pytest.param(*one, marks=() if one in FEW else pytest.mark.slow) for one in COUNTED], ids=str
)
def test_operations_of_the_table(case, name):
    with context(case):
        program, explained = of_case(case, **one_tile(name), return_lse=True)
    assert explained.flops == pytest.approx(operations_of_xla(program), rel=WITH_ONE.get(case.name, 0.05))


# Operands and options, of sizes at which products prevail as they do in practice.
LARGER = {
    "dot": ([operand(2, 128, 4, 64)] * 3, {}),
    "grouped": ([operand(2, 128, 8, 64), *[operand(2, 96, 2, 64)] * 2], {}),
    "causal": ([operand(2, 128, 4, 64)] * 3, dict(is_causal=True)),
    "two axes": ([operand(2, 8, 12, 4, 64)] * 3, dict(attention_axes=(1, 2))),
    "bias and cap": ([operand(2, 128, 4, 64)] * 3, dict(bias=operand(128, 128), logits_soft_cap=20.0)),
    "additive": ([operand(2, 64, 3, 4)] * 3, dict(score=scores.Additive(operand(4)))),  # one pass of its loop
}
# XLA knows that a factor of the fast additive score is one of a few numbers, and simplifies.
COMPILED = {("additive", "blockwise"): 0.2}


@pytest.mark.measured
@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.parametrize("case", LARGER)
def test_operations_of_larger_operands(case, name):
    operands, options = LARGER[case]
    program, explained = both(*operands, **options, **one_tile(name))
    assert explained.flops == pytest.approx(operations_of_xla(program), rel=0.005)
    compiled = program.compile()
    assert explained.flops == pytest.approx(operations_of_xla(compiled), rel=COMPILED.get((case, name), 0.03))
    assert of_xla(compiled)["bytes accessed"] >= explained.bytes


def test_every_tile_that_is_computed_counts():
    """Of a causal square of 4 x 4 tiles: 6 full ones and 4 that the mask cuts; XLA counts one of each."""
    size = 64
    whole, tile = operand(1, 4 * size, 2, 64), operand(1, size, 2, 64)
    options = dict(implementation=blockwise("all_heads"), block_sizes=(size, size))
    program, explained = both(whole, whole, whole, **options, is_causal=True)
    assert explained.tiles == (10, 16)
    full, cut = (operations_of_xla(both(tile, tile, tile, **options, is_causal=causal)[0]) for causal in (False, True))
    assert explained.flops == pytest.approx(operations_of_xla(program) + 5 * full + 3 * cut, rel=0.01)


def test_tiles_that_a_mask_empties_cost_nothing():
    def cost(length, **options):
        return attnlib.explain(*[operand(1, length, 1, 64)] * 3, block_sizes=(128, 128), **options).flops

    window = masks.SlidingWindow(128, 0)
    assert cost(8192, mask=window) == pytest.approx(2 * cost(4096, mask=window), rel=0.02)
    assert cost(8192, mask=window) == pytest.approx(cost(8192) * 127 / 4096, rel=0.1)  # tiles of each, 4 of which cut


def test_heads_in_turn_cost_the_same():
    x = [operand(2, 512, 3, 64)] * 3

    def cost(kind):
        return attnlib.explain(*x, implementation=blockwise(kind), block_sizes=(128, 128)).flops

    assert cost("loop_over_heads") == pytest.approx(cost("all_heads"), rel=0.001)


def test_a_scale_for_each_head_changes_no_tile():
    """`prepare` multiplies the scale into the query, so the tiles are those of any dot product."""
    x = [operand(1, 2048, 8, 64)] * 3
    plain, scaled = (attnlib.explain(*x, score=scores.Dot(scale)) for scale in (None, jnp.ones(8)))
    assert (scaled.implementation, scaled.block_sizes) == (plain.implementation, plain.block_sizes)


def test_additive_scores_cost_by_the_feature():
    """Eleven or more operations a (query, key, feature), and 2 in the product with the values, where dot has 4."""

    def cost(features, score):
        x = operand(1, 256, 1, features)
        return attnlib.explain(x, x, x, score=score, implementation="blockwise").flops / 256**2

    assert cost(64, scores.Dot()) - cost(32, scores.Dot()) == pytest.approx(4 * 32, rel=0.02)
    assert 11 * 32 < cost(64, scores.Additive()) - cost(32, scores.Additive()) < 20 * 32


def test_operations_of_cudnn(monkeypatch):
    """As `reference` counts them, but for tiles that the mask empties. It never runs here, so the estimate is asked."""
    takes_all = tuple(dataclasses.replace(each, unsupported=lambda problem: None) for each in _choose.IMPLEMENTATIONS)
    monkeypatch.setattr(_choose, "IMPLEMENTATIONS", takes_all)
    x = [operand(2, 1024, 4, 64, dtype="bfloat16")] * 3
    plain, causal = (attnlib.explain(*x, implementation="cudnn", is_causal=causal) for causal in (False, True))
    assert plain.flops == pytest.approx(attnlib.explain(*x, implementation="reference").flops, rel=0.02)
    assert causal.flops / plain.flops == (8 * 9 / 2) / 8**2


BYTES = """dot|additive scale a head|custom|grouped|multi-query|causal|lengths|segments|dense, whole|bias (2, 1, 5, 1)
second axis|batch of one broadcasts|no keys, causal|bfloat16|float64""".replace("\n", "|").split("|")


@pytest.mark.measured
@pytest.mark.parametrize(
    ("name", "weights"),
    [
        pytest.param(name, weights, marks=() if weights == bool(n % 2) else pytest.mark.slow)
        for n, name in enumerate(BYTES)
        for weights in (False, True)
    ],
)
def test_bytes_are_of_arguments_and_results(name, weights):
    with context(BY_NAME[name]):
        options = dict(return_lse=weights, return_weights=weights, implementation="reference")
        program, explained = of_case(BY_NAME[name], **options)
        memory = program.compile().memory_analysis()
    pointers = 3 * 8 if weights else 0  # of a tuple of results
    arguments = memory.argument_size_in_bytes
    if name == "no keys, causal":  # queries that no result depends on are no argument of the program
        assert arguments == 0
        arguments = 2 * 5 * 3 * 4 * 4
    assert explained.bytes == arguments + memory.output_size_in_bytes - pointers


@pytest.mark.measured
def test_bytes_are_what_is_moved_where_little_else_is():
    """One query of many keys has few pairs: XLA counts the keys and values, twice at most, and hardly anything more."""
    query, key = operand(1, 1, 1, 64), operand(1, 4096, 1, 64)
    program, explained = both(query, key, key, implementation="reference")
    moved = of_xla(program.compile())["bytes accessed"]
    assert explained.bytes <= moved <= 2.2 * explained.bytes


def loop(x):
    return jax.lax.scan(lambda carry, _: (carry @ x, None), x, None, length=5)[0]


SQUARE = operand(16, 16)
FUNCTIONS = {
    "product": (lambda x: x @ x, 1),
    "softmax": (lambda x: jax.nn.softmax(x, -1), 1),
    "norm": (lambda x: x / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True)), 1),
    "moves": (lambda x: jnp.concatenate([x.T, x[::-1]]).reshape(-1) + 1, 1),
    "unused": (lambda x: (jnp.exp(x), x + 1)[1], 1),
    "unused inside": (lambda x: jax.jit(lambda x: (jnp.exp(x), x + 1))(x)[1], 1),
    "choice": (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x), 1),
    "derivative": (lambda x: jax.jvp(lambda x: jnp.sin(x @ x), (x,), (x,))[1], 1),
    "loop": (loop, 5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_count_of_a_function(name):
    """As XLA counts it, times the steps where it counts one; a step's own counter is left to it."""
    function, steps = FUNCTIONS[name]
    counted = operations_of_xla(jax.jit(function).lower(SQUARE))
    assert operations(function, SQUARE) == pytest.approx(steps * counted, rel=0.01)


def test_a_loop_of_unknown_length_counts_once():
    def until(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1e6, lambda x: x @ x, x)

    assert operations(until, SQUARE) == 2 * 16**3 + 1


@pytest.mark.parametrize(
    ("flops", "moved", "line"),
    [
        (17_212_345_678, 12_582_912, "cost: about 17.2 GFLOP, 12.6 MB read and written"),
        (999_999, 999, "cost: about 1 MFLOP, 999 B read and written"),
        (0, 10**15, "cost: about 0 FLOP, 1 PB read and written"),
    ],
)
def test_printed(flops, moved, line):
    explanation = attnlib.explain(*[operand(1, 8, 1, 8)] * 3)
    assert line in str(dataclasses.replace(explanation, flops=flops, bytes=moved)).splitlines()
