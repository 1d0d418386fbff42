"""nn.scan, nn.remat and nn.vmap over the modules equal the loop of single layers, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from flax import linen as nn

import attnlib

X = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
LAYERS = 2
RATE = 0.3


@functools.cache
def recording(cls):
    """The module, which also stores the dropout key that it draws, so that a loop can be given the same one."""

    class Recording(cls):
        def make_rng(self, name="params"):
            key = super().make_rng(name)
            self.sow("keys", name, key, reduce_fn=lambda _, new: new, init_fn=lambda: None)
            return key

    return Recording


MODULES = {
    "multi-head": lambda kind: kind(attnlib.MultiHeadAttention)(num_heads=4, dropout_rate=RATE),
    "grouped, gate": lambda kind: kind(attnlib.MultiHeadAttention)(
        num_heads=4, num_kv_heads=2, use_gate=True, dropout_rate=RATE
    ),
    "additive": lambda kind: kind(attnlib.MultiHeadAttention)(num_heads=4, score="additive", dropout_rate=RATE),
    "AdditiveAttention": lambda kind: kind(attnlib.AdditiveAttention)(dropout_rate=RATE),
    "DotProductAttention": lambda kind: kind(attnlib.DotProductAttention)(
        use_scale=True, score_mode="concat", dropout_rate=RATE
    ),
}


def modules(*chosen):
    """A transformation knows nothing of what is in the module: each module meets one or two, and all if slow."""
    return pytest.mark.parametrize(
        "name", [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in MODULES]
    )


class Block(nn.Module):
    """A residual block in the form that `nn.scan` wants."""

    module: str

    @nn.compact
    def __call__(self, x, _=None):
        layer = MODULES[self.module](recording)
        return x + layer(x, is_causal=True, deterministic=False), None


@functools.partial(jax.jit, static_argnums=0)  # traced once for all layers of a loop
def single(name, params, key, x):
    """One residual block by hand, with the layer as users have it."""
    layer = MODULES[name](lambda cls: cls)
    return x + layer.apply({"params": params}, x, is_causal=True, deterministic=False, dropout_rng=key)


def value_and_grads(function):
    """The value of a function to (output, aux), aux, and the gradients of a number made of the output."""

    def loss(*operands):
        output, aux = function(*operands)
        return jnp.sum(jnp.sin(output)), (output, aux)

    def run(*operands):
        gradients, (output, aux) = jax.grad(loss, argnums=(0, 1), has_aux=True)(*operands)
        return (output, gradients), aux

    return run


def inner(tree):
    """What belongs to the one layer of a block, which Flax names after its class."""
    (layer,) = tree.values()
    return layer


def lifted(stack, name):
    """Initialises a lifted block and runs it: parameters, results, the keys that layers drew, the program."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = jax.jit(stack.init)(rngs, X)["params"]
    numbers = np.random.default_rng(1)  # biases and scales that are all zeros or ones would hide mistakes
    params = jax.tree.map(lambda leaf: leaf + numbers.normal(scale=0.2, size=leaf.shape).astype(np.float32), params)

    def apply(params, x):
        (output, _), updates = stack.apply({"params": params}, x, rngs={"dropout": jax.random.key(2)}, mutable=["keys"])
        return output, updates["keys"]

    traced = jax.jit(value_and_grads(apply)).trace(params, X)
    results, keys = traced.lower().compile()(params, X)
    return params, results, inner(keys)["dropout"], str(traced.jaxpr)


def in_the_block(params, loop):
    """A loop over the layers' own parameters as a function of the block's, whose one layer has another name."""
    assert len(params) == 1
    return lambda params, x: loop(inner(params), x)


def layer_of(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


@modules("grouped, gate", "AdditiveAttention")
def test_scan_with_remat_inside(name):
    """Stacked parameters, another dropout key each layer, and blocks that are computed again in the backward pass."""
    stack = nn.scan(
        nn.remat(Block, prevent_cse=False), variable_axes={"params": 0, "keys": 0},
        split_rngs={"params": True, "dropout": True}, length=LAYERS,
    )(name)  # fmt: skip
    params, results, keys, program = lifted(stack, name)
    assert "scan" in program
    assert "remat" in program or "checkpoint" in program
    assert all(leaf.shape[0] == LAYERS for leaf in jax.tree.leaves(params))
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == LAYERS

    def loop(params, x):
        for index in range(LAYERS):
            x = single(name, layer_of(params, index), keys[index], x)
        return x, None

    expected, _ = jax.jit(value_and_grads(in_the_block(params, loop)))(params, X)
    assert_close(results, expected, length=12 * LAYERS)


@modules("additive")
def test_remat(name):
    params, results, key, program = lifted(nn.remat(Block)(name), name)
    assert "remat" in program or "checkpoint" in program
    once = in_the_block(params, lambda params, x: (single(name, params, key, x), None))
    expected, _ = jax.jit(value_and_grads(once))(params, X)
    assert_close(results, expected, length=12)


@modules("multi-head", "DotProductAttention")
def test_vmap_makes_an_ensemble(name):
    """Members with parameters and dropout of their own see the same input."""
    members = nn.vmap(
        Block, variable_axes={"params": 0, "keys": 0}, split_rngs={"params": True, "dropout": True}, in_axes=None,
        axis_size=LAYERS,
    )(name)  # fmt: skip
    params, results, keys, _ = lifted(members, name)
    assert all(leaf.shape[0] == LAYERS for leaf in jax.tree.leaves(params))
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == LAYERS

    def loop(params, x):
        return jnp.stack([single(name, layer_of(params, i), keys[i], x) for i in range(LAYERS)]), None

    expected, _ = jax.jit(value_and_grads(in_the_block(params, loop)))(params, X)
    # The gradient of the weight of concat scores, one number, adds up over all pairs and their features.
    batch, length, features = X.shape
    assert_close(results, expected, length=batch * length**2 * features)
