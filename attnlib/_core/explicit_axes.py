"""Arrays whose type contains a sharding: those on a mesh with Explicit axes, the default of `jax.make_mesh`.

JAX then requires the sharding of each result to follow from the types of the operands. Where it does not, as in
`table[index]` with a sharded index or in a comparison with positions that are not sharded, the caller has to state it.
attnlib computes on Auto axes instead, on which the compiler finds the shardings of all that is between. It states the
sharding of results alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

Partition = tuple[Any, ...]  # the mesh axis or axes of each axis of an array, or None

reshard: Callable[[Any, Any], Any] = getattr(jax, "reshard", None) or jax.sharding.reshard  # of jax 0.8


def partition(array: Any) -> Partition:
    """The Explicit mesh axes of each axis of an array."""
    spec = tuple(_sharding(array).spec)
    return (*spec, *(None,) * (array.ndim - len(spec)))


def is_sharded(tree: Any) -> bool:
    """Whether an array of a tree is sharded over an Explicit axis."""
    return any(any(_sharding(leaf).spec) for leaf in jax.tree.leaves(tree))


def replicated(tree: Any) -> Any:
    """The tree with the whole of each array on all devices."""
    leaves, structure = jax.tree.flatten(tree)
    sharded = {n for n, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and is_sharded(leaf)}
    if not sharded:
        return tree
    for n in sharded:
        leaves[n] = reshard(leaves[n], NamedSharding(_mesh(leaves[n]), PartitionSpec()))
    return jax.tree.unflatten(structure, leaves)


def sharded_like(array: Any, other: Any) -> Any:
    """The array, with those of its first axes sharded like another array's that have the same size."""
    if not is_sharded(other) or is_sharded(array):
        return array
    sizes = zip(array.shape, other.shape, partition(other), strict=False)
    names = [names if size == other_size else None for size, other_size, names in sizes]
    return reshard(array, NamedSharding(_mesh(other), PartitionSpec(*names)))


def on_auto_axes(function: Callable[..., Any], args: Sequence[Any], results: Any) -> Any:
    """`function(*args)`, computed on Auto axes.

    Args:
      results: the `PartitionSpec` of each result, in a tree like the results or in a prefix of it.
    """
    leaves, structure = jax.tree.flatten(list(args))
    # A leaf without a mesh fits every mesh. Its cotangent must not get one.
    on_mesh = [n for n, leaf in enumerate(leaves) if not _sharding(leaf).mesh.empty]
    mesh = next(_sharding(leaf).mesh for leaf in leaves if any(_sharding(leaf).spec))

    def run(*parts: Any) -> Any:
        values = list(leaves)
        for n, part in zip(on_mesh, parts, strict=True):
            values[n] = part
        return function(*jax.tree.unflatten(structure, values))

    out = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), results, is_leaf=lambda node: isinstance(node, PartitionSpec)
    )
    return jax.sharding.auto_axes(run, axes=mesh.explicit_axes, out_sharding=out)(*(leaves[n] for n in on_mesh))


def _mesh(array: Any) -> Any:
    return _sharding(array).mesh if isinstance(array, jax.core.Tracer) else array.sharding.mesh


def _sharding(array: Any) -> Any:
    return jax.typeof(array).sharding
