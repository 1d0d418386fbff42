"""What `attnlib.explain` says of a call with the option `context`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax

from attnlib._core.problem import AttentionProblem
from attnlib._engine.context.call import Canonicalize, localized, resolve
from attnlib._engine.context.choice import Received, choose_exchange, received
from attnlib._engine.context.heads import given_to_device
from attnlib._engine.context.implementation import schedule_of
from attnlib._engine.context.part import Part

if TYPE_CHECKING:
    from attnlib._engine.call import Arguments


@dataclasses.dataclass(frozen=True)
class ContextExplanation:
    """How a call shards one sequence over devices, with the figures of a forward pass.

    Attributes:
      axis_name: the mesh axis.
      devices: the number of devices along it.
      order: "contiguous" or "zigzag".
      exchange: "ring", "gather" or "heads".
      turns: how many times a device computes with keys of another device, or of itself.
      balance: the tiles that each device would compute if all had the same work, over those of the device that has most
        to do in each turn (the critical path). 1: no device waits.
      received: bytes that a device receives, by exchange; None where the exchange cannot compute the call. The ring
        receives no keys that no device needs. A backward pass of the ring receives keys and values once more, and
        their gradients in the dtype of the softmax.
    """

    axis_name: str
    devices: int
    order: str
    exchange: str
    turns: int
    balance: float
    received: dict[str, int | None]

    def __str__(self) -> str:
        sizes = [
            f"{name} {'impossible' if size is None else f'{size / 1e6:.1f} MB'}" for name, size in self.received.items()
        ]
        return "\n".join(
            [
                f"context: axis {self.axis_name!r} of {self.devices} devices, {self.order}, {self.exchange}",
                f"turns: {self.turns}, work of an equal share / of the critical path: {self.balance:.2f}",
                f"received by a device: {', '.join(sizes)}",
            ]
        )


def explain_context(
    arguments: Arguments, canonicalize: Canonicalize
) -> tuple[AttentionProblem, ContextExplanation] | None:
    """(the problem of one device, the explanation); None where there is one device, or nothing to send."""
    context, devices, manual = resolve(arguments)
    if devices == 1 or 0 in (*arguments.query.shape, *arguments.key.shape):
        return None
    part = Part(devices, context.order, 0)
    local = arguments if manual else localized(arguments, context, devices)
    problem = jax.eval_shape(lambda arguments: canonicalize(arguments, part)[0], local)
    exchange = context.exchange or choose_exchange(problem, arguments.options.implementation)
    ring = schedule_of(problem, "ring")
    by: Received = received(problem, ring)
    chosen = dataclasses.replace(context, exchange=exchange)
    turns, balance = 1, 1.0
    if exchange == "heads":
        _, problem = jax.make_jaxpr(
            lambda arguments: canonicalize(*given_to_device(arguments, chosen, devices))[0],
            axis_env=[(context.axis_name, devices)],
            return_shape=True,
        )(local)
    else:
        problem = dataclasses.replace(problem, options=problem.options.replace(context=chosen))
        schedule = schedule_of(problem, exchange)
        turns, most = len(schedule.turns), schedule.critical_path
        balance = schedule.tiles_computed / devices / most if most else 1.0
    return problem, ContextExplanation(
        context.axis_name, devices, context.order, exchange, turns, balance, dict(by._asdict())
    )
