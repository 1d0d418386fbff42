"""Where tiles begin to pay: python tests/benchmarks/crossover.py

Times the dense implementation against the tiled one, forward and training, over sizes around the crossover, for dot,
additive and custom scores, and prints what `implementation=None` chooses. It sets the numbers in
`attnlib._engine.dispatch`.
"""

import argparse

import jax
import jax.numpy as jnp
from timing import KINDS, compare

import attnlib
from attnlib import scores

SIZES = {
    "dot": [(32, 16), (32, 64), (8, 128), (8, 256), (4, 512), (1, 512), (1, 1024), (1, 2048)],
    "custom": [(32, 16), (32, 64), (8, 128), (4, 256), (1, 512), (1, 1024)],
    "additive": [(1, 16), (1, 64), (32, 16), (32, 64), (8, 128), (4, 256), (1, 512), (1, 1024)],
}
HEADS = {"dot": 8, "custom": 1, "additive": 1}


def distance(query, key):
    return -jnp.sum(jnp.abs(query - key))


SCORES = {
    "dot": lambda: scores.Dot(),
    "custom": lambda: scores.Custom(distance),
    "additive": lambda: scores.Additive(jnp.ones(64)),
}


def attend(score, implementation):
    return lambda q, k, v: attnlib.attention(q, k, v, score=SCORES[score](), implementation=implementation)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--score", choices=SCORES, nargs="*", default=list(SCORES))
    options = parser.parse_args()
    for score in options.score:
        print(f"{score}, {HEADS[score]} heads x 64 features, times in ms: dense / tiled = ratio")
        for batch, length in SIZES[score]:
            operands = tuple(jax.random.normal(jax.random.key(0), (3, batch, length, HEADS[score], 64)))
            programs = {
                (name, kind): (make(attend(score, name)), operands)
                for name in ("reference", "blockwise")
                for kind, make in KINDS.items()
            }
            times = compare(programs, options.repeats, seconds=20)
            chosen = attnlib.explain(*operands, score=SCORES[score]()).implementation
            cells = []
            for kind in KINDS:
                dense, tiled = (times[name, kind] * 1e3 for name in ("reference", "blockwise"))
                cells.append(f"{kind} {dense:8.2f} / {tiled:8.2f} = {dense / tiled:5.2f}")
            pairs = batch * HEADS[score] * length**2
            print(f"  {(batch, length)!s:12s} {pairs / 2**20:7.2f} M pairs   {'   '.join(cells)}   chosen: {chosen}")


if __name__ == "__main__":
    main()
