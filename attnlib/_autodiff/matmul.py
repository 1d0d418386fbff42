"""The matrix products of attention, QK^T, PV and P^T O, and their derivatives, in a form that is fast on a CPU.

XLA's matrix product on a CPU runs at half the speed if its large operand is transposed (45 to 78 GFLOP/s instead of 114
to 129). The pairs are the largest operand. `Form.by_keys` says in which order they lie in memory:

  by queries  P^T O transposes O and the result, which are smaller than P.
  by keys     P^T O is a plain product, and P V transposes V and the result. This is faster in the backward pass, which
              has two products P^T O, and up to 3 times slower in the forward pass.

Queries of all groups of a key head are rows of one matrix, R = G * T, since a product with two axes of rows takes up to
twice as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlib._autodiff.custom_rule import call_with_rule, linear_tangent
from attnlib._autodiff.linear_map import HashablePartial, unbroadcast
from attnlib._core.sizes import decide

# Pairs of a key head up to which a product with P transposed is faster than transposing the output and the result.
_PAIRS_TRANSPOSED = 2**12


class Form(NamedTuple):
    """How a product is computed."""

    precision: Any = None
    by_keys: bool = False  # whether XLA should store pairs by keys; the swapped axes of the products tell it so


Product = Callable[[Form, jax.Array, jax.Array], jax.Array]


def qk_product(form: Form, query: jax.Array, key: jax.Array) -> jax.Array:
    """(..., R, D), (..., S, D) -> (..., R, S)."""
    return _product(_qk_product, form, query, key)


def pv_product(form: Form, weights: jax.Array, value: jax.Array) -> jax.Array:
    """(..., R, S), (..., S, D) -> (..., R, D)."""
    return _product(_pv_product, form, weights, value)


def pt_o_product(form: Form, weights: jax.Array, output: jax.Array) -> jax.Array:
    """(..., R, S), (..., R, D) -> (..., S, D)."""
    return _product(_pt_o_product, form, weights, output)


def _qk_product(form: Form, query: jax.Array, key: jax.Array) -> list[jax.Array]:
    if form.by_keys:
        return [_swap(jnp.einsum("...sd,...rd->...sr", key, query, precision=form.precision))]
    return [jnp.einsum("...rd,...sd->...rs", query, key, precision=form.precision)]


def _pv_product(form: Form, weights: jax.Array, value: jax.Array) -> list[jax.Array]:
    if form.by_keys:
        columns = jax.lax.optimization_barrier(_swap(value))
        output = jnp.einsum("...ds,...sr->...dr", columns, _swap(weights), precision=form.precision)
        # Without the barrier XLA would transpose the pairs in place of the result.
        return [_swap(jax.lax.optimization_barrier(output))]
    return [jnp.einsum("...rs,...sd->...rd", weights, value, precision=form.precision)]


def _pt_o_product(form: Form, weights: jax.Array, output: jax.Array) -> list[jax.Array]:
    if form.by_keys:
        return [jnp.einsum("...sr,...rd->...sd", _swap(weights), output, precision=form.precision)]
    if decide(lambda: weights.shape[-2] * weights.shape[-1] <= _PAIRS_TRANSPOSED, otherwise=False):
        return [jnp.einsum("...rs,...rd->...sd", weights, output, precision=form.precision)]
    columns = jax.lax.optimization_barrier(_swap(output))
    return [_swap(jnp.einsum("...dr,...rs->...ds", columns, weights, precision=form.precision))]


def _swap(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


# The cotangent of each argument, as a function of the cotangent of the result and the other argument.
_TRANSPOSES: dict[Any, tuple[Product, Product]] = {
    _qk_product: (pv_product, pt_o_product),
    _pv_product: (qk_product, lambda form, ct, weights: pt_o_product(form, weights, ct)),
    _pt_o_product: (
        lambda form, ct, output: qk_product(form, output, ct),
        lambda form, ct, weights: pv_product(form, weights, ct),
    ),
}


def _product(function: Any, form: Form, *operands: jax.Array) -> jax.Array:
    primal, rule = HashablePartial(function, (form,)), HashablePartial(_rule, (function, form))
    return call_with_rule(primal, rule, operands, linear=((0, (0,)), (1, (0,))))[0]


def _rule(function: Any, form: Form, perturbed: tuple[int, ...], operands: Any, tangents: Any) -> Any:
    forward, transpose = HashablePartial(_forward, (function, form)), HashablePartial(_transpose, (function, form))
    results = [_product(function, form, *operands)]
    return results, linear_tangent(forward, transpose, operands, perturbed, tangents, results)


def _forward(function: Any, form: Form, perturbed: tuple[int, ...], residuals: Any, tangents: Any) -> list[jax.Array]:
    """The product rule: the sum of the products with one argument replaced by its tangent."""
    terms = []
    for n, tangent in zip(perturbed, tangents, strict=True):
        terms.append(_product(function, form, *((tangent, residuals[1]) if n == 0 else (residuals[0], tangent))))
    return [sum(terms[1:], start=terms[0])]


def _transpose(
    function: Any, form: Form, perturbed: tuple[int, ...], residuals: Any, cotangents: Any
) -> list[jax.Array]:
    cts = {n: _TRANSPOSES[function][n](form, cotangents[0], residuals[1 - n]) for n in perturbed}
    return [unbroadcast(ct, residuals[n].shape) for n, ct in cts.items()]
