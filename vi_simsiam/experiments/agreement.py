"""Neighbours that the runs of several seeds have in common: how far a seed decides what is near."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vi_simsiam.data.subsets import at_most
from vi_simsiam.engine.forward import extract, nearest
from vi_simsiam.engine.run import load_model, load_run, read_config
from vi_simsiam.errors import InputError
from vi_simsiam.inference.label_free import NEIGHBOURS, common_neighbours
from vi_simsiam.text import counted

IMAGES = 1_000
"""Most images that are embedded."""


def seed_agreement(runs: Sequence[Path]) -> dict[str, Any]:
    """Mean share of the nearest neighbours that images have in common in each pair of runs.

    The images are the validation images or, where there are none, training images; no image is its
    own neighbour. See `label_free.neighbour_agreement` for the source.

    Args:
        runs: at least two, which differ in their seed and were trained here.

    Returns:
        "neighbours" of each image, "images", "split", and "pairs": the share by the runs' names, as
        "seed-0 seed-1".

    Raises:
        InputError: a damaged file, or images that are gone or too few.
    """
    device = read_config(runs[0]).device
    first = load_run(runs[0], device=device)
    models = [first.model, *(load_model(run, first.device)[1] for run in runs[1:])]
    val, train = first.splits.val, first.splits.train
    split, source = ("training", train) if val is None or len(val) < 2 else ("validation", val)
    images, _ = first.readable(at_most(source, IMAGES))
    if len(images) < 2:
        raise InputError(f"data: {counted(len(images), 'image')}; neighbours need at least 2")
    near = []
    for model in models:
        features = extract(
            model.backbone,
            images,
            size=first.config.augment.size,
            device=first.device,
            workers=first.workers,
            constants=first.config.augment.constants,
        )
        found = nearest(features, None, NEIGHBOURS, device=first.device)
        near.append(torch.cat([which for which, _ in found]))
    pairs = itertools.combinations(zip(runs, near, strict=True), 2)
    return {
        "neighbours": near[0].shape[1],
        "images": len(images),
        "split": split,
        "pairs": {
            f"{one.name} {other.name}": common_neighbours(which, others).mean().item()
            for (one, which), (other, others) in pairs
        },
    }
