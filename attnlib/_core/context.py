"""Context parallelism: how one sequence lies on the devices along a mesh axis, and the option `context`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ORDERS = ("contiguous", "zigzag")
EXCHANGES = ("ring", "gather", "heads")


@dataclasses.dataclass(frozen=True)
class Context:
    """One sequence on many devices: queries, keys and values are sharded along their first attention axis.

    Pass it as `context=` to an attention function or a layer; `context="x"` is short for `Context("x")`. Inside
    `jax.shard_map` over the axis, operands are the parts of one device. Elsewhere the call makes its own
    `jax.shard_map` over this axis of the current mesh (`jax.set_mesh`).

    Attributes:
      axis_name: the mesh axis along which the sequence is sharded.
      order: "contiguous": device i of n holds the i-th of n equal parts. "zigzag": device i holds the parts i and
        2n - 1 - i of 2n, which gives all devices the same work where attention is causal; reorder the tokens, labels
        and other arrays with one entry for each position by `attnlib.positions.zigzag`.
      exchange: "ring": keys and values go from device to device, and a device holds those of one other device at a
        time. "gather": each device gathers all keys and values. "heads": queries, keys and values are exchanged, so
        that a device holds all positions of some heads; the number of devices must divide the key heads. None: chosen
        by the bytes that a device receives; `attnlib.explain` shows them.

    Raises:
      TypeError, ValueError: an attribute is not one of these.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 16, 4, 8))
      >>> with jax.set_mesh(mesh):
      ...     output = attnlib.dot_product_attention(query, key, value, is_causal=True, context="x")
      >>> output.shape
      (2, 16, 4, 8)

    Source: Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers" (2023); "heads": Jacobs et al.,
      "DeepSpeed Ulysses" (2023); "zigzag": Zhu, "Ring Flash Attention" (2024), Llama Team (2024).
    """

    axis_name: str
    order: str = "contiguous"
    exchange: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.axis_name, str):
            raise TypeError(f"Context axis_name must be the name of a mesh axis; got {self.axis_name!r}.")
        if self.order not in ORDERS:
            raise ValueError(f'Context order must be "contiguous" or "zigzag"; got {self.order!r}.')
        if self.exchange is not None and self.exchange not in EXCHANGES:
            raise ValueError(f'Context exchange must be "ring", "gather", "heads" or None; got {self.exchange!r}.')


def check_context(value: Any, name: str) -> Context | None:
    """The context, made of the name of an axis if that is given."""
    if value is None or isinstance(value, Context):
        return value
    if isinstance(value, str):
        return Context(value)
    raise TypeError(f"{name} must be the name of a mesh axis, an attnlib.Context or None; got {value!r}.")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which of the flat positions each device holds: one part, or two in the order "zigzag".

    Attributes:
      length: the number of all positions.
      devices: the number of devices.
      order: "contiguous" or "zigzag".
    """

    length: int
    devices: int
    order: str = "contiguous"

    @property
    def parts(self) -> int:
        """How many runs of consecutive positions a device holds."""
        return 1 if self.order == "contiguous" else 2

    @property
    def part_length(self) -> int:
        return self.length // (self.devices * self.parts)

    @property
    def local_length(self) -> int:
        return self.part_length * self.parts

    def numbers(self) -> np.ndarray:
        """(devices, parts): the number of each part among all parts."""
        return np.stack([np.asarray(self.number(np.arange(self.devices), part)) for part in range(self.parts)], -1)

    def number(self, device: Any, part: Any) -> Any:
        """The number of a part of a device among all parts."""
        if self.parts == 1:
            return device
        last = self.devices * self.parts - 1
        if isinstance(part, int):
            return last - device if part else device
        return jnp.where(part == 0, device, last - device)

    def positions(self, device: Any) -> jax.Array:
        """The flat positions that a device holds, in its order."""
        steps = jnp.arange(self.part_length, dtype=jnp.int32)
        return jnp.concatenate([self.number(device, n) * self.part_length + steps for n in range(self.parts)])

    def order_of_positions(self) -> np.ndarray:
        """The positions of all devices, device after device."""
        return (self.numbers()[..., None] * self.part_length + np.arange(self.part_length)).reshape(-1)


def zigzag_order(length: int, devices: int) -> np.ndarray:
    """The positions in the order in which the zigzag layout has them, as int32."""
    if length % (2 * devices):
        raise ValueError(
            f"zigzag needs a length that is a multiple of twice the devices, {2 * devices}; got {length}. Pad the "
            f"sequence to {-(-length // (2 * devices)) * 2 * devices} and mask the padding, "
            f"mask=attnlib.masks.KeyPadding(real), where real has this order too."
        )
    return Layout(length, devices, "zigzag").order_of_positions().astype(np.int32)


def check_lengths(context: Context, devices: int, lengths: dict[str, int]) -> None:
    """Raises ValueError unless the first attention axis of each operand can be divided among the devices."""
    unit = devices * (2 if context.order == "zigzag" else 1)
    for name, length in lengths.items():
        if length % unit:
            twice = "twice " * (context.order == "zigzag")
            raise ValueError(
                f"with context, the first attention axis must be a multiple of {twice}the {devices} devices along "
                f"{context.axis_name!r} with order={context.order!r}, here of {unit}; got {length} in {name}. Pad it "
                f"to {-(-length // unit) * unit} and mask the padding, mask=attnlib.masks.Lengths(key=...) or "
                "masks.KeyPadding(real)."
            )


def mesh_axis(axis_name: str, arrays: Sequence[Any] = ()) -> tuple[int, bool]:
    """(the number of devices along a mesh axis, whether the axis is manual, as inside `jax.shard_map`).

    The mesh is the current one, or that in the type of an array.

    Raises:
      ValueError: there is no such axis.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)]
    for mesh in meshes:
        if axis_name in mesh.axis_names:
            return mesh.shape[axis_name], axis_name in mesh.manual_axes
    known = meshes[0].axis_names
    found = f"the current mesh has the axes {', '.join(map(repr, known))}" if known else "there is no current mesh"
    raise ValueError(
        f"context axis {axis_name!r} is unknown: {found}. Call inside `with jax.set_mesh(mesh):`, where mesh = "
        f"jax.make_mesh((devices,), ({axis_name!r},)), or inside jax.shard_map over that axis."
    )
