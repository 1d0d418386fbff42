"""The documents of the project, read as Markdown: fences, links, headings, sections and tables."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def fences(text):
    """(language, content) of each block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def without_fences(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks(text, language):
    return [content for name, content in fences(text) if name == language]


def run_python(text, name):
    """Runs the Python blocks of a document in order, as one program, and returns its names."""
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(blocks(text, "python")):
        exec(compile(block, f"{name}, python block {number}", "exec"), namespace)
    return namespace


def links(text):
    """The targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", without_fences(text)))


def anchors(text):
    """The anchors of headings, as mkdocs and code hosts make them."""
    titles = re.findall(r"^#+ (.+)$", without_fences(text), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def section(text, title):
    """The text below a heading of the second level."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text):
    """The cells of each row of the tables, their heads left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    tables = [number for number, line in enumerate(lines) if re.fullmatch(r"[|\- ]+", line)]
    kept = [line for n, line in enumerate(lines) if n not in tables and n + 1 not in tables]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in kept]


def names_in(cell):
    return re.findall(r"`([^`]+)`", cell)
