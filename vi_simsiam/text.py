"""Words that many messages share, and short forms of what holds arrays."""

from __future__ import annotations

import dataclasses
import unicodedata
from importlib import resources
from pathlib import Path
from typing import Any, Literal

METHODS: dict[Literal["simsiam", "vi-simsiam"], str] = {
    "simsiam": "SimSiam",
    "vi-simsiam": "VI-SimSiam",
}
"""Titles of the methods."""
_SHOWN = 8


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: "1 image", "8,000 images", "0 images".

    Args:
        count: how many, at least 0.
        noun: the singular, with its adjectives if it has any ("unreadable image").
        plural: the plural where it is not the noun and an s ("classes").
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def data_label(data: str) -> str:
    """A data set without the folders above it: folder:NAME for folder:/some/where/NAME."""
    kind, colon, path = data.partition(":")
    return f"{kind}:{Path(path).name}" if colon else data


def fill_template(asset: str, content: dict[str, Any], *, escape: bool) -> str:
    """The Jinja template `asset` of the package with `content`; with `escape`, made safe for HTML."""
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


def one_line(text: str) -> str:
    """Text in one line, with the control characters that names of files in it may hold as in a Python string."""
    return "".join(
        repr(each)[1:-1] if unicodedata.category(each) == "Cc" else each for each in text
    )


def brief(value: Any) -> str:
    """A value for a repr: arrays and tensors by dtype and shape, long sequences by their length, others as they are."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {brief(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return (
            counted(len(value), "item")
            if len(value) > _SHOWN
            else f"[{', '.join(map(brief, value))}]"
        )
    return repr(value)


def brief_repr(instance: Any) -> str:
    """The `__repr__` of a dataclass that holds arrays: one line in a notebook, not a page of numbers."""
    fields = (
        f"{field.name}={brief(getattr(instance, field.name))}"
        for field in dataclasses.fields(instance)
    )
    return f"{type(instance).__name__}({', '.join(fields)})"
