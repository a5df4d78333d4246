"""Counts and single lines for messages, and short reprs of values that hold arrays."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

METHODS: dict[Literal["simsiam", "vi-simsiam"], str] = {
    "simsiam": "SimSiam",
    "vi-simsiam": "VI-SimSiam",
}
"""Titles of the methods."""
_SHOWN = 8


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 image", "8,000 images"; `plural` if it is not noun + s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def data_label(data: str) -> str:
    """A data set without the folders above it: folder:NAME for folder:/some/where/NAME."""
    kind, colon, path = data.partition(":")
    return f"{kind}:{Path(path).name}" if colon else data


def fill_template(asset: str, content: dict[str, Any], *, escape: bool) -> str:
    """The Jinja template `asset` of the package with `content`; `escape` makes it safe for HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = resources.files("vi_simsiam").joinpath("assets", asset).read_text(encoding="utf-8")
    return environment.from_string(text).render(content)


def print_line(console: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is: no break within a path, and no brackets taken for a style."""
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def one_line(text: str) -> str:
    """Return text with control characters, which file names may hold, escaped as in Python."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in text)


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
