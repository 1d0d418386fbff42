"""The library's own exp against NumPy's in float64: in units in the last place, at its ends, in derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlib._autodiff.exponential import exp


def test_error_in_units_in_the_last_place():
    x = np.concatenate([np.linspace(-87.3, 0, 300_001), -np.logspace(-30, 0, 50_001)]).astype(np.float32)
    want = np.exp(x.astype(np.float64))
    error = np.abs(np.asarray(exp(jnp.asarray(x))) - want) / np.spacing(want.astype(np.float32))
    assert error.max() <= 1.5
    assert error[x > -1].mean() < 0.5


def test_ends():
    x = jnp.asarray([0.0, -0.0, -np.inf, np.nan, -87.4, -1e38, np.finfo(np.float32).min], jnp.float32)
    np.testing.assert_array_equal(np.asarray(exp(x)), np.float32([1, 1, 0, np.nan, 0, 0, 0]))
    # Bits of a NaN with a payload are numbers to an addition of integers.
    payload = np.array([0x7FC00001, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(exp(jnp.asarray(payload))).all()


def test_derivatives_are_exp_again():
    x = jnp.asarray([-3.0, -0.5, 0.0, -100.0], jnp.float32)
    function = exp
    for _ in range(3):
        function = jax.grad(function)
        np.testing.assert_array_equal(np.asarray(jax.vmap(function)(x)), np.asarray(exp(x)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_are_jnps(dtype):
    x = -jnp.arange(4).astype(dtype)
    np.testing.assert_array_equal(np.asarray(exp(x)), np.asarray(jnp.exp(x)))
    assert exp(x).dtype == dtype
