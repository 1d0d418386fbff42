"""Help in errors: attnlib's word for a word of another library, and what to write where a value cannot be used."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")

LEAVE = ""  # in place of an argument: there is none, and none is needed

# A word of Keras, Flax, jax.nn, PyTorch or FlashAttention -> attnlib's arguments for it, the first that the function
# has being meant, and what to write.
WORDS: dict[str, dict[str, str]] = {
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
    "force_fp32_for_softmax": {LEAVE: "softmax is in float32 at least"},
    # Dropout
    "dropout": {"dropout_rate": "dropout_rate"},
    "dropout_p": {"dropout_rate": "dropout_rate"},
    "training": {
        "deterministic": "deterministic=not training",
        "dropout_rate": "dropout_rate=0.0 where not training",
    },
    "seed": {"dropout_rng": "dropout_rng=jax.random.key(seed), a new one each step"},
    "rngs": {"dropout_rng": 'dropout_rng=key, or rngs={"dropout": key} in init and apply'},
    "broadcast_dropout": {LEAVE: "each weight is dropped on its own, as with broadcast_dropout=False"},
    "keep_rngs": {LEAVE: "a module holds no keys"},
    # Sizes
    "num_query_heads": {"num_heads": "num_heads"},
    "num_key_value_heads": {"num_kv_heads": "num_kv_heads"},
    "head_dim": {"key_dim": "key_dim=head_dim"},
    "embed_dim": {LEAVE: "sizes come from the input, and key_dim=embed_dim // num_heads is the default"},
    "in_features": {LEAVE: "sizes come from the input", "query_features": "query_features=in_features"},
    "in_kv_features": {LEAVE: "sizes come from the input"},
    "kdim": {LEAVE: "sizes come from the input", "key_features": "key_features=kdim"},
    "vdim": {LEAVE: "sizes come from the input", "value_features": "value_features=vdim"},
    "qkv_features": {"key_dim": "key_dim=qkv_features // num_heads"},
    "out_features": {"output_shape": "output_shape=out_features"},
    "batch_first": {LEAVE: "the batch comes first, always"},
    "enable_gqa": {LEAVE: "heads of key and value that divide the query's are shared"},
    # Parameters
    "kernel_initializer": {"kernel_init": "kernel_init, a function such as jax.nn.initializers.glorot_uniform()"},
    "bias_initializer": {"bias_init": "bias_init, a function such as jax.nn.initializers.normal()"},
    "kernel_constraint": {LEAVE: "attnlib.constrain is the last link of an optax chain"},
    "bias_constraint": {LEAVE: "attnlib.constrain is the last link of an optax chain"},
    "bias": {"use_bias": "use_bias"},
    "add_zero_attn": {"sink": "sink=0.0, a key of logit 0 without value"},
    "add_bias_kv": {"use_sink": "use_sink=True, a learned logit without value"},
    # Calls
    "input_positions": {
        "query_positions": "query_positions=input_positions, and rotary=True in MultiHeadAttention to turn by them",
        LEAVE: "attnlib.positions.rotary_embedding turns query and key, and MultiHeadAttention has rotary=True",
    },
    "inputs": {"query": "query, key, value, one by one and in this order"},
    "inputs_q": {"query": "query=inputs_q"},
    "inputs_k": {"key": "key=inputs_k"},
    "inputs_kv": {"key": "key=inputs_kv"},
    "inputs_v": {"value": "value=inputs_v"},
    "flash_attention": {"implementation": "implementation, a name, or None to choose"},
    "attention_fn": {LEAVE: "attnlib.attention_fn is for Flax's own layers"},
    "qkv_dot_general": {LEAVE: "products are the engine's own"},
    "out_dot_general": {LEAVE: "products are the engine's own"},
    "qkv_dot_general_cls": {LEAVE: "products are the engine's own"},
    "out_dot_general_cls": {LEAVE: "products are the engine's own"},
    "qk_attn_weights_einsum": {LEAVE: "products are the engine's own"},
    "attn_weights_value_einsum": {LEAVE: "products are the engine's own"},
    "qk_attn_weights_einsum_cls": {LEAVE: "products are the engine's own"},
    "attn_weights_value_einsum_cls": {LEAVE: "products are the engine's own"},
    "einsum_dot_general": {LEAVE: "products are the engine's own"},
    "qkv_sharding": {LEAVE: "the shardings of inputs and parameters are kept"},
    "out_sharding": {LEAVE: "the shardings of inputs and parameters are kept"},
    "promote_dtype": {LEAVE: "inputs and parameters are promoted together, or to dtype"},
}


def suggestion_for(word: str, known: Collection[str], elsewhere: Collection[str] = (), place: str = "") -> str:
    """What to write instead of `word` where `known` are the arguments and those of `elsewhere` are taken at `place`."""
    meant = WORDS.get(word, {})
    for ours, text in meant.items():
        if ours in known:
            return f"write {text}."
    for ours, text in meant.items():
        if ours in elsewhere:
            return f"write {text} {place}."
    if LEAVE in meant:
        return f"leave it out: {meant[LEAVE]}."
    if word in elsewhere:
        return f"write {word} {place}."
    for close in difflib.get_close_matches(word, sorted({*known, *elsewhere}), n=1, cutoff=0.7):
        return f"did you mean {close}{'' if close in known else f' {place}'}?"
    return f"known are {', '.join(name for name in known if name != 'self')}."


def suggests_arguments(
    function: Callable[P, R],
    elsewhere: Collection[str] = (),
    place: str = "",
    name: str | None = None,
    listed: Collection[str] = (),
    answers: Mapping[str, str] | None = None,
) -> Callable[P, R]:
    """The function, which says what to write instead of an argument that it does not take; its signature stays.

    `listed` are the arguments that the error names, all by default; `answers` has errors of their own for some words.
    """
    parameters = inspect.signature(function).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds or inspect.Parameter.VAR_POSITIONAL in kinds:
        return function
    positions, known = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD), parameters.keys()
    name = function.__qualname__ if name is None else name

    def answer(word: str) -> str:
        usual = f"{name} takes no {word!r}: {suggestion_for(word, listed or known, elsewhere, place)}"
        return (answers or {}).get(word) or usual

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if len(args) > positions:
            own = [name for name in list(known)[:positions] if name != "self"]
            raise TypeError(
                f"{name} takes {', '.join(own)} by position and all else by name, mask=..., bias=...; got "
                f"{len(args) - (positions - len(own))} by position."
            )
        if not options.keys() <= known:
            unknown = [word for word in options if word not in known]
            raise TypeError("\n".join(map(answer, unknown)))
        return function(*args, **options)

    return call


# How attnlib calls a function of the user, and what has to be written in it.
CALLED = {
    "score_mod": "score_mod is called as score_mod(logit, batch, head, query_position, key_position) with traced "
    "scalars: write jnp.where(condition, a, b) for if, & and | for and and or, jnp.minimum for min.",
    "Custom": "Custom's fn is called as fn(query, key, *params) with the vectors of one query and one key, traced; "
    "params are given with it, scores.Custom(fn, *params).",
    "Predicate": "Predicate's fn is called as fn(query_position, key_position) with arrays of integers: write & and "
    "| for and and or, jnp.where(condition, a, b) for if.",
}


@contextlib.contextmanager
def explains_callback(name: str) -> Iterator[None]:
    """Adds a note to an error in a function of the user: how it is called."""
    try:
        yield
    except Exception as error:
        error.add_note(CALLED[name])
        raise


def require_static(value: Any, name: str, kind: str) -> None:
    """Raises TypeError where a value that decides the program is traced."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in (value if isinstance(value, (tuple, list)) else (value,))):
        raise TypeError(
            f"{name} must be {kind}, known when the program is compiled; got a traced value. Mark it static "
            f"(jax.jit(..., static_argnames={name.split()[-1]!r})) or close over it."
        )


def _instance(value: Any) -> str:
    return f" That is a class; write {value.__name__}(...)." if isinstance(value, type) else ""
