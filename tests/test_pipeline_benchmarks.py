"""The benchmarks of input pipeline, step and training: what is held to what, and what is made of their result files."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from benchmark_cases import CPU, shown
from PIL import Image
from rich.console import Console
from torch import Tensor

from vi_simsiam.benchmarks import augment, images, ours, peers, step
from vi_simsiam.benchmarks import pipeline_tables as tables
from vi_simsiam.benchmarks.suite import Suite, SuiteOptions
from vi_simsiam.benchmarks.timers import WallTimer, timer_for
from vi_simsiam.benchmarks.view_cases import SMALL_IMAGES, ViewCase, view_cases
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import FileSource
from vi_simsiam.errors import InputError

TINY = ViewCase(4, 16, 2, 8, sides=(16, 20))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return images.generate(tmp_path_factory.mktemp("generated"), count=8, sides=TINY.sides)


@pytest.fixture(scope="module")
def packed(paths: list[str]) -> PackedImages:
    return in_memory(FileSource(paths))


class Given:
    """A provider that gives `views` and says how many microseconds a batch takes."""

    def __init__(self, views: Sequence[Tensor], microseconds: float | Exception) -> None:
        self.views, self.microseconds, self.closed = views, microseconds, False

    def sample(self) -> Sequence[Tensor]:
        return self.views

    def measure(self) -> float:
        if isinstance(self.microseconds, Exception):
            raise self.microseconds
        return self.microseconds

    def close(self) -> None:
        self.closed = True


class Known(Given):
    """As `Given`, with a known error."""

    def __init__(self, views: Sequence[Tensor], microseconds: float, hue_error: float) -> None:
        super().__init__(views, microseconds)
        self.hue_error = hue_error

    def errors(self, views: Sequence[Tensor]) -> dict[str, float]:
        return {"without hue": 1e-6, "with hue": self.hue_error}


def random_views(case: ViewCase = TINY) -> list[Tensor]:
    sizes = [case.size] * 2 + [case.local_size] * case.local_views
    return [torch.randn(case.batch, 3, size, size) for size in sizes]


def test_views_are_judged_before_they_are_timed() -> None:
    def missing() -> Given:
        raise ImportError("kornia is not installed (pip install 'vi-simsiam[bench]')")

    nan = [view.clone() for view in random_views()]
    nan[1][0, 0, 0, 0] = math.nan
    right, wrong = Known(random_views(), 500, 5e-5), Known(random_views(), 500, 5e-4)
    made: dict[str, Callable[[], Any] | str] = {
        "vi-simsiam": lambda: right,
        "inaccurate": lambda: wrong,
        "nan": lambda: Given(nan, 1),
        "small": lambda: Given(random_views()[:2], 1),
        "dies": lambda: Given(random_views(), RuntimeError("a worker died")),
        "kornia": missing,
        "never": "left out",
        "lightly": lambda: Given(random_views(), 2000),
    }
    case = augment.measure_case(TINY, made, seconds=9, rounds=3)
    found = case["providers"]
    assert found["vi-simsiam"]["views_per_second"] == 4 * 4 / 500e-6
    assert found["vi-simsiam"]["time"]["rounds"] == 3
    reasons = {
        name: provider["failure"] for name, provider in found.items() if not provider["correct"]
    }
    assert reasons == {
        "inaccurate": "inaccurate: with hue 5.0e-04, allowed 1e-04",
        "nan": "wrong: views that are not finite",
        "small": "wrong: views of shapes [(4, 3, 16, 16)]",
        "dies": "RuntimeError: a worker died",
        "kornia": "ImportError: kornia is not installed (pip install 'vi-simsiam[bench]')",
        "never": "left out",
    }
    assert all(found[name]["time"] is None for name in reasons)
    assert right.closed
    assert wrong.closed
    text = shown(tables.augment_case(case))
    assert "4.00 x" in text
    assert "kornia (ImportError: kornia is not installed" in text
    json.dumps(case, allow_nan=False)


def test_our_views_are_held_to_torchvision(packed: PackedImages) -> None:
    provider = ours.LoaderViews(packed, TINY.policy, TINY.batch, CPU, workers=0)
    found = augment.judge(TINY, provider)
    assert found["correct"], found["failure"]
    views = [view.clone() for view in provider.sample()]
    views[3][2, 0, 4, 4] += 1e-3 / 0.229
    changed = provider.errors(views)
    assert max(changed.values()) == pytest.approx(1e-3, rel=0.05)
    assert provider.measure() > 0
    provider.close()


def test_the_augmentation_alone_is_held_to_torchvision_too(packed: PackedImages) -> None:
    threads = torch.get_num_threads()
    provider = ours.AugmentedBytes(packed, TINY.policy, TINY.batch, CPU, WallTimer())
    assert augment.judge(TINY, provider)["correct"]
    assert max(provider.errors([view + 0.1 for view in provider.sample()]).values()) > 0.02
    assert provider.measure() > 0
    assert torch.get_num_threads() == threads
    provider.close()


@pytest.mark.parametrize("make", [peers.torchvision_transform, peers.lightly_transform])
@pytest.mark.parametrize(
    "case", [TINY, dataclasses.replace(TINY, local_views=0)], ids=["multicrop", "two"]
)
def test_file_peers_make_the_same_kinds_of_views(
    make: Any, case: ViewCase, paths: list[str]
) -> None:
    if make is peers.lightly_transform:
        pytest.importorskip("lightly")
    peer = peers.LoaderPeer(
        FileSource(paths), make(case.policy), batch=case.batch, device=CPU, workers=0, seconds=1e-9
    )
    found = augment.judge(case, peer)
    assert found["correct"], found["failure"]
    assert found["error"] is None
    assert abs(found["mean"]) < 1.5
    assert 0.3 < found["std"] < 2.5
    assert peer.measure() > 0
    assert peer._steps.batches == 2, "the shortest epoch: one batch after the first"
    peer.close()


def test_device_peers_make_the_same_kinds_of_views(paths: list[str]) -> None:
    pytest.importorskip("kornia")
    resident = peers.resident_images(paths[:4], TINY.sides, CPU)
    assert [tuple(image.shape) for image in resident] == [(3, 16, 20)] * 4
    for call in (
        peers.torchvision_on_device(TINY.policy),
        peers.kornia_on_device(TINY.policy, CPU),
    ):
        peer = peers.DevicePeer(call, resident, CPU)
        found = augment.judge(TINY, peer)
        assert found["correct"], found["failure"]
        assert peer.measure() > 0


def test_kornia_draws_for_every_sample(paths: list[str]) -> None:
    pytest.importorskip("kornia")
    one = peers.resident_images(paths[:1], TINY.sides, CPU)
    views = peers.kornia_on_device(TINY.policy, CPU)(one * 8)
    assert len({view.sum().item() for view in views[0]}) > 4


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(ImportError, match="nowhere is not installed"):
        peers.installed("nowhere.at.all")


def test_batches_are_timed_between_the_first_and_the_last() -> None:
    with mock.patch.object(peers.time, "perf_counter", side_effect=[10.0, 16.0]):
        assert peers.seconds_a_batch(iter([[torch.ones(1)]] * 4), CPU) == 2.0
    steps = peers._Steps(5, 2, 4)
    assert list(steps) == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert len(steps) == 4


def test_generated_images_have_structure_and_differ(paths: list[str]) -> None:
    pixels = [np.asarray(Image.open(path)).astype(float) for path in paths]
    assert [picture.shape for picture in pixels[:2]] == [(16, 20, 3), (20, 16, 3)]
    assert all(picture.std() > 20 for picture in pixels)
    neighbours = np.abs(np.diff(pixels[1], axis=1)).mean()
    assert neighbours < np.abs(pixels[1] - pixels[1][:, ::-1]).mean(), "near pixels are alike"
    assert not np.array_equal(pixels[0], pixels[2])


def test_images_come_from_folders_too(image_folder: Path, tmp_path: Path) -> None:
    found = images.image_files(f"folder:{image_folder}", tmp_path, count=45, sides=(8, 8))
    assert len(found) == 45
    assert len(set(found)) == 40
    few = images.image_files(f"folder:{image_folder}", tmp_path, count=4, sides=(8, 8))
    assert {"bright", "dark"} == {Path(path).parent.name for path in few}
    for data in (
        "fashion-mini",
        "imagenette",
        "folder:",
    ):  # before anything is opened, or downloaded
        with pytest.raises(InputError, match=f"data: '{data}' must be generated or folder:PATH"):
            images.image_files(data, tmp_path, count=4, sides=(8, 8))
    with pytest.raises(
        InputError,
        match="data: 'x' must be generated, a folder of images, a pack file, or one of fashion-mini, cifar10",
    ):
        images.labelled_images("x", tmp_path, tmp_path, images=None, side=8)
    splits = images.labelled_images(f"folder:{image_folder}", tmp_path, tmp_path, images=6, side=0)
    assert len(splits.train) == 6
    assert splits.train.labels is not None
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    mini = images.labelled_images("fashion-mini", tmp_path, tmp_path, images=10, side=0)
    assert mini.val is not None
    assert len(mini.val) == 10
    with pytest.raises(InputError, match="must have labels and validation images"):
        images.labelled_images(
            f"folder:{image_folder / 'val' / 'dark'}", tmp_path, tmp_path, images=2, side=0
        )


def test_cases_are_those_of_the_targets() -> None:
    names = [case.name for case in view_cases("cuda", short=False)]
    assert len(set(names)) == len(names) == 8
    assert [case.name for case in view_cases("cuda", short=True)] == [
        "2x128 batch 64",
        "2x224 batch 64",
    ]
    assert "2x224+6x96 batch 256" in names
    assert view_cases("cpu", short=True) == (SMALL_IMAGES,)
    assert TINY.views == 16
    assert TINY.policy.local_views == 2
    assert ViewCase(64, 128).policy.crop_scale == (0.2, 1.0)
    assert augment.image_count(SMALL_IMAGES, workers=2) == 64 * 97
    for device in ("cuda", "cpu"):
        methods = {case.method for case in step.step_cases(device, short=True)}
        assert methods == {"simsiam", "vi-simsiam"}


def test_short_names_what_it_leaves_out() -> None:
    now = iter([0.0, 0.0, 90.0, 90.0])
    console = Console(file=io.StringIO(), width=300)
    suite = Suite("augment", SuiteOptions(device="cpu", short=True), console)
    done = [
        (case.name, used)
        for case, used in suite.cases(view_cases("cpu", short=False), 100.0, lambda: next(now))
    ]
    assert done == [("2x32 batch 64", 0.0)]
    assert "left out: 2x128 batch 64; --short has used 90 s" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(
        InputError,
        match="no case's name contains '3x'; there are '2x32 batch 64', '2x128 batch 64'$",
    ):
        list(
            Suite("augment", SuiteOptions(device="cpu", only="3x")).cases(
                view_cases("cpu", short=False), 1.0
            )
        )


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_gpu_views_of_all_providers_are_right(paths: list[str]) -> None:
    device = torch.device("cuda")
    made = augment.make_providers(TINY, paths, device, 1, timer_for(device))
    found = augment.measure_case(TINY, made, seconds=1, rounds=3)["providers"]
    assert f"{augment.TORCHVISION} on the GPU" in found
    for name, provider in found.items():
        assert provider["correct"] or "not installed" in provider["failure"], (
            name,
            provider["failure"],
        )
        assert not provider["correct"] or provider["views_per_second"] > 0
