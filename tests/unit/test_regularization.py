"""Regularisers, sown and pure, and constraints after an optimiser step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close, assert_finite
from flax import linen as nn

import attnlib

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
non_negative = optax.projections.projection_non_negative


def l2(array):
    return 0.01 * jnp.sum(array**2)


def l1(array):
    return 0.1 * jnp.sum(jnp.abs(array))


def layer(**fields):
    return attnlib.MultiHeadAttention(num_heads=2, bias_init=nn.initializers.normal(), **fields)


def test_losses_are_sown_and_summed():
    module = layer(kernel_regularizer=l2, bias_regularizer=l1, use_gate=True)
    variables = jax.jit(module.init)(jax.random.key(0), X)
    assert set(variables) == {"params"}  # init gives parameters alone
    output, updated = module.apply(variables, X, mutable=["losses"])
    assert set(updated) == {"losses"}
    kernels = [p["kernel"] for p in variables["params"].values()]
    biases = [p["bias"] for p in variables["params"].values()]
    assert len(kernels) == 5
    expected = sum(map(l2, kernels)) + sum(map(l1, biases))
    assert_close(attnlib.regularization_loss(updated), expected, length=8)
    np.testing.assert_array_equal(output, module.apply(variables, X))  # sowing is silent where nothing collects


def test_the_pure_penalty_equals_the_sown_one():
    module = layer(kernel_regularizer=l2, bias_regularizer=l1, score="additive")
    variables = jax.jit(module.init)(jax.random.key(0), X)

    def sown(params):
        return attnlib.regularization_loss(module.apply({"params": params}, X, mutable=["losses"])[1])

    def pure(params):
        return attnlib.parameter_penalty(params, kernel_regularizer=l2, bias_regularizer=l1)

    made, expected = (jax.jit(jax.value_and_grad(f))(variables["params"]) for f in (sown, pure))
    assert_close(made, expected, length=8)
    np.testing.assert_array_equal(expected[1]["score"]["scale"], 0)  # neither a kernel nor a bias


def test_activities_are_those_of_every_projection():
    """Each projection's output is penalised, the gate's and the output's included, by its mean over the batch."""
    seen = []

    def record(activity):
        seen.append(activity)
        return l2(activity)

    module = layer(activity_regularizer=record, use_gate=True, num_kv_heads=1, output_shape=(3, 5))
    variables = jax.jit(module.init)(jax.random.key(0), X)
    seen.clear()
    output, updated = module.apply(variables, X, mutable=["losses"])
    heads, kv_heads = (2, 5, 2, 4), (2, 5, 1, 4)
    assert sorted(x.shape for x in seen) == sorted([heads, kv_heads, kv_heads, heads, (2, 5, 3, 5)])
    assert any(np.array_equal(x, output) for x in seen)
    assert_close(attnlib.regularization_loss(updated), sum(l2(x) for x in seen) / len(X), length=8)


def test_losses_of_a_whole_model_are_summed():
    """Of several layers, of one called twice, and of layers under nn.scan."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = layer(kernel_regularizer=l2, name="shared")
            x = shared(shared(x))
            return layer(kernel_regularizer=l2, name="last")(x)

    model = Model()
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    _, updated = jax.jit(lambda params: model.apply({"params": params}, X, mutable=["losses"]))(params)
    of = {name: attnlib.parameter_penalty(params[name], kernel_regularizer=l2) for name in params}
    assert_close(attnlib.regularization_loss(updated), 2 * of["shared"] + of["last"], length=8)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return layer(kernel_regularizer=l2)(x), None

    stack = nn.scan(Block, variable_axes={"params": 0, "losses": 0}, split_rngs={"params": True}, length=3)()
    params = jax.jit(lambda: stack.init(jax.random.key(0), X, None))()["params"]
    _, updated = jax.jit(lambda params: stack.apply({"params": params}, X, None, mutable=["losses"]))(params)
    assert_close(
        attnlib.regularization_loss(updated), attnlib.parameter_penalty(params, kernel_regularizer=l2), length=8
    )


def test_nothing_sown_is_zero():
    loss = attnlib.regularization_loss({})
    assert loss == 0
    assert loss.dtype == jnp.float32
    assert attnlib.regularization_loss(layer().init_with_output(jax.random.key(0), X)[1]) == 0
    assert attnlib.parameter_penalty({"dense": {"scale": jnp.ones(3)}}, kernel_regularizer=l2) == 0


def test_constraints_project_kernels_and_biases_alone():
    params = attnlib.init_multi_head_attention(
        jax.random.key(0), 8, num_heads=2, score="additive", bias_init=jax.nn.initializers.normal()
    )
    made = attnlib.apply_constraints(params, kernel_constraint=non_negative)
    assert jax.tree.structure(made) == jax.tree.structure(params)
    for name in ("query", "key", "value", "out"):
        np.testing.assert_array_equal(made[name]["kernel"], np.maximum(params[name]["kernel"], 0))
        np.testing.assert_array_equal(made[name]["bias"], params[name]["bias"])
    np.testing.assert_array_equal(made["score"]["scale"], params["score"]["scale"])
    made = attnlib.apply_constraints(params, bias_constraint=lambda b: jnp.clip(b, -0.1, 0.1))
    assert float(jnp.max(jnp.abs(made["query"]["bias"]))) <= 0.1
    np.testing.assert_array_equal(made["query"]["kernel"], params["query"]["kernel"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_constraints_hold_after_every_optimizer_step(dtype):
    """As the last link of an optax chain, in a jitted step; exactly, where the projection is onto a cone or a box."""
    module = layer(param_dtype=dtype)
    params = jax.jit(module.init)(jax.random.key(0), X)["params"]
    params = attnlib.apply_constraints(params, kernel_constraint=non_negative)
    optimizer = optax.chain(
        optax.adam(0.05),
        attnlib.constrain(kernel_constraint=non_negative, bias_constraint=lambda b: optax.projections.projection_box(
            b, -0.125, 0.125)),
    )  # fmt: skip
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        def loss(params):
            return jnp.mean(module.apply({"params": params}, X) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        for _ in range(8):
            params, state, value = step(params, state)
            losses.append(float(value))
            for projection in params.values():
                assert float(projection["kernel"].min()) >= 0
                assert float(jnp.max(jnp.abs(projection["bias"].astype(jnp.float32)))) <= 0.125
                assert projection["kernel"].dtype == dtype
    assert losses[-1] < losses[0]
    assert_finite(params)
    assert any(bool(jnp.any(p["kernel"] == 0)) for p in params.values())  # the constraint did something


def test_a_norm_constraint():
    """Keras' MaxNorm and the like: any projection, here onto a ball, kernel by kernel."""
    params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2)
    made = attnlib.apply_constraints(params, kernel_constraint=lambda w: optax.projections.projection_l2_ball(w, 0.5))
    for projection in made.values():
        assert abs(float(jnp.linalg.norm(projection["kernel"].ravel())) - 0.5) < 1e-6


def test_partitioned_parameters_count_too():
    """Kernels in the boxes of flax's partitioning metadata are penalised and projected as bare ones are."""
    init = nn.with_partitioning(nn.initializers.normal(), (None, "heads"))
    boxed = attnlib.MultiHeadAttention(num_heads=2, kernel_init=init).init(jax.random.key(0), X)["params"]
    assert isinstance(boxed["query"]["kernel"], nn.Partitioned)
    bare = nn.meta.unbox(boxed)
    penalty = attnlib.parameter_penalty(boxed, kernel_regularizer=l2)
    assert_close(penalty, attnlib.parameter_penalty(bare, kernel_regularizer=l2))
    assert penalty > 0
    made = attnlib.apply_constraints(boxed, kernel_constraint=non_negative)
    assert isinstance(made["query"]["kernel"], nn.Partitioned)
    assert float(nn.meta.unbox(made)["query"]["kernel"].min()) >= 0


def test_wrong_constraints_are_refused():
    params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2)
    with pytest.raises(ValueError, match=r"keep the shape of \['key'\]\['kernel'\], \(8, 2, 4\); got \(64,\)"):
        attnlib.apply_constraints(params, kernel_constraint=jnp.ravel)
    transformation = attnlib.constrain(kernel_constraint=non_negative)
    with pytest.raises(ValueError, match=r"needs the parameters: optimizer.update\(grads, state, params\)"):
        transformation.update(params, transformation.init(params))
