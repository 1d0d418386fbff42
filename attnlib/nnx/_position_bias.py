"""NNX modules with the learned table of a position bias. Several layers may share one module, as in T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from attnlib._core.pytree import SignatureOfInit
from attnlib._core.validation import check_int
from attnlib._modules.position_bias import BucketTable, RelativeTable
from attnlib.layers._projections import Initializer, default_table_init
from attnlib.modifiers import BucketedBias, RelativeBias
from attnlib.nnx._base import as_attribute, check_rngs, make_param


class RelativePositionBias(RelativeTable, nnx.Module):
    """A learned bias for each head and distance along each attention axis: the `score_mod` of a layer.

    Parameters: `table (2 * M_1 - 1, ..., 2 * M_n - 1, N)`.

    Args:
      sizes: M along each attention axis, or one int. Distances beyond -(M - 1) .. M - 1 share the outer entries.
      num_heads: query heads N of the layer.
      table_init: initialiser of the table; default: normal with standard deviation 0.02.
      param_dtype: dtype of the table; default float32.
      rngs: `nnx.Rngs` with a stream "params", or a default stream.

    Example:
      >>> import attnlib, jax.numpy as jnp
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> bias = attnlib.nnx.RelativePositionBias((7, 7), num_heads=4, rngs=rngs)
      >>> layer = attnlib.nnx.MultiHeadAttention(4, in_features=32, score_mod=bias, rngs=rngs)
      >>> layer(jnp.ones((2, 7, 7, 32))).shape, layer.score_mod.table.shape
      ((2, 7, 7, 32), (13, 13, 4))

    Source: Shaw et al., "Self-Attention with Relative Position Representations" (2018); Liu et al., "Swin
    Transformer" (2021).
    """

    __signature__: ClassVar[Any] = SignatureOfInit()

    def __init__(
        self,
        sizes: int | Sequence[int],
        num_heads: int,
        *,
        table_init: Initializer = default_table_init,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.sizes, self.table_init = as_attribute(sizes), table_init
        spec = self._table(check_int(num_heads, "num_heads", minimum=1))
        self.table = make_param(spec, check_rngs(rngs).params(), param_dtype)

    def __call__(self) -> RelativeBias:
        """The modifier."""
        return self._modifier(self.table[...])


class BucketedPositionBias(BucketTable, nnx.Module):
    """A learned bias for each head and bucket of distances (T5): the `score_mod` of a layer.

    Parameters: `table (num_buckets, N)`.

    Args:
      num_heads: query heads N of the layer.
      num_buckets, bidirectional, max_distance: as in `attnlib.modifiers.BucketedBias`; default 32, True, 128.
      table_init, param_dtype, rngs: as in `RelativePositionBias`.

    Example:
      >>> import attnlib, jax.numpy as jnp
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> bias = attnlib.nnx.BucketedPositionBias(4, bidirectional=False, rngs=rngs)
      >>> layer = attnlib.nnx.MultiHeadAttention(4, in_features=32, score_mod=bias, rngs=rngs)
      >>> layer(jnp.ones((2, 10, 32))).shape, bias.table.shape
      ((2, 10, 32), (32, 4))

    Source: Raffel et al., "Exploring the Limits of Transfer Learning" (T5, 2020).
    """

    __signature__: ClassVar[Any] = SignatureOfInit()

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        bidirectional: bool = True,
        max_distance: int = 128,
        table_init: Initializer = default_table_init,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_buckets, self.bidirectional, self.max_distance = num_buckets, bidirectional, max_distance
        self.table_init = table_init
        spec = self._table(check_int(num_heads, "num_heads", minimum=1))
        self.table = make_param(spec, check_rngs(rngs).params(), param_dtype)

    def __call__(self) -> BucketedBias:
        """The modifier."""
        return self._modifier(self.table[...])
