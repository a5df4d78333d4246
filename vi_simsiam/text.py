"""Counts and single lines for messages, and short reprs of values that hold arrays.

Names of files, folders, classes and data sets, and text in files of others, may hold anything. They
pass `one_line` wherever they are shown: by `show` and `print_line` in a terminal, by `cell` in a
table there, by `markdown` and `fill_template` in pages.
"""

from __future__ import annotations

import dataclasses
import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

METHODS: dict[Literal["simsiam", "vi-simsiam"], str] = {
    "simsiam": "SimSiam",
    "vi-simsiam": "VI-SimSiam",
}
"""Titles of the methods."""
_SHOWN = 8
_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
# Marks of Markdown: an underscore is one at the edge of a word, a bracket after the text of a link.
_MARKS = re.compile(r"[\\`*|~$]|(?<!\w)_|_(?!\w)|(?<=\])[(\[:]")


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 image", "8,000 images"; `plural` if it is not noun + s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def fill_template(asset: str, content: dict[str, Any], *, escape: bool) -> str:
    """The Jinja template `asset` of the package with `content`; `escape` makes it safe for HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    def line(value: Any) -> Any:
        return one_line(value) if type(value) is str else value  # the page's own parts are Markup

    environment = Environment(
        loader=PackageLoader("vi_simsiam", "assets"),
        autoescape=escape,
        finalize=line if escape else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(asset).render(content)


def print_line(console: Console, line: str, style: str | None = None) -> None:
    """Print a line: no break within a path, and no brackets taken for a style."""
    console.print(one_line(line), style=style, highlight=False, markup=False, soft_wrap=True)


def show(line: object) -> None:
    """Print a line that may hold names to standard output."""
    print(one_line(str(line)))


def cell(text: str) -> str:
    """Return text for a table or a status of Rich: on one line, no brackets taken for a style."""
    from rich.markup import escape

    return escape(one_line(text))


def one_line(text: str) -> str:
    """Return text with what acts on a terminal or reorders a line escaped as in Python.

    These are control characters, other ends of lines, and embeddings, overrides and isolates of a
    direction of writing.
    """
    return "".join(repr(c)[1:-1] if _acts(c) else c for c in text)


def _acts(c: str) -> bool:
    return (
        unicodedata.category(c) in ("Cc", "Zl", "Zp") or unicodedata.bidirectional(c) in _DIRECTIONS
    )


def markdown(text: str) -> str:
    """Return text as it is read in a paragraph or a table of Markdown: no markup, link or HTML."""
    return _MARKS.sub(r"\\\g<0>", html.escape(one_line(text), quote=False))


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return plain JSON types with `change` applied to every text, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(str(name)): each_text(each, change) for name, each in value.items()}
    return [each_text(each, change) for each in value] if isinstance(value, list) else value


def markdown_grid(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True
) -> str:
    """A Markdown table; with `numbers` all columns but the first are flush right."""
    rule = "|---|" + ("---:|" if numbers else "---|") * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def brief(value: Any) -> str:
    """Return a short repr: arrays and tensors by dtype and shape, long sequences by length."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {brief(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        long = len(value) > _SHOWN
        return counted(len(value), "item") if long else f"[{', '.join(map(brief, value))}]"
    return repr(value)


def brief_repr(instance: Any) -> str:
    """Return a one-line `__repr__` of a dataclass that holds arrays."""
    names = [field.name for field in dataclasses.fields(instance)]
    values = ", ".join(f"{name}={brief(getattr(instance, name))}" for name in names)
    return f"{type(instance).__name__}({values})"
