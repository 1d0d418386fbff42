"""What a call costs before it computes: the last section of dot.py."""

import time

import jax
import jax.numpy as jnp
from report import Ratio, milliseconds, table
from timing import KINDS, Program, Times, first_call, measure
from tqdm import tqdm

import attnlib

DISPATCH_TARGET, COMPILE_TARGET = 1.3, 2
FUNCTIONS = {"attnlib": attnlib.dot_product_attention, "jax.nn": jax.nn.dot_product_attention}
# Lengths of which attnlib computes all pairs at once, and tile by tile.
COMPILED_LENGTHS = (128, 1024)
COMPILATIONS = 5


def overhead(report, options):
    """Times, as a table, of an eager call on a short input and of a first compilation; [(row, Ratio)]."""
    found, lines = [], []
    rows = [("eager call, (1, 16, 8, 64)", dispatch(options), DISPATCH_TARGET)]
    lengths = [length // 8 for length in COMPILED_LENGTHS] if options.quick else COMPILED_LENGTHS
    for length in lengths:
        for kind in KINDS:
            times = compilation(kind, length, 1 if options.quick else COMPILATIONS)
            rows.append((f"compiling {kind}, length {length}", times, COMPILE_TARGET))
    for name, times, target in rows:
        # Time here is attnlib's over jax.nn's: how much more it costs.
        ratio = Ratio("jax.nn's", times["attnlib"].best / times["jax.nn"].best, target, at_most=True)
        report.add("overhead", dict(row=name, times=times, ratio=ratio))
        found.append((name, ratio))
        lines.append([name, *map(milliseconds, times.values()), *ratio.cells()])
    print("\noverhead: milliseconds, fastest (median)")
    print(table(["", *FUNCTIONS, "of jax.nn's", "target", "met"], lines))
    return found


def dispatch(options):
    """Of the function as a user calls it; jax.nn's is not jitted inside, so that its user jits it."""
    operands = tuple(jax.random.normal(jax.random.key(0), (3, 1, 16, 8, 64)))
    functions = {"attnlib": FUNCTIONS["attnlib"], "jax.nn": jax.jit(FUNCTIONS["jax.nn"])}
    programs = {name: Program(lambda f=f: jax.block_until_ready(f(*operands)), list) for name, f in functions.items()}
    for program in programs.values():
        program.run()
    return measure(programs, 1 if options.quick else 50)


def compilation(kind, length, repeats):
    """Tracing, lowering and compiling, of another length each time and without anything remembered."""
    jax.config.update("jax_enable_compilation_cache", False)
    taken = {name: [] for name in FUNCTIONS}
    for n in tqdm(range(repeats), desc=f"compiling {kind}", leave=False):
        operand = jax.ShapeDtypeStruct((1, length + 8 * n, 8, 64), jnp.float32)
        for name, function in FUNCTIONS.items():
            taken[name].append(first_call(KINDS[kind](function), (operand,) * 3, time.perf_counter).seconds)
    return {name: Times.of(runs) for name, runs in taken.items()}
