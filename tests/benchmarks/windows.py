"""Masks pay for the tiles they touch: python tests/benchmarks/windows.py

Prints the time of causal attention with a window of 256 keys against full causal attention at length 16384, and that
the cost of a window grows as the length does. Then the time of a neighbourhood of 3 x 3 tiles of 8 x 8 pixels in an
image of 64 x 64, against attention of as many queries to as many keys without a mask.
"""

import argparse

import jax
from timing import KINDS, compare

import attnlib
from attnlib import masks

WINDOW = 256
TILE, TILES, NEAR = 8, 8, 3  # pixels and tiles along an axis of the image, and tiles that a tile attends to


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
    neighborhood(options.repeats)


def neighborhood(repeats):
    """Over axes of tiles, in which each tile of the image is a tile of the computation, and over no image at all."""
    pixels, keys = (TILES * TILE) ** 2, (NEAR * TILE) ** 2
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, pixels, 2, 64))
    image = tuple(x.reshape(1, TILES, TILE, TILES, TILE, 2, 64).swapaxes(2, 3) for x in (query, key, value))
    near = masks.Neighborhood((NEAR, NEAR, TILE, TILE))

    def tiled(q, k, v):
        sizes = (TILE**2, TILE**2)
        return attnlib.dot_product_attention(q, k, v, mask=near, implementation="blockwise", block_sizes=sizes)

    def whole(q, k, v):
        return attnlib.dot_product_attention(q, k, v, implementation="blockwise", block_sizes=(TILE**2, keys))

    programs = {}
    for kind, make in KINDS.items():
        programs[f"tiles {kind}"] = (make(tiled), image)
        programs[f"keys {kind}"] = (make(whole), (query, key[:, :keys], value[:, :keys]))
    times = compare(programs, repeats)
    for kind in KINDS:
        ratio = times[f"tiles {kind}"] / times[f"keys {kind}"]
        print(f"{kind}: a neighbourhood of {keys} pixels takes {ratio:.2f}x the time of attention to {keys} keys")


if __name__ == "__main__":
    main()
