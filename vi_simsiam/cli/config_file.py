"""Settings from a file: a run's config.json, or a YAML file of one's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vi_simsiam.config import TrainConfig, with_former_loss
from vi_simsiam.errors import InputError, did_you_mean
from vi_simsiam.paths import user_path

_PARTS = ("decode", "augment", "model", "loss")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML or JSON file by the names of the command line's options, with "_" for "-".

    They stand side by side, or in the parts decode, augment, model and loss as in config.json.

    Raises:
        InputError: no such file, no YAML, or no settings in it.
    """
    import yaml

    path = user_path("config", path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _unreadable(path, f"line {line}: {error.problem}") from None
    except (UnicodeDecodeError, yaml.YAMLError):
        raise _unreadable(path, "it is not text") from None
    if not isinstance(content, dict):
        raise InputError(
            f"config: {path} holds no settings; a line is a setting and its value, such as epochs: 20"
        )
    settings: dict[str, Any] = {}
    for name, value in with_former_loss(content).items():
        if name in _PARTS and not isinstance(value, dict):
            raise InputError(
                f"config: {name}: {value!r} is not accepted; it must hold settings by name"
            )
        inside = value if name in _PARTS else {name: value}
        settings |= {str(key).lstrip("-").replace("-", "_"): each for key, each in inside.items()}
    return settings


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(
        f"config: {path} cannot be read ({reason}); it must be a run's config.json or YAML"
    )


def updated(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """`config` with these settings changed.

    Raises:
        InputError: a setting is unknown or has a value that is not accepted.
    """
    plain = config.to_dict()
    homes = {name: plain for name in plain if name not in _PARTS} | {
        name: plain[p] for p in _PARTS for name in plain[p]
    }
    numbers = {
        field.name
        for part in (config, *(getattr(config, name) for name in _PARTS))
        for field in dataclasses.fields(part)
        if "float" in str(field.type)
    }
    for name, value in settings.items():
        if name not in homes:
            raise InputError(f"config: no setting is called {name!r}{did_you_mean(name, homes)}")
        homes[name][name] = _number(value) if name in numbers else value
    return TrainConfig.from_dict(plain)


def _number(value: Any) -> Any:
    """YAML takes 1e-3, without a point, for text."""
    if isinstance(value, list):
        return [_number(each) for each in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
