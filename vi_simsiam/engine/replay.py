"""The batch whose loss was not finite, made again with the weights of the last good checkpoint."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vi_simsiam.data.contact_sheet import view_rows
from vi_simsiam.data.device import byte_tensor
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.views import GLOBAL_VIEWS, add_offsets, layout_of
from vi_simsiam.engine import failure
from vi_simsiam.engine.forward import evaluating
from vi_simsiam.engine.monitor import representation_statistics
from vi_simsiam.engine.network import backward
from vi_simsiam.engine.run import FAILED_VIEWS, FAILURE, Run
from vi_simsiam.errors import InputError
from vi_simsiam.files import write_atomically
from vi_simsiam.ops.augment import eager_augment

EXTREME = 10.0
"""Features longer than so many times the batch's median are named."""
_ONE_COLOUR = 1e-3
_MOST_ROWS = 64


@dataclass(frozen=True)
class Replay:
    """The figures of a batch, by the weights of a step before it."""

    loss: float
    """As it is logged, without its scale."""
    grad_norm: float
    statistics: dict[str, float]
    """Those of `representation_statistics`; empty where an output is not finite."""
    suspects: tuple[str, ...]
    """Images that are not finite or extreme, each with the view and the reason."""
    picture: Path
    """Their views, and those of other images of the batch."""


def replay(folder: Path, open_run: Callable[[], Run]) -> Replay:
    """Make the failed batch of a run again, and write its views as RUN/failure.png.

    The run's folder keeps its weights. The views are those of the training, from the same table;
    gradients and statistics are those of its next step.

    Args:
        folder: the run folder.
        open_run: opens the run, with its last good checkpoint.

    Raises:
        InputError: no loss was recorded, or the images are not those that the run was trained on.
    """
    found = failure.read(folder)
    if found is None:
        raise InputError(f"replay: {folder} has no {FAILURE}: no loss was recorded as not finite")
    run = open_run()
    images, _ = run.readable(run.splits.train)
    lost = torch.tensor([torch.nan])
    again = failure.failed(run.config, images, found["step"] - 1, lost, found["checkpoint_step"])
    if (again["images"], again["rows"]) != (found["images"], found["rows"]):
        raise InputError(
            f"replay: {images.name} does not give the batch in {run.path / FAILURE}; its images "
            "have changed since, or that file has"
        )
    samples, table = np.array(again["images"]), np.array(again["rows"], dtype=np.int32)
    views = _views(run, images, samples, table)
    suspects = _suspects(run, views, again["names"])
    rows = list(dict.fromkeys([*suspects, *range(len(samples))]))[:_MOST_ROWS]
    sheet = view_rows(
        [images.content(samples[row]) for row in rows], table[:, rows], run.config.augment
    )
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG")
    picture = run.path / FAILED_VIEWS
    write_atomically(picture, lambda file: file.write(encoded.getvalue()))
    loss, grad_norm, statistics = _figures(run, views)
    return Replay(loss, grad_norm, statistics, tuple(suspects.values()), picture)


def _views(
    run: Run, images: PackedImages, samples: NDArray[np.int64], table: NDArray[np.int32]
) -> list[Tensor]:
    """The views (B, 3, h, w) of a batch, on the run's device."""
    placed = table.copy()
    add_offsets(placed, images.offsets[samples])
    pixels, rows, policy = byte_tensor(images.pixels), torch.from_numpy(placed), run.config.augment
    make = partial(eager_augment, layout=layout_of(policy, images.decode))
    made = [*make(pixels, rows[:GLOBAL_VIEWS], policy.size)]
    if policy.local_views:
        made += make(pixels, rows[GLOBAL_VIEWS:], policy.local_size)
    return [view.to(run.device) for view in made]


def _suspects(run: Run, views: list[Tensor], names: list[str]) -> dict[int, str]:
    """By row of the batch: an image that is not finite or extreme, and why.

    Each view is encoded alone, by the running statistics: in a training step one image that is not
    finite makes the whole batch so.
    """
    found: dict[int, str] = {}
    for number, view in enumerate(views, 1):
        with evaluating(run.model.backbone, run.device):
            features = run.model.backbone(view).float()
        lengths = torch.linalg.vector_norm(features, dim=1)
        usual = lengths[lengths.isfinite()].nanmedian()
        for row, name in enumerate(names):
            reason = ""
            if not view[row].isfinite().all():
                reason = "its pixels are not finite"
            elif not lengths[row].isfinite():
                reason = "its features are not finite"
            elif lengths[row] > EXTREME * usual:
                reason = f"its features are {lengths[row] / usual:.0f} times as long as usual"
            elif view[row].std() < _ONE_COLOUR:
                reason = "it has one colour"
            if reason:
                found.setdefault(row, f"{name}, view {number}: {reason}")
    return found


def _figures(run: Run, views: list[Tensor]) -> tuple[float, float, dict[str, float]]:
    """Loss, norm of the gradient and statistics of a step, which is not made."""
    config, model, device = run.config, run.model, run.device
    model.train()
    output, loss = backward(
        model,
        partial(model.loss, loss_scale=config.loss_scale),
        views,
        parts=config.accumulate,
        bf16=config.uses_bf16(device.type),
    )
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    tensors = (*output.predictions, *output.targets)
    statistics = {}
    if all(tensor.isfinite().all() for tensor in tensors):
        statistics = representation_statistics(model, output)
    model.zero_grad()
    model.eval()
    grad_norm = torch.nn.utils.get_total_norm(gradients).item()
    return loss.item() / config.loss_scale, grad_norm, statistics
