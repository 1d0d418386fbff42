"""Deprecation: a public name warns for two minor releases, and the warning says what to write instead."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def deprecated(instead: str, *, removed_in: str) -> Callable[[F], F]:
    """A decorator that makes every call of a function warn.

    Args:
      instead: what to write, as code.
      removed_in: the release that no longer has the function.

    >>> from attnlib._core.deprecation import deprecated
    >>> @deprecated("attnlib.attention(...)", removed_in="0.4")
    ... def old_attention():
    ...     return 1
    """

    def decorate(function: F) -> F:
        text = f"{function.__name__} is deprecated and will be removed in {removed_in}. Write {instead}."

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            return function(*args, **kwargs)

        return cast(F, call)

    return decorate
