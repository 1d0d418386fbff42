"""A user function as a score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnlib._core.closures import ClosureConverted, closure_convert
from attnlib._core.suggestions import explains_callback
from attnlib.scores._base import Score


class Custom(Score):
    """Any function of one query vector and one key vector, which the library batches.

    Args:
      fn: `fn(query (D,), key (D_key,), *params) -> scalar`. Arrays that the function captures are traced and
        differentiable, like `params`. Pass the same function object again to avoid recompilation.
      *params: arrays or pytrees of arrays, which all heads share; differentiable.

    >>> import jax.numpy as jnp
    >>> from attnlib import scores
    >>> euclidean = scores.Custom(lambda q, k, sharpness: -sharpness * jnp.sum((q - k) ** 2), jnp.float32(0.5))
    """

    may_close_over_arrays = True

    def __init__(self, fn: Callable[..., Any], *params: Any):
        if not callable(fn):
            raise TypeError(f"Custom fn must be a function of (query, key, *params); got {fn!r}.")
        self.fn, self.params = fn, params

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        del precision  # the function sets the precision of its own products
        pairwise = jnp.vectorize(lambda q, k: self.fn(q, k, *self.params), signature="(d),(e)->()")
        return pairwise(query[..., :, None, :], key[..., None, None, :, :]).astype(query.dtype)

    def closure_converted(self, query_features: int, key_features: int, dtype: Any) -> Score:
        query, key = (jax.ShapeDtypeStruct((size,), dtype) for size in (query_features, key_features))
        leaves, tree = jax.tree.flatten(self.params)

        def flat(q: jax.Array, k: jax.Array, *leaves: jax.Array) -> Any:
            return self.fn(q, k, *jax.tree.unflatten(tree, leaves))

        with explains_callback("Custom"):
            program, result = closure_convert(flat, query, key, *leaves)
        _check_result(result, query_features, key_features)
        return _Converted(program, leaves)

    def check(self, heads: int, query_features: int, key_features: int) -> None:
        del heads
        query, key = (jax.ShapeDtypeStruct((size,), jnp.float32) for size in (query_features, key_features))
        # Only the shape matters. The compute dtype is not known yet, so mixed dtypes must not be an error. The lambda
        # is a new function in each call, so that JAX traces `fn` anew.
        with jax.numpy_dtype_promotion("standard"), explains_callback("Custom"):
            result = jax.eval_shape(lambda *args: self.fn(*args), query, key, *self.params)
        _check_result(result, query_features, key_features)


@dataclasses.dataclass(frozen=True, eq=False)
class _Converted(Score):
    """A closure-converted `Custom`."""

    function: ClosureConverted
    params: Sequence[jax.Array]
    heads: ClassVar[Mapping[str, int]] = {}

    def block(self, query: jax.Array, key: jax.Array, precision: Any = None) -> jax.Array:
        del precision
        pairwise = jnp.vectorize(lambda q, k: self.function(q, k, *self.params), signature="(d),(e)->()")
        return pairwise(query[..., :, None, :], key[..., None, None, :, :]).astype(query.dtype)

    def check(self, heads: int, query_features: int, key_features: int) -> None:
        """`Custom` has checked the features."""


def _check_result(result: Any, query_features: int, key_features: int) -> None:
    if getattr(result, "shape", None) != ():
        raise ValueError(
            f"Custom fn must return a scalar for one query ({query_features},) and one key ({key_features},); got "
            f"{result}. Write it for one pair: the library batches it over positions and heads."
        )
    if jnp.issubdtype(result.dtype, jnp.complexfloating) or result.dtype == jnp.bool_:
        raise TypeError(f"Custom fn must return a real number; got {result.dtype}.")
