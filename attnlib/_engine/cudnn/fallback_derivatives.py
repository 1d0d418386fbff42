"""Derivatives for an implementation that has a backward pass of its own and no others, borrowed from another one.

The output of `natively` has a linear map for its tangent: the tangent of `generally`, another implementation of the
same function, with the backward pass of `natively` as its transpose. What is derived further, by either mode, is
derived from `generally`; so training runs `natively` alone, and every other derivative exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attnlib._autodiff.custom_rule import ruled, tangent_of
from attnlib._autodiff.linear_map import Bound, Shown
from attnlib._core.identity import node_types
from attnlib._core.problem import Problem

Leaves = Sequence[jax.Array]


def output_of(
    problem: Problem,
    natively: Callable[[Problem, bool], jax.Array],
    generally: Callable[[Problem], jax.Array],
    elsewhere: bool,
) -> jax.Array:
    """`natively(problem, training)`, with derivatives of every order.

    Args:
      problem: what to compute.
      natively: gives the output, and has a reverse mode; `training` says that a backward pass will follow.
      generally: gives the output too, and has every derivative.
      elsewhere: whether a program that is lowered for another platform than CUDA is to run `generally`.
    """
    leaves, tree = jax.tree.flatten(problem)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    floating = tuple(bool(jnp.issubdtype(leaf.dtype, jnp.inexact)) for leaf in leaves)
    pairs = list(zip(leaves, floating, strict=True))
    moving, fixed = [leaf for leaf, can in pairs if can], [leaf for leaf, can in pairs if not can]
    return _output(_Call(tree, node_types(tree), floating, natively, generally, elsewhere), False, moving, fixed)


@dataclasses.dataclass(frozen=True)
class _Call:
    """All that is static of a problem and how it is computed; with its leaves it is the problem again."""

    tree: Any
    node_types: tuple[type, ...]  # of the tree: two equal ones may differ in their classes
    floating: tuple[bool, ...]  # which leaves can have derivatives
    natively: Callable[[Problem, bool], jax.Array]
    generally: Callable[[Problem], jax.Array]
    elsewhere: bool

    def problem(self, moving: Leaves, fixed: Leaves) -> Problem:
        moving_, fixed_ = iter(moving), iter(fixed)
        problem: Problem = self.tree.unflatten([next(moving_ if can else fixed_) for can in self.floating])
        return problem

    def split(self, leaves: Leaves) -> tuple[list[jax.Array], list[jax.Array]]:
        count = sum(self.floating)
        return list(leaves[:count]), list(leaves[count:])

    def native(self, training: bool, moving: Leaves, fixed: Leaves) -> jax.Array:
        return self.natively(self.problem(moving, fixed), training)

    def general(self, moving: Leaves, fixed: Leaves) -> jax.Array:
        return self.generally(self.problem(moving, fixed))

    def choose(self, native: Callable[..., Any], general: Callable[..., Any], *arrays: Any) -> Any:
        if not self.elsewhere:
            return native(*arrays)
        return jax.lax.platform_dependent(*arrays, cuda=native, default=general)


def _output(call: _Call, training: bool, moving: Leaves, fixed: Leaves) -> jax.Array:
    """The output; `moving` are the leaves that can have derivatives."""
    return ruled(Shown(Bound(_run, (call, training))), Bound(_output_rule, (call,)), (*moving, *fixed))[0]


def _run(call: _Call, training: bool, *leaves: jax.Array) -> list[jax.Array]:
    return [call.choose(partial(call.native, training), call.general, *call.split(leaves))]


def _output_rule(call: _Call, active: tuple[int, ...], leaves: Leaves, changes: Leaves) -> Any:
    output = _output(call, True, *call.split(leaves))
    forward, transpose = Bound(_tangent, (call,)), Shown(Bound(_transpose, (call,)))
    return [output], tangent_of(forward, transpose, leaves, active, changes)


def _tangent(call: _Call, active: tuple[int, ...], residuals: Leaves, tangents: Leaves) -> list[jax.Array]:
    moving, fixed = call.split(residuals)
    function = _of_active(lambda moving: call.general(moving, fixed), active, moving)
    return [jax.jvp(function, [moving[n] for n in active], list(tangents))[1]]


def _transpose(call: _Call, active: tuple[int, ...], residuals: Leaves, cotangents: Leaves) -> list[jax.Array]:
    """Cotangents of the active leaves from that of the output."""
    args = (cotangents[0], *residuals)
    return ruled(Shown(Bound(_pull, (call, active))), Bound(_pull_rule, (call, active)), args)


def _pull(call: _Call, active: tuple[int, ...], cotangent: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
    native = partial(_pull_of, partial(call.native, True), active)
    return call.choose(native, partial(_pull_of, call.general, active), cotangent, *call.split(leaves))


def _pull_of(
    function: Callable[[Leaves, Leaves], jax.Array],
    active: tuple[int, ...],
    cotangent: jax.Array,
    moving: Leaves,
    fixed: Leaves,
) -> list[jax.Array]:
    of_active = _of_active(lambda moving: function(moving, fixed), active, moving)
    _, pullback = jax.vjp(of_active, *(moving[n] for n in active))
    return list(pullback(cotangent))


def _pull_rule(call: _Call, active: tuple[int, ...], changing: tuple[int, ...], args: Leaves, changes: Leaves) -> Any:
    def general(args: Leaves) -> list[jax.Array]:
        return _pull_of(call.general, active, args[0], *call.split(args[1:]))

    results = _transpose(call, active, args[1:], args[:1])
    function = _of_active(general, changing, args)
    return results, jax.jvp(function, [args[n] for n in changing], list(changes))[1]


def _of_active(function: Callable[[Leaves], Any], active: tuple[int, ...], leaves: Leaves) -> Callable[..., Any]:
    """The function of the active leaves, the others being as they are."""

    def of_active(*values: jax.Array) -> Any:
        whole = list(leaves)
        for n, value in zip(active, values, strict=True):
            whole[n] = value
        return function(whole)

    return of_active
