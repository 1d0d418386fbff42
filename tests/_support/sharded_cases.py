"""Cases on a mesh of devices: which axis of each of their arrays is sharded, by batch, by heads or by both."""

import dataclasses
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
from attention_case import Case
from jax.sharding import PartitionSpec as P

from attnlib import masks
from attnlib._core import axes as _axes
from attnlib.masks import _base

DATA, MODEL = "data", "model"  # the mesh axes of batch and heads
LAYOUTS = "both", "batch", "heads"


@dataclasses.dataclass(frozen=True)
class ShardedCase:
    """A case, and the mesh axes over which its first batch axis and its heads are sharded (None: they are not)."""

    case: Case
    batch: str | None
    heads: str | None

    @property
    def mesh_shape(self) -> tuple[int, int]:
        sizes = _Sizes.of(self.case)
        return (sizes.batch[0] if self.batch else 1), (sizes.shards_of_heads if self.heads else 1)

    def mesh(self, axis_type: Any) -> jax.sharding.Mesh:
        devices = jax.devices()[: int(np.prod(self.mesh_shape))]
        return jax.make_mesh(self.mesh_shape, (DATA, MODEL), devices=devices, axis_types=(axis_type,) * 2)

    def specs(self, trees: dict[str, Any]) -> dict[str, Any]:
        """A PartitionSpec for each array of what `cases.build` gives."""
        return {name: self._specs_of(name, tree) for name, tree in trees.items()}

    def result_specs(self) -> tuple[P, P, P]:
        """Those of (output, weights, lse)."""
        sizes = _Sizes.of(self.case)
        output = [None] * len(self.case.query)
        output[-2] = self.heads
        for axis in sizes.axes.batch[:1]:
            output[axis] = self.batch
        rows = P(*[self.batch, *[None] * len(sizes.batch)][: len(sizes.batch)], self.heads)
        return P(*output), rows, rows

    def _specs_of(self, name: str, tree: Any) -> Any:
        match tree:
            case _base.And() | _base.Or():
                parts = [self._specs_of(name, part) for part in (tree.left, tree.right)]
                return jax.tree.structure(tree).unflatten(jax.tree.leaves(parts, is_leaf=_is_spec))
            case _base.Not():
                return jax.tree.structure(tree).unflatten(
                    jax.tree.leaves(self._specs_of(name, tree.mask), is_leaf=_is_spec)
                )
            case masks.BlockSparse():
                rule = self._whole
            case masks.Dense() | jax.Array() if name == "mask":
                rule = self._of_pairs
            case _:
                rule = {
                    "query": self._of_operand, "key": self._of_operand, "value": self._of_operand,
                    "bias": self._of_pairs, "score": self._heads_first, "sink": self._heads_first,
                    "score_mod": self._heads_last, "dropout_rng": self._whole,
                }.get(name, self._of_batch)  # fmt: skip
        return jax.tree.map(rule, tree)

    def _whole(self, array: Any) -> P:
        del array
        return P()

    def _of_operand(self, array: Any) -> P:
        """(*batch and attention axes, heads, features)."""
        names = [None] * array.ndim
        for axis in _Sizes.of(self.case).axes.batch[:1]:
            names[axis] = self.batch
        names[-2] = self.heads
        return _spec(array, names)

    def _of_pairs(self, array: Any) -> P:
        """(*batch, heads, *query axes, *key axes), or fewer axes, which are then pairs alone."""
        sizes = _Sizes.of(self.case)
        if array.ndim <= 2 * len(sizes.axes.attention):
            return P()
        return _spec(array, [*[self.batch, None, None][: len(sizes.batch)], self.heads])

    def _of_batch(self, array: Any) -> P:
        """(*batch,) or (*batch, *positions); no case has as many positions as batch indices."""
        sizes = _Sizes.of(self.case)
        number = len(sizes.batch)
        with_batch = number and array.ndim in (number, number + len(sizes.axes.attention))
        return P(self.batch) if with_batch and array.shape[0] == sizes.batch[0] else P()

    def _heads_first(self, array: Any) -> P:
        """(heads, ...) where the first axis is as long as the heads; in no case features are as many."""
        return P(self.heads) if array.ndim and array.shape[0] == _Sizes.of(self.case).heads else P()

    def _heads_last(self, array: Any) -> P:
        of_heads = array.ndim and array.shape[-1] == _Sizes.of(self.case).heads
        return P(*[None] * (array.ndim - 1), self.heads) if of_heads else P()


def sharded(case: Case, layout: str) -> ShardedCase | None:
    """The case in a layout; None where it has no such axis, or nothing along it."""
    sizes = _Sizes.of(case)
    by_batch, by_heads = layout != "heads", layout != "batch"
    if (by_batch and (sizes.batch or (1,))[0] < 2) or (by_heads and sizes.shards_of_heads < 2):
        return None
    if 0 in (*case.query, *case.key):  # JAX forgets along which axes an array without entries varies
        return None
    return ShardedCase(case, DATA if by_batch else None, MODEL if by_heads else None)


def depends_on_shards(one: ShardedCase) -> str | None:
    """Why a case has other numbers inside of `shard_map`, where batch indices and heads are those of a shard."""
    if "dropout_rate" in one.case.options:
        return "dropout drops the same entries on all shards"
    if one.case.score_mod is not None and one.batch:
        with cases.context(one.case):
            made = cases.build(one.case)[0]["score_mod"]
        if type(made).__name__ == "Tilt":
            return "the modifier reads the batch index"
    with cases.context(one.case):
        mask = cases.build(one.case)[1].get("mask")
    if isinstance(mask, masks.Mask) and mask.may_close_over_arrays:
        return "the function of the mask reads the batch index or the head"
    return None


@dataclasses.dataclass(frozen=True)
class _Sizes:
    axes: _axes.Axes
    batch: tuple[int, ...]
    heads: int
    shards_of_heads: int  # 1: they cannot be sharded

    @classmethod
    def of(cls, case: Case) -> "_Sizes":
        axes = _axes.normalize(case.options.get("attention_axes"), len(case.query), trailing=2)
        shapes = [axes.batch_shape(shape) for shape in (case.query, case.key, case.value)]
        heads, kv_heads = case.query[-2], case.key[-2]
        # Of a single key head all shards have a copy.
        number = heads if kv_heads == 1 else kv_heads
        shards = next((n for n in (2, 3) if number % n == 0), 1)
        return cls(axes, tuple(map(max, zip(*shapes, strict=True))), heads, shards)


def _spec(array: Any, names: list[str | None]) -> P:
    """The names of those axes of an array that have more than one entry."""
    return P(*(name if size > 1 else None for name, size in zip(names, array.shape, strict=False)))


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)


def program(case: Case, implementation: str) -> Any:
    """(results, gradients) of the operands, of what is traced besides, and of the cotangents of the results."""

    def values_and_gradients(operands, traced, cotangents):
        def loss(operands):
            results = cases.run(operands, traced, case.options, implementation)
            finite = [jnp.where(jnp.isfinite(x), x * ct, 0) for x, ct in zip(results, cotangents, strict=True)]
            return sum(jnp.sum(x.astype(jnp.float32)) for x in finite), results

        gradients, results = jax.grad(loss, has_aux=True)(operands)
        return results, gradients

    return values_and_gradients


def arguments(case: Case, implementation: str) -> tuple[Any, Any, Any]:
    """Those of the program."""
    operands, traced, options = cases.build(case)
    shapes = jax.eval_shape(lambda *args: cases.run(*args, options, implementation), operands, traced)
    return operands, traced, cases.like(shapes, 2)
