"""One sequence on many devices: memory, what is sent, and balance: python tests/benchmarks/context.py

Compiles causal attention of 8 heads of 64 features in float32, forward and gradient, and prints for each length, number
of devices, order and exchange the temporaries of a device (XLA's own figure), the bytes that a device receives in a
forward pass against the least that an exchange of all keys needs, and the work of an equal share over that of the
critical path. The last row of each is `jax.nn.dot_product_attention` on operands that are sharded along the sequence.
Nothing is run: virtual CPU devices show memory and programs, and no times.

With --tpu it compiles for a TPU v5e 2x4 instead (`pip install libtpu`), and counts the permutes that the compiler puts
around the computation, from their start to their end, so that they overlap.
"""

import argparse
import json
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import attnlib

HEADS, FEATURES = 8, 64


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=[65536, 131072, 262144])
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--orders", nargs="+", default=["contiguous", "zigzag"])
    parser.add_argument("--exchanges", nargs="+", default=["ring", "gather", "heads"])
    parser.add_argument("--peer", action="store_true", help="jax.nn under GSPMD too, which takes long to compile")
    parser.add_argument("--tpu", action="store_true", help="compile for a TPU v5e 2x4")
    parser.add_argument("--json", action="store_true", help="print one line of JSON in place of the table")
    return parser.parse_args()


OPTIONS = parse()
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu would ask the network what machine this is
jax.config.update("jax_num_cpu_devices", max(OPTIONS.devices))


def mesh_of(devices):
    if OPTIONS.tpu:
        chips = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
        return Mesh(np.asarray(chips[:devices]), ("x",), axis_types=(AxisType.Auto,))
    return jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def programs(attend):
    gradient = jax.grad(lambda *args: jnp.sum(attend(*args) ** 2), (0, 1, 2))
    return {"forward": attend, "gradient": gradient}


def compiled(program, mesh, operand):
    sharding = NamedSharding(mesh, P(None, "x"))
    operand = jax.ShapeDtypeStruct(operand.shape, operand.dtype, sharding=sharding)
    with jax.set_mesh(mesh):
        return jax.jit(program, out_shardings=sharding).lower(operand, operand, operand).compile()


def overlapped(text):
    """(permutes with a loop or fusion between their start and their end, all permutes)."""
    lines = text.splitlines()
    overlaps = total = 0
    for number, line in enumerate(lines):
        if start := re.match(r"\s*%?([\w.\-]+) = .* collective-permute-start\(", line):
            total += 1
            for later in lines[number + 1 :]:
                if "collective-permute-done(" in later and start[1] in later:
                    break
                if re.search(r"\b(while|fusion|conditional|convolution|custom-call)\(", later):
                    overlaps += 1
                    break
    return overlaps, total


def measure(length, devices, order, exchange):
    mesh, operand = mesh_of(devices), jax.ShapeDtypeStruct((1, length, HEADS, FEATURES), jnp.float32)
    row = {"length": length, "devices": devices, "order": order, "exchange": exchange}
    if exchange == "jax.nn":

        def attend(query, key, value):
            return jax.nn.dot_product_attention(query, key, value, is_causal=True)

    else:
        context = attnlib.Context("x", order, exchange)

        def attend(query, key, value):
            return attnlib.dot_product_attention(query, key, value, is_causal=True, context=context)

        with jax.set_mesh(mesh):
            explanation = attnlib.explain(operand, operand, operand, is_causal=True, context=context).context
        keys = 2 * length * HEADS * FEATURES * 4
        row |= {
            "received": explanation.received[exchange],
            "least received": explanation.received["heads"] if exchange == "heads" else keys // devices * (devices - 1),
            "balance": round(explanation.balance, 3),
        }
    made = {name: compiled(program, mesh, operand) for name, program in programs(attend).items()}
    row["temporaries"] = {name: one.memory_analysis().temp_size_in_bytes for name, one in made.items()}
    if OPTIONS.tpu:
        row["permutes overlapped"] = {name: overlapped(one.as_text()) for name, one in made.items()}
    return row


def show(row):
    forward, gradient = (row["temporaries"][name] / 2**20 for name in ("forward", "gradient"))
    text = f"{row['length']:7d} {row['devices']:3d} {row['order']:10s} {row['exchange']:7s}"
    text += f" temporaries {forward:8.1f} / {gradient:8.1f} MiB"
    if "received" in row:
        text += f"  received {row['received'] / 2**20:7.1f} of {row['least received'] / 2**20:7.1f} MiB"
        text += f"  balance {row['balance']:.3f}"
    for name, (overlaps, total) in row.get("permutes overlapped", {}).items():
        text += f"  {name}: {overlaps} of {total} permutes overlap"
    print(text, flush=True)


def main():
    rows = []
    for length in OPTIONS.length:
        for devices in OPTIONS.devices:
            for order in OPTIONS.orders:
                for exchange in [*OPTIONS.exchanges, *["jax.nn"] * OPTIONS.peer]:
                    if (exchange == "jax.nn" and order != "contiguous") or (exchange == "heads" and HEADS % devices):
                        continue
                    rows.append(measure(length, devices, order, exchange))
                    if not OPTIONS.json:
                        show(rows[-1])
    if OPTIONS.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
