"""The NNX modules without heads and projections, as AdditiveAttention and Attention in Keras."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlib._core.context import Context
from attnlib._core.validation import check_int
from attnlib._modules.single_head import AdditiveCall, DotProductCall, SingleHeadCall
from attnlib.layers._projections import Initializer, vector_glorot_uniform
from attnlib.nnx._base import AttentionModule, check_rngs, make_param, suggests_remedies


class SingleHeadAttention(SingleHeadCall, AttentionModule):
    """The base class of the modules without heads: their parameters."""

    def _make_params(self, query_features: int, rngs: nnx.Rngs | None, param_dtype: Any) -> None:
        for name, spec in self._parameter_specs(query_features).items():
            setattr(self, name, make_param(spec, check_rngs(rngs).params(), param_dtype))

    def _params(self, query_features: int, key_features: int, value_features: int) -> dict[str, Any]:
        del query_features, key_features, value_features
        return {name: param[...] for name, param in vars(self).items() if isinstance(param, nnx.Param)}


@suggests_remedies
class AdditiveAttention(AdditiveCall, SingleHeadAttention):
    """Additive (Bahdanau) attention: softmax(sum_d scale_d tanh(query_d + key_d)) value, without heads.

    Parameters: `scale (D,)` with use_scale.

    Args:
      in_features: features D of query and key.
      use_scale: whether to learn the scale; otherwise it is 1. Default True.
      scale_init: initialiser of the scale; default: glorot uniform.
      param_dtype: dtype of the scale; default float32.
      attention_axes, dropout_rate, deterministic, precision, implementation, block_sizes, context, normalize, rngs,
        keep_rngs: as in `MultiHeadAttention`.

    Example:
      >>> import attnlib, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = attnlib.nnx.AdditiveAttention(8, rngs=nnx.Rngs(0))
      >>> output, weights = layer(jnp.ones((2, 5, 8)), jnp.ones((2, 7, 8)), return_weights=True)
      >>> output.shape, weights.shape
      ((2, 5, 8), (2, 5, 7))

    Source: Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2015).
    """

    def __init__(
        self,
        in_features: int,
        *,
        use_scale: bool = True,
        attention_axes: int | Sequence[int] | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        scale_init: Initializer = vector_glorot_uniform,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        implementation: str | Sequence[str] | None = None,
        block_sizes: tuple[int, int] | None = None,
        context: str | Context | None = None,
        normalize: bool = True,
        rngs: nnx.Rngs | None = None,
        keep_rngs: bool = True,
    ) -> None:
        self._set_attributes(dict(
            use_scale=use_scale, attention_axes=attention_axes, dropout_rate=dropout_rate, deterministic=deterministic,
            scale_init=scale_init, precision=precision, implementation=implementation, block_sizes=block_sizes,
            context=context, normalize=normalize,
        ))  # fmt: skip
        self._make_params(check_int(in_features, "in_features", minimum=1), rngs, param_dtype)
        self._set_stream(rngs, keep_rngs)


@suggests_remedies
class DotProductAttention(DotProductCall, SingleHeadAttention):
    """Dot-product (Luong) attention without heads or projections: softmax(scale * query key^T) value.

    Parameters: `scale ()`, ones, with use_scale; `concat_score_weight ()`, ones, with score_mode="concat".

    Args:
      use_scale: whether to learn a scalar scale; otherwise it is 1, as in Keras' Attention. Default False.
      score_mode: "dot", or "concat": concat_score_weight * sum_d tanh(scale * (query_d + key_d)).
      param_dtype: dtype of the scalars; default float32.
      attention_axes, dropout_rate, deterministic, precision, implementation, block_sizes, context, normalize, rngs,
        keep_rngs: as in `MultiHeadAttention`; rngs are required for parameters and dropout only.

    Example:
      >>> import attnlib, jax.numpy as jnp
      >>> layer = attnlib.nnx.DotProductAttention()
      >>> layer(jnp.ones((2, 5, 8)), jnp.ones((2, 7, 8))).shape
      (2, 5, 8)

    Source: Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation" (2015).
    """

    def __init__(
        self,
        *,
        use_scale: bool = False,
        score_mode: str = "dot",
        attention_axes: int | Sequence[int] | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        implementation: str | Sequence[str] | None = None,
        block_sizes: tuple[int, int] | None = None,
        context: str | Context | None = None,
        normalize: bool = True,
        rngs: nnx.Rngs | None = None,
        keep_rngs: bool = True,
    ) -> None:
        self._set_attributes(dict(
            use_scale=use_scale, score_mode=score_mode, attention_axes=attention_axes, dropout_rate=dropout_rate,
            deterministic=deterministic, precision=precision, implementation=implementation, block_sizes=block_sizes,
            context=context, normalize=normalize,
        ))  # fmt: skip
        self._make_params(0, rngs, param_dtype)  # the parameters are scalars
        self._set_stream(rngs, keep_rngs)
