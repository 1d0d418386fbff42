"""One of two processes with four CPU devices each: python tests/_support/two_processes.py ADDRESS PROCESS

Compares the values and gradients of one sequence on the eight devices of both with those of one device, in float64.
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attnlib
from attnlib import masks, positions


def main(address, process):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(address, num_processes=2, process_id=process, local_device_ids=range(4))
    assert jax.device_count() == 8 and jax.local_device_count() == 4
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    draw = np.random.default_rng(0)
    operands = [draw.normal(size=(2, 48, heads, 4)) for heads in (8, 8, 8)]
    order = positions.zigzag(48, 8)
    sharding = NamedSharding(mesh, P(None, "x"))

    def program(context):
        def loss(*args):
            output = attnlib.dot_product_attention(
                *args, mask=masks.Causal() & masks.Lengths(key=41), dropout_rate=0.2, dropout_rng=jax.random.key(1),
                context=context, implementation="blockwise" if context is None else None,
            )  # fmt: skip
            return jnp.sum(jnp.sin(output)), output

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

    (_, output), gradients = program(None)(*operands)
    expected = [np.asarray(x)[:, order] for x in (output, *gradients)]
    placed = [jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[:, order][index]) for x in operands]
    for exchange in ("ring", "gather", "heads"):
        with jax.set_mesh(mesh):
            (_, output), gradients = program(attnlib.Context("x", "zigzag", exchange))(*placed)
        for made, want in zip((output, *gradients), expected, strict=True):
            for shard in made.addressable_shards:
                np.testing.assert_allclose(shard.data, want[shard.index], rtol=0, atol=1e-12)
    print("equal", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
