"""The modules in NNX, through `flax.nnx.bridge.ToNNX`: calls, gradients and dropout equal those of linen's `apply`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close, assert_same
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

import attnlib
from attnlib import masks

X = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
RATE = 0.3
LAYERS = {
    "grouped, gate": lambda: attnlib.MultiHeadAttention(num_heads=4, num_kv_heads=2, use_gate=True, dropout_rate=RATE),
    "additive": lambda: attnlib.MultiHeadAttention(num_heads=4, score="additive", dropout_rate=RATE),
    "AdditiveAttention": lambda: attnlib.AdditiveAttention(dropout_rate=RATE),
    "DotProductAttention": lambda: attnlib.DotProductAttention(
        use_scale=True, score_mode="concat", dropout_rate=RATE
    ),
}  # fmt: skip
every_layer = pytest.mark.parametrize("name", LAYERS)


def bridged(layer, seed=0):
    return nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(params=seed, dropout=seed + 1)).lazy_init(X, deterministic=True)


def parameters(tree):
    """A state of parameters, or of their gradients, as the nested dict that linen would have."""
    return nnx.to_pure_dict(nnx.state(tree, nnx.Param) if isinstance(tree, nnx.Module) else tree)


@every_layer
def test_call_and_gradients(name):
    layer = LAYERS[name]()
    model = bridged(layer)
    params = parameters(model)
    own = jax.eval_shape(lambda: layer.init(jax.random.key(0), X, deterministic=True))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, own["params"])
    options = dict(mask=masks.Lengths(key=jnp.array([5, 3])), is_causal=True, deterministic=True)
    weighted = dict(options, return_weights=True)

    @nnx.jit
    def ours(model, x, y):
        return model(x, y, **weighted), nnx.value_and_grad(lambda model: jnp.sum(jnp.sin(model(x, **options))))(model)

    @jax.jit
    def theirs(params, x, y):
        def loss(params):
            return jnp.sum(jnp.sin(layer.apply({"params": params}, x, **options)))

        return layer.apply({"params": params}, x, y, **weighted), jax.value_and_grad(loss)(params)

    made, (value, slopes) = ours(model, X, X[:, ::-1])
    assert_same((made, (value, parameters(slopes))), theirs(params, X, X[:, ::-1]))


@pytest.mark.parametrize("name", ["grouped, gate", "AdditiveAttention", "DotProductAttention"])
def test_dropout_in_jit(name):
    """A key for every call from the module's stream; the one given in the call decides; off where deterministic."""
    layer = LAYERS[name]()
    model = bridged(layer)
    params = parameters(model)
    train = nnx.jit(lambda model, x: model(x, deterministic=False))
    first, second = train(model, X), train(model, X)
    assert not np.array_equal(first, second)

    again = bridged(layer)
    assert_same((train(again, X), train(again, X)), (first, second))

    key = nnx.Rngs(dropout=7).dropout()
    chosen = nnx.jit(lambda model, x: model(x, deterministic=False, rngs=nnx.Rngs(dropout=7)))
    linen = jax.jit(lambda params, x: layer.apply({"params": params}, x, deterministic=False, rngs={"dropout": key}))
    assert_close(chosen(model, X), linen(params, X), length=12)
    assert_close(nnx.jit(lambda model, x: model(x, deterministic=True))(model, X),
                 layer.apply({"params": params}, X, deterministic=True), length=12)  # fmt: skip


@pytest.mark.usefixtures("allow_promotion")  # optax's Adam takes a power of its count of steps
def test_a_part_of_a_model_in_a_training_step():
    """In an NNX module with NNX's optimiser; penalties and constraints find the kernels there."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            layer = attnlib.MultiHeadAttention(num_heads=2, dropout_rate=0.1)
            self.attention = nnx.bridge.ToNNX(layer, rngs=rngs).lazy_init(X, deterministic=True)
            self.last = nnx.Linear(12, 1, rngs=rngs)

        def __call__(self, x, deterministic=False):
            return self.last(x + self.attention(x, deterministic=deterministic))

    def l2(kernel):
        return jnp.sum(kernel**2)

    model = Model(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
               if path[-1].key == "kernel"]  # fmt: skip
    assert len(kernels) == 5
    penalty = attnlib.parameter_penalty(state, kernel_regularizer=l2)
    np.testing.assert_allclose(penalty, sum(np.sum(np.square(kernel)) for kernel in kernels), rtol=1e-5)

    positive = attnlib.constrain(kernel_constraint=optax.projections.projection_non_negative)
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(1e-2), positive), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            penalty = attnlib.parameter_penalty(nnx.state(model, nnx.Param), kernel_regularizer=l2)
            return jnp.mean((model(X)[..., 0] - jnp.sum(X, -1)) ** 2) + 1e-4 * penalty

        value, slopes = nnx.value_and_grad(loss)(model)
        optimizer.update(model, slopes)
        return value

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert float(jnp.min(model.attention.query["kernel"][...])) >= 0
    assert float(jnp.min(model.attention.out["bias"][...])) < 0  # biases are free


def test_what_the_layer_sows():
    """Weights, and penalties: NNX keeps what was sown, so a loop over steps takes it out with `nnx.pop`."""
    layer = attnlib.MultiHeadAttention(num_heads=4, kernel_regularizer=lambda kernel: jnp.sum(kernel**2))
    model = bridged(layer)
    _, weights = model(X, return_weights=True)
    model(X, sow_weights=True, mutable=["intermediates"])
    (sown,) = nnx.pop(model, nnx.Intermediate)["attention_weights"].get_value()
    assert_same(sown, weights)

    expected = attnlib.parameter_penalty(nnx.state(model, nnx.Param), kernel_regularizer=lambda k: jnp.sum(k**2))
    losses = nnx.variable_type_from_name("losses", allow_register=True)
    for _ in range(2):
        model(X, mutable=["losses"])
        np.testing.assert_allclose(attnlib.regularization_loss({"losses": nnx.pop(model, losses)}), expected, rtol=1e-6)
    assert not hasattr(model, "regularization")


@pytest.mark.devices
def test_named_axes_are_sharded_under_a_mesh():
    """NNX places variables by their names as they are made, and keeps the names."""
    layer = attnlib.MultiHeadAttention(
        num_heads=4,
        kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "heads", None)),
        out_kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("heads", None, None)),
    )
    with jax.set_mesh(jax.make_mesh((4,), ("heads",), (AxisType.Auto,))):
        model = bridged(layer)
        outputs = nnx.jit(lambda model, x: model(x))(model, X)
        params = jax.tree.map(np.asarray, parameters(model))
    shards = {"query": (12, 1, 3), "out": (1, 3, 12)}
    for name, shape in shards.items():
        array = getattr(model, name)["kernel"][...]
        assert {shard.data.shape for shard in array.addressable_shards} == {shape}
    expected = jax.jit(lambda params, x: attnlib.multi_head_attention(params, x))(params, X)
    assert_close(jax.tree.map(np.asarray, outputs), np.asarray(expected), length=12)
