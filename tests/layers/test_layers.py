"""Layers as pure functions of explicit parameters: shapes, initial values, options, and what padding cannot do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import COMPLETE, by_name
from conftest import assert_close, assert_finite, assert_same

import attnlib
from attnlib import masks, scores


def draw(keys, *shape):
    return keys.normal(*shape)


def make(keys, features=12, **options):
    """Parameters, from one program: eagerly each shape of each initialiser is one."""
    options = dict(num_heads=4, bias_init=jax.nn.initializers.normal()) | options
    return jax.jit(lambda key: attnlib.init_multi_head_attention(key, features, **options))(next(keys))


# Parameters


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), dict(query=(12, 4, 3), key=(12, 4, 3), value=(12, 4, 3), out=(4, 3, 12))),
        (dict(key_dim=5, value_dim=6), dict(query=(12, 4, 5), key=(12, 4, 5), value=(12, 4, 6), out=(4, 6, 12))),
        (dict(num_kv_heads=2), dict(query=(12, 4, 3), key=(12, 2, 3), value=(12, 2, 3), out=(4, 3, 12))),
        (dict(num_kv_heads=1, key_features=7, value_features=8),
         dict(query=(12, 4, 3), key=(7, 1, 3), value=(8, 1, 3), out=(4, 3, 12))),
        (dict(key_features=7), dict(query=(12, 4, 3), key=(7, 4, 3), value=(7, 4, 3), out=(4, 3, 12))),
        (dict(output_shape=5), dict(query=(12, 4, 3), key=(12, 4, 3), value=(12, 4, 3), out=(4, 3, 5))),
        (dict(output_shape=(5, 2)), dict(query=(12, 4, 3), key=(12, 4, 3), value=(12, 4, 3), out=(4, 3, 5, 2))),
        (dict(use_gate=True, value_dim=2),
         dict(query=(12, 4, 3), key=(12, 4, 3), value=(12, 4, 2), out=(4, 2, 12), gate=(12, 4, 2))),
    ],
)  # fmt: skip
def test_parameter_shapes(options, expected, keys):
    params = jax.eval_shape(lambda: make(keys, **options))
    assert {name: p["kernel"].shape for name, p in params.items()} == expected
    bias = {name: shape[1:] if name != "out" else shape[2:] for name, shape in expected.items()}
    assert {name: p["bias"].shape for name, p in params.items()} == bias
    bare = jax.eval_shape(lambda: make(keys, use_bias=False, **options))
    assert all(set(p) == {"kernel"} for p in bare.values())
    halves = jax.eval_shape(lambda: make(keys, param_dtype=jnp.bfloat16, **options))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(halves))


def test_additive_score_has_a_scale_a_head(keys):
    params = make(keys, score="additive", key_dim=75)
    assert params["score"]["scale"].shape == (4, 75)
    limit = (3 / 75) ** 0.5  # glorot uniform of a vector of 75, as Keras has it
    assert 0.9 * limit < np.max(np.abs(params["score"]["scale"])) <= limit
    assert set(make(keys, score=scores.Additive())) == {"query", "key", "value", "out"}


def test_initial_values(keys):
    """Kernels are initialised as the matrices they are, biases as zeros, and no two alike."""
    params = attnlib.init_multi_head_attention(next(keys), 64, num_heads=8, key_features=100, output_shape=(16, 2))
    fans = dict(query=64, key=100, value=100, out=64)
    for name, fan_in in fans.items():
        assert abs(float(jnp.std(params[name]["kernel"])) * fan_in**0.5 - 1) < 0.05
        assert not np.any(params[name]["bias"])
    assert not np.array_equal(params["key"]["kernel"], params["value"]["kernel"])
    shapes = []
    attnlib.init_multi_head_attention(
        next(keys), 12, num_heads=4, output_shape=(5, 2),
        kernel_init=lambda key, shape, dtype: shapes.append(shape) or jnp.zeros(shape, dtype),
    )  # fmt: skip
    assert shapes == [(12, 12), (12, 12), (12, 12), (12, 10)]


# What the layer computes


def test_the_layer_is_its_parts(keys):
    """Projections, attention, gate and output, written out with einsum."""
    sizes = dict(num_kv_heads=2, value_dim=5, key_features=7, value_features=8, output_shape=(3, 2))
    params = make(keys, use_gate=True, **sizes)
    query, key, value, bias = draw(keys, 2, 5, 12), draw(keys, 2, 6, 7), draw(keys, 2, 6, 8), draw(keys, 1, 4, 5, 6)
    mask = keys.bools(2, 1, 5, 6)
    options = dict(is_causal=True, logits_soft_cap=2.0, return_weights=True)

    def parts(params, query, key, value, **options):
        def project(x, name):
            kernel = params[name]["kernel"]
            return jnp.einsum("btc,cnd->btnd", x, kernel, precision="highest") + params[name]["bias"][None, None]

        attended, weights = attnlib.dot_product_attention(
            project(query, "query"), project(key, "key"), project(value, "value"), **options
        )
        attended = attended * jax.nn.sigmoid(project(query, "gate"))
        output = jnp.einsum("btne,neop->btop", attended, params["out"]["kernel"], precision="highest")
        return output + params["out"]["bias"][None, None], weights

    @jax.jit
    def each(mask, bias, *operands):
        given = dict(options, mask=mask, bias=bias)
        return [
            [
                function(*operands, **given, **by_name(implementation))
                for function in (attnlib.multi_head_attention, parts)
            ]
            for implementation in COMPLETE
        ]

    for made, expected in each(mask, bias, params, query, key, value):
        assert_close(made, expected, length=20)
        assert made[0].shape == (2, 5, 3, 2)
        assert made[1].shape == (2, 4, 5, 6)


def test_key_and_value_default_to_what_comes_before(keys):
    params = make(keys)
    query, key = draw(keys, 2, 5, 12), draw(keys, 2, 6, 12)
    assert_same(attnlib.multi_head_attention(params, query), attnlib.multi_head_attention(params, query, query, query))
    assert_same(attnlib.multi_head_attention(params, query, key), attnlib.multi_head_attention(params, query, key, key))


@pytest.mark.parametrize(("axes", "same"), [(-2, 2), ((-3, -2), None), ([2, 1], (-2, -3)), (0, -4)], ids=str)
def test_axes_are_counted_without_heads(axes, same, keys):
    """Negative axes from the end of the array passed: -1 would be features, -2 is the last sequence axis."""
    params, x = make(keys), draw(keys, 2, 3, 4, 12)
    made = attnlib.multi_head_attention(params, x, attention_axes=axes, return_weights=True)
    assert_same(made, attnlib.multi_head_attention(params, x, attention_axes=same, return_weights=True))
    assert made[0].shape == x.shape


def test_rank_two_has_no_batch(keys):
    params, x = make(keys), draw(keys, 5, 12)
    assert_close(attnlib.multi_head_attention(params, x), attnlib.multi_head_attention(params, x[None])[0], length=12)


def test_sliding_window_is_a_symmetric_band(keys):
    params, x = make(keys), draw(keys, 2, 7, 12)
    _, weights = attnlib.multi_head_attention(params, x, sliding_window=3, return_weights=True)
    distance = np.abs(np.arange(7)[:, None] - np.arange(7))
    assert np.array_equal(weights != 0, np.broadcast_to(distance < 3, weights.shape))
    _, both = attnlib.multi_head_attention(params, x, sliding_window=3, is_causal=True, return_weights=True)
    assert np.array_equal(both != 0, np.broadcast_to((distance < 3) & np.tri(7, dtype=bool), weights.shape))


@pytest.mark.parametrize("score", ["additive", scores.Custom(lambda q, k: -jnp.sum((q - k) ** 2)), scores.Dot(0.1)],
                         ids=["additive", "custom", "dot"])  # fmt: skip
def test_scores(score, keys):
    params, x = make(keys, score=score), draw(keys, 2, 5, 12)
    _, weights = attnlib.multi_head_attention(params, x, score=score, return_weights=True)
    query, key = (
        jnp.einsum("btc,cnd->btnd", x, params[n]["kernel"]) + params[n]["bias"][None, None] for n in ("query", "key")
    )
    made = scores.Additive(params["score"]["scale"]) if score == "additive" else score
    _, expected = attnlib.attention(query, key, key, score=made, return_weights=True)
    assert_close(weights, expected, length=12)


# Masks


@pytest.mark.parametrize("implementation", COMPLETE)
def test_padding_may_hold_anything(implementation, keys):
    """NaN in padded queries, keys and values: the same outputs and finite, equal gradients of every parameter."""
    params = make(keys, use_gate=True, num_kv_heads=2)
    query, key, value = draw(keys, 2, 5, 12), draw(keys, 2, 6, 12), draw(keys, 2, 6, 12)
    query_mask = keys.bools(2, 5).at[0, 0].set(False).at[0, 1].set(True)  # the first example has a real query and key
    key_mask = keys.bools(2, 6).at[0, 0].set(True).at[0, 1].set(False).at[1].set(False)

    @jax.jit
    def program(params, operands):
        def loss(params, operands):
            output = attnlib.multi_head_attention(
                params, *operands, query_mask=query_mask, key_mask=key_mask, **by_name(implementation)
            )
            return jnp.sum(output**2), output

        return jax.grad(loss, (0, 1), has_aux=True)(params, operands)

    (of_params, of_operands), output = clean = program(params, (query, key, value))
    poisoned = (
        jnp.where(query_mask[..., None], query, jnp.nan),
        jnp.where(key_mask[..., None], key, jnp.inf),
        jnp.where(key_mask[..., None], value, -jnp.nan),
    )
    assert_finite(clean)
    assert_same(program(params, poisoned), clean)
    for gradient, mask in zip(of_operands, (query_mask, key_mask, key_mask), strict=True):
        assert not np.any(gradient[~mask])
    assert np.any(of_params["key"]["kernel"])
    empty = (~query_mask) | (~key_mask.any(-1))[:, None]
    assert_same(output[empty], jnp.broadcast_to(params["out"]["bias"], output[empty].shape))  # they attend nothing


def test_padding_masks_follow_their_operands_axes(keys):
    """They have the operand's shape without features, whatever is attended, and may broadcast."""
    params, x = make(keys), draw(keys, 2, 3, 4, 12)
    real = keys.bools(2, 3, 4)
    for axes in (1, 2, (1, 2), (2, 1), 0):
        _, weights = attnlib.multi_head_attention(params, x, attention_axes=axes, key_mask=real, return_weights=True)
        attended = axes if isinstance(axes, tuple) else (axes,)
        batch = [axis for axis in range(3) if axis not in attended]
        layout = np.transpose(real, (*batch, *attended))
        layout = layout.reshape(*layout.shape[: len(batch)], *[1] * (len(attended) + 1), *layout.shape[len(batch) :])
        seen = np.asarray(weights) != 0
        assert np.array_equal(seen, np.broadcast_to(layout, seen.shape) & seen.any(tuple(range(-len(attended), 0)),
                                                                                    keepdims=True))  # fmt: skip
    for mask in (real[:1], real[:, :1, :1]):
        whole = jnp.broadcast_to(mask, real.shape)
        assert_same(*(attnlib.multi_head_attention(params, x, query_mask=m, key_mask=m) for m in (mask, whole)))


def test_masks_combine(keys):
    params, x = make(keys), draw(keys, 2, 5, 12)
    given, real = keys.bools(2, 4, 5, 5), keys.bools(2, 5)
    combined = given & real[:, None, None] & real[:, None, :, None] & np.tri(5, dtype=bool)[None, None]
    options = dict(query_mask=real, key_mask=real, is_causal=True)
    expected = attnlib.multi_head_attention(params, x, mask=combined)
    assert_close(attnlib.multi_head_attention(params, x, mask=given, **options), expected, length=12)
    assert_close(attnlib.multi_head_attention(params, x, mask=masks.Dense(given), **options), expected, length=12)


# Dtypes


@pytest.mark.parametrize(
    ("inputs", "params_dtype", "dtype", "expected"),
    [("float32", "float32", None, "float32"), ("bfloat16", "float32", None, "float32"),
     ("bfloat16", "bfloat16", None, "bfloat16"), ("float32", "float32", "bfloat16", "bfloat16"),
     ("bfloat16", "bfloat16", "float32", "float32"), ("float16", "bfloat16", None, "float32")],
)  # fmt: skip
def test_dtypes(inputs, params_dtype, dtype, expected, keys):
    """Computed in `dtype`, or else in what inputs and parameters promote to, also under strict promotion."""
    params = make(keys, param_dtype=params_dtype, use_gate=True, score="additive")
    x = draw(keys, 2, 5, 12).astype(inputs)
    output, weights = attnlib.multi_head_attention(
        params, x, x.astype("float16") if inputs == "float16" else x, dtype=dtype, score="additive",
        return_weights=True, bias=jnp.ones((5, 5), jnp.bfloat16),
    )  # fmt: skip
    assert output.dtype == expected
    assert weights.dtype == jnp.float32
    exact = attnlib.multi_head_attention(
        jax.tree.map(lambda p: p.astype(jnp.float32), params), x.astype(jnp.float32), score="additive"
    )
    assert_close(output.astype(jnp.float32), exact, length=12, eps=float(jnp.finfo(expected).eps))


# Errors


@pytest.mark.parametrize(
    ("error", "text", "change"),
    [
        (ValueError, "query features / num_heads, which must be an int; got 12 / 5", dict(num_heads=5)),
        (ValueError, "num_heads must be an int >= 1; got 0", dict(num_heads=0)),
        (TypeError, "num_heads must be an int >= 1; got 2.0", dict(num_heads=2.0)),
        (ValueError, "num_heads must be a multiple of num_kv_heads; got 4 and 3", dict(num_kv_heads=3)),
        (ValueError, "value_dim must be an int >= 1; got -1", dict(value_dim=-1)),
        (ValueError, "output_shape must be an int >= 1 or a sequence of ints >= 1; got (3, 0)",
         dict(output_shape=(3, 0))),
        (ValueError, "or an attnlib.scores.Score such as scores.Dot(); got 'luong'", dict(score="luong")),
    ],
)  # fmt: skip
def test_wrong_sizes_are_refused(error, text, change, keys):
    with pytest.raises(error) as caught:
        make(keys, **change)
    assert text in str(caught.value)
    with pytest.raises(error) as caught:
        attnlib.MultiHeadAttention(**(dict(num_heads=4) | change)).init(next(keys), jnp.ones((2, 5, 12)))
    if "value_dim" not in change:
        assert text in str(caught.value)


def test_no_features_are_refused(keys):
    with pytest.raises(ValueError, match=r"must have at least one feature \(last axis\) to project; got 0"):
        attnlib.MultiHeadAttention(num_heads=2, key_dim=3).init(next(keys), jnp.ones((2, 5, 0)))


X = np.ones((2, 5, 12), np.float32)


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (ValueError, "query must have rank 2 or more", dict(query=X[0, 0])),
        (ValueError, "same rank; got query (2, 5, 12) and key (5, 12)", dict(key=X[0])),
        (ValueError, "key and value must have the same attention axes", dict(value=X[:, :4])),
        (ValueError, "query must have (12,) features", dict(query=X[..., :6], key=X)),
        (TypeError, "query must be a floating-point array; got int32", dict(query=X.astype(np.int32))),
        (TypeError, "key must be a floating-point array; got list", dict(key=[[1.0]])),
        (ValueError, "attention_axes must name axes among the first 2 of an array of rank 3 (the last 1 hold features)",
         dict(attention_axes=-1)),
        (ValueError, "The last sequence axis is -2", dict(attention_axes=2)),
        (TypeError, "query_mask must be a bool array; got list", dict(query_mask=[True])),
        (TypeError, "key_mask must be a bool array; got float32", dict(key_mask=X[..., 0])),
        (ValueError, "key_mask must have the shape of its operand without features, (2, 5), or ones", dict(
            key_mask=np.ones((2, 4), bool))),
        (ValueError, "query_mask must have the shape of its operand", dict(query_mask=np.ones(5, bool))),
        (ValueError, "mask of rank 3 is ambiguous", dict(mask=np.ones((2, 5, 5), bool))),
        (ValueError, "sliding_window must be an int >= 1; got 0", dict(sliding_window=0)),
        (ValueError, "dropout_rate=0.5 needs dropout_rng", dict(dropout_rate=0.5)),
        (ValueError, 'score="additive" needs params["score"]["scale"]', dict(score="additive")),
        (ValueError, "score must be \"dot\", \"additive\"", dict(score="luong")),
        (TypeError, "dtype must be a floating-point dtype", dict(dtype=jnp.int32)),
        (TypeError, "dtype must be a floating-point dtype, and 8-bit inputs require it",
         dict(query=X.astype(jnp.float8_e4m3fn))),
        (ValueError, "implementation 'flash' is unknown", dict(implementation="flash")),
        (ValueError, "params must be a mapping with query, key, value, out", dict(params={"query": {}})),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused(error, text, arguments):
    params = attnlib.init_multi_head_attention(jax.random.key(0), 12, num_heads=4)
    with pytest.raises(error) as caught:
        attnlib.multi_head_attention(**(dict(params=params, query=X) | arguments))
    assert text in str(caught.value)
