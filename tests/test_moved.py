"""Validation images that are shifted and turned a little."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_cases import feature_sets

from vi_simsiam.data.sources import ArraySource
from vi_simsiam.engine.forward import extract
from vi_simsiam.evaluation.features import FeatureSets
from vi_simsiam.evaluation.knn import evaluate_knn
from vi_simsiam.evaluation.linear import evaluate_linear
from vi_simsiam.evaluation.logistic import evaluate_logistic
from vi_simsiam.evaluation.moved import SHIFT, TURN, move

SIDE, COUNT = 56, 200


def centres(images: torch.Tensor) -> torch.Tensor:
    """Brightness-weighted mean position of each image, in shares of the side from the middle."""
    places = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    weight = images.mean(1)
    total = weight.sum((1, 2))
    across, down = weight.sum(1) @ places / total, weight.sum(2) @ places / total
    return torch.stack([across, down], 1)


def blobs(offset: float) -> torch.Tensor:
    """A bright spot, to the right of the middle by a share of the side: (COUNT, 3, SIDE, SIDE)."""
    places = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    squares = (places - offset)[None, :] ** 2 + places[:, None] ** 2
    return torch.exp(-squares / (2 * 0.03**2)).expand(COUNT, 3, SIDE, SIDE)


def test_shifts_and_turns_fill_their_ranges() -> None:
    middle, right = (centres(move(blobs(offset), range(COUNT))) for offset in (0.0, 0.25))
    assert 0.95 * SHIFT < middle.abs().max() < 1.02 * SHIFT
    assert middle.mean(0).abs().max() < 0.02
    away = right - middle
    angles = torch.rad2deg(torch.atan2(away[:, 1], away[:, 0]))
    assert 0.95 * TURN < angles.abs().max() < 1.05 * TURN
    torch.testing.assert_close(away.norm(dim=1), torch.full((COUNT,), 0.25), rtol=0.02, atol=0.0)


def test_a_move_depends_on_the_number_alone() -> None:
    images = torch.rand(6, 4, 9, 9, dtype=torch.float64)
    whole = move(images, range(10, 16))
    torch.testing.assert_close(move(images[2:4], range(12, 14)), whole[2:4])
    assert not torch.allclose(move(images[2:4], range(2)), whole[2:4])
    assert whole.dtype == torch.float64


def test_the_border_is_repeated() -> None:
    torch.testing.assert_close(move(torch.ones(20, 1, 8, 8), range(20)), torch.ones(20, 1, 8, 8))


def test_extract_numbers_the_images_over_all_batches() -> None:
    source = ArraySource(torch.zeros(7, 8, 8, 3, dtype=torch.uint8).numpy(), name="black")

    def numbered(views: torch.Tensor, numbers: range) -> torch.Tensor:
        return torch.tensor([*numbers], dtype=torch.float32)[:, None].expand(len(views), 5)

    found = extract(
        torch.nn.Identity(), source, size=8, device=torch.device("cpu"), workers=0, batch_size=3,
        change=numbered,
    )  # fmt: skip
    assert found[:, 0].tolist() == list(range(7))


@pytest.mark.parametrize("evaluate", [evaluate_knn, evaluate_linear, evaluate_logistic])
def test_moved_images_have_an_accuracy_of_their_own(
    tmp_path: Path, evaluate: Callable[[FeatureSets], dict[str, Any]]
) -> None:
    sets = feature_sets(tmp_path)
    assert not evaluate(sets).get("moved_top1")
    # Moved images of "trained" look like those of the next class.
    turned = {**sets.val, "trained": sets.val["trained"].roll(1, 0)}
    found = evaluate(dataclasses.replace(sets, moved=turned))
    assert found["top1"]["trained"] > 0.9
    assert found["moved_top1"]["trained"] < 0.1
    assert found["moved_top1"]["pixels"] == found["top1"]["pixels"]
    assert math.isclose(found["top1"]["trained"], evaluate(sets)["top1"]["trained"])
