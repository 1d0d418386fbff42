"""Conversions between pytrees and lists of leaves, which operations with custom derivative rules take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from attnlib._core.identity import node_types


@dataclasses.dataclass(frozen=True)
class TreeStructure:
    """A treedef with its classes. Equal structures build equal trees from equal leaves."""

    treedef: Any
    node_types: tuple[type, ...]  # may differ between two treedefs that compare equal

    @classmethod
    def of(cls, tree: Any) -> TreeStructure:
        treedef = jax.tree.structure(tree)
        return cls(treedef, node_types(treedef))

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        return self.treedef.unflatten(leaves)


def partial_in(
    function: Callable[[list[Any]], Any], indices: Sequence[int], leaves: Sequence[Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """The function as one of the leaves at `indices` alone, with all other leaves fixed; and these leaves."""

    def restricted(*values: Any) -> Any:
        replaced = dict(zip(indices, values, strict=True))
        return function([replaced.get(n, leaf) for n, leaf in enumerate(leaves)])

    return restricted, [leaves[n] for n in indices]
