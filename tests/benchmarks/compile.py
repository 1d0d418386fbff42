"""The first call, which traces, lowers and compiles: python tests/benchmarks/compile.py

Needs `pip install -e ".[demo]"` at the root of the repository; to compare with Keras also `pip install keras`. A peer
that is not installed, or that cannot do what a row asks, is left out with its reason. Takes about ten minutes, less
with `--only` and the names of some calls; let nothing else run meanwhile. Prints a table and writes compile.json into
`--out`.

It measures first calls only and runs nothing: the CPU seconds of each step, of all threads, and the number of HLO
instructions in the optimised program, in all of its computations. That number does not depend on what else the machine
does. Each number is the least of `--repeats` rounds over the libraries, with `jax.clear_caches()` before each call and
the persistent compilation cache off. With two rounds or more, what only the first call in a process pays, such as
imports, is therefore not in it. "programs" counts compilations: more than one means that something ran and was compiled
on its own while the call was traced.

Each call is compiled forward and as a training step: the sum of squares of the output with its gradients by all
floating-point operands. Where jax.nn cannot do a call, its plain dot products of the same operands are what the
others are compared with: the row "jax.nn's dot".
"""

import dataclasses
import functools
import itertools
import time

import additive
import jax
import jax.numpy as jnp
import peers
from dot import square
from report import Ratio, Report, parse, parser, table, verdict
from timing import KINDS, FirstCall, first_call
from tqdm import tqdm

import attnlib
from attnlib import masks

SHAPES = [(1, 2048, 8, 64), (32, 64, 8, 64)]  # (batch, length, heads, features)
ADDITIVE_SHAPES = [(1, 1024, 128)]  # (batch, length, features), one head
DROPOUT_RATE = 0.1
BASELINE = "jax.nn's dot"
# At most this many times the CPU seconds of jax.nn.
TARGETS = {
    ("dot", (1, 2048, 8, 64), "training"): 1.5,
    ("causal", (1, 2048, 8, 64), "training"): 3,
    ("additive", (1, 1024, 128), "training"): 3,
}


# What each library makes of a call: {call: a function, or the reason why it has none}


def masked(make, shape):
    """The calls that peers.py knows."""
    rows = {"dot": None, "causal": "causal", "lengths": "lengths"}
    return {name: make(square(*shape[:2], mask=mask)) for name, mask in rows.items()}


def window(shape):
    """An eighth of the length, to the left: of every query itself and the keys before it."""
    return max(1, shape[1] // 8) - 1, 0


def in_attnlib(shape):
    attend = attnlib.dot_product_attention
    return masked(peers.dot_attnlib, shape) | {
        "window": functools.partial(attend, mask=masks.SlidingWindow(*window(shape))),
        "bias": lambda q, k, v, bias: attend(q, k, v, bias=bias),
        "dropout": lambda q, k, v, rng: attend(q, k, v, dropout_rate=DROPOUT_RATE, dropout_rng=rng),
        "sink": lambda q, k, v, sink: attend(q, k, v, sink=sink),
        "additive": additive.ours,
    }


def in_jax_nn(shape):
    attend = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    return masked(peers.dot_jax_nn, shape) | {
        "window": functools.partial(attend, local_window_size=window(shape)),
        "bias": lambda q, k, v, bias: attend(q, k, v, bias=bias),
        "dropout": "its function has no dropout",
        "sink": "its function has no sink",
        "additive": "it has no additive attention",
    }


def in_flax(shape):
    from flax.linen import dot_product_attention as attend

    def dropout(q, k, v, rng):
        return attend(q, k, v, dropout_rng=rng, dropout_rate=DROPOUT_RATE, broadcast_dropout=False)

    return masked(peers.dot_flax, shape) | {
        "causal": "its function has no causal option, only a mask as an array",
        "window": "its function has no windows, only a mask as an array",
        "bias": lambda q, k, v, bias: attend(q, k, v, bias=bias),
        "dropout": dropout,
        "sink": "its function has no sink",
        "additive": "it has no additive attention",
    }


def in_keras(shape):
    """Its dot products are jax.nn's, called by its backend for JAX."""
    attend = functools.partial(peers.load("keras").ops.dot_product_attention, flash_attention=False)

    def lengths(q, k, v, lengths):
        return attend(q, k, v, mask=(jnp.arange(k.shape[1]) < lengths[:, None])[:, None, None])

    return {
        "dot": attend,
        "causal": functools.partial(attend, is_causal=True),
        "lengths": lengths,
        "window": "its function has no windows, only a mask as an array",
        "bias": lambda q, k, v, bias: attend(q, k, v, bias=bias),
        "dropout": "its function has no dropout",
        "sink": "its function has no sink",
        "additive": additive.keras_layer(shape) if len(shape) == 3 else None,
    }


LIBRARIES = {"attnlib": in_attnlib, "jax.nn": in_jax_nn, "Flax": in_flax, "Keras": in_keras}
MODULES = {"Flax": "flax", "Keras": "keras"}
CALLS = {
    **dict.fromkeys(("dot", "causal", "window", "lengths", "bias", "dropout", "sink"), SHAPES),
    "additive": ADDITIVE_SHAPES,
}


def operands(call, shape):
    """As shapes: nothing runs."""
    batch, length, *heads, features = shape
    extra = {
        "lengths": lambda: jax.ShapeDtypeStruct((batch,), jnp.int32),
        "bias": lambda: jax.ShapeDtypeStruct((1, *heads, length, length), jnp.float32),
        "dropout": lambda: jax.eval_shape(jax.random.key, 0),
        "sink": lambda: jax.ShapeDtypeStruct((*heads,), jnp.float32),
        "additive": lambda: jax.ShapeDtypeStruct((features,), jnp.float32),
    }
    return [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3 + ([extra[call]()] if call in extra else [])


def contestants(call, shape):
    """({library: (function, operands)}, {library: reason})."""
    installed = [name for name in LIBRARIES if name not in MODULES or peers.load(MODULES[name])]
    made = {name: LIBRARIES[name](shape)[call] for name in installed}
    refused = {name: function for name, function in made.items() if isinstance(function, str)}
    found = {name: (function, operands(call, shape)) for name, function in made.items() if name not in refused}
    if "jax.nn" in refused:
        with_heads = shape if len(shape) == 4 else (*shape[:2], 1, *shape[2:])
        found[BASELINE] = in_jax_nn(with_heads)["dot"], operands("dot", with_heads)
    return found, refused


def run_row(call, shape, kind, options):
    """The row as it goes into the report."""
    target = TARGETS.get((call, shape, kind))
    if options.quick:
        shape = (shape[0], shape[1] // 16, *shape[2:])
    found, refused = contestants(call, shape)
    taken, started = {name: [] for name in found}, time.perf_counter()
    for _ in range(options.repeats):
        for name, (function, arrays) in found.items():
            taken[name].append(first_call(KINDS[kind](function), arrays))
        if time.perf_counter() - started > options.seconds:
            break
    calls = {name: FirstCall.least(rounds) for name, rounds in taken.items()}
    against = "jax.nn" if "jax.nn" in calls else BASELINE
    ratios = {name: over(made, calls[against], against) for name, made in calls.items() if name != against}
    if not options.quick and target is not None:
        ratios["attnlib"]["seconds"] = dataclasses.replace(ratios["attnlib"]["seconds"], target=target, at_most=True)
    return dict(row=f"{call} {shape} {kind}", call=call, calls=calls, ratios=ratios, refused=refused)


def over(made, other, against):
    return {name: Ratio(against, getattr(made, name) / getattr(other, name)) for name in ("seconds", "instructions")}


def lines_of(done):
    for name, made in done["calls"].items():
        ratios = done["ratios"].get(name, {})
        seconds, instructions = (f"{ratios[key].value:.2f}x" if ratios else "" for key in ("seconds", "instructions"))
        steps = [f"{value:.3f}" for value in (made.trace, made.lower, made.compile, made.seconds)]
        yield [f"{done['row']}: {name}", *steps, seconds, made.instructions, instructions, made.programs]


HEADER = "first call|trace|lower|compile|all|over jax.nn|HLO instructions|over jax.nn|programs".split("|")


def main():
    jax.config.update("jax_enable_compilation_cache", False)
    made = parser(__doc__, repeats=3, seconds=60)
    made.add_argument("--only", nargs="+", choices=CALLS, default=list(CALLS), help="calls")
    options = parse(made)
    print("measures first calls: tracing, lowering, compiling; runs nothing")
    report, done = Report("compile", options), []
    rows = [(call, shape, kind) for call in options.only for shape, kind in itertools.product(CALLS[call], KINDS)]
    for row in tqdm(rows, desc="rows"):
        done.append(run_row(*row, options))
        report.add("first calls", done[-1])
    print("\nCPU seconds of each step of a first call, least of the rounds; above 1x: more than jax.nn's")
    print(table(HEADER, [line for row in done for line in lines_of(row)]))
    for call, name, reason in dict.fromkeys((row["call"], *item) for row in done for item in row["refused"].items()):
        print(f"{call} without {name}: {reason}")
    print(verdict([(row["row"], row["ratios"]["attnlib"]["seconds"]) for row in done]))


if __name__ == "__main__":
    main()
