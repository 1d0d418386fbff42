"""Every mode of JAX with every case: what runs by itself runs in the mode, forward and backward, with the same numbers.

A mode that changes no number is traced; a few configurations in which all modes meet the kinds of features are run.
"""

import functools

import cases
import jax
import jax.numpy as jnp
import pytest
from cases import features
from conftest import assert_close
from covering import covered, covering
from jax_modes import MODES, derivative

import attnlib
from attnlib import inspect, masks, modifiers, positions


def function_of(case, traced, options, name, tiles=True):
    """A case as a function of its operands, in one tile or several. Rows that attend nothing have an lse of 0."""
    how = cases.by_name(name) if tiles else dict(implementation=name)

    def function(operands):
        output, weights, lse = attnlib.attention(
            **operands, **traced, **options, **how, return_weights=True, return_lse=True
        )
        return output, weights, jnp.where(jnp.isfinite(lse), lse, 0)

    return function


# Which modes, and which configurations

TRACED = [name for name, mode in MODES.items() if not mode.needs_values]
TRACED_ANEW = ["x64", "tracer leaks", "vmap, spmd_axis_name", "pmap", "scan of checkpoint"]
RUN = [name for name, mode in MODES.items() if not mode.traced_only]


# Features by which a program differs, rather than the entries of a mask.
COARSE = {"Dot", "Additive", "Custom", "Tilt", "bias", "sink", "dropout_rate", "logits_soft_cap", "grouped", "rank 5"}


# Modes that compute what others compute: put together in another way, or one operation at a time.
ALIKE = {"pmap", "remat with a policy", "custom_jvp", "linearize", "linear_transpose", "debug_nans, disable_jit"}


def pairs_of(configuration):
    mode, case, name = configuration
    coarse = {feature for feature in features(case) if feature in COARSE} | {case.mask is not None}
    kind = "alike" if mode in ALIKE else mode
    return {(mode, name), *((kind, feature) for feature in coarse), *((name, feature) for feature in coarse)}


@functools.cache
def run_configurations():
    """(mode, case, implementation)s to run: each mode with each implementation, and both with each coarse feature.

    Modes that are alike have each coarse feature among them.
    """
    some = [case for case in cases.CASES if case.dtype == "float32" and case.name != "longer"]
    pool = [(mode, case, name) for mode in RUN for case in some for name in cases.COMPLETE]
    return covering(pool, pairs_of)


def traced_configurations():
    """(case, implementation, modes)s: by default each feature with some implementation, and each coarse one with each.

    All are tried in the modes that share the plain trace, and each in one that traces anew. All of the latter but one
    are run below, with each coarse feature, so that one meets each of them here.
    """
    pool = [(case, name, mode) for case in cases.CASES for name in cases.COMPLETE for mode in TRACED_ANEW]
    shared = [mode for mode in TRACED if mode not in TRACED_ANEW]

    def met(configuration):
        case, name, mode = configuration
        coarse = features(case) & COARSE
        leaks = coarse if MODES[mode].traced_only else set()
        return {*features(case), (mode, name), *((name, one) for one in coarse), *((mode, one) for one in leaks)}

    chosen = [(case, name, [*shared, mode]) for case, name, mode in covering(pool, met)]
    every = [(case, name, TRACED) for case in cases.CASES for name in cases.COMPLETE]
    return [*chosen, *(pytest.param(*one, marks=pytest.mark.slow) for one in every)]


# Traced


def say(value):
    """Of the modes of a configuration the last one, which may be its own."""
    return str(value[-1] if isinstance(value, list) else value)


def types(tree):
    """Shapes and dtypes."""
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def trace(modes, function, operands, *others):
    """Traces a function of operands and other arguments in these modes; an error names the mode."""

    def under(make):
        def traced(operands, cotangents, others):
            return make(lambda operands: function(operands, *others))(operands, cotangents)

        return traced

    results = jax.eval_shape(function, operands, *others)
    expected = types(jax.eval_shape(under(derivative), operands, results, others))
    for name in modes:
        try:
            with MODES[name].setting():
                made = jax.eval_shape(under(MODES[name].derivative), operands, results, others)
        except Exception as error:
            error.add_note(f"in the mode {name!r}")
            raise
        assert types(made) == (
            expected if not MODES[name].of_value else types((results, {"value": operands["value"]}))
        ), name


@pytest.mark.parametrize(("case", "name", "modes"), traced_configurations(), ids=say)
def test_attention_is_traced_in_modes(case, name, modes):
    if (reason := cases.refusal(case, name)) is not None:
        pytest.skip(reason)
    with cases.context(case):
        operands, traced, options = cases.build(case)
        trace(modes, function_of(case, traced, options, name), operands)


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


LAYERS = {
    "plain": attnlib.MultiHeadAttention(4),
    "grouped, rotary, norms, sinks": attnlib.MultiHeadAttention(
        4, num_kv_heads=2, rotary=True, normalize_qk=True, use_sink=True, num_memory=2
    ),
    "half precision": attnlib.MultiHeadAttention(4, rotary=True, normalize_qk=True, dtype=jnp.bfloat16),
    "relative bias": attnlib.MultiHeadAttention(4, score_mod=attnlib.RelativePositionBias(sizes=(10,))),
    "bucketed bias": attnlib.MultiHeadAttention(4, score_mod=attnlib.BucketedPositionBias()),
    "additive": attnlib.AdditiveAttention(),
    "concat": attnlib.DotProductAttention(score_mode="concat", use_scale=True),
}
OF_ALL_OPERANDS = [name for name in TRACED if not MODES[name].of_value]
FEW = ["tracer leaks", "scan of checkpoint", "linearize"]
in_modes = pytest.mark.parametrize(
    "modes", [FEW, pytest.param(OF_ALL_OPERANDS, marks=pytest.mark.slow)], ids=["few", "all"]
)


@in_modes
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_traced(name, modes):
    layer, x = LAYERS[name], shape(2, 10, 16, dtype="bfloat16" if "half" in name else "float32")
    options = dict(query_mask=jnp.ones((2, 10), bool), is_causal=True)
    params = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x), x)
    trace(modes, lambda operands: layer.apply(operands[0], operands[1], **options), (params, x))


OPERANDS = shape(2, 10, 4, 8), shape(2, 9, 2, 8)
FUNCTIONS = {
    "rotary": (lambda x: positions.rotary_embedding(*x), [shape(2, 10, 4, 8)]),
    "rotary, half precision": (lambda x: positions.rotary_embedding(*x), [shape(2, 10, 4, 8, dtype="bfloat16")]),
    "rotary, positions": (
        lambda x, places: positions.rotary_embedding(*x, places), [shape(2, 10, 4, 8)], shape(2, 10, dtype="int32")
    ),
    "entropy": (lambda x: inspect.attention_entropy(*x, is_causal=True, sink=jnp.zeros(4)), OPERANDS),
    "received": (lambda x: inspect.attention_received(*x, is_causal=True, mean=True), OPERANDS),
    "top keys": (lambda x: inspect.top_keys(*x, k=3, mask=masks.SlidingWindow(4, 0))[0], OPERANDS),
    "rows": (
        lambda x: inspect.attention_rows(
            *x, rows=[1, 2], mask=masks.Lengths(key=jnp.array([3, 4])), score_mod=modifiers.ALiBi(jnp.ones(4))
        ),
        OPERANDS,
    ),
    "merge": (
        lambda x: attnlib.merge_attention([x[0], x[0]], [x[1], x[1]]), (OPERANDS[0], shape(2, 4, 10))
    ),
}  # fmt: skip


@in_modes
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_traced(name, modes):
    trace(modes, *FUNCTIONS[name])


@pytest.mark.parametrize("options", [{}, dict(window=8), dict(ragged=True), dict(dtype=jnp.bfloat16)], ids=str)
@in_modes
def test_caches_are_traced(options, modes):
    def decode(operands):
        query, key = operands
        key = key.astype(options.get("dtype", key.dtype))
        cache = attnlib.KVCache.create((2,), 16, 2, 8, **options).append(key, key)
        return cache.attend(query.astype(key.dtype))

    trace(modes, decode, (shape(2, 4, 4, 8), shape(2, 4, 2, 8)))


@in_modes
def test_edits_of_caches_are_traced(modes):
    def decode(operands):
        query, key = operands
        ring = attnlib.KVCache.create((2,), 8, 2, 8, window=5, ragged=True).append(key, key).append(key, key)
        paged = attnlib.PagedKVCache.create(2, 16, 2, 8, num_pages=5, page_size=4).append(key, key)
        forked = paged.fork(0, 1).release(jnp.array([True, False])).append(key, key)
        return ring.truncate(jnp.array([5, 8])).attend(query[:, :1]), forked.truncate(7).attend(query)

    trace(modes, decode, (shape(2, 4, 4, 8), shape(2, 4, 2, 8)))


# Run


@functools.cache
def plain(case, name):
    """(arguments of `function_of`, operands, cotangents, (results, gradients)) of a case without any mode."""
    operands, traced, options = cases.build(case)
    function = function_of(case, traced, options, name)
    cotangents = cases.like(jax.eval_shape(function, operands), 1)
    return (case, traced, options, name), operands, cotangents, jax.jit(derivative(function))(operands, cotangents)


@pytest.mark.parametrize("mode", RUN)
def test_numbers_are_the_same_in_all_modes(mode):
    for _, case, name in (one for one in run_configurations() if one[0] == mode):
        arguments, operands, cotangents, (results, gradients) = plain(case, name)
        run = MODES[mode].derivative(function_of(*arguments, tiles=not MODES[mode].op_by_op))
        try:
            with MODES[mode].setting():
                found = (jax.jit(run) if MODES[mode].jit else run)(operands, cotangents)
            assert_close(found, (results, {operand: gradients[operand] for operand in found[1]}), length=7, factor=64)
        except Exception as error:
            error.add_note(f"in the mode {mode!r}, with the case {case} and the implementation {name!r}")
            raise


def test_configurations_meet():
    """The subsets have what they claim, so a new mode, case or implementation enters them by itself."""
    kinds = {kind for module in (masks, attnlib.scores) for kind in module.__all__}
    kinds = kinds - {"Mask", "Score", "BlockPositions", "TileRanges"}
    assert set().union(*map(features, cases.CASES)) >= kinds | COARSE
    met = covered(run_configurations(), pairs_of)
    assert met >= {(mode, name) for mode in RUN for name in cases.COMPLETE}
    assert len(run_configurations()) < 12 * len(RUN)
