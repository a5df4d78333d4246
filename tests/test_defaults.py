"""Settings that suit a data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vi_simsiam.config import POLICIES, PRESETS, ModelConfig, TrainConfig
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.decoding import median_side
from vi_simsiam.data.defaults import suited, suited_size
from vi_simsiam.data.sources import ArraySource, FileSource


def images(count: int, side: int) -> ArraySource:
    return ArraySource(np.zeros((count, side, side), np.uint8))


def test_the_embedded_images_get_the_demo() -> None:
    demo = PRESETS["demo"]
    assert suited(TrainConfig(), open_dataset("fashion-mini").train) == demo
    simsiam = dataclasses.replace(demo, method="simsiam")
    assert suited(TrainConfig(method="simsiam"), images(8000, 28)) == simsiam


@pytest.mark.parametrize(
    ("count", "side", "size", "stem", "dim", "blur", "epochs", "warmup"),
    [
        (50_000, 32, 32, "small", 512, 0.0, 40, 2.0),  # CIFAR-10
        (60_000, 28, 28, "imagenet", 512, 0.0, 4, 0.5),  # MNIST
        (9_469, 320, 224, "imagenet", 2048, 0.5, 200, 10.0),  # ImageNette
        (9_469, 128, 128, "imagenet", 2048, 0.5, 200, 10.0),
        (1_281_167, 500, 224, "imagenet", 2048, 0.5, 20, 1.0),
        (5_000, 64, 64, "imagenet", 512, 0.0, 380, 19.0),
        (300, 224, 224, "imagenet", 2048, 0.5, 400, 20.0),
    ],
)
def test_other_images(
    count: int, side: int, size: int, stem: str, dim: int, blur: float, epochs: int, warmup: float
) -> None:
    source = ArraySource(np.broadcast_to(np.uint8(0), (count, side, side)))
    config = suited(TrainConfig(), source)
    assert (config.augment.size, config.model.stem, config.model.dim) == (size, stem, dim)
    assert (config.augment.blur_prob, config.epochs, config.warmup_epochs) == (blur, epochs, warmup)


def test_what_was_asked_for_decides_the_rest() -> None:
    """A given size, length, policy or pretrained weights decide the settings that depend on it."""
    small = images(8_000, 28)
    large = suited(TrainConfig(), small, size=128, epochs=10)
    assert (large.augment.size, large.model.dim, large.augment.blur_prob) == (128, 2048, 0.5)
    assert (large.epochs, large.warmup_epochs) == (10, 0.5)
    pretrained = suited(TrainConfig(model=ModelConfig(pretrained=True)), images(500, 32))
    assert (pretrained.model.stem, pretrained.model.pretrained) == ("imagenet", True)
    crops = suited(TrainConfig(), images(500, 56), views=POLICIES["multicrop"]).augment
    assert (crops.size, crops.local_size, crops.local_views) == (56, 24, 6)
    assert (crops.crop_scale, crops.blur_prob) == (POLICIES["multicrop"].crop_scale, 0.5)
    kept = suited(TrainConfig(method="simsiam", seed=3, momentum=0.8), small)
    assert (kept.method, kept.seed, kept.momentum) == ("simsiam", 3, 0.8)


def test_a_batch_fits_into_few_images() -> None:
    assert suited(TrainConfig(), images(20, 16)).batch_size == 20
    assert suited(TrainConfig(), images(63, 16), ranks=4).batch_size == 60


def test_the_size_is_the_median_of_the_shorter_sides(tmp_path: Path) -> None:
    """Files that cannot be read do not count, and sizes stay from 8 to 224 pixels."""
    paths = []
    for number, size in enumerate([(100, 60), (50, 90), (70, 300)]):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", size).save(paths[-1])
    (tmp_path / "broken.png").write_bytes(b"")
    source = FileSource([*paths, tmp_path / "broken.png"])
    assert median_side(source) == 60
    assert suited_size(source) == 60
    assert median_side(FileSource([tmp_path / "broken.png"])) is None
    assert suited_size(FileSource([tmp_path / "broken.png"])) == 224
    assert (suited_size(images(2, 5)), suited_size(images(2, 500))) == (8, 224)
