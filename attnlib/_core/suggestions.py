"""Suggestions in errors: attnlib's argument for that of another library, and what a user's function must look like."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import jax

from attnlib._core.sizes import is_static

P = ParamSpec("P")
R = TypeVar("R")

OMIT = ""  # the key of an answer for arguments that attnlib does not need

# For each argument of Keras, Flax, jax.nn, PyTorch or FlashAttention: attnlib's arguments, each with what to write. The
# first one that the called function takes is suggested.
SUGGESTIONS: dict[str, dict[str, str]] = {
    # Masks
    "attention_mask": {"mask": "mask=attention_mask[:, None] where it is (batch, queries, keys), True = attend"},
    "attn_mask": {"mask": "mask=attn_mask where it is bool with True = attend, bias=attn_mask where it is added"},
    "causal": {"is_causal": "is_causal"},
    "use_causal_mask": {"is_causal": "is_causal"},
    "value_mask": {"key_mask": "key_mask=value_mask"},
    "key_padding_mask": {
        "key_mask": "key_mask=~key_padding_mask, since True = real here",
        "mask": "mask=attnlib.masks.KeyPadding(~key_padding_mask), since True = real here",
    },
    "query_seq_lengths": {"mask": "mask=attnlib.masks.Lengths(query=query_seq_lengths)"},
    "key_value_seq_lengths": {"mask": "mask=attnlib.masks.Lengths(key=key_value_seq_lengths)"},
    "local_window_size": {"mask": "mask=attnlib.masks.SlidingWindow(left, right)"},
    "window_size": {"mask": "mask=attnlib.masks.SlidingWindow(left, right)"},
    # Logits and weights
    "scale": {"score": "score=attnlib.scores.Dot(scale)", "use_scale": "use_scale=True"},
    "softmax_scale": {"scale": "scale", "score": "score=attnlib.scores.Dot(scale)"},
    "softcap": {"logits_soft_cap": "logits_soft_cap"},
    "return_attention_scores": {"return_weights": "return_weights"},
    "need_weights": {"return_weights": "return_weights"},
    "average_attn_weights": {"return_weights": "return_weights=True, and weights.mean(1) for the mean over heads"},
    "return_residual": {"return_lse": "return_lse"},
    "force_fp32_for_softmax": {OMIT: "softmax is in float32 at least"},
    # Dropout
    "dropout": {"dropout_rate": "dropout_rate"},
    "dropout_p": {"dropout_rate": "dropout_rate"},
    "training": {
        "deterministic": "deterministic=not training",
        "dropout_rate": "dropout_rate=0.0 where not training",
    },
    "seed": {"dropout_rng": "dropout_rng=jax.random.key(seed), a new one each step"},
    "dropout_rng": {"rngs": "rngs=dropout_rng"},
    "rngs": {"dropout_rng": 'dropout_rng=key, or rngs={"dropout": key} in init and apply'},
    "broadcast_dropout": {OMIT: "each weight is dropped on its own, as with broadcast_dropout=False"},
    "keep_rngs": {OMIT: "a module holds no keys"},
    # Sizes
    "num_query_heads": {"num_heads": "num_heads"},
    "num_key_value_heads": {"num_kv_heads": "num_kv_heads"},
    "head_dim": {"key_dim": "key_dim=head_dim"},
    "embed_dim": {
        "in_features": "in_features=embed_dim",
        OMIT: "sizes come from the input, and key_dim=embed_dim // num_heads is the default",
    },
    "query_features": {"in_features": "in_features=query_features"},
    "in_features": {OMIT: "sizes come from the input", "query_features": "query_features=in_features"},
    "in_kv_features": {OMIT: "sizes come from the input", "key_features": "key_features=in_kv_features"},
    "kdim": {OMIT: "sizes come from the input", "key_features": "key_features=kdim"},
    "vdim": {OMIT: "sizes come from the input", "value_features": "value_features=vdim"},
    "qkv_features": {"key_dim": "key_dim=qkv_features // num_heads"},
    "out_features": {"output_shape": "output_shape=out_features"},
    "batch_first": {OMIT: "the batch comes first, always"},
    "enable_gqa": {OMIT: "heads of key and value that divide the query's are shared"},
    # Parameters
    "kernel_initializer": {"kernel_init": "kernel_init, a function such as jax.nn.initializers.glorot_uniform()"},
    "bias_initializer": {"bias_init": "bias_init, a function such as jax.nn.initializers.normal()"},
    "kernel_constraint": {OMIT: "attnlib.constrain is the last link of an optax chain"},
    "bias_constraint": {OMIT: "attnlib.constrain is the last link of an optax chain"},
    "kernel_regularizer": {OMIT: "add attnlib.parameter_penalty(params, kernel_regularizer=...) to the loss"},
    "bias_regularizer": {OMIT: "add attnlib.parameter_penalty(params, bias_regularizer=...) to the loss"},
    "activity_regularizer": {OMIT: "add the penalty of the layer's output to the loss"},
    "bias": {"use_bias": "use_bias"},
    "add_zero_attn": {"sink": "sink=0.0, a key of logit 0 without value"},
    "add_bias_kv": {"num_memory": "num_memory=1, a learned key and a learned value"},
    # Calls
    "input_positions": {
        "query_positions": "query_positions=input_positions, and rotary=True in MultiHeadAttention to turn by them",
        OMIT: "attnlib.positions.rotary_embedding turns query and key, and MultiHeadAttention has rotary=True",
    },
    "inputs": {"query": "query, key, value, one by one and in this order"},
    "inputs_q": {"query": "query=inputs_q"},
    "inputs_k": {"key": "key=inputs_k"},
    "inputs_kv": {"key": "key=inputs_kv"},
    "inputs_v": {"value": "value=inputs_v"},
    "flash_attention": {"implementation": "implementation, a name, or None to choose"},
    "attention_fn": {OMIT: "attnlib.attention_fn is for Flax's own layers"},
    "qkv_dot_general": {OMIT: "products are the engine's own"},
    "out_dot_general": {OMIT: "products are the engine's own"},
    "qkv_dot_general_cls": {OMIT: "products are the engine's own"},
    "out_dot_general_cls": {OMIT: "products are the engine's own"},
    "qk_attn_weights_einsum": {OMIT: "products are the engine's own"},
    "attn_weights_value_einsum": {OMIT: "products are the engine's own"},
    "qk_attn_weights_einsum_cls": {OMIT: "products are the engine's own"},
    "attn_weights_value_einsum_cls": {OMIT: "products are the engine's own"},
    "einsum_dot_general": {OMIT: "products are the engine's own"},
    "qkv_sharding": {OMIT: "the shardings of inputs and parameters are kept"},
    "out_sharding": {OMIT: "the shardings of inputs and parameters are kept"},
    "qkv_promote_dtype": {OMIT: "inputs and parameters are promoted together, or to dtype"},
    "out_promote_dtype": {OMIT: "inputs and parameters are promoted together, or to dtype"},
    "ln_promote_dtype": {OMIT: "norms are computed in float32 at least"},
    "query_ln_scale_metadata": {OMIT: "the scales of norms have no metadata"},
    "key_ln_scale_metadata": {OMIT: "the scales of norms have no metadata"},
    "promote_dtype": {OMIT: "inputs and parameters are promoted together, or to dtype"},
}


def suggestion_for(argument: str, allowed: Collection[str], others: Collection[str] = (), where: str = "") -> str:
    """What to write instead of `argument`: an argument in `allowed`, or one in `others`, with `where` to pass it."""
    suggestions = SUGGESTIONS.get(argument, {})
    for name, text in suggestions.items():
        if name in allowed:
            return f"write {text}."
    for name, text in suggestions.items():
        if name in others:
            return f"write {text} {where}."
    if OMIT in suggestions:
        return f"leave it out: {suggestions[OMIT]}."
    if argument in others:
        return f"write {argument} {where}."
    for match in difflib.get_close_matches(argument, sorted({*allowed, *others}), n=1, cutoff=0.7):
        return f"did you mean {match}{'' if match in allowed else f' {where}'}?"
    return f"known are {', '.join(name for name in allowed if name != 'self')}."


def suggests_arguments(
    function: Callable[P, R],
    others: Collection[str] = (),
    where: str = "",
    name: str | None = None,
    listed: Collection[str] = (),
    answers: Mapping[str, str] | None = None,
) -> Callable[P, R]:
    """The function with the same signature, and with errors that suggest what to write for an unknown argument.

    Args:
      others: arguments of another function, and `where` to pass them.
      name: the function in errors.
      listed: the arguments that an error lists; default: all.
      answers: the whole error for some unknown arguments.
    """
    parameters = inspect.signature(function).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds or inspect.Parameter.VAR_POSITIONAL in kinds:
        return function
    num_positional, allowed = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD), parameters.keys()
    name = function.__qualname__ if name is None else name

    def answer(argument: str) -> str:
        default = f"{name} takes no {argument!r}: {suggestion_for(argument, listed or allowed, others, where)}"
        return (answers or {}).get(argument) or default

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if len(args) > num_positional:
            positional = [name for name in list(allowed)[:num_positional] if name != "self"]
            raise TypeError(
                f"{name} takes {', '.join(positional)} by position and all others by name, mask=..., bias=...; got "
                f"{len(args) - (num_positional - len(positional))} by position."
            )
        if not options.keys() <= allowed:
            unknown = [argument for argument in options if argument not in allowed]
            raise TypeError("\n".join(map(answer, unknown)))
        return function(*args, **options)

    return call


# How attnlib calls each kind of user function, and what the function must use.
CALLBACKS = {
    "score_mod": "score_mod is called as score_mod(logit, batch, head, query_position, key_position) with traced "
    "scalars: write jnp.where(condition, a, b) for if, & and | for and and or, jnp.minimum for min.",
    "Custom": "Custom's fn is called as fn(query, key, *params) with the vectors of one query and one key, traced; "
    "pass params with it, scores.Custom(fn, *params).",
    "Predicate": "Predicate's fn is called as fn(query_position, key_position) with arrays of integers: write & and "
    "| for and and or, jnp.where(condition, a, b) for if. A function of (batch, head, query_position, key_position) is "
    "masks.Function(fn).",
    "Function": "The function of a mask is called as fn(batch, head, query_position, key_position) with traced "
    "scalars: write & and | for and and or, jnp.where(condition, a, b) for if. A function of two positions is "
    "masks.Predicate(fn).",
}


# What JAX raises where NumPy or Python indexes with a traced value.
_CONVERSION_ERRORS = jax.errors.TracerArrayConversionError, jax.errors.TracerIntegerConversionError


@contextlib.contextmanager
def explains_callback(name: str) -> Iterator[None]:
    """Adds a note on how attnlib calls a user function to every error in this function."""
    try:
        yield
    except Exception as error:
        error.add_note(CALLBACKS[name])
        if isinstance(error, _CONVERSION_ERRORS):
            error.add_note("NumPy arrays and lists take no traced index: write jnp.asarray(table)[index].")
        raise


def require_static(value: Any, name: str, kind: str, remedy: str = "") -> None:
    """Raises TypeError if a value that must be static is traced or symbolic."""
    leaves = value if isinstance(value, (tuple, list)) else (value,)
    if not is_static(*leaves):
        raise TypeError(
            f"{name} must be {kind}, known when the program is exported; got the symbolic size {value}. Write a number "
            "for it in jax.export.symbolic_shape."
        )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise TypeError(
            f"{name} must be {kind}, known when the program is compiled; got a traced value. Mark it static "
            f"(jax.jit(..., static_argnames={name.split()[-1]!r})) or close over it.{remedy and ' '}{remedy}"
        )


# What to write for a flag where it is traced with all other arguments; by default, to close over it.
TRACED_FLAGS = {
    "is_causal": "write mask=attnlib.masks.Causal()",
    "deterministic": "pass deterministic to the constructor",
}


def require_static_flag(value: Any, name: str) -> None:
    """Raises TypeError if True or False is traced."""
    remedy = TRACED_FLAGS.get(name, f"write jax.checkpoint(lambda *args: function(*args, {name}=True))")
    require_static(value, name, "True or False", f"jax.checkpoint, nn.remat and nn.jit trace all keywords: {remedy}.")


def class_hint(value: Any) -> str:
    """What to write if the value is a class, else ""."""
    return f" That is a class; write {value.__name__}(...)." if isinstance(value, type) else ""
