"""The base of the NNX modules: how they store parameters, random streams and weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, Unpack

import jax
from flax import nnx

from attnlib._core.array_types import Array, BoolMask, Rng
from attnlib._core.operand_checks import check_dropout_rate, check_key
from attnlib._core.options import CallOptions, shows_options
from attnlib._core.pytree import SignatureOfInit
from attnlib._core.suggestions import suggests_arguments
from attnlib._core.validation import check_bool
from attnlib._modules.call import FIELD_OPTIONS, AttentionCall
from attnlib.layers._projections import ParameterSpec

Kind = TypeVar("Kind", bound=Any)
Rngs = nnx.Rngs | nnx.RngStream | Rng
Metadata = Mapping[str, Any]

# `rngs` has the place of `dropout_rng`, as in all modules of NNX.
shows_call_options = shows_options(without=(*FIELD_OPTIONS, "return_lse", "dropout_rng"))


class ParameterGroup(nnx.Module):
    """Parameters under one name, such as the kernel and the bias of a projection."""

    def __init__(self, **params: nnx.Param[jax.Array]) -> None:
        for name, param in params.items():
            setattr(self, name, param)


class AttentionModule(AttentionCall, nnx.Module):
    """The base class of the attention modules: their call, and how NNX stores keys and weights."""

    __signature__: ClassVar[Any] = SignatureOfInit()
    deterministic: bool | None
    rngs: Any

    def _set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Sets the arguments of the constructor as attributes of the same names."""
        for name, value in attributes.items():
            setattr(self, name, as_attribute(value))

    def _set_stream(self, rngs: nnx.Rngs | None, keep_rngs: bool) -> None:
        """Sets the stream of dropout keys; None without dropout, since a stream is part of a checkpoint."""
        has_stream = check_dropout_rate(self.dropout_rate) > 0.0 and check_bool(keep_rngs, "keep_rngs")
        self.rngs = check_rngs(rngs).dropout.fork() if has_stream else nnx.data(None)

    @shows_call_options
    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        query_mask: BoolMask | None = None,
        key_mask: BoolMask | None = None,
        deterministic: bool | None = None,
        rngs: Rngs | None = None,
        sow_weights: bool = False,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Applies the layer.

        Args:
          query: `(*batch and attention axes, C)`; for one sequence axis `(B, T, C)`.
          key: `(..., C_key)`; default: query.
          value: `(..., C_value)`, with the key's positions; default: key. (Keras' layers take value before key.)
          query_mask, key_mask: bool, the shape of query / key without features, True = real.
          deterministic: whether dropout is off; default: the attribute, which `train()` and `eval()` set.
          rngs: `nnx.Rngs`, a stream of it or a JAX random key, for dropout; default: the stream of the module.
          sow_weights: whether to sow the weights as `nnx.Intermediate`, "attention_weights".
          {names}: as in `attnlib.dot_product_attention`. These layers have no heads axis N in mask, bias and weights:
            a Keras mask `(B, T, S)` needs no change. Without key, key_positions default to query_positions.

        Returns:
          output `(*query's leading axes, features of the value)`, or (output, weights) with weights
          `(*batch, *query axes, *key axes)`.
        """
        return self._call(
            query, key, value, query_mask=query_mask, key_mask=key_mask, deterministic=deterministic, rng=rngs,
            sow_weights=sow_weights, **options,
        )  # fmt: skip

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets attributes of a view, for `nnx.view`.

        Args:
          deterministic: whether dropout is off.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def _sow_weights(self, weights: jax.Array) -> None:
        self.sow(nnx.Intermediate, "attention_weights", weights)

    def _resolve_deterministic(self, deterministic: bool | None, rate: float) -> bool | None:
        if deterministic is None and self.deterministic is None:
            raise ValueError(
                f"with dropout_rate={rate}, deterministic must be given: call model.train() before training and "
                "model.eval() before evaluation, or pass deterministic=False or deterministic=True to the constructor, "
                "to nnx.view or to the call."
            )
        return self.deterministic if deterministic is None else deterministic

    def _dropout_key(self, rng: Any) -> jax.Array:
        source = self.rngs if rng is None else rng
        if source is None:
            raise ValueError(
                "dropout needs a random key: the module was made with keep_rngs=False. Pass rngs=nnx.Rngs(dropout=key) "
                "to the call, or deterministic=True to evaluate."
            )
        if isinstance(source, nnx.Rngs):
            source = source.dropout
        if isinstance(source, nnx.RngStream):
            return source()
        check_key(source, "rngs")
        return source


def as_attribute(value: Any) -> Any:
    """The value as an attribute of an NNX module: static if it is hashable, and data if it is a pytree of arrays."""
    if isinstance(value, list):
        return tuple(value)  # attributes that are static must be hashable
    if isinstance(value, nnx.Module) or jax.tree_util.all_leaves([value]) or isinstance(value, (tuple, type(None))):
        return value
    return nnx.data(value)


def make_param(spec: ParameterSpec, rng: Rng, dtype: Any, metadata: Metadata | None = None) -> nnx.Param[jax.Array]:
    """A parameter in the shape of its spec. A mesh in context shards it as its metadata say when it is made."""
    value = spec.draw(rng, dtype)
    if isinstance(value, nnx.VariableMetadata):
        names = value.metadata.get("out_sharding", value.metadata.get("sharding_names")) or ()
        spec.check_names(names)
        value.raw_value = value.raw_value.reshape(spec.shape)
    elif hasattr(value, "unbox"):
        raise TypeError(
            "an initialiser of flax.linen.with_partitioning is for linen modules. Write nnx.with_partitioning(init, "
            "names), or pass kernel_metadata={'out_sharding': names}."
        )
    else:
        value = value.reshape(spec.shape)
    return nnx.Param(value, **(metadata or {}))


def check_rngs(rngs: Any) -> nnx.Rngs:
    """The argument `rngs` of a constructor."""
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs must be nnx.Rngs, such as nnx.Rngs(0); got {type(rngs).__name__}.")
    return rngs


def suggests_remedies(module: Kind) -> Kind:
    """A decorator of a module class: errors of its constructor and of its call say what to write instead."""
    name, constructor, call = f"nnx.{module.__name__}", module.__init__, module.__call__
    fields, arguments = inspect.signature(module).parameters, inspect.signature(call).parameters
    module.__init__ = suggests_arguments(constructor, arguments, "in the call", name)
    module.__call__ = suggests_arguments(call, fields, f"in the constructor, {name}(...)", f"the call of {name}")
    return module
