"""What the Flax modules share: parameters of a layer, dropout and its key, weights to return or to sow."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from attnlib import _checks
from attnlib._dimensions import Affine, Initializer, Vector
from attnlib._types import Rng


class Projection(nn.Module):
    """Declares the kernel and bias of one projection and gives them as a dict."""

    affine: Affine
    use_bias: bool
    kernel_init: Initializer
    bias_init: Initializer
    param_dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        params = {"kernel": self.param("kernel", self.affine.init_kernel, self.kernel_init, self.param_dtype)}
        if _checks.static_bool(self.use_bias, "use_bias"):
            params["bias"] = self.param("bias", self.affine.init_bias, self.bias_init, self.param_dtype)
        return params


class Parameter(nn.Module):
    """Declares a parameter that is no projection, in a group of its own."""

    vector: Vector
    param_dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {self.vector.name: self.param(self.vector.name, self.vector.init, self.vector.shape, self.param_dtype)}


class Attention(nn.Module):
    """What the three modules share: options of the call, dropout and its key."""

    def dropout_options(self, deterministic: bool | None, rng: Rng | None) -> dict[str, Any]:
        """The rate and key to use: none where deterministic, else the call's key or the "dropout" stream."""
        rate = _checks.dropout_rate(self.dropout_rate)
        if rate == 0.0:
            return {"dropout_rate": 0.0, "dropout_rng": None}
        declared = self.deterministic
        if nn.merge_param("deterministic", declared, deterministic):
            return {"dropout_rate": 0.0, "dropout_rng": None}
        return {"dropout_rate": rate, "dropout_rng": self.make_rng("dropout") if rng is None else rng}

    def finish(self, results: Any, return_weights: bool, sow_weights: bool) -> Any:
        if sow_weights:
            self.sow("intermediates", "attention_weights", results[1])
        return results if return_weights or not sow_weights else results[0]
