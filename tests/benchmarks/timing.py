"""Times programs side by side: interleaved, so that a noisy machine is noisy to all, and by their fastest runs."""

import time

import jax
from tqdm import tqdm


def compare(programs, repeats=7, seconds=None):
    """{name: fastest seconds} of `{name: (function, operands)}`, each function compiled first.

    Rounds over all programs are repeated `repeats` times, or until `seconds` have passed.
    """
    compiled = {}
    for name, (function, operands) in tqdm(programs.items(), desc="compiling", leave=False):
        compiled[name] = jax.jit(function).lower(*operands).compile()
        jax.block_until_ready(compiled[name](*operands))
    best = dict.fromkeys(programs, float("inf"))
    started = time.perf_counter()
    for _ in tqdm(range(repeats), desc="measuring", leave=False):
        for name, (_, operands) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](*operands))
            best[name] = min(best[name], time.perf_counter() - start)
        if seconds is not None and time.perf_counter() - started > seconds:
            break
    return best


def training_step(function):
    """Output and all gradients of a loss of `function`."""

    def step(*operands):
        return jax.value_and_grad(lambda *x: (function(*x) ** 2).sum(), tuple(range(len(operands))))(*operands)

    return step
