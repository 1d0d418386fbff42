"""Scores: frozen values that turn a block of queries and a block of keys into logits.

A score knows neither masks, softmax, dropout nor implementation; an implementation knows nothing of a score but
`prepare`, once a call, and `block`, for the tiles of what was prepared. Operands reach it folded and in the dtype to
compute in: query `(*batch, K, G, T, D)`, key `(*batch, K, S, D)`, where query head n = k * G + g reads key head k;
logits are `(*batch, K, G, T, S)`. Arrays inside a score are its parameters: traced, and differentiable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._additive import additive_logits
from attnlib._hoist import Hoisted, hoisted
from attnlib._product import over_features
from attnlib._pytree import Pytree
from attnlib._values import is_number
from attnlib._words import called

__all__ = ["Additive", "Bilinear", "Concat", "Custom", "Dot", "Score"]


class Score(Pytree):
    """How well a query and a key match; abstract. A kind of score implements `block` and `check`.

    It is a pytree: arrays and numbers in its fields are parameters, traced and differentiable.
    """

    may_capture = False  # whether `hoisted` has to be asked

    def prepare(self, query: jax.Array, key: jax.Array, precision: Any = None) -> tuple[jax.Array, jax.Array, Score]:
        """(query, key, score) with the same logits, work on single positions being done once, outside the tiles."""
        del precision
        return query, key, self

    def pair_size(self, features: int) -> int:
        """How many numbers a pair costs in the largest array that `block` or a derivative of it may make."""
        return features

    def prepared_pair_size(self, features: int) -> int:
        """The same of the score that `prepare` gives."""
        return self.pair_size(features)

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        """Logits `(*batch, K, G, T, S)` of query `(*batch, K, G, T, D)` and key `(*batch, K, S, D)`."""
        raise NotImplementedError

    def hoisted(self, query_features: int, key_features: int, dtype: Any) -> Score:
        """The same score for such queries and keys, with all its arrays where JAX finds them: it is a pytree."""
        del query_features, key_features, dtype
        return self

    def check(self, heads: int, query_features: int, key_features: int) -> None:
        """Raises ValueError where the parameters or features do not fit; by default features must be equal."""
        if query_features != key_features:
            raise ValueError(
                f"query and key must have equally many features (last axis) for {type(self).__name__}; got "
                f"{query_features} and {key_features}. scores.Bilinear and scores.Custom accept different ones. The "
                "order of arguments is query, key, value; Keras' is query, value, key."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Dot(Score):
    """scale * <query, key> (Luong et al. 2015; scaled: Vaswani et al. 2017).

    Args:
      scale: a scalar, or `(N,)` for one a head; None: 1 / sqrt(D).
    """

    scale: Any = None

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        scale = max(query.shape[-1], 1) ** -0.5 if self.scale is None else _per_head(self.scale, 0, query)
        return jnp.einsum("...kgtd,...ksd->...kgts", query * scale, key, precision=precision)

    def prepare(self, query: jax.Array, key: jax.Array, precision: Any = None) -> tuple[jax.Array, jax.Array, Score]:
        scale = max(query.shape[-1], 1) ** -0.5 if self.scale is None else _per_head(self.scale, 0, query)
        return query * scale, key, Product()

    def pair_size(self, features: int) -> int:
        return 1

    def check(self, heads: int, query_features: int, key_features: int) -> None:
        super().check(heads, query_features, key_features)
        _check_shape(self.scale, "Dot scale", ((), (heads,)))


@dataclasses.dataclass(frozen=True, eq=False)
class Product(Score):
    """<query, key>: what Dot and Bilinear leave to the tiles."""

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        return over_features(precision, query, key)

    def pair_size(self, features: int) -> int:
        return 1


@dataclasses.dataclass(frozen=True, eq=False)
class Additive(Score):
    """sum_d scale_d * tanh(query_d + key_d) (Bahdanau et al. 2015).

    Args:
      scale: `()`, `(D,)` or `(N, D)`; None: 1.
    """

    scale: Any = None

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        del precision  # no contraction that a matrix unit would round
        features = jnp.tanh(query[..., :, None, :] + key[..., None, None, :, :])  # (*batch, K, G, T, S, D)
        return jnp.sum(features if self.scale is None else features * _per_head(self.scale, 1, query), -1)

    def prepare(self, query: jax.Array, key: jax.Array, precision: Any = None) -> tuple[jax.Array, jax.Array, Score]:
        del precision
        scale = _cast(1.0 if self.scale is None else self.scale, query)
        heads, features = query.shape[-4:-2], query.shape[-1]
        scale = scale.reshape(*heads, features) if scale.ndim == 2 else jnp.broadcast_to(scale, (*heads, features))
        return query, key, TanhSum(scale)

    def prepared_pair_size(self, features: int) -> int:
        return 1

    def check(self, heads: int, query_features: int, key_features: int) -> None:
        super().check(heads, query_features, key_features)
        _check_shape(self.scale, "additive scale", ((), (query_features,), (heads, query_features)))


@dataclasses.dataclass(frozen=True, eq=False)
class TanhSum(Score):
    """sum_d scale_d tanh(query_d + key_d), fast: what Additive and Concat leave to the tiles.

    Args:
      scale: `(K, G, D)`.
    """

    scale: jax.Array

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        del precision
        return additive_logits(query, key, self.scale)

    def pair_size(self, features: int) -> int:
        return 1


@dataclasses.dataclass(frozen=True, eq=False)
class Concat(Score):
    """weight * sum_d tanh(scale * (query_d + key_d)): Keras' `score_mode="concat"` (after Luong et al. 2015).

    Args:
      weight: a scalar; None: 1.
      scale: a scalar; None: 1.
    """

    weight: Any = None
    scale: Any = None

    def prepare(self, query: jax.Array, key: jax.Array, precision: Any = None) -> tuple[jax.Array, jax.Array, Score]:
        if self.scale is not None:
            scale = _cast(self.scale, query)
            query, key = query * scale, key * scale
        return Additive(self.weight).prepare(query, key, precision)

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        if self.scale is not None:
            scale = _cast(self.scale, query)
            query, key = query * scale, key * scale
        return Additive(self.weight).block(query, key, precision)

    def prepared_pair_size(self, features: int) -> int:
        return 1

    def check(self, heads: int, query_features: int, key_features: int) -> None:
        super().check(heads, query_features, key_features)
        _check_shape(self.weight, "Concat weight", ((),))
        _check_shape(self.scale, "Concat scale", ((),))


@dataclasses.dataclass(frozen=True, eq=False)
class Bilinear(Score):
    """query^T kernel key, unscaled (Luong et al. 2015, "general").

    Args:
      kernel: `(D, D_key)`, or `(N, D, D_key)` for one a head; query and key features may differ.
    """

    kernel: Any

    def prepare(self, query: jax.Array, key: jax.Array, precision: Any = None) -> tuple[jax.Array, jax.Array, Score]:
        kernel = _cast(self.kernel, query)
        if kernel.ndim == 2:
            query = jnp.einsum("...kgtd,de->...kgte", query, kernel, precision=precision)
        else:
            kernel = kernel.reshape(*query.shape[-4:-2], *kernel.shape[1:])
            query = jnp.einsum("...kgtd,kgde->...kgte", query, kernel, precision=precision)
        return query, key, Product()

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        query, key, product = self.prepare(query, key, precision)
        return product.block(query, key, precision)

    def pair_size(self, features: int) -> int:
        return 1

    def check(self, heads: int, query_features: int, key_features: int) -> None:
        shape = (query_features, key_features)
        if self.kernel is None:
            raise TypeError(f"Bilinear kernel must be an array {shape} or {(heads, *shape)}; got None.")
        _check_shape(self.kernel, "Bilinear kernel", (shape, (heads, *shape)))


class Custom(Score):
    """Any function of one query vector and one key vector; the library batches it.

    Args:
      fn: `fn(query (D,), key (D_key,), *params) -> scalar`. Arrays that it captures are traced and differentiable, as
        `params` are; otherwise pass the same function object again to avoid recompilation.
      *params: arrays or pytrees of arrays, shared by all heads; differentiable.

    >>> import jax.numpy as jnp
    >>> from attnlib import scores
    >>> euclidean = scores.Custom(lambda q, k, sharpness: -sharpness * jnp.sum((q - k) ** 2), jnp.float32(0.5))
    """

    may_capture = True

    def __init__(self, fn: Callable[..., Any], *params: Any):
        if not callable(fn):
            raise TypeError(f"Custom fn must be a function of (query, key, *params); got {fn!r}.")
        self.fn, self.params = fn, params

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        del precision  # the function's own business
        pairwise = jnp.vectorize(lambda q, k: self.fn(q, k, *self.params), signature="(d),(e)->()")
        return pairwise(query[..., :, None, :], key[..., None, None, :, :]).astype(query.dtype)

    def hoisted(self, query_features: int, key_features: int, dtype: Any) -> Score:
        query, key = (jax.ShapeDtypeStruct((size,), dtype) for size in (query_features, key_features))
        leaves, tree = jax.tree.flatten(self.params)

        def flat(q: jax.Array, k: jax.Array, *leaves: jax.Array) -> Any:
            return self.fn(q, k, *jax.tree.unflatten(tree, leaves))

        with called("Custom"):
            program, result = hoisted(flat, query, key, *leaves)
        _check_result(result, query_features, key_features)
        return _Converted(program, leaves)

    def check(self, heads: int, query_features: int, key_features: int) -> None:
        del heads
        query, key = (jax.ShapeDtypeStruct((size,), jnp.float32) for size in (query_features, key_features))
        # A question of shapes: the dtypes to come are not known here.
        with jax.numpy_dtype_promotion("standard"), called("Custom"):
            result = jax.eval_shape(lambda *args: self.fn(*args), query, key, *self.params)  # new: not remembered
        _check_result(result, query_features, key_features)


@dataclasses.dataclass(frozen=True, eq=False)
class _Converted(Score):
    """A Custom whose function was traced: what it captured is a part of the program, and traced too."""

    function: Hoisted
    params: Sequence[jax.Array]

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        del precision
        pairwise = jnp.vectorize(lambda q, k: self.function(q, k, *self.params), signature="(d),(e)->()")
        return pairwise(query[..., :, None, :], key[..., None, None, :, :]).astype(query.dtype)

    def check(self, heads: int, query_features: int, key_features: int) -> None:
        """It was checked when it was made."""


def _check_result(result: Any, query_features: int, key_features: int) -> None:
    if getattr(result, "shape", None) != ():
        raise ValueError(
            f"Custom fn must return a scalar for one query ({query_features},) and one key ({key_features},); got "
            f"{result}. It is written for one pair: the library batches it over positions and heads."
        )
    if jnp.issubdtype(result.dtype, jnp.complexfloating) or result.dtype == jnp.bool_:
        raise TypeError(f"Custom fn must return a real number; got {result.dtype}.")


def _cast(parameter: Any, like: jax.Array) -> jax.Array:
    return jnp.asarray(parameter).astype(like.dtype)


def _per_head(parameter: Any, features: int, query: jax.Array) -> jax.Array:
    """A parameter `()`, `(D,)` or `(N, D)` (with `features` trailing axes) against `(*batch, K, G, T, ..., D)`."""
    parameter = _cast(parameter, query)
    if parameter.ndim <= features:
        return parameter
    heads = query.shape[-4:-2]
    return parameter.reshape(*heads, 1, 1, *parameter.shape[1:])


def _check_shape(parameter: Any, name: str, allowed: tuple[tuple[int, ...], ...]) -> None:
    if parameter is None:
        return
    if not is_number(parameter):
        raise TypeError(f"{name} must be a number or an array; got {type(parameter).__name__}. Use jnp.asarray.")
    dtype = jnp.result_type(parameter)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real number or array; got {dtype}.")
    if np.shape(parameter) not in allowed:
        shapes = " or ".join(map(str, allowed))
        raise ValueError(f"{name} must have shape {shapes}; got {np.shape(parameter)}.")
