"""The table of cases on every implementation: values, first and second derivatives, forward and reverse mode."""

import contextlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    BY_NAME,
    CASES,
    COMPLETE,
    IN_ONE_TILE,
    IN_TURN,
    NAMES,
    SIDE_BY_SIDE,
    build,
    context,
    derivatives,
    refusal,
    run,
    second_derivatives,
    values,
)
from conftest import assert_close, assert_finite

VARIANTS = [*NAMES, IN_TURN, IN_ONE_TILE, SIDE_BY_SIDE]


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


# The variants of blockwise share its code but for a few functions. So they run the cases that these see; the slow tests
# run all. Heads in turn cut by batch index and head what has such axes: operands, masks, biases, tables. One tile
# divides by the sum of its weights in both passes. Heads side by side have products of their own, forward and backward;
# what is added to their logits is that of a tile.
OF_VARIANTS = {
    IN_TURN: (
        "dot", "grouped", "grouped, mask and bias a head", "multi-query", "causal, offset a batch index",
        "dense, batch and head", "function that captures arrays", "function of heads, or a window", "nothing attends",
        "bias (2, 1, 5, 1)", "dropout, grouped, causal", "alibi",
        "bucketed bias, causal, grouped", "score_mod, two batch axes before", "positions, modified",
        "outer axes, reversed", "batch of one broadcasts", "query of one broadcasts", "11 queries, 13 keys", "bfloat16",
    ),
    IN_ONE_TILE: (
        "dot", "grouped", "grouped, mask and bias a head", "dense, batch and head", "nothing attends",
        "dropout, grouped, causal", "sink, rows of nothing", "squared relu", "batch of one broadcasts",
        "11 queries, 13 keys", "bfloat16",
    ),
    SIDE_BY_SIDE: (
        "dot", "dot scale a head", "bilinear a head, unequal features", "grouped", "grouped, mask and bias a head",
        "multi-query", "causal, offset a batch index", "sliding window", "lengths", "nothing attends", "soft cap",
        "dropout, grouped, causal", "alibi", "squared relu", "two axes, partly broadcast", "batch of one broadcasts",
        "query of one broadcasts", "1 queries, 7 keys", "bfloat16",
    ),
}  # fmt: skip
# Second derivatives run over the same loops, and with heads side by side by a rule for the operands alone.
OF_VARIANTS_SECOND_ORDER = {IN_TURN: ("dot",), IN_ONE_TILE: ("dot", "nothing attends"), SIDE_BY_SIDE: ("dot",)}


def running(case, of_variants):
    """The names of those that run a case, the reference first."""
    names = [name for name in VARIANTS if case.name in of_variants.get(name, BY_NAME)]
    return sorted((name for name in names if refusal(case, name) is None), key=lambda name: name != "reference")


@contextlib.contextmanager
def about(name):
    try:
        yield
    except BaseException as error:
        error.add_note(f"implementation: {name}")
        raise


@named([case for case in CASES if not case.values_only])
def test_values_and_derivatives(case):
    """Of all implementations: so the reference is computed once."""
    check_derivatives(case, running(case, OF_VARIANTS))


@pytest.mark.slow
@named(CASES)
def test_values_and_derivatives_of_every_variant(case):
    check_derivatives(case, running(case, {}))


def check_derivatives(case, names):
    """Forward and reverse mode agree with each other, and both with the reference."""
    expected = None
    for name in names:
        with about(name):
            made = derivatives(case, name)
            check_results(case, *made["results"])
            assert_finite((made["gradients"], made["tangent"]))

            forward = inner(made["cotangents"], made["tangent"])
            reverse = inner(made["gradients"], made["tangents"])
            eps = float(jnp.finfo(case.dtype).eps)
            assert abs(forward[0] - reverse[0]) <= 16 * eps * max(forward[1], reverse[1])

            expected = made if expected is None else expected
            for part in ("results", "tangent", "gradients"):
                assert_close(made[part], expected[part], length=longest_sum(case))


@named([case for case in CASES if case.values_only])
def test_values(case):
    made = values(case, running(case, OF_VARIANTS))
    for name, results in made.items():
        with about(name):
            check_results(case, *results)
            assert_close(results, made["reference"], length=longest_sum(case))


def longest_sum(case):
    """How many numbers are added up: over positions, or over the features of query and key."""
    return max(case.query[1], case.key[1], case.query[-1], case.key[-1])


def check_results(case, output, weights, lse):
    compute_dtype = jnp.float64 if case.dtype == "float64" else jnp.float32
    assert output.dtype == case.dtype
    assert weights.dtype == lse.dtype == compute_dtype
    assert output.shape[-2:] == (case.query[-2], case.value[-1])
    assert_finite((output, weights))
    empty = np.isneginf(lse)
    assert np.all(np.isfinite(lse) | empty)
    flat = np.asarray(weights).reshape(*lse.shape, math.prod(weights.shape[lse.ndim :]))
    assert np.all(flat[empty] == 0)
    if "dropout_rate" in case.options:
        return
    if not case.options.get("normalize", True):
        np.testing.assert_allclose(flat.sum(-1), np.exp(lse), rtol=1e-5)
    elif case.sink is not None:
        assert np.all(flat.sum(-1) < 1)
    else:
        np.testing.assert_allclose(flat.sum(-1), np.where(empty, 0, 1), atol=1e-5)


def inner(a, b):
    """The inner product of two trees, and the sum of the magnitudes of its terms."""
    terms = [
        np.asarray(x, np.float64) * np.asarray(y, np.float64)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return sum(np.sum(term) for term in terms), sum(np.sum(np.abs(term)) for term in terms)


SECOND_ORDER = [case for case in CASES if case.second_order]


@named(SECOND_ORDER)
def test_second_derivatives(case):
    check_second_derivatives(case, running(case, OF_VARIANTS_SECOND_ORDER))


@pytest.mark.slow
@named(SECOND_ORDER)
def test_second_derivatives_of_every_variant(case):
    check_second_derivatives(case, running(case, {}))


def check_second_derivatives(case, names):
    """Forward over reverse equals reverse over reverse (the second derivative is symmetric), and the reference."""
    expected = None
    for name in names:
        with about(name):
            made = second_derivatives(case, name)
            assert_finite(made)
            assert_close(made["forward"], made["reverse"], length=16)
            expected = made if expected is None else expected
            assert_close(made, expected, length=16)


def test_some_take_every_call():
    assert {"blockwise", "reference"} <= set(COMPLETE)


@pytest.mark.parametrize("implementation", [*COMPLETE, IN_TURN, IN_ONE_TILE, SIDE_BY_SIDE])
def test_enough_cases_ran(implementation):
    """A suite that refuses its way through proves nothing."""
    ran = [case.name for case in CASES if refusal(case, implementation) is None]
    assert len(ran) >= (len(CASES) if implementation == "reference" else 10)
    for of_variants in (OF_VARIANTS, OF_VARIANTS_SECOND_ORDER):
        assert set(of_variants.get(implementation, ran)) <= set(ran)


@pytest.mark.parametrize(("name", "starts"), [("blockwise", {"3"}), (IN_TURN, {"8", "16"})])
def test_heads_are_in_turn(name, starts):
    """The cases above do run what they are named after: so many times the tiles as there are batch indices and heads.

    Where tiles start is a table: of tiles that are whole (1 of 4, then no loop, and 2 of 6), and of the others.
    """
    case = BY_NAME["grouped"]
    with context(case):
        operands, traced, options = build(case)
        program = jax.jit(lambda *args: run(*args, options, name)).lower(operands, traced).as_text()
    assert starts <= set(re.findall(r"tensor<(\d+)xi32>", program))


@pytest.mark.parametrize(("name", "wide"), [("blockwise", False), (SIDE_BY_SIDE, True)])
def test_heads_are_side_by_side(name, wide):
    """Likewise: keys of 2 heads x 4 features are one matrix, in a product with the 6 heads of 5 queries."""
    case = BY_NAME["grouped"]
    with context(case):
        operands, traced, options = build(case)
        program = jax.jit(lambda *args: run(*args, options, name)).lower(operands, traced).as_text()
    assert bool(re.search(r"dot_general.*tensor<2x7x8xf32>, tensor<2x30x8xf32>", program)) == wide


def test_a_batch_of_heads_side_by_side_branches_once():
    """Under vmap too, what is computed again where something is not finite is a branch: else both would run."""
    case = BY_NAME["grouped"]
    with context(case):
        operands, _, options = build(case)
        batch = jax.tree.map(lambda x: jnp.stack([x, x + 1]), operands)
        program = jax.jit(jax.vmap(lambda operands: run(operands, {}, options, SIDE_BY_SIDE)[0]))
        assert "stablehlo.case" in program.lower(batch).as_text()
        apart = [run(jax.tree.map(lambda x, n=n: x[n], batch), {}, options, SIDE_BY_SIDE)[0] for n in range(2)]
        assert_close(program(batch), jnp.stack(apart), length=7)
