"""Derivatives for an implementation that has a backward pass of its own and no others, borrowed from another one.

The output of `native_fn` has a linear map for its tangent: the tangent of `fallback_fn`, another implementation of the
same function, with the backward pass of `native_fn` as its transpose. What is derived further, by either mode, is
derived from `fallback_fn`; so training runs `native_fn` alone, and every other derivative exists.
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
    call = _Call(TreeStructure.of(problem), native_fn, fallback_fn, off_platform)
    return _output(call, False, jax.tree.leaves(problem))


@dataclasses.dataclass(frozen=True)
class _Call:
    """All that is static of a problem and how it is computed."""

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


def _output(call: _Call, training: bool, leaves: Leaves) -> jax.Array:
    run = HashablePartial(_run, (call, training), exposes_jaxpr=True)
    return call_with_rule(run, HashablePartial(_output_rule, (call,)), leaves)[0]


def _run(call: _Call, training: bool, *leaves: jax.Array) -> list[jax.Array]:
    return [call.choose(partial(call.native, training), call.general, leaves)]


def _output_rule(call: _Call, perturbed: tuple[int, ...], leaves: Leaves, changes: Leaves) -> Any:
    output = _output(call, True, leaves)
    forward, transpose = HashablePartial(_tangent, (call,)), HashablePartial(_transpose, (call,), exposes_jaxpr=True)
    return [output], linear_tangent(forward, transpose, leaves, perturbed, changes)


def _tangent(call: _Call, perturbed: tuple[int, ...], leaves: Leaves, tangents: Leaves) -> list[jax.Array]:
    return [jax.jvp(*partial_in(call.general, perturbed, leaves), list(tangents))[1]]


def _transpose(call: _Call, perturbed: tuple[int, ...], leaves: Leaves, cotangents: Leaves) -> list[jax.Array]:
    """Cotangents of the active leaves from that of the output."""
    run = HashablePartial(_vjp, (call, perturbed), exposes_jaxpr=True)
    return call_with_rule(run, HashablePartial(_vjp_rule, (call, perturbed)), (cotangents[0], *leaves))


def _vjp(call: _Call, perturbed: tuple[int, ...], cotangent: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
    native = partial(_vjp_of, partial(call.native, True), perturbed)
    return call.choose(native, partial(_vjp_of, call.general, perturbed), cotangent, leaves)


def _vjp_of(
    function: Callable[[Leaves], jax.Array], perturbed: tuple[int, ...], cotangent: jax.Array, leaves: Leaves
) -> list[jax.Array]:
    of_active, values = partial_in(function, perturbed, leaves)
    _, pullback = jax.vjp(of_active, *values)
    return list(pullback(cotangent))


def _vjp_rule(
    call: _Call, perturbed: tuple[int, ...], perturbed_args: tuple[int, ...], args: Leaves, changes: Leaves
) -> Any:
    def general(args: Leaves) -> list[jax.Array]:
        return _vjp_of(call.general, perturbed, args[0], args[1:])

    results = _transpose(call, perturbed, args[1:], args[:1])
    return results, jax.jvp(*partial_in(general, perturbed_args, args), list(changes))[1]
