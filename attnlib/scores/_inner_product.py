"""Scores with inner products of queries and keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.core import max_dim

from attnlib._autodiff.matmul import Form, qk_product
from attnlib._core.axes import merge_groups, split_groups
from attnlib._core.sizes import as_scalar, is_static
from attnlib.scores._base import Score, _cast, _per_head, check_parameter


@dataclasses.dataclass(frozen=True, eq=False)
class Dot(Score):
    """scale * <query, key> (Luong et al. 2015; scaled: Vaswani et al. 2017).

    Args:
      scale: a scalar, or `(N,)` for a scale per head; None: 1 / sqrt(D).
    """

    scale: Any = None
    is_inner_product = True
    heads: ClassVar[Mapping[str, int]] = {"scale": 1}

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        return jnp.einsum("...kgtd,...ksd->...kgts", self._scaled(query), key, precision=precision)

    def prepare(self, query: jax.Array, key: jax.Array, precision: Any = None) -> tuple[jax.Array, jax.Array, Score]:
        return self._scaled(query), key, InnerProduct()

    def _scaled(self, query: jax.Array) -> jax.Array:
        if self.scale is not None:
            return query * _per_head(self.scale, 0, query)
        features = max_dim(query.shape[-1], 1)
        return query * (features**-0.5 if is_static(features) else jax.lax.rsqrt(as_scalar(features, query.dtype)))

    def features_per_pair(self, features: int) -> int:
        return 1

    def check(self, heads: int, query_features: int, key_features: int) -> None:
        super().check(heads, query_features, key_features)
        check_parameter(self.scale, "Dot scale", (), (heads,))


@dataclasses.dataclass(frozen=True, eq=False)
class InnerProduct(Score):
    """<query, key>: the prepared form of Dot and Bilinear."""

    is_inner_product = True

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        return split_groups(qk_product(Form(precision), merge_groups(query), key), query.shape[-3:-1])

    def features_per_pair(self, features: int) -> int:
        return 1


@dataclasses.dataclass(frozen=True, eq=False)
class Bilinear(Score):
    """query^T kernel key, unscaled (Luong et al. 2015, "general").

    Args:
      kernel: `(D, D_key)`, or `(N, D, D_key)` for a kernel per head; query and key features may differ.
    """

    kernel: Any
    is_inner_product = True
    heads: ClassVar[Mapping[str, int]] = {"kernel": 3}

    def prepare(self, query: jax.Array, key: jax.Array, precision: Any = None) -> tuple[jax.Array, jax.Array, Score]:
        kernel = _cast(self.kernel, query)
        if kernel.ndim == 2:
            query = jnp.einsum("...kgtd,de->...kgte", query, kernel, precision=precision)
        else:
            kernel = kernel.reshape(*query.shape[-4:-2], *kernel.shape[1:])
            query = jnp.einsum("...kgtd,kgde->...kgte", query, kernel, precision=precision)
        return query, key, InnerProduct()

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        query, key, product = self.prepare(query, key, precision)
        return product.block(query, key, precision)

    def features_per_pair(self, features: int) -> int:
        return 1

    def check(self, heads: int, query_features: int, key_features: int) -> None:
        shape = (query_features, key_features)
        check_parameter(self.kernel, "Bilinear kernel", shape, (heads, *shape), optional=False)
