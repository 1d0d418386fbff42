"""Regularisers and constraints: penalties on parameters and activations, and projections after an optimiser step.

A regulariser is a function from an array to a scalar, e.g. `lambda x: 1e-4 * jnp.sum(x**2)`. A constraint is a
projection from an array to an array, e.g. `optax.projections.projection_non_negative`. Both act on the leaves named
"kernel" and "bias" of any tree of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["apply_constraints", "constrain", "parameter_penalty", "regularization_loss"]

Regularizer = Callable[[jax.Array], jax.Array]
Constraint = Callable[[Any], Any]


def regularization_loss(variables: Mapping[str, Any]) -> jax.Array:
    """The sum of the penalties that modules sow into "losses".

    Args:
      variables: the updated variables that `module.apply(..., mutable=["losses"])` returns.

    Returns:
      A float32 scalar to add to the loss; 0 without penalties.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> layer = attnlib.MultiHeadAttention(num_heads=2, kernel_regularizer=lambda w: 1e-4 * jnp.sum(w**2))
      >>> x = jnp.ones((1, 5, 8))
      >>> params = layer.init(jax.random.key(0), x)["params"]
      >>> output, updated = layer.apply({"params": params}, x, mutable=["losses"])
      >>> bool(attnlib.regularization_loss(updated) > 0)
      True
    """
    losses = jax.tree.leaves(variables.get("losses", {}))
    return sum((jnp.sum(loss).astype(jnp.float32) for loss in losses), jnp.float32(0))


def parameter_penalty(
    params: Any, *, kernel_regularizer: Regularizer | None = None, bias_regularizer: Regularizer | None = None
) -> jax.Array:
    """The sum of the penalties of all kernels and biases in a tree of parameters.

    Args:
      params: a tree of arrays; the penalties apply to leaves whose last key is "kernel" or "bias".
      kernel_regularizer, bias_regularizer: functions from one array to a scalar.

    Returns:
      A float32 scalar; 0 without such leaves.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2)
      >>> float(attnlib.parameter_penalty(params, bias_regularizer=lambda b: jnp.sum(jnp.abs(b))))
      0.0
    """
    regularizers = {"kernel": kernel_regularizer, "bias": bias_regularizer}
    total = jnp.float32(0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        regularizer = regularizers.get(_name(path))
        if regularizer is not None:
            total = total + jnp.asarray(regularizer(leaf)).astype(jnp.float32)
    return total


def apply_constraints(
    params: Any, *, kernel_constraint: Constraint | None = None, bias_constraint: Constraint | None = None
) -> Any:
    """Projects all kernels and biases in a tree of parameters, e.g. after an optimiser step.

    Args:
      params: a tree of arrays; the constraints apply to leaves whose last key is "kernel" or "bias".
      kernel_constraint, bias_constraint: projections of one array, such as those of `optax.projections`.

    Returns:
      The projected tree, with unchanged shapes and dtypes.

    Raises:
      ValueError: a constraint changed a shape.

    Example:
      >>> import jax, attnlib, optax
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2)
      >>> params = attnlib.apply_constraints(params, kernel_constraint=optax.projections.projection_non_negative)
      >>> bool((params["query"]["kernel"] >= 0).all())
      True
    """
    constraints = {"kernel": kernel_constraint, "bias": bias_constraint}

    def project(path: Any, leaf: jax.Array) -> jax.Array:
        constraint = constraints.get(_name(path))
        if constraint is None:
            return leaf
        projected = constraint(leaf)
        if projected.shape != leaf.shape:
            raise ValueError(
                f"a constraint must keep the shape of {jax.tree_util.keystr(path)}, {leaf.shape}; got "
                f"{projected.shape}."
            )
        return projected.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(project, params)


def constrain(*, kernel_constraint: Constraint | None = None, bias_constraint: Constraint | None = None) -> Any:
    """`apply_constraints` as the last transformation of an optax chain; updated parameters satisfy the constraints.

    Args:
      kernel_constraint, bias_constraint: as in `apply_constraints`.

    Returns:
      An `optax.GradientTransformation` whose `update` needs `params`.

    Example:
      >>> import attnlib, optax
      >>> positive = attnlib.constrain(kernel_constraint=optax.projections.projection_non_negative)
      >>> optimizer = optax.chain(optax.adam(1e-3), positive)
    """
    import optax

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("attnlib.constrain needs the parameters: optimizer.update(grads, state, params).")
        stepped = optax.apply_updates(params, updates)
        projected = apply_constraints(stepped, kernel_constraint=kernel_constraint, bias_constraint=bias_constraint)
        return jax.tree.map(lambda new, old: new - old, projected, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _name(path: Any) -> str:
    """The last name of a path, apart from `value`, the field of a box of partitioning metadata."""
    names = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
    boxed = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
    return names[-2] if boxed else "".join(names[-1:])
