"""The calls of the modules without heads and projections, as AdditiveAttention and Attention in Keras."""

from __future__ import annotations

from typing import Any

import jax

from attnlib._core.array_types import Array
from attnlib._core.suggestions import require_static
from attnlib._core.validation import check_bool
from attnlib._modules.call import AttentionCall
from attnlib.layers._projections import ParameterSpec
from attnlib.layers._single_head import single_head_attention
from attnlib.scores import Additive, Concat, Dot, Score

_SCALAR = ParameterSpec((), jax.nn.initializers.ones)


class SingleHeadCall(AttentionCall):
    """The call of a module without heads, whose parameters belong to its score."""

    use_scale: Any

    def _attend(
        self, params: dict[str, Any], query: Array, key: Array | None, value: Array | None, **options: Any
    ) -> Any:
        return single_head_attention(self._score(params), query, key, value, **options)

    def _parameter_specs(self, query_features: int) -> dict[str, ParameterSpec]:
        """The parameters by name."""
        raise NotImplementedError

    def _score(self, params: dict[str, Any]) -> Score:
        raise NotImplementedError


class AdditiveCall(SingleHeadCall):
    """The call of AdditiveAttention."""

    scale_init: Any

    def _parameter_specs(self, query_features: int) -> dict[str, ParameterSpec]:
        if not check_bool(self.use_scale, "use_scale"):
            return {}
        require_static(query_features, "the number of query features", "an int")
        return {"scale": ParameterSpec((query_features,), self.scale_init)}

    def _score(self, params: dict[str, Any]) -> Score:
        return Additive(params.get("scale"))


class DotProductCall(SingleHeadCall):
    """The call of DotProductAttention."""

    score_mode: Any

    def _parameter_specs(self, query_features: int) -> dict[str, ParameterSpec]:
        if self.score_mode not in ("dot", "concat"):
            raise ValueError(f'score_mode must be "dot" or "concat"; got {self.score_mode!r}.')
        specs = {"scale": _SCALAR} if check_bool(self.use_scale, "use_scale") else {}
        return specs if self.score_mode == "dot" else {**specs, "concat_score_weight": _SCALAR}

    def _score(self, params: dict[str, Any]) -> Score:
        if self.score_mode == "dot":
            return Dot(params.get("scale", 1.0))
        return Concat(params["concat_score_weight"], params.get("scale"))
