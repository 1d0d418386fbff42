"""Parity with the four attention layers of Keras: outputs, weights, gradients, regularisers; dropout by its laws."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, x64
from keras_cases import CONFIGURATIONS, COUNTS, QUERY_SIZES, build, keras, our_module, parameters_of

import attnlib


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
    assert_close(our_gradients, their_gradients, length=case.pairs)  # that of a scalar scale adds up over them all


@pytest.mark.parametrize("number", range(len(CONFIGURATIONS)))
def test_same_outputs_weights_and_gradients(number):
    assert_parity(build(CONFIGURATIONS[number], number))


@pytest.mark.parametrize("number", [n for n, c in enumerate(CONFIGURATIONS) if c.keeps_float64][::12])
def test_same_in_float64(number):
    """What float32 may hide as rounding: the formulas are the same to the last digits of float64."""
    with x64():
        assert_parity(build(CONFIGURATIONS[number], number, "float64"))


def test_at_least_300_configurations_cover_the_options():
    """All are different, and each option meets each layer that has it."""
    assert len(CONFIGURATIONS) == len(set(CONFIGURATIONS)) == sum(COUNTS.values()) >= 300
    seen = collections.defaultdict(collections.Counter)
    for c in CONFIGURATIONS:
        seen[c.layer].update([f"rank {c.rank}", c.inputs, *c.masks])
        seen[c.layer].update(name if value in (True, False) else f"{name} {value}" for name, value in c.call if value)
        seen[c.layer].update(f"{name} {value}" for name, value in c.fields)
        seen[c.layer].update([f"attended {sorted(c.axes)}"])
        seen[c.layer]["axes swapped"] += list(c.axes) != sorted(c.axes)
    common = {"self", "shared", "separate", "causal", "weights"}
    simple = common | {"query", "value", "rank 3", "rank 4", "use_scale True", "use_scale False"}
    multi = common | {"key", "value", "full", "broadcast", "pairs", "heads", "sliding_window 1", "sliding_window 2"}
    multi |= {f"{name} {value}" for name in ("use_bias", "use_gate") for value in (True, False)}
    expected = {"AdditiveAttention": simple, "Attention": simple | {"score_mode dot", "score_mode concat"}}
    expected["GroupQueryAttention"] = multi | {"query", "num_key_value_heads 1", "num_key_value_heads 3"}
    multi |= {"rank 3", "rank 4", "rank 5", "axes swapped", "attention_axes None", "value_dim 4", "value_dim None"}
    multi |= {"output_shape None", "output_shape 5", "output_shape (2, 5)"}
    multi |= {f"attended {axes}" for axes in ([0], [1], [2], [3], [0, 1], [0, 2], [1, 2], [1, 3], [2, 3], [1, 2, 3])}
    expected["MultiHeadAttention"] = multi
    missing = {layer: options - set(+seen[layer]) for layer, options in expected.items()}
    assert not any(missing.values()), missing


@pytest.mark.parametrize("use_gate", [False, True])
@pytest.mark.parametrize("layer", ["MultiHeadAttention", "GroupQueryAttention"])
def test_same_regularization_loss(layer, use_gate):
    """The same regularisers as in Keras add the same to the loss, with the same gradients of the parameters.

    Keras divides what an activity regulariser gives by the batch size, so that a larger batch weighs no more.
    """
    fields = {"num_heads": 4, "key_dim": 3} if layer == "MultiHeadAttention" else KERAS_GROUPED
    fields = dict(fields, use_gate=use_gate)
    regularizers = {"kernel_regularizer": 0.1, "bias_regularizer": 0.03, "activity_regularizer": 0.02}
    x = np.random.default_rng(4).normal(size=(3, 5, 6)).astype(np.float32)
    for kept in (*([name] for name in regularizers), list(regularizers)):
        theirs = getattr(keras.layers, layer)(**fields, **{k: keras.regularizers.L2(regularizers[k]) for k in kept})
        theirs.build(x.shape, x.shape)
        ours = our_module(layer, fields | {k: square_sum(regularizers[k]) for k in kept})
        values = [variable.value + 0.3 for variable in theirs.trainable_variables]  # biases start at zero

        def our_loss(values, theirs=theirs, ours=ours):
            variables = {"params": parameters_of(theirs, values)}
            return attnlib.regularization_loss(ours.apply(variables, x, mutable=["losses"])[1])

        def their_loss(values, theirs=theirs):
            return sum(theirs.stateless_call(values, [], x, x, return_losses=True)[2])

        @jax.jit
        def both(values, our_loss=our_loss, their_loss=their_loss):
            with jax.numpy_dtype_promotion("standard"):
                return jax.value_and_grad(our_loss)(values), jax.value_and_grad(their_loss)(values)

        assert_close(*both(values), length=x.size)


KERAS_GROUPED = {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 3}


def square_sum(factor):
    return lambda x: factor * jnp.sum(x**2)


@pytest.mark.parametrize("layer, rate", list(zip(COUNTS, [0.2, 0.5, 0.1, 0.7], strict=True)))
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
