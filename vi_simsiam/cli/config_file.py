"""Settings from a file: a run's config.json, or a YAML file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vi_simsiam.config import PARTS, TrainConfig, with_former_loss
from vi_simsiam.errors import InputError, did_you_mean
from vi_simsiam.paths import user_path


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a file by the names of the command line's options, with "_" for "-".

    The file has them side by side, or in the parts decode, augment, model and loss of config.json.

    Raises:
        InputError: no such file, not YAML, or no settings in it.
    """
    import yaml

    path = user_path("config", path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = "it is not text"
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif isinstance(error, yaml.MarkedYAMLError):
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            reason = f"line {line}: {error.problem}"
        raise InputError(
            f"config: {path} cannot be read ({reason}); it must be a run's config.json or YAML"
        ) from None
    if not isinstance(content, dict):
        raise InputError(
            f"config: {path} holds no settings; "
            "a line is a setting and its value, such as epochs: 20"
        )
    settings: dict[str, Any] = {}
    for name, value in with_former_loss(content).items():
        if name in PARTS and not isinstance(value, dict):
            raise InputError(
                f"config: {name}: {value!r} is not accepted; it must hold settings by name"
            )
        inside = value if name in PARTS else {name: value}
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
            raise InputError(f"config: no setting is called {name!r}{did_you_mean(name, owners)}")
        owners[name][name] = _number(value) if name in numbers else value
    return TrainConfig.from_dict(plain)


def _number(value: Any) -> Any:
    """Return YAML's text for a number as the number: YAML reads 1e-3, without a point, as text."""
    if isinstance(value, list):
        return [_number(each) for each in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
