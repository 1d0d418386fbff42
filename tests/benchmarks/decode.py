"""One decoding step against Flax's: python tests/benchmarks/decode.py

One query against a cache of many keys, full or with few of its places in use, compiled, with the cache donated. Prints
a table and writes decode.json into `--out`. The peer is `flax.linen.MultiHeadDotProductAttention(decode=True)`,
stripped to its attention: its projections hand their input on, so that both append one token to their cache, attend,
and do nothing else. Flax has no grouped heads: there its cache holds the keys of each query head, as its users have to
arrange it.
"""

import dataclasses
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from report import Ratio, Report, milliseconds, parse, parser, table, verdict
from timing import Program, contest
from tqdm import tqdm

import attnlib

FEATURES, HEADS = 64, 8
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Row:
    batch: int
    keys: int
    kv_heads: int = HEADS
    in_use: int | None = None  # how many of the keys; None: all

    def __str__(self):
        heads = f", {HEADS}/{self.kv_heads} heads" if self.kv_heads != HEADS else ""
        return f"{self.batch} x {self.keys}{heads}" + (f", {self.in_use} in use" if self.in_use else "")

    @property
    def length(self):
        """The number of keys before the step."""
        return np.int32((self.in_use or self.keys) - 1)

    def smaller(self):
        """For --quick."""
        return dataclasses.replace(self, keys=self.keys // 64, in_use=self.in_use and self.in_use // 64)

    def operands(self):
        """The query, and the keys and values of all tokens, of which the last is the one to append."""
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = (1, HEADS), (self.keys, self.kv_heads), (self.keys, self.kv_heads)
        return [jax.random.normal(key, (self.batch, *shape, FEATURES)) for key, shape in zip(keys, shapes, strict=True)]


ROWS = [Row(batch, keys, heads) for heads in (HEADS, 2) for keys in (4096, 32768) for batch in (1, 8)]
ROWS += [Row(1, 1024), Row(1, 32768, in_use=1024), Row(8, 4096, in_use=512)]


def stepping(step, cache, tokens, rewind):
    """A Program whose runs pass the donated cache on, each time with one free place: `rewind` sets its length back."""
    compiled = jax.jit(step, donate_argnums=0).lower(cache, *tokens).compile()
    held = [cache]

    def run():
        output, after = compiled(held[0], *tokens)
        held[0] = rewind(after)
        return jax.block_until_ready(output)

    return Program(run, lambda output: [np.asarray(output)], compiled.memory_analysis().temp_size_in_bytes)


def ours(row):
    query, key, value = row.operands()
    cache = attnlib.KVCache.create((row.batch,), row.keys, row.kv_heads, FEATURES)
    length = row.length
    cache = dataclasses.replace(cache.append(key, value), length=length)

    def step(cache, *tokens):
        return cache.decode(*tokens)

    tokens = query, key[:, -1:], value[:, -1:]
    return stepping(step, cache, tokens, lambda cache: dataclasses.replace(cache, length=length))


def flax(row):
    query, key, value = row.operands()
    key, value = (jnp.repeat(x, HEADS // row.kv_heads, 2) for x in (key, value))
    layer = nn.MultiHeadDotProductAttention(num_heads=HEADS, decode=True, use_bias=False)

    def stripped(next_call, arguments, keywords, context):
        """Projections hand on what they are given, split into heads before attention and as it is after it."""
        if isinstance(context.module, nn.DenseGeneral) and context.method_name == "__call__":
            split = context.module.name != "out"
            return arguments[0].reshape(*arguments[0].shape[:2], HEADS, FEATURES) if split else arguments[0]
        return next_call(*arguments, **keywords)

    def step(cache, *tokens):
        with nn.intercept_methods(stripped):
            inputs = [x.reshape(*x.shape[:2], HEADS * FEATURES) for x in tokens]
            output, after = layer.apply({"cache": cache}, *inputs, mutable=["cache"])
        return output, after["cache"]

    index = row.length
    cache = {"cached_key": jnp.copy(key), "cached_value": jnp.copy(value), "cache_index": index}
    return stepping(step, cache, (query, key[:, -1:], value[:, -1:]), lambda cache: {**cache, "cache_index": index})


CONTESTANTS = {"attnlib": ours, "Flax": flax}


def line_of(done):
    cells = [milliseconds(done["times"].get(name)) for name in CONTESTANTS]
    return [done["row"], *cells, done["ratio"].cells()[0] if done["ratio"] else "-"]


def main():
    options = parse(parser(__doc__, repeats=15, seconds=20))
    report, done = Report("decode", options), []
    for row in tqdm(ROWS, desc="rows"):
        row = row.smaller() if options.quick else row
        makers = {name: lambda make=make, row=row: make(row) for name, make in CONTESTANTS.items()}
        times, refused = contest(makers, options.repeats, options.seconds, TOLERANCE)
        ratio = Ratio("Flax", times["Flax"].best / times["attnlib"].best) if "Flax" in times else None
        done.append(dict(row=str(row), times=times, ratio=ratio, refused=refused))
        report.add("decode", done[-1])
    print("\nmilliseconds a step, fastest (median); above 1: attnlib is faster")
    print(table(["batch x cached keys", *CONTESTANTS, "over Flax"], map(line_of, done)))
    print(verdict([(row["row"], row["ratio"]) for row in done if row["ratio"]]))
    wrong = [f"{row['row']}: {reason}" for row in done for reason in row["refused"].values()]
    sys.exit("\n".join(["failed:", *wrong]) if wrong else 0)


if __name__ == "__main__":
    main()
