"""The tables of the learned position biases."""

from __future__ import annotations

from typing import Any

from attnlib._core.validation import check_int, check_int_or_ints, per_axis
from attnlib.layers._projections import ParameterSpec
from attnlib.modifiers import BucketedBias, RelativeBias


class RelativeTable:
    """The table of RelativePositionBias and its modifier."""

    sizes: Any
    table_init: Any

    def _table(self, num_heads: int) -> ParameterSpec:
        sizes = per_axis(check_int_or_ints(self.sizes, "sizes", minimum=1), 1)
        return ParameterSpec((*(2 * size - 1 for size in sizes), num_heads), self.table_init)

    def _modifier(self, table: Any) -> RelativeBias:
        return RelativeBias(table)


class BucketTable:
    """The table of BucketedPositionBias and its modifier."""

    num_buckets: Any
    bidirectional: Any
    max_distance: Any
    table_init: Any

    def _table(self, num_heads: int) -> ParameterSpec:
        return ParameterSpec((check_int(self.num_buckets, "num_buckets", minimum=1), num_heads), self.table_init)

    def _modifier(self, table: Any) -> BucketedBias:
        return BucketedBias(table, self.bidirectional, self.max_distance)
