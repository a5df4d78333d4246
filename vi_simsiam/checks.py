"""Checks of the values in a configuration."""

from __future__ import annotations

import dataclasses

from vi_simsiam.errors import InputError

_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "an integer"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "text"),
}


def check_types(config: object) -> None:
    """Refuse 2.5 epochs or "yes" for a flag: values from Python, JSON or YAML come unchecked."""
    for each in dataclasses.fields(config):  # type: ignore[arg-type]
        value, kind = getattr(config, each.name), str(each.type).removesuffix(" | None")
        if value is None and kind != each.type:
            continue
        if kind.startswith("tuple"):
            count, kind = kind.count("float"), "float"
            values, accepted = value, f"{count} numbers"
            fits = isinstance(value, tuple) and len(value) == count
        else:
            values, accepted, fits = (value,), _KINDS.get(kind, ((), ""))[1], True
        if kind in _KINDS:
            fits = fits and all(
                isinstance(v, _KINDS[kind][0]) and isinstance(v, bool) == (kind == "bool")
                for v in values
            )
            require(each.name, repr(value), fits, accepted)


def require(name: str, value: object, holds: bool, accepted: str) -> None:
    """Raise InputError unless what is accepted `holds`."""
    if not holds:
        raise InputError(f"{name}: {value} is not accepted; it must be {accepted}")
