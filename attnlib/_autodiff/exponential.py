"""exp of numbers that are at most 0, as a softmax needs it: on a CPU faster than XLA's.

With n = round(x / log(2)), exp(x) is exp(x - n log(2)) * 2**n: a polynomial of degree 6 for the first factor, and for
the second an addition to the exponent's bits. The largest error is about 1 unit in the last place. XLA cannot
differentiate an operation on bits, so the function has a rule of its own, for derivatives of every order.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._autodiff.custom_rule import call_with_rule

# exp(r) for |r| <= log(2) / 2, from r**6 down to r**1; the constant is 1, so that exp(0) is exactly 1. Fitted so that
# the largest relative errors of both signs are equal.
_COEFFICIENTS = [
    np.float32(c) for c in (0.00138436442, 0.00837416337, 0.0416680026, 0.166664312, 0.499999942, 1.00000003)
]
_LOG2_E = np.float32(1.4426950408889634)
# log(2) in two parts, of which the first has so few bits that its product with n is exact (Cody and Waite 1980).
_LOG_2 = np.float32(0.693359375), np.float32(-0.00021219444005471377)
# The sum of an integer below 2**22 and this number has the integer in its last bits.
_INTEGER_BITS = np.float32(1.5 * 2**23)
_LEAST = np.float32(np.log(2.0**-126) + 1e-5)  # the logarithm of the least normal number


def exp(x: jax.Array) -> jax.Array:
    """exp(x) for x <= 0; 0 where it would be below 2**-126, also at -inf; NaN at NaN."""
    return call_with_rule(_exp, _rule, [x])[0]


def _exp(x: jax.Array) -> list[jax.Array]:
    if x.dtype != jnp.float32 or jax.default_backend() != "cpu":
        return [jnp.exp(x)]
    clamped = jnp.maximum(x, _LEAST)
    n = jax.lax.round(clamped * _LOG2_E, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    rest = (clamped - n * _LOG_2[0]) - n * _LOG_2[1]
    result = rest * _COEFFICIENTS[0] + _COEFFICIENTS[1]
    for coefficient in (*_COEFFICIENTS[2:], np.float32(1)):
        result = result * rest + coefficient
    exponent = jax.lax.bitcast_convert_type(n + _INTEGER_BITS, jnp.int32) << 23
    result = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(result, jnp.int32) + exponent, jnp.float32)
    return [jnp.where(x >= _LEAST, result, jnp.where(jnp.isnan(x), x, 0))]


def _rule(perturbed: Any, args: Any, tangents: Any) -> Any:
    result = exp(args[0])
    return [result], [result * tangents[0]]
