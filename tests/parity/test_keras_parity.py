"""Parity with the four attention layers of Keras: outputs, weights, gradients, regularisers; dropout by its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, x64
from covering import covered, covering
from keras_cases import (
    CONFIGURATIONS,
    DRAWN,
    LAYERS,
    QUERY_SIZES,
    RANDOM,
    build,
    keras,
    option_pairs,
    options,
    our_module,
    parameters_of,
)

import attnlib

pytestmark = pytest.mark.usefixtures("allow_promotion_in_file")  # Keras promotes ranks


def evaluate(case, run, parameters, inputs):
    """Output, weights, and the gradients of a random linear function of both, for parameters and inputs."""
    rng = np.random.default_rng(3)

    def loss(parameters, inputs):
        output, weights = run(parameters, inputs)
        total = (output * rng.normal(size=output.shape).astype(output.dtype)).sum()
        if weights is not None:
            weights = weights * case.real_rows.astype(weights.dtype)
            total += (weights * rng.normal(size=weights.shape).astype(weights.dtype)).sum()
        return total, {"output": output, "weights": weights}

    gradients, results = jax.grad(loss, argnums=(0, 1), has_aux=True)(parameters, inputs)
    return results, gradients


def evaluate_both(case):
    """Ours and theirs, compiled as one program."""

    @jax.jit
    def both(parameters, inputs):
        ours = evaluate(case, case.run_ours, parameters, inputs)
        with jax.numpy_dtype_promotion("standard"):  # Keras mixes types
            return ours, evaluate(case, case.run_keras, parameters, inputs)

    return both(case.parameters, case.inputs)


def assert_parity(case):
    (ours, our_gradients), (theirs, their_gradients) = evaluate_both(case)
    for name in ("output", "weights"):
        assert_close(ours[name], theirs[name], length=max(x[..., 0].size for x in case.inputs))
    # The gradient of a scalar scale adds up over all pairs, and over the features of each.
    assert_close(our_gradients, their_gradients, length=case.pairs * case.inputs[0].shape[-1])


@pytest.mark.parametrize("number", range(len(CONFIGURATIONS)))
def test_same_outputs_weights_and_gradients(number):
    assert_parity(build(CONFIGURATIONS[number], number))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(RANDOM)))
def test_same_of_random_configurations(number):
    assert_parity(build(RANDOM[number], number))


WIDE = covering([c for drawn in DRAWN.values() for c in drawn if c.keeps_float64], lambda c: {c.layer, *options(c)})


@pytest.mark.parametrize("number", range(len(WIDE)))
def test_same_in_float64(number):
    """What float32 may hide as rounding: the formulas are the same to the last digits of float64."""
    with x64():
        assert_parity(build(WIDE[number], number, "float64"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [n for n, c in enumerate(RANDOM) if c.keeps_float64][::12])
def test_same_of_random_configurations_in_float64(number):
    with x64():
        assert_parity(build(RANDOM[number], number, "float64"))


@pytest.mark.parametrize("layer", LAYERS)
def test_configurations_cover_every_pair_of_options(layer):
    """Whatever two options a random configuration has, one of those compared by default has both."""
    compared, random = ([c for c in configurations if c.layer == layer] for configurations in (CONFIGURATIONS, RANDOM))
    assert covered(random, option_pairs) <= covered(compared, option_pairs)


def test_configurations_have_every_option():
    """Each option meets each layer that has it: the draws leave none out."""
    flags = {(name, value) for name in ("causal", "weights", "value_mask") for value in (True, False)}
    common = flags | {("inputs", inputs) for inputs in ("self", "shared", "separate")}
    simple = common | {("rank", 3), ("rank", 4), ("query_mask", True), ("use_scale", True), ("use_scale", False)}
    multi = common | {(name, value) for name in ("use_bias", "use_gate", "key_mask") for value in (True, False)}
    multi |= {("mask", kind) for kind in ("full", "broadcast", "pairs", "heads", None)}
    multi |= {("sliding_window", size) for size in (None, 1, 2, 3)}
    several = multi | {("rank", 3), ("rank", 4), ("rank", 5), ("value_dim", 4), ("value_dim", None)}
    several |= {("output_shape", shape) for shape in (None, 5, (2, 5))} | {("num_heads", count) for count in (1, 2, 3)}
    several |= {("axes swapped", True), *(("axes given", given) for given in (None, "from 0", "from the end"))}
    several |= {("attended", axes) for axes in [(0,), (1,), (2,), (3,), (0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]}
    expected = {
        "AdditiveAttention": simple,
        "Attention": simple | {("score_mode", "dot"), ("score_mode", "concat")},
        "GroupQueryAttention": multi | {("query_mask", True), ("num_key_value_heads", 1), ("num_key_value_heads", 3)},
        "MultiHeadAttention": several | {("attended", (1, 2, 3))},
    }
    for layer, asked in expected.items():
        of_layer = [c for c in CONFIGURATIONS if c.layer == layer]
        found = covered(of_layer, lambda c: {*options(c), ("attended", tuple(sorted(c.axes)))})
        assert asked <= found, (layer, asked - found)


@pytest.mark.parametrize("use_gate", [False, True])
@pytest.mark.parametrize("layer", ["MultiHeadAttention", "GroupQueryAttention"])
def test_same_regularization_loss(layer, use_gate):
    """The same regularisers as in Keras add the same to the loss, with the same gradients of the parameters.

    The factors differ, so that the gradients of kernels, biases and the activity say which regulariser is wrong.
    Keras divides what an activity regulariser gives by the batch size, so that a larger batch weighs no more.
    """
    fields = {"num_heads": 4, "key_dim": 3} if layer == "MultiHeadAttention" else KERAS_GROUPED
    fields = dict(fields, use_gate=use_gate)
    regularizers = {"kernel_regularizer": 0.1, "bias_regularizer": 0.03, "activity_regularizer": 0.02}
    x = np.random.default_rng(4).normal(size=(3, 5, 6)).astype(np.float32)
    theirs = getattr(keras.layers, layer)(**fields, **{k: keras.regularizers.L2(v) for k, v in regularizers.items()})
    theirs.build(x.shape, x.shape)
    ours = our_module(layer, fields | {k: square_sum(v) for k, v in regularizers.items()})
    values = [variable.value + 0.3 for variable in theirs.trainable_variables]  # biases start at zero

    def our_loss(values):
        variables = {"params": parameters_of(theirs, values)}
        return attnlib.regularization_loss(ours.apply(variables, x, mutable=["losses"])[1])

    def their_loss(values):
        return sum(theirs.stateless_call(values, [], x, x, return_losses=True)[2])

    @jax.jit
    def both(values):
        with jax.numpy_dtype_promotion("standard"):
            return jax.value_and_grad(our_loss)(values), jax.value_and_grad(their_loss)(values)

    assert_close(*both(values), length=x.size)


KERAS_GROUPED = {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 3}


def square_sum(factor):
    return lambda x: factor * jnp.sum(x**2)


@pytest.mark.parametrize("layer, rate", list(zip(LAYERS, [0.2, 0.5, 0.1, 0.7], strict=True)))
def test_dropout_obeys_the_same_laws(layer, rate):
    """Entries differ, their statistics do not: the fraction dropped, the factor on the rest, the mean of the output."""
    fields = {"MultiHeadAttention": {"num_heads": 4, "key_dim": 3}, "GroupQueryAttention": KERAS_GROUPED}
    fields = fields.get(layer, {})
    x = np.random.default_rng(5).normal(size=(4, 32, 6)).astype(np.float32)
    theirs = getattr(keras.layers, layer)(**fields, dropout=rate, seed=0)
    simple = isinstance(theirs, keras.layers.Attention)
    arguments = [[x, x]] if simple else [x, x]
    theirs.build([x.shape, x.shape]) if simple else theirs.build(x.shape, x.shape)
    ours = our_module(layer, fields | {"dropout_rate": rate})
    variables = {"params": parameters_of(theirs, [v.value for v in theirs.trainable_variables])}

    plain, weights = ours.apply(variables, x, deterministic=True, return_weights=True)
    with jax.numpy_dtype_promotion("standard"):
        assert_close(theirs(*arguments, training=False), plain, length=x.size)
        their_samples = np.stack([theirs(*arguments, training=True) for _ in range(100)])

    @jax.jit
    def sample(key):
        return ours.apply(variables, x, deterministic=False, dropout_rng=key, return_weights=True)

    samples, dropped = jax.tree.map(lambda *x: np.stack(x), *map(sample, jax.random.split(jax.random.key(6), 100)))
    kept = dropped != 0
    assert abs(kept.mean() - (1 - rate)) < 4 * (rate * (1 - rate) / kept.size) ** 0.5
    assert_close(dropped, np.where(kept, weights / np.float32(1 - rate), np.float32(0)), length=x.size)
    for outputs in (samples, their_samples):
        # All means are within 6 standard errors, and their spread is that of means of independent samples.
        error = (outputs.mean(0) - plain) / (outputs.std(0) / len(outputs) ** 0.5)
        assert np.abs(error).max() < 6
        assert 0.9 < error.std() < 1.15
    assert 0.97 < samples.std(0).mean() / their_samples.std(0).mean() < 1.03


def test_sizes_differ_on_every_axis():
    assert len(set(QUERY_SIZES)) == len(QUERY_SIZES)
