"""Masks that hold one entry for each position or pair: padding, segments, dense arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from attnlib._core import axes as _axes
from attnlib._core.array_types import Array
from attnlib._core.axes import AttentionShape
from attnlib._core.block_positions import BlockPositions
from attnlib._core.operand_checks import is_array
from attnlib._core.suggestions import _instance
from attnlib._core.validation import (
    as_at_least_int32,
    check_bool_array,
    check_integer,
    check_integer_array,
    check_positions,
)
from attnlib.masks._base import Mask, set_fields
from attnlib.masks._views import PaddedDenseMask


@dataclasses.dataclass(frozen=True, eq=False)
class KeyPadding(Mask):
    """Keys that are real: bool `(*batch, *key axes)` or `(*key axes,)`, True = real."""

    mask: Array

    def __post_init__(self) -> None:
        set_fields(self, mask=check_bool_array(self.mask, "KeyPadding mask"))

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return key.gather(self.mask)

    def check(self, shapes: AttentionShape) -> None:
        check_positions(self.mask, "KeyPadding mask", shapes.batch, shapes.key, "key")


@dataclasses.dataclass(frozen=True, eq=False)
class QueryPadding(Mask):
    """Queries that are real: bool `(*batch, *query axes)` or `(*query axes,)`, True = real; others attend nothing."""

    mask: Array

    def __post_init__(self) -> None:
        set_fields(self, mask=check_bool_array(self.mask, "QueryPadding mask"))

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return query.gather(self.mask)

    def check(self, shapes: AttentionShape) -> None:
        check_positions(self.mask, "QueryPadding mask", shapes.batch, shapes.query, "query")


@dataclasses.dataclass(frozen=True, eq=False)
class Segments(Mask):
    """Positions with equal ids attend each other: packed documents (Krell et al. 2021).

    Args:
      query_ids: int `(*batch, *query axes)` or `(*query axes,)`.
      key_ids: likewise for the keys; None: the same as `query_ids`.
      padding_id: a position with this id neither attends nor is attended; None: there is no such id.
    """

    query_ids: Array
    key_ids: Array | None = None
    padding_id: int | Array | None = None

    def __post_init__(self) -> None:
        set_fields(self, query_ids=check_integer_array(self.query_ids, "Segments query_ids"))
        if self.key_ids is not None:
            set_fields(self, key_ids=check_integer_array(self.key_ids, "Segments key_ids"))
        if self.padding_id is not None:
            set_fields(self, padding_id=check_integer(self.padding_id, "Segments padding_id"))
            if np.ndim(self.padding_id) != 0:
                raise ValueError(f"Segments padding_id must be one integer; got shape {np.shape(self.padding_id)}.")

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        query_ids = query.gather(as_at_least_int32(self.query_ids))
        key_ids = key.gather(as_at_least_int32(self.query_ids if self.key_ids is None else self.key_ids))
        with jax.numpy_dtype_promotion("standard"):  # ids are of the user's dtypes, each of its own
            same = query_ids == key_ids
            return same if self.padding_id is None else same & (query_ids != as_at_least_int32(self.padding_id))

    def check(self, shapes: AttentionShape) -> None:
        check_positions(self.query_ids, "Segments query_ids", shapes.batch, shapes.query, "query")
        if self.key_ids is not None:
            check_positions(self.key_ids, "Segments key_ids", shapes.batch, shapes.key, "key")
        elif shapes.query != shapes.key:
            raise ValueError(
                f"Segments needs key_ids where query and key lengths differ; got query axes {shapes.query} and key "
                f"axes {shapes.key} with key_ids=None."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Mask):
    """Any bool array: of the rank of the weights `(*batch, N, *query axes, *key axes)` with ones where it broadcasts,
    or of at most the number of query and key axes."""

    array: Array

    def __post_init__(self) -> None:
        set_fields(self, array=check_bool_array(self.array, "mask"))

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return self.pad_to(query, key, (query.total, key.total)).evaluate(query, key)

    def pad_to(self, query: BlockPositions, key: BlockPositions, sizes: tuple[int, int]) -> Mask:
        return PaddedDenseMask(_axes.pad_pairs(_axes.fold_pairs(self.array, query.shape, key.shape), sizes))

    def check(self, shapes: AttentionShape) -> None:
        _axes.check_pairs(self.array.shape, "mask", shapes)


def as_mask(value: Any) -> Mask | None:
    """A bool array becomes a Dense mask; Masks and None pass."""
    if value is None or isinstance(value, Mask):
        return value
    if not is_array(value):
        raise TypeError(
            f"mask must be a bool array or a Mask such as attnlib.masks.Causal(); got {type(value).__name__}."
            + (_instance(value) or " Convert nested lists with jnp.asarray(mask, bool)." * isinstance(value, list))
        )
    return Dense(value)
