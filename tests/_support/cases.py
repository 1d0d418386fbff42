"""One table of named cases, and how any of them is run on any implementation.

Those of scores, masks, modifiers and options are in the rows of their catalogues. A case holds factories, not arrays:
`build` draws the same operands each time.
"""

import functools
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import mask_catalogue
import numpy as np
import option_catalogue
import score_catalogue
from attention_case import GRID, GROUPED, VALUES, WHOLE, Case, Draw, of_length
from conftest import x64
from option_catalogue import ADDITIVE, DROPOUT

import attnlib
from attnlib import masks, scores
from attnlib._core.block_positions import OperandPositions
from attnlib._core.identity import node_types
from attnlib._core.options import Options
from attnlib._core.tile_kinds import tile_kinds
from attnlib._engine import call as _call
from attnlib._engine import dispatch as _choose
from attnlib._engine.blockwise.implementation import blockwise
from attnlib._engine.dispatch import NAMES as NAMES

# What blockwise does on a CPU with one device: with long operands, with short ones in one tile, and with few queries
# against many keys. Where block sizes cut the small operands here, it has all heads at once.
IN_TURN, IN_ONE_TILE, SIDE_BY_SIDE = (f"blockwise, {kind}" for kind in ("loop_over_heads", "dense", "decode"))
VARIANTS = {name: blockwise(name.split(", ")[1], name) for name in (IN_TURN, IN_ONE_TILE, SIDE_BY_SIDE)}

# Block sizes that cut the small operands here into several tiles, the last ones incomplete. With heads side by side
# there is one tile, and these are of what is computed again.
BLOCK_SIZES = {each.name: (3, 4) for each in _choose.IMPLEMENTATIONS if "block_sizes" in each.supports}
BLOCK_SIZES |= {IN_TURN: (4, 3), IN_ONE_TILE: None, SIDE_BY_SIDE: (64, 3)}


def kinds_of_tiles(mask, query_shape, key_shape, tile):
    """EMPTY, PARTIAL or FULL for each tile of a mask (None: of no mask)."""
    return tile_kinds(mask, OperandPositions(query_shape, "query"), OperandPositions(key_shape, "key"), tile)[0]


def _cases() -> list[Case]:
    return [
        *(case for row in score_catalogue.ROWS for case in row.all_cases()),
        # grouped heads
        Case("grouped", **GROUPED),
        Case("grouped additive", **GROUPED, **VALUES, score=lambda draw: scores.Additive(draw(6, 4))),
        Case("grouped, mask and bias a head", **GROUPED, mask=lambda draw: draw.bools(1, 6, 5, 7), bias=(2, 6, 1, 7)),
        Case("multi-query", query=(2, 5, 6, 4), key=(2, 7, 1, 4), value=(2, 7, 1, 3), bias=(1, 6, 5, 1)),
        # masks
        *(case for row in mask_catalogue.ROWS for case in row.all_cases()),
        Case("masks composed", **VALUES,
             mask=lambda draw: (masks.Causal(1) | ~masks.Dense(draw.bools(5, 7))) & masks.KeyPadding(draw.bools(2, 7))),
        Case("nothing attends", mask=lambda draw: masks.Dense(jnp.zeros((1, 1), bool))),
        # options, among them modifiers
        *(case for row in option_catalogue.ROWS for case in row.cases),
        # axes
        Case("no batch", query=(5, 3, 4), key=(7, 3, 4), value=(7, 3, 6), mask=lambda draw: draw.bools(3, 5, 7)),
        Case("two axes", **GRID, bias=(1, 2, 3, 4, 5, 2), mask=lambda draw: masks.Causal(axis=0)),
        Case("two axes, row-major", **GRID, **VALUES, mask=lambda draw: masks.Causal(), bias=(4, 1, 1)),
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
        *(Case(f"{queries} queries, {keys} keys", query=(2, queries, 3, 4), **of_length(keys),
               bias=(1, 1, queries, keys)) for queries, keys in [(1, 7), (13, 1), (11, 13), (0, 7), (5, 0)]),
        Case("no keys, causal", **of_length(0), options=dict(is_causal=True)),
        Case("no batch entries", query=(0, 5, 3, 4), key=(0, 7, 3, 4), value=(0, 7, 3, 6)),
        Case("one feature", query=(2, 5, 3, 1), key=(2, 7, 3, 1), value=(2, 7, 3, 1)),
        Case("longer", query=(1, 37, 2, 4), key=(1, 53, 2, 4), value=(1, 53, 2, 3),
             options=dict(is_causal=True, **DROPOUT)),
        # dtypes
        Case("bfloat16", dtype="bfloat16", mask=lambda draw: masks.KeyPadding(draw.bools(2, 7)), bias=(1, 7)),
        Case("float16", dtype="float16", **ADDITIVE, **VALUES, bias=(1, 7),
             mask=lambda draw: masks.KeyPadding(draw.bools(2, 7))),
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


@functools.cache
def features(case: Case) -> set[str]:
    """What a case has: kinds of scores, masks and modifiers, options, and how its operands are laid out."""
    draw = Draw(0, case.dtype)
    made = [make(draw) for make in (case.score, case.mask, case.score_mod) if make is not None]
    kinds = {kind for one in made for kind in (*node_types(one), type(one))}
    arrays = {name for name in ("bias", "sink", "positions") if getattr(case, name) is not None}
    return {
        *(kind.__name__ for kind in kinds if kind.__module__.startswith(("attnlib", "option_catalogue"))),
        *arrays, *case.options, case.dtype, f"rank {len(case.query)}",
        "grouped" if case.query[-2:-1] != case.key[-2:-1] else "each head its own",
    }  # fmt: skip


def run(operands: dict[str, Any], traced: dict[str, Any], options: dict[str, Any], implementation: str | None) -> Any:
    """(output, weights, lse)."""
    return attnlib.attention(
        **operands, **traced, **options, **by_name(implementation), return_weights=True, return_lse=True
    )


def by_name(implementation: str | None) -> dict[str, Any]:
    """The options that ask for an implementation, in several blocks where it has them."""
    how = VARIANTS.get(implementation, implementation)
    return dict(implementation=how, block_sizes=BLOCK_SIZES.get(implementation))


@functools.cache
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


def _takes_every_call(name: str) -> bool:
    """Whether an implementation takes every score, dtype and option of the kind that all know."""
    x = jax.ShapeDtypeStruct((1, 2, 1, 2), jnp.float32)
    everything = dict(
        score=scores.Additive(), mask=masks.Causal(), bias=np.zeros(2, np.float32), score_mod=lambda logit, *_: logit,
        sink=0.0, logits_soft_cap=1.0, dropout_rate=0.1, dropout_rng=jax.random.key(0), precision="highest",
        return_weights=True, return_lse=True,
    )  # fmt: skip
    return unsupported(name, x, x, x, **everything) is None


# The others have tests of their own, and are skipped with their reason where they refuse.
COMPLETE = tuple(name for name in NAMES if _takes_every_call(name))


def like(tree: Any, seed: int) -> Any:
    """Normal numbers in the shapes and dtypes of a tree: tangents and cotangents."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jax.device_put(draw.normal(size=x.shape).astype(x.dtype)), tree)


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
