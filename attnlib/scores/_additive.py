"""Additive scores: sums of tanh(query + key) over features."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnlib.scores._base import Score, _cast, _per_head, check_parameter
from attnlib.scores._tanh_sum import additive_logits


@dataclasses.dataclass(frozen=True, eq=False)
class Additive(Score):
    """sum_d scale_d * tanh(query_d + key_d) (Bahdanau et al. 2015).

    Args:
      scale: `()`, `(D,)` or `(N, D)`; None: 1.
    """

    scale: Any = None
    heads: ClassVar[Mapping[str, int]] = {"scale": 2}

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        del precision  # there is no matrix product
        features = jnp.tanh(query[..., :, None, :] + key[..., None, None, :, :])  # (*batch, K, G, T, S, D)
        return jnp.sum(features if self.scale is None else features * _per_head(self.scale, 1, query), -1)

    def prepare(self, query: jax.Array, key: jax.Array, precision: Any = None) -> tuple[jax.Array, jax.Array, Score]:
        del precision
        scale = _cast(1.0 if self.scale is None else self.scale, query)
        heads, features = query.shape[-4:-2], query.shape[-1]
        scale = scale.reshape(*heads, features) if scale.ndim == 2 else jnp.broadcast_to(scale, (*heads, features))
        return query, key, TanhSum(scale)

    def prepared_features_per_pair(self, features: int) -> int:
        return 1

    def check(self, heads: int, query_features: int, key_features: int) -> None:
        super().check(heads, query_features, key_features)
        check_parameter(self.scale, "additive scale", (), (query_features,), (heads, query_features))


@dataclasses.dataclass(frozen=True, eq=False)
class TanhSum(Score):
    """sum_d scale_d tanh(query_d + key_d), computed fast: the prepared form of Additive and Concat.

    Args:
      scale: `(K, G, D)`.
    """

    scale: jax.Array

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        del precision
        return additive_logits(query, key, self.scale)

    def features_per_pair(self, features: int) -> int:
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
    heads: ClassVar[Mapping[str, int]] = {}

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

    def prepared_features_per_pair(self, features: int) -> int:
        return 1

    def check(self, heads: int, query_features: int, key_features: int) -> None:
        super().check(heads, query_features, key_features)
        check_parameter(self.weight, "Concat weight", ())
        check_parameter(self.scale, "Concat scale", ())
