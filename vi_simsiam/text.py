"""Counts and single lines for messages, and short reprs of values that hold arrays."""

from __future__ import annotations

import dataclasses
import unicodedata
from typing import Any

_SHOWN = 8


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 image", "8,000 images"; `plural` if it is not noun + s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def one_line(text: str) -> str:
    """Return text with control characters, which file names may hold, escaped as in Python."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in text)


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
