"""The base of the Flax modules: their parameters, their call and their errors."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar, Unpack

import jax
from flax import errors
from flax import linen as nn

from attnlib._core.array_types import Array, BoolMask, Rng
from attnlib._core.operand_checks import check_dropout_rate
from attnlib._core.options import CallOptions, shows_options
from attnlib._core.suggestions import suggests_arguments
from attnlib._core.validation import check_bool
from attnlib.layers._inputs import default_operands
from attnlib.layers._projections import Initializer, ParameterSpec, ProjectionSpec

Kind = TypeVar("Kind", bound=Any)

_OTHER_PARAMS = (
    "The parameters belong to a layer with other fields, or to an input with other features. Use the fields of that "
    "layer; for MultiHeadAttention: attnlib.MultiHeadAttention(**attnlib.convert.module_fields(params))."
)
# The remedies for errors of Flax.
NOTES: dict[type[Exception], str] = {
    errors.CallCompactUnboundModuleError: (
        "A layer holds no parameters. Write variables = layer.init(jax.random.key(0), x), then layer.apply(variables, "
        "x). In your own module, create the layer in setup or in a method with @nn.compact."
    ),
    errors.ScopeCollectionNotFound: (
        'apply takes the variables from init: layer.apply({"params": params}, x), not layer.apply(params, x).'
    ),
    errors.ScopeParamNotFoundError: _OTHER_PARAMS,
    errors.ScopeParamShapeError: _OTHER_PARAMS,
    errors.ModifyScopeVariableError: (
        'Pass mutable=["cache"] and keep the new cache: output, updates = layer.apply(variables, x, '
        'mutable=["cache"]), then variables |= updates.'
    ),
    errors.InvalidRngError: (
        'Pass rngs={"dropout": key} to apply, or dropout_rng=key to the call, a new key at each step. '
        "To evaluate, pass deterministic=True."
    ),
}


class Projection(nn.Module):
    """The kernel and the bias of one projection."""

    spec: ProjectionSpec
    use_bias: bool
    kernel_init: Initializer
    bias_init: Initializer
    param_dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        params = {"kernel": self.param("kernel", self.spec.init_kernel, self.kernel_init, self.param_dtype)}
        if check_bool(self.use_bias, "use_bias"):
            params["bias"] = self.param("bias", self.spec.init_bias, self.bias_init, self.param_dtype)
        return params


class Parameter(nn.Module):
    """A parameter that is not part of a projection, in its own group."""

    spec: ParameterSpec
    param_dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {self.spec.name: self.param(self.spec.name, self.spec.init, self.spec.shape, self.param_dtype)}


# The options that are fields of every module; the others are arguments of the call.
_FIELD_OPTIONS = ("attention_axes", "dropout_rate", "precision", "implementation", "block_sizes", "context")


class AttentionModule(nn.Module):
    """The base class of the attention modules: their call, dropout and the weights that they return or sow."""

    @nn.compact
    @shows_options(without=(*_FIELD_OPTIONS, "return_lse"))
    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        query_mask: BoolMask | None = None,
        key_mask: BoolMask | None = None,
        deterministic: bool | None = None,
        sow_weights: bool = False,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Applies the layer.

        Args:
          query: `(*batch and attention axes, C)`; for one sequence axis `(B, T, C)`.
          key: `(..., C_key)`; default: query.
          value: `(..., C_value)`, with the key's positions; default: key. (Keras' layers take value before key.)
          query_mask, key_mask: bool, the shape of query / key without features, True = real.
          deterministic: whether dropout is off.
          sow_weights: whether to sow the weights into "intermediates" as "attention_weights".
          {names}: as in `attnlib.dot_product_attention`. A Keras mask `(B, T, S)` is `mask[:, None]` in
            MultiHeadAttention; layers without heads have no axis N in mask, bias and weights. logits_soft_cap and
            score_mod replace the fields of these names. sink requires use_sink=False. Without key, key_positions
            default to query_positions; rotary uses both. dropout_rng defaults to a key of the "dropout" stream.

        Returns:
          output `(*query's leading axes, *output_shape)`, or (output, weights) with weights
          `(*batch, N, *query axes, *key axes)`. The output of layers without heads has the features of the value.
        """
        operands = query, *default_operands(query, key, value)
        return_weights = check_bool(options.get("return_weights", False), "return_weights")
        needs_weights = check_bool(sow_weights, "sow_weights") or return_weights
        params = self._declare(*(operand.shape[-1] for operand in operands))
        resolved = {name: getattr(self, name) for name in _FIELD_OPTIONS} | {**options, "return_weights": needs_weights}
        resolved |= self._dropout_options(deterministic, options.get("dropout_rng"))
        output, weights = self._attend(params, query, key, value, query_mask=query_mask, key_mask=key_mask, **resolved)
        if sow_weights:
            self.sow("intermediates", "attention_weights", weights)
        return (output, weights) if return_weights else output

    def _declare(self, query_features: int, key_features: int, value_features: int) -> Any:
        """Declares the parameters of the module and returns them, or the score that has them."""
        raise NotImplementedError

    def _attend(self, params: Any, query: Array, key: Array | None, value: Array | None, **options: Any) -> Any:
        """(output, weights or None) of the parameters from `_declare`."""
        raise NotImplementedError

    def _dropout_options(self, deterministic: bool | None, rng: Rng | None) -> dict[str, Any]:
        """The rate and the key of dropout: the key of the call, or one of the "dropout" stream."""
        rate = check_dropout_rate(self.dropout_rate)
        if rate > 0.0 and (self.deterministic is None) == (deterministic is None):
            count = "neither" if deterministic is None else "both"
            raise ValueError(
                "with dropout, deterministic must be given once, in the constructor or in the call; it was given in "
                f"{count}. Write deterministic=False to train with dropout, deterministic=True to evaluate."
            )
        if rate == 0.0 or check_bool(self.deterministic if deterministic is None else deterministic, "deterministic"):
            return {"dropout_rate": 0.0, "dropout_rng": None}
        return {"dropout_rate": rate, "dropout_rng": self.make_rng("dropout") if rng is None else rng}


def explains_errors(module: Kind) -> Kind:
    """A decorator of a module class: errors of its constructor and of its call say what to write instead.

    It is a decorator because Flax makes the constructor, and wraps the call, when the class is defined.
    """
    name, constructor, call = module.__name__, module.__init__, module.__call__
    fields, arguments = inspect.signature(module).parameters, inspect.signature(call).parameters
    suggesting = suggests_arguments(call, fields, f"as a field, {name}(...)", f"the call of {name}")

    @functools.wraps(call)
    def explained(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return suggesting(self, *args, **options)
        except errors.FlaxError as error:
            note = NOTES.get(type(error))
            if note is not None and note not in getattr(error, "__notes__", ()):  # an inner layer may have added it
                error.add_note(note)
            raise

    module.__init__ = suggests_arguments(constructor, arguments, "in the call", name)
    module.__call__ = explained
    return module
