"""The base of the Flax modules: their parameters, their call and their errors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar, Unpack

import jax
from flax import errors
from flax import linen as nn

from attnlib._core.array_types import Array, BoolMask, Rng
from attnlib._core.options import CallOptions, shows_options
from attnlib._core.suggestions import suggests_arguments
from attnlib._modules.call import FIELD_OPTIONS, AttentionCall
from attnlib.layers._projections import ParameterSpec

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


class ParameterGroup(nn.Module):
    """Parameters under one name, such as the kernel and the bias of a projection."""

    specs: Mapping[str, ParameterSpec]
    param_dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {name: self.param(name, spec.initialize, self.param_dtype) for name, spec in self.specs.items()}


class AttentionModule(AttentionCall, nn.Module):
    """The base class of the attention modules: their call, and how linen stores keys and weights."""

    @nn.compact
    @shows_options(without=(*FIELD_OPTIONS, "return_lse"))
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
        return self._call(
            query, key, value, query_mask=query_mask, key_mask=key_mask, deterministic=deterministic,
            rng=options.get("dropout_rng"), sow_weights=sow_weights, **options,
        )  # fmt: skip

    def _sow_weights(self, weights: jax.Array) -> None:
        self.sow("intermediates", "attention_weights", weights)

    def _resolve_deterministic(self, deterministic: bool | None, rate: float) -> bool | None:
        if (self.deterministic is None) == (deterministic is None):
            count = "neither" if deterministic is None else "both"
            raise ValueError(
                "with dropout, deterministic must be given once, in the constructor or in the call; it was given in "
                f"{count}. Write deterministic=False to train with dropout, deterministic=True to evaluate."
            )
        return self.deterministic if deterministic is None else deterministic

    def _dropout_key(self, rng: Rng | None) -> jax.Array:
        return self.make_rng("dropout") if rng is None else rng


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
