"""The run folder: its files, the checks before training, and opening a finished run."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from vi_simsiam.checks import choice
from vi_simsiam.config import TrainConfig, differing_fields
from vi_simsiam.data.cache import cached
from vi_simsiam.data.datasets import Splits, open_dataset
from vi_simsiam.data.decoding import cores
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ImageSource, Unreadable
from vi_simsiam.data.subsets import difference, select
from vi_simsiam.data_names import data_label
from vi_simsiam.engine.checkpoint import (
    FORMER,
    Checkpoint,
    checkpoints,
    load_best,
    load_last,
)
from vi_simsiam.engine.origin import ORIGIN, check_code, mark, placed, places
from vi_simsiam.engine.processes import locked
from vi_simsiam.errors import ImageWarning, InputError
from vi_simsiam.files import read_json, write_json
from vi_simsiam.models import SimSiam, build_model
from vi_simsiam.paths import user_path

CONFIG, METRICS, KERNELS = "config.json", "metrics.jsonl", "kernels.json"
LOGGERS, FITTED = "loggers.json", "fitted.json"
FAILURE, FAILED_VIEWS = "failure.json", "failure.png"
START = "start.safetensors"
"""The backbone's weights at the start, in a run that began with given ones."""
LOCK = ".lock"
_CHECKPOINTS = "checkpoint-*.safetensors"
# What an interrupted write of any file leaves, see `write_atomically`.
_REMAINS = f".*.{'[0-9a-f]' * 16}"
# Results of an earlier run.
_RESULTS = (
    _CHECKPOINTS, FORMER, START, METRICS, KERNELS, LOGGERS, FITTED, FAILURE, FAILED_VIEWS,
    ORIGIN, "events.out.tfevents.*", "knn.json", "linear.json", "logistic.json",
    "uncertainty.json", "curves.png", "kappa.png", "density.png", "reliability.png",
    "risk_coverage.png", "corruptions.png", "scores.png", "report.html",
)  # fmt: skip


Resume = bool | Literal["auto"]
Weights = Literal["last", "best"]


@dataclass(frozen=True)
class Run:
    """A trained run, opened for evaluation."""

    path: Path
    config: TrainConfig
    model: SimSiam
    """The weights of a checkpoint, in eval mode, on `device`."""
    splits: Splits
    """The images of training and evaluation, as the configuration selects them."""
    device: torch.device
    workers: int
    step: int
    """The optimiser step of the weights."""
    steps: int
    """Those of the whole training."""
    weights: Weights = "last"
    """The checkpoint of the weights."""

    def __repr__(self) -> str:
        method, data, model = self.config.method, self.config.data, self.config.model
        network = f"{model.backbone}, D = {model.dim}, {self.device}"
        return f"Run({str(self.path)!r}: {method} on {data}, {network})"

    @property
    def unfinished(self) -> str:
        """The end of a line on a result of earlier weights than the last step's, else empty."""
        early = self.step < self.steps
        return f", measured at step {self.step} of {self.steps}" if early else ""

    def readable(self, source: ImageSource) -> tuple[PackedImages, list[Unreadable]]:
        """The decoded images of a split, and those that cannot be read.

        An ImageWarning names the latter, and other losses.
        """
        images, unreadable = cached(
            source, cache_dir=self.config.cache_dir, workers=self.workers, console=None
        )
        for text in images.warnings:
            warnings.warn(text, ImageWarning, stacklevel=2)
        return images, unreadable


def load_run(
    path: str | Path,
    *,
    device: str = "auto",
    workers: int | None = None,
    data: str | None = None,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
) -> Run:
    """Open a run folder, and the images that it was trained on.

    The places that its configuration names are used only where this user trained it here, see
    `engine.origin`. Nothing is downloaded unless `data` or `data_root` is given.

    Args:
        path: the folder that training wrote.
        data: the data set, if it has moved; None for the run's own.
        data_root: folder of downloaded data sets; None for the run's own.
        cache_dir: folder of decoded images; None for the run's own.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: processes that read images; None for a number that suits the device.

    Raises:
        InputError: no run there, a damaged file, a missing data set, or a run from elsewhere whose
            images are not named.
    """
    path = user_path("run", path)
    place = resolve_device(device)
    config, model, step, steps = load_model(path, place)
    opened = placed(path, config, data=data, data_root=data_root, cache_dir=cache_dir)
    named = data is not None or data_root is not None
    splits = open_splits(
        dataclasses.replace(opened, offline=opened.offline or not named),
        run=path if data is None else None,
    )
    config = dataclasses.replace(opened, data=config.data)
    return Run(path, config, model, splits, place, resolve_workers(workers, place), step, steps)


def load_model(
    path: Path, device: torch.device, weights: Weights = "last"
) -> tuple[TrainConfig, SimSiam, int, int]:
    """The configuration of a run, and a checkpoint's weights in eval mode on `device`.

    Then come the step of these weights and the steps of the whole training.

    Raises:
        InputError: no run there, or a damaged file.
    """
    choice("checkpoint", weights, get_args(Weights))
    config = read_config(path)
    checkpoint = load_best(path) if weights == "best" else load_last(path)
    check_saved(path, config, checkpoint)
    # The checkpoint has the weights: torchvision's need not be downloaded again.
    parts = dataclasses.replace(config.model, pretrained=False)
    model = build_model(dataclasses.replace(config, model=parts)).to(device).eval()
    checkpoint.restore(model)
    steps = config.epochs * (checkpoint.images // config.batch_size)
    return config, model, checkpoint.step, steps


def open_splits(config: TrainConfig, *, run: Path | None = None) -> Splits:
    """The images that a configuration trains and evaluates on.

    Args:
        config: the configuration.
        run: the run that was trained on them, for the message if they have moved.

    Raises:
        InputError: the data set is not there, or has fewer images than the configuration needs.
    """
    try:
        splits = open_dataset(
            config.data, root=config.data_root, download=not config.offline, decode=config.decode
        )
    except InputError as error:
        if run is None:
            raise
        raise InputError(
            f"{error}; where the images of {run} have moved, name their new place with --data"
        ) from error
    if config.images is None and not config.held_out and not config.distinct:
        return splits
    return select(splits, images=config.images, held_out=config.held_out, seed=config.split_seed)


def read_config(path: Path) -> TrainConfig:
    """The configuration of a run.

    Raises:
        InputError: `path` holds no run, its configuration cannot be read, or it is from elsewhere
            and its backbone is code that this user does not trust.
    """
    if not (path / CONFIG).is_file():
        raise InputError(f"run: {path} holds no run (no {CONFIG} there)")
    plain = read_json(path / CONFIG, dict[str, Any], "run")
    try:
        config = TrainConfig.from_dict(plain)
    except InputError as error:
        raise InputError(f"run: {path / CONFIG} is damaged ({error})") from error
    check_code(path, config)
    return config


def check_folder(path: Path, *, resume: Resume, overwrite: bool) -> bool:
    """Check that training may write to a folder.

    A run that was ended before its first checkpoint has nothing to lose, and is started again.

    Args:
        path: the run folder.
        resume: True to go on with its run, "auto" if it holds one.
        overwrite: its run may be replaced.

    Returns:
        True if there is a checkpoint to go on from.

    Raises:
        InputError: it holds a run and neither `resume` nor `overwrite` is set, it holds something
            else, or there is nothing to resume.
    """
    if resume and overwrite:
        raise InputError("resume, overwrite: only one of them can be given")
    if path.exists() and not path.is_dir():
        raise InputError(f"out: {path} is a file, not a folder")
    holds_run, found = (path / CONFIG).is_file(), bool(checkpoints(path))
    begun = holds_run and (found or _size(path / METRICS) > 0)
    if resume and begun and found:
        return True
    if resume and (begun or (resume is True and not holds_run)):
        advice = "; --overwrite replaces its run" if begun else ""
        raise InputError(f"resume: {path} holds no checkpoint to go on from{advice}")
    if begun and not overwrite:
        raise InputError(
            f"out: {path} already holds a run; "
            "say --resume to go on with it or --overwrite to replace it"
        )
    files = [] if holds_run or not path.exists() else path.iterdir()
    if not all(file.name == LOCK or file.match(_REMAINS) for file in files):
        raise InputError(f"out: {path} holds other files; give an empty or new folder")
    return False


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keep other trainings out of a run folder, which is made if needed.

    What killed writers have left there is removed.

    Raises:
        InputError: another training writes to it.
    """
    path.mkdir(parents=True, exist_ok=True)
    busy = f"out: another training writes to {path}; give another folder, or wait for its end"
    with locked(path / LOCK, busy, seconds=1.0):  # the doctor takes it for a moment
        for file in path.glob(_REMAINS):
            file.unlink()
        yield


def check_config(
    saved: TrainConfig, config: TrainConfig, path: Path | None, decoded: str | None = None
) -> None:
    """Raise InputError unless the run in `path` goes on with its own settings.

    Its images may have moved. `decoded` is the name of images that are decoded already, by their
    own settings; None otherwise.
    """
    advice = "leave these options out, or give another --out"
    if decoded is not None:
        advice = f"{decoded} was decoded so; decode it as the run's images were"
    if differing := differing_fields(dataclasses.replace(saved, data=config.data), config):
        raise InputError(
            f"resume: the configuration differs from {path}'s: {'; '.join(differing)}; {advice}"
        )


def check_saved(path: Path, config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Raise InputError unless the run in `path` was trained with the configuration found there."""
    if not checkpoint.config:
        return
    try:
        trained = dataclasses.replace(TrainConfig.from_dict(checkpoint.config), data=config.data)
    except InputError as error:
        raise InputError(f"run: a checkpoint in {path} is damaged ({error})") from error
    if differing := differing_fields(trained, config):
        raise InputError(
            f"run: {path / CONFIG} is damaged or was changed: {'; '.join(differing)}; "
            "its checkpoint has the first values: put them back"
        )


def check_images(
    saved: TrainConfig, config: TrainConfig, checkpoint: Checkpoint, now: dict[str, Any]
) -> None:
    """Raise InputError unless a run goes on with the images it was trained on.

    They may have moved if the checkpoint describes them. `now` is `data.subsets.content` of the
    images of `config`, or `listed` without the pixels.
    """
    old, new = saved.data, config.data
    if old == new and saved.data_root != config.data_root:
        old, new = f"{old} under {saved.data_root}", f"{new} under {config.data_root}"
    differing = difference({"images": checkpoint.images, **checkpoint.content}, now)
    if differing and old == new:
        raise InputError(f"resume: {new} has changed since the run was trained on it: {differing}")
    if differing:
        raise InputError(
            f"resume: {new} is no copy of {old}, which the run was trained on: {differing}"
        )
    if saved.data != config.data and not checkpoint.content:
        raise InputError(
            f"resume: {new} cannot be compared with {old}, which the run was trained on: its "
            "checkpoint is of an older version; bring the images back there to go on"
        )


def start_folder(path: Path, config: TrainConfig) -> None:
    """Remove an earlier run's files from the folder, and save the configuration."""
    for pattern in _RESULTS:
        for file in path.glob(pattern):
            file.unlink()
    write_json(path / CONFIG, config.to_dict())
    mark(path, places(config))


def record_place(path: Path, config: TrainConfig) -> None:
    """Save the new place of a run's images if they have moved, and a change of `stop_on`."""
    saved = read_config(path)
    place = {name: getattr(config, name) for name in ("data", "data_root", "cache_dir", "stop_on")}
    moved = dataclasses.replace(saved, **place)
    if moved != saved:
        write_json(path / CONFIG, moved.to_dict())
    mark(path, places(moved))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def new_folder(parent: Path, config: TrainConfig) -> Path:
    """Make the first free folder parent/DATA-METHOD-NNN; two processes never get the same one."""
    data = Path(data_label(config.data).partition(":")[2] or config.data).name
    data = re.sub(r"[*?{}\[\],]", "", data.removesuffix(".pack"))[:64]  # a pattern, many folders
    stem = f"{data or 'data'}-{config.method}"
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = parent / f"{stem}-{number:03d}"
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError("count ends")


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = None
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device: {name!r} is none of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"device: {name!r} is not here ({count} CUDA devices found)")
    return device


def resolve_workers(workers: int | None, device: torch.device) -> int:
    """The number of processes that read images for evaluation: `workers`, or one that suits.

    With a GPU that is one for every CPU core, at most 16. Without one it is a quarter of the cores,
    at least 1: the cores compute the network, and its threads spin at their barriers while a loader
    occupies the core of one of them.

    Raises:
        InputError: a negative number.
    """
    if workers is None:
        return min(cores(), 16) if device.type == "cuda" else max(1, cores() // 4)
    if workers < 0:
        raise InputError(f"workers: {workers} must be at least 0")
    return workers
