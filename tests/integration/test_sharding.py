"""Sharding over batch and heads: no collective is compiled, outputs are sharded as the query, numbers do not change."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attnlib
from attnlib import masks, modifiers, scores

COLLECTIVES = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(")
SPECS = {"batch": P("x"), "heads": P(None, None, "x"), "both": P("x", None, "y")}
MESHES = {"batch": (4,), "heads": (4,), "both": (2, 2)}
SCORES = {"dot": lambda: scores.Dot(), "additive": lambda: scores.Additive(jnp.ones(8))}
OPTIONS = {
    "plain": dict,
    "alibi, sink": lambda: dict(
        score_mod=modifiers.ALiBi(modifiers.alibi_slopes(8)),
        sink=np.linspace(-1, 1, 8, dtype=np.float32),
        is_causal=True,
    ),
    "causal, dropout, segments": lambda: dict(
        mask=masks.Causal() & masks.Segments(jnp.arange(96) // 40),
        dropout_rate=0.1,
        dropout_rng=jax.random.key(0),
    ),
}
pytestmark = pytest.mark.devices


def _programs(score, options):
    def forward(query, key, value):
        return attnlib.attention(
            query, key, value, score=SCORES[score](), implementation="blockwise", block_sizes=(32, 24),
            **OPTIONS[options](),
        )  # fmt: skip

    gradient = jax.grad(lambda *x: jnp.sum(jnp.sin(forward(*x))), (0, 1, 2))
    return {
        "forward": forward,
        "grad": gradient,
        "jvp": lambda q, k, v: jax.jvp(forward, (q, k, v), (jnp.cos(q), jnp.cos(k), jnp.cos(v)))[1],
        "second order": lambda q, k, v: jax.jvp(gradient, (q, k, v), (jnp.cos(q), jnp.cos(k), jnp.cos(v)))[1],
    }


def _operands():
    keys = jax.random.split(jax.random.key(1), 3)
    return tuple(jax.random.normal(key, (4, 96, heads, 8)) for key, heads in zip(keys, (8, 4, 4), strict=True))


def _mesh(layout, axis_type):
    return jax.make_mesh(MESHES[layout], ("x", "y")[: len(MESHES[layout])], (axis_type,) * len(MESHES[layout]))


# A second derivative has the programs of the others in it. Batch and heads together are sharded as each alone.
CASES = [("dot", "causal, dropout, segments", "both", program) for program in ("forward", "grad", "jvp")]
CASES += [("dot", "causal, dropout, segments", layout, "second order") for layout in SPECS]
CASES += [("dot", "alibi, sink", "both", "grad"), ("additive", "plain", "both", "grad")]
MORE = [("dot", "causal, dropout, segments", layout, program)
        for layout in ("batch", "heads") for program in ("forward", "grad", "jvp")]  # fmt: skip
MORE += [("dot", "alibi, sink", "both", "forward")]
MORE += [("additive", "plain", "both", program) for program in ("forward", "jvp", "second order")]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@functools.cache
def _expected(score, options, program):
    """On one device."""
    return jax.tree.map(np.asarray, jax.jit(_programs(score, options)[program])(*_operands()))


@pytest.mark.parametrize(("score", "options", "layout", "program"), [*CASES, *(slow(*one) for one in MORE)])
def test_no_collectives(score, options, layout, program):
    function = _programs(score, options)[program]
    operands = _operands()
    sharding = NamedSharding(_mesh(layout, AxisType.Auto), SPECS[layout])
    sharded = tuple(jax.device_put(x, sharding) for x in operands)
    compiled = jax.jit(function).lower(*sharded).compile()
    found = COLLECTIVES.findall(compiled.as_text())
    assert not found, found
    actual, expected = compiled(*sharded), _expected(score, options, program)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.sharding.is_equivalent_to(sharding, got.ndim)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("both", "causal, dropout, segments"),
        slow("batch", "causal, dropout, segments"),
        slow("heads", "causal, dropout, segments"),
        ("both", "alibi, sink"),
    ],
)
def test_explicit_mesh(layout, options):
    """With explicit axes the type of every array carries its sharding. A gradient holds the forward pass."""
    operands = _operands()
    with jax.set_mesh(_mesh(layout, AxisType.Explicit)):
        sharded = tuple(jax.device_put(x, SPECS[layout]) for x in operands)
        compiled = jax.jit(_programs("dot", options)["grad"]).lower(*sharded).compile()
        assert not COLLECTIVES.findall(compiled.as_text())
        actual = jax.tree.map(np.asarray, compiled(*sharded))
    for got, want in zip(actual, _expected("dot", options, "grad"), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_the_pattern_finds_collectives():
    sharding = NamedSharding(_mesh("batch", AxisType.Auto), P("x"))
    x = jax.device_put(jnp.ones((4, 3)), sharding)
    assert COLLECTIVES.findall(jax.jit(lambda x: x.sum(0)).lower(x).compile().as_text())
