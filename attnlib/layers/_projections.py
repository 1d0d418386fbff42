"""The sizes of a multi-head attention layer, and the shapes and initial values of its parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnlib._core.array_types import Rng
from attnlib._core.suggestions import require_static
from attnlib._core.validation import check_bool, check_int, check_int_or_ints, per_axis
from attnlib.scores import Score

Initializer = Callable[..., jax.Array]

default_bias_init: Initializer = jax.nn.initializers.zeros


# JAX's initialisers are local functions, which cannot be pickled; a module pickles functions of this file.


def default_kernel_init(key: Rng, shape: Sequence[int], dtype: Any = None, out_sharding: Any = None) -> jax.Array:
    """Normal values with variance 1 / fan-in (LeCun)."""
    return jax.nn.initializers.lecun_normal()(key, shape, dtype, out_sharding)


def default_table_init(key: Rng, shape: Sequence[int], dtype: Any = None, out_sharding: Any = None) -> jax.Array:
    """Normal values with standard deviation 0.02, for tables of position biases."""
    return jax.nn.initializers.normal(0.02)(key, shape, dtype, out_sharding)


def vector_glorot_uniform(rng: Rng, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform values in +-sqrt(3 / D) for D features, as Keras' glorot_uniform draws a vector of D entries."""
    limit = math.sqrt(3 / max(shape[-1], 1))
    return jax.random.uniform(rng, shape, dtype, -limit, limit)


def projection_inits(
    name: str,
    kernel_init: Initializer,
    bias_init: Initializer,
    out_kernel_init: Initializer | None,
    out_bias_init: Initializer | None,
) -> tuple[Initializer, Initializer]:
    """The initialisers of the kernel and the bias of one projection."""
    inits = dict(kernel=kernel_init, bias=bias_init, out_kernel=out_kernel_init, out_bias=out_bias_init)
    for kind, init in inits.items():
        if isinstance(init, str):
            raise TypeError(
                f"{kind}_init must be an initialiser, a function (rng, shape, dtype) such as "
                f"jax.nn.initializers.glorot_uniform(); got {init!r}."
            )
    if name != "out":
        return kernel_init, bias_init
    return (
        kernel_init if out_kernel_init is None else out_kernel_init,
        bias_init if out_bias_init is None else out_bias_init,
    )


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """A parameter: its shape, its initialiser, and the shape that the initialiser draws; default: the same."""

    shape: tuple[int, ...]
    init: Initializer
    drawn_shape: tuple[int, ...] | None = None

    def draw(self, rng: Rng, dtype: Any) -> Any:
        """What the initialiser returns, before it has the shape of the parameter."""
        return self.init(rng, self.shape if self.drawn_shape is None else self.drawn_shape, dtype)

    def initialize(self, rng: Rng, dtype: Any) -> Any:
        """The initial value, which may be in a box of partitioning metadata of Flax linen.

        The names in the box belong to the axes of `shape`. `unbox` would apply these names to the drawn shape, which
        fails under a mesh, so `jax.tree.map` reshapes the array inside the box.
        """
        value = self.draw(rng, dtype)
        if self.drawn_shape is None:
            return value
        self.check_names(getattr(value, "names", ()))
        return jax.tree.map(lambda array: array.reshape(self.shape), value)

    def check_names(self, names: Sequence[Any]) -> None:
        """Raises ValueError if partitioning metadata name more axes than the parameter has."""
        if len(names) > len(self.shape):
            name = "kernel" if self.drawn_shape is not None and len(self.drawn_shape) == 2 else "bias"
            raise ValueError(
                f"the initialiser of a {name} of shape {self.shape} names {len(self.shape)} axes at most; got {names}. "
                f"The output projection has an initialiser of its own: out_{name}_init."
            )


ParameterGroups = dict[str, dict[str, ParameterSpec]]


@dataclasses.dataclass(frozen=True)
class ProjectionSpec:
    """The shape of one projection: it contracts the axes `inputs` and returns the axes `outputs`."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def parameters(self, kernel_init: Initializer, bias_init: Initializer, use_bias: bool) -> dict[str, ParameterSpec]:
        """The kernel, which is initialised as a matrix so that fans are those of the projection, and the bias."""
        require_static(self.inputs, "the number of features", "an int")
        if 0 in self.inputs:
            raise ValueError("query, key and value must have at least one feature (last axis) to project; got 0.")
        matrix = math.prod(self.inputs), math.prod(self.outputs)
        specs = {"kernel": ParameterSpec(self.inputs + self.outputs, kernel_init, matrix)}
        return {**specs, "bias": ParameterSpec(self.outputs, bias_init, matrix[1:])} if use_bias else specs


@dataclasses.dataclass(frozen=True)
class HeadDimensions:
    """The checked sizes of a multi-head attention layer."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    output_shape: tuple[int, ...]
    use_gate: bool

    @classmethod
    def resolve(
        cls,
        query_features: int,
        *,
        num_heads: int,
        key_dim: int | None,
        value_dim: int | None,
        num_kv_heads: int | None,
        output_shape: int | Sequence[int] | None,
        use_gate: bool,
    ) -> HeadDimensions:
        num_heads = check_int(num_heads, "num_heads", minimum=1)
        if key_dim is None:
            if query_features % num_heads:
                raise ValueError(
                    f"key_dim defaults to query features / num_heads, which must be an int; got {query_features} / "
                    f"{num_heads}. Pass key_dim."
                )
            key_dim = query_features // num_heads
        kv_heads = num_heads if num_kv_heads is None else check_int(num_kv_heads, "num_kv_heads", minimum=1)
        if num_heads % kv_heads:
            divisors = ", ".join(str(size) for size in range(1, num_heads + 1) if num_heads % size == 0)
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads; got {num_heads} and {kv_heads}. num_kv_heads may be "
                f"{divisors}."
            )
        key_dim = check_int(key_dim, "key_dim", minimum=1)
        output_shape = (
            query_features if output_shape is None else check_int_or_ints(output_shape, "output_shape", minimum=1)
        )
        return cls(
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            key_dim=key_dim,
            value_dim=key_dim if value_dim is None else check_int(value_dim, "value_dim", minimum=1),
            output_shape=per_axis(output_shape, 1),
            use_gate=check_bool(use_gate, "use_gate"),
        )

    def projections(self, query_features: int, key_features: int, value_features: int) -> dict[str, ProjectionSpec]:
        """The projections by name."""
        attended = (self.num_heads, self.value_dim)
        projections = {
            "query": ProjectionSpec((query_features,), (self.num_heads, self.key_dim)),
            "key": ProjectionSpec((key_features,), (self.num_kv_heads, self.key_dim)),
            "value": ProjectionSpec((value_features,), (self.num_kv_heads, self.value_dim)),
            "out": ProjectionSpec(attended, self.output_shape),
        }
        return {**projections, "gate": ProjectionSpec((query_features,), attended)} if self.use_gate else projections

    def vectors(
        self,
        score: str | Score,
        *,
        scale_init: Initializer | None,
        use_scale: bool,
        normalize_qk: bool | str,
        use_sink: bool,
        num_memory: int,
    ) -> ParameterGroups:
        """The parameters that are not part of a projection."""
        groups: ParameterGroups = {}
        if not isinstance(score, Score) and check_score_name(score) == "additive":
            init = vector_glorot_uniform if scale_init is None else scale_init
            groups["score"] = {"scale": ParameterSpec((self.num_heads, self.key_dim), init)}
        elif check_bool(use_scale, "use_scale"):
            if isinstance(score, Score):
                raise ValueError(f'use_scale is for score="dot"; {type(score).__name__} has its own parameters.')
            init = jax.nn.initializers.constant(self.key_dim**-0.5) if scale_init is None else scale_init
            groups["score"] = {"scale": ParameterSpec((self.num_heads,), init)}
        if normalization(normalize_qk):
            scale = ParameterSpec((self.key_dim,), jax.nn.initializers.ones)
            groups |= {"query_norm": {"scale": scale}, "key_norm": {"scale": scale}}
        if check_bool(use_sink, "use_sink"):
            groups["sink"] = {"logit": ParameterSpec((self.num_heads,), jax.nn.initializers.zeros)}
        if check_int(num_memory, "num_memory", minimum=0):
            groups["memory"] = {
                name: ParameterSpec(
                    (num_memory, self.num_kv_heads, features), _memory_init(self.num_kv_heads * features)
                )
                for name, features in (("key", self.key_dim), ("value", self.value_dim))
            }
        return groups


def multi_head_parameters(
    query_features: int,
    key_features: int,
    value_features: int,
    *,
    num_heads: int,
    key_dim: int | None,
    value_dim: int | None,
    num_kv_heads: int | None,
    output_shape: int | Sequence[int] | None,
    use_bias: bool,
    use_gate: bool,
    score: str | Score,
    use_scale: bool,
    normalize_qk: bool | str,
    use_sink: bool,
    num_memory: int,
    kernel_init: Initializer,
    bias_init: Initializer,
    out_kernel_init: Initializer | None,
    out_bias_init: Initializer | None,
    scale_init: Initializer | None,
) -> ParameterGroups:
    """The parameters of a multi-head layer, by group and name."""
    dimensions = HeadDimensions.resolve(
        query_features, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim, num_kv_heads=num_kv_heads,
        output_shape=output_shape, use_gate=use_gate,
    )  # fmt: skip
    inits = kernel_init, bias_init, out_kernel_init, out_bias_init
    use_bias = check_bool(use_bias, "use_bias")
    groups = {
        name: projection.parameters(*projection_inits(name, *inits), use_bias)
        for name, projection in dimensions.projections(query_features, key_features, value_features).items()
    }
    return groups | dimensions.vectors(
        score, scale_init=scale_init, use_scale=use_scale, normalize_qk=normalize_qk, use_sink=use_sink,
        num_memory=num_memory,
    )  # fmt: skip


def _memory_init(features: int) -> Initializer:
    """Normal values with variance 1 / features, as PyTorch initializes `bias_k` and `bias_v`."""
    return jax.nn.initializers.normal(features**-0.5)


def check_score_name(score: Any) -> str:
    """ "dot" or "additive"."""
    if not isinstance(score, str) or score not in ("dot", "additive"):
        raise ValueError(
            f'score must be "dot", "additive" or an attnlib.scores.Score such as scores.Dot(); got {score!r}.'
        )
    return score


def normalization(normalize_qk: bool | str) -> str | None:
    """ "layer", "rms" or None."""
    kinds: dict[Any, str | None] = {False: None, True: "layer", "layer": "layer", "rms": "rms"}
    if not isinstance(normalize_qk, (bool, str)) or normalize_qk not in kinds:
        raise ValueError(f'normalize_qk must be False, True (as "layer"), "layer" or "rms"; got {normalize_qk!r}.')
    return kinds[normalize_qk]
