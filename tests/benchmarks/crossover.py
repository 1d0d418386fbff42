"""Where tiles begin to pay: python tests/benchmarks/crossover.py

Times what computes all pairs at once (the reference; one tile, for dot products) against tiles, forward and training,
over sizes around the crossover, for dot, additive and custom scores, and for dot products under a causal mask, and
prints what `implementation=None` chooses. It sets the numbers in `attnlib/_engine/dispatch.py` and
`attnlib/_engine/blockwise/plan.py`.
"""

import argparse

import jax
import jax.numpy as jnp
from timing import KINDS, compare

import attnlib
from attnlib import scores
from attnlib._engine.blockwise.implementation import blockwise

# Batch, queries, and keys where they are not as many.
SIZES = {
    "causal": [(1, 16), (32, 8), (8, 16), (32, 16), (64, 24), (32, 64)],
    "dot": [(32, 16), (32, 64), (8, 128), (8, 256), (4, 512), (1, 512), (1, 1024), (1, 2048)],
    "custom": [(32, 16), (32, 64), (8, 128), (4, 256), (1, 512), (1, 1024)],
    "additive": [(1, 16), (32, 16), (8, 32), (1, 64), (8, 64), (32, 64), (8, 128), (4, 256), (1, 512), (1, 1024),
                 (32, 1, 64), (32, 1, 1024), (1, 1, 4096), (32, 2, 1024), (32, 512, 1)],
}  # fmt: skip
HEADS = {"causal": 8, "dot": 8, "custom": 1, "additive": 1}


def distance(query, key):
    return -jnp.sum(jnp.abs(query - key))


SCORES = {
    "causal": lambda: scores.Dot(),
    "dot": lambda: scores.Dot(),
    "custom": lambda: scores.Custom(distance),
    "additive": lambda: scores.Additive(jnp.ones(64)),
}
# The last of each is what the others are compared with.
PATHS = {
    "causal": {"reference": "reference", "one tile": blockwise("dense")},
    "dot": {"reference": "reference", "one tile": blockwise("dense"), "all heads": blockwise("all_heads"),
            "heads in turn": blockwise("loop_over_heads")},
    "custom": {"reference": "reference", "all heads": blockwise("all_heads")},
    "additive": {"reference": "reference", "all heads": blockwise("all_heads")},
}  # fmt: skip


def attend(score, implementation):
    options = dict(score=SCORES[score](), is_causal=score == "causal", implementation=implementation)
    return lambda q, k, v: attnlib.attention(q, k, v, **options)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--score", choices=SCORES, nargs="*", default=list(SCORES))
    options = parser.parse_args()
    for score in options.score:
        paths = PATHS[score]
        print(f"{score}, {HEADS[score]} heads x 64 features: times in ms of {', '.join(paths)}")
        for batch, *lengths in SIZES[score]:
            lengths = [lengths[0], lengths[-1], lengths[-1]]
            operands = [jax.random.normal(jax.random.key(n), (batch, lengths[n], HEADS[score], 64)) for n in range(3)]
            programs = {
                (name, kind): (make(attend(score, path)), operands)
                for name, path in paths.items()
                for kind, make in KINDS.items()
            }
            times = compare(programs, options.repeats, seconds=20)
            cells = (f"{kind} {' '.join(f'{times[name, kind] * 1e3:8.2f}' for name in paths)}" for kind in KINDS)
            chosen = attnlib.explain(*operands, score=SCORES[score](), is_causal=score == "causal").implementation
            pairs = batch * HEADS[score] * lengths[0] * lengths[1] / 2**20
            sizes = " x ".join(map(str, (batch, *lengths[:2])))
            print(f"  {sizes:16s} {pairs:7.2f} M pairs  {'  '.join(cells)}  chosen: {chosen}")


if __name__ == "__main__":
    main()
