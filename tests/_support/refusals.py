"""How arguments that must be refused are written down."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

Refusal = tuple[Callable[[], Any], type[Exception], str]  # (a call, its error, a part of the message)


@dataclasses.dataclass(frozen=True)
class Wrong:
    """Arguments that must be refused: the exact type of the error, and texts that its message must have."""

    name: str
    error: type[Exception]
    texts: tuple[str, ...]
    change: dict[str, Any]

    def __str__(self) -> str:
        return self.name


def wrong(name: str, error: type[Exception], *texts: str, **change: Any) -> Wrong:
    return Wrong(name, error, texts, change)


@dataclasses.dataclass(frozen=True)
class Later:
    """An argument that is made in the call, since making it may already raise."""

    make: Callable[[], Any]


def used_as(name: str, make: Callable[..., Any], refused: Wrong) -> Wrong:
    """The wrong arguments of a mask, score or modifier as a wrong call that is passed what is made of them."""
    return dataclasses.replace(refused, change={name: Later(lambda: make(**refused.change))})


def assert_refused(refusal: Refusal) -> None:
    call, error, text = refusal
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)
