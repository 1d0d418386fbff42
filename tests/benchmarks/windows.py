"""Masks pay for the tiles they touch: python tests/benchmarks/windows.py

Prints the time of causal attention with a window of 256 keys against full causal attention at length 16384, and that
the cost of a window grows as the length does.
"""

import argparse

import jax
from timing import KINDS, compare

import attnlib
from attnlib import masks

WINDOW = 256


def attend(mask):
    return lambda q, k, v: attnlib.dot_product_attention(q, k, v, mask=mask, implementation="blockwise")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    window = masks.SlidingWindow(WINDOW - 1, 0)
    programs = {}
    for length in (options.length // 4, options.length // 2, options.length):
        operands = tuple(jax.random.normal(jax.random.key(0), (3, 1, length, 2, 64)))
        for kind, make in KINDS.items():
            programs[f"window {length} {kind}"] = (make(attend(window)), operands)
    for kind, make in KINDS.items():  # at the longest
        programs[f"causal {kind}"] = (make(attend(masks.Causal())), operands)
    times = compare(programs, options.repeats)
    for name, seconds in times.items():
        print(f"{name:28s} {seconds * 1e3:9.1f} ms")
    for kind in KINDS:
        speedup = times[f"causal {kind}"] / times[f"window {options.length} {kind}"]
        growth = times[f"window {options.length} {kind}"] / times[f"window {options.length // 4} {kind}"]
        print(
            f"{kind}: a window of {WINDOW} is {speedup:.1f}x as fast as full causal; 4x the length costs {growth:.1f}x"
        )


if __name__ == "__main__":
    main()
