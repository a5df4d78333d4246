"""Settings of a training run from a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vi_simsiam.config import PARTS, TrainConfig, with_former_loss
from vi_simsiam.errors import InputError, cut, did_you_mean
from vi_simsiam.files import read_bytes
from vi_simsiam.paths import user_path
from vi_simsiam.text import one_line

_MOST_SETTINGS = 1 << 20  # bytes
_MOST_BITS = 1024  # more are not formatted


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a file by the names of the command line's options, with "_" for "-".

    The file has them side by side, or in the parts decode, augment, model and loss of config.json.

    Raises:
        InputError: no such file, not YAML, or no settings in it.
    """
    import yaml

    path = user_path("config", path)
    encoded = read_bytes(path, "config", most=_MOST_SETTINGS)
    # Merge keys, which no setting needs, double a file's content with each level.
    plain = type("_Plain", (yaml.SafeLoader,), {"flatten_mapping": lambda self, node: None})
    try:
        content = yaml.load(encoded.decode(), plain)
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        reason = "it is nested too deeply"
        if isinstance(error, yaml.MarkedYAMLError):
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            reason = f"line {line}: {one_line(str(error.problem))}"
        elif isinstance(error, UnicodeDecodeError | yaml.YAMLError):
            reason = "it is not text"
        elif isinstance(error, ValueError | OverflowError):
            reason = one_line(str(error))
        raise InputError(
            f"config: {path} cannot be read ({cut(reason)}); it must be a run's config.json or YAML"
        ) from None
    if not isinstance(content, dict):
        raise InputError(
            f"config: {path} holds no settings; "
            "a line is a setting and its value, such as epochs: 20"
        )
    settings: dict[str, Any] = {}
    for name, value in with_former_loss(content).items():
        inside = value if name in PARTS and isinstance(value, dict) else {name: value}
        # Nothing else is looked at: with aliases a few lines of YAML are a list of any length.
        if not all(map(_is_setting, inside, inside.values())):
            raise InputError(f"config: {path}: a setting is a name and a value, or a list of them")
        if name in PARTS and inside is not value:
            raise InputError(
                f"config: {name}: {cut(repr(value))} is not accepted; it must hold settings by name"
            )
        settings |= {str(key).lstrip("-").replace("-", "_"): each for key, each in inside.items()}
    return settings


def updated(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """Return `config` with these settings changed.

    Raises:
        InputError: a setting is unknown or has a value that is not accepted.
    """
    plain = config.to_dict()
    owners: dict[str, dict[str, Any]] = {}  # by setting: the part of `plain` that holds it
    numbers: set[str] = set()
    for part, values in ((config, plain), *((getattr(config, p), plain[p]) for p in PARTS)):
        fields = [field for field in dataclasses.fields(part) if field.name not in PARTS]
        owners |= {field.name: values for field in fields}
        numbers |= {field.name for field in fields if "float" in str(field.type)}
    for name, value in settings.items():
        if name not in owners:
            similar = did_you_mean(name, owners)
            raise InputError(f"config: no setting is called {cut(repr(name))}{similar}")
        owners[name][name] = _number(value) if name in numbers else value
    return TrainConfig.from_dict(plain)


def _is_setting(name: object, value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(
        x.bit_length() < _MOST_BITS if isinstance(x, int) else isinstance(x, str | float | None)
        for x in (name, *values)
    )


def _number(value: Any) -> Any:
    """Return YAML's text for a number as the number: YAML reads 1e-3, without a point, as text."""
    if isinstance(value, list):
        return [_number(each) for each in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
