"""Shared by all tests: one thread, a cache folder of their own, a small folder of images."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Test processes run side by side; more threads than cores would slow all of them down. Set before
# NumPy and torch are imported, which read it, and for child processes; OMP_NUM_THREADS=2 tests with
# two.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background processes with Ctrl-C ignored, and nohup ignores the terminal's end;
# processes started by tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest

if TYPE_CHECKING:
    import torch

    from vi_simsiam.evaluation.features import FeatureSets


def pytest_collection() -> None:
    """Import torch; not above, as the process of pytest-xdist that runs no tests reads this, too.

    What is imported for the tests stays, so no garbage is searched for among it, now or later.
    """
    gc.disable()
    import torch
    from losses import DEVICE

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep decoded images in a temporary folder, those of child processes included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VI_SIMSIAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def checks_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let distributions check their values; compiling anything in the process switches that off."""
    import torch

    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, dark and bright: 20 training, 8 validation images of 16 x 16 pixels each."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 8)):
        for name, low in (("bright", 130), ("dark", 0)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(low, low + 120, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """A file that no test may make."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


def small_backbone(
    *given: object, channels: int = 3, **options: object
) -> tuple[torch.nn.Module, int]:
    """One convolution in place of a ResNet, whose steps and checkpoints take seconds."""
    import torch

    from vi_simsiam.normalisation import PerViewBatchNorm2d

    layers = [torch.nn.Conv2d(channels, 8, 3, stride=2), PerViewBatchNorm2d(8), torch.nn.ReLU()]
    layers += [torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers), 32


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs have a small backbone."""
    monkeypatch.setattr("vi_simsiam.models.build_backbone", small_backbone)


@pytest.fixture(scope="module")
def short_probes() -> Iterator[None]:
    """Evaluations of a file have short probes and blank figures."""
    from evaluation_cases import skip_rendering

    from vi_simsiam.evaluation.linear import LINEAR_PRESETS, LinearConfig, evaluate_linear

    def short(features: FeatureSets, config: LinearConfig | None = None) -> dict[str, Any]:
        return evaluate_linear(features, config or LinearConfig(min_steps=100))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vi_simsiam.evaluation.linear.evaluate_linear", short)
        paper = dataclasses.replace(LINEAR_PRESETS["paper"], epochs=8)
        patch.setitem(LINEAR_PRESETS, "paper", paper)
        skip_rendering(patch)
        yield


@pytest.fixture(scope="module")
def small_runs(short_probes: None) -> Iterator[None]:
    """All runs of a file have a small backbone, and short evaluations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vi_simsiam.models.build_backbone", small_backbone)
        patch.setattr("vi_simsiam.evaluation.features.build_backbone", small_backbone)
        yield
