"""Where attnlib differs from Keras on purpose: what Keras does, and what attnlib does instead, one test for each.

What Keras does is asserted too, so that a new Keras that behaves otherwise is noticed here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import assert_close, assert_same, assert_zero, x64
from keras_cases import keras, our_module, parameters_of
from score_catalogue import definition

import attnlib

pytestmark = [
    pytest.mark.usefixtures("allow_promotion_in_file", "keras_dtypes"),  # Keras promotes ranks
    pytest.mark.filterwarnings("ignore:You are using a softmax over axis"),
]

SIMPLE = {"AdditiveAttention": {"use_scale": False}, "Attention": {}}
MULTI = {
    "MultiHeadAttention": {"num_heads": 4, "key_dim": 3, "use_bias": False},
    "GroupQueryAttention": {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 3, "use_bias": False},
}


@pytest.fixture
def keras_dtypes():
    """Keras mixes types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def normal(*shape):
    return jax.device_put(np.random.default_rng(shape).normal(size=shape).astype(np.float32))


def pair(name, fields, query, value):
    """A Keras layer, and attnlib's with the same parameters as a function of the same inputs."""
    layer = getattr(keras.layers, name)(**fields)
    layer.build([query.shape, value.shape]) if name in SIMPLE else layer.build(query.shape, value.shape)
    variables = {"params": parameters_of(layer, [variable.value for variable in layer.trainable_variables])}
    fields = {("dropout_rate" if field == "dropout" else field): x for field, x in fields.items() if field != "seed"}
    module = our_module(name, fields)
    return layer, lambda *inputs, **options: module.apply(variables, *inputs, **options)


@pytest.mark.parametrize("name", SIMPLE)
def test_empty_rows_are_averages_in_keras_attention_and_zero_in_ours(name):
    """Keras subtracts 1e9 from every logit of the row, which erases them; softmax then weighs all keys alike."""
    query, value = normal(2, 3, 5), normal(2, 4, 5)
    theirs, ours = pair(name, SIMPLE[name], query, value)
    real = jnp.asarray([[True, False, True, True], [False] * 4])
    output, weights = theirs([query, value], mask=[None, real], return_attention_scores=True)
    assert_close(weights[1], jnp.full((3, 4), 0.25))
    assert_close(output[1], jnp.broadcast_to(value[1].mean(0), (3, 5)))
    our_output, our_weights = ours(query, value, key_mask=real, return_weights=True)
    assert_zero((our_output[1], our_weights[1]))
    assert_close((our_output[0], our_weights[0]), (output[0], weights[0]))


@pytest.mark.parametrize("name", MULTI)
def test_empty_rows_depend_on_return_attention_scores_in_keras_multi_head_and_never_in_ours(name):
    """With weights Keras gives 0; without, jax.nn gives the mean of the values for the same call."""
    query, value = normal(2, 3, 6), normal(2, 4, 6)
    theirs, ours = pair(name, MULTI[name], query, value)
    mask = jnp.ones((2, 3, 4), bool).at[0, 1].set(False)
    with_weights, weights = theirs(query, value, attention_mask=mask, return_attention_scores=True)
    without = theirs(query, value, attention_mask=mask)
    assert_zero((with_weights[0, 1], weights[0, :, 1]))
    assert jnp.abs(without[0, 1]).max() > 0.01
    our_output = ours(query, value, mask=mask[:, None])
    assert_zero(our_output[0, 1])
    assert_same(our_output, ours(query, value, mask=mask[:, None], return_weights=True)[0])
    assert_close(our_output, with_weights)


@pytest.mark.parametrize("name", SIMPLE)
def test_padded_queries_keep_their_weights_in_keras_attention_and_lose_them_in_ours(name):
    """Keras clears the output of a padded query, attnlib the weights too: they are the weights that were used."""
    query, value = normal(2, 3, 5), normal(2, 4, 5)
    theirs, ours = pair(name, SIMPLE[name], query, value)
    real = jnp.asarray([[True, True, False], [False, True, True]])
    output, weights = theirs([query, value], mask=[real, None], return_attention_scores=True)
    our_output, our_weights = ours(query, value, query_mask=real, return_weights=True)
    assert_close(our_output, output)
    assert_close(weights.sum(-1), jnp.ones((2, 3)))
    assert_close(our_weights, weights * real[..., None])


def test_keras_multi_head_ignores_the_argument_query_mask_and_ours_does_not():
    """MultiHeadAttention.call overwrites `query_mask` with the mask attached to the array, here none."""
    x = normal(2, 3, 6)
    theirs, ours = pair("MultiHeadAttention", MULTI["MultiHeadAttention"], x, x)
    real = jnp.asarray([[True, True, False], [True, False, False]])
    assert_same(theirs(x, x, query_mask=real), theirs(x, x))
    assert_close(ours(x, query_mask=real), theirs(x, x) * real[..., None])


def test_keras_ignores_attention_axes_without_weights_at_rank_3_and_ours_does_not():
    """Without weights Keras calls jax.nn, which attends over axis 1, whatever `attention_axes` says."""
    x = normal(4, 3, 6)
    theirs, ours = pair("MultiHeadAttention", MULTI["MultiHeadAttention"] | {"attention_axes": (0,)}, x, x)
    right, weights = theirs(x, x, return_attention_scores=True)
    assert weights.shape == (3, 4, 4, 4)
    assert jnp.abs(theirs(x, x) - right).max() > 0.1
    assert_close(ours(x), right, length=4)


def test_keras_raises_for_value_dim_without_weights_and_ours_does_not():
    """jax.nn needs the values' features to equal the query's; Keras logs its refusal, then fails to reshape."""
    x = normal(2, 3, 6)
    theirs, ours = pair("MultiHeadAttention", MULTI["MultiHeadAttention"] | {"value_dim": 5}, x, x)
    with pytest.raises(TypeError, match="cannot reshape array"):
        theirs(x, x)
    assert_close(ours(x), theirs(x, x, return_attention_scores=True)[0], length=6)


@pytest.mark.parametrize("option", ["use_causal_mask", "sliding_window"])
@pytest.mark.parametrize("axes", [(2,), (1, 2), (2, 1), (0,), None])
def test_keras_raises_for_causal_and_window_on_most_axes_and_ours_does_not(axes, option):
    """At rank 4 Keras builds these masks from the lengths of axis 1, so they fit `attention_axes=(1,)` alone."""
    x = normal(2, 3, 4, 6)
    window = 3 if option == "sliding_window" else None
    fields = MULTI["MultiHeadAttention"] | {"attention_axes": axes, "sliding_window": window}
    theirs, ours = pair("MultiHeadAttention", fields, x, x)
    causal = window is None
    with pytest.raises(ValueError, match=r"out of bounds|must be broadcastable"):
        theirs(x, x, use_causal_mask=causal, return_attention_scores=True)
    attended = (1, 2) if axes is None else axes
    sizes = tuple(x.shape[axis] for axis in attended)
    mask = oracle.causal(sizes, sizes) if causal else oracle.sliding_window(sizes, sizes, 2, 2)
    plain, _ = pair("MultiHeadAttention", fields | {"sliding_window": None}, x, x)
    values = [variable.value for variable in theirs.trainable_variables]
    expected, _ = plain.stateless_call(values, [], x, x, attention_mask=mask, return_attention_scores=True)
    assert_close(ours(x, is_causal=causal, return_weights=True), expected, length=12)


def test_keras_drops_causality_where_axis_1_has_size_1_and_ours_does_not():
    """The (1, 1) mask that Keras builds from axis 1 broadcasts over the axis attended: no error, and no causality."""
    x = normal(2, 1, 4, 6)
    theirs, ours = pair("MultiHeadAttention", MULTI["MultiHeadAttention"] | {"attention_axes": (2,)}, x, x)
    assert_same(theirs(x, x, use_causal_mask=True), theirs(x, x))
    expected = theirs(x, x, attention_mask=oracle.causal(4, 4))
    assert_close(ours(x, is_causal=True), expected, length=6)


@pytest.mark.parametrize("axes", [(1,), (1, 2), (0,)])
def test_keras_raises_for_padding_on_other_axes_than_the_last_and_ours_does_not(axes):
    """Keras lays a padding mask out for the last sequence axis, whatever is attended."""
    x = normal(2, 3, 4, 6)
    theirs, ours = pair("MultiHeadAttention", MULTI["MultiHeadAttention"] | {"attention_axes": axes}, x, x)
    real = jax.device_put(np.random.default_rng(0).random((2, 3, 4)) < 0.7)
    with pytest.raises(ValueError, match="must be broadcastable"):
        theirs(x, x, value_mask=real, return_attention_scores=True)
    batch = tuple(axis for axis in range(3) if axis not in axes)
    sizes = tuple(x.shape[axis] for axis in axes)
    mask = real.transpose(*batch, *axes).reshape(*(x.shape[a] for a in batch), *(1,) * len(sizes), *sizes)
    expected = theirs(x, x, attention_mask=mask, return_attention_scores=True)
    assert_close(ours(x, key_mask=real, return_weights=True), expected, length=12)


@pytest.mark.parametrize("name", SIMPLE)
def test_keras_attention_raises_for_padding_at_rank_4_and_ours_does_not(name):
    """Keras lets a padding mask broadcast as it is, without an axis of queries, unless there is a causal mask too."""
    query, value = normal(2, 3, 4, 5), normal(2, 3, 6, 5)
    theirs, ours = pair(name, SIMPLE[name], query, value)
    real = jnp.ones((2, 3, 6), bool).at[..., 4:].set(False)
    with pytest.raises(ValueError, match="Incompatible shapes"):
        theirs([query, value], mask=[None, real])
    assert_close(ours(query, value, key_mask=real), theirs([query, value[..., :4, :]]), length=5)


@pytest.mark.parametrize("name", SIMPLE)
def test_axes_before_the_last_are_batch_in_keras_attention_and_attended_by_default_in_ours(name):
    """`attention_axes=None` means the same in all of attnlib: every axis but the first and the features."""
    x = normal(2, 3, 4, 5)
    module = (
        attnlib.AdditiveAttention(use_scale=False) if name == "AdditiveAttention" else attnlib.DotProductAttention()
    )
    theirs, ours = pair(name, SIMPLE[name], x, x)
    assert_close(ours(x), theirs([x, x]), length=5)  # with attention_axes=-2
    flat = x.reshape(2, 12, 5)
    assert_close(module.apply({}, x), theirs([flat, flat]).reshape(x.shape), length=12)


@pytest.mark.parametrize("name", ["AdditiveAttention", "Attention", "MultiHeadAttention"])
def test_nan_in_padding_reaches_every_output_in_keras_and_none_in_ours(name):
    """Keras multiplies padded values by zero, and 0 * NaN is NaN."""
    query, value = normal(2, 3, 6), normal(2, 4, 6)
    theirs, ours = pair(name, (SIMPLE | MULTI)[name], query, value)
    real = jnp.asarray([True, True, False, True])
    poisoned = value.at[:, 2].set(jnp.nan)
    mask = jnp.broadcast_to(real, (2, 4))
    options = {"mask": [None, mask]} if name in SIMPLE else {"value_mask": mask}
    arguments = ([query, poisoned],) if name in SIMPLE else (query, poisoned)
    assert jnp.isnan(theirs(*arguments, **options)).all()
    assert_same(ours(query, poisoned, key_mask=mask), ours(query, value, key_mask=mask))
    assert_close(ours(query, poisoned, key_mask=mask), ours(query, value[:, real]), length=6)


def test_weights_returned_are_before_dropout_in_keras_multi_head_and_those_used_in_ours():
    x = normal(2, 30, 6)
    fields = MULTI["MultiHeadAttention"] | {"dropout": 0.5, "seed": 1}
    theirs, ours = pair("MultiHeadAttention", fields, x, x)
    _, weights = theirs(x, x, return_attention_scores=True, training=True)
    assert_close(weights.sum(-1), jnp.ones((2, 4, 30)), length=30)
    options = {"deterministic": False, "dropout_rng": jax.random.key(0), "return_weights": True}
    _, our_weights = ours(x, **options)
    kept = our_weights != 0
    assert 0.45 < kept.mean() < 0.55
    assert_close(our_weights, jnp.where(kept, weights / 0.5, 0), length=30)


def test_float64_becomes_float32_inside_keras_and_stays_in_ours():
    """Keras's tanh and the softmax of jax.nn compute in float32, whatever the layer's dtype."""
    with x64():
        x = np.random.default_rng(9).normal(size=(1, 4, 5))
        layer = keras.layers.AdditiveAttention(use_scale=False, dtype="float64")
        expected = oracle.attention(*[x[..., None, :]] * 3, score=definition(attnlib.scores.Additive()))[0][..., 0, :]
        assert 1e-9 < np.abs(layer([x, x]) - expected).max() < 1e-5
        assert_close(attnlib.AdditiveAttention(use_scale=False).apply({}, x), jnp.asarray(expected), length=5)


def test_a_mask_without_an_axis_of_heads_is_read_as_keras_does_or_refused():
    """Keras inserts the axis; attnlib refuses (B, T, S), which by NumPy's rule would be (N, T, S), and says how."""
    x = normal(2, 3, 6)
    theirs, ours = pair("MultiHeadAttention", MULTI["MultiHeadAttention"], x, x)
    mask = jax.device_put(np.random.default_rng(0).random((2, 3, 3)) < 0.7).at[..., 0].set(True)
    with pytest.raises(ValueError, match=r"mask\[:, None\]"):
        ours(x, mask=mask)
    assert_close(ours(x, mask=mask[:, None]), theirs(x, x, attention_mask=mask), length=6)
