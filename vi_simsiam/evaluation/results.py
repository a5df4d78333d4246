"""What every result file says beside its figures, and how it is written."""

from __future__ import annotations

from importlib.metadata import version
from platform import python_version
from typing import Any

from vi_simsiam import __version__
from vi_simsiam.engine.checkpoint import write_json
from vi_simsiam.evaluation.features import FeatureSets


def write_result(name: str, features: FeatureSets, body: dict[str, Any], packages: tuple[str, ...]) -> dict[str, Any]:
    """Write what was evaluated, `body`, and the versions of `packages` to RUN/`name`.json; return its content."""
    result = {
        "evaluation": name,
        "data": features.data,
        "classes": len(features.classes),
        "train_images": len(features.train_labels),
        "val_images": len(features.val_labels),
        "unreadable_images": features.unreadable,
        "features": {encoder: feature.shape[1] for encoder, feature in features.train.items()},
        "device": features.device.type,
        **body,
        "versions": {
            "vi-simsiam": __version__,
            "python": python_version(),
            **{package: version(package) for package in packages},
        },
    }
    write_json(features.path / f"{name}.json", result)
    return result
