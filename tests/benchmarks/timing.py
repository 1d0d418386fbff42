"""Times programs side by side: interleaved, so that a noisy machine is noisy to all, and by their fastest runs."""

import dataclasses
import functools
import gc
import itertools
import re
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
    peak: int | None = None  # bytes of arguments, results and temporaries


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
    memory = compiled.memory_analysis()
    both = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(
        run=lambda: jax.block_until_ready(compiled(*operands)),
        read=lambda result: [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(result)],
        temporaries=memory.temp_size_in_bytes,
        peak=both + memory.temp_size_in_bytes,
    )


def training_step(function):
    """A loss of `function`'s output, the sum of its squares, and its gradients by all floating-point operands."""

    def step(*operands):
        floating = tuple(n for n, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.floating))
        return jax.value_and_grad(lambda *x: (function(*x) ** 2).sum(), floating)(*operands)

    return step


KINDS = {"forward": lambda function: function, "training": training_step}


@dataclasses.dataclass(frozen=True)
class FirstCall:
    """Seconds of each step of a first call, and how large its program is, which does not depend on the load."""

    trace: float
    lower: float
    compile: float
    instructions: int  # HLO instructions of the optimised program, in all of its computations
    programs: int  # compilations: also those of operations that ran while the function was traced

    @property
    def seconds(self):
        return self.trace + self.lower + self.compile

    @classmethod
    def least(cls, calls):
        """The minimum of each number."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: min(getattr(call, name) for call in calls) for name in names})


def first_call(function, operands, clock=time.process_time):
    """A FirstCall: traces, lowers and compiles `function` after emptying JAX's caches, and runs nothing.

    The persistent compilation cache has to be off: `jax.config.update("jax_enable_compilation_cache", False)` before
    the first compilation of the process. The operands may be `jax.ShapeDtypeStruct`s.
    """
    jax.clear_caches()
    gc.collect()  # what it left, or it would be collected while the clock runs
    compilations = _compilations()
    before, times = len(compilations), [clock()]
    traced = jax.jit(function).trace(*operands)
    times.append(clock())
    lowered = traced.lower()
    times.append(clock())
    compiled = lowered.compile()
    times.append(clock())
    steps = [after - start for start, after in itertools.pairwise(times)]
    instructions = re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", compiled.as_text(), re.MULTILINE)
    return FirstCall(*steps, len(instructions), len(compilations) - before)


@functools.cache
def _compilations():
    """A list that grows with each compilation of this process."""
    seen = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen


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


def contest(makers, repeats, seconds, tolerance, uncompared=(), ours_must_run=True):
    """Times contestants that compute the same thing, after seeing that they do.

    Args:
      makers: {name: a function that makes its Program}; the first is ours, and the others are compared with it.
      repeats, seconds: as in `measure`.
      tolerance: the largest difference of a result from ours, relative to ours, both in the Euclidean norm.
      uncompared: names that are timed although they compute something else.
      ours_must_run: whether an error of the first is raised; otherwise it is a reason, as an error of a peer is, and
        the first that runs is what the others are compared with.

    Returns:
      {name: Times}, and {name: reason} of those that do not run; a result that differs is not timed, and its reason
      begins with "differs".
    """
    ours, compared_with, programs, refused = None, None, {}, {}
    for name, make in tqdm(makers.items(), desc="compiling", leave=False):
        try:
            program = make()
            result = program.read(program.run())
        except Exception as error:  # whatever stops a peer is a line of the report; what stops ours is not
            if ours is None and ours_must_run:
                raise
            refused[name] = reason_of(error)
            continue
        if ours is None:
            ours, compared_with = result, name
        elif name not in uncompared:
            difference = max(relative_difference(*pair) for pair in zip(ours, result, strict=True))
            if not difference <= tolerance:  # NaN differs
                refused[name] = f"differs from {compared_with} by {difference:.2g}, more than {tolerance:.2g}"
                continue
        programs[name] = program
    return measure(programs, repeats, seconds), refused


def reason_of(error):
    """An error in one line."""
    line = next(iter(str(error).strip().splitlines()), "")[:120]
    if "RESOURCE_EXHAUSTED" in str(error):
        return f"out of memory: {line}"
    return f"raises {type(error).__name__}: {line}"


def relative_difference(ours, theirs):
    if ours.shape != theirs.shape:
        return float("nan")
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(ours), np.finfo(np.float32).tiny))
