"""Learned memory: keys and values that are parameters, and that every query attends (Sukhbaatar et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnlib._api import attention, merge_attention
from attnlib.layers._inputs import Params
from attnlib.scores import Score

# The options that also hold for keys without a position.
_OPTIONS = ("logits_soft_cap", "precision", "dropout_rate", "return_weights", "implementation", "block_sizes")


def attend_with_memory(
    attend: Callable[..., Any],
    memory: Params,
    memory_query: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    score: Score,
    attention_axes: Sequence[int],
    **options: Any,
) -> Any:
    """The results of `attend` over the keys and the memory, in which the memory comes before the keys.

    Attention over the memory is a call of its own, so that memory has no place in masks, biases, positions and caches.

    Args:
      attend: has the arguments of `attention`.
      memory: `{"key": (M, K, D), "value": (M, K, E)}`.
      memory_query: the queries of the memory, in the layout of `query`.
    """
    _check_options(attention_axes, options)
    shape = [1] * (query.ndim - 2)
    shape[attention_axes[0]] = memory["key"].shape[0]
    memory_key, memory_value = (
        jnp.reshape(memory[name], (*shape, *memory[name].shape[1:])) for name in ("key", "value")
    )
    shared: dict[str, Any] = {name: options[name] for name in _OPTIONS if name in options}
    if options.get("dropout_rng") is not None:
        shared["dropout_rng"] = jax.random.fold_in(options["dropout_rng"], 1)
    if options.get("context") is not None:  # tiles would be cut out of a sharded sequence
        shared |= {"implementation": "reference", "block_sizes": None}
    options["return_lse"] = shared["return_lse"] = True
    of_memory = attention(memory_query, memory_key, memory_value, score=score, attention_axes=attention_axes, **shared)
    of_keys = attend(query, key, value, score=score, attention_axes=attention_axes, **options)
    outputs, *weights, lses = zip(of_memory, of_keys, strict=True)
    output, lse = merge_attention(outputs, lses, attention_axes=attention_axes)
    if not weights:
        return output
    shares = [each * jnp.exp(part - lse)[..., None] for each, part in zip(weights[0], lses, strict=True)]
    return output, jnp.concatenate(shares, -1)


def _check_options(attention_axes: Sequence[int], options: dict[str, Any]) -> None:
    if not options.get("normalize", True):
        raise ValueError(
            "a layer with memory takes no normalize=False: a score_mod such as modifiers.LogSigmoid makes weights of "
            "the keys, and none applies to the memory. Leave normalize=True, or num_memory=0."
        )
    if options.get("return_weights") and len(attention_axes) > 1:
        raise ValueError(
            f"the weights of a layer with memory have the memory before the keys, which needs one attention axis; "
            f"there are {len(attention_axes)}. Leave return_weights=False, or flatten the axes of the input."
        )
