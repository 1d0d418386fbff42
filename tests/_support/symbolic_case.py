"""The arguments of a case with symbolic sizes, as `jax.export.symbolic_shape` makes them."""

import jax
from attention_case import Case
from jax import export

from attnlib._core import axes as _axes


def symbolic_arguments(case: Case, operands, traced, *, lengths: bool):
    """Shapes and dtypes of (operands, traced) with symbolic batch axes and, with `lengths`, symbolic attention axes.

    Axes of size 0 or 1 stay, since they broadcast or mean that there is nothing. The sizes of a case are distinct, so
    each array of a mask or bias fits one target: all pairs, the positions of a side, or the batch.
    """
    axes = _axes.normalize(case.options.get("attention_axes"), len(case.query), trailing=2)
    shapes = case.query, case.key, case.value
    batches = zip(*map(axes.batch_shape, shapes), strict=True)
    batch = tuple(sizes[0] if len(set(sizes)) == 1 else max(sizes) for sizes in batches)
    query, key = axes.attention_shape(case.query), axes.attention_shape(case.key)
    scope = export.SymbolicScope()

    def names(letter, sizes, wanted=True):
        name = (export.symbolic_shape(f"{letter}{n}", scope=scope)[0] for n in range(len(sizes)))
        return tuple(one if wanted and size > 1 else size for one, size in zip(name, sizes, strict=True))

    batch_names = names("b", batch)
    query_names, key_names = names("t", query, lengths), names("t" if query == key else "s", key, lengths)
    heads = case.query[-2]
    positions = [((*batch, *key), (*batch_names, *key_names)), ((*batch, *query), (*batch_names, *query_names))]
    pairs = (*batch, heads, *query, *key), (*batch_names, heads, *query_names, *key_names)

    def operand(array, attended):
        shape = list(array.shape)
        for axis, size, name in zip(axes.batch, batch, batch_names, strict=True):
            shape[axis] = name if shape[axis] == size else shape[axis]
        for axis, name in zip(axes.attention, attended, strict=True):
            shape[axis] = name
        return jax.ShapeDtypeStruct(tuple(shape), array.dtype)

    def other(array):
        if not hasattr(array, "shape") or jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            return array
        for sizes, named in [*positions, (batch, batch_names), pairs]:
            is_pairs = sizes is pairs[0]
            if is_pairs or array.ndim in (len(sizes), len(sizes) - len(batch)):
                shape = renamed(array.shape, sizes, named)
                if shape is not None:
                    return jax.ShapeDtypeStruct(shape, array.dtype)
        return array

    operands = {
        **operands,
        "query": operand(operands["query"], query_names),
        "key": operand(operands["key"], key_names),
        "value": operand(operands["value"], key_names),
    }
    if "bias" in operands:
        operands["bias"] = jax.ShapeDtypeStruct(renamed(case.bias, *pairs), operands["bias"].dtype)
    return operands, jax.tree.map(other, traced)


def renamed(shape, sizes, names):
    """The shape with names in place of the sizes that it is aligned with from the right; None if it does not fit."""
    skipped = len(sizes) - len(shape)
    if not _axes.broadcasts(shape, sizes):
        return None
    aligned = zip(shape, sizes[skipped:], names[skipped:], strict=True)
    return tuple(name if size == full and size != 1 else size for size, full, name in aligned)
