"""The adapter to cuDNN: what it lowers to, what it refuses, and when it is chosen. Its numbers: test_cudnn.py."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import unsupported

import attnlib
from attnlib import masks, scores

ON_GPU = jax.default_backend() == "gpu"

# What it lowers to


def lower(path):
    """The cuDNN calls of the programs in cudnn_lowering.py.

    JAX lowers for cuDNN where a package jax_cuda12_plugin says which version there is, which it asks when it is
    imported: so one is put in the path of a new process, and nothing of JAX is replaced.
    """
    (path / "jax_cuda12_plugin").mkdir()
    versions = "def cudnn_get_version(): return 91000\ndef cusolver_get_version(): return 11701\n"
    (path / "jax_cuda12_plugin" / "_versions.py").write_text(versions)
    root = Path(attnlib.__file__).parent.parent
    paths = os.pathsep.join([str(path), str(root), os.environ.get("PYTHONPATH", "")])
    program = Path(__file__).parents[1] / "_support/cudnn_lowering.py"
    environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(ON_GPU, reason="JAX would find the version of the real cuDNN, and ask the real GPU")
def test_what_it_lowers_to(tmp_path):
    """One test, since one process makes all programs, and that takes long."""
    lowered = lower(tmp_path)
    assert len(lowered["pairs"]) >= 16
    for name, pair in lowered["pairs"].items():
        check_calls_are_those_of_jax_nn(name, **pair)
    for name, mask_type, window in [
        ("plain", "NO_MASK", 0),
        ("causal", "CAUSAL", 0),
        ("window", "CAUSAL", 8),
        ("window of everything", "CAUSAL", 0),
        ("key lengths", "PADDING", 0),
        ("query lengths, causal", "PADDING_CAUSAL", 0),
    ]:
        check_mask_is_the_kernels_own(lowered["pairs"][name]["forward"][0], mask_type, window)
    plain = lowered["pairs"]["plain"]
    assert lowered["scale traced"] == plain["forward"][0], "a traced scale goes into the query"
    check_mapped_axis_joins_the_batch(lowered["vmap of some: gradient"])
    check_derivatives_that_cudnn_lacks(lowered)
    check_head_sizes_are_for_jax_nn_to_say(lowered)
    check_the_platform_decides_late(lowered, plain["gradient"][0])


def check_calls_are_those_of_jax_nn(name, forward, gradient):
    """Forward the same call; in training the same two, the first of them several times, for XLA to merge."""
    ours, theirs = forward
    assert ours == theirs and len(ours) == 1, name
    ours, (first, second) = gradient
    assert second[0] == "__cudnn$fmhaSoftmaxBackward", name
    assert ours[-1] == second and len(ours) > 1, name
    assert all(call == first for call in ours[:-1]), name


def check_mask_is_the_kernels_own(calls, mask_type, window):
    target, scale, *rest, dimensions, operands = calls[0]
    assert target == "__cudnn$fmhaSoftmax"  # no bias
    assert scale == pytest.approx(32**-0.5)
    assert rest == [mask_type, window, 0.0]
    assert dimensions == [2, 8, 64, 64]
    assert len(operands) == (5 if "PADDING" in mask_type else 3)


def check_mapped_axis_joins_the_batch(calls):
    *forwards, backward = calls
    assert all(call == forwards[0] for call in forwards)
    assert forwards[0][-2] == backward[-2] == [6, 8, 64, 64]


def check_derivatives_that_cudnn_lacks(lowered):
    """A tangent runs the kernel once, for the value; a derivative of a gradient runs both its passes."""
    assert [call[0] for call in lowered["jvp"]] == ["__cudnn$fmhaSoftmax"]
    assert {call[0] for call in lowered["jvp of gradient"]} == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    # A backward program on its own: JAX has to find in it what must know its devices.
    assert [call[0] for call in lowered["gradient without its value"]][-1] == "__cudnn$fmhaSoftmaxBackward"


def check_head_sizes_are_for_jax_nn_to_say(lowered):
    """Up to 128 everywhere; beyond, the GPU decides, and there is none."""
    assert len(lowered["128 features"]) == 1
    refusal = "jax.nn.dot_product_attention refuses it on this machine: The head dim must be <= 128"
    assert refusal in lowered["136 features"]


def check_the_platform_decides_late(lowered, gradient):
    """By name it is cuDNN or an error of lowering; chosen automatically, what is lowered for a CPU is blockwise."""
    assert "not found for platform cpu" in lowered["by name on CPU"]
    on_cuda, on_cpu = lowered["automatic: gradient"]
    assert on_cuda == gradient
    assert on_cpu == []
    refused, chosen = lowered["explained"]
    assert refused.startswith("implementation: blockwise\n")
    assert refused.endswith("not cudnn: the default device is no GPU")
    assert chosen.startswith("implementation: cudnn\n")


# What it refuses

FITS = dict(query=(2, 6, 4, 8), key=(2, 6, 2, 8), value=(2, 6, 2, 8))


def refused(text, shapes=FITS, dtype="bfloat16", **options):
    return pytest.param(text, shapes, dtype, options, id=text[:40])


@pytest.mark.parametrize(
    ("text", "shapes", "dtype", "options"),
    [
        refused("it computes dot products only; the score is Additive", score=lambda: scores.Additive()),
        refused(
            "its bias is rounded to half precision, must be as large as all pairs, and may not hold -inf; leave "
            "bias=None, or use masks.Causal, SlidingWindow or Lengths for what it masks",
            bias=lambda: jnp.zeros((6, 6), jnp.bfloat16),
        ),
        refused(
            "it cannot drop the entries that dropout_rng determines; set dropout_rate=0",
            dropout_rate=0.5, dropout_rng=lambda: jax.random.key(0),
        ),
        refused("it has no soft cap; leave logits_soft_cap=None", logits_soft_cap=2.0),
        refused("it never holds the weights; set return_weights=False", return_weights=True),
        *(refused("jax.nn rounds its lse to half precision and gives it no gradient; set return_lse=False, sink=None "
                  "and normalize=True", **asked) for asked in (dict(return_lse=True), dict(normalize=False))),
        refused("it chooses its own blocks; leave block_sizes=None", block_sizes=(2, 2)),
        refused("it multiplies in one precision, its own; leave precision=None, not 'highest'", precision="highest"),
        refused("query, key and value must all be float16 or all bfloat16; they are float32, float32, float32",
                dtype="float32"),
        refused("a query multiplied by a scale may leave the range of float16; leave scale=None, or use bfloat16",
                dtype="float16", score=lambda: scores.Dot(0.1)),
        refused("query and value must have equally many features; they have 8 and 16",
                {**FITS, "value": (2, 6, 2, 16)}),
        refused("features must be a multiple of 8 and at most 256; there are 12", dict.fromkeys(FITS, (2, 6, 2, 12))),
        refused("features must be a multiple of 8 and at most 256; there are 264", dict.fromkeys(FITS, (2, 6, 2, 264))),
        refused("it needs at least two queries, two keys and a batch entry; there are (2, 1, 6)",
                {**FITS, "query": (2, 1, 4, 8)}),
        refused("it needs at least two queries, two keys and a batch entry; there are (0, 6, 6)",
                dict.fromkeys(FITS, (0, 6, 2, 8))),
        refused("its causal mask begins at the first query and key; leave Causal(offset=0)",
                mask=lambda: masks.Causal(1)),
        refused("its causal mask begins at the first query and key; leave Causal(offset=0) ", # traced
                mask=lambda: masks.Causal(jnp.int32(0))),
        refused("it knows one order of positions, not Causal(axis=0) among several; leave axis=None",
                dict.fromkeys(FITS, (2, 3, 2, 2, 8)), mask=lambda: masks.Causal(axis=0)),
        refused("its windows are causal ones; use SlidingWindow(left, 0)", mask=lambda: masks.SlidingWindow(2, 1)),
        refused("its windows are ints, the same for all heads; use SlidingWindow(left, 0) with an int",
                mask=lambda: masks.SlidingWindow(np.array(2), 0)),
        refused("its windows are causal ones; use SlidingWindow(left, 0) ", mask=lambda: masks.SlidingWindow(None, 1)),
        refused("a window with lengths, or with more queries than keys, may leave it rows without keys; leave one out",
                mask=lambda: masks.SlidingWindow(2, 0) & masks.Lengths(key=4)),
        refused("a window with lengths, or with more queries than keys, may leave it rows without keys; leave one out ",
                {**FITS, "query": (2, 7, 4, 8)}, mask=lambda: masks.SlidingWindow(2, 0)),
        *(
            refused(f"it knows causal masks, windows and lengths joined by `&`, not {kind}; use masks.Lengths where "
                    "padding is at the end", mask=make)
            for kind, make in {
                "Dense": lambda: np.ones((6, 6), bool),
                "KeyPadding": lambda: masks.KeyPadding(np.ones((2, 6), bool)),
                "Segments": lambda: masks.Segments(np.ones((2, 6), int)),
                "Or": lambda: masks.Causal() | masks.Prefix(2),
                "Not": lambda: ~masks.Causal(),
                "Neighborhood": lambda: masks.Causal() & masks.Neighborhood(3),
            }.items()
        ),
    ],
)  # fmt: skip
def test_refusals(text, shapes, dtype, options):
    """In the same words by `explain` and by the call."""
    made = {name: value() if callable(value) else value for name, value in options.items()}
    operands = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, shape in shapes.items()}
    expected = (
        f"no implementation can compute this with implementation='cudnn':\n  cudnn: {text.strip()}\n"
        "implementation=None chooses among all that can."
    )
    call = functools.partial(attnlib.attention, implementation="cudnn", **{"score": scores.Dot(), **made})
    for ask in (lambda: jax.eval_shape(call, **operands),
                lambda: attnlib.explain(**operands, **made, implementation="cudnn")):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            ask()
        assert type(caught.value) is ValueError
        assert str(caught.value) == expected
    assert attnlib.explain(**operands, **made).refusals["cudnn"] == text.strip()


def test_mixed_dtypes_are_refused():
    query, key = jnp.zeros((2, 6, 4, 8), jnp.bfloat16), jnp.zeros((2, 6, 2, 8), jnp.float16)
    assert unsupported("cudnn", query, key, key) == (
        "query, key and value must all be float16 or all bfloat16; they are bfloat16, float16, float16"
    )


@pytest.mark.devices
def test_operands_sharded_over_explicit_axes_are_refused():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        query = jax.device_put(jnp.zeros((2, 6, 2, 8), jnp.bfloat16), jax.P("data"))
        reason = "jax.nn has no rule to shard it over explicit mesh axes; make them jax.sharding.AxisType.Auto"
        assert unsupported("cudnn", query, query, query) == reason


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu():
    """Nothing changes, and both the refusal by name and `explain` say why."""
    query = jax.ShapeDtypeStruct((1, 4096, 4, 64), jnp.bfloat16)
    reason = "it needs an NVIDIA GPU, and jax[cuda12] or jax[cuda13] installed; jax.nn says: cuDNN is not detected."
    explanation = attnlib.explain(query, query, query, is_causal=True)
    assert explanation.implementation == "blockwise"
    assert explanation.refusals["cudnn"] == reason
    assert unsupported("cudnn", query, query, query, is_causal=True) == reason
    placed = attnlib.explain(query, query, query, query_positions=jax.ShapeDtypeStruct((4096,), jnp.int32))
    assert placed.refusals["cudnn"].startswith("it counts positions from 0")
    assert attnlib.explain(query, query, query, implementation=("cudnn", "blockwise")).implementation == "blockwise"


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU")
def test_on_a_gpu_it_is_chosen():
    query = jax.ShapeDtypeStruct((1, 4096, 4, 64), jnp.bfloat16)
    assert attnlib.explain(query, query, query, is_causal=True).implementation == "cudnn"
