"""What blockwise does with long operands only: tiles with all keys that a mask leaves, and tiles with several heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_case import Case
from cases import build, context, derivatives, run, second_derivatives
from conftest import assert_close

import attnlib
from attnlib import masks, modifiers
from attnlib._core.options import Options
from attnlib._engine import call as _call
from attnlib._engine.blockwise.implementation import blockwise
from attnlib._engine.blockwise.plan import plan_blocks, tile_starts
from attnlib.scores import Dot

WINDOW = masks.SlidingWindow(20, 3)
CASES = [
    Case("window", query=(1, 1091, 2, 4), key=(1, 1103, 1, 4), value=(1, 1103, 1, 3), dtype="float64",
         bias=(1, 1, 1091, 1), mask=lambda draw: WINDOW),
    Case("window, dropout", query=(2, 1101, 1, 4), key=(1, 977, 1, 4), value=(1, 977, 1, 3), dtype="float64",
         mask=lambda draw: WINDOW, options=dict(dropout_rate=0.4)),
    Case("neighborhood", query=(2, 33, 31, 2, 4), key=(2, 33, 31, 2, 4), value=(2, 33, 31, 2, 3), dtype="float64",
         mask=lambda draw: masks.Neighborhood((5, 3)), options=dict(attention_axes=(1, 2))),
    Case("some queries attend nothing", query=(1, 1201, 1, 4), key=(1, 741, 1, 4), value=(1, 741, 1, 3),
         dtype="float64", mask=lambda draw: WINDOW),
]  # fmt: skip
KINDS = "loop_over_heads", "all_heads"
# With how many batch indices and key heads a tile has.
OF_HEADS = {
    Case("some key heads", query=(2, 512, 8, 4), key=(2, 501, 4, 4), value=(2, 501, 4, 3), dtype="float64",
         bias=(2, 8, 1, 501), mask=lambda draw: draw.bools(1, 8, 512, 1), options=dict(dropout_rate=0.4)): (1, 2),
    Case("some batch indices", query=(12, 256, 2, 4), key=(12, 249, 2, 4), value=(12, 249, 2, 3), dtype="float64",
         bias=(12, 1, 1, 249), score_mod=lambda draw: modifiers.ALiBi(0.01 * draw(2))): (6, 2),
}  # fmt: skip


def strategy_of(case, kind):
    """(the strategy, the first query and key of each tile)."""
    with context(case):
        operands, traced, options = build(case)
        of_options = {name: operands[name] for name in ("bias", "score_mod") if name in operands}
        options = Options(**options, **traced, **of_options)
        arguments = _call.arguments(operands["query"], operands["key"], operands["value"], Dot(), options)
        problem, _ = _call.canonicalize(arguments)
        strategy = plan_blocks(problem, kind)
        starts = tile_starts(strategy, problem.mask, problem.query_positions, problem.key_positions)
        return strategy, np.concatenate(list(starts.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_tile_has_all_keys_of_its_queries(case, kind):
    strategy, starts = strategy_of(case, kind)
    assert strategy.has_key_spans
    with context(case):
        _, traced, options = build(case)
        axes = len(options.get("attention_axes", (1,)))
        pairs = traced["mask"].as_array(case.query[1 : 1 + axes], case.key[1 : 1 + axes])
    queries, keys = strategy.block_sizes
    length, key_length = (jnp.zeros(shape[1 : 1 + axes]).size for shape in (case.query, case.key))
    pairs = jnp.asarray(pairs).reshape(length, key_length)
    for start, first_key in starts:
        assert 0 <= first_key <= key_length - keys
        pairs = pairs.at[start : start + queries, first_key : first_key + keys].set(False)
    assert not pairs.any()


@pytest.mark.parametrize("case", OF_HEADS, ids=str)
def test_a_tile_has_as_many_heads_as_it_can(case):
    strategy, _ = strategy_of(case, "loop_over_heads")
    assert strategy.heads_at_once == OF_HEADS[case]


@pytest.mark.parametrize("case", [*CASES, *OF_HEADS], ids=str)
def test_values_and_derivatives_are_those_of_the_reference(case):
    kind = "loop_over_heads" if case in OF_HEADS else KINDS[CASES.index(case) % 2]
    expected, made = (derivatives(case, how) for how in ("reference", blockwise(kind)))
    for part in ("results", "tangent", "gradients"):
        assert_close(made[part], expected[part], length=1103)


def test_second_derivatives_are_those_of_the_reference():
    expected, made = (second_derivatives(CASES[0], how) for how in ("reference", blockwise("loop_over_heads")))
    assert_close(made, expected, length=1103)


def test_content_beyond_the_window_cannot_matter():
    case = CASES[0]
    with context(case):
        operands, traced, options = build(case)
        expected = run(operands, traced, options, blockwise("loop_over_heads"))
        unseen = jnp.arange(1103)[:, None, None] >= 1094
        poisoned = {name: jnp.where(unseen, jnp.nan, operands[name]) for name in ("key", "value")}
        gradient = jax.grad(
            lambda key: run(operands | poisoned | {"key": key}, traced, options, blockwise("loop_over_heads"))[0].sum()
        )
        assert_close(run(operands | poisoned, traced, options, blockwise("loop_over_heads")), expected, length=1)
        assert jnp.isfinite(gradient(poisoned["key"])).all()


def test_explain_counts_a_tile_for_each_block_of_queries():
    x = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float32)
    explanation = attnlib.explain(x, x, x, mask=masks.SlidingWindow(256, 0))
    queries, keys = explanation.block_sizes
    assert explanation.tiles == (4096 // queries, (4096 // queries) * -(-4096 // keys))
    assert queries + 256 <= keys < queries + 256 + 64
