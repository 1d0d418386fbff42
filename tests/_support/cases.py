"""One table of named cases, and how any of them is run on any implementation.

Every size of a case is distinct along its axes where the case allows it, so that a wrong axis cannot pass. A case
holds factories, not arrays: `build` draws the same operands each time.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from conftest import x64

import attnlib
from attnlib import masks, modifiers, scores
from attnlib._core.block_positions import OperandPositions
from attnlib._core.options import Options
from attnlib._core.tile_kinds import tile_kinds
from attnlib._engine import call as _call
from attnlib._engine import dispatch as _choose
from attnlib._engine.blockwise.implementation import blockwise
from attnlib._engine.dispatch import NAMES as NAMES

# Those that take every call; the others have tests of their own, and are skipped with their reason where they refuse.
COMPLETE = tuple(name for name in NAMES if name != "cudnn")

# What blockwise does with long operands on a CPU with one device, and there with few queries against many keys; with
# the small ones here it has all heads at once.
IN_TURN, SIDE_BY_SIDE = "blockwise, loop_over_heads", "blockwise, decode"
VARIANTS = {IN_TURN: blockwise("loop_over_heads", IN_TURN), SIDE_BY_SIDE: blockwise("decode", SIDE_BY_SIDE)}

# Block sizes that cut the small operands here into several tiles, the last ones incomplete. With heads side by side
# there is one tile, and these are of what is computed again.
BLOCK_SIZES = {"blockwise": (3, 4), IN_TURN: (4, 3), SIDE_BY_SIDE: (64, 3)}


def kinds_of_tiles(mask, query_shape, key_shape, tile):
    """EMPTY, PARTIAL or FULL for each tile of a mask (None: of no mask)."""
    return tile_kinds(mask, OperandPositions(query_shape, "query"), OperandPositions(key_shape, "key"), tile)[0]


class Draw:
    """Draws arrays for a case: normal floats in its dtype, bools, small integers."""

    def __init__(self, seed: int, dtype: str):
        self._rng, self.dtype = np.random.default_rng(seed), dtype

    def __call__(self, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.normal(size=shape).astype(jnp.dtype(self.dtype)))

    def bools(self, *shape: int, rate: float = 0.6) -> jax.Array:
        return jnp.asarray(self._rng.random(shape) < rate)

    def integers(self, low: int, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.integers(low, high, shape), jnp.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Operand shapes, and factories of everything else that an attention call takes."""

    name: str
    query: tuple[int, ...] = (2, 5, 3, 4)
    key: tuple[int, ...] = (2, 7, 3, 4)
    value: tuple[int, ...] = (2, 7, 3, 6)
    dtype: str = "float32"
    score: Callable[[Draw], Any] = lambda draw: scores.Dot()
    mask: Callable[[Draw], Any] | None = None
    bias: tuple[int, ...] | None = None
    score_mod: Callable[[Draw], Any] | None = None
    sink: tuple[int, ...] | None = None
    positions: Callable[[Draw], tuple[Any, Any]] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    second_order: bool = False  # also compared in second derivatives, which cost most to compile
    values_only: bool = False  # its derivatives are compared in the slow tests only

    def __str__(self) -> str:
        return self.name


def distance(query, key, sharpness):
    """A custom score with one parameter."""
    return -sharpness * jnp.sum((query - key) ** 2)


def unequal(query, key, matrix):
    """A custom score of query and key of different features."""
    return jnp.tanh(query @ matrix @ key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Tilt:
    """A modifier with parameters, nonlinear in the logit, that depends on all it is told."""

    table: Any

    def __call__(self, logit, batch, head, query_position, key_position):
        moved = self.table[head] * (sum(flat(key_position)) - sum(flat(query_position))).astype(logit.dtype)
        return jnp.tanh(logit) + 0.3 * moved + 0.1 * sum(flat(batch), start=jnp.int32(0)).astype(logit.dtype)


def flat(index):
    return index if isinstance(index, tuple) else (index,)


ADDITIVE = dict(score=lambda draw: scores.Additive(draw(3, 4)))
CUSTOM = dict(score=lambda draw: scores.Custom(distance, jnp.asarray(0.3, draw.dtype)))
GROUPED = dict(query=(2, 5, 6, 4), key=(2, 7, 2, 4), value=(2, 7, 2, 3))
GRID = dict(query=(2, 3, 4, 2, 6), key=(2, 5, 2, 2, 6), value=(2, 5, 2, 2, 7))  # two attention axes
SQUARE = dict(query=(2, 7, 3, 4), key=(2, 7, 3, 4), value=(2, 7, 3, 6))
WHOLE = (2, 3, 5, 7)  # the weights of the default shapes
DROPOUT = dict(dropout_rate=0.4)
# An implementation sees a mask through three methods alone (which pairs, which tiles, padded). So derivatives are made
# for each way a mask is laid out, not for each kind: none, static with full, partial and empty tiles, an array a batch
# index or head, a length that is traced, nothing. For the others, values show that the three methods agree.
VALUES = dict(values_only=True)


def _of(length: int) -> dict[str, Any]:
    return dict(key=(2, length, 3, 4), value=(2, length, 3, 6))


def _cases() -> list[Case]:
    return [
        # scores
        Case("dot", second_order=True),
        Case("dot scale a head", score=lambda draw: scores.Dot(draw(3))),
        Case("additive scale a feature", score=lambda draw: scores.Additive(draw(4))),
        Case("additive scale a head", **ADDITIVE, second_order=True),
        Case("concat", score=lambda draw: scores.Concat(draw(), draw())),
        Case("bilinear", score=lambda draw: scores.Bilinear(draw(4, 4))),
        Case("bilinear a head, unequal features", key=(2, 7, 3, 8), score=lambda draw: scores.Bilinear(draw(3, 4, 8))),
        Case("custom", **CUSTOM),
        Case("custom, unequal features", key=(2, 7, 3, 8), score=lambda draw: scores.Custom(unequal, draw(4, 8))),
        # grouped heads
        Case("grouped", **GROUPED),
        Case("grouped additive", **GROUPED, score=lambda draw: scores.Additive(draw(6, 4))),
        Case("grouped, mask and bias a head", **GROUPED, mask=lambda draw: draw.bools(1, 6, 5, 7), bias=(2, 6, 1, 7)),
        Case("multi-query", query=(2, 5, 6, 4), key=(2, 7, 1, 4), value=(2, 7, 1, 3), bias=(1, 6, 5, 1)),
        # masks, one of every kind
        Case("causal", mask=lambda draw: masks.Causal()),
        Case("is_causal and a mask", **VALUES, mask=lambda draw: draw.bools(2, 1, 5, 7), options=dict(is_causal=True)),
        Case("causal, offset a batch index", **VALUES, mask=lambda draw: masks.Causal(offset=draw.integers(-2, 5, 2))),
        Case("causal, negative offset", **VALUES, mask=lambda draw: masks.Causal(offset=-2)),
        Case("sliding window", **VALUES, mask=lambda draw: masks.SlidingWindow(2, 1)),
        Case("sliding window, one side open", **VALUES, mask=lambda draw: masks.SlidingWindow(None, 1)),
        Case("neighborhood", **VALUES, **SQUARE, mask=lambda draw: masks.Neighborhood(3)),
        Case("neighborhood, clipped and dilated", **VALUES, **SQUARE,
             mask=lambda draw: masks.Neighborhood(3, 2, "clip")),
        Case("block local", **VALUES, mask=lambda draw: masks.BlockLocal(3, before=1)),
        Case("block sparse", **VALUES, mask=lambda draw: masks.BlockSparse(["101", "011"], 3)),
        Case("dilated", **VALUES, mask=lambda draw: masks.Dilated(2)),
        Case("prefix", **VALUES, mask=lambda draw: masks.Prefix(draw.integers(0, 8, 2))),
        Case("causal or prefix", **VALUES, mask=lambda draw: masks.Causal() | masks.Prefix(3)),
        Case("lengths", mask=lambda draw: masks.Lengths(draw.integers(0, 6, 2), draw.integers(0, 8, 2))),
        Case("key padding", mask=lambda draw: masks.KeyPadding(draw.bools(2, 7))),
        Case("query padding", **VALUES, mask=lambda draw: masks.QueryPadding(draw.bools(2, 5))),
        Case("segments", **VALUES, **SQUARE, mask=lambda draw: masks.Segments(draw.integers(0, 3, 2, 7), padding_id=0)),
        Case("segments of two sides", **VALUES,
             mask=lambda draw: masks.Segments(draw.integers(0, 3, 2, 5), draw.integers(0, 3, 2, 7))),
        Case("predicate", **VALUES, mask=lambda draw: masks.Predicate(lambda q, k: (q + k) % 3 != 1)),
        Case("dense, whole", mask=lambda draw: draw.bools(*WHOLE)),
        Case("dense, a key row", **VALUES, mask=lambda draw: draw.bools(7)),
        Case("dense, a query column", **VALUES, mask=lambda draw: draw.bools(5, 1)),
        Case("dense, batch and head", mask=lambda draw: draw.bools(2, 3, 1, 1)),
        Case("masks composed", **VALUES,
             mask=lambda draw: (masks.Causal(1) | ~masks.Dense(draw.bools(5, 7))) & masks.KeyPadding(draw.bools(2, 7))),
        Case("nothing attends", mask=lambda draw: masks.Dense(jnp.zeros((1, 1), bool))),
        # biases of every broadcast
        *(
            Case(f"bias {shape}", bias=shape)
            for shape in [(), (7,), (5, 1), (1, 3, 1, 1), (2, 1, 5, 1), WHOLE]
        ),
        # soft cap and dropout
        Case("soft cap", bias=(5, 7), options=dict(logits_soft_cap=0.8), second_order=True),
        Case("soft cap, causal, additive", **ADDITIVE, options=dict(logits_soft_cap=2.0, is_causal=True)),
        Case("dropout", options=DROPOUT),
        Case("dropout, grouped, causal", **GROUPED, options=dict(**DROPOUT, is_causal=True)),
        Case("dropout, additive, padded", **ADDITIVE, options=DROPOUT,
             mask=lambda draw: masks.KeyPadding(draw.bools(2, 7))),
        # modifiers, sinks, explicit positions
        Case("alibi", score_mod=lambda draw: modifiers.ALiBi(draw(3)), bias=(5, 1), second_order=True),
        Case("bucketed bias", query=(2, 11, 3, 4), **_of(13),
             score_mod=lambda draw: modifiers.BucketedBias(draw(6, 3), max_distance=7)),
        Case("bucketed bias, causal, grouped", **GROUPED, options=dict(is_causal=True),
             score_mod=lambda draw: modifiers.BucketedBias(draw(5, 6), bidirectional=False, max_distance=4)),
        Case("relative bias, two axes", **GRID, score_mod=lambda draw: modifiers.RelativeBias(draw(3, 9, 2))),
        Case("score_mod, additive, dropout, soft cap", **ADDITIVE, score_mod=lambda draw: Tilt(draw(3)), sink=(3,),
             mask=lambda draw: draw.bools(2, 1, 5, 7), options=dict(logits_soft_cap=0.9, **DROPOUT)),
        Case("score_mod, no batch", query=(5, 3, 4), key=(7, 3, 4), value=(7, 3, 6),
             score_mod=lambda draw: Tilt(draw(3))),
        Case("score_mod, two batch axes", query=(3, 2, 2, 6), key=(5, 2, 2, 6), value=(5, 2, 2, 7), **CUSTOM,
             score_mod=lambda draw: Tilt(draw(2)), options=dict(attention_axes=(0,))),
        Case("score_mod, two batch axes before", query=(2, 3, 4, 2, 6), key=(1, 3, 5, 2, 6), value=(2, 1, 5, 2, 7),
             score_mod=lambda draw: Tilt(draw(2)), options=dict(attention_axes=-3)),
        Case("sink", sink=(3,), second_order=True),
        Case("sink, rows of nothing", sink=(), mask=lambda draw: masks.Lengths(draw.integers(0, 6, 2), 5)),
        Case("sink, grouped, causal, dropout", **GROUPED, sink=(6,), options=dict(is_causal=True, **DROPOUT)),
        Case("positions", options=dict(is_causal=True),
             positions=lambda draw: (draw.integers(-1, 9, 2, 5), draw.integers(-1, 9, 7))),
        Case("positions, modified", **GROUPED, mask=lambda draw: masks.SlidingWindow(3, 2),
             score_mod=lambda draw: Tilt(draw(6)),
             positions=lambda draw: (None, draw.integers(-2, 6, 2, 7))),
        # axes
        Case("no batch", query=(5, 3, 4), key=(7, 3, 4), value=(7, 3, 6), mask=lambda draw: draw.bools(3, 5, 7)),
        Case("two axes", **GRID, bias=(1, 2, 3, 4, 5, 2), mask=lambda draw: masks.Causal(axis=0)),
        Case("two axes, row-major", **GRID, mask=lambda draw: masks.Causal(), bias=(4, 1, 1)),
        Case("two axes, partly broadcast", **GRID, mask=lambda draw: draw.bools(3, 1, 1, 2), bias=(1, 4, 5, 1)),
        Case("two axes, neighborhood", query=(2, 5, 4, 2, 6), key=(2, 5, 4, 2, 6), value=(2, 5, 4, 2, 7),
             mask=lambda draw: masks.Neighborhood((3, 2))),
        Case("second axis", query=(2, 3, 4, 2, 6), key=(2, 3, 5, 2, 6), value=(2, 3, 5, 2, 7),
             options=dict(attention_axes=-3), mask=lambda draw: masks.KeyPadding(draw.bools(2, 3, 5))),
        Case("first axis", query=(3, 2, 2, 6), key=(5, 2, 2, 6), value=(5, 2, 2, 7),
             options=dict(attention_axes=(0,)), bias=(2, 2, 3, 5)),
        Case("outer axes, reversed", query=(3, 2, 4, 2, 6), key=(5, 2, 3, 2, 6), value=(5, 2, 3, 2, 7),
             options=dict(attention_axes=(-3, 0)), mask=lambda draw: masks.Causal(), bias=(2, 2, 4, 3, 3, 5)),
        Case("batch of one broadcasts", key=(1, 7, 3, 4), value=(1, 7, 3, 6),
             mask=lambda draw: masks.KeyPadding(draw.bools(2, 7))),
        Case("query of one broadcasts", query=(1, 5, 3, 4), bias=(2, 1, 1, 7)),
        # lengths
        *(Case(f"{queries} queries, {keys} keys", query=(2, queries, 3, 4), **_of(keys), bias=(1, 1, queries, keys))
          for queries, keys in [(1, 7), (13, 1), (11, 13), (0, 7), (5, 0)]),
        Case("no keys, causal", **_of(0), options=dict(is_causal=True)),
        Case("no batch entries", query=(0, 5, 3, 4), key=(0, 7, 3, 4), value=(0, 7, 3, 6)),
        Case("one feature", query=(2, 5, 3, 1), key=(2, 7, 3, 1), value=(2, 7, 3, 1)),
        Case("longer", query=(1, 37, 2, 4), key=(1, 53, 2, 4), value=(1, 53, 2, 3),
             options=dict(is_causal=True, **DROPOUT)),
        # dtypes
        Case("bfloat16", dtype="bfloat16", mask=lambda draw: masks.KeyPadding(draw.bools(2, 7)), bias=(1, 7)),
        Case("float16", dtype="float16", **ADDITIVE, mask=lambda draw: masks.KeyPadding(draw.bools(2, 7)), bias=(1, 7)),
        Case("float64", dtype="float64", mask=lambda draw: masks.KeyPadding(draw.bools(2, 7)), bias=(1, 7)),
        Case("float64 everything", dtype="float64", **ADDITIVE, mask=lambda draw: draw.bools(2, 1, 5, 7), bias=WHOLE,
             options=dict(logits_soft_cap=1.5, is_causal=True, **DROPOUT)),
    ]  # fmt: skip


CASES = _cases()
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "two cases share a name"


def context(case: Case):
    """Where its dtype exists."""
    return x64(case.dtype == "float64")


def build(case: Case) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(what can be differentiated, what is traced besides, static options); call it in `context(case)`."""
    draw = Draw(zlib.crc32(case.name.encode()), case.dtype)
    operands = {
        "query": draw(*case.query), "key": draw(*case.key), "value": draw(*case.value), "score": case.score(draw)
    }  # fmt: skip
    if case.bias is not None:
        operands["bias"] = draw(*case.bias)
    if case.score_mod is not None:
        operands["score_mod"] = case.score_mod(draw)
    if case.sink is not None:
        operands["sink"] = draw(*case.sink)
    traced = {} if case.mask is None else {"mask": case.mask(draw)}
    if case.positions is not None:
        traced["query_positions"], traced["key_positions"] = case.positions(draw)
    if "dropout_rate" in case.options:
        traced["dropout_rng"] = jax.random.key(zlib.crc32(case.name.encode()))
    return operands, traced, case.options


def run(operands: dict[str, Any], traced: dict[str, Any], options: dict[str, Any], implementation: str | None) -> Any:
    """(output, weights, lse)."""
    return attnlib.attention(
        **operands, **traced, **options, **by_name(implementation), return_weights=True, return_lse=True
    )


def by_name(implementation: str | None) -> dict[str, Any]:
    """The options that ask for an implementation, in several blocks where it has them."""
    how = VARIANTS.get(implementation, implementation)
    return dict(implementation=how, block_sizes=BLOCK_SIZES.get(implementation))


def refusal(case: Case, name: str) -> str | None:
    """Why an implementation does not run a case; None where it does."""
    with context(case):
        operands, traced, options = build(case)
        return unsupported(name, **operands, **traced, **options, return_weights=True, return_lse=True)


def unsupported(name: str, query: Any, key: Any, value: Any, *, score: Any = None, **options: Any) -> str | None:
    """Why an implementation refuses a call; None where it runs. `explain` says so too, but counts the cost besides."""
    score = scores.Dot() if score is None else score
    arguments = _call.arguments(query, key, value, score, Options(**{**options, **by_name(name)}))
    problem = jax.eval_shape(lambda arguments: _call.canonicalize(arguments)[0], arguments)
    asked = arguments.options.implementation
    made = asked if not isinstance(asked, str) else next(one for one in _choose.IMPLEMENTATIONS if one.name == asked)
    reason = made.refusal(problem)
    return None if reason is None else reason.splitlines()[0]


def like(tree: Any, seed: int) -> Any:
    """Normal numbers in the shapes and dtypes of a tree: tangents and cotangents."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape).astype(x.dtype)), tree)


def derivatives(case: Case, name: str) -> dict[str, Any]:
    """Values, a tangent and a pullback of a case, all from one compiled program."""

    @jax.jit
    def everything(operands, traced, tangents, cotangents):
        def function(operands):
            return run(operands, traced, case.options, name)

        results, pullback = jax.vjp(function, operands)
        _, tangent = jax.jvp(function, (operands,), (tangents,))
        return dict(results=results, tangent=tangent, gradients=pullback(cotangents)[0])

    with context(case):
        operands, traced, options = build(case)
        shapes = jax.eval_shape(lambda *args: run(*args, options, name), operands, traced)
        tangents, cotangents = like(operands, 1), like(shapes, 2)
        made = everything(operands, traced, tangents, cotangents)
        return dict(**made, operands=operands, tangents=tangents, cotangents=cotangents)


def values(case: Case, names: Iterable[str]) -> dict[str, Any]:
    """Values of a case by name of what computes them, all from one compiled program."""

    @jax.jit
    def everything(operands, traced):
        made = {}
        for name in names:
            made[name] = run(operands, traced, case.options, name)
        return made

    with context(case):
        return everything(*build(case)[:2])


def second_derivatives(case: Case, name: str) -> dict[str, Any]:
    """Products of the second derivative of a scalar with a vector, by forward over reverse and reverse over reverse."""

    @jax.jit
    def everything(operands, traced, tangents):
        def loss(operands):
            output, weights, lse = run(operands, traced, case.options, name)
            lse = jnp.where(jnp.isfinite(lse), lse, 0)
            return jnp.sum(jnp.sin(output)) + jnp.sum(weights**2) + jnp.sum(jnp.cos(lse))

        gradient, forward = jax.jvp(jax.grad(loss), (operands,), (tangents,))
        _, pullback = jax.vjp(jax.grad(loss), operands)
        return dict(gradient=gradient, forward=forward, reverse=pullback(tangents)[0])

    with context(case):
        operands, traced, _ = build(case)
        return everything(operands, traced, like(operands, 3))
