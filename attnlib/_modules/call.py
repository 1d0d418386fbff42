"""The call of every attention module: its options, its dropout and its weights."""

from __future__ import annotations

from typing import Any

import jax

from attnlib._core.array_types import Array
from attnlib._core.operand_checks import check_dropout_rate
from attnlib._core.validation import check_bool
from attnlib.layers._inputs import default_operands

# The options that are fields of every module; the others are arguments of the call.
FIELD_OPTIONS = (
    "attention_axes", "dropout_rate", "normalize", "precision", "implementation", "block_sizes", "context",
)  # fmt: skip


class AttentionCall:
    """The call of an attention module. The modules of linen and NNX store what it needs: parameters, keys, weights."""

    dropout_rate: Any
    deterministic: Any

    def _call(
        self,
        query: Array,
        key: Array | None,
        value: Array | None,
        *,
        deterministic: bool | None,
        rng: Any,
        sow_weights: bool,
        **options: Any,
    ) -> Any:
        operands = query, *default_operands(query, key, value)
        return_weights = check_bool(options.get("return_weights", False), "return_weights")
        needs_weights = check_bool(sow_weights, "sow_weights") or return_weights
        params = self._params(*(operand.shape[-1] for operand in operands))
        resolved = {name: getattr(self, name) for name in FIELD_OPTIONS} | {**options, "return_weights": needs_weights}
        resolved |= self._dropout_options(deterministic, rng)
        output, weights = self._attend(params, query, key, value, **resolved)
        if sow_weights:
            self._sow_weights(weights)
        return (output, weights) if return_weights else output

    def _dropout_options(self, deterministic: bool | None, rng: Any) -> dict[str, Any]:
        """The rate and the key of dropout: the key of the call, or one of the module's stream."""
        rate = check_dropout_rate(self.dropout_rate)
        if rate == 0.0 or check_bool(self._resolve_deterministic(deterministic, rate), "deterministic"):
            return {"dropout_rate": 0.0, "dropout_rng": None}
        return {"dropout_rate": rate, "dropout_rng": self._dropout_key(rng)}

    def _attend(self, params: Any, query: Array, key: Array | None, value: Array | None, **options: Any) -> Any:
        """(output, weights or None) of the parameters from `_params`."""
        raise NotImplementedError

    # Storage

    def _params(self, query_features: int, key_features: int, value_features: int) -> dict[str, Any]:
        """The arrays of the parameters, by group and name."""
        raise NotImplementedError

    def _resolve_deterministic(self, deterministic: bool | None, rate: float) -> bool | None:
        """Whether dropout is off, from the attribute and the argument of the call."""
        raise NotImplementedError

    def _dropout_key(self, rng: Any) -> jax.Array:
        raise NotImplementedError

    def _sow_weights(self, weights: jax.Array) -> None:
        raise NotImplementedError
