"""Checks of a configuration: types and choices come from the annotations, ranges from `limited`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from vi_simsiam.errors import InputError, cut, none_of


class Rule(NamedTuple):
    """A test of a value, and in words what passes it; also in Annotated, in the form of a file."""

    holds: Callable[[Any], bool]
    accepted: str


POSITIVE = Rule(lambda x: 0 < x < math.inf, "a positive number")
NOT_NEGATIVE = Rule(lambda x: 0 <= x < math.inf, "at least 0")
PROBABILITY = Rule(lambda x: 0 <= x <= 1, "a probability between 0 and 1")
INTERVAL = Rule(lambda x: 0 < x[0] <= x[1] < math.inf, "two numbers with 0 < low <= high")
SHARES = Rule(lambda x: 0 < x[0] <= x[1] <= 1, "two numbers with 0 < low <= high <= 1")
SEED = Rule(lambda x: 0 <= x < 2**63, "at least 0 and below 2**63")

_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def at_least(smallest: int, accepted: str = "") -> Rule:
    """The rule for numbers from `smallest` on; `accepted` replaces its wording."""
    return Rule(lambda x: x >= smallest, accepted or f"at least {smallest}")


def limited(default: Any, rule: Rule) -> Any:
    """A dataclass field whose values pass `rule`, or are None where the annotation allows it."""
    return dataclasses.field(default=default, metadata={"rule": rule})


def check_fields(config: Any) -> None:
    """Check every field of a dataclass: values from Python, JSON or YAML can be of any type.

    Raises:
        InputError: the first value of a wrong type, choice or range.
    """
    hints = _hints(config.__class__)
    for field in dataclasses.fields(config):
        name, value, hint = field.name, getattr(config, field.name), hints[field.name]
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if value is None and NoneType in options:
            continue
        kind, *others = [option for option in options if option is not NoneType]
        if others:
            continue  # a union, which its own class checks
        if get_origin(kind) is Literal:
            choice(name, value, get_args(kind))
        elif get_origin(kind) is tuple:
            fits = isinstance(value, tuple) and all(_is_a(number, float) for number in value)
            if Ellipsis in get_args(kind):
                require(name, repr(value), fits, "numbers")
                continue
            count = len(get_args(kind))
            require(name, repr(value), fits and len(value) == count, f"{count} numbers")
        elif kind in _KINDS:
            require(name, repr(value), _is_a(value, kind), _KINDS[kind])
            if kind is str:
                require(name, repr(value), is_name(value), "text that a file name can hold")
        if "rule" in field.metadata:
            holds, accepted = field.metadata["rule"]
            require(name, value, holds(value), accepted)


def choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """Raise InputError unless `value` is one of `accepted`."""
    if value not in accepted:
        raise none_of(name, value, accepted)


def require(name: str, value: object, holds: bool, accepted: str) -> None:
    """Raise InputError unless `holds`; the message gives `value`, and `accepted` in its place."""
    if not holds:
        raise InputError(f"{name}: {cut(str(value))} is not accepted; it must be {accepted}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def is_name(text: str) -> bool:
    """True for text that a path may contain: no zero byte, no half of a surrogate pair."""
    try:
        return "\0" not in os.fsdecode(os.fsencode(text))
    except UnicodeEncodeError:
        return False


def _is_a(value: object, kind: type) -> bool:
    """Like isinstance, but an int is also a float, and a bool is no number."""
    accepted = (int, float) if kind is float else kind
    return isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
