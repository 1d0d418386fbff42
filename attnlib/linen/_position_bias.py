"""Flax modules with the learned table of a position bias. Several layers may share one module, as in T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from attnlib._modules.position_bias import BucketTable, RelativeTable
from attnlib.layers._projections import Initializer, default_table_init
from attnlib.modifiers import BucketedBias, RelativeBias


class RelativePositionBias(RelativeTable, nn.Module):
    """A learned bias for each head and distance along each attention axis: the `score_mod` of a layer.

    Parameters: `table (2 * M_1 - 1, ..., 2 * M_n - 1, N)`.

    Attributes:
      sizes: M along each attention axis, or one int. Distances beyond -(M - 1) .. M - 1 share the outer entries.
      table_init: initialiser of the table; default: normal with standard deviation 0.02.
      param_dtype: dtype of the table; default float32.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> layer = attnlib.MultiHeadAttention(num_heads=4, score_mod=attnlib.RelativePositionBias(sizes=(7, 7)))
      >>> windows = jnp.ones((2, 7, 7, 32))
      >>> variables = layer.init(jax.random.key(0), windows)
      >>> variables["params"]["score_mod"]["table"].shape
      (13, 13, 4)

    Source: Shaw et al., "Self-Attention with Relative Position Representations" (2018); Liu et al., "Swin
    Transformer" (2021).
    """

    sizes: int | Sequence[int]
    table_init: Initializer = default_table_init
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, num_heads: int) -> RelativeBias:
        """The modifier for a layer of `num_heads` heads.

        Args:
          num_heads: query heads N.
        """
        return self._modifier(self.param("table", self._table(num_heads).initialize, self.param_dtype))


class BucketedPositionBias(BucketTable, nn.Module):
    """A learned bias for each head and bucket of distances (T5): the `score_mod` of a layer.

    Parameters: `table (num_buckets, N)`.

    Attributes:
      num_buckets, bidirectional, max_distance: as in `attnlib.modifiers.BucketedBias`; default 32, True, 128.
      table_init, param_dtype: as in `RelativePositionBias`.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> layer = attnlib.MultiHeadAttention(num_heads=4, score_mod=attnlib.BucketedPositionBias(bidirectional=False))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 10, 32)))
      >>> variables["params"]["score_mod"]["table"].shape
      (32, 4)

    Source: Raffel et al., "Exploring the Limits of Transfer Learning" (T5, 2020).
    """

    num_buckets: int = 32
    bidirectional: bool = True
    max_distance: int = 128
    table_init: Initializer = default_table_init
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, num_heads: int) -> BucketedBias:
        """The modifier for a layer of `num_heads` heads.

        Args:
          num_heads: query heads N.
        """
        return self._modifier(self.param("table", self._table(num_heads).initialize, self.param_dtype))
