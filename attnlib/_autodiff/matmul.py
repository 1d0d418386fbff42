"""The matrix products of attention, QK^T, PV and P^T O, and their derivatives, in a form that is fast on a CPU.

XLA's matrix product on a CPU runs at half the speed if its large operand is transposed (45 to 78 GFLOP/s instead of 114
to 129). P^T O therefore transposes O and the result, which are smaller than P. Queries of all groups of a key head are
rows of one matrix, since a product with two axes of rows takes up to twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlib._autodiff.custom_rule import call_with_rule, linear_tangent
from attnlib._autodiff.linear_map import HashablePartial, unbroadcast
from attnlib._core.sizes import decide

# Pairs of a key head up to which a product with P transposed is faster (58 instead of 33 GFLOP/s at 64 x 64).
_PAIRS_TRANSPOSED = 2**14

Product = Callable[[Any, jax.Array, jax.Array], jax.Array]


def qk_product(precision: Any, query: jax.Array, key: jax.Array) -> jax.Array:
    """(..., K, G, T, D), (..., K, S, D) -> (..., K, G, T, S)."""
    return _product(_qk_product, precision, query, key)


def pv_product(precision: Any, weights: jax.Array, value: jax.Array) -> jax.Array:
    """(..., K, G, T, S), (..., K, S, D) -> (..., K, G, T, D)."""
    return _product(_pv_product, precision, weights, value)


def pt_o_product(precision: Any, weights: jax.Array, output: jax.Array) -> jax.Array:
    """(..., K, G, T, S), (..., K, G, T, D) -> (..., K, S, D)."""
    return _product(_pt_o_product, precision, weights, output)


def _qk_product(precision: Any, query: jax.Array, key: jax.Array) -> list[jax.Array]:
    rows = _merge(query)
    pairs = jnp.einsum("...rd,...sd->...rs", rows, key, precision=precision)
    return [_split(pairs, query)]


def _pv_product(precision: Any, weights: jax.Array, value: jax.Array) -> list[jax.Array]:
    return [_split(jnp.einsum("...rs,...sd->...rd", _merge(weights), value, precision=precision), weights)]


def _pt_o_product(precision: Any, weights: jax.Array, output: jax.Array) -> list[jax.Array]:
    pairs = math.prod(weights.shape[-3:])
    if decide(lambda: pairs <= _PAIRS_TRANSPOSED, otherwise=False):
        return [jnp.einsum("...rs,...rd->...sd", _merge(weights), _merge(output), precision=precision)]
    columns = jax.lax.optimization_barrier(jnp.swapaxes(_merge(output), -1, -2))  # (..., K, D, G * T)
    return [jnp.swapaxes(jnp.einsum("...dr,...rs->...ds", columns, _merge(weights), precision=precision), -1, -2)]


def _merge(x: jax.Array) -> jax.Array:
    """(..., G, T, D) -> (..., G * T, D)."""
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])


def _split(x: jax.Array, like: jax.Array) -> jax.Array:
    """(..., G * T, D) -> (..., G, T, D), with the sizes that `like` has."""
    return x.reshape(*x.shape[:-2], *like.shape[-3:-1], x.shape[-1])


# The cotangent of each argument, as a function of the cotangent of the result and the other argument.
_TRANSPOSES: dict[Any, tuple[Product, Product]] = {
    _qk_product: (pv_product, pt_o_product),
    _pv_product: (qk_product, lambda p, ct, weights: pt_o_product(p, weights, ct)),
    _pt_o_product: (lambda p, ct, output: qk_product(p, output, ct), lambda p, ct, weights: pv_product(p, weights, ct)),
}


def _product(function: Any, precision: Any, *operands: jax.Array) -> jax.Array:
    primal, rule = HashablePartial(function, (precision,)), HashablePartial(_rule, (function, precision))
    return call_with_rule(primal, rule, operands, linear=((0, (0,)), (1, (0,))))[0]


def _rule(function: Any, precision: Any, perturbed: tuple[int, ...], operands: Any, tangents: Any) -> Any:
    forward, transpose = (
        HashablePartial(_forward, (function, precision)),
        HashablePartial(_transpose, (function, precision)),
    )
    return [_product(function, precision, *operands)], linear_tangent(forward, transpose, operands, perturbed, tangents)


def _forward(
    function: Any, precision: Any, perturbed: tuple[int, ...], residuals: Any, tangents: Any
) -> list[jax.Array]:
    """The product rule: the sum of the products with one argument replaced by its tangent."""
    terms = []
    for n, tangent in zip(perturbed, tangents, strict=True):
        terms.append(_product(function, precision, *((tangent, residuals[1]) if n == 0 else (residuals[0], tangent))))
    return [sum(terms[1:], start=terms[0])]


def _transpose(
    function: Any, precision: Any, perturbed: tuple[int, ...], residuals: Any, cotangents: Any
) -> list[jax.Array]:
    cts = {n: _TRANSPOSES[function][n](precision, cotangents[0], residuals[1 - n]) for n in perturbed}
    return [unbroadcast(ct, residuals[n].shape) for n, ct in cts.items()]
