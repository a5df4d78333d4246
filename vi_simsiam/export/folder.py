"""The folder that an export writes: weights, settings and a model card, checked before it appears.

The card is README.md with the front matter of the Hugging Face Hub.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vi_simsiam.config import TrainConfig, flat
from vi_simsiam.data.sources import ImageSource, UnreadableError
from vi_simsiam.data.views import eval_view
from vi_simsiam.data_names import data_label
from vi_simsiam.engine.log import read_log
from vi_simsiam.engine.run import Run
from vi_simsiam.errors import InputError, none_of
from vi_simsiam.evaluation.comparisons import comparisons
from vi_simsiam.evaluation.features import ENCODERS, STARTING
from vi_simsiam.evaluation.results import read_result
from vi_simsiam.export.formats import (
    WEIGHTS,
    outputs,
    portable,
    preprocessing,
    write_onnx,
    write_safetensors,
    write_timm,
    write_torchvision,
)
from vi_simsiam.files import write_json, write_text
from vi_simsiam.info import versions
from vi_simsiam.paths import user_path, utf8_path
from vi_simsiam.text import METHODS, counted, fill_template, markdown, one_line

CARD, SETTINGS, TIMM_SETTINGS = "README.md", "config.json", "training.json"
CHECK_IMAGES = 8
"""Images on which a written file is compared with the run."""
# Largest difference over largest value. Libraries sum float32 in different orders;
# kappa = scale * link(raw) carries the absolute error of raw, up to ten times its own rounding.
TOLERANCES = {"embedding": 1e-5, "loc": 1e-5, "concentration": 1e-4}
NOT_MEASURED = "not measured"

# By format: the writer, its file, the packages whose versions the card names, and the Hub's name of
# the library.
_FORMATS = {
    "torchvision": (write_torchvision, "model.pth", ("torchvision",), "pytorch"),
    "timm": (write_timm, WEIGHTS, ("torchvision", "timm", "safetensors"), "timm"),
    "safetensors": (
        write_safetensors,
        WEIGHTS,
        ("torchvision", "safetensors"),
        "vi-simsiam",
    ),
    "onnx": (
        write_onnx,
        "model.onnx",
        ("torchvision", "onnx", "onnxscript", "onnxruntime"),
        "onnx",
    ),
}
FORMATS = tuple(_FORMATS)
"""Formats of an export."""
# Names of data sets on the Hugging Face Hub.
_HUB_DATA = {
    "fashion-mini": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "imagenette": "frgfm/imagenette",
    "imagewoof": "frgfm/imagewoof",
}
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


def export_run(
    run: Run,
    format: str,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Write a run's weights, its settings and a model card to a folder that others can use.

    The outputs of the written file are compared with the run's on a few of its images; the card
    states the difference.

    Args:
        run: a trained run.
        format: one of `FORMATS`.
        out: folder to write; None for RUN/export/FORMAT.
        overwrite: replace an earlier export in that folder.
        report: called with the result of the comparison, one line.

    Returns:
        The folder.

    Raises:
        InputError: an unknown format, one that cannot hold this run or whose packages are missing,
            a folder that must not be written to, weights that are not finite, or no readable image.
    """
    if format not in _FORMATS:
        raise none_of("format", format, _FORMATS)
    if run.path == Path():
        raise InputError("run: it was fitted without a run folder; export needs one")
    write, weights, packages, _ = _FORMATS[format]
    required = ("onnx", "onnxscript") if format == "onnx" else ()
    if missing := [each for each in required if importlib.util.find_spec(each) is None]:
        raise InputError(
            f"format: onnx needs {' and '.join(missing)}; "
            "install with pip install 'vi-simsiam[onnx]'"
        )
    if out is None and (run.path / "export").is_symlink():
        raise InputError(f"out: {run.path / 'export'} is a link; say where to write with --out")
    target = (run.path / "export" / format if out is None else user_path("out", out)).absolute()
    _check_target(target, overwrite)

    # In float32 on the CPU, on whatever device the run was opened.
    model = copy.deepcopy(run.model).cpu().float().eval()
    images, source = _check_images(run)
    expected = outputs(model)(images)
    if not all(bool(torch.isfinite(value).all()) for value in expected.values()):
        raise InputError(f"run: the features of {run.path} are not finite; its weights are damaged")

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
        aside = Path(place, "new")
        aside.mkdir()
        with utf8_path(aside) as folder:
            compute = write(model, run.config, folder / weights)
            found = None if compute is None else _differences(compute(images), expected)
        check = {"images": len(images), "source": source, "differences": found}
        if report is not None:
            report(_line(weights, check))
        installed = versions(("torch", *packages))
        settings = {
            "format": format,
            "weights": weights,
            "method": run.config.method,
            "architecture": run.config.model.backbone,
            "stem": run.config.model.stem,
            "num_features": model.features,
            "dim": run.config.model.dim,
            "preprocessing": preprocessing(run.config),
            "training": portable(run.config),
            "check": check,
            "versions": installed,
        }
        # In a timm folder config.json is timm's own.
        write_json(aside / (TIMM_SETTINGS if format == "timm" else SETTINGS), settings)
        write_text(aside / CARD, model_card(run, format, check=check, versions=installed))
        earlier = Path(f"{place}.earlier")  # not inside: what is there is removed on any error
        try:
            if target.is_dir():
                target.rename(earlier)
            aside.rename(target)
        except BaseException:
            if earlier.exists():
                with contextlib.suppress(OSError):
                    earlier.rename(target)
            raise
    shutil.rmtree(earlier, ignore_errors=True)
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse a folder that must not be written to, before anything is computed."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"out: {target} is a file or a link, not a folder")
    names = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    known = {CARD, SETTINGS, TIMM_SETTINGS, "model.onnx.data"}
    known.update(weights for _, weights, _, _ in _FORMATS.values())
    if names and (CARD not in names or names - known):
        raise InputError(f"out: {target} holds other files; give an empty or new folder")
    if names and not overwrite:
        raise InputError(f"out: {target} exists; say --overwrite to replace it")


def _check_images(run: Run) -> tuple[Tensor, str]:
    """A few un-augmented validation or training images (N, 3, S, S), and their origin."""
    source: ImageSource = run.splits.val or run.splits.train
    view = eval_view(run.config.augment.size, run.config.augment.constants)
    # A coarse grid comes first; other images stand in for unreadable ones.
    grid = np.linspace(0, len(source) - 1, min(len(source), CHECK_IMAGES), dtype=np.int64).tolist()
    images: list[Tensor] = []
    reason: UnreadableError | None = None
    for index in dict.fromkeys([*grid, *range(min(len(source), 100))]):
        if len(images) == CHECK_IMAGES:
            break
        try:
            images.append(view(source.content(index)))
        except UnreadableError as error:
            reason = error
    if not images:
        raise InputError(f"data: {source.name} holds no image to check the export with") from reason
    # The last two parts of a path name the images without the machine's own folders.
    return torch.stack(images), "/".join(Path(source.name).parts[-2:])


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference over largest value, by output. Raises RuntimeError beyond rounding."""
    differences = {}
    for name, value in found.items():
        scale = expected[name].abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        differences[name] = float((value - expected[name]).abs().max() / scale)
        if not differences[name] <= TOLERANCES[name]:
            raise RuntimeError(
                f"the written file gives another {name} than the run: they differ by "
                f"{differences[name]:.2g} of the largest value, and at most "
                f"{TOLERANCES[name]:.0e} is rounding; nothing was exported"
            )
    return differences


def _line(weights: str, check: dict[str, Any]) -> str:
    if check["differences"] is None:
        return (
            f"{weights} was not checked: onnxruntime is not installed "
            "(pip install 'vi-simsiam[onnx]')"
        )
    found = ", ".join(f"{value:.1e} in {name}" for name, value in check["differences"].items())
    images = f"{counted(check['images'], 'image')} of {check['source']}"
    return f"{weights} checked on {images}: differs by {found} of the largest value"


def title(config: TrainConfig) -> str:
    """The name of a published model: the method made it, or the distributions of one at hand."""
    fitted = " with distributions" if config.model.projector == "standardised" else ""
    return f"{config.model.backbone}{fitted} by {METHODS[config.method]}"


def model_card(run: Run, format: str, *, check: dict[str, Any], versions: dict[str, str]) -> str:
    """The text of README.md for one exported format.

    Results are those in the run folder (knn.json, linear.json, logistic.json, uncertainty.json);
    the others, and those of other weights than the last checkpoint's, are given as not measured.

    Raises:
        InputError: a result file cannot be read, or lacks what the card shows.
    """
    from huggingface_hub import EvalResult, ModelCardData

    config, model = run.config, run.config.model
    vi = config.method == "vi-simsiam"
    label = one_line(data_label(config.data))
    kind, _, name_of_data = label.partition(":")
    columns: dict[str, dict[str, float]] = {
        heading: (_result(run, name) or {}).get(key) or {} for name, key, heading in _COLUMNS
    }
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=_HUB_DATA.get(config.data, label),
            dataset_name=label,
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=heading,
            metric_value=round(shares["trained"], 5),
        )
        for heading, shares in columns.items()
        if shares.get("trained") is not None
    ]
    name = title(config)
    front_matter = ModelCardData(
        library_name=_FORMATS[format][-1],
        pipeline_tag="image-feature-extraction",
        tags=["self-supervised-learning", config.method, *(["uncertainty"] if vi else []), format],
        datasets=[_HUB_DATA[config.data]] if config.data in _HUB_DATA else None,
        model_name=name,
        eval_results=results or None,
    )
    conv1 = run.model.state_dict().get("backbone.conv1.weight")
    uncertainty = _result(run, "uncertainty")
    content = {
        "front_matter": front_matter.to_yaml().strip(),
        "name": name,
        "format": format,
        "vi": vi,
        "fitted": model.projector == "standardised",
        "architecture": model.backbone,
        "stem_width": conv1.shape[0] if model.stem != "imagenet" and conv1 is not None else None,
        "stem_stride": 2 if model.stem == "medium" else 1,
        "data": kind if kind in _HUB_DATA else f"images of one's own ({markdown(name_of_data)})",
        "features": run.model.features,
        "dim": run.model.dim,
        "seen": preprocessing(config),
        "background": config.decode.background,
        "check": check | {"source": markdown(check["source"])},
        "check_images": counted(check["images"], "image"),
        "measures": list(columns),
        "rows": [
            (encoder, [_percent(shares.get(encoder)) for shares in columns.values()])
            for encoder in (ENCODERS[0], STARTING, *ENCODERS[1:])
            if encoder in ENCODERS or any(encoder in shares for shares in columns.values())
        ],
        "uncertainty": [map(markdown, row) for row in _uncertainty(uncertainty)],
        "uncertainty_measured": uncertainty is not None,
        "control": config.loss.concentration if config.loss.concentration in _CONTROLS else None,
        "epochs": counted(config.epochs, "epoch"),
        "progress": _progress(run),
        "settings": {
            key: markdown(json.dumps(value)) for key, value in flat(portable(config)).items()
        },
        "versions": ", ".join(f"{package} {number}" for package, number in versions.items()),
    }
    return fill_template("model_card.md", content, escape=False)


def _uncertainty(result: dict[str, Any] | None) -> list[tuple[str, ...]]:
    """Rows: the measure, kappa's number, and the best trivial and other score by name."""
    if result is None:
        return [(text, NOT_MEASURED, "-", "-") for text in _PARTS.values()]
    rows: list[tuple[str, ...]] = []
    if result["calibration"]:
        error = f"{result['calibration']['error']:.4f}"
        rows.append((_PARTS["calibration"], error, "-", "-"))
    for row in comparisons(result):
        kappa = "not defined" if row.kappa is None else f"{row.kappa:.3f}"
        others = ((row.baseline, row.value), (row.other, row.other_value))
        best = ("-" if value is None else f"{value:.3f} ({name})" for name, value in others)
        rows.append((f"{row.part}, {row.measure}", kappa, *best))
    missing = [text for part, text in _PARTS.items() if not result[part]]
    return [*rows, *((text, NOT_MEASURED, "-", "-") for text in missing)]


def _result(run: Run, name: str) -> Any:
    """A result of the run's weights; those in its folder are of the last checkpoint."""
    return read_result(run.path, name) if run.weights == "last" else None


def _percent(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:.1f} %"


def _progress(run: Run) -> str:
    """Progress of the training by the last line of the run's log."""
    if run.weights == "best":
        return "the weights with the best kNN accuracy during the training"
    lines, _ = read_log(run.path)
    last = lines[-1] if lines else {}
    if "epoch" not in last or last.get("loss") is None:
        return "the run has no log of its progress"
    return f"the log ends at epoch {last['epoch']:.2f} with a loss of {last['loss']:.4g}"
