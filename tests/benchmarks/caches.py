"""Steps of caches that go back, and of caches in pages: python tests/benchmarks/caches.py

One query against a cache of many keys, compiled, with the cache donated, as in decode.py. The ratios are the time
of a step divided by that of a step of a KVCache with as many keys: of a step that first truncates the cache by a
token, on a plain cache and on a ring that is full, and of a PagedKVCache. Prints a table and writes caches.json into
`--out`.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from decode import FEATURES, TOLERANCE, Row, stepping
from report import Ratio, Report, milliseconds, parse, parser, table, verdict
from timing import contest
from tqdm import tqdm

import attnlib

ROWS = [Row(1, 16384), Row(8, 2048), Row(4, 16384, 2)]


def plain(row, *, window=None, truncates=False):
    """A KVCache with one free place, or a full ring."""
    query, key, value = row.operands()
    ring = dict(capacity=row.keys, window=row.keys - 1) if window else dict(capacity=row.keys)
    cache = attnlib.KVCache.create((row.batch,), num_kv_heads=row.kv_heads, key_dim=FEATURES, **ring)
    cache, length = cache.append(key, value), np.int32(row.keys - 1)
    cache = cache.truncate(row.keys) if truncates else cache  # which gives it the fields that it needs

    def step(cache, *tokens):
        if truncates:
            cache = cache.truncate(length)
        return cache.decode(*tokens)

    tokens = query, key[:, -1:], value[:, -1:]
    if truncates:
        return stepping(step, cache, tokens, lambda cache: cache)
    cache = dataclasses.replace(cache, length=length)
    return stepping(step, cache, tokens, lambda cache: dataclasses.replace(cache, length=length))


def pages(row, page_size):
    """A PagedKVCache with one free place in each sequence, whose sequences hold their pages in a random order."""
    query, key, value = row.operands()
    count = row.batch * row.keys // page_size
    order = jax.random.permutation(jax.random.key(1), count)
    cache = attnlib.PagedKVCache.create(
        row.batch, row.keys, row.kv_heads, FEATURES, num_pages=count, page_size=page_size
    )
    pool = [jnp.zeros_like(cache.key).at[order].set(x.reshape(cache.key.shape)) for x in (key, value)]
    length = np.full(row.batch, row.keys - 1, np.int32)
    cache = cache.replace(key=pool[0], value=pool[1], table=order.reshape(cache.table.shape), length=length)

    def step(cache, *tokens):
        return cache.decode(*tokens)

    tokens = query, key[:, -1:], value[:, -1:]
    return stepping(step, cache, tokens, lambda cache: dataclasses.replace(cache, length=length))


CONTESTANTS = {
    "KVCache": plain,
    "truncate": lambda row: plain(row, truncates=True),
    "full ring": lambda row: plain(row, window=True),
    "truncate of it": lambda row: plain(row, window=True, truncates=True),
    "pages of 16": lambda row: pages(row, 16),
    "pages of 128": lambda row: pages(row, 128),
}
RINGS = ("full ring", "truncate of it")  # the window is one key shorter, so the numbers are others
# What a step may cost, as a multiple of the same step without it.
LIMITS = {"truncate": 1.05, "truncate of it": 1.05}


def compared(times, limits):
    """The ratios of a row."""
    base = {name: "full ring" if name == "truncate of it" else "KVCache" for name in CONTESTANTS if name != "KVCache"}
    return {
        name: Ratio(base[name], times[name].best / times[base[name]].best, limits.get(name), at_most=True)
        for name in base if name in times
    }  # fmt: skip


def main():
    options = parse(parser(__doc__, repeats=15, seconds=20))
    report, done = Report("caches", options), []
    for row in tqdm(ROWS, desc="rows"):
        row = dataclasses.replace(row, keys=row.keys // 8) if options.quick else row
        makers = {name: lambda make=make, row=row: make(row) for name, make in CONTESTANTS.items()}
        times, refused = contest(makers, options.repeats, options.seconds, TOLERANCE, uncompared=RINGS)
        limits = {} if options.quick else LIMITS
        done.append(dict(row=str(row), times=times, ratios=compared(times, limits), refused=refused))
        report.add("caches", done[-1])
    print("\nmilliseconds a step, fastest (median)")
    header = ["batch x cached keys", *CONTESTANTS]
    print(
        table(header, [[row["row"], *(milliseconds(row["times"].get(name)) for name in CONTESTANTS)] for row in done])
    )
    print("\ntime divided by that of a KVCache; of `truncate of it`, by that of the full ring")
    names = list(CONTESTANTS)[1:]
    print(table(["", *names], [[row["row"], *(row["ratios"][name].cells()[0] for name in names)] for row in done]))
    print(verdict([(row["row"], ratio) for row in done for ratio in row["ratios"].values()]))
    wrong = [f"{row['row']}: {reason}" for row in done for reason in row["refused"].values()]
    sys.exit("\n".join(["failed:", *wrong]) if wrong else 0)


if __name__ == "__main__":
    main()
