"""The whole public API traces, lowers and exports for cpu, cuda and tpu, and the exported cpu program runs."""

import functools
import itertools
import operator

import flax.linen
import jax
import jax.numpy as jnp
import mask_catalogue
import modifier_catalogue
import numpy as np
import pytest
import score_catalogue
from cases import COMPLETE, by_name
from conftest import assert_close
from jax import export

import attnlib
from attnlib import convert, inspect, masks, positions

PLATFORMS = ("cpu", "cuda", "tpu")
QUERY, KEY = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((2, 5, 4, 8), (2, 7, 2, 8)))
X = np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)
REAL = np.arange(14).reshape(2, 7) % 3 != 1
BIAS = np.random.default_rng(2).normal(size=(1, 4, 5, 7)).astype(np.float32)
DATA = 0.2 * np.arange(28, dtype=np.float32).reshape(7, 4)
# Of each kind the example with most arrays.
MASKS = [
    max((row.kind(**arguments) for arguments in row.examples.values()), key=lambda mask: len(jax.tree.leaves(mask)))
    for row in mask_catalogue.ROWS
]
EVERYTHING = dict(
    is_causal=True, logits_soft_cap=5.0, return_weights=True, return_lse=True, attention_axes=-3, precision="highest",
    normalize=False,
)  # fmt: skip


def dropped(how, query, key, real, bias, data):
    """Every option of the pure functions at once."""
    return attnlib.dot_product_attention(
        query, key, key, mask=masks.KeyPadding(real) | masks.SlidingWindow(1, 2), bias=bias, dropout_rate=0.2,
        dropout_rng=jax.random.wrap_key_data(data), **EVERYTHING, **how,
    )  # fmt: skip


def all_masks(how, query, key, real, arrays):
    """Every kind of mask, with its arrays traced, and under a mask of which no tile is empty or full."""
    masks_of_kinds = jax.tree.unflatten(jax.tree.structure(MASKS), arrays)
    mask = functools.reduce(operator.or_, masks_of_kinds) & masks.KeyPadding(real) & ~masks.Dense(~real[:, None, None])
    return attnlib.additive_attention(query, key, key, scale=jnp.ones(8), mask=mask, **how)


def modified(how, query, key, data):
    """Every modifier, with a sink and explicit positions."""
    taken = itertools.count()

    def part(*shape):  # of the data, another one each time
        return jnp.resize(jnp.roll(data, next(taken)), shape)

    fits = modifier_catalogue.Fits(4, (4,))
    named = [row.kind(**row.arguments(part, fits)) for row in modifier_catalogue.ROWS]
    named.append(lambda logit, b, head, i, j: logit * data[0, head] + (i - j).astype(logit.dtype))
    places = dict(query_positions=np.arange(5), key_positions=np.arange(7) - 1)
    return [
        attnlib.dot_product_attention(query, key, key, score_mod=each, sink=data[1], **places, **how) for each in named
    ]


def looked_into(how, query, key):
    largest, keys = inspect.top_keys(query, key, k=2, **how)
    return [
        inspect.attention_rows(query, key, rows=np.array([1, 3]), **how), largest, keys.astype(jnp.float32),
        inspect.attention_received(query, key, **how), inspect.attention_entropy(query, key, is_causal=True, **how),
    ]  # fmt: skip


def biased_layers(how, x):
    made = [attnlib.RelativePositionBias(sizes=3), attnlib.BucketedPositionBias(num_buckets=8, max_distance=6)]
    fields = dict(num_heads=2, rotary=True, normalize_qk="rms", use_scale=True, use_sink=True, num_memory=2, **how)
    layers = [attnlib.MultiHeadAttention(score_mod=bias, **fields) for bias in made]
    return [layer.init_with_output(jax.random.key(0), x)[0] for layer in layers]


def converted(how, x):
    """There and back, as arrays are moved inside a program."""
    params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2)
    return attnlib.multi_head_attention(convert.from_flax(convert.to_flax(params)), x, **how)


def merged(how, query, key):
    parts = [
        attnlib.dot_product_attention(query, key[:, cut], key[:, cut], return_lse=True, **how)
        for cut in (slice(0, 4), slice(4, 7))
    ]
    return attnlib.merge_attention(*zip(*parts, strict=True))


def other_scores(how, query, key, data):
    """Every score but those that the pure functions are named after."""

    def part(*shape):
        return jnp.resize(data, shape)

    fits = score_catalogue.Fits(4, 8, 8)
    made = [row(**row.last_form(part, fits)) for row in score_catalogue.ROWS if row.name not in ("dot", "additive")]
    return [attnlib.attention(query, key, key, score=score, **how) for score in made]


def gradients(how, query, key, bias):
    def loss(query, key, bias):
        output = attnlib.additive_attention(query, key, key, bias=bias, is_causal=True, **how)
        return jnp.sum(output**2)

    gradient = jax.grad(loss, (0, 1, 2))
    return jax.jvp(gradient, (query, key, bias), (query, key, bias))


def pure_layer(how, x):
    params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=4, num_kv_heads=2, use_gate=True)
    return attnlib.multi_head_attention(params, x, is_causal=True, return_weights=True, **how)


def module(kind, **fields):
    def function(how, x):
        layer = kind(**fields, **how)
        variables = layer.init(jax.random.key(0), x, deterministic=True)
        return layer.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(1)})

    return function


def turned(how, x):
    """Rotary embedding, which knows no implementations, before attention."""
    x = positions.rotary_embedding(x, scaling=positions.YaRNScaling(2.0, original_length=4), base=10.0)
    return attnlib.dot_product_attention(x, x, x, **how)


def decoded(how, query, key, lengths):
    """A cache of each kind: prefilled, then a token; pages are shared before it."""
    forms = dict(ragged=True), dict(window=3, ragged=True, dtype=jnp.int8)
    results = []
    for form in forms:
        cache = attnlib.KVCache.create((2,), 8, num_kv_heads=2, key_dim=8, **form)
        first, cache = cache.decode(query[:, :4], key[:, :4], key[:, :4], lengths, **how)
        cache = cache.append(key[:, 4:5], key[:, 4:5])
        results += [first, cache.attend(query[:, 4:], sink=0.0, **how), cache.length.astype(jnp.float32)]
    paged = attnlib.PagedKVCache.create(2, 8, num_kv_heads=2, key_dim=8, num_pages=5, page_size=4)
    first, paged = paged.decode(query[:, :4], key[:, :4], key[:, :4], lengths, **how)
    paged = paged.fork(0, 1).append(key[:, 4:5], key[:, 4:5])
    return [*results, first, paged.attend(query[:, 4:], **how), paged.free_pages.astype(jnp.float32)]


def drop_in(how, x):
    layer = flax.linen.MultiHeadDotProductAttention(
        num_heads=2, attention_fn=functools.partial(attnlib.attention_fn, implementation=how["implementation"])
    )
    return layer.init_with_output(jax.random.key(0), x)[0]


def training_step(how, x):
    """Regularisers, gradients and constraints of a module."""
    layer = attnlib.MultiHeadAttention(num_heads=2, kernel_regularizer=lambda w: jnp.sum(w**2), **how)
    params = layer.init(jax.random.key(0), x)["params"]

    def loss(params):
        output, updated = layer.apply({"params": params}, x, mutable=["losses"])
        return jnp.sum(output**2) + attnlib.regularization_loss(updated)

    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))
    constrained = attnlib.apply_constraints(stepped, kernel_constraint=lambda w: jnp.maximum(w, 0))
    return constrained, attnlib.parameter_penalty(constrained, kernel_regularizer=jnp.sum)


PROGRAMS = {
    "dot product, every option": (dropped, (QUERY, KEY, REAL, BIAS, np.array([1, 2], np.uint32))),
    "additive, every mask": (all_masks, (QUERY, KEY, REAL, jax.tree.leaves(MASKS))),
    "every modifier": (modified, (QUERY, KEY, DATA)),
    "inspect": (looked_into, (QUERY, KEY)),
    "layers with all that is around": (biased_layers, (X,)),
    "convert": (converted, (X,)),
    "other scores": (other_scores, (QUERY, KEY, DATA)),
    "merge": (merged, (QUERY, KEY)),
    "first and second derivatives": (gradients, (QUERY, KEY, BIAS)),
    "pure layer": (pure_layer, (X,)),
    "MultiHeadAttention": (
        module(attnlib.MultiHeadAttention, num_heads=4, num_kv_heads=2, use_gate=True, sliding_window=3,
               dropout_rate=0.1, score="additive"), (X,)),
    "AdditiveAttention": (module(attnlib.AdditiveAttention, dropout_rate=0.1), (X,)),
    "DotProductAttention": (module(attnlib.DotProductAttention, use_scale=True, score_mode="concat"), (X,)),
    "training step": (training_step, (X,)),
    "rotary_embedding": (turned, (QUERY,)),
    "attention_fn": (drop_in, (X,)),
    "caches": (decoded, (QUERY, KEY, np.array([4, 2], np.int32))),
}  # fmt: skip


# That an exported program computes what the program computes is JAX's own promise. It is kept here by those with
# random bits, a custom derivative, a state and derivatives of derivatives; lowering, which can fail, is tried for all.
RUN = [
    ("dot product, every option", "blockwise"), ("caches", "reference"), ("training step", "blockwise"),
    ("first and second derivatives", "reference"),
]  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("implementation", COMPLETE)
def test_exports_for_every_platform(implementation, name):
    exported, _ = exported_of(name, implementation)
    assert exported.platforms == PLATFORMS


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        each if each in RUN else pytest.param(*each, marks=pytest.mark.slow)
        for each in itertools.product(PROGRAMS, COMPLETE)
    ],
)
def test_what_is_exported_runs(name, implementation):
    exported, program = exported_of(name, implementation)
    arguments = PROGRAMS[name][1]
    made = jax.jit(exported.call)(*arguments)
    assert_close(jax.tree.leaves(made), jax.tree.leaves(jax.jit(program)(*arguments)), length=8)


def exported_of(name, implementation):
    function, arguments = PROGRAMS[name]
    program = functools.partial(function, by_name(implementation))
    return export.export(jax.jit(program), platforms=PLATFORMS)(*arguments), program


def test_the_whole_api_is_exported_here():
    """A new public function must join the programs above, or the list of those that run on the host.

    The programs of NNX modules are those of the linen modules, which tests/layers/test_nnx.py checks. Every kind of
    mask, score and modifier is in a catalogue, which test_catalogues.py checks.
    """
    host = {"Explanation", "constrain", "convert", "explain", "inspect", "masks", "modifiers", "positions", "scores"}
    host |= {"Context", "nnx"}
    traced = {
        "AdditiveAttention", "BucketedPositionBias", "DotProductAttention", "KVCache", "MultiHeadAttention",
        "PagedKVCache", "RelativePositionBias", "additive_attention", "apply_constraints", "attention", "attention_fn",
        "dot_product_attention", "init_multi_head_attention", "merge_attention", "multi_head_attention",
        "parameter_penalty", "regularization_loss",
    }  # fmt: skip
    assert set(attnlib.__all__) == host | traced
    used = {name for function, _ in PROGRAMS.values() for name in names_of(function)}
    assert {"rotary_embedding", "YaRNScaling", *inspect.__all__} <= used


def names_of(function):
    return {*function.__code__.co_names, *(n for c in function.__code__.co_consts if hasattr(c, "co_names")
            for n in c.co_names)}  # fmt: skip
