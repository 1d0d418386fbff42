"""Modifiers that make exp(logit) another function of the logit: sigmoid and powers of ReLU, with `normalize=False`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.array_types import Array
from attnlib._core.pytree import register
from attnlib._core.sizes import as_scalar, is_static
from attnlib._core.validation import check_array, check_number, is_array, is_safe_float32
from attnlib.modifiers._base import ValidatedScoreMod


@register
@dataclasses.dataclass(frozen=True, eq=False)
class LogSigmoid(ValidatedScoreMod):
    """log(sigmoid(logit + bias)): with normalize=False, the weights are sigmoid(logit + bias).

    Args:
      bias: a number, or a floating-point array `()` or `(N,)`, one for each query head; differentiable. Default:
        -log(number of keys), masked ones too, with which the weights of a query of small logits add up to about 1. A
        call on a part of the keys, or on a cache, needs a bias, since -log(number of its keys) is another number.

    >>> import jax, attnlib
    >>> from attnlib import modifiers
    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 8))
    >>> sigmoid = modifiers.LogSigmoid()
    >>> attnlib.dot_product_attention(query, key, value, score_mod=sigmoid, normalize=False).shape
    (2, 10, 4, 8)

    Source: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (2024).
    """

    bias: float | Array | None = None

    def __post_init__(self) -> None:
        if self.bias is None or is_array(self.bias):
            return
        bias = check_number(self.bias, "LogSigmoid bias")
        if not is_safe_float32(bias):
            raise ValueError(f"LogSigmoid bias must be in [-1e30, 1e30], for float32; got {bias}.")
        object.__setattr__(self, "bias", np.float64(bias))

    def __call__(self, logit: jax.Array, batch: Any, head: Any, query_position: Any, key_position: Any) -> jax.Array:
        del batch, query_position, key_position
        if self.bias is None:
            raise ValueError(
                "LogSigmoid() does not know the number of keys inside another function; pass bias=-math.log(keys)."
            )
        bias = jnp.asarray(self.bias).astype(logit.dtype)
        return _log_sigmoid(logit + (bias[head] if bias.ndim else bias))

    def check(self, heads: int, axes: int) -> None:
        if self.bias is None:
            return
        check_array(self.bias, "LogSigmoid bias", kind="floating")
        if np.shape(self.bias) not in ((), (heads,)):
            raise ValueError(
                f"LogSigmoid bias must be a number or have shape () or ({heads},), one for each query head; got shape "
                f"{np.shape(self.bias)}."
            )

    def for_keys(self, keys: int | None) -> LogSigmoid:
        if self.bias is not None:
            return self
        if keys is None:
            raise ValueError(
                "LogSigmoid() takes -log(number of keys) for its bias, but with key_positions, as in a cache, some of "
                "the keys may be empty slots. Pass the bias: LogSigmoid(bias=-math.log(length)), with the length of "
                "the sequences in training."
            )
        bias: Any = -math.log(max(keys, 1)) if is_static(keys) else -jnp.log(as_scalar(keys, np.float32))
        return dataclasses.replace(self, bias=bias)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class LogRelu(ValidatedScoreMod):
    """power * log(relu(logit)): with normalize=False, the weights are relu(logit) ** power.

    A logit of at most 0 becomes -inf, as if the pair were masked: its weight and its derivative are 0. A query without
    a positive logit has the output 0. With normalize=True, the weights are divided by their sum.

    Args:
      power: a number of at least 1; 2 gives squared ReLU, 1 gives ReLU. Logits below the square root of power times the
        smallest number of the dtype (about 1e-19 in float32) count as 0, so that two derivatives are finite.

    >>> import jax, attnlib
    >>> from attnlib import modifiers
    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 8))
    >>> squared = modifiers.LogRelu()
    >>> output = attnlib.dot_product_attention(query, key, value, score_mod=squared, normalize=False)
    >>> (output / 10).shape  # the mean over the keys instead of the sum
    (2, 10, 4, 8)

    Source: squared ReLU, So et al., "Primer" (2021), in attention, Hua et al., "Transformer Quality in Linear Time"
      (2022); ReLU, Wortsman et al., "Replacing softmax with ReLU in Vision Transformers" (2023).
    """

    power: float = dataclasses.field(default=2.0, metadata={"static": True})

    def __post_init__(self) -> None:
        power = check_number(self.power, "LogRelu power", positive=True)
        if power < 1:
            raise ValueError(
                f"LogRelu power must be at least 1, or the derivative is infinite at a logit of 0; got {power}."
            )
        object.__setattr__(self, "power", power)

    def __call__(self, logit: jax.Array, *where: Any) -> jax.Array:
        del where
        # Not the negation of `>`: NaN must stay NaN. The logarithm never sees what is replaced, in derivatives neither.
        zero = logit <= math.sqrt(self.power * float(jnp.finfo(logit.dtype).tiny))
        return jnp.where(zero, -jnp.inf, self.power * jnp.log(jnp.where(zero, 1, logit)))

    def check(self, heads: int, axes: int) -> None:
        pass


def _log_sigmoid(x: jax.Array) -> jax.Array:
    """log(sigmoid(x)), from primitives whose derivatives of every order are right at 0 and finite at infinity.

    Differentiation of a tile may ignore the derivative rule of `jax.nn.log_sigmoid`, and the second derivative of what
    is below that rule is 0 at x = 0.
    """
    negative = x < 0
    return jnp.where(negative, x, 0) - jnp.log1p(jnp.exp(jnp.where(negative, x, -x)))
