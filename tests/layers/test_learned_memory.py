"""Learned memory of multi-head layers: as more keys that every query attends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

import attnlib
from attnlib import masks, modifiers

HEADS, KV_HEADS, LENGTH, WIDTH, MEMORY = 4, 2, 7, 16, 3


@pytest.fixture
def params():
    shapes = jax.eval_shape(
        lambda: attnlib.init_multi_head_attention(
            jax.random.key(0), WIDTH, num_heads=HEADS, num_kv_heads=KV_HEADS, num_memory=MEMORY
        )
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype)), shapes)


def projected(params, x):
    return [
        jnp.einsum("btc,cnd->btnd", x, params[n]["kernel"]) + params[n]["bias"][None, None]
        for n in ("query", "key", "value")
    ]


def test_memory_is_more_keys(params, keys):
    """Before the keys, in output and weights: whatever the mask, without bias and score_mod, with cap and sink."""
    x = keys.normal(2, LENGTH, WIDTH)
    mask = masks.Causal() & masks.KeyPadding(jnp.asarray([[False] * 2 + [True] * 5, [True] * 7]))
    slopes = modifiers.alibi_slopes(HEADS)
    bias = keys.normal(HEADS, LENGTH, LENGTH)[None]
    options = dict(sink=0.3, logits_soft_cap=2.0, return_weights=True)

    @jax.jit
    def both(params):
        query, key, value = projected(params, x)
        memory = [jnp.broadcast_to(array[None], (2, *array.shape)) for array in params["memory"].values()]
        key, value = (jnp.concatenate(pair, 1) for pair in zip(memory, (key, value), strict=True))
        at_end = ((0, 0), (0, 0), (0, 0), (MEMORY, 0))
        distances = jnp.abs(jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)[None]).astype(jnp.float32)
        whole = jnp.pad(mask.as_array(LENGTH, LENGTH), at_end, constant_values=True)

        # The cap comes before score_mod and after the bias, so ALiBi is here a function of the whole.
        def alibi(logit, batch, head, query_position, key_position):
            own = slopes_array[head] * distances[query_position, jnp.maximum(key_position - MEMORY, 0)]
            return logit - jnp.where(key_position < MEMORY, 0, own)

        slopes_array = jnp.asarray(slopes)
        output, weights = attnlib.dot_product_attention(
            query, key, value, mask=whole, bias=jnp.pad(bias, at_end), score_mod=alibi, **options
        )
        expected = jnp.einsum("btnd,ndo->bto", output, params["out"]["kernel"]) + params["out"]["bias"][None, None]
        return (expected, weights), attnlib.multi_head_attention(
            params, x, mask=mask, bias=bias, score_mod=modifiers.ALiBi(slopes), **options
        )

    expected, made = both(params)
    assert_close(made, expected, length=LENGTH + WIDTH)
    assert np.all(made[1][0, :, 0, MEMORY:] == 0) and np.all(made[1][0, :, 0, :MEMORY] > 0)  # keys are masked


def test_memory_over_two_axes_is_memory_over_one(params, keys):
    """Rotary positions of memory would differ, if it had any."""
    x = keys.normal(2, 3, 4, WIDTH)
    flat = jax.jit(attnlib.multi_head_attention)(params, x.reshape(2, 12, WIDTH))
    made = jax.jit(lambda params, x: attnlib.multi_head_attention(params, x, attention_axes=(1, 2)))(params, x)
    assert_close(made.reshape(flat.shape), flat, length=12)


def test_memory_has_no_position(params, keys):
    """Later positions of all tokens change nothing: only distances count, and memory is at none."""
    x = keys.normal(2, LENGTH, WIDTH)
    call = jax.jit(lambda places: attnlib.multi_head_attention(params, x, rotary=True, query_positions=places))
    assert_close(call(jnp.arange(LENGTH) + 50), call(jnp.arange(LENGTH)), length=LENGTH, factor=64)


def test_each_weight_of_memory_is_dropped_on_its_own(params, keys):
    x, rng = 0.1 * keys.normal(2, LENGTH, WIDTH), jax.random.key(3)  # small logits, so that no weight underflows
    options = dict(dropout_rate=0.5, dropout_rng=rng, return_weights=True)
    _, whole = attnlib.multi_head_attention(params, x, return_weights=True)
    assert np.all(whole != 0)
    _, weights = attnlib.multi_head_attention(params, x, **options)
    kept = np.asarray(weights) != 0
    np.testing.assert_allclose(weights[kept], 2 * whole[kept], rtol=1e-5)
    of_memory, of_first_keys = kept[..., :MEMORY], kept[..., MEMORY : 2 * MEMORY]
    assert 0.3 < of_memory.mean() < 0.7 and not np.array_equal(of_memory, of_first_keys)


def test_memory_begins_as_in_pytorch():
    """Key and value are drawn apart, with variance 1 / (K D); the other parameters are those without memory."""
    fields = dict(num_heads=8, key_dim=4, value_dim=4, num_kv_heads=2)
    plain = attnlib.init_multi_head_attention(jax.random.key(0), WIDTH, **fields)
    params = attnlib.init_multi_head_attention(jax.random.key(0), WIDTH, num_memory=200, **fields)
    memory = params.pop("memory")
    assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(params), jax.tree.leaves(plain), strict=True))
    key, value = np.asarray(memory["key"]), np.asarray(memory["value"])
    assert key.shape == value.shape == (200, 2, 4)
    assert abs(np.corrcoef(key.ravel(), value.ravel())[0, 1]) < 0.1
    np.testing.assert_allclose([key.std(), value.std()], 8**-0.5, rtol=0.1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(normalize=False), "a layer with memory takes no normalize=False"),
        (dict(return_weights=True), "needs one attention axis; there are 2. Leave return_weights=False"),
    ],
    ids=["normalize", "weights"],
)
def test_what_memory_cannot_do(options, text, params):
    with pytest.raises(ValueError, match=text):
        attnlib.multi_head_attention(params, jnp.ones((1, 2, 3, WIDTH)), **options)
    with pytest.raises(ValueError, match="num_memory must be an int >= 0"):
        attnlib.init_multi_head_attention(jax.random.key(0), WIDTH, num_heads=2, num_memory=-1)
