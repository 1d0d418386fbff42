"""The abstract `Score`, and the checks and the layout of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnlib._core.pytree import Pytree
from attnlib._core.suggestions import class_hint
from attnlib._core.validation import check_array, is_array, is_safe_float32


def check_score(value: Any) -> None:
    if not isinstance(value, Score):
        raise TypeError(
            f"score must be a Score such as attnlib.scores.Dot() or scores.Custom(fn, *params); got {value!r}."
            f"{class_hint(value)}"
        )
    scale = getattr(value, "scale", None)
    if isinstance(scale, str):  # other libraries take names
        raise TypeError(f"the scale must be a number or an array, such as features**-0.5; got {scale!r}.")
    for leaf in jax.tree.leaves(value):
        if not _is_number(leaf):
            raise TypeError(f"score {type(value).__name__} must hold numbers or arrays of numbers; got {leaf!r}.")
        if isinstance(leaf, float) and not is_safe_float32(leaf):
            raise ValueError(
                f"score {type(value).__name__} must hold numbers in [-1e30, 1e30], for float32; got {leaf}."
            )


class Score(Pytree):
    """How well a query and a key match; abstract. A subclass implements `block` and `check`.

    A score is a pytree: arrays and numbers in its fields are parameters, which are traced and differentiable.
    """

    may_close_over_arrays = False  # whether `closure_converted` must be called
    is_inner_product = False  # whether the prepared score is <query, key>
    # For each field with an axis of heads, how many axes it then has; heads come first. None: unknown.
    heads: ClassVar[Mapping[str, int] | None] = None

    def prepare(self, query: jax.Array, key: jax.Array, precision: Any = None) -> tuple[jax.Array, jax.Array, Score]:
        """(query, key, score) with the same logits, after all work on single positions, which tiles would repeat."""
        del precision
        return query, key, self

    def features_per_pair(self, features: int) -> int:
        """The numbers per query-key pair in the largest array of `block` and its derivatives."""
        return features

    def prepared_features_per_pair(self, features: int) -> int:
        """`features_per_pair` of the score that `prepare` returns."""
        return self.features_per_pair(features)

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        """Logits `(*batch, K, G, T, S)` of query `(*batch, K, G, T, D)` and key `(*batch, K, S, D)`."""
        raise NotImplementedError(f"{type(self).__name__} needs the method block(query, key, precision=None).")

    def closure_converted(self, query_features: int, key_features: int, dtype: Any) -> Score:
        """The score for these queries and keys, with the arrays that its functions capture as leaves of the pytree."""
        del query_features, key_features, dtype
        return self

    def check(self, heads: int, query_features: int, key_features: int) -> None:
        """Raises ValueError if the parameters or features do not fit. By default the features must be equal."""
        if query_features != key_features:
            raise ValueError(
                f"query and key must have equally many features (last axis) for {type(self).__name__}; got "
                f"{query_features} and {key_features}. scores.Bilinear and scores.Custom accept different ones. The "
                "order of arguments is query, key, value; Keras' is query, value, key."
            )


def _cast(parameter: Any, operand: jax.Array) -> jax.Array:
    return jnp.asarray(parameter).astype(operand.dtype)


def _per_head(parameter: Any, features: int, query: jax.Array) -> jax.Array:
    """A parameter of `features` axes, after heads or none, as `(1, ..., K | 1, G | 1, 1, 1, *features)`."""
    parameter = _cast(parameter, query)
    if parameter.ndim == 0:
        return parameter
    heads = (1, 1) if parameter.ndim <= features else query.shape[-4:-2]
    batch, axes = (1,) * (query.ndim - 4), parameter.shape[parameter.ndim - features :]
    return parameter.reshape(*batch, *heads, 1, 1, *axes)


def check_parameter(value: Any, name: str, *shapes: tuple[int, ...], optional: bool = True) -> None:
    """Raises TypeError or ValueError unless `value` is a real number or array of one of `shapes`."""
    check_array(value, name, kind="real", shapes=shapes, optional=optional, convert=(int, float))


def _is_number(value: Any) -> bool:
    """Whether the value is a number or an array of numbers for JAX, unlike text and random keys."""
    if isinstance(value, int):
        return -(2**31) <= value < 2**31
    if is_array(value):
        return bool(jnp.issubdtype(value.dtype, jnp.number) or value.dtype == jnp.bool_)
    return isinstance(value, (float, complex))
