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
from attnlib._autodiff.linear_map import ExposesJaxpr, HashablePartial
from attnlib._core.identity import node_types
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
      natively: gives the output, and has a reverse mode; `training` says that a backward pass will follow.
      generally: gives the output too, and has every derivative.
      elsewhere: whether a program that is lowered for another platform than CUDA is to run `fallback_fn`.
    """
    leaves, tree = jax.tree.flatten(problem)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    floating = tuple(bool(jnp.issubdtype(leaf.dtype, jnp.inexact)) for leaf in leaves)
    pairs = list(zip(leaves, floating, strict=True))
    differentiable, constant = [leaf for leaf, can in pairs if can], [leaf for leaf, can in pairs if not can]
    return _output(
        _SplitProblem(tree, node_types(tree), floating, native_fn, fallback_fn, off_platform),
        False,
        differentiable,
        constant,
    )


@dataclasses.dataclass(frozen=True)
class _SplitProblem:
    """All that is static of a problem and how it is computed; with its leaves it is the problem again."""

    tree: Any
    node_types: tuple[type, ...]  # of the tree: two equal ones may differ in their classes
    floating: tuple[bool, ...]  # which leaves can have derivatives
    native_fn: Callable[[AttentionProblem, bool], jax.Array]
    fallback_fn: Callable[[AttentionProblem], jax.Array]
    off_platform: bool

    def problem(self, differentiable: Leaves, constant: Leaves) -> AttentionProblem:
        differentiable_, constant_ = iter(differentiable), iter(constant)
        problem: AttentionProblem = self.tree.unflatten(
            [next(differentiable_ if can else constant_) for can in self.floating]
        )
        return problem

    def split(self, leaves: Leaves) -> tuple[list[jax.Array], list[jax.Array]]:
        count = sum(self.floating)
        return list(leaves[:count]), list(leaves[count:])

    def native(self, training: bool, differentiable: Leaves, constant: Leaves) -> jax.Array:
        return self.native_fn(self.problem(differentiable, constant), training)

    def general(self, differentiable: Leaves, constant: Leaves) -> jax.Array:
        return self.fallback_fn(self.problem(differentiable, constant))

    def choose(self, native: Callable[..., Any], general: Callable[..., Any], *arrays: Any) -> Any:
        if not self.off_platform:
            return native(*arrays)
        return jax.lax.platform_dependent(*arrays, cuda=native, default=general)


def _output(call: _SplitProblem, training: bool, differentiable: Leaves, constant: Leaves) -> jax.Array:
    """The output; `differentiable` are the leaves that can have derivatives."""
    return call_with_rule(
        ExposesJaxpr(HashablePartial(_run, (call, training))),
        HashablePartial(_output_rule, (call,)),
        (*differentiable, *constant),
    )[0]


def _run(call: _SplitProblem, training: bool, *leaves: jax.Array) -> list[jax.Array]:
    return [call.choose(partial(call.native, training), call.general, *call.split(leaves))]


def _output_rule(call: _SplitProblem, perturbed: tuple[int, ...], leaves: Leaves, changes: Leaves) -> Any:
    output = _output(call, True, *call.split(leaves))
    forward, transpose = HashablePartial(_tangent, (call,)), ExposesJaxpr(HashablePartial(_transpose, (call,)))
    return [output], linear_tangent(forward, transpose, leaves, perturbed, changes)


def _tangent(call: _SplitProblem, perturbed: tuple[int, ...], residuals: Leaves, tangents: Leaves) -> list[jax.Array]:
    differentiable, constant = call.split(residuals)
    function = partial_in(lambda differentiable: call.general(differentiable, constant), perturbed, differentiable)
    return [jax.jvp(function, [differentiable[n] for n in perturbed], list(tangents))[1]]


def _transpose(
    call: _SplitProblem, perturbed: tuple[int, ...], residuals: Leaves, cotangents: Leaves
) -> list[jax.Array]:
    """Cotangents of the active leaves from that of the output."""
    args = (cotangents[0], *residuals)
    return call_with_rule(
        ExposesJaxpr(HashablePartial(_vjp, (call, perturbed))), HashablePartial(_vjp_rule, (call, perturbed)), args
    )


def _vjp(call: _SplitProblem, perturbed: tuple[int, ...], cotangent: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
    native = partial(_vjp_of, partial(call.native, True), perturbed)
    return call.choose(native, partial(_vjp_of, call.general, perturbed), cotangent, *call.split(leaves))


def _vjp_of(
    function: Callable[[Leaves, Leaves], jax.Array],
    perturbed: tuple[int, ...],
    cotangent: jax.Array,
    differentiable: Leaves,
    constant: Leaves,
) -> list[jax.Array]:
    of_active = partial_in(lambda differentiable: function(differentiable, constant), perturbed, differentiable)
    _, pullback = jax.vjp(of_active, *(differentiable[n] for n in perturbed))
    return list(pullback(cotangent))


def _vjp_rule(
    call: _SplitProblem, perturbed: tuple[int, ...], perturbed_args: tuple[int, ...], args: Leaves, changes: Leaves
) -> Any:
    def general(args: Leaves) -> list[jax.Array]:
        return _vjp_of(call.general, perturbed, args[0], *call.split(args[1:]))

    results = _transpose(call, perturbed, args[1:], args[:1])
    function = partial_in(general, perturbed_args, args)
    return results, jax.jvp(function, [args[n] for n in perturbed_args], list(changes))[1]


def partial_in(function: Callable[[Leaves], Any], perturbed: tuple[int, ...], leaves: Leaves) -> Callable[..., Any]:
    """The function of the active leaves, the others being as they are."""

    def of_active(*values: jax.Array) -> Any:
        whole = list(leaves)
        for n, value in zip(perturbed, values, strict=True):
            whole[n] = value
        return function(whole)

    return of_active
