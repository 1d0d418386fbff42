"""What the Flax modules share: parameters of a layer, dropout and its key, weights to return or to sow."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import errors
from flax import linen as nn

from attnlib._core.array_types import Rng
from attnlib._core.operand_checks import check_dropout_rate
from attnlib._core.suggestions import suggests_arguments
from attnlib._core.validation import check_bool
from attnlib.layers._projections import Initializer, ParameterSpec, ProjectionSpec

_OTHER_PARAMS = (
    "The parameters were made with other fields, or for an input of other features: give the layer the fields that "
    "they were made with; of MultiHeadAttention, attnlib.MultiHeadAttention(**attnlib.convert.module_fields(params))."
)
# What to write where Flax refuses what is asked of a layer.
NOTES: dict[type[Exception], str] = {
    errors.CallCompactUnboundModuleError: (
        "A layer holds no parameters: variables = layer.init(jax.random.key(0), x) makes them, and "
        "layer.apply(variables, x) applies it. In a module of your own, make it in setup or "
        "in a method with @nn.compact."
    ),
    errors.ScopeCollectionNotFound: (
        'apply takes what init returned: layer.apply({"params": params}, x), not layer.apply(params, x).'
    ),
    errors.ScopeParamNotFoundError: _OTHER_PARAMS,
    errors.ScopeParamShapeError: _OTHER_PARAMS,
    errors.ModifyScopeVariableError: (
        'Pass mutable=["cache"] and keep the new cache: output, changed = layer.apply(variables, x, '
        'mutable=["cache"]), then variables |= changed.'
    ),
    errors.InvalidRngError: (
        'Pass rngs={"dropout": key} to apply, or dropout_rng=key in the call, a new key each step; or '
        "deterministic=True when evaluating."
    ),
}


class Projection(nn.Module):
    """Declares the kernel and bias of one projection and gives them as a dict."""

    affine: ProjectionSpec
    use_bias: bool
    kernel_init: Initializer
    bias_init: Initializer
    param_dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        params = {"kernel": self.param("kernel", self.affine.init_kernel, self.kernel_init, self.param_dtype)}
        if check_bool(self.use_bias, "use_bias"):
            params["bias"] = self.param("bias", self.affine.init_bias, self.bias_init, self.param_dtype)
        return params


class Parameter(nn.Module):
    """Declares a parameter that is no projection, in a group of its own."""

    vector: ParameterSpec
    param_dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {self.vector.name: self.param(self.vector.name, self.vector.init, self.vector.shape, self.param_dtype)}


class AttentionModule(nn.Module):
    """What the three modules share: options of the call, dropout and its key, and help in errors."""

    def __init_subclass__(cls, **options: Any) -> None:
        # After Flax has made `__init__` of the fields, and wrapped `__call__` in what raises its errors.
        super().__init_subclass__(**options)
        arguments = inspect.signature(cls.__call__).parameters
        cls.__init__ = suggests_arguments(cls.__init__, arguments, "in the call", cls.__name__)  # type: ignore[method-assign]
        if "__call__" in vars(cls):
            cls.__call__ = _with_help(cls.__call__)  # type: ignore[method-assign]

    def dropout_options(self, deterministic: bool | None, rng: Rng | None) -> dict[str, Any]:
        """The rate and key to use: none where deterministic, else the call's key or the "dropout" stream."""
        rate = check_dropout_rate(self.dropout_rate)
        if rate == 0.0:
            return {"dropout_rate": 0.0, "dropout_rng": None}
        if (self.deterministic is None) == (deterministic is None):
            given = "neither" if deterministic is None else "both"
            raise ValueError(
                "with dropout, deterministic must be given once, in the constructor or in the call; it was given in "
                f"{given}. Write deterministic=False to drop weights in training, deterministic=True when evaluating."
            )
        declared = self.deterministic if deterministic is None else deterministic
        if check_bool(declared, "deterministic"):
            return {"dropout_rate": 0.0, "dropout_rng": None}
        return {"dropout_rate": rate, "dropout_rng": self.make_rng("dropout") if rng is None else rng}

    def wants_weights(self, return_weights: Any, sow_weights: Any) -> bool:
        asked = check_bool(return_weights, "return_weights"), check_bool(sow_weights, "sow_weights")
        return any(asked)

    def finish(self, results: Any, return_weights: bool, sow_weights: bool) -> Any:
        if sow_weights:
            self.sow("intermediates", "attention_weights", results[1])
        return results if return_weights or not sow_weights else results[0]


def _with_help(call: Callable[..., Any]) -> Callable[..., Any]:
    """The method `__call__`, whose errors say what to write: those of arguments that it lacks, and those of Flax."""

    @functools.wraps(call)
    def helped(self: AttentionModule, *args: Any, **options: Any) -> Any:
        kind: Any = type(self)
        try:
            return _suggesting(call, kind)(self, *args, **options)
        except errors.FlaxError as error:
            note = NOTES.get(type(error))
            if note is not None and note not in getattr(error, "__notes__", ()):  # a layer in this one gave it
                error.add_note(note)
            raise

    return helped


@functools.cache
def _suggesting(call: Callable[..., Any], of: Any) -> Callable[..., Any]:
    """The method of that class."""
    fields = inspect.signature(of.__init__).parameters
    return suggests_arguments(call, fields, f"as a field, {of.__name__}(...)", f"the call of {of.__name__}")
