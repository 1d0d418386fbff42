"""Modifiers of logits: a function of one logit and of where it is, applied to the logits of any block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from attnlib._core import axes as _axes
from attnlib._core.axes import AttentionShape
from attnlib._core.block_positions import BlockPositions
from attnlib._core.closures import convert_pair_function
from attnlib._core.pytree import register
from attnlib._core.suggestions import explains_callback


class ValidatedScoreMod:
    """A named modifier, which can be asked whether its arrays fit."""

    def check(self, heads: int, axes: int) -> None:
        """Raises ValueError where they do not fit so many query heads and attention axes."""
        raise NotImplementedError

    def for_keys(self, keys: int | None) -> ValidatedScoreMod:
        """The modifier for so many keys; None: not all of the keys need to exist."""
        return self

    def __call__(self, logit: jax.Array, batch: Any, head: Any, query_position: Any, key_position: Any) -> jax.Array:
        """The new logit."""
        raise NotImplementedError


class LogitModifier(Protocol):
    """What an implementation applies to the logits of a block, as `TracedScoreMod.apply` describes."""

    @property
    def apply(self) -> Callable[..., jax.Array]: ...


@register
@dataclasses.dataclass(frozen=True, eq=False)
class LogitsSoftCap:
    """What the option `logits_soft_cap` becomes: cap * tanh(logit / cap)."""

    cap: float = dataclasses.field(metadata={"static": True})

    def apply(self, logits: jax.Array, *where: Any) -> jax.Array:
        return self.cap * jnp.tanh(logits / self.cap)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class TracedScoreMod:
    """What a user's `score_mod` becomes.

    Attributes:
      function: of (logit, batch index along each batch axis..., head, query position along each attention axis..., key
        position along each...), all scalars.
    """

    function: Any

    @classmethod
    def of(cls, function: Any, shapes: AttentionShape, keys: int | None) -> TracedScoreMod:
        """Traces the function for a call of such sizes, and for so many keys as `ValidatedScoreMod.for_keys` takes."""
        if not callable(function) or isinstance(function, type):
            raise TypeError(
                "score_mod must be a function (logit, batch, head, query_position, key_position) -> logit, such as "
                f"attnlib.modifiers.ALiBi(...); got {function!r}."
            )
        if isinstance(function, ValidatedScoreMod):
            function.check(shapes.heads, len(shapes.query))
            function = function.for_keys(keys)
        batch_axes, axes = len(shapes.batch), len(shapes.query)
        logit = jax.ShapeDtypeStruct((), shapes.dtype)
        with explains_callback("score_mod"):
            program, result = convert_pair_function(function, batch_axes, axes, logit)
        if not isinstance(result, jax.ShapeDtypeStruct) or result.shape != ():
            raise ValueError(
                f"score_mod must return a scalar for one logit and its positions; got {result}. It is written for one "
                "pair: the library batches it over batch indices, heads and positions."
            )
        if not jnp.issubdtype(result.dtype, jnp.floating):
            raise TypeError(
                f"score_mod must return the new logit, a floating-point number; got {result.dtype}. To leave pairs "
                "out, pass a mask: mask=attnlib.masks.Function(fn) of (batch, head, query_position, key_position)."
            )
        return cls(program)

    def apply(
        self,
        logits: jax.Array,
        heads: tuple[int, ...],
        query: BlockPositions,
        key: BlockPositions,
        cut: Callable[[jax.Array], jax.Array] = lambda whole: whole,
    ) -> jax.Array:
        """The modified logits of a block.

        Args:
          logits: `(*batch, K, G, T, S)`.
          heads: (*batch, K, G) of the whole.
          query, key: the block's positions.
          cut: takes the block's part along the batch axes and of the key heads.
        """
        indices = [*_batch_and_head_indices(heads), *_coordinates(query, logits.ndim), *_coordinates(key, logits.ndim)]
        return jnp.vectorize(self.function)(logits, *map(cut, indices)).astype(logits.dtype)


def _coordinates(positions: BlockPositions, rank: int) -> list[jax.Array]:
    return [_axes.split_heads(x, 1, rank) for x in positions.coordinates]


def _batch_and_head_indices(heads: tuple[int, ...]) -> list[jax.Array]:
    """The index along each batch axis, and of the query head, laid out against `(*batch, K, G, T, S)`."""
    rank = len(heads) + 2
    indices = []
    for axis, size in enumerate(heads[:-2]):
        indices.append(jnp.arange(size, dtype=jnp.int32).reshape(-1, *(1,) * (rank - axis - 1)))
    head = jnp.arange(heads[-2] * heads[-1], dtype=jnp.int32).reshape(*heads[-2:], 1, 1)
    return [jnp.broadcast_to(x, (1,) * (rank - x.ndim) + x.shape) for x in (*indices, head)]
