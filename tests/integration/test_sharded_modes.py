"""All cases with batch, heads or both sharded: inside `jax.shard_map` with its check of types, and on Explicit meshes.

Cases are traced with their gradients, in the layout that shards most: by default some in which each feature is, all of
them in the slow tests. The types that JAX checks are those of the trace. Numbers are compared for a few, in which each
mode meets each feature but scores and modifiers, each of these is once, and each implementation meets each mode and
layout.
"""

import functools

import covering
import jax
import numpy as np
import pytest
from cases import BY_NAME, CASES, COMPLETE, build, context, refusal
from conftest import assert_close
from jax.sharding import AxisType, NamedSharding
from sharded_cases import LAYOUTS, arguments, depends_on_shards, program, sharded

pytestmark = pytest.mark.devices


def in_shard_map(one, implementation):
    """(the function, its arguments, the mesh, the specs of its results)."""
    args = arguments(one.case, implementation)
    specs = one.specs(args[0]), one.specs(args[1]), one.result_specs()
    mesh, results = one.mesh(AxisType.Auto), (specs[2], specs[0])
    function = jax.shard_map(program(one.case, implementation), mesh=mesh, in_specs=specs, out_specs=results)
    return function, args, mesh, results


def on_explicit_mesh(one, implementation):
    """Likewise, with sharded arguments, to call with the mesh set."""
    args = arguments(one.case, implementation)
    specs = one.specs(args[0]), one.specs(args[1]), one.result_specs()
    mesh = one.mesh(AxisType.Explicit)
    args = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), args, specs)
    return program(one.case, implementation), args, mesh, (specs[2], specs[0])


LARGEST = [(case, next(filter(None, (sharded(case, layout) for layout in LAYOUTS)), None)) for case in CASES]
SHARDED = {case.name: one for case, one in LARGEST if one is not None}


@functools.cache
def features(case):
    """What a case is of."""
    with context(case):
        operands, traced, options = build(case)
    of_mask = "arrays" if jax.tree.leaves(traced.get("mask")) else "positions" if "mask" in traced else "none"
    heads = "one key head" if case.key[-2] == 1 else "groups" if case.query[-2] > case.key[-2] else "equal"
    return {
        f"score {type(operands['score']).__name__}",
        f"modifier {type(operands.get('score_mod')).__name__}",
        f"mask of {of_mask}",
        f"heads: {heads}",
        f"rank {len(case.query)}",
        f"batch of {case.query[0]} and {case.key[0]}" if case.query[0] != case.key[0] else "batch",
        *({"bias", "sink", "dropout_rng", "query_positions"} & {*operands, *traced}),
        *({"logits_soft_cap", "attention_axes"} & {*options}),
    }


CHOSEN = covering.covering(list(SHARDED), lambda name: features(BY_NAME[name]))
named = pytest.mark.parametrize(
    "name", [name if name in CHOSEN else pytest.param(name, marks=pytest.mark.slow) for name in SHARDED]
)


def implementations(case):
    return [name for name in COMPLETE if refusal(case, name) is None]


@named
def test_shard_map_traces(name):
    one = SHARDED[name]
    with context(one.case):
        for implementation in implementations(one.case):
            function, args, *_ = in_shard_map(one, implementation)
            jax.eval_shape(function, *args)


@named
def test_explicit_mesh_traces(name):
    """The results are sharded as the operands, and the gradients as what they are of."""
    one = SHARDED[name]
    with context(one.case):
        for implementation in implementations(one.case):
            function, args, mesh, specs = on_explicit_mesh(one, implementation)
            with jax.set_mesh(mesh):
                results = jax.eval_shape(function, *args)
            for x, spec in zip(jax.tree.leaves(results), jax.tree.leaves(specs), strict=True):
                names = [*spec, *[None] * x.ndim][: x.ndim]
                assert [*x.sharding.spec, *[None] * x.ndim][: x.ndim] == names


def configurations():
    """A few of (mode, layout, implementation, name of a case), by name."""
    pool = []
    for case in CASES:
        labels = features(case)
        for layout in LAYOUTS:
            one = sharded(case, layout)
            for mode in MODES:
                if one is None or (mode == "shard_map" and depends_on_shards(one)):
                    continue
                pool += [((mode, layout, how, case.name), labels) for how in implementations(case)]

    def groups(entry):
        (mode, layout, how, _), labels = entry
        run = [("mode", mode), ("layout", layout), ("how", how)]
        # A score or modifier computes the logits of a shard alike in each mode, and the types of all are traced above.
        of_mode = {label if label.startswith(("score", "modifier")) else (mode, label) for label in labels}
        return of_mode | covering.pairs(run)

    return [entry for entry, _ in covering.covering(pool, groups)]


MODES = {"shard_map": in_shard_map, "explicit": on_explicit_mesh}


@pytest.mark.parametrize(("mode", "layout", "implementation", "name"), configurations())
def test_numbers(mode, layout, implementation, name):
    """Values and gradients are those of the plain call."""
    case = BY_NAME[name]
    with context(case):
        function, args, mesh, _ = MODES[mode](sharded(case, layout), implementation)
        with jax.set_mesh(mesh):
            made = jax.jit(function)(*args)
        expected = jax.jit(program(case, implementation))(*arguments(case, implementation))
        assert_close(jax.tree.map(np.asarray, made), jax.tree.map(np.asarray, expected), length=16)
