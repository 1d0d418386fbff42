"""The choice of the exchange, by the bytes that a device receives and by the memory that it needs."""

from __future__ import annotations

from typing import NamedTuple

from attnlib._core.problem import Asked, AttentionProblem
from attnlib._engine.context.heads import heads_refusal
from attnlib._engine.context.implementation import bytes_of_keys, layouts, schedule_of
from attnlib._engine.context.schedule import Schedule
from attnlib.masks._base import entries_of_leaves


class Received(NamedTuple):
    """Bytes that a device receives in a forward pass, by each exchange; None where it cannot be used."""

    ring: int
    gather: int
    heads: int | None


def received(problem: AttentionProblem, ring: Schedule) -> Received:
    devices, per_key = layouts(problem)[1].devices, bytes_of_keys(problem) // max(problem.key_length, 1)
    sizes = problem.query.size * problem.query.dtype.itemsize, problem.value.dtype.itemsize * problem.value.shape[-1]
    operands = sizes[0] + problem.rows * sizes[1] + bytes_of_keys(problem)
    by_heads = operands // devices * (devices - 1) if problem.kv_heads % devices == 0 else None
    return Received(ring.keys_received * per_key, problem.key_length * (devices - 1) * per_key, by_heads)


def choose_exchange(problem: AttentionProblem, asked: Asked = None) -> str:
    """The exchange that is likely best for a problem of one device.

    "heads" where the devices divide the key heads, unless the ring receives fewer bytes (a window), or rows of a bias
    or mask would have to be gathered. Then "gather" where all keys and values are small beside the queries of one
    device and their results; and else "ring".
    """
    if problem.query_length == 0 or problem.key_length == 0:
        return "ring"
    ring = schedule_of(problem, "ring")
    by = received(problem, ring)
    no_heads = heads_refusal(problem.kv_heads, problem.score, layouts(problem)[1].devices)
    pairs = problem.bias is not None or any(side == "pairs" for side in _entries(problem))
    if by.heads is not None and by.heads < by.ring and not pairs and no_heads is None:
        return "heads"
    rows = problem.rows * (problem.query.shape[-1] + problem.value.shape[-1])
    keys = (problem.key.size + problem.value.size) * layouts(problem)[1].devices
    return "gather" if keys <= rows and by.gather <= by.ring else "ring"


def _entries(problem: AttentionProblem) -> list[str]:
    return [] if problem.mask is None else entries_of_leaves(problem.mask)
