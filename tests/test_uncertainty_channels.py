"""Uncertainty of runs on images of other channels and bits than 8-bit RGB."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import make_run
from numpy.typing import NDArray
from torch import nn

from vi_simsiam.config import AugmentConfig, DecodeConfig, TrainConfig
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.loader import eval_loader
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.data.statistics import measured
from vi_simsiam.engine.run import Run
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.corruptions import LEVELS, RGB, Tones, corrupt, kinds
from vi_simsiam.evaluation.foreign import builtin_sets
from vi_simsiam.evaluation.scores import image_scores, views_of
from vi_simsiam.evaluation.uncertainty import evaluate_uncertainty
from vi_simsiam.models import VISimSiam

SIZE = 8
FIVE, GRAY = DecodeConfig(channels=5, bits=16), DecodeConfig(channels=1)


def deep(count: int, channels: int = 5, seed: int = 0) -> ArraySource:
    """Two classes of brightness, of 12 bits in 16, the channels at different levels."""
    draw, labels = np.random.default_rng(seed), np.arange(count) % 2
    levels = np.linspace(500, 2500, channels) + 800 * labels[:, None, None, None]
    images = levels + draw.normal(0, 400, (count, 10, 9, channels))
    return ArraySource(images.clip(0, 4095).astype(np.uint16), labels, ["dark", "bright"], "deep")


def settings(source: ArraySource) -> TrainConfig:
    policy = AugmentConfig(size=SIZE).normalised_by(measured(source))
    return TrainConfig(data="deep", decode=source.decode, augment=policy)


def deep_run(folder: Path) -> Run:
    run, train = make_run(folder), deep(40)
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(5, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = VISimSiam(backbone, features=6, dim=8, projector_hidden=6, predictor_hidden=6).eval()
    splits = Splits("deep", train, deep(20, seed=1))
    return dataclasses.replace(run, config=settings(train), model=model, splits=splits)


def test_every_part_that_has_a_meaning_is_measured(tmp_path: Path) -> None:
    result = evaluate_uncertainty(deep_run(tmp_path), corruption_images=10)
    assert set(result["corruptions"]) == {"blur", "noise", "occlusion", "contrast", "blank"}
    assert {"kappa", "stage1_norm", "edge_energy", "softmax"} < set(result["scores"])
    assert "jpeg_size" not in result["scores"]
    assert set(result["ood"]) == {"noise", "digits"}
    (note,) = result["settings"]["notes"]
    assert note.startswith(
        "5 channels of 16 bits: jpeg_size and the corruption jpeg need 8-bit RGB"
    )
    # Uniform noise has no low frequencies that differ between images, whose contrast is larger.
    assert result["corruptions"]["blank"]["scores"]["contrast"]["monotone"] == 1


def test_foreign_sets_of_the_same_kind_are_taken_and_own_images_refused(tmp_path: Path) -> None:
    run = deep_run(tmp_path / "run")
    own, other = deep(40).images[:12], deep(12, seed=5).images
    other[:, :4] = own[:, :4]  # the upper rows of the run's own
    for name, images in (("other", other), ("own", own)):
        (tmp_path / name).mkdir()
        for number, image in enumerate(images):
            np.save(tmp_path / name / f"{number:02d}.npy", image)
    result = evaluate_uncertainty(run, ood=[f"folder:{tmp_path}/other"], corruption_images=0)
    assert result["ood"]["other"]["images"] == 12
    assert "view_agreement" in result["ood"]["other"]["scores"]
    assert not any("own" in note for note in result["settings"]["notes"])
    with pytest.raises(InputError, match="12 of 12 images of own are the run's own"):
        evaluate_uncertainty(run, ood=[f"folder:{tmp_path}/own"], corruption_images=0)


def test_views_are_those_of_the_evaluation() -> None:
    square = ArraySource(deep(4).images[:, :9], name="square")
    constants = settings(deep(4)).augment.constants
    ((expected, _),) = eval_loader(square, 9, 10, 0, constants)
    found = views_of(square.images, constants)
    # A share of 16 bits is rounded, and divided by a small deviation.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_brightness_of_other_channels_is_their_mean() -> None:
    pixels = deep(3).images
    found = image_scores(pixels)
    gray = pixels.astype(np.float64).mean(3)
    np.testing.assert_allclose(-found["contrast"], gray.std((1, 2)), rtol=1e-4)
    assert set(found) == {"edge_energy", "contrast"}


def test_grey_and_white_of_other_images() -> None:
    source = deep(40)
    tones = Tones.of(settings(source))
    pixels = source.images.reshape(-1, 5).astype(np.float64)
    np.testing.assert_allclose(tones.grey, pixels.mean(0), rtol=0.02)
    # ImageNet's deviations are 0.229, 0.224 and 0.225 of white.
    np.testing.assert_allclose(0.226 * tones.white, pixels.std(0), rtol=0.02)
    assert Tones.of(TrainConfig()) is RGB


@pytest.mark.parametrize("kind", kinds(FIVE))
def test_sixteen_bits_are_damaged_as_eight_bits_are(kind: str) -> None:
    images = np.random.default_rng(0).integers(60, 200, (3, 16, 16, 3), dtype=np.uint8)
    wider = Tones(257 * RGB.grey, 257 * RGB.white)
    for level in LEVELS:
        found = corrupt(images.astype(np.uint16) * 257, kind, level, tones=wider)
        expected = corrupt(images, kind, level)
        assert found.dtype == np.uint16
        # Eight bits are rounded to 257 of sixteen.
        assert np.abs(found / 257 - expected).max() <= 0.51


@pytest.mark.parametrize("kind", kinds(FIVE))
def test_damage_of_five_channels_grows_and_is_bounded(kind: str) -> None:
    source = deep(6)
    tones, images = Tones.of(settings(source)), source.images[:, :9]

    def damage(level: int) -> float:
        damaged = corrupt(images, kind, level, tones=tones)
        assert (damaged.shape, damaged.dtype) == (images.shape, np.uint16)
        return float(np.abs(damaged.astype(float) - images).mean())

    damages = [damage(level) for level in LEVELS]
    assert damages == sorted(damages)
    assert damages[0] == 0
    # At most about white, which 12 bits fill.
    assert 50 < damages[5] < tones.white.mean()


def moments(pixels: NDArray[np.uint16]) -> NDArray[np.float64]:
    rows = pixels.reshape(-1, pixels.shape[-1]).astype(np.float64)
    return np.stack([rows.mean(0), rows.std(0)])


@pytest.mark.parametrize("decode", [FIVE, GRAY])
def test_built_in_sets_have_the_channels_and_levels_of_the_run(decode: DecodeConfig) -> None:
    source = deep(40, decode.channels)
    if decode.bits == 8:
        source = ArraySource((source.images // 16).astype(np.uint8), name="gray")
    assert source.decode == decode
    noise, digits = (each.source for each in builtin_sets(settings(source), 40, 0))
    assert noise.decode == digits.decode == decode
    expected = moments(source.images)
    np.testing.assert_allclose(moments(noise.images), expected, rtol=0.2)
    spread = np.ptp(digits.images.astype(float), axis=(0, 1, 2))
    assert (spread > 3 * expected[1]).all()
