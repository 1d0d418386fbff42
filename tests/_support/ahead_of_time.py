"""Compiles attention for an accelerator that is not there.

    python tests/_support/ahead_of_time.py tpu|h100 dot|additive

Prints a line of JSON for each program, a dictionary of what `measure` returns and of what was compiled. A program of
its own, since JAX looks for plugins once, by settings that other tests must not meet.
"""

import itertools
import json
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

import attnlib
from attnlib import scores

LENGTH, HEADS, FEATURES = 2048, 2, 64
SCORES = {"dot": scores.Dot, "additive": lambda: scores.Additive(jnp.ones(FEATURES))}
# What XLA would ask the device, as an H100 answers: the text form of stream_executor.GpuTargetConfigProto.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  clock_rate_ghz: 1.98
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
}
"""
TOPOLOGIES = {
    "tpu": lambda: topologies.get_topology_desc("v5e:2x2", platform="tpu"),
    "h100": lambda: topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1"),
}


def measure(device, score, derivative, causal, dtype, implementation):
    """Bytes of temporaries, numbers in the largest array that any instruction leaves in memory, and loops."""

    def forward(query, key, value):
        return attnlib.attention(
            query, key, value, score=SCORES[score](), is_causal=causal, implementation=implementation
        )

    def loss(*operands):
        return jnp.sum(jnp.sin(forward(*operands).astype(jnp.float32)))

    program = {"forward": forward, "training": jax.value_and_grad(loss, (0, 1, 2))}[derivative]
    sharding = jax.sharding.SingleDeviceSharding(device)
    operand = jax.ShapeDtypeStruct((1, LENGTH, HEADS, FEATURES), dtype, sharding=sharding)
    compiled = jax.jit(program).lower(operand, operand, operand).compile()
    text = compiled.as_text()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return {"temporaries": temporaries, "largest": largest_array(text), "loops": text.count(" while(")}


def largest_array(text):
    """Of all shapes in computations but those inside a fusion, which are values that never are in memory."""
    fused = set(re.findall(r"calls=%?([\w.\-]+)", text))
    largest, inside = 0, True
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            inside = head[1] in fused
        elif not inside:
            shapes = re.findall(r"\b[a-z]+\d+\w*\[([\d,]+)\]", line)
            largest = max([largest, *(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)])
    return largest


def main(platform, score):
    jax.config.update("jax_platforms", "cpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu would ask the network what machine this is
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver, whose version would be too old
    device = TOPOLOGIES[platform]().devices[0]
    programs = itertools.product(("forward", "training"), (False, True), ("float32", "bfloat16"), ("blockwise",))
    # The reference makes the square, which shows that both counts see one.
    for derivative, causal, dtype, implementation in (*programs, ("forward", False, "float32", "reference")):
        what = dict(score=score, derivative=derivative, causal=causal, dtype=dtype, implementation=implementation)
        print(json.dumps(what | measure(device, **what)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
