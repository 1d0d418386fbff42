"""cuDNN's kernel as an operation of arrays with one batch axis, with its backward pass, under every `vmap`.

(B, T, N, D), (B, S, K, D), (B, S, K, D), lengths (B,) -> (B, T, N, D). jax.nn can neither batch a part of the operands
nor is its batching right for all of them: here a mapped axis becomes a part of the batch axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Lengths = Sequence[jax.Array]


class CudnnConfig(NamedTuple):
    """All that is static of a call of the kernel."""

    causal: bool
    left: int | None  # how many earlier keys a query sees; only where causal
    lengths: tuple[bool, bool]  # whether there are lengths of queries and of keys
    training: bool = False  # whether to run the forward pass that a backward pass follows, which XLA can then merge


def call(static: CudnnConfig, query: jax.Array, key: jax.Array, value: jax.Array, *lengths: jax.Array) -> jax.Array:
    queries, keys = static.lengths
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=static.causal,
        query_seq_lengths=lengths[0] if queries else None,
        key_value_seq_lengths=lengths[-1] if keys else None,
        local_window_size=None if static.left is None else (static.left, 0),
        implementation="cudnn",
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def kernel(static: CudnnConfig, query: jax.Array, key: jax.Array, value: jax.Array, lengths: Lengths) -> jax.Array:
    return _operation(_forward, static)(query, key, value, *lengths)


def _kernel_forward(static: CudnnConfig, *operands: Any) -> tuple[jax.Array, Any]:
    return kernel(static._replace(training=True), *operands), operands


def _kernel_backward(static: CudnnConfig, operands: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    query, key, value, lengths = operands
    gradients = _operation(_backward, static._replace(training=True))(query, key, value, cotangent, *lengths)
    return (*gradients, [None] * len(lengths))


kernel.defvjp(_kernel_forward, _kernel_backward)


def _forward(static: CudnnConfig, query: jax.Array, key: jax.Array, value: jax.Array, *lengths: jax.Array) -> jax.Array:
    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return call(static, query, key, value, *lengths)

    return jax.vjp(run, query, key, value)[0] if static.training else run(query, key, value)


def _backward(
    static: CudnnConfig, query: jax.Array, key: jax.Array, value: jax.Array, cotangent: jax.Array, *lengths: jax.Array
) -> Any:
    return jax.vjp(lambda *operands: call(static, *operands, *lengths), query, key, value)[1](cotangent)


@functools.cache  # one function for each static part, so that JAX's own caches know it again
def _operation(function: Callable[..., Any], static: CudnnConfig) -> Callable[..., Any]:
    """The function of arrays with a leading batch axis, of which every mapped axis becomes a part."""
    operation = jax.custom_batching.custom_vmap(partial(function, static))

    @operation.def_vmap
    def mapped(size: int, batched: Sequence[bool], *arrays: jax.Array) -> tuple[Any, Any]:
        whole = [
            array if has else jnp.broadcast_to(array, (size, *array.shape))
            for array, has in zip(arrays, batched, strict=True)
        ]
        merged = operation(*(array.reshape(-1, *array.shape[2:]) for array in whole))
        results = jax.tree.map(lambda array: array.reshape(size, -1, *array.shape[1:]), merged)
        return results, jax.tree.map(lambda _: True, results)

    return operation
