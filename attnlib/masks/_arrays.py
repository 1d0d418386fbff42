"""Masks that hold an entry for each position or pair: padding, segments, dense arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from attnlib._core import axes as _axes
from attnlib._core.array_types import Array
from attnlib._core.axes import AttentionShape, align_ranks
from attnlib._core.block_positions import BlockPositions
from attnlib._core.suggestions import class_hint
from attnlib._core.validation import as_at_least_int32, check_array, check_integer, check_positions, is_array
from attnlib.masks._base import Mask, set_fields
from attnlib.masks._function import Function
from attnlib.masks._views import PaddedDenseMask


@dataclasses.dataclass(frozen=True, eq=False)
class KeyPadding(Mask):
    """Padding of keys: bool `(*batch, *key axes)` or `(*key axes,)`, True = real."""

    mask: Array
    entries: ClassVar[Mapping[str, str]] = {"mask": "key"}

    def __post_init__(self) -> None:
        set_fields(self, mask=_check_bool(self.mask, "KeyPadding mask"))

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return key.gather(self.mask)

    def check(self, shapes: AttentionShape) -> None:
        check_positions(self.mask, "KeyPadding mask", shapes.batch, shapes.key, "key")


@dataclasses.dataclass(frozen=True, eq=False)
class QueryPadding(Mask):
    """Padding of queries: bool `(*batch, *query axes)` or `(*query axes,)`, True = real. Padding attends nothing."""

    mask: Array
    entries: ClassVar[Mapping[str, str]] = {"mask": "query"}

    def __post_init__(self) -> None:
        set_fields(self, mask=_check_bool(self.mask, "QueryPadding mask"))

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return query.gather(self.mask)

    def check(self, shapes: AttentionShape) -> None:
        check_positions(self.mask, "QueryPadding mask", shapes.batch, shapes.query, "query")


@dataclasses.dataclass(frozen=True, eq=False)
class Segments(Mask):
    """Attention between positions with equal ids, as in packed documents (Krell et al. 2021).

    Args:
      query_ids: int `(*batch, *query axes)` or `(*query axes,)`.
      key_ids: likewise for the keys; None: `query_ids`.
      padding_id: the id of positions that neither attend nor are attended; None: no such id.
    """

    query_ids: Array
    key_ids: Array | None = None
    padding_id: int | Array | None = None
    entries: ClassVar[Mapping[str, str]] = {"query_ids": "query", "key_ids": "key"}

    def __post_init__(self) -> None:
        for name, optional in (("query_ids", False), ("key_ids", True)):
            ids = check_array(
                getattr(self, name), f"Segments {name}", kind="integer", optional=optional, convert=(Sequence,)
            )
            set_fields(self, **{name: ids})
        padding_id = check_integer(self.padding_id, "Segments padding_id", optional=True)
        if np.ndim(padding_id) != 0:
            raise ValueError(f"Segments padding_id must be one integer; got shape {padding_id.shape}.")
        set_fields(self, padding_id=padding_id)

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        query_ids = query.gather(as_at_least_int32(self.query_ids))
        key_ids = key.gather(as_at_least_int32(self.query_ids if self.key_ids is None else self.key_ids))
        query_ids, key_ids = align_ranks(query_ids, key_ids)
        with jax.numpy_dtype_promotion("standard"):  # the ids may have different dtypes
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
    """Any bool array that broadcasts to the weights `(*batch, N, *query axes, *key axes)`, of the same rank, or of rank
    at most the number of query and key axes."""

    array: Array
    entries: ClassVar[Mapping[str, str]] = {"array": "pairs"}

    def __post_init__(self) -> None:
        set_fields(self, array=_check_bool(self.array, "mask"))

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return self.pad_to(query, key, (query.total, key.total)).evaluate(query, key)

    def pad_to(self, query: BlockPositions, key: BlockPositions, sizes: tuple[int, int]) -> Mask:
        return PaddedDenseMask(_axes.pad_pairs(_axes.fold_pairs(self.array, query.shape, key.shape), sizes))

    def check(self, shapes: AttentionShape) -> None:
        _axes.check_pairs(self.array.shape, "mask", shapes)


def as_mask(value: Any) -> Mask | None:
    """The mask, with a bool array as `Dense` and a function as `Function`."""
    if value is None or isinstance(value, Mask):
        return value
    if not is_array(value):
        if callable(value) and not isinstance(value, type):
            return Function(value)
        raise TypeError(
            "mask must be a bool array or a Mask such as attnlib.masks.Causal(), or a function of (batch, head, "
            f"query_position, key_position); got {type(value).__name__}."
            + (class_hint(value) or " Convert nested lists with jnp.asarray(mask, bool)." * isinstance(value, list))
        )
    return Dense(value)


def _check_bool(value: Any, name: str) -> Any:
    remedy = (
        f"Write {name.split()[-1]}.astype(bool) for 0 and 1 (True = attend), and pass additive numbers (0 and -inf) as "
        "`bias`."
    )
    return check_array(value, name, kind="bool", convert=(Sequence, bool), remedy=remedy)
