"""The folder that an export writes: made beside its target, checked, then renamed to it."""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vi_simsiam.data.sources import ImageSource, UnreadableError
from vi_simsiam.data.views import eval_view
from vi_simsiam.engine.checkpoint import write_json, write_text
from vi_simsiam.engine.run import Run
from vi_simsiam.errors import InputError, none_of
from vi_simsiam.export.card import Check, model_card
from vi_simsiam.export.formats import (
    FORMATS,
    SAFETENSORS_WEIGHTS,
    TORCHVISION_WEIGHTS,
    outputs,
    portable,
    preprocessing,
    write_safetensors,
    write_timm,
    write_torchvision,
)
from vi_simsiam.export.onnx import ONNX_WEIGHTS, require_exporter, write_onnx
from vi_simsiam.info import versions
from vi_simsiam.paths import user_path, utf8_path

CARD, SETTINGS, TIMM_SETTINGS = "README.md", "config.json", "training.json"
CHECK_IMAGES = 8
"""Images on which a written file is compared with the run."""
# Largest difference over largest value. Libraries sum float32 in different orders;
# kappa = scale * link(raw) carries the absolute error of raw, up to ten times its own rounding.
TOLERANCES = {"embedding": 1e-5, "loc": 1e-5, "concentration": 1e-4}

_WRITERS = {
    "torchvision": (write_torchvision, TORCHVISION_WEIGHTS, ("torchvision",)),
    "timm": (write_timm, SAFETENSORS_WEIGHTS, ("torchvision", "timm", "safetensors")),
    "safetensors": (write_safetensors, SAFETENSORS_WEIGHTS, ("torchvision", "safetensors")),
    "onnx": (write_onnx, ONNX_WEIGHTS, ("torchvision", "onnx", "onnxscript", "onnxruntime")),
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
    if format not in FORMATS:
        raise none_of("format", format, FORMATS)
    if format == "onnx":
        require_exporter()
    target = (run.path / "export" / format if out is None else user_path("out", out)).absolute()
    _check_target(target, overwrite)

    # In float32 on the CPU, on whatever device the run was opened.
    model = copy.deepcopy(run.model).cpu().float().eval()
    images, source = _check_images(run)
    expected = outputs(model)(images)
    if not all(bool(torch.isfinite(value).all()) for value in expected.values()):
        raise InputError(f"run: the features of {run.path} are not finite; its weights are damaged")

    write, weights, packages = _WRITERS[format]
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _beside(target)
    aside.mkdir()
    try:
        with utf8_path(aside) as folder:
            compute = write(model, run.config, folder)
            found = None if compute is None else _differences(compute(images), expected)
        check = Check(len(images), source, found)
        if report is not None:
            report(check.line(weights))
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
            "check": vars(check),
            "versions": installed,
        }
        # In a timm folder config.json is timm's own.
        write_json(aside / (TIMM_SETTINGS if format == "timm" else SETTINGS), settings)
        write_text(aside / CARD, model_card(run, format, check=check, versions=installed))
        _move(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def _beside(target: Path) -> Path:
    """A new hidden name in the folder of `target`."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}")


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse a folder that must not be written to, before anything is computed."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"out: {target} is a file or a link, not a folder")
    names = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    known = {CARD, SETTINGS, TIMM_SETTINGS, f"{ONNX_WEIGHTS}.data"}
    known.update(weights for _, weights, _ in _WRITERS.values())
    if names and (CARD not in names or names - known):
        raise InputError(f"out: {target} holds other files; give an empty or new folder")
    if names and not overwrite:
        raise InputError(f"out: {target} exists; say --overwrite to replace it")


def _move(aside: Path, target: Path) -> None:
    """Rename a finished folder to `target`; an earlier one is removed once the new one is there."""
    earlier = None
    if target.is_dir():
        earlier = _beside(target)
        os.rename(target, earlier)
    try:
        os.rename(aside, target)
    except OSError:
        if earlier is not None:
            with contextlib.suppress(OSError):
                os.rename(earlier, target)
        raise
    if earlier is not None:
        shutil.rmtree(earlier, ignore_errors=True)


def _check_images(run: Run) -> tuple[Tensor, str]:
    """A few un-augmented validation or training images (N, 3, S, S), and their origin."""
    source: ImageSource = run.splits.val or run.splits.train
    view = eval_view(run.config.augment.size)
    # A coarse grid comes first; other images stand in for unreadable ones.
    grid = np.linspace(0, len(source) - 1, min(len(source), CHECK_IMAGES), dtype=np.int64).tolist()
    images: list[Tensor] = []
    reason: UnreadableError | None = None
    for index in dict.fromkeys([*grid, *range(min(len(source), 100))]):
        if len(images) == CHECK_IMAGES:
            break
        try:
            images.append(view(source.image(index)))
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
