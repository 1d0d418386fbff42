"""The implementations in order of preference, how one is chosen, and how the choice is explained."""

from __future__ import annotations

import dataclasses

from attnlib._impl.blockwise import blockwise
from attnlib._impl.reference import reference
from attnlib._problem import Implementation, Problem

IMPLEMENTATIONS: tuple[Implementation, ...] = (blockwise, reference)
NAMES = tuple(implementation.name for implementation in IMPLEMENTATIONS)

# Up to this many numbers in the largest array of all pairs at once, tiles cannot save what they cost. Measured on 2 CPU
# cores by tests/benchmarks/crossover.py, which prints the times on either side.
DENSE_NUMBERS = 2**21


def choose(problem: Problem, asked: str | tuple[str, ...] | None) -> Implementation:
    """The first implementation, of those asked for by name or of all in order of preference, that can compute it.

    Raises:
      ValueError: none can; the message gives each one's reason.
    """
    names = (asked,) if isinstance(asked, str) else asked
    candidates = preferred(problem) if names is None else tuple(map(_named, names))
    reasons = {implementation.name: implementation.unsupported(problem) for implementation in candidates}
    for implementation in candidates:
        if reasons[implementation.name] is None:
            return implementation
    raise ValueError(
        f"no implementation can compute this with implementation={asked!r}:\n"
        + "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        + ("\nimplementation=None chooses among all that can." if asked is not None else "")
    )


def preferred(problem: Problem) -> tuple[Implementation, ...]:
    """All implementations, the one likely fastest first."""
    numbers = problem.rows * problem.key_length * problem.score.pair_size(problem.query.shape[-1])
    square_anyway = problem.return_weights
    return (reference, blockwise) if square_anyway or numbers <= DENSE_NUMBERS else (blockwise, reference)


def _named(name: str) -> Implementation:
    return next(implementation for implementation in IMPLEMENTATIONS if implementation.name == name)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call would run, and why not the others; print it.

    Attributes:
      implementation: the name of the implementation that would run.
      block_sizes: (queries, keys) of its tiles; None where it has none.
      tiles: (tiles it computes, all tiles), those that the mask empties being left out; None where it has none.
      memory: estimated bytes of temporaries of a forward pass.
      refusals: for each other implementation, why it would not run.
    """

    implementation: str
    block_sizes: tuple[int, int] | None
    tiles: tuple[int, int] | None
    memory: int
    refusals: dict[str, str]

    def __str__(self) -> str:
        lines = [f"implementation: {self.implementation}"]
        if self.block_sizes and self.tiles:
            size, tiles = self.block_sizes, self.tiles
            lines.append(f"tiles: {size[0]} queries x {size[1]} keys, {tiles[0]} of {tiles[1]} computed")
        lines.append(f"memory: about {self.memory / 1e6:.1f} MB of temporaries in a forward pass")
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.refusals.items()])


def explain(problem: Problem, asked: str | tuple[str, ...] | None) -> Explanation:
    chosen = choose(problem, asked)
    others = [implementation for implementation in IMPLEMENTATIONS if implementation is not chosen]
    reason = f"{chosen.name} was asked for" if asked is not None else f"{chosen.name} is likely faster at this size"
    refusals = {other.name: other.unsupported(problem) or reason for other in others}
    estimate = chosen.estimate(problem)
    return Explanation(chosen.name, estimate.block_sizes, estimate.tiles, estimate.memory, refusals)
