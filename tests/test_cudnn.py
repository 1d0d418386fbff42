"""The adapter to cuDNN: what it lowers to, what it refuses, and its numbers.

Without a GPU the numbers are those of a stand-in for `jax.nn.dot_product_attention(implementation="cudnn")`, which
computes the same with plain operations, and has the faults for which the adapter makes up; with one, cuDNN's own.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, Draw, build, like, unsupported
from conftest import assert_close, assert_finite, assert_same, assert_zero
from quick_jit import quick_jit

import attnlib
from attnlib import masks, scores

ON_GPU = jax.default_backend() == "gpu"
EPS = float(jnp.finfo(jnp.bfloat16).eps)  # cuDNN's gradients are half-precision, and so what is made of them

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
    program = Path(__file__).with_name("cudnn_lowering.py")
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
    assert refused.startswith("implementation: reference\n")
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
        refused("jax.nn rounds its lse to half precision and gives it no gradient; set return_lse=False",
                return_lse=True),
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
    assert attnlib.explain(query, query, query, implementation=("cudnn", "blockwise")).implementation == "blockwise"


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU")
def test_on_a_gpu_it_is_chosen():
    query = jax.ShapeDtypeStruct((1, 4096, 4, 64), jnp.bfloat16)
    assert attnlib.explain(query, query, query, is_causal=True).implementation == "cudnn"


# Its numbers


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dense(options, *operands):
    is_causal, window, dtypes = options
    assert all(x.ndim == 4 for x in operands[:3]) and {x.dtype for x in operands[:3]} == {dtypes}
    return dense_attention(is_causal, window, *operands)


def dense_attention(is_causal, window, query, key, value, query_lengths, key_lengths):
    """As cuDNN: masked values are multiplied by zero, and rows without keys are undefined."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, 2) for x in (key, value))
    t, s = jnp.arange(query.shape[1])[:, None], jnp.arange(key.shape[1])
    seen = jnp.ones((query.shape[1], key.shape[1]), bool)
    if is_causal:
        seen = seen & (s <= t)
    if window is not None:
        seen = seen & (s >= t - window[0]) & (s <= t + window[1])
    seen = seen[None, None] & (s < key_lengths[:, None, None, None])
    logits = jnp.where(seen, jnp.einsum("btnd,bsnd->bnts", query, key) * query.shape[-1] ** -0.5, -jnp.inf)
    logits = jnp.where(key_lengths[:, None, None, None] > 0, logits, jnp.nan)
    output = jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(logits, -1), value)
    padded = query_lengths[:, None] <= t.T
    return jnp.where(padded[..., None, None], 7.0, output)  # anything


def dense_forward(options, *operands):
    return dense(options, *operands), operands


def dense_backward(options, operands, cotangent):
    *operands, query_lengths, key_lengths = operands
    call = functools.partial(dense_attention, *options[:2])
    _, pullback = jax.vjp(lambda *x: call(*x, query_lengths, key_lengths), *operands)
    gradients = [part.astype(options[2]) for part in pullback(cotangent.astype(jnp.float32))]
    return (*gradients, None, None)


dense.defvjp(dense_forward, dense_backward)


def stand_in(query, key, value, *, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size,
             implementation):  # fmt: skip
    """`jax.nn.dot_product_attention`, with a reverse mode alone."""
    assert implementation == "cudnn"
    batch = query.shape[0]
    lengths = [
        jnp.full(batch, array.shape[1]) if given is None else given
        for given, array in ((query_seq_lengths, query), (key_value_seq_lengths, key))
    ]
    assert all(given.shape == (batch,) for given in lengths)
    output = dense((is_causal, local_window_size, query.dtype), query, key, value, *lengths)
    return output.astype(query.dtype)


@pytest.fixture
def cudnn(monkeypatch):
    """A machine on which cuDNN runs, or seems to."""
    if ON_GPU:
        yield
        return
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    yield
    importlib.import_module("attnlib.attention")._attend.clear_cache()  # what was traced with the stand-in


def half(name, **change):
    shapes = dict(query=(2, 6, 4, 8), key=(2, 8, 2, 8), value=(2, 8, 2, 8), dtype="bfloat16")
    return Case(name, **{**shapes, **change})


CASES = [
    half("plain", second_order=True),
    half("float16", dtype="float16"),
    half("scale", score=lambda draw: scores.Dot(jnp.float32(0.7)), second_order=True),
    half("scale a head", score=lambda draw: scores.Dot(jnp.asarray([0.1, 0.2, 0.7, -0.3]))),
    half("causal", options=dict(is_causal=True)),
    half("causal, more queries", query=(2, 10, 4, 8), options=dict(is_causal=True), second_order=True),
    half("window", mask=lambda draw: masks.SlidingWindow(2, 0)),
    half("window and causal", mask=lambda draw: masks.SlidingWindow(3, 2) & masks.Causal()),
    half("wide window", mask=lambda draw: masks.SlidingWindow(5, 7)),
    half("lengths", mask=lambda draw: masks.Lengths(jnp.asarray([0, 5]), jnp.asarray([7, 0])), second_order=True),
    half("lengths, causal",
         mask=lambda draw: masks.Lengths(jnp.asarray([4, 9]), jnp.asarray([3, -2])) & masks.Causal()),
    half("lengths of both, several", mask=lambda draw: masks.Lengths(4, 6) & masks.Prefix(jnp.asarray([2, 7]))),
    half("unsigned lengths", mask=lambda draw: masks.Lengths(key=jnp.asarray([3, 200], jnp.uint8))),
    half("no key", mask=lambda draw: masks.Prefix(0)),
    half("two axes", query=(2, 2, 3, 4, 8), key=(2, 4, 2, 2, 8), value=(2, 4, 2, 2, 8), options=dict(is_causal=True)),
    half("two batch axes", query=(2, 6, 3, 4, 8), key=(2, 8, 3, 2, 8), value=(2, 8, 3, 2, 8),
         options=dict(attention_axes=1), mask=lambda draw: masks.Lengths(key=draw.integers(0, 9, 2, 3))),
    half("no batch", query=(6, 4, 8), key=(8, 2, 8), value=(8, 2, 8), mask=lambda draw: masks.Lengths(key=5)),
    half("batch of one broadcasts", key=(1, 8, 2, 8), mask=lambda draw: masks.Lengths(key=jnp.asarray([3, 8]))),
]  # fmt: skip


def outputs(case, implementation):
    """(function of what can be differentiated, that)."""
    operands, traced, options = build(case)

    def function(operands):
        return attnlib.attention(**operands, **traced, **options, implementation=implementation)

    return function, operands


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_derivatives(case, cudnn):
    """Forward and reverse mode, against the reference."""

    def everything(implementation):
        function, operands = outputs(case, implementation)
        output, pullback = jax.vjp(function, operands)
        _, tangent = jax.jvp(function, (operands,), (like(operands, 1),))
        return dict(output=output, gradients=pullback(like(output, 2))[0], tangent=tangent)

    made = quick_jit(lambda: everything("cudnn"))()
    assert_finite(made)
    assert_close(made, quick_jit(lambda: everything("reference"))(), length=8, eps=EPS)


@pytest.mark.parametrize("case", [case for case in CASES if case.second_order], ids=str)
def test_second_derivatives(case, cudnn):
    """Forward over reverse, reverse over reverse and reverse over forward, against the reference."""

    def everything(implementation):
        function, operands = outputs(case, implementation)
        tangents = like(operands, 3)

        def loss(operands):
            return jnp.sum(jnp.sin(function(operands).astype(jnp.float32)))

        def slope(operands):
            return jax.jvp(loss, (operands,), (tangents,))[1]

        _, forward = jax.jvp(jax.grad(loss), (operands,), (tangents,))
        _, pullback = jax.vjp(jax.grad(loss), operands)
        return dict(forward=forward, reverse=pullback(tangents)[0], mixed=jax.grad(slope)(operands))

    made = quick_jit(lambda: everything("cudnn"))()
    assert_finite(made)
    assert_close(made, quick_jit(lambda: everything("reference"))(), length=16, eps=EPS)


def test_it_ran(cudnn):
    """The suite above did not run something else."""
    for case in CASES:
        operands, traced, options = build(case)
        assert unsupported("cudnn", **operands, **traced, **options) is None, case


@pytest.mark.parametrize(
    "mask",
    [lambda: masks.Causal(), lambda: masks.SlidingWindow(2, 0), lambda: masks.Lengths(jnp.asarray([4, 5]), 5),
     lambda: masks.Lengths(None, jnp.asarray([0, 5])) & masks.Causal()],
    ids=["causal", "window", "lengths", "causal, lengths"],
)  # fmt: skip
def test_what_is_masked_cannot_matter(mask, cudnn):
    """NaN reaches exactly the rows that attend it, and no gradient of the others."""
    draw = Draw(0, "bfloat16")
    clean = draw(2, 8, 4, 8), draw(2, 8, 2, 8), draw(2, 8, 2, 8)
    query, key, value = clean
    query = query.at[1, 2, 3, 0].set(jnp.nan)
    key, value = key.at[:, 6, 1, 0].set(-jnp.inf), value.at[:, 4, 0, 3].set(jnp.nan)

    @functools.partial(quick_jit, static_argnums=0)
    def run(implementation, operands, kept):
        def call(*operands):
            return attnlib.dot_product_attention(*operands, mask=mask(), implementation=implementation)

        output, pullback = jax.vjp(call, *operands)
        return output, pullback(kept.astype(output.dtype))

    expected, _ = run("reference", (query, key, value), jnp.zeros(query.shape, bool))
    kept = ~jnp.isnan(expected)
    assert 0 < np.sum(kept) < kept.size
    output, gradients = run("cudnn", (query, key, value), kept)
    assert_close(output, expected, length=8)
    assert_close(gradients, run("reference", clean, kept)[1], length=8)


def test_padded_rows_are_zero(cudnn):
    draw = Draw(0, "bfloat16")
    query, key = draw(2, 6, 4, 8), draw(2, 8, 2, 8)
    mask = masks.Lengths(jnp.asarray([4, 6]), jnp.asarray([8, 0]))

    def call(query, key):
        return attnlib.dot_product_attention(query, key, key, mask=mask, implementation="cudnn")

    output, pullback = jax.vjp(call, query, key)
    query_bar, key_bar = pullback(jnp.ones_like(output))
    assert_zero((output[0, 4:], output[1], query_bar[0, 4:], query_bar[1], key_bar[1]))
    assert np.all(np.asarray(output[0, :4], np.float32) != 0)


@pytest.mark.parametrize("axes", [(0, None, None, None), (None, 1, 1, None), (2, None, 0, 0), (None, None, None, 0)])
def test_vmap_of_some_operands(axes, cudnn):
    """Values and gradients are those of a loop."""
    draw = Draw(0, "bfloat16")
    shapes = [(2, 6, 4, 8), (2, 8, 2, 8), (2, 8, 2, 8), (2,)]
    shapes = [s if a is None else (*s[:a], 3, *s[a:]) for s, a in zip(shapes, axes, strict=True)]
    *operands, lengths = (*(draw(*shape) for shape in shapes[:3]), draw.integers(0, 9, *shapes[3]))

    def call(query, key, value, lengths):
        def output(*operands):
            mask = masks.Lengths(key=lengths)
            return attnlib.dot_product_attention(*operands, mask=mask, implementation="cudnn")

        made, pullback = jax.vjp(output, query, key, value)
        return made, pullback(jnp.cos(made))

    def one(n):
        pick = [x if a is None else jnp.take(x, n, a) for x, a in zip((*operands, lengths), axes, strict=True)]
        return call(*pick)

    mapped = quick_jit(jax.vmap(call, axes))(*operands, lengths)
    call = quick_jit(call)
    expected = jax.tree.map(lambda *parts: jnp.stack(parts), *map(one, range(3)))
    assert_close(mapped, expected, length=8)


def test_inside_other_transformations(cudnn):
    """The gradient of a gradient of a scan over a rematerialised layer, mapped."""
    draw = Draw(0, "bfloat16")

    def loss(x, implementation):
        @jax.checkpoint
        def layer(x, _):
            return attnlib.dot_product_attention(x, x, x, is_causal=True, implementation=implementation), None

        return jnp.sum(jax.lax.scan(layer, x, None, length=2)[0].astype(jnp.float32) ** 2)

    def squared(x, implementation):
        return jnp.sum(jax.grad(loss)(x, implementation).astype(jnp.float32) ** 2)

    @functools.partial(quick_jit, static_argnums=1)
    def mapped(x, implementation):
        return jax.vmap(lambda x: jax.grad(squared)(x, implementation))(x)

    x = draw(3, 2, 6, 2, 8)
    assert_close(mapped(x, "cudnn"), mapped(x, "reference"), length=64)


def test_lengths_are_traced(cudnn):
    """Other lengths, one compilation."""
    traces = []

    @jax.jit
    def call(query, lengths):
        traces.append(None)
        return attnlib.dot_product_attention(query, query, query, mask=masks.Lengths(lengths), implementation="cudnn")

    query = Draw(0, "bfloat16")(2, 6, 2, 8)
    first, second = (call(query, jnp.asarray(lengths)) for lengths in ([2, 3], [6, 1]))
    assert len(traces) == 1
    assert_zero((first[0, 2:], second[1, 1:]))
    assert_same(first[0, :2], second[0, :2])
