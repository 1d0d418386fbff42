"""Times programs side by side: interleaved, so that a noisy machine is noisy to all, and by their fastest runs."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

# Before each turn, threads that the program before left spinning (OpenMP's do, for about a millisecond) go to sleep.
PAUSE_SECONDS = 0.004
# A turn repeats a short program for this long, so that it also runs with its own code and data in the caches.
TURN_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to time: `run()` computes and waits for the result, `read(result)` gives NumPy arrays to compare."""

    run: Callable[[], Any]
    read: Callable[[Any], list[np.ndarray]]
    temporaries: int | None = None  # bytes, as the compiler counts them


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of the fastest run and of the median one."""

    best: float
    median: float
    runs: int

    @classmethod
    def of(cls, runs):
        return cls(min(runs), statistics.median(runs), len(runs))


def jax_program(function, *operands):
    """`function` of the operands, compiled but not yet run."""
    compiled = jax.jit(function).lower(*operands).compile()
    return Program(
        run=lambda: jax.block_until_ready(compiled(*operands)),
        read=lambda result: [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(result)],
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
    )


def training_step(function):
    """A loss of `function`'s output, the sum of its squares, and its gradients by all floating-point operands."""

    def step(*operands):
        floating = tuple(n for n, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.floating))
        return jax.value_and_grad(lambda *x: (function(*x) ** 2).sum(), floating)(*operands)

    return step


KINDS = {"forward": lambda function: function, "training": training_step}


def measure(programs, repeats=7, seconds=None):
    """{name: Times} of `{name: Program}`, each of which has run before.

    Rounds over all programs, each round beginning with another one, are repeated `repeats` times, or until `seconds`
    have passed.
    """
    names, taken = list(programs), {name: [] for name in programs}
    started = time.perf_counter()
    for turn in tqdm(range(repeats), desc="measuring", leave=False):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken[name] += _turn(programs[name].run)
        if seconds is not None and time.perf_counter() - started > seconds:
            break
    return {name: Times.of(runs) for name, runs in taken.items()}


def _turn(run):
    time.sleep(PAUSE_SECONDS)
    taken, left = [], TURN_SECONDS
    while left > 0:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
        left -= taken[-1]
    return taken


def compare(programs, repeats=7, seconds=None):
    """{name: fastest seconds} of `{name: (function, operands)}`, each function compiled first."""
    compiled = {}
    for name, (function, operands) in tqdm(programs.items(), desc="compiling", leave=False):
        compiled[name] = jax_program(function, *operands)
        compiled[name].run()
    return {name: times.best for name, times in measure(compiled, repeats, seconds).items()}


def contest(makers, repeats, seconds, tolerance, uncompared=()):
    """Times contestants that compute the same thing, after seeing that they do.

    Args:
      makers: {name: a function that makes its Program}; the first is ours, and the others are compared with it.
      repeats, seconds: as in `measure`.
      tolerance: the largest difference of a result from ours, relative to ours, both in the Euclidean norm.
      uncompared: names that are timed although they compute something else.

    Returns:
      {name: Times}, and {name: reason} of the peers that do not run; a result that differs is not timed, and its
      reason begins with "differs".
    """
    ours, programs, refused = None, {}, {}
    for name, make in tqdm(makers.items(), desc="compiling", leave=False):
        try:
            program = make()
            result = program.read(program.run())
        except Exception as error:  # whatever stops a peer is a line of the report; what stops ours is not
            if ours is None:
                raise
            refused[name] = f"raises {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            continue
        if ours is None:
            ours = result
        elif name not in uncompared:
            difference = max(relative_difference(*pair) for pair in zip(ours, result, strict=True))
            if not difference <= tolerance:  # NaN differs
                refused[name] = f"differs from {next(iter(makers))} by {difference:.2g}, more than {tolerance:.2g}"
                continue
        programs[name] = program
    return measure(programs, repeats, seconds), refused


def relative_difference(ours, theirs):
    if ours.shape != theirs.shape:
        return float("nan")
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(ours), np.finfo(np.float32).tiny))
