"""All derivatives of an implementation that has only a backward pass, by another implementation.

`native_fn` and `fallback_fn` compute the same function. The tangent of the output is a linear map: its forward pass is
the tangent of `fallback_fn`, and its transpose is the backward pass of `native_fn`. All further derivatives are those
of `fallback_fn`. So training runs `native_fn` alone, and every other derivative exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attnlib._autodiff.custom_rule import call_with_rule, linear_tangent
from attnlib._autodiff.leaves import TreeStructure, partial_in
from attnlib._autodiff.linear_map import HashablePartial
from attnlib._core.problem import AttentionProblem

Leaves = Sequence[jax.Array]


def with_fallback_derivatives(
    problem: AttentionProblem,
    native_fn: Callable[[AttentionProblem, bool], jax.Array],
    fallback_fn: Callable[[AttentionProblem], jax.Array],
    off_platform: bool,
) -> jax.Array:
    """`native_fn(problem, training)`, with derivatives of every order.

    Args:
      problem: what to compute.
      native_fn: gives the output, and has a reverse mode; `training` says that a backward pass will follow.
      fallback_fn: gives the output too, and has every derivative.
      off_platform: whether a program that is lowered for another platform than CUDA is to run `fallback_fn`.
    """
    problem = jax.tree.map(jnp.asarray, problem)
    split = _SplitProblem(TreeStructure.of(problem), native_fn, fallback_fn, off_platform)
    return _output(split, False, jax.tree.leaves(problem))


_VALUE = 2  # among the leaves of a problem


@dataclasses.dataclass(frozen=True)
class _SplitProblem:
    """The static part of a problem, and the functions that compute it."""

    structure: TreeStructure  # of the problem
    native_fn: Callable[[AttentionProblem, bool], jax.Array]
    fallback_fn: Callable[[AttentionProblem], jax.Array]
    off_platform: bool

    def native(self, training: bool, leaves: Leaves) -> jax.Array:
        return self.native_fn(self.structure.unflatten(leaves), training)

    def general(self, leaves: Leaves) -> jax.Array:
        return self.fallback_fn(self.structure.unflatten(leaves))

    def choose(self, native: Callable[..., Any], general: Callable[..., Any], *args: Any) -> Any:
        if not self.off_platform:
            return native(*args)
        return jax.lax.platform_dependent(*args, cuda=native, default=general)


def _output(split: _SplitProblem, training: bool, leaves: Leaves) -> jax.Array:
    run = HashablePartial(_run, (split, training), exposes_jaxpr=True)
    return call_with_rule(run, HashablePartial(_output_rule, (split,)), leaves, linear=((_VALUE, (0,)),))[0]


def _run(split: _SplitProblem, training: bool, *leaves: jax.Array) -> list[jax.Array]:
    return [split.choose(partial(split.native, training), split.general, leaves)]


def _output_rule(split: _SplitProblem, perturbed: tuple[int, ...], leaves: Leaves, tangents: Leaves) -> Any:
    output = _output(split, True, leaves)
    forward, transpose = HashablePartial(_tangent, (split,)), HashablePartial(_transpose, (split,), exposes_jaxpr=True)
    return [output], linear_tangent(forward, transpose, leaves, perturbed, tangents, [output])


def _tangent(split: _SplitProblem, perturbed: tuple[int, ...], leaves: Leaves, tangents: Leaves) -> list[jax.Array]:
    return [jax.jvp(*partial_in(split.general, perturbed, leaves), list(tangents))[1]]


def _transpose(split: _SplitProblem, perturbed: tuple[int, ...], leaves: Leaves, cotangents: Leaves) -> list[jax.Array]:
    """Cotangents of the perturbed leaves from that of the output."""
    run = HashablePartial(_vjp, (split, perturbed), exposes_jaxpr=True)
    return call_with_rule(run, HashablePartial(_vjp_rule, (split, perturbed)), (cotangents[0], *leaves))


def _vjp(split: _SplitProblem, perturbed: tuple[int, ...], cotangent: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
    native = partial(_vjp_of, partial(split.native, True), perturbed)
    return split.choose(native, partial(_vjp_of, split.general, perturbed), cotangent, leaves)


def _vjp_of(
    function: Callable[[Leaves], jax.Array], perturbed: tuple[int, ...], cotangent: jax.Array, leaves: Leaves
) -> list[jax.Array]:
    restricted, values = partial_in(function, perturbed, leaves)
    _, pullback = jax.vjp(restricted, *values)
    return list(pullback(cotangent))


def _vjp_rule(
    split: _SplitProblem, perturbed: tuple[int, ...], perturbed_args: tuple[int, ...], args: Leaves, tangents: Leaves
) -> Any:
    def general(args: Leaves) -> list[jax.Array]:
        return _vjp_of(split.general, perturbed, args[0], args[1:])

    results = _transpose(split, perturbed, args[1:], args[:1])
    return results, jax.jvp(*partial_in(general, perturbed_args, args), list(tangents))[1]
