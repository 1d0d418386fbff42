"""A user's function of one query and one key as a mask."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.axes import AttentionShape, align_ranks
from attnlib._core.block_positions import BlockPositions
from attnlib._core.closures import ClosureConverted, convert_pair_function
from attnlib._core.explicit_axes import replicated
from attnlib._core.sizes import is_static
from attnlib._core.suggestions import class_hint, explains_callback
from attnlib._core.tile_kinds import TileKinds, TileRanges, cells_in_tiles, classify
from attnlib.masks._base import Mask

# A function is computed for all pairs while a call is traced, if that takes at most so many operations,
# about 0.2 s on 2 CPU cores.
_MAX_OPERATIONS = 2**31
_NO_MESH = jax.sharding.AbstractMesh((), ())
# Pairs computed at a time, and the pairs up to which a cell of the table of pairs is one of them and not 8 x 8.
_CHUNK, _PAIRS_IN_SINGLE_CELLS = 2**20, 2**16


@dataclasses.dataclass(frozen=True, eq=False)
class Function(Mask):
    """A function of the batch index, the head and the positions of one query and one key, like FlexAttention's
    `mask_mod` (Dong et al. 2024).

    Wherever a mask is expected, the function itself means `Function(fn)`. The library batches the function. Arrays that
    the function captures are traced: other values reuse the compiled program.

    A function that captures no arrays is computed for all pairs once, while the program is traced, and attnlib skips
    the tiles that it empties. If the function captures arrays, or the sequence is much longer than 8192, no tile is
    known to be empty: join the function with a static mask, `Function(fn) & SlidingWindow(64, 0)`.

    Args:
      fn: `fn(batch, head, query_position, key_position) -> bool`, True = attend. All arguments are traced int32
        scalars. `batch` is a tuple unless there is one batch axis, and a position is one unless there is one attention
        axis. In layers without heads, the head is 0.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> reach = jnp.array([1, 4])  # one for each head
      >>> mask = attnlib.masks.Function(lambda batch, head, query, key: abs(query - key) <= reach[head])
      >>> x = jax.random.normal(jax.random.key(0), (1, 8, 2, 4))
      >>> attnlib.dot_product_attention(x, x, x, mask=mask).shape
      (1, 8, 2, 4)
    """

    fn: Callable[[Any, Any, Any, Any], Any]

    def __post_init__(self) -> None:
        if not callable(self.fn) or isinstance(self.fn, (type, Mask)):
            raise TypeError(
                f"Function fn must be a function (batch, head, query_position, key_position) -> bool; got {self.fn!r}."
                f"{class_hint(self.fn)}"
            )

    @property
    def may_close_over_arrays(self) -> bool:
        return True

    def closure_converted(self, shapes: AttentionShape) -> Mask:
        batch, axes = shapes.batch, len(shapes.query)
        with explains_callback("Function"):
            program, result = convert_pair_function(replicated(self.fn), len(batch), axes)
        if not isinstance(result, jax.ShapeDtypeStruct) or result.shape != ():
            raise ValueError(
                f"Function fn must return a scalar for one query and one key; got {result}. It is written for one "
                "pair: the library batches it over batch indices, heads and positions."
            )
        if result.dtype != jnp.bool_:
            raise TypeError(
                f"Function fn must return bool (True = attend); got {result.dtype}. A function that changes logits is "
                "a score_mod."
            )
        jaxpr = program.program.jaxpr
        used = {id(var) for var in (*(var for e in jaxpr.eqns for var in e.invars), *jaxpr.outvars)}
        sizes = (*batch, shapes.heads)
        reads = tuple(id(var) in used for var in jaxpr.invars[: len(sizes)])
        for name, size, is_read in zip((*["batch"] * len(batch), "head"), sizes, reads, strict=True):
            if is_read and size is None:
                option = "heads" if name == "head" else name
                raise ValueError(
                    f"this Function depends on the {name}, so its array does too: pass {option}, the number of "
                    f"{'query heads' if name == 'head' else 'batch entries'}, mask.as_array(T, S, {option}=...)."
                )
        static_program = None if program.captured or jaxpr.effects else program.program
        if static_program is not None and not jax.sharding.get_abstract_mesh().empty:
            with jax.sharding.use_abstract_mesh(_NO_MESH):  # the types in a jaxpr contain the mesh
                static_program = convert_pair_function(self.fn, len(batch), axes)[0].program
        return TracedFunction(jax.lax.stop_gradient(program), sizes, reads, static_program)

    def _of_unknown_sizes(self, axes: int) -> Mask:
        """The mask outside of a call, where it cannot depend on the batch and on the head."""
        unknown: Any = None
        shape = (unknown,) * axes
        return self.closure_converted(AttentionShape((unknown,), unknown, shape, shape, (0, 0), None))

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return self._of_unknown_sizes(len(key.shape)).evaluate(query, key)

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        return self._of_unknown_sizes(len(key.shape)).classify_tiles(query, key)


@dataclasses.dataclass(frozen=True, eq=False)
class TracedFunction(Mask):
    """What a `Function` becomes in a call.

    Attributes:
      function: of (batch index along each batch axis..., head, query position along each attention axis..., key
        position along each...), all scalars.
      sizes: (*batch, N).
      reads: for each of these axes, whether the function depends on it.
      static_program: the program of a function of nothing but its arguments, or None.
    """

    function: ClosureConverted
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    reads: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    static_program: Any = dataclasses.field(metadata={"static": True})

    @property
    def has_function(self) -> bool:
        return True

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return self.evaluate_heads(query, key, lambda indices: indices)

    def evaluate_heads(
        self, query: BlockPositions, key: BlockPositions, cut: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        rank, indices = (len(self.sizes) if any(self.reads) else 0) + 2, []
        for axis, (size, is_read) in enumerate(zip(self.sizes, self.reads, strict=True)):
            shape = [size if is_read and n == axis else 1 for n in range(rank)]
            indices.append(jax.lax.broadcasted_iota(jnp.int32, shape, axis if is_read else 0))
        # Explicit positions may have batch axes too.
        arguments = align_ranks(*map(cut, (*indices, *query.coordinates, *key.coordinates)))
        result: jax.Array = jnp.vectorize(self.function)(*arguments)
        return result

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        one_tile = query.first.size <= 1 and key.first.size <= 1
        if one_tile or not self._is_cheap(query.shape, key.shape):
            return super().classify_tiles(query, key)
        pairs = math.prod(query.shape) * math.prod(key.shape)
        cell = 1 if pairs <= _PAIRS_IN_SINGLE_CELLS else 8
        some, every = _table(self.static_program, self.sizes, self.reads, query.shape, key.shape, cell)
        (any_count, _), (all_count, cells) = (cells_in_tiles(table, query, key, cell) for table in (some, every))
        return classify(empty=any_count == 0, full=all_count == cells)

    def _is_cheap(self, query_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> bool:
        """Whether the function can be computed for all pairs while a call is traced."""
        read = [size for size, is_read in zip(self.sizes, self.reads, strict=True) if is_read]
        sizes = *read, *query_shape, *key_shape
        if self.static_program is None or not is_static(*sizes):
            return False
        return math.prod(sizes) * _operations(self.static_program.jaxpr) <= _MAX_OPERATIONS


def _operations(jaxpr: Any) -> float:
    """The number of operations in a jaxpr; infinite where it is not known."""
    total = 1.0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, [value for value in equation.params.values() if hasattr(value, "eqns")]
        inner += [value.jaxpr for value in equation.params.values() if hasattr(value, "jaxpr")]
        if not inner and name not in ("cond", "while", "pure_callback"):
            total += max((math.prod(v.aval.shape) for v in (*equation.invars, *equation.outvars)), default=1)
        elif name in ("jit", "pjit", "scan", "custom_jvp_call"):
            total += equation.params.get("length", 1) * sum(map(_operations, inner))
        else:
            return math.inf
    return total


@functools.lru_cache(maxsize=32)
def _table(
    program: Any,
    sizes: tuple[int, ...],
    reads: tuple[bool, ...],
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    cell: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(whether a pair of each cell attends, whether all do), in any batch index and head."""
    mask = TracedFunction(ClosureConverted([], program), sizes, reads, None)
    queries, keys = math.prod(query_shape), math.prod(key_shape)
    columns = -(-keys // cell)
    rows = max(_CHUNK // (columns * cell * math.prod(n for n, r in zip(sizes, reads, strict=True) if r)) // cell, 1)

    @jax.jit
    def cells(start: Any) -> tuple[jax.Array, jax.Array]:
        query = BlockPositions(query_shape, "query", start, rows * cell)
        key = BlockPositions(key_shape, "key", 0, columns * cell)
        block = mask.evaluate(query, key)
        inside, block = align_ranks((query.array_index < queries) & (key.array_index < keys), block)
        lead = tuple(range(block.ndim - 2))
        shape = (rows, cell, columns, cell)
        some, every = jnp.any(block & inside, lead), jnp.all(block | ~inside, lead)
        return jnp.any(some.reshape(shape), (1, 3)), jnp.all(every.reshape(shape), (1, 3))

    # The table is a constant, and computed on one device, wherever the call is traced.
    with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(_NO_MESH), jax.transfer_guard("allow"):
        chunks = [jax.device_get(cells(np.int32(start))) for start in range(0, queries, rows * cell)]
    count = -(-queries // cell)
    some, every = (np.concatenate(parts)[:count] for parts in zip(*chunks, strict=True))
    return some, every
