"""The likeliest mistakes of who comes from Keras, Flax, jax.nn or PyTorch: what is written, and what attnlib answers.

Each row is a call, the type of its error, and what the error says: what to write instead is among it. What Flax or a
function of the user raises keeps its type and text; what to write is in a note below, which Python prints too. At the
end are the mistakes that are legal calls, and how one sees them. The rest of what is refused is in test_errors.py, and
the words of other libraries in test_words.py.
"""

import warnings
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnlib
from attnlib import convert, masks, modifiers, scores
from attnlib._engine.dispatch import NAMES

dot, attention, explain = attnlib.dot_product_attention, attnlib.attention, attnlib.explain
MHA = attnlib.MultiHeadAttention
B, T, S, N, K, D = 2, 5, 7, 4, 2, 8
RNG = jax.random.key(0)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


class Given(NamedTuple):
    """What every row may use; traced when the mistake is made under jit."""

    q: jax.Array  # query
    k: jax.Array  # key and value
    x: jax.Array  # the input of a layer
    params: dict  # of `LAYER`


LAYER = MHA(num_heads=N)
DROPPING = MHA(num_heads=N, dropout_rate=0.1)
DECODING = MHA(num_heads=N, decode=True)
PARAMS = jax.tree.map(np.asarray, attnlib.init_multi_head_attention(RNG, 32, num_heads=N))
GIVEN = Given(zeros(B, T, N, D), zeros(B, S, K, D), zeros(B, T, 32), PARAMS)
CACHE = attnlib.KVCache.create((B,), 4, num_kv_heads=K, key_dim=D)
TABLE = zeros(S)
TORCH = {"in_proj_weight": zeros(96, 32), "out_proj.weight": zeros(32, 32)}
STATIC = "known when the program is compiled; got a traced value. Mark it static (jax.jit(..., static_argnames="


def apply(g, *args, fields=None, **options):
    return MHA(num_heads=N, **(fields or {})).apply({"params": g.params}, g.x, *args, **options)


def traced(call, value=1):
    return jax.jit(call)(value)


LAYOUT = [
    ("heads before positions", lambda g: dot(zeros(2, 8, 128, 64), zeros(2, 8, 100, 64), zeros(2, 8, 100, 64)),
     ValueError, "query heads must be a multiple of key heads (axis -2); got 128 and 100",
     "The layout is (batch, positions, heads, features): if heads come first, swap axes, query.swapaxes(-3, -2). "
     "Axis -3 is equal in both, as heads would be."),
    ("heads before positions, with a mask", lambda g: dot(*[zeros(2, 8, 16, 64)] * 3, mask=zeros(16, 16, dtype=bool)),
     ValueError, "(*batch, heads, *query axes, *key axes) = (2, 16, 8, 8); got shape (16, 16)",
     "If query is (batch, heads, positions, features), swap its axes and key's and value's: x.swapaxes(-3, -2)."),
    ("no axis of heads", lambda g: dot(zeros(2, 5, 8), zeros(2, 7, 8), zeros(2, 7, 8)), ValueError,
     "Arrays of rank 3 are (positions, heads, features): add an axis of one head, query[..., None, :]."),
    ("value before key, as in Keras", lambda g: dot(g.q, zeros(B, S, K, 6), g.k), ValueError,
     "query and key must have equally many features (last axis) for Dot; got 8 and 6.",
     "The order of arguments is query, key, value; Keras' is query, value, key."),
    ("inputs in a list, as in Keras", lambda g: attnlib.AdditiveAttention().apply({}, [g.x, g.x]), TypeError,
     "query must be a floating-point array; got list.",
     "Keras' layer([query, value, key]) is layer(query, key, value) here."),
    ("a nested list", lambda g: dot([[[1.0]]], g.k, g.k), TypeError,
     "query must be a floating-point array; got list. Write jnp.asarray(query, jnp.float32)."),
    ("tokens that are not embedded", lambda g: LAYER.apply({"params": g.params}, zeros(B, T, dtype=np.int32)),
     TypeError, "query must be a floating-point array; got int32[2, 5]. Write query.astype(jnp.float32)."),
    ("the axis of heads", lambda g: dot(g.q, g.k, g.k, attention_axes=-2), ValueError,
     "attention_axes must name axes among the first 2 of an array of rank 4 (the last 2 hold heads and features)",
     "got -2 in attention_axes=-2. The last sequence axis is -3."),
    ("the axis of features, in a layer", lambda g: apply(g, fields=dict(attention_axes=-1)), ValueError,
     "(the last 1 hold features), i.e. 0..1 or -3..-2; got -1", "The last sequence axis is -2."),
    ("the batch axis", lambda g: dot(g.q, g.k, g.k, attention_axes=0), ValueError,
     "batch axis 1 must be equal in query, key and value, or 1;", "Name it in attention_axes if it is to be attended"),
    ("an axis twice", lambda g: dot(*[zeros(2, 3, 4, 2, 8)] * 3, attention_axes=(1, -4)), ValueError,
     "attention_axes must not repeat an axis; got (1, -4) for rank 5."),
    ("a batch of two sizes", lambda g: dot(g.q[:1].repeat(3, 0), g.k, g.k), ValueError, "batch axis 0 must be equal"),
]  # fmt: skip

MASKS = [
    ("a Keras mask (B, T, S)", lambda g: dot(g.q, g.k, g.k, mask=zeros(B, T, S, dtype=bool)), ValueError,
     "mask of rank 3 is ambiguous", "A (batch, query, key) mask needs an axis for heads: mask[:, None];"),
    ("a Keras mask (B, S)", lambda g: dot(g.q, g.k, g.k, mask=zeros(B, S, dtype=bool)), ValueError,
     "got shape (2, 7)", "Write a (batch, keys) mask as attnlib.masks.KeyPadding(mask); in a layer, as key_mask=mask."),
    ("PyTorch's additive mask", lambda g: dot(g.q, g.k, g.k, mask=zeros(T, S)), TypeError,
     "mask must be a bool array; got float32[5, 7].", "pass additive numbers (0 and -inf) as `bias`."),
    ("a mask of 0 and 1", lambda g: dot(g.q, g.k, g.k, mask=zeros(T, S, dtype=np.int32)), TypeError,
     "mask must be a bool array; got int32[5, 7]. Write mask.astype(bool) for 0 and 1 (True = attend)"),
    ("padding of 0 and 1", lambda g: apply(g, key_mask=zeros(B, T, dtype=np.int32)), TypeError,
     "key_mask must be a bool array; got int32[2, 5]. Write key_mask.astype(bool), where True = real."),
    ("padding in a list", lambda g: apply(g, key_mask=[[True] * T] * B), TypeError,
     "key_mask must be a bool array; got list. Write jnp.asarray(key_mask, bool)."),
    ("padding without batch", lambda g: apply(g, key_mask=zeros(T, dtype=bool)), ValueError,
     "key_mask must have the shape of its operand without features, (2, 5), or ones to broadcast; got (5,)."),
    ("a mask for each key head", lambda g: dot(g.q, g.k, g.k, mask=zeros(1, K, T, S, dtype=bool)), ValueError,
     "Repeat it for the 2 query heads of each key head: jnp.repeat(mask, 2, 1)."),
    ("a bias for each key head", lambda g: dot(g.q, g.k, g.k, bias=zeros(B, K, T, S)), ValueError,
     "Repeat it for the 2 query heads of each key head: jnp.repeat(bias, 2, 1)."),
    ("a bias (N, T, S)", lambda g: dot(g.q, g.k, g.k, bias=zeros(N, T, S)), ValueError,
     "bias of rank 3 is ambiguous", "a (heads, query, key) one needs an axis for the batch: bias[None]."),
    ("a bias of keys and queries", lambda g: dot(g.q, g.k, g.k, bias=zeros(S, T)), ValueError,
     "got shape (7, 5)", "Query axes come before key axes: swap them."),
    ("a bool bias", lambda g: dot(g.q, g.k, g.k, bias=zeros(T, S, dtype=bool)), TypeError,
     "bias must be a floating-point array or None; got bool[5, 7]. Pass a bool array as `mask`"),
    ("a kind of mask", lambda g: dot(g.q, g.k, g.k, mask=masks.Causal), TypeError,
     "mask must be a bool array or a Mask", "That is a class; write Causal(...)."),
    ("a mask by name", lambda g: dot(g.q, g.k, g.k, mask="causal"), TypeError, "such as attnlib.masks.Causal()"),
    ("a Mask & an array", lambda g: masks.Causal() & zeros(T, S, dtype=bool), TypeError,
     "Wrap a bool array as attnlib.masks.Dense(array)."),
    ("`and` in a predicate", lambda g: dot(g.q, g.k, g.k, mask=masks.Predicate(lambda i, j: i >= j and i < j + 4)),
     ValueError, "Predicate's fn is called as fn(query_position, key_position)", "write & and | for and and or"),
    ("PyTorch's mask_mod", lambda g: dot(g.q, g.k, g.k, mask=masks.Predicate(lambda b, h, i, j: i >= j)), TypeError,
     "missing 2 required positional arguments", "Predicate's fn is called as fn(query_position, key_position)"),
    ("a Mask & a function", lambda g: masks.Causal() & (lambda b, h, i, j: i >= j), TypeError,
     "Wrap a function as attnlib.masks.Function(fn)."),
    ("`and` in a mask_mod", lambda g: dot(g.q, g.k, g.k, mask=lambda b, h, i, j: i >= j and i < j + 4),
     jax.errors.TracerBoolConversionError,
     "is called as fn(batch, head, query_position, key_position) with traced scalars: write & and | for and and or"),
    ("NumPy's table in a predicate", lambda g: dot(g.q, g.k, g.k, mask=masks.Predicate(lambda i, j: TABLE[j] > i)),
     jax.errors.TracerArrayConversionError, "take no traced index: write jnp.asarray(table)[index]."),
]  # fmt: skip

OPTIONS = [
    ("dropout without a key", lambda g: dot(g.q, g.k, g.k, dropout_rate=0.1), ValueError,
     "dropout_rate=0.1 needs dropout_rng; got None. Pass dropout_rng=jax.random.key(seed), a new one each step"),
    ("a seed for a key", lambda g: dot(g.q, g.k, g.k, dropout_rate=0.1, dropout_rng=0), TypeError,
     "dropout_rng must be one JAX random key, jax.random.key(seed); got int."),
    ("dropout in per cent", lambda g: dot(g.q, g.k, g.k, dropout_rate=10, dropout_rng=RNG), ValueError,
     "dropout_rate must be in [0, 1); got 10.0. It is the fraction of weights to drop."),
    ("a scale by name", lambda g: dot(g.q, g.k, g.k, scale="1/sqrt"), TypeError,
     "the scale must be a number or an array, such as features**-0.5; got '1/sqrt'."),
    ("a negative soft cap", lambda g: dot(g.q, g.k, g.k, logits_soft_cap=-30), ValueError,
     "logits_soft_cap must be a number in [1e-30, 1e30] or None; got -30.0."),
    ("an array for a bool", lambda g: dot(g.q, g.k, g.k, is_causal=np.array(True)), TypeError,
     "is_causal must be True or False; got array(True). Write bool(is_causal)."),
    ("jax.nn's implementation", lambda g: dot(g.q, g.k, g.k, implementation="xla"), ValueError,
     f"implementation 'xla' is unknown; known are {', '.join(map(repr, NAMES))}, and None to choose."),
    ("cuDNN in float32", lambda g: dot(g.q, g.k, g.k, implementation="cudnn"), ValueError,
     "cudnn: query, key and value must all be float16 or all bfloat16; they are float32",
     "implementation=None chooses among all that can."),
    ("a sink for each key head", lambda g: dot(g.q, g.k, g.k, sink=zeros(K)), ValueError,
     "sink must have shape () or (4,), one for each query head; got (2,)."),
    ("a list of sinks", lambda g: dot(g.q, g.k, g.k, sink=[0.0] * N), TypeError,
     "sink must be a number, a floating-point array or None; got list.", "Write jnp.asarray(sink, jnp.float32)."),
    ("mask and bias by position", lambda g: dot(g.q, g.k, g.k, None, zeros(T, S)), TypeError,
     "takes query, key, value by position and all others by name, mask=..., bias=...; got 5 by position."),
    *((f"{name} traced", lambda g, name=name, value=value: traced(lambda v: dot(
        g.q, g.k, g.k, **{name: v}), value), TypeError, f"{name} must be {kind}, {STATIC}'{name}')) or close over it.")
      for name, kind, value in [
          ("is_causal", "True or False", True), ("return_weights", "True or False", True),
          ("return_lse", "True or False", True), ("dropout_rate", "a number", 0.1),
          ("logits_soft_cap", "a number in [1e-30, 1e30] or None", 30.0),
          ("attention_axes", "an int, a sequence of ints or None", 1),
          ("attention_axes", "an int, a sequence of ints or None", (1,)),
          ("block_sizes", "(queries, keys), two ints >= 1, or None", (4, 4))]),
    ("a traced neighborhood", lambda g: traced(lambda v: masks.Neighborhood(v)), TypeError,
     "Neighborhood size must be an int >= 1 or a sequence of ints >= 1, ", f"{STATIC}'size')) or close over it."),
    ("jit of a name", lambda g: jax.jit(dot)(g.q, g.k, g.k, implementation="reference"), TypeError,
     "was passed to the function at path implementation.", "using the static_argnums or static_argnames parameters"),
]  # fmt: skip

FUNCTIONS = [
    ("a kind of score", lambda g: attention(g.q, g.k, g.k, score=scores.Dot), TypeError,
     "score must be a Score such as attnlib.scores.Dot()", "That is a class; write Dot(...)."),
    ("a kind of score, in a layer", lambda g: apply(g, fields=dict(score=scores.Dot)), ValueError,
     'score must be "dot", "additive" or an attnlib.scores.Score such as scores.Dot(); got <class'),
    ("a score by name", lambda g: attention(g.q, g.k, g.k, score="additive"), TypeError,
     "score must be a Score such as attnlib.scores.Dot()"),
    ("a score of one argument", lambda g: attention(g.q, g.k, g.k, score=scores.Custom(lambda q: q.sum())), TypeError,
     "takes 1 positional argument but 2 were given", "Custom's fn is called as fn(query, key, *params)"),
    ("a score whose parameters are missing", lambda g: attention(
        g.q, g.k, g.k, score=scores.Custom(lambda q, k, w: q @ w @ k)), TypeError,
     "missing 1 required positional argument: 'w'", "pass params with it, scores.Custom(fn, *params)."),
    ("a score of many numbers", lambda g: attention(g.q, g.k, g.k, score=scores.Custom(lambda q, k: q * k)),
     ValueError, "Custom fn must return a scalar for one query (8,) and one key (8,)", "Write it for one pair"),
    ("a kind of modifier", lambda g: dot(g.q, g.k, g.k, score_mod=modifiers.ALiBi), TypeError,
     "score_mod must be a function", "such as attnlib.modifiers.ALiBi(...); got <class"),
    ("score_mod of the logit alone", lambda g: dot(g.q, g.k, g.k, score_mod=lambda logit: 2 * logit), TypeError,
     "takes 1 positional argument but 5 were given",
     "score_mod is called as score_mod(logit, batch, head, query_position, key_position)"),
    ("`if` in score_mod", lambda g: dot(g.q, g.k, g.k, score_mod=lambda s, b, h, i, j: s if i > j else 2 * s),
     jax.errors.TracerBoolConversionError, "write jnp.where(condition, a, b) for if"),
    ("NumPy's table in score_mod", lambda g: dot(g.q, g.k, g.k, score_mod=lambda s, b, h, i, j: s + TABLE[i]),
     jax.errors.TracerArrayConversionError, "take no traced index: write jnp.asarray(table)[index]."),
    ("a list in score_mod", lambda g: dot(g.q, g.k, g.k, score_mod=lambda s, b, h, i, j: s + ([0.1] * N)[h]),
     jax.errors.TracerIntegerConversionError, "take no traced index: write jnp.asarray(table)[index]."),
    ("score_mod of many numbers", lambda g: dot(g.q, g.k, g.k, score_mod=lambda s, *at: s * jnp.ones(N)), ValueError,
     "score_mod must return a scalar for one logit", "It is written for one pair"),
    ("score_mod as a mask", lambda g: dot(g.q, g.k, g.k, score_mod=lambda s, b, h, i, j: j <= i), TypeError,
     "score_mod must return the new logit, a floating-point number; got bool. To leave pairs out, pass a mask: "
     "mask=attnlib.masks.Function(fn) of (batch, head"),
    ("score_mod of positions alone", lambda g: dot(g.q, g.k, g.k, score_mod=lambda s, b, h, i, j: i - j), TypeError,
     "score_mod must return the new logit, a floating-point number; got int32."),
]  # fmt: skip

OTHER = "Use the fields of that layer; for MultiHeadAttention: attnlib.MultiHeadAttention(**"
LAYERS = [
    ("a layer called as in Keras", lambda g: LAYER(g.x), flax.errors.CallCompactUnboundModuleError,
     "Write variables = layer.init(jax.random.key(0), x), then layer.apply(variables, x)."),
    ("params in place of variables", lambda g: LAYER.apply(g.params, g.x), flax.errors.ScopeCollectionNotFound,
     'layer.apply({"params": params}, x), not layer.apply(params, x).'),
    ("variables in place of params", lambda g: attnlib.multi_head_attention({"params": g.params}, g.x), ValueError,
     "params must be a mapping with query, key, value, out", 'got [\'params\']. Pass variables["params"].'),
    ("parameters of other heads", lambda g: MHA(num_heads=8).apply({"params": g.params}, g.x),
     flax.errors.ScopeParamShapeError, OTHER),
    ("parameters without a gate", lambda g: apply(g, fields=dict(use_gate=True)),
     flax.errors.ScopeParamNotFoundError, OTHER),
    ("parameters with biases", lambda g: apply(g, fields=dict(use_bias=False)), ValueError,
     "the fields of this layer do not use the parameters query/bias, key/bias, value/bias, out/bias.",
     "attnlib.MultiHeadAttention(**attnlib.convert.module_fields(params), ...)."),
    ("parameters with a sink", lambda g: LAYER.apply({"params": g.params | {"sink": {"logit": zeros(N)}}}, g.x),
     ValueError, "the fields of this layer do not use the parameters sink."),
    ("an input of other features", lambda g: LAYER.apply({"params": g.params}, g.x[..., :16]),
     flax.errors.ScopeParamShapeError, "or to an input with other features"),
    ("an input of other features, as a function", lambda g: attnlib.multi_head_attention(g.params, g.x[..., :16]),
     ValueError, "query must have (32,) features, as its kernel (32, 4, 8);", "or project the input to"),
    ("neither training nor not", lambda g: DROPPING.apply({"params": g.params}, g.x), ValueError,
     "deterministic must be given once, in the constructor or in the call; it was given in neither.",
     "Write deterministic=False to train with dropout, deterministic=True to evaluate."),
    ("training without a key", lambda g: DROPPING.apply({"params": g.params}, g.x, deterministic=False),
     flax.errors.InvalidRngError, 'Pass rngs={"dropout": key} to apply, or dropout_rng=key to the call'),
    *((f"{name} traced, in a layer", lambda g, name=name: traced(lambda v: DROPPING.apply(
        {"params": g.params}, g.x, **{"deterministic": True, name: v}), True),
       TypeError, f"{name} must be True or False, {STATIC}'{name}')) or close over it.")
      for name in ("deterministic", "is_causal", "return_weights", "sow_weights")),
    ("is_causal in a checkpoint", lambda g: flax.linen.remat(MHA)(N).apply({"params": g.params}, g.x, is_causal=True),
     TypeError, "nn.remat and nn.jit trace all keywords: write mask=attnlib.masks.Causal()."),
    ("deterministic in a checkpoint", lambda g: flax.linen.remat(MHA)(N, dropout_rate=0.1).apply(
        {"params": g.params}, g.x, deterministic=True), TypeError, "pass deterministic to the constructor."),
    ("return_lse in a checkpoint", lambda g: jax.checkpoint(dot)(g.q, g.k, g.k, return_lse=True), TypeError,
     "write jax.checkpoint(lambda *args: function(*args, return_lse=True))."),
    ("num_heads traced", lambda g: traced(lambda n: MHA(num_heads=n).init(RNG, g.x)), TypeError,
     f"num_heads must be an int >= 1, {STATIC}'num_heads')) or close over it."),
    ("num_heads a quotient", lambda g: MHA(num_heads=32 / 8).init(RNG, g.x), TypeError,
     "num_heads must be an int >= 1; got 4.0. Write int(num_heads); `//` divides ints."),
    ("heads that do not divide the features", lambda g: MHA(num_heads=5).init(RNG, g.x), ValueError,
     "key_dim defaults to query features / num_heads, which must be an int; got 32 / 5. Pass key_dim."),
    ("key heads that do not divide the heads", lambda g: MHA(num_heads=4, num_kv_heads=3).init(RNG, g.x), ValueError,
     "num_heads must be a multiple of num_kv_heads; got 4 and 3. num_kv_heads may be 1, 2, 4."),
    ("an initialiser by name", lambda g: MHA(num_heads=N, kernel_init="glorot_uniform").init(RNG, g.x), TypeError,
     "such as jax.nn.initializers.glorot_uniform(); got 'glorot_uniform'."),
    ("a prompt longer than the cache", lambda g: CACHE.append(zeros(B, 5, K, D), zeros(B, 5, K, D)), ValueError,
     "the capacity of the cache is 4 tokens; appending these tokens needs 5. Create the cache with a larger capacity, "
     "or with a window."),
    ("a cache of ints", lambda g: attnlib.KVCache.create((B,), 4, K, D, dtype=jnp.int32), ValueError,
     "dtype must be one of float32, bfloat16, float16, int8; got int32."),
    ("heads before tokens, in a cache", lambda g: CACHE.append(zeros(B, K, 1, D), zeros(B, K, 1, D)), ValueError,
     "key must have shape (*batch, n, heads, features) = (2, n, 2, 8) to fit the cache; got (2, 2, 1, 8)"),
    ("decoding without mutable", lambda g: DECODING.apply(
        DECODING.init(RNG, g.x), g.x[:, :1]), flax.errors.ModifyScopeVariableError,
     'output, updates = layer.apply(variables, x, mutable=["cache"]), then variables |= updates.'),
    ("decoding without a cache", lambda g: DECODING.apply({"params": g.params}, g.x[:, :1], mutable=["cache"]),
     ValueError, 'decode=True needs a cache, which init creates for an input of the greatest length: cache = '
     'layer.init(rng, longest)["cache"].'),
    ("a state dict of a whole model", lambda g: convert.from_torch({f"attn.{n}": a for n, a in TORCH.items()}, N),
     ValueError, "unexpected: attn.in_proj_weight", "Pass prefix='attn', a layer with these names."),
    ("a state dict of PyTorch for Flax'", lambda g: convert.from_flax(TORCH), ValueError,
     "the entries do not fit a multi-head layer of Flax:", "missing: query/kernel, expected (C, N, D)",
     "A torch.nn.MultiheadAttention has these names: use attnlib.convert.from_torch(state_dict, num_heads)."),
    ("variables for the parameters of Flax", lambda g: convert.from_flax({"params": GIVEN.params}), ValueError,
     'Pass what is under "params": variables["params"].'),
]  # fmt: skip


def word(function, name, says, **fields):
    """A row of what is written with a word that attnlib does not have."""
    call = {"call": lambda g: apply(g, fields=fields, **{name: None}), "layer": lambda g: MHA(N, **{name: None})}
    made = call.get(function, lambda g: getattr(attnlib, function)(g.q, g.k, g.k, **{name: None}))
    return f"{name} of {function}", made, TypeError, f"takes no {name!r}: {says}"


FUNCTION = "dot_product_attention"
PEERS = [
    word("call", "use_causal_mask", "write is_causal."),  # Keras
    word("call", "return_attention_scores", "write return_weights."),
    word("call", "attention_mask", "write mask=attention_mask[:, None] where it is (batch, queries, keys)"),
    word("call", "training", "write deterministic=not training."),
    word("layer", "num_key_value_heads", "write num_kv_heads."),
    word("layer", "dropout", "write dropout_rate."),
    word("layer", "kernel_initializer", "write kernel_init, a function such as"),
    word(FUNCTION, "query_seq_lengths", "write mask=attnlib.masks.Lengths(query=query_seq_lengths)."),  # jax.nn
    word(FUNCTION, "local_window_size", "write mask=attnlib.masks.SlidingWindow(left, right)."),
    word("attention", "scale", "write score=attnlib.scores.Dot(scale)."),
    word("layer", "qkv_features", "write key_dim=qkv_features // num_heads."),  # Flax
    word("layer", "out_features", "write output_shape=out_features."),
    word("call", "inputs_kv", "write key=inputs_kv."),
    word("call", "input_positions", "write query_positions=input_positions, and rotary=True in MultiHeadAttention"),
    word(FUNCTION, "broadcast_dropout", "leave it out: each weight is dropped on its own"),
    word(FUNCTION, "attn_mask", "write mask=attn_mask where it is bool with True = attend, bias=attn_mask"),  # PyTorch
    word(FUNCTION, "dropout_p", "write dropout_rate."),
    word(FUNCTION, "enable_gqa", "leave it out: heads of key and value that divide the query's are shared."),
    word(FUNCTION, "key_padding_mask", "write mask=attnlib.masks.KeyPadding(~key_padding_mask), since True = real"),
    word("call", "key_padding_mask", "write key_mask=~key_padding_mask, since True = real here."),
    word("call", "need_weights", "write return_weights."),
    word("layer", "embed_dim", "leave it out: sizes come from the input"),
    word(FUNCTION, "causal", "write is_causal."),  # FlashAttention
    word(FUNCTION, "is_casual", "did you mean is_causal?"),  # slips
    word("explain", "block_size", "did you mean block_sizes?"),
    word("call", "dropout_rate", "write dropout_rate as a field, MultiHeadAttention(...)."),
    word("layer", "is_causal", "write is_causal in the call."),
    word("explain", "temperature", "known are attention_axes, bias, block_sizes,"),
]  # fmt: skip

ALL = [*LAYOUT, *MASKS, *OPTIONS, *FUNCTIONS, *LAYERS, *PEERS]


def shown(error):
    """What the user reads: the message, and notes below it."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(("call", "error", "texts"), [(r[1], r[2], r[3:]) for r in ALL], ids=[r[0] for r in ALL])
def test_the_error_says_what_to_write(call, error, texts, jit):
    with pytest.raises(error) as caught:
        jax.eval_shape(call, GIVEN) if jit else call(GIVEN)
    assert caught.type is error
    for text in texts:
        assert text in shown(caught.value), f"{text!r} is not in: {shown(caught.value)}"


# Mistakes that are legal calls: nothing can be raised, and this is how one sees them


def test_heads_before_positions_can_be_seen():
    heads_first = jax.ShapeDtypeStruct((2, 8, 128, 64), jnp.float32)
    told = "batch (2,), queries (8,), keys (8,), 128 heads, 64 features"
    assert explain(heads_first, heads_first, heads_first).axes == told
    assert f"axes: {told}\n" in str(explain(heads_first, heads_first, heads_first))
    query, key = (jax.ShapeDtypeStruct((2, 9, heads, 64), jnp.float32) for heads in (16, 4))
    assert "16 heads on 4 of keys, 64 features" in explain(query, key, key).axes


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_an_inverted_mask_can_be_seen(jit, keys):
    """Zeros, no NaN: `jax_debug_nans` is silent, and the log-sum-exp and the weights say which queries are empty."""
    query, key, x = keys.normal(B, T, N, D), keys.normal(B, S, K, D), keys.normal(B, T, 32)
    inverted = ~masks.Causal(offset=1).as_array(T, S)  # the last query would attend all but the last key

    def run(inverted):
        output, lse = dot(query, key, key, mask=inverted & (jnp.arange(T) > 2)[:, None], return_lse=True)
        _, weights = LAYER.apply({"params": PARAMS}, x, mask=jnp.zeros((T, T), bool), return_weights=True)
        return output, lse, weights

    with jax.debug_nans(True):
        output, lse, weights = (jax.jit(run) if jit else run)(inverted)
    empty = np.broadcast_to(np.arange(T) <= 2, (B, N, T))
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert not output[:, :3].any() and output[:, 3:].all()
    assert not weights.sum(-1).any()


def test_a_mask_of_keys_where_there_are_as_many_queries_as_sequences(keys):
    """(B, S) is read as (T, S); KeyPadding says what is meant."""
    query, real = keys.normal(3, 3, N, D), jnp.array([[True, True, True], [True, True, False], [True, False, False]])
    _, weights = dot(query, query, query, mask=real, return_weights=True)
    assert (weights[2, :, 0] > 0).all()  # the first query of the last sequence sees its padding
    _, weights = dot(query, query, query, mask=masks.KeyPadding(real), return_weights=True)
    np.testing.assert_array_equal(weights > 0, np.broadcast_to(np.asarray(real)[:, None, None], weights.shape))


def test_float64_without_x64_is_float32():
    """As everywhere in JAX: NumPy's float64 in silence, what asks for it with JAX's warning."""
    query = np.zeros((B, T, N, D))
    assert query.dtype == np.float64 and dot(query, query, query).dtype == jnp.float32
    with pytest.warns(UserWarning, match="jax_enable_x64"):
        output = MHA(num_heads=N, dtype=jnp.float64).apply({"params": PARAMS}, GIVEN.x)
    assert output.dtype == jnp.float32


def test_numpy_numbers_are_options():
    fields = dict(num_heads=np.int64(4), num_kv_heads=np.int32(2), key_dim=np.int8(8))
    assert jax.eval_shape(MHA(**fields).init, RNG, GIVEN.x)["params"]["key"]["kernel"].shape == (32, 2, 8)
    options = dict(is_causal=np.True_, attention_axes=np.array([1]), block_sizes=np.array([4, 4]), scale=np.float64(1))
    options |= dict(logits_soft_cap=np.float32(3), dropout_rate=np.float32(0.1), dropout_rng=RNG)
    with warnings.catch_warnings(action="error"):
        assert jax.eval_shape(lambda: dot(GIVEN.q, GIVEN.k, GIVEN.k, **options)).shape == (B, T, N, D)


def test_features_and_heads_by_position_are_heads_and_features():
    """`torch.nn.MultiheadAttention(32, 4)` has 4 heads; Keras' layer, and this one, has 32, of 4 features each."""
    kernel = jax.eval_shape(MHA(32, 4).init, RNG, GIVEN.x)["params"]["query"]["kernel"]
    assert kernel.shape == (32, 32, 4) and "num_heads = 32" in str(MHA(32, 4))


def test_a_scale_of_zero_is_the_mean(keys):
    query, key = keys.normal(B, T, N, D), keys.normal(B, S, N, D)
    output = dot(query, key, key, scale=0)
    np.testing.assert_allclose(output, np.broadcast_to(key.mean(1, keepdims=True), output.shape), atol=1e-6)
