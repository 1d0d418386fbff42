"""Cases of one sequence on several devices: sizes that devices divide, and how arrays are ordered and sharded.

Each part of a device is longer than a tile and no multiple of it. A case is compared with one device in float64.
"""

import dataclasses
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
from attention_case import Case
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from option_catalogue import Tilt

import attnlib
from attnlib import masks, modifiers, positions, scores
from attnlib._core import axes as _axes
from attnlib._core.explicit_axes import reshard
from attnlib.masks._base import entries_of_leaves

DEVICES, QUERIES, KEYS = 4, 24, 40
TILE = (2, 3)
SIZES = dict(query=(2, QUERIES, 8, 3), key=(2, KEYS, 4, 3), value=(2, KEYS, 4, 5), dtype="float64")
SQUARE = dict(query=(2, KEYS, 8, 3), key=(2, KEYS, 4, 3), value=(2, KEYS, 4, 5), dtype="float64")
GRID = dict(query=(2, 8, 3, 8, 3), key=(2, 8, 3, 4, 3), value=(2, 8, 3, 4, 5), dtype="float64")
DROPOUT = dict(dropout_rate=0.4)


def case(name: str, sizes: dict[str, Any] = SIZES, **fields: Any) -> Case:
    return Case(name, **{**sizes, **fields})


def _segments(draw: Any) -> Any:
    return masks.Segments(draw.integers(0, 3, 2, QUERIES), draw.integers(0, 3, 2, KEYS))


def _tilt(draw: Any) -> Any:
    """A modifier that reads every index."""
    return Tilt(draw(8))


CASES = [
    # scores
    case("dot, scale a head, causal", score=lambda draw: scores.Dot(draw(8)), mask=lambda draw: masks.Causal(7)),
    case("bilinear a head", score=lambda draw: scores.Bilinear(draw(8, 3, 3)), mask=lambda draw: masks.Lengths(20, 33)),
    case("no mask"),
    case("concat", score=lambda draw: scores.Concat(draw(), draw()), mask=_segments),
    case("custom", score=lambda draw: scores.Custom(lambda q, k, w: jnp.tanh(w * q @ k), draw()),
         mask=lambda draw: masks.Prefix(jnp.asarray([11, 31]))),
    case("additive a head", score=lambda draw: scores.Additive(draw(8, 3)), options=dict(is_causal=True)),
    # masks
    case("window", SQUARE, mask=lambda draw: masks.SlidingWindow(4, 3)),
    case("causal window", SQUARE, mask=lambda draw: masks.SlidingWindow(6, 0), bias=(1, KEYS)),
    case("far window", SQUARE, mask=lambda draw: masks.SlidingWindow(13, 0)),
    case("keys of the next device alone", SQUARE, mask=lambda draw: masks.Causal(-10) & masks.SlidingWindow(19, None)),
    case("prefix language model", SQUARE, mask=lambda draw: masks.Causal() | masks.Prefix(13)),
    case("traced offset a row", mask=lambda draw: masks.Causal(jnp.asarray([3, 18]))),
    case("traced lengths", mask=lambda draw: masks.Lengths(jnp.asarray([24, 5]), jnp.asarray([40, 13]))),
    case("segments", SQUARE, mask=lambda draw: masks.Segments(jnp.arange(KEYS) // 9, padding_id=4) & masks.Causal()),
    case("paddings", mask=lambda draw: masks.KeyPadding(draw.bools(2, KEYS)) & masks.QueryPadding(draw.bools(QUERIES))),
    case("dense a head", mask=lambda draw: masks.Dense(draw.bools(2, 8, QUERIES, KEYS))),
    case("dense, rows of one", mask=lambda draw: draw.bools(1, 1, 1, KEYS), bias=(2, 1, QUERIES, 1)),
    case("predicate", mask=lambda draw: masks.Predicate(lambda q, k: (q * 3 + k) % 5 != 0)),
    case("not and or", SQUARE, mask=lambda draw: ~masks.Dense(draw.bools(KEYS, KEYS)) | masks.SlidingWindow(2, 2)),
    case("block sparse", SQUARE, mask=lambda draw: masks.BlockSparse(["1000", "0100", "1010", "1101"], 10)),
    case("nothing attends", mask=lambda draw: masks.SlidingWindow(0, 0) & masks.Causal(-1)),
    case("explicit positions", positions=lambda draw: (draw.integers(-1, 60, QUERIES), draw.integers(-1, 60, 2, KEYS)),
         options=dict(is_causal=True)),
    case("explicit keys", positions=lambda draw: (None, draw.integers(-1, 30, 2, KEYS)), options=dict(is_causal=True)),
    # axes
    case("neighborhood", GRID, mask=lambda draw: masks.Neighborhood((3, 2))),
    case("grid, causal along rows", GRID, bias=(1, 8, 8, 1, 8, 3),
         mask=lambda draw: masks.Causal(axis=0) & masks.KeyPadding(draw.bools(2, 8, 3))),
    case("second axis", query=(2, 3, QUERIES, 8, 3), key=(2, 3, KEYS, 4, 3), value=(2, 3, KEYS, 4, 5),
         options=dict(attention_axes=-3, **DROPOUT), mask=lambda draw: masks.KeyPadding(draw.bools(2, 3, KEYS))),
    case("no batch", query=(QUERIES, 4, 3), key=(KEYS, 4, 3), value=(KEYS, 4, 5), bias=(4, QUERIES, KEYS)),
    # other options
    case("bias, soft cap, sink", bias=(2, 8, QUERIES, KEYS), sink=(8,), mask=lambda draw: masks.Causal(),
         options=dict(logits_soft_cap=1.5)),
    case("bias a row", bias=(1, 8, QUERIES, 1), options=dict(is_causal=True)),
    case("score_mod", score_mod=_tilt, sink=(), mask=lambda draw: masks.Causal(4)),
    case("alibi", SQUARE, score_mod=lambda draw: modifiers.ALiBi(jnp.abs(draw(8))), options=dict(is_causal=True)),
    case("dropout", options=DROPOUT, mask=lambda draw: masks.Causal(11)),
    case("everything", score=lambda draw: scores.Additive(draw(8, 3)), bias=(2, 8, QUERIES, KEYS), score_mod=_tilt,
         sink=(8,), mask=lambda draw: masks.Causal(3) & masks.KeyPadding(draw.bools(2, KEYS)),
         options=dict(logits_soft_cap=2.0, **DROPOUT)),
    case("sigmoid", score_mod=lambda draw: modifiers.LogSigmoid(), mask=lambda draw: masks.Causal(2),
         options=dict(normalize=False)),
    case("function", mask=lambda draw: masks.Function(lambda b, head, q, k: (q - k < 9 * head) & (k != 3 + b))),
]  # fmt: skip
BY_NAME = {one.name: one for one in CASES}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a case is run over devices."""

    order: str
    exchange: str | None
    mode: str  # "auto", "explicit": over the whole mesh; "manual", "unchecked": inside `shard_map`

    @property
    def context(self) -> attnlib.Context:
        return attnlib.Context("x", self.order, self.exchange)

    def mesh(self) -> Any:
        """A data axis is left to the compiler, and the sequence lies along x."""
        kind = AxisType.Explicit if self.mode == "explicit" else AxisType.Auto
        return jax.make_mesh((2, DEVICES), ("data", "x"), axis_types=(kind,) * 2)


MODES = "auto", "explicit", "manual", "unchecked"
SETTINGS = [
    Setting(order, exchange, mode)
    for order in ("contiguous", "zigzag") for exchange in ("ring", "gather", "heads") for mode in MODES
]  # fmt: skip


class Arranged:
    """The arrays of a case in the order of a context, and how they are sharded."""

    def __init__(self, one: Case, setting: Setting):
        self.case, self.setting = one, setting
        self.axes = _axes.normalize(one.options.get("attention_axes"), len(one.query), trailing=2)
        self.sides = len(self.axes.attention)

    def arranged(self, trees: dict[str, Any]) -> dict[str, Any]:
        return self._mapped(trees, lambda array, axis: array if axis is None else self._reordered(array, axis))

    def specs(self, trees: dict[str, Any]) -> dict[str, Any]:
        def spec(array: Any, axis: int | None) -> P:
            return P() if axis is None else P(*("x" if n == axis else None for n in range(array.ndim)))

        return self._mapped(trees, spec)

    def results(self, output: Any, lse: Any) -> Any:
        """(output, lse) in the order of the context."""
        return self._reordered(output, self.axes.attention[0]), self._reordered(lse, len(self.axes.batch) + 1)

    def result_specs(self) -> Any:
        operand, rows = [None] * self.axes.rank, [None] * (len(self.axes.batch) + 1 + self.sides)
        operand[self.axes.attention[0]] = rows[len(self.axes.batch) + 1] = "x"
        return P(*operand), P(*rows)

    def _reordered(self, array: Any, axis: int) -> Any:
        if self.setting.order == "contiguous":
            return array
        return jnp.take(array, positions.zigzag(array.shape[axis], DEVICES), axis)

    def _mapped(self, trees: dict[str, Any], function: Any) -> dict[str, Any]:
        return {name: self._of(name, tree, function) for name, tree in trees.items()}

    def _of(self, name: str, tree: Any, function: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        if name in ("query", "key", "value"):
            entries = [self.axes.attention[0]]
        elif name == "bias" or (name == "mask" and not isinstance(tree, masks.Mask)):
            entries = [self._axis(tree, "pairs")]
        elif name == "mask":
            entries = [self._axis(x, of) for x, of in zip(leaves, entries_of_leaves(tree), strict=True)]
        elif name in ("query_positions", "key_positions"):
            entries = [leaf.ndim - 1 for leaf in leaves]
        else:
            entries = [None] * len(leaves)
        return structure.unflatten([function(x, axis) for x, axis in zip(leaves, entries, strict=True)])

    def _axis(self, array: Any, entry: str) -> int | None:
        if entry == "whole":
            return None
        axis = array.ndim - self.sides * (2 if entry == "pairs" else 1)
        return None if axis < 0 or array.shape[axis] == 1 else axis


def run(operands: Any, traced: Any, options: Any, **others: Any) -> Any:
    """(output, lse)."""
    return attnlib.attention(**operands, **traced, **options, **others, return_lse=True)


def one_device(one: Case) -> Any:
    """(results, gradients, tangents) of a case, in the order of positions."""
    return _derivatives(one, _function(one, None), cases.build(one)[0], lambda results: results)


def many_devices(one: Case, setting: Setting) -> Any:
    """Likewise over devices; results and their tangents are in the order of the context."""
    return _derivatives(one, _function(one, setting), cases.build(one)[0], _arrange(one, setting))


def _function(one: Case, setting: Setting | None) -> Any:
    """(output, lse) as a function of the operands in the order of positions."""
    _, traced, options = cases.build(one)
    if setting is None:
        return lambda operands: run(operands, traced, options, implementation="reference")
    arranged = Arranged(one, setting)

    def call(operands: Any, traced: Any) -> Any:
        return run(operands, traced, options, context=setting.context, block_sizes=_tile(setting))

    def function(operands: Any) -> Any:
        placed = [arranged.arranged(trees) for trees in (operands, traced)]
        specs = [arranged.specs(trees) for trees in placed]
        if setting.mode in ("manual", "unchecked"):
            mapped = jax.shard_map(
                call, in_specs=tuple(specs), out_specs=arranged.result_specs(), axis_names={"x"},
                check_vma=setting.mode == "manual",
            )  # fmt: skip
            return mapped(*placed)
        if setting.mode == "explicit":
            placed = jax.tree.map(_reshard, placed, specs)
        return call(*placed)

    return function


def _arrange(one: Case, setting: Setting) -> Any:
    """Brings results, or their cotangents, into the order and onto the devices of the context."""
    arranged = Arranged(one, setting)

    def arrange(results: Any) -> Any:
        results = arranged.results(*results)
        return jax.tree.map(_reshard, results, arranged.result_specs()) if setting.mode == "explicit" else results

    return arrange


def _tile(setting: Setting) -> Any:
    return TILE if setting.exchange != "heads" else None


def _reshard(array: Any, spec: P) -> Any:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array
    return reshard(array, spec)


def _derivatives(one: Case, function: Any, operands: Any, arrange: Any) -> Any:
    shapes = _result_shapes(one)
    cotangents, tangents = cases.like(shapes, 2), cases.like(operands, 1)

    def everything(operands: Any, tangents: Any, cotangents: Any) -> Any:
        finite = _finite(function)
        results, pullback = jax.vjp(finite, operands)
        _, tangent = jax.jvp(finite, (operands,), (tangents,))
        return results, pullback(list(arrange(cotangents)))[0], tangent

    return jax.jit(everything)(operands, tangents, cotangents)


def second_derivatives(one: Case, setting: Setting | None) -> Any:
    """Products of the second derivative of a loss with a vector: forward over reverse, and reverse over reverse."""
    operands, function = cases.build(one)[0], _function(one, setting)
    weights, tangents = cases.like(_result_shapes(one), 2), cases.like(operands, 1)

    def loss(operands: Any) -> Any:
        # The sum has one value in either order of the positions; its terms have to meet their own weights.
        arranged = weights if setting is None else _arrange(one, setting)(weights)
        terms = [jnp.sum(jnp.sin(x) * w) for x, w in zip(_finite(function)(operands), arranged, strict=True)]
        return sum(terms[1:], terms[0])

    def everything(operands: Any, tangents: Any) -> Any:
        gradient = jax.grad(loss)

        def along(operands: Any) -> Any:
            products = jax.tree.map(lambda x, y: jnp.sum(x * y), gradient(operands), tangents)
            return sum(jax.tree.leaves(products))

        return jax.jvp(gradient, (operands,), (tangents,))[1], jax.grad(along)(operands)

    return jax.jit(everything)(operands, tangents)


def _finite(function: Any) -> Any:
    return lambda operands: [jnp.where(jnp.isfinite(x), x, 0) for x in function(operands)]


def _result_shapes(one: Case) -> Any:
    operands, traced, options = cases.build(one)
    return jax.eval_shape(lambda: run(operands, traced, options, implementation="reference"))


def host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)
