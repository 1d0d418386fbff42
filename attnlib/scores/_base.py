"""What every score is: the abstract `Score`, and how its parameters are laid out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.pytree import Pytree
from attnlib._core.suggestions import _instance
from attnlib._core.validation import is_number, is_safe_float32


def check_score(value: Any) -> None:
    if not isinstance(value, Score):
        raise TypeError(
            f"score must be a Score such as attnlib.scores.Dot() or scores.Custom(fn, *params); got {value!r}."
            f"{_instance(value)}"
        )
    scale = getattr(value, "scale", None)
    if isinstance(scale, str):  # a name, as of a field of another library
        raise TypeError(f"the scale must be a number or an array, such as features**-0.5; got {scale!r}.")
    for part in jax.tree.leaves(value):
        if not is_number(part):  # and a key, say, or text, is no argument of a compiled function
            raise TypeError(f"score {type(value).__name__} must hold numbers or arrays of them; got {part!r}.")
        if isinstance(part, float) and not is_safe_float32(part):
            raise ValueError(f"score {type(value).__name__} must hold finite numbers, in float32 too; got {part}.")


class Score(Pytree):
    """How well a query and a key match; abstract. A kind of score implements `block` and `check`.

    It is a pytree: arrays and numbers in its fields are parameters, traced and differentiable.
    """

    may_close_over_arrays = False  # whether `closure_converted` has to be asked
    is_inner_product = False  # whether `prepare` leaves only <query, key> to compute

    def prepare(self, query: jax.Array, key: jax.Array, precision: Any = None) -> tuple[jax.Array, jax.Array, Score]:
        """(query, key, score) with the same logits, work on single positions being done once, outside the tiles."""
        del precision
        return query, key, self

    def features_per_pair(self, features: int) -> int:
        """How many numbers a pair costs in the largest array that `block` or a derivative of it may make."""
        return features

    def prepared_features_per_pair(self, features: int) -> int:
        """The same of the score that `prepare` gives."""
        return self.features_per_pair(features)

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        """Logits `(*batch, K, G, T, S)` of query `(*batch, K, G, T, D)` and key `(*batch, K, S, D)`."""
        raise NotImplementedError

    def closure_converted(self, query_features: int, key_features: int, dtype: Any) -> Score:
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
