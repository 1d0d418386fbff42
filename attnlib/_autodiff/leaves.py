"""Pytrees as rows of leaves, which is what operations with derivative rules of their own take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from attnlib._core.identity import node_types


@dataclasses.dataclass(frozen=True)
class TreeStructure:
    """What of a pytree is not its leaves; equal ones make equal trees of equal leaves."""

    treedef: Any
    node_types: tuple[type, ...]  # its classes, which two equal treedefs may differ in

    @classmethod
    def of(cls, tree: Any) -> TreeStructure:
        treedef = jax.tree.structure(tree)
        return cls(treedef, node_types(treedef))

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        return self.treedef.unflatten(leaves)


def partial_in(
    function: Callable[[list[Any]], Any], indices: Sequence[int], leaves: Sequence[Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """(a function of a row of leaves as one of those entries alone, the others being as they are; their values)."""

    def restricted(*values: Any) -> Any:
        replaced = dict(zip(indices, values, strict=True))
        return function([replaced.get(n, leaf) for n, leaf in enumerate(leaves)])

    return restricted, [leaves[n] for n in indices]
