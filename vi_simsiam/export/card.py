"""The model card of an exported run: README.md with the front matter of the Hugging Face Hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vi_simsiam.config import flat
from vi_simsiam.engine.run import METRICS, Run
from vi_simsiam.evaluation.features import ENCODERS
from vi_simsiam.evaluation.results import read_result, unusable
from vi_simsiam.evaluation.uncertainty import comparisons
from vi_simsiam.export.formats import portable, preprocessing
from vi_simsiam.text import METHODS, counted, data_label, fill_template

NOT_MEASURED = "not measured"
NOT_DEFINED = "not defined"

# Names of data sets on the Hugging Face Hub.
_HUB_DATA = {
    "fashion-mini": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "imagenette": "frgfm/imagenette",
    "imagewoof": "frgfm/imagewoof",
}
_LIBRARIES = {"torchvision": "pytorch", "timm": "timm", "safetensors": "vi-simsiam", "onnx": "onnx"}
# Columns of accuracies: result file, its field, and the heading.
_COLUMNS = (
    ("knn", "top1", "kNN"),
    ("linear", "top1", "linear"),
    ("linear", "top5", "linear top-5"),
    ("linear", "held_out_top1", "linear, held out"),
    ("logistic", "top1", "logistic"),
)
# Concentrations that are the same for every image, or another image's.
_CONTROLS = ("constant", "global", "shuffled")
# Parts of uncertainty.json, and the measure that is missing without one.
_PARTS = {
    "calibration": "calibration error of E[mu.z] (0 is best)",
    "misclassification": "misclassification, AUROC",
    "retrieval": "retrieval, R-AUROC",
    "ood": "other data sets, AUROC",
    "corruptions": "corruptions, Spearman",
}


@dataclass(frozen=True)
class Check:
    """Differences between the outputs of a written file and of the run, in float32 on the CPU."""

    images: int
    source: str
    """Origin of the images."""
    differences: dict[str, float] | None
    """By output: the largest difference over the largest value. None if nothing could run it."""

    def line(self, weights: str) -> str:
        """One line for the terminal."""
        if self.differences is None:
            return (
                f"{weights} was not checked: onnxruntime is not installed "
                "(pip install 'vi-simsiam[onnx]')"
            )
        found = ", ".join(f"{value:.1e} in {name}" for name, value in self.differences.items())
        images = counted(self.images, "image")
        return (
            f"{weights} checked on {images} of {self.source}: differs by {found} of the largest "
            "value"
        )


def model_card(run: Run, format: str, *, check: Check, versions: dict[str, str]) -> str:
    """The text of README.md for one exported format.

    Results are those in the run folder (knn.json, linear.json, logistic.json, uncertainty.json);
    the others are given as not measured.

    Raises:
        InputError: a result file cannot be read, or lacks what the card shows.
    """
    from huggingface_hub import ModelCardData

    config, model = run.config, run.config.model
    vi = config.method == "vi-simsiam"
    kind, _, path = config.data.partition(":")
    columns: dict[str, dict[str, float]] = {
        heading: (read_result(run.path, name) or {}).get(key) or {}
        for name, key, heading in _COLUMNS
    }
    name = f"{model.backbone} by {METHODS[config.method]}"
    front_matter = ModelCardData(
        library_name=_LIBRARIES[format],
        pipeline_tag="image-feature-extraction",
        tags=["self-supervised-learning", config.method, *(["uncertainty"] if vi else []), format],
        datasets=[_HUB_DATA[config.data]] if config.data in _HUB_DATA else None,
        model_name=name,
        eval_results=_hub_results(config.data, columns) or None,
    )
    rows = [
        (encoder, [_percent(shares.get(encoder)) for shares in columns.values()])
        for encoder in ENCODERS
    ]
    conv1 = run.model.state_dict().get("backbone.conv1.weight")
    uncertainty = read_result(run.path, "uncertainty")
    content = {
        "front_matter": front_matter.to_yaml().strip(),
        "name": name,
        "format": format,
        "vi": vi,
        "architecture": model.backbone,
        "stem_width": conv1.shape[0] if model.stem == "small" and conv1 is not None else None,
        "data": kind if kind in _HUB_DATA else f"images of one's own ({Path(path).name})",
        "features": run.model.features,
        "dim": run.model.dim,
        "seen": preprocessing(config),
        "background": config.decode.background,
        "check": check,
        "check_images": counted(check.images, "image"),
        "measures": list(columns),
        "rows": rows,
        "uncertainty": _uncertainty(uncertainty, run.path),
        "uncertainty_measured": uncertainty is not None,
        "control": config.loss.concentration if config.loss.concentration in _CONTROLS else None,
        "epochs": counted(config.epochs, "epoch"),
        "progress": _progress(run),
        "settings": {key: json.dumps(value) for key, value in flat(portable(config)).items()},
        "versions": ", ".join(f"{package} {number}" for package, number in versions.items()),
    }
    return fill_template("model_card.md", content, escape=False)


def _hub_results(data: str, columns: dict[str, dict[str, float]]) -> list[Any]:
    """Accuracies of the trained encoder as the Hub's evaluation results."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=_HUB_DATA.get(data, data_label(data)),
            dataset_name=data_label(data),
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=heading,
            metric_value=round(shares["trained"], 5),
        )
        for heading, shares in columns.items()
        if shares.get("trained") is not None
    ]


def _uncertainty(result: dict[str, Any] | None, run_folder: Path) -> list[tuple[str, ...]]:
    """Rows: the measure, kappa's number, and the best trivial and other score by name.

    Raises:
        InputError: the result lacks a part.
    """
    if result is None:
        return [(text, NOT_MEASURED, "-", "-") for text in _PARTS.values()]
    rows: list[tuple[str, ...]] = []
    try:
        if result["calibration"]:
            error = f"{result['calibration']['error']:.4f}"
            rows.append((_PARTS["calibration"], error, "-", "-"))
        for row in comparisons(result):
            kappa = NOT_DEFINED if row.kappa is None else f"{row.kappa:.3f}"
            others = ((row.baseline, row.value), (row.other, row.other_value))
            best = ("-" if value is None else f"{value:.3f} ({name})" for name, value in others)
            rows.append((f"{row.part}, {row.measure}", kappa, *best))
        missing = [text for part, text in _PARTS.items() if not result[part]]
    except (KeyError, TypeError, AttributeError) as error:
        path = run_folder / "uncertainty.json"
        raise unusable(path, f"lacks what the card shows ({error!r})") from error
    return [*rows, *((text, NOT_MEASURED, "-", "-") for text in missing)]


def _percent(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:.1f} %"


def _progress(run: Run) -> str:
    """Progress of the training by the last line of the run's log."""
    try:
        line = json.loads((run.path / METRICS).read_text().splitlines()[-1])
        return f"the log ends at epoch {line['epoch']:.2f} with a loss of {line['loss']:.4g}"
    except (OSError, IndexError, KeyError, TypeError, ValueError):
        return "the run has no log of its progress"
