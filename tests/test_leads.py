"""One (batch index, key/value head) after another, as on a CPU of one device: the same as all at once, and faster.

The tests run on four devices, where it is not done by itself; here it is, whatever the size.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, derivatives, second_derivatives
from conftest import assert_close

import attnlib
from attnlib import masks, scores
from attnlib._impl import _leads, blockwise

# Of the table, one case of each kind of operand that a lead has a part of.
NAMES = ("dot", "grouped, mask and bias a head", "multi-query", "lengths", "dense, whole", "dropout, grouped, causal",
         "two axes, row-major", "bfloat16")  # fmt: skip
CHOSEN = [case for case in CASES if case.name in NAMES]
SECOND_ORDER = [case for case in CASES if case.name in ("dot", "soft cap")]


@pytest.fixture
def apart(monkeypatch):
    """How many problems were taken apart."""
    taken = []

    def run_apart(problem, run):
        taken.append(problem)
        return _leads.run_apart(problem, run)

    monkeypatch.setattr(_leads, "on_one_cpu", lambda: True)
    monkeypatch.setattr(_leads, "suits", lambda problem: True)
    monkeypatch.setattr(blockwise, "run_apart", run_apart)
    jax.clear_caches()
    yield taken
    jax.clear_caches()


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_values_and_derivatives(case, apart):
    made, expected = derivatives.__wrapped__(case, "blockwise"), derivatives(case, "reference")
    assert len(CHOSEN) == len(NAMES) and apart
    for part in ("results", "tangent", "gradients"):
        assert_close(made[part], expected[part], length=max(case.query[1], case.key[1]))


@pytest.mark.parametrize("case", SECOND_ORDER, ids=str)
def test_second_derivatives(case, apart):
    made = second_derivatives(case, "blockwise")
    assert len(SECOND_ORDER) == 2 and apart
    assert_close(made, second_derivatives(case, "reference"), length=16)


MASKS = {
    "lengths": lambda rng: masks.Lengths(query=jnp.array([[3, 9], [7, 0]]), key=jnp.array([[8, 1], [5, 6]])),
    "dense, heads": lambda rng: masks.Dense(jnp.asarray(rng.random((1, 1, 6, 9, 8)) < 0.5)),
    "dense, batch": lambda rng: masks.Dense(jnp.asarray(rng.random((2, 1, 1, 9, 8)) < 0.5)) | masks.Causal(-3),
    "not segments": lambda rng: ~masks.Segments(jnp.arange(9) // 4, jnp.arange(8) // 3),
}
BIASES = {"none": None, "whole": (2, 2, 6, 9, 8), "pairs": (9, 8), "keys": (1, 1, 1, 1, 8), "heads": (1, 1, 6, 1, 1)}


@pytest.mark.parametrize(("mask", "bias"), list(zip([*MASKS, "lengths"], BIASES, strict=True)))
def test_masks_biases_and_dropout(mask, bias, apart):
    """Two batch axes and grouped heads, dropout on: each lead has its own part of everything, to the same entry."""
    rng = np.random.default_rng(0)
    shapes = (2, 2, 9, 6, 4), (2, 2, 8, 2, 4), (2, 2, 8, 2, 5)
    operands = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    shape = BIASES[bias]
    bias = None if shape is None else jnp.asarray(rng.normal(size=shape), jnp.float32)

    def attend(implementation):
        def loss(bias, *operands):
            output, weights = attnlib.attention(
                *operands, score=scores.Dot(), mask=MASKS[mask](rng), bias=bias, dropout_rate=0.3,
                dropout_rng=jax.random.key(1), attention_axes=2, return_weights=True, implementation=implementation,
            )  # fmt: skip
            return jnp.sum(jnp.sin(output)), weights

        argnums = (1, 2, 3) if bias is None else (0, 1, 2, 3)
        return jax.jit(jax.grad(loss, argnums, has_aux=True))(bias, *operands)

    state = rng.bit_generator.state
    made = attend("blockwise")
    assert apart or shape == (1, 1, 6, 1, 1), "a bias of some of the leads alone leaves all together"
    rng.bit_generator.state = state
    assert_close(made, attend("reference"), length=9)


PROGRAM = """
import jax, jax.numpy as jnp, attnlib
operand = jax.ShapeDtypeStruct((2, 1024, 4, 16), jnp.float32)
print(jax.jit(attnlib.dot_product_attention).lower(operand, operand, operand).as_text().count("stablehlo.while"))
"""


def test_it_is_done_on_one_device_and_not_on_several():
    """Two loops, of leads and of tiles; or that of tiles alone, which leaves an axis of heads as it is sharded."""
    counts = []
    for devices in (1, 4):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM], env={**os.environ, **flags}, capture_output=True, text=True, check=True
        )
        counts.append(int(result.stdout))
    assert counts == [2, 1]
