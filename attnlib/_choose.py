"""The implementations in order of preference, how one is chosen, and how the choice is explained."""

from __future__ import annotations

import dataclasses

from attnlib._impl.blockwise import blockwise
from attnlib._impl.reference import reference
from attnlib._problem import Implementation, Problem

IMPLEMENTATIONS: tuple[Implementation, ...] = (reference, blockwise)
NAMES = tuple(implementation.name for implementation in IMPLEMENTATIONS)


def choose(problem: Problem, asked: str | tuple[str, ...] | None) -> Implementation:
    """The first implementation, of those asked for by name or of all, that supports the problem.

    Raises:
      ValueError: none does; the message gives each one's reason.
    """
    candidates = IMPLEMENTATIONS if asked is None else tuple(map(_named, (asked,) if isinstance(asked, str) else asked))
    reasons = []
    for implementation in candidates:
        reason = implementation.unsupported(problem)
        if reason is None:
            return implementation
        reasons.append(f"  {implementation.name}: {reason}")
    raise ValueError(
        f"no implementation can compute this (implementation={asked!r}):\n" + "\n".join(reasons)
        + ("\nimplementation=None chooses among all that can." if asked is not None else "")
    )


def _named(name: str) -> Implementation:
    return next(implementation for implementation in IMPLEMENTATIONS if implementation.name == name)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call would run, and why not the others; print it.

    Attributes:
      implementation: the name of the implementation that would run.
      refusals: for each implementation considered before it, or able to be asked for, why it would not run.
      memory: estimated bytes of temporaries of a forward pass.
    """

    implementation: str
    refusals: dict[str, str]
    memory: int

    def __str__(self) -> str:
        lines = [f"implementation: {self.implementation}", f"memory: about {self.memory / 2**20:.1f} MiB of temporaries"]
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.refusals.items()])


def explain(problem: Problem, asked: str | tuple[str, ...] | None) -> Explanation:
    chosen = choose(problem, asked)
    refusals = {}
    for implementation in IMPLEMENTATIONS:
        reason = implementation.unsupported(problem)
        if implementation is not chosen:
            refusals[implementation.name] = reason or f"{chosen.name} comes first"
    pairs = problem.query_length * problem.key_length * problem.kv_heads * problem.groups
    for size in problem.batch:
        pairs *= size
    return Explanation(chosen.name, refusals, 3 * 4 * pairs)
