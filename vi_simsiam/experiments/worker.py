"""One run of an experiment: `python -m vi_simsiam.experiments.worker SPEC.json`.

Trains, then measures: accuracies, the quality of the concentrations, and the training itself. What
is done already is skipped: a killed run continues where it was.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console

import vi_simsiam
from vi_simsiam.config import TrainConfig
from vi_simsiam.data.subsets import at_most, labelled_splits
from vi_simsiam.data_names import data_label
from vi_simsiam.engine.forward import extract
from vi_simsiam.engine.knn import KnnConfig
from vi_simsiam.engine.log import read_log
from vi_simsiam.engine.processes import INTERRUPTED, locked
from vi_simsiam.engine.run import (
    Run,
    check_config,
    load_run,
    read_config,
    resolve_device,
)
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import TrainingError, UserError
from vi_simsiam.evaluation.features import FeatureSets, random_features
from vi_simsiam.evaluation.knn import evaluate_knn
from vi_simsiam.evaluation.linear import evaluate_linear, linear_preset
from vi_simsiam.evaluation.logistic import evaluate_logistic
from vi_simsiam.evaluation.scores import TRIVIAL
from vi_simsiam.evaluation.uncertainty import evaluate_uncertainty
from vi_simsiam.experiments.forms import Spec, Trained
from vi_simsiam.experiments.progress import COLUMNS, Progress, read_progress
from vi_simsiam.experiments.purposes import purposes
from vi_simsiam.experiments.runner import TRAINED
from vi_simsiam.files import read_json, write_json
from vi_simsiam.fitting import fit_concentration
from vi_simsiam.info import versions
from vi_simsiam.text import counted, one_line

_SECONDS_TO_LOCK = 90.0
"""Time to wait for an earlier process of the same run, which may still be saving."""
CURVE = (
    "loss", "cosine", "kappa", "kappa_best", "z_std", "projection_spread", "effective_rank",
    "grad_norm",
)  # fmt: skip
CURVE_POINTS = 100
_report = partial(print, flush=True)
"""Prints the current action: the last line of the log is shown while the run is running."""
_PACKAGES = ("torch", "torchvision", "triton", "scikit-learn", "timm", "numpy", "pillow")


def main(path: Path) -> int:
    """Do the run of the specification in `path`.

    Returns:
        The exit code: 0 done, 2 failed for a reason that is printed, 130 interrupted.
    """
    try:
        spec = cast(dict[str, Any], read_json(path, Spec, "spec"))
        folder = Path(spec["folder"])
        lock, busy = folder.with_name(f".{folder.name}.lock"), f"run: another process uses {folder}"
        with locked(lock, busy, seconds=_SECONDS_TO_LOCK):
            _report(work(spec))
        return 0
    except UserError as error:
        print(one_line(f"vi-simsiam: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(": ".join(("interrupted", *interruption.args)), flush=True)
        return INTERRUPTED


def work(spec: dict[str, Any]) -> str:
    """Do the run of a specification and write its result file; returns a line on the result."""
    result, folder = Path(spec["result"]), Path(spec["folder"])
    config = TrainConfig.from_dict(spec["config"])
    if result.is_file():
        return "measured before"
    trained: dict[str, Any] = {}
    diverged: dict[str, Any] = {}
    try:
        if spec["fitted"]:
            after = None if spec["after"] is None else Path(spec["after"])
            trained, config = fit(config, folder, after)
        else:
            trained = train(config, folder, spec["progress_every"])
    except TrainingError as error:
        if "not finite" not in str(error):
            raise
        # Divergence is a result, too: the same seed would end in the same way. The rest of the
        # message names a path of this machine.
        diverged = {"diverged": str(error).partition(";")[0]}
    content = measure_run(spec, config, trained) | diverged
    write_json(result, content)
    if not spec["measures"]:  # only the training counts, so the weights are not kept
        shutil.rmtree(folder)
    if diverged:
        return f"diverged: {diverged['diverged']}"
    if not spec["measures"]:
        return f"cosine {content['curve']['cosine'][-1]:.2f}"
    return "  ".join(f"{name} {100 * share:.1f} %" for name, share in content["accuracy"].items())


def train(config: TrainConfig, folder: Path, progress_every: int | None = None) -> dict[str, Any]:
    """Train a run or continue it; returns the content of RUN/trained.json.

    After a signal the message of the KeyboardInterrupt names the step that was saved.
    """
    done = folder / TRAINED
    if done.is_file():
        check_config(read_config(folder), config, folder)
        return cast(dict[str, Any], read_json(done, Trained, "run"))
    trainer = Trainer(config, folder, resume="auto", console=Console(soft_wrap=True))
    progress = None if progress_every is None else Progress(trainer, progress_every)
    try:
        trainer.fit(epoch_done=progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"saved at step {trainer.saver.step}") from None
    trained = {
        "steps": trainer.total_steps,
        "images": len(trainer.loader.source),
        "seconds": round(trainer.seconds, 3),
        "device": str(trainer.device),
    }
    write_json(done, trained)
    return trained


def fit(
    config: TrainConfig, folder: Path, after: Path | None
) -> tuple[dict[str, Any], TrainConfig]:
    """Fit a distribution to the run `after`, or to the backbone of `config` with its given weights.

    Returns:
        The content of RUN/trained.json, and the configuration of the run.
    """
    done = folder / TRAINED
    if not done.is_file():
        start = time.perf_counter()
        encoder, size = after or config.model.backbone, config.augment.size
        if after is not None:
            parts = dataclasses.replace(config.model, pretrained=False)
            config = dataclasses.replace(config, init=None, model=parts)
        fit_concentration(
            encoder, config.data, out=folder, config=config, size=size, overwrite=folder.exists()
        )
        write_json(done, {"seconds": round(time.perf_counter() - start, 3)})
    return cast(dict[str, Any], read_json(done, Trained, "run")), read_config(folder)


def measure_run(
    spec: dict[str, Any], config: TrainConfig, trained: dict[str, Any]
) -> dict[str, Any]:
    """Measure a run; returns the content of results/ARM-seed-N.json.

    `trained` is the content of trained.json, empty for a run that did not reach its end, which is
    not measured.
    """
    folder, device = Path(spec["folder"]), resolve_device(config.device)
    on_cpu = f"cpu ({counted(torch.get_num_threads(), 'thread')})"
    content = {
        **{name: spec[name] for name in ("experiment", "arm", "seed")},
        "data": data_label(config.data),
        "method": config.method,
        "config": without_places(config),
        **{name: trained.get(name) for name in ("steps", "images", "seconds")},
        "curve": curve(folder),
        "accuracy": {},
        "correct": {},
        "val_images": None,
        "uncertainty": {},
        "purposes": {},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        "versions": versions(_PACKAGES),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if not trained or not spec["measures"]:
        return content
    here = ("device", "workers", "data", "data_root", "cache_dir")
    # The images may have moved since the training.
    run = load_run(folder, **{name: getattr(config, name) for name in here})
    if (val := run.splits.val) is not None:
        splits = dataclasses.replace(run.splits, val=at_most(val, spec["val_images"]))
        run = dataclasses.replace(run, splits=splits)
    content |= _accuracies(run, spec["measures"])
    if spec["uncertainty"] and config.method == "vi-simsiam":
        found = evaluate_uncertainty(run, ood=spec["ood"], report=_report)
        content |= {"uncertainty": flat_uncertainty(found), "purposes": purposes(found)}
    return content


def _accuracies(run: Run, measures: Iterable[str]) -> dict[str, Any]:
    """Measure the features of the trained backbone.

    The result files of the evaluations go to RUN/measured/: they lack the encoders that the run's
    own result files compare with.
    """
    readable = {name: run.readable(part)[0] for name, part in labelled_splits(run.splits).items()}
    train, val, augment = readable["train"], readable["val"], run.config.augment
    options: dict[str, Any] = {
        "size": augment.size,
        "device": run.device,
        "workers": run.workers,
        "constants": augment.constants,
    }
    found = {}
    for name, source in readable.items():
        _report(f"features of {counted(len(source), f'{name} image')}")
        found[name] = extract(run.model.backbone, source, **options)
    path = run.path / "measured"
    path.mkdir(exist_ok=True)
    features = FeatureSets(
        path=path,
        data=run.splits.name,
        classes=train.classes or (),
        train={"trained": found["train"]},
        train_labels=torch.from_numpy(train.labels),
        val={"trained": found["val"]},
        val_labels=torch.from_numpy(val.labels),
        device=run.device,
        step=run.step,
        augmented=lambda: random_features(run.model.backbone, train, report=_report, **options),
    )
    evaluations: dict[str, Callable[[], dict[str, Any]]] = {
        "knn20": lambda: evaluate_knn(features, KnnConfig(k=20)),
        "knn200": lambda: evaluate_knn(features, KnnConfig(k=200)),
        "logistic": lambda: evaluate_logistic(features),
        "linear": lambda: evaluate_linear(features, linear_preset("paper")),
    }
    accuracy, correct = {}, {}
    for name in [name for name in evaluations if name in measures]:
        _report(name)
        result = evaluations[name]()
        accuracy[name], correct[name] = result["top1"]["trained"], result["correct"]["trained"]
        if name == "linear":
            accuracy["linear_top5"] = result["top5"]["trained"]
    return {"accuracy": accuracy, "correct": correct, "val_images": len(features.val_labels)}


def flat_uncertainty(result: dict[str, Any]) -> dict[str, float | str]:
    """The figures of an uncertainty.json by name.

    A figure of the concentration stands under its own name, the one of the best trivial score under
    NAME_baseline, and that score's name under NAME_baseline_name. Several data sets or corruptions
    count by their mean, and the best score is the best in that mean.
    """
    figures: dict[str, float | str] = {}
    if result["calibration"] is not None:
        figures["calibration_error"] = result["calibration"]["error"]

    def add(name: str, parts: list[dict[str, Any]], key: str, best: Callable[..., str]) -> None:
        """Add a figure from the scores of each data set or corruption."""
        means = {}
        for score in ("kappa", *TRIVIAL):
            values = [part["scores"].get(score, {}).get(key) for part in parts]
            if parts and all(value is not None and math.isfinite(value) for value in values):
                means[score] = statistics.mean(values)
        if "kappa" in means:
            figures[name] = means.pop("kappa")
        if means:
            score = best(means, key=means.__getitem__)
            figures.update({f"{name}_baseline": means[score], f"{name}_baseline_name": score})

    errors = [] if result["misclassification"] is None else [result["misclassification"]]
    add("auroc_misclassification", errors, "auroc", max)
    add("aurc", errors, "aurc", min)
    add("augrc", errors, "augrc", min)
    for name, seen in (("auroc_retrieval", True), ("auroc_retrieval_unseen", False)):
        parts = [
            {"scores": {score: {"auroc": value} for score, value in part["scores"].items()}}
            for part in (result["retrieval"] or {}).values()
            if part["seen_classes"] == seen
        ]
        add(name, parts, "auroc", max)
    add("ood_auroc", list(result["ood"].values()), "auroc", max)
    for name, part in result["ood"].items():
        add(f"ood_auroc_{name}", [part], "auroc", max)
    add("spearman_corruption", list(result["corruptions"].values()), "spearman", max)
    return figures


def curve(folder: Path) -> dict[str, list[float]]:
    """Epochs and metrics of a run, at most `CURVE_POINTS` evenly spaced lines, and its progress."""
    lines, progress = read_log(folder)[0], read_progress(folder)
    if len(lines) > CURVE_POINTS:
        lines = [lines[i] for i in np.linspace(0, len(lines) - 1, CURVE_POINTS).round().astype(int)]
    names = [
        name
        for name in ("epoch", *CURVE)
        if lines and all(line.get(name) is not None for line in lines)
    ]
    return {
        **{name: [float(f"{line[name]:.5g}") for line in lines] for name in names},
        **{name: [line[name] for line in progress] for name in COLUMNS if progress},
    }


def without_places(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON types, without the machine's paths."""
    plain = config.to_dict()
    del plain["data_root"], plain["cache_dir"]
    init = config.init
    return {**plain, "data": data_label(config.data), "init": init and init.name}


def _commit() -> str | None:
    """The commit of the package's source tree; None if it is no git checkout."""
    root = Path(vi_simsiam.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package may lie in another project's checkout
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return found.stdout.strip()
    except (OSError, subprocess.SubprocessError):  # git can be slow on a busy disk
        return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
