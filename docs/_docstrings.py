"""Turns the docstrings of attnlib into Markdown for the API pages: an extension of Griffe, which mkdocstrings uses.

Griffe's own parser of this style reads one parameter an entry and shows doctests as quotations. Docstrings of attnlib
describe several parameters in one entry, and their shapes contain stars and brackets that Markdown would interpret.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import operator
import re
import textwrap
from typing import Any

import griffe

HEADING = re.compile(r"(Args|Attributes|Returns|Raises|Example|Source):(?:$| +)")
TABLES = ("Args", "Attributes", "Raises")


class Docstrings(griffe.Extension):
    """Rewrites each docstring, and the signatures of functions with options, when its object is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        del kwargs
        if obj.docstring is not None:
            text = obj.docstring.value
            if "{options}" in text or "{names}" in text:
                found = at_run_time(obj)
                text = inspect.getdoc(found) or ""
                if isinstance(obj, griffe.Function):
                    obj.parameters = parameters(found)
            obj.docstring.value = markdown(text)


def at_run_time(obj: griffe.Object) -> Any:
    """The object as a user gets it: options are written into it when the package is imported."""
    module = importlib.import_module(obj.module.path)
    names = obj.path.removeprefix(f"{obj.module.path}.")
    return operator.attrgetter(names)(module)


def parameters(function: Any) -> griffe.Parameters:
    """The parameters that `inspect.signature` shows."""
    return griffe.Parameters(
        *(
            griffe.Parameter(
                found.name,
                annotation=None if found.annotation is found.empty else str(found.annotation),
                kind=getattr(griffe.ParameterKind, found.kind.name.lower()),
                default=None if found.default is found.empty else repr(found.default),
            )
            for found in inspect.signature(function).parameters.values()
        )
    )


def markdown(docstring: str) -> str:
    """The Markdown of one docstring."""
    blocks = []
    for title, lines in sections(docstring):
        body = textwrap.dedent("\n".join(lines)).strip("\n")
        if title is not None:
            blocks.append(f"**{title}**")
        if title in TABLES:
            blocks.append("\n".join(map(entry, re.split(r"\n(?=\S)", body))))
        else:
            blocks.append(prose(body))
    return "\n\n".join(blocks)


def sections(docstring: str) -> list[tuple[str | None, list[str]]]:
    """(title, lines) of each section; the text before the first and after an indented one has no title."""
    found: list[tuple[str | None, list[str]]] = [(None, [])]
    for line in docstring.splitlines():
        heading = HEADING.match(line)
        if heading:
            rest = line[heading.end() :]
            found.append((heading[1], ["  " + rest] if rest else []))
        elif line.strip() and not line.startswith(" ") and found[-1][0] is not None:
            found.append((None, [line]))
        else:
            found[-1][1].append(line)
    return [(title, lines) for title, lines in found if title is not None or any(map(str.strip, lines))]


def entry(text: str) -> str:
    """An item `names: description` of a list."""
    names, colon, description = " ".join(text.split()).partition(": ")
    if not colon:
        return f"- {escaped(names)}"
    return f"- {', '.join(f'`{name}`' for name in names.split(', '))}: {escaped(description)}"


def prose(text: str) -> str:
    """Paragraphs, with doctests as code."""
    paragraphs = []
    for paragraph in re.split(r"\n\n+", text):
        start = re.search(r"^ *>>> ", paragraph, flags=re.MULTILINE)
        before = paragraph[: start.start()] if start else paragraph
        if before.strip():
            paragraphs.append(escaped(textwrap.dedent(before)))
        if start:
            code = textwrap.dedent(paragraph[start.start() :])
            paragraphs.append(f"```pycon\n{code}\n```")
    return "\n\n".join(paragraphs)


def escaped(text: str) -> str:
    """The text with what Markdown would interpret outside of code escaped."""
    prose_and_code = re.split(r"(`[^`]*`)", text)
    plain = [re.sub(r"([*\[\]])", r"\\\1", part).replace("<", "&lt;") for part in prose_and_code[::2]]
    return "".join(itertools.chain.from_iterable(itertools.zip_longest(plain, prose_and_code[1::2], fillvalue="")))
