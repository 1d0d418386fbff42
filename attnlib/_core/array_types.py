"""Array types of the public signatures, annotated with shapes. Only the tests check them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float

Array: TypeAlias = jax.Array | np.ndarray

Query: TypeAlias = Float[Array, "*query N D"]
Key: TypeAlias = Float[Array, "*key K Dk"]
Value: TypeAlias = Float[Array, "*value K E"]
Bias: TypeAlias = Float[Array, "..."]
BoolMask: TypeAlias = Bool[Array, "..."]
Rng: TypeAlias = Any  # a typed key jax.random.key(seed), or a raw uint32 key
MaskFunction: TypeAlias = Callable[..., Any]  # (batch, head, query_position, key_position) -> bool
ScoreMod: TypeAlias = Callable[..., Any]  # (logit, batch, head, query_position, key_position) -> logit
