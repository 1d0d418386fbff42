"""The settings, threads and long runs of real programs: the same numbers, no warnings, nothing that grows."""

import concurrent.futures
import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same

import attnlib
from attnlib import masks, modifiers
from attnlib._engine.call import attend

ROOT = Path(__file__).parents[2]

PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
import attnlib
from attnlib import masks, modifiers, scores

draw = np.random.default_rng(0)
query, key, value = (jax.device_put(draw.normal(size=(2, 9, heads, 4)).astype(np.float32)) for heads in (4, 2, 2))
some = [
    (attnlib.dot_product_attention, dict(is_causal=True, sink=jnp.zeros(4))),
    (attnlib.dot_product_attention, dict(mask=masks.Lengths(key=jnp.array([0, 5])), logits_soft_cap=9.0)),
    (attnlib.dot_product_attention, dict(score_mod=modifiers.ALiBi(modifiers.alibi_slopes(4)))),
    (attnlib.additive_attention, dict(mask=masks.SlidingWindow(3, 1), scale=jnp.ones(4))),
    (attnlib.dot_product_attention, dict(dropout_rate=0.5, dropout_rng=jax.random.key(1))),
]
for function, options in some:
    for name, tiles in (("reference", None), ("blockwise", (4, 4))):
        def loss(query):
            output = function(query, key, value, implementation=name, block_sizes=tiles, **options)
            return jnp.sum(jnp.sin(output))
        result, slope = jax.value_and_grad(loss)(query)
        print(f"{float(result):.4f} {float(jnp.sum(slope**2)):.4f}")
layer = attnlib.MultiHeadAttention(num_heads=2, dropout_rate=0.1, rotary=True)
x = jax.device_put(draw.normal(size=(2, 5, 8)).astype(np.float32))
params = layer.init(jax.random.key(0), x, deterministic=True)
params = jax.tree.map(jnp.ones_like, params)
print(f"{float(jnp.sum(layer.apply(params, x, deterministic=True))):.3f}")
"""
SETTINGS = {
    "optimised": (["-O"], {}),
    "float64": ([], dict(JAX_ENABLE_X64="1")),
    "strict promotion": ([], dict(JAX_NUMPY_DTYPE_PROMOTION="strict")),
    "debug NaN": ([], dict(JAX_DEBUG_NANS="1")),
    "without jit": ([], dict(JAX_DISABLE_JIT="1")),
    "old random bits": ([], dict(JAX_THREEFRY_PARTITIONABLE="0")),
}
# Settings share a process by default: what one of them breaks, it breaks there. Without jit takes longest, and
# test_modes.py runs cases so.
TOGETHER = [name for name in SETTINGS if name != "without jit"]
ALONE = [[name] for name in SETTINGS]
# Other random bits: what dropout leaves differs, and is left out.
DROPOUT = slice(8, 10)


def printed(flags, setting):
    """What the program prints; warnings are errors."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **setting}
    # Those of imports are not ours.
    code = "import warnings, jax, flax, optax, jaxtyping; warnings.simplefilter('error')\n" + PROGRAM
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


@pytest.fixture(scope="module")
def usual():
    return printed([], {})


@pytest.mark.parametrize(
    "names", [TOGETHER, *(pytest.param(names, marks=pytest.mark.slow) for names in ALONE)], ids=", ".join
)
def test_settings_change_no_number(names, usual):
    flags = [flag for name in names for flag in SETTINGS[name][0]]
    made = printed(flags, {variable: value for name in names for variable, value in SETTINGS[name][1].items()})
    assert len(made) == len(usual) == 12
    for n, (got, want) in enumerate(zip(made[:-1], usual[:-1], strict=True)):
        if "old random bits" in names and n in range(*DROPOUT.indices(11)):
            continue
        np.testing.assert_allclose([*map(float, got.split())], [*map(float, want.split())], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("calls", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_calls_leave_nothing_behind(calls):
    """Neither programs nor memory: eager calls with other values of all that is traced."""
    query, key, value = (jnp.ones((1, 4, 2, 4)) for _ in range(3))

    def call(n):
        slopes = np.full(2, n, np.float32)
        return attnlib.dot_product_attention(
            query * n, key, value, mask=masks.Lengths(key=np.int32(n % 5)), sink=float(n), dropout_rate=0.1,
            dropout_rng=rngs[n % 7], score_mod=modifiers.ALiBi(slopes) if n % 20 == 0 else None,
        )  # fmt: skip

    rngs = jax.random.split(jax.random.key(0), 7)

    def settle(first, count):
        for n in range(first, first + count):
            call(n).block_until_ready()
        gc.collect()
        return attend._cache_size(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(jax.live_arrays())

    programs, memory, arrays = settle(0, 500)
    after = settle(500, calls)
    assert after[0] == programs
    assert after[1] <= memory * 1.05  # kilobytes on Linux; a leak of 1 kB a call would be 10 MB
    assert after[2] <= arrays + 10


def test_threads_do_not_disturb_each_other():
    """The same calls, of several shapes and options, from eight threads at once."""

    def call(n):
        length = 3 + n % 4
        query, key, value = jax.random.normal(jax.random.key(n), (3, 2, length, 2, 4))
        options = [dict(is_causal=True), dict(sink=0.0), dict(implementation="blockwise", block_sizes=(2, 2)), {}]
        gradient = jax.grad(lambda q: jnp.sum(attnlib.dot_product_attention(q, key, value, **options[n % 3])))
        return gradient(query)

    attend.clear_cache()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(call, range(48)))
    assert_same(together, [call(n) for n in range(48)])
