"""`MultiHeadAttention(decode=True)`: tokens in any split through the cache are the whole pass."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import assert_close, assert_same
from flax import linen as nn

import attnlib
from attnlib import masks, modifiers

HEADS, LENGTH, WIDTH = 4, 12, 16
LAYERS = {
    "plain": dict(),
    "grouped, rotary, norms, sink, gate": dict(
        num_kv_heads=2,
        rotary=True,
        normalize_qk="rms",
        use_sink=True,
        use_gate=True,
        value_dim=3,
        num_memory=2,
    ),
    "window": dict(sliding_window=4, rotary=True),
    "window beyond the input": dict(sliding_window=40),
    "additive": dict(score="additive"),
    "alibi": dict(score_mod=modifiers.ALiBi(modifiers.alibi_slopes(HEADS))),
    "buckets": dict(score_mod=attnlib.BucketedPositionBias(num_buckets=8, bidirectional=False, max_distance=6)),
    "bfloat16": dict(dtype=jnp.bfloat16),
    "tiled, sigmoid": dict(
        implementation="blockwise", block_sizes=(3, 4), score_mod=modifiers.LogSigmoid(-2.0), normalize=False
    ),
}
SPLITS = [[1] * LENGTH, [5, 1, 1, 5], [LENGTH], [7, 4, 1]]


def begun(layer, x, key, **options):
    """(the layer that decodes, its variables, the output of the whole pass), of one program."""
    decoding = layer.copy(decode=True)

    @jax.jit
    def each(key, x):
        variables = decoding.init(key, x)
        return variables, layer.apply({"params": variables["params"]}, x, is_causal=True, **options)

    return decoding, *each(key, x)


def stepping(layer, **options):
    """A step of a layer, which compiles for each number of tokens once."""
    return jax.jit(lambda variables, part: layer.apply(variables, part, mutable=["cache"], **options))


def in_parts(layer, variables, x, split, axis=1, step=None, **options):
    """(output, cache) of the tokens in parts."""
    step = step or stepping(layer, **options)
    cache, parts = variables["cache"], []
    for part in np.split(np.asarray(x), np.cumsum(split)[:-1], axis):
        output, changed = step({"params": variables["params"], "cache": cache}, part)
        cache = changed["cache"]
        parts.append(output)
    return np.concatenate(parts, axis), cache


# Each number of tokens is a program: all splits by the plain layer, with a window one that is longer than it besides.
FEW = {name: [[5, 1, 1, 5]] for name in LAYERS} | {"plain": SPLITS, "window": [[5, 1, 1, 5], [7, 4, 1]]}


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        *FEW.items(),
        *(pytest.param(name, SPLITS, marks=pytest.mark.slow) for name in LAYERS if FEW[name] is not SPLITS),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{len(x)} splits",
)
def test_any_split_is_the_whole_pass(name, splits, keys):
    layer = attnlib.MultiHeadAttention(num_heads=HEADS, **LAYERS[name])
    x = keys.normal(2, LENGTH, WIDTH)
    decoding, variables, whole = begun(layer, x, next(keys))
    step = stepping(decoding)
    kept = min(LENGTH, LAYERS[name].get("sliding_window", LENGTH))
    for split in splits:
        made, cache = in_parts(decoding, variables, x, split, step=step)
        assert_close(made, np.asarray(whole), length=LENGTH)
        assert cache["cached_key"].shape == (2, kept, LAYERS[name].get("num_kv_heads", HEADS), WIDTH // HEADS)
        assert cache["cached_key"].dtype == made.dtype
        assert cache["cache_index"] == LENGTH


def test_along_a_middle_axis(keys):
    layer = attnlib.MultiHeadAttention(num_heads=HEADS, attention_axes=1, rotary=True)
    x = keys.normal(2, LENGTH, 3, WIDTH)
    decoding, variables, whole = begun(layer, x, next(keys))
    made, _ = in_parts(decoding, variables, x, [5, 1, 6])
    assert_close(made, whole, length=LENGTH)


def test_a_mask_speaks_of_slots(keys):
    """Left padding: the first tokens of a row are none, at every step."""
    layer = attnlib.MultiHeadAttention(num_heads=HEADS)
    x, real = keys.normal(2, LENGTH, WIDTH), jnp.arange(LENGTH)[None] >= jnp.array([[3], [0]])
    decoding, variables, whole = begun(layer, x, next(keys), mask=masks.KeyPadding(real))
    made, _ = in_parts(decoding, variables, x, [6, 1, 5], mask=masks.KeyPadding(real))
    assert_close(made, whole, length=LENGTH)


def test_init_makes_an_empty_cache_and_the_usual_output(keys):
    x = keys.normal(2, LENGTH, WIDTH)
    layer = attnlib.MultiHeadAttention(num_heads=HEADS)

    @jax.jit
    def each(key, x):
        output, variables = layer.copy(decode=True).init_with_output(key, x, is_causal=True)
        return output, variables, layer.apply({"params": variables["params"]}, x, is_causal=True)

    output, variables, expected = each(next(keys), x)
    assert_same(output, expected)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(variables["cache"]))
    plain = jax.eval_shape(layer.init, next(keys), x)["params"]
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, variables["params"])


def test_as_the_layer_of_flax_decodes(keys):
    """The same parameters, one token at a time: what the layer of Flax gives, and its names in the cache."""
    theirs = nn.MultiHeadDotProductAttention(num_heads=HEADS, qkv_features=WIDTH, decode=True)
    ours = attnlib.MultiHeadAttention(num_heads=HEADS, decode=True)
    x = keys.normal(2, LENGTH, WIDTH)
    variables, own = jax.jit(lambda key, x: (theirs.init(key, x), ours.init(key, x)))(next(keys), x)
    expected, cache = in_parts(theirs, variables, x, [1] * LENGTH)
    made, held = in_parts(ours, {**own, "params": variables["params"]}, x, [1] * LENGTH)
    assert_close(made, expected, length=LENGTH)
    assert set(held) == set(cache)
    assert_close(held["cached_value"], cache["cached_value"])


def test_generation_in_a_scan_compiles_once(keys):
    layer = attnlib.MultiHeadAttention(num_heads=HEADS, decode=True, rotary=True)
    x = keys.normal(2, LENGTH, WIDTH)
    variables = jax.jit(layer.init)(next(keys), x)

    @jax.jit
    def generate(params, cache, first):
        def step(carry, _):
            cache, token = carry
            output, changed = layer.apply({"params": params, "cache": cache}, token, mutable=["cache"])
            return (changed["cache"], jnp.tanh(output)), output

        return jax.lax.scan(step, (cache, first), length=LENGTH)[1]

    made = generate(variables["params"], variables["cache"], x[:, :1])
    made = np.asarray(made)[:, :, 0].swapaxes(0, 1)
    fed = np.concatenate([np.asarray(x)[:, :1], np.tanh(made[:, :-1])], 1)
    whole = jax.jit(lambda params, fed: layer.copy(decode=False).apply({"params": params}, fed, is_causal=True))
    whole = np.asarray(whole(variables["params"], fed))
    assert_close(made, whole, length=LENGTH)


def test_checkpoints_give_caches_back(keys, tmp_path):
    """Decoding goes on from what Orbax has saved, to the bit: of a module, and a ragged int8 cache."""
    layer = attnlib.MultiHeadAttention(num_heads=HEADS, decode=True, sliding_window=6)
    x = keys.normal(2, LENGTH, WIDTH)
    variables = jax.jit(layer.init)(next(keys), x)
    _, cache = in_parts(layer, variables, x[:, :7], [7])
    tokens = keys.normal(2, 5, HEADS, 8)
    held = attnlib.KVCache.create((2,), 12, HEADS, 8, dtype=jnp.int8, ragged=True)
    held = held.append(tokens, tokens, jnp.array([5, 2]))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "caches", (cache, held))
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (cache, held))
        restored, restored_held = checkpointer.restore(tmp_path / "caches", like)
    assert_same((restored, restored_held), (cache, held))
    further = [in_parts(layer, {**variables, "cache": each}, x[:, 7:], [4, 1])[0] for each in (restored, cache)]
    assert_same(*further)
    assert_same(restored_held.decode(tokens, tokens, tokens)[0], held.decode(tokens, tokens, tokens)[0])


def test_beyond_the_cache_is_nan_and_never_wrong(keys):
    layer = attnlib.MultiHeadAttention(num_heads=HEADS, decode=True)
    x = keys.normal(2, 5, WIDTH)
    variables = jax.jit(layer.init)(next(keys), x[:, :4])
    made, _ = in_parts(layer, variables, x, [4, 1])
    assert np.all(np.isfinite(made[:, :4])) and np.all(np.isnan(made[:, 4:]))


REFUSED = [
    (dict(key=jnp.ones((2, 5, WIDTH))), {}, "decode=True is for self-attention"),
    (dict(key_mask=jnp.ones((2, 5), bool)), {}, "decode=True takes no key_mask"),
    (dict(query_positions=jnp.arange(5)), {}, "decode=True takes no positions"),
    ({}, dict(attention_axes=(0, 1)), "decode=True needs one attention axis; there are 2"),
]


@pytest.mark.parametrize(("options", "fields", "text"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_cannot_be_decoded_is_refused(options, fields, text, keys):
    layer = attnlib.MultiHeadAttention(num_heads=HEADS, decode=True, **fields)
    with pytest.raises(ValueError, match=text):
        layer.init(next(keys), jnp.ones((2, 5, WIDTH)), **options)
