"""What is measured of a run: accuracies, the worth of its concentrations, and how its training went."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import statistics
import subprocess
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import torch

import vi_simsiam
from vi_simsiam.config import TrainConfig
from vi_simsiam.data.cache import cached
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.data.subsets import select
from vi_simsiam.engine.checkpoint import write_atomically
from vi_simsiam.engine.run import (
    METRICS,
    Run,
    load_run,
    open_splits,
    resolve_device,
    resolve_workers,
)
from vi_simsiam.engine.trainer import Trainer
from vi_simsiam.evaluation.augmented import AugmentedFeatures
from vi_simsiam.evaluation.features import FeatureSets, extract, labelled_splits
from vi_simsiam.evaluation.knn import KnnConfig, classify, evaluate_knn
from vi_simsiam.evaluation.linear import evaluate_linear, linear_preset
from vi_simsiam.evaluation.logistic import evaluate_logistic
from vi_simsiam.evaluation.scores import TRIVIAL
from vi_simsiam.evaluation.uncertainty import evaluate_uncertainty
from vi_simsiam.experiments.plan import label
from vi_simsiam.text import counted

CURVE = (
    "loss",
    "cosine",
    "kappa",
    "kappa_best",
    "z_std",
    "projection_spread",
    "effective_rank",
    "grad_norm",
)
CURVE_POINTS = 100
PROGRESS = "progress.jsonl"
_DIGITS = 5
_PROGRESS_COLUMNS = ("knn200", "knn200_epoch", "knn200_seconds")
_PROGRESS_TRAIN, _PROGRESS_VAL = 4_000, 1_000
_SECONDS = 30.0
"""That git may take, on a disk that is slow to answer."""
_PACKAGES = ("torch", "torchvision", "triton", "scikit-learn", "timm", "numpy", "pillow")


def measure_run(
    spec: dict[str, Any], config: TrainConfig, trained: dict[str, Any] | None
) -> dict[str, Any]:
    """The result of a run, the content of results/ARM-seed-N.json.

    Args:
        spec: what the run's process was told, see `runner`.
        config: what was trained.
        trained: how long and on what; None for a run that did not reach its end, of which nothing is measured.
    """
    folder = Path(spec["folder"])
    content = {
        "experiment": spec["experiment"],
        "arm": spec["arm"],
        "seed": spec["seed"],
        "data": label(config.data),
        "method": config.method,
        "config": without_places(config),
        "steps": None if trained is None else trained["steps"],
        "images": None if trained is None else trained["images"],
        "seconds": None if trained is None else trained["seconds"],
        "curve": {**curve(folder / METRICS), **progress_curve(folder / PROGRESS)},
        "accuracy": {},
        "correct": {},
        "val_images": None,
        "uncertainty": {},
        "device": describe(resolve_device(config.device)),
        "versions": {"vi-simsiam": vi_simsiam.__version__, "python": python_version()}
        | {package: version(package) for package in _PACKAGES},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if trained is None or not spec["measures"]:
        return content
    # The run may have been trained from another place than the images lie in now.
    opened = load_run(
        folder,
        device=config.device,
        workers=config.workers,
        data_root=config.data_root,
        cache_dir=config.cache_dir,
    )
    run = limited(opened, spec["val_images"])
    accuracy, correct, val_images = accuracies(run, spec["measures"])
    content |= {"accuracy": accuracy, "correct": correct, "val_images": val_images}
    if spec["uncertainty"] and config.method == "vi-simsiam":
        content["uncertainty"] = flat_uncertainty(evaluate_uncertainty(run, report=say))
    return content


def say(phrase: str) -> None:
    """Print what is being done: the last line of a log is shown while its run is at work."""
    print(phrase, flush=True)


def limited(run: Run, val_images: int | None) -> Run:
    """The run with at most so many validation images, drawn class by class, the same for every run."""
    val = run.splits.val
    if val_images is None or val is None or len(val) <= val_images:
        return run
    fewer = select(Splits(run.splits.name, val, None), images=val_images, distinct=False).train
    return dataclasses.replace(run, splits=dataclasses.replace(run.splits, val=fewer))


def accuracies(run: Run, measures: Iterable[str]) -> tuple[dict[str, float], dict[str, str], int]:
    """Accuracies of the trained backbone's features by measure, which images were right (base64), and the number of images.

    The result files of the evaluations are written to RUN/measured/: they lack the encoders that others compare with.
    """
    sources = {
        name: run.readable(source)[0] for name, source in labelled_splits(run.splits).items()
    }
    size, device, workers = run.config.augment.size, run.device, run.workers
    found = {}
    for name, source in sources.items():
        say(f"features of {counted(len(source), f'{name} image')}")
        found[name] = extract(run.model.backbone, source, size=size, device=device, workers=workers)
    path = run.path / "measured"
    path.mkdir(exist_ok=True)
    features = FeatureSets(
        path=path,
        data=run.splits.name,
        classes=sources["train"].classes or (),
        train={"trained": found["train"]},
        train_labels=torch.from_numpy(sources["train"].labels),
        val={"trained": found["val"]},
        val_labels=torch.from_numpy(sources["val"].labels),
        device=device,
        augmented=AugmentedFeatures(
            run.model.backbone,
            sources["train"],
            size=size,
            device=device,
            workers=workers,
            report=say,
        ),
    )
    evaluations: dict[str, Callable[[], dict[str, Any]]] = {
        "knn20": lambda: evaluate_knn(features, KnnConfig(k=20)),
        "knn200": lambda: evaluate_knn(features, KnnConfig(k=200)),
        "logistic": lambda: evaluate_logistic(features),
        "linear": lambda: evaluate_linear(features, linear_preset("paper")),
    }
    accuracy: dict[str, float] = {}
    correct: dict[str, str] = {}
    wanted = tuple(measures)
    for name, evaluate in evaluations.items():
        if name not in wanted:
            continue
        say(name)
        result = evaluate()
        accuracy[name], correct[name] = result["top1"]["trained"], result["correct"]["trained"]
        if name == "linear":
            accuracy["linear_top5"] = result["top5"]["trained"]
    return accuracy, correct, len(features.val_labels)


def flat_uncertainty(result: dict[str, Any]) -> dict[str, float | str]:
    """The figures of an uncertainty.json by name: of the concentration, and with "_baseline" of the best trivial score,
    whose name is that of "_baseline_name".

    Several data sets or kinds of damage count by their mean; the best score is the best in that mean.
    """
    figures: dict[str, float | str] = {}
    if result["calibration"] is not None:
        figures["calibration_error"] = result["calibration"]["error"]

    def add(
        name: str, parts: list[dict[str, float | None]], best: Callable[..., str] = max
    ) -> None:
        """`parts`: the figure of every score, for each data set or kind."""

        def mean(score: str) -> float | None:
            values = [
                value
                for part in parts
                if (value := part.get(score)) is not None and math.isfinite(value)
            ]
            return statistics.mean(values) if parts and len(values) == len(parts) else None

        if (own := mean("kappa")) is not None:
            figures[name] = own
        if baselines := {score: value for score in TRIVIAL if (value := mean(score)) is not None}:
            which = best(baselines, key=baselines.__getitem__)
            figures.update({f"{name}_baseline": baselines[which], f"{name}_baseline_name": which})

    def column(part: dict[str, Any], name: str) -> dict[str, float | None]:
        return {score: values[name] for score, values in part["scores"].items()}

    if result["misclassification"] is not None:
        add("auroc_misclassification", [column(result["misclassification"], "auroc")])
        add("aurc", [column(result["misclassification"], "aurc")], min)
        add("augrc", [column(result["misclassification"], "augrc")], min)
    for kind, seen in (("auroc_retrieval", True), ("auroc_retrieval_unseen", False)):
        add(
            kind,
            [
                part["scores"]
                for part in (result["retrieval"] or {}).values()
                if part["seen_classes"] == seen
            ],
        )
    add("ood_auroc", [column(part, "auroc") for part in result["ood"].values()])
    for name, part in result["ood"].items():
        add(f"ood_auroc_{name}", [column(part, "auroc")])
    add(
        "spearman_corruption", [column(part, "spearman") for part in result["corruptions"].values()]
    )
    return figures


def curve(path: Path) -> dict[str, list[float]]:
    """Epochs and metrics of a metrics.jsonl, at most `CURVE_POINTS` lines evenly apart and the last one."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if len(lines) > CURVE_POINTS:
        lines = [lines[i] for i in np.linspace(0, len(lines) - 1, CURVE_POINTS).round().astype(int)]
    names = [name for name in ("epoch", *CURVE) if lines and all(name in line for line in lines)]
    return {name: [_rounded(line[name]) for line in lines] for name in names}


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def without_places(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON types, without the machine's paths."""
    plain = config.to_dict()
    for name in ("data_root", "cache_dir"):
        del plain[name]
    frozen = config.frozen_run
    return {
        **plain,
        "data": label(config.data),
        "frozen_run": None if frozen is None else frozen.name,
    }


def describe(device: torch.device) -> str:
    """A device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({counted(torch.get_num_threads(), 'thread')})"


def commit() -> str | None:
    """The commit of the package's source tree; None where it is no git checkout."""
    root = Path(vi_simsiam.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package may lie in another project's checkout
        return None
    try:
        said = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()


class Progress:
    """Called after every epoch of a training: every so many epochs, kNN accuracy (k = 200, T = 0.1) against training time.

    On at most 4,000 training and 1,000 validation images, drawn class by class. Its own time is not counted: the
    trainer's clock stands still between epochs. Lines go to RUN/progress.jsonl; those beyond the step that a resumed run
    starts from are dropped.

    Args:
        trainer: of the run, before it starts.
        every: epochs between two of them; the last epoch has one always.
    """

    def __init__(self, trainer: Trainer, every: int) -> None:
        self.trainer, self.every = trainer, every
        config = trainer.config
        splits = open_splits(config)
        assert splits.val is not None
        self.workers = resolve_workers(config.workers, trainer.device)
        self.train = self._chosen(splits.train, _PROGRESS_TRAIN)
        self.val = self._chosen(splits.val, _PROGRESS_VAL)
        self.path = trainer.folder / PROGRESS
        lines = self.path.read_text().splitlines() if trainer.resume and self.path.is_file() else []
        self.lines = [line for line in map(json.loads, lines) if line["step"] <= trainer.step]
        ended = trainer.step > 0 and trainer.step % trainer.loader.steps_per_epoch == 0
        if ended and all(line["step"] != trainer.step for line in self.lines):
            self()  # the run was ended by a signal in the epoch's last step, which leaves its accuracy out

    def _chosen(self, source: ImageSource, most: int) -> PackedImages:
        config = self.trainer.config
        whole, _ = cached(source, cache_dir=config.cache_dir, workers=self.workers, console=None)
        if len(whole) <= most:
            return whole
        chosen = select(Splits(whole.name, whole, None), images=most, distinct=False).train
        assert isinstance(chosen, PackedImages)
        return chosen

    def __call__(self) -> None:
        """Note the accuracy, if it is time."""
        trainer = self.trainer
        epoch = trainer.step // trainer.loader.steps_per_epoch
        if epoch % self.every and epoch < trainer.config.epochs:
            return
        size, device = trainer.config.augment.size, trainer.device
        backbone = trainer.model.backbone
        train, val = (
            extract(backbone, source, size=size, device=device, workers=self.workers).to(device)
            for source in (self.train, self.val)
        )
        labels = torch.from_numpy(self.train.labels).to(device)
        predicted = classify(
            train, labels, val, classes=len(self.train.classes or ()), config=KnnConfig(k=200)
        )
        share = float((predicted.cpu() == torch.from_numpy(self.val.labels)).double().mean())
        self.lines.append(
            dict(zip(_PROGRESS_COLUMNS, (share, epoch, round(trainer.seconds, 3)), strict=True))
            | {"step": trainer.step}
        )
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_atomically(self.path, lambda file: file.write(text.encode()))


def progress_curve(path: Path) -> dict[str, list[float]]:
    """The columns of a progress.jsonl, shorter than those of the metrics: knn200, knn200_epoch and knn200_seconds."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {name: [line[name] for line in lines] for name in _PROGRESS_COLUMNS if lines}
