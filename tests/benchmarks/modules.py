"""A training step of the NNX module against the linen one: python tests/benchmarks/modules.py

Both modules have the same parameters, and each is compiled as its users do: `nnx.jit` with `nnx.Optimizer`, `jax.jit`
with optax. The programs compute the same; the difference is what NNX does in Python before and after each call. Prints
a table and writes modules.json into `--out`.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from report import Ratio, Report, milliseconds, parse, parser, table, verdict
from timing import Program, contest
from tqdm import tqdm

import attnlib

TARGET, TOLERANCE, LEARNING_RATE = 1.02, 1e-5, 1e-3


@dataclasses.dataclass(frozen=True)
class Row:
    batch: int
    length: int
    features: int
    heads: int = 8

    def __str__(self):
        return f"({self.batch}, {self.length}, {self.features}), {self.heads} heads"

    def smaller(self):
        """For --quick."""
        return dataclasses.replace(self, length=self.length // 32, features=self.features // 8)

    def inputs(self):
        return jax.random.normal(jax.random.key(0), (self.batch, self.length, self.features))

    def layer(self):
        return attnlib.nnx.MultiHeadAttention(self.heads, self.features, rngs=nnx.Rngs(0))


ROWS = [Row(8, 256, 512), Row(4, 512, 512)]


def loss_of(call, x):
    return jnp.mean((call(x, is_causal=True) - x) ** 2)


def in_nnx(row):
    x, layer = row.inputs(), row.layer()
    optimizer = nnx.Optimizer(layer, optax.adam(LEARNING_RATE), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer, x):
        value, gradients = nnx.value_and_grad(lambda layer: loss_of(layer, x))(layer)
        optimizer.update(layer, gradients)
        return value

    return Program(lambda: jax.block_until_ready(step(layer, optimizer, x)), lambda value: [np.asarray(value)])


def in_linen(row):
    x, layer = row.inputs(), attnlib.MultiHeadAttention(row.heads)
    optimizer, params = optax.adam(LEARNING_RATE), nnx.to_pure_dict(nnx.state(row.layer(), nnx.Param))
    held = [(params, optimizer.init(params))]

    @jax.jit
    def step(params, state, x):
        value, gradients = jax.value_and_grad(
            lambda p: loss_of(lambda *a, **o: layer.apply({"params": p}, *a, **o), x)
        )(params)
        updates, state = optimizer.update(gradients, state)
        return value, (optax.apply_updates(params, updates), state)

    def run():
        value, held[0] = step(*held[0], x)
        return jax.block_until_ready(value)

    return Program(run, lambda value: [np.asarray(value)])


CONTESTANTS = {"NNX": in_nnx, "linen": in_linen}


def main():
    options = parse(parser(__doc__, repeats=30, seconds=40))
    report, done = Report("modules", options), []
    for row in tqdm(ROWS, desc="rows"):
        row = row.smaller() if options.quick else row
        makers = {name: lambda make=make, row=row: make(row) for name, make in CONTESTANTS.items()}
        times, refused = contest(makers, options.repeats, options.seconds, TOLERANCE)
        ratio = Ratio("linen's", times["NNX"].best / times["linen"].best, TARGET, at_most=True) if not refused else None
        done.append(dict(row=str(row), times=times, ratio=ratio, refused=refused))
        report.add("training", done[-1])
    print("\nmilliseconds a training step, fastest (median)")
    cells = [
        [d["row"], *map(milliseconds, d["times"].values()), *(d["ratio"].cells() if d["ratio"] else ())] for d in done
    ]
    print(table(["(batch, length, features)", *CONTESTANTS, "of linen's", "target", "met"], cells))
    print(verdict([(row["row"], row["ratio"]) for row in done if row["ratio"]]))
    wrong = [f"{row['row']}: {reason}" for row in done for reason in row["refused"].values()]
    sys.exit("\n".join(["failed:", *wrong]) if wrong else 0)


if __name__ == "__main__":
    main()
