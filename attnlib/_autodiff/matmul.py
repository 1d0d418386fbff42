"""Products of a block of pairs with rows, and their derivatives, in the form that runs fast on a CPU.

What matters is the sum over queries, `pairs^T rows`: with the large operand transposed, XLA's matrix product runs at
half the speed (45 to 78 GFLOP/s against 114 to 129). So the small one is transposed, and the small result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnlib._autodiff.custom_rule import call_with_rule, linear_tangent
from attnlib._autodiff.linear_map import HashablePartial, unbroadcast

Product = Callable[[Any, jax.Array, jax.Array], jax.Array]


def qk_product(precision: Any, query: jax.Array, key: jax.Array) -> jax.Array:
    """(..., K, G, T, D), (..., K, S, D) -> (..., K, G, T, S)."""
    return _product(_qk_product, precision, query, key)


def pv_product(precision: Any, pairs: jax.Array, rows: jax.Array) -> jax.Array:
    """(..., K, G, T, S), (..., K, S, D) -> (..., K, G, T, D)."""
    return _product(_pv_product, precision, pairs, rows)


def pt_o_product(precision: Any, pairs: jax.Array, rows: jax.Array) -> jax.Array:
    """(..., K, G, T, S), (..., K, G, T, D) -> (..., K, S, D)."""
    return _product(_pt_o_product, precision, pairs, rows)


def _qk_product(precision: Any, query: jax.Array, key: jax.Array) -> list[jax.Array]:
    return [jnp.einsum("...kgtd,...ksd->...kgts", query, key, precision=precision)]


def _pv_product(precision: Any, pairs: jax.Array, rows: jax.Array) -> list[jax.Array]:
    return [jnp.einsum("...kgts,...ksd->...kgtd", pairs, rows, precision=precision)]


def _pt_o_product(precision: Any, pairs: jax.Array, rows: jax.Array) -> list[jax.Array]:
    columns = jax.lax.optimization_barrier(jnp.moveaxis(rows, -1, -3))  # (..., K, D, G, T)
    return [jnp.swapaxes(jnp.einsum("...kdgt,...kgts->...kds", columns, pairs, precision=precision), -1, -2)]


# The cotangent of each argument, from that of the result and the other argument.
_TRANSPOSES: dict[Any, tuple[Product, Product]] = {
    _qk_product: (pv_product, pt_o_product),
    _pv_product: (qk_product, lambda p, bar, pairs: pt_o_product(p, pairs, bar)),
    _pt_o_product: (lambda p, bar, rows: qk_product(p, rows, bar), lambda p, bar, pairs: pv_product(p, pairs, bar)),
}


def _product(function: Any, precision: Any, *operands: jax.Array) -> jax.Array:
    return call_with_rule(
        HashablePartial(function, (precision,)), HashablePartial(_rule, (function, precision)), operands
    )[0]


def _rule(function: Any, precision: Any, perturbed: tuple[int, ...], operands: Any, tangents: Any) -> Any:
    forward, transpose = (
        HashablePartial(_forward, (function, precision)),
        HashablePartial(_transpose, (function, precision)),
    )
    return [_product(function, precision, *operands)], linear_tangent(forward, transpose, operands, perturbed, tangents)


def _forward(
    function: Any, precision: Any, perturbed: tuple[int, ...], residuals: Any, tangents: Any
) -> list[jax.Array]:
    """Both arguments enter linearly."""
    parts = []
    for n, change in zip(perturbed, tangents, strict=True):
        parts.append(_product(function, precision, *((change, residuals[1]) if n == 0 else (residuals[0], change))))
    return [sum(parts[1:], start=parts[0])]


def _transpose(function: Any, precision: Any, perturbed: tuple[int, ...], residuals: Any, bars: Any) -> list[jax.Array]:
    parts = {n: _TRANSPOSES[function][n](precision, bars[0], residuals[1 - n]) for n in perturbed}
    return [unbroadcast(part, residuals[n].shape) for n, part in parts.items()]
