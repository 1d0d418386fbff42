"""Masks: frozen values that say which query position may attend which key position.

A mask knows no implementation and carries no lengths; it answers from positions. `True` means attend, everywhere.
`&`, `|` and `~` compose masks. Python ints inside a mask are static; arrays are traced, so other values (lengths,
segment ids, offsets) never recompile. `mask.as_array(query_shape, key_shape)` is the definition of each kind.
"""

from attnlib._core.block_positions import BlockPositions
from attnlib._core.tile_kinds import TileRanges
from attnlib.masks._arrays import Dense, KeyPadding, QueryPadding, Segments
from attnlib.masks._base import Mask
from attnlib.masks._function import Function
from attnlib.masks._positional import Causal, Lengths, Predicate, Prefix, SlidingWindow
from attnlib.masks._registers import Registers
from attnlib.masks._sparse import BlockLocal, BlockSparse, Dilated, Neighborhood

__all__ = [
    "BlockLocal",
    "BlockPositions",
    "BlockSparse",
    "Causal",
    "Dense",
    "Dilated",
    "Function",
    "KeyPadding",
    "Lengths",
    "Mask",
    "Neighborhood",
    "Predicate",
    "Prefix",
    "QueryPadding",
    "Registers",
    "Segments",
    "SlidingWindow",
    "TileRanges",
]
