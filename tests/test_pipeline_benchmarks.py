"""The benchmark of the input pipeline: checks of views, peers, images, and cases."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from benchmark_cases import CPU, needs_gpu, shown
from torch import Tensor

from vi_simsiam.benchmarks import augment, cases, peers, step, tables
from vi_simsiam.benchmarks.cases import ViewCase
from vi_simsiam.benchmarks.harness import Timer, timer_for
from vi_simsiam.benchmarks.peers import Provider
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import FileSource
from vi_simsiam.errors import InputError

TINY = ViewCase(4, 16, 2, 8, sides=(16, 20))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return cases.generate(tmp_path_factory.mktemp("generated"), count=8, sides=TINY.sides)


@pytest.fixture(scope="module")
def packed(paths: list[str]) -> PackedImages:
    return in_memory(FileSource(paths))


def provider(
    views: Sequence[Tensor], microseconds: float | Exception, hue_error: float | None = None
) -> Provider:
    """A provider that gives `views`, with a known error if one is given."""
    error = None if hue_error is None else {"without hue": 1e-6, "with hue": hue_error}
    measure = mock.Mock(side_effect=repeat(microseconds))
    return Provider(lambda: (views, error), measure, mock.Mock())


def test_views_are_judged_before_they_are_timed() -> None:
    def missing() -> Provider:
        raise ImportError("kornia is not installed (pip install 'vi-simsiam[bench]')")

    views = [torch.randn(4, 3, size, size) for size in (16, 16, 8, 8)]
    nan = [view.clone() for view in views]
    nan[1][0, 0, 0, 0] = math.nan
    right = provider(views, 500, hue_error=5e-5)
    made: dict[str, Callable[[], Provider]] = {
        "vi-simsiam": lambda: right,
        "inaccurate": lambda: provider(views, 500, hue_error=5e-4),
        "nan": lambda: provider(nan, 1),
        "small": lambda: provider(views[:2], 1),
        "dies": lambda: provider(views, RuntimeError("a worker died")),
        "kornia": missing,
        "lightly": lambda: provider(views, 2000),
    }
    case = augment.measure_case(TINY, made, seconds=9, rounds=3)
    found = case["providers"]
    assert found["vi-simsiam"]["views_per_second"] == 4 * 4 / 500e-6
    assert found["vi-simsiam"]["time"]["rounds"] == 3
    reasons = {name: each["failure"] for name, each in found.items() if not each["correct"]}
    assert reasons == {
        "inaccurate": "inaccurate: with hue 5.0e-04, allowed 1.0e-04",
        "nan": "wrong: views that are not finite",
        "small": "wrong: views of shapes [(4, 3, 16, 16)]",
        "dies": "RuntimeError: a worker died",
        "kornia": "ImportError: kornia is not installed (pip install 'vi-simsiam[bench]')",
    }
    assert all(found[name]["time"] is None for name in reasons)
    right.close.assert_called_once_with()  # type: ignore[attr-defined]
    text = shown(tables.augment_case(case))
    assert "4.00 x" in text
    assert "kornia (ImportError: kornia is not installed" in text
    json.dumps(case, allow_nan=False)


def test_our_views_are_compared_with_torchvisions(packed: PackedImages) -> None:
    threads = torch.get_num_threads()
    alone = augment.augmented_bytes(packed, TINY.policy, TINY.batch, CPU, Timer())
    loader = augment.loader_views(packed, TINY.policy, TINY.batch, CPU, workers=0)
    for made in (alone, loader):
        found = augment.judge(TINY, made)
        assert found["correct"], found["failure"]
        assert found["error"].keys() == {"without hue", "with hue"}
        assert made.measure() > 0
        made.close()
    assert torch.get_num_threads() == threads
    views = [view.clone() for view in alone.sample()[0]]
    views[3][2, 0, 4, 4] += 1e-3 / 0.229
    changed = augment.errors(views, packed, TINY.policy, np.arange(TINY.batch))
    assert max(changed.values()) == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("make", [peers.torchvision_transform, peers.lightly_transform])
@pytest.mark.parametrize(
    "case", [TINY, dataclasses.replace(TINY, local_views=0)], ids=["multicrop", "two"]
)
def test_file_peers_make_the_same_kinds_of_views(
    make: Any, case: ViewCase, paths: list[str]
) -> None:
    if make is peers.lightly_transform:
        pytest.importorskip("lightly")
    source = mock.Mock(wraps=FileSource(paths), __len__=lambda _: 7)
    peer = peers.file_provider(
        source, make(case.policy), batch=case.batch, device=CPU, workers=0, turns=2
    )
    found = augment.judge(case, peer)
    assert found["correct"], found["failure"]
    assert found["error"] is None
    assert abs(found["mean"]) < 1.5
    assert 0.3 < found["std"] < 2.5
    source.image.reset_mock()
    assert peer.measure() > 0
    read = [call.args[0] for call in source.image.call_args_list]
    assert read == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4], "two batches after the first"
    peer.close()


def test_device_peers_make_the_same_kinds_of_views(paths: list[str]) -> None:
    pytest.importorskip("kornia")
    resident = peers.resident_images(paths[:4], TINY.sides, CPU)
    assert [tuple(image.shape) for image in resident] == [(3, 16, 20)] * 4
    kornia = peers.kornia_on_device(TINY.policy, CPU)
    for call in (peers.torchvision_on_device(TINY.policy), kornia):
        peer = peers.device_provider(call, resident, CPU)
        found = augment.judge(TINY, peer)
        assert found["correct"], found["failure"]
        assert peer.measure() > 0
    views = kornia(resident[:1] * 8)
    assert len({view.sum().item() for view in views[0]}) > 4, "its own parameters for every sample"


def test_batches_are_timed_between_the_first_and_the_last() -> None:
    with mock.patch.object(peers.time, "perf_counter", side_effect=[10.0, 16.0]):
        assert peers.seconds_a_batch(iter([[torch.ones(1)]] * 4), CPU) == 2.0


def test_images_come_from_folders_too(image_folder: Path, tmp_path: Path) -> None:
    data = f"folder:{image_folder}"
    found = cases.image_files(data, tmp_path, count=45, sides=(8, 8))
    assert (len(found), len(set(found))) == (45, 40)
    few = cases.image_files(data, tmp_path, count=4, sides=(8, 8))
    assert {"bright", "dark"} == {Path(path).parent.name for path in few}
    for other in ("fashion-mini", "imagenette", "folder:"):  # before anything is opened
        with pytest.raises(InputError, match=f"data: '{other}' must be generated or folder:PATH"):
            cases.image_files(other, tmp_path, count=4, sides=(8, 8))

    def labelled(data: str, count: int | None) -> Any:
        return cases.labelled_images(data, tmp_path, tmp_path, images=count, side=8)

    with pytest.raises(InputError, match="data: 'x' .* must be generated, .* fashion-mini"):
        labelled("x", None)
    with pytest.raises(InputError, match="must have labels and validation images"):
        labelled(f"folder:{image_folder / 'val' / 'dark'}", 2)
    assert labelled(data, 6).train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(labelled("fashion-mini", 10).val) == 10


def test_cases_are_those_of_the_targets() -> None:
    names = [case.name for case in cases.view_cases("cuda", short=False)]
    assert len(set(names)) == len(names) == 8
    assert "2x224+6x96 batch 256" in names
    assert names[:2] == ["2x128 batch 64", "2x224 batch 64"]
    assert [case.name for case in cases.view_cases("cuda", short=True)] == names[:2]
    assert TINY.views == 16
    assert TINY.policy.local_views == 2
    assert ViewCase(64, 128).policy.crop_scale == (0.2, 1.0)
    methods = [case.method for case in step.step_cases("cpu", short=True)]
    assert methods == ["vi-simsiam", "simsiam"]


@pytest.mark.gpu
@needs_gpu
def test_gpu_views_of_all_providers_are_right(paths: list[str]) -> None:
    device = torch.device("cuda")
    made = augment.make_providers(TINY, paths, device, 1, timer_for(device))
    found = augment.measure_case(TINY, made, seconds=1, rounds=3)["providers"]
    assert f"{augment.TORCHVISION} on the GPU" in found
    for name, each in found.items():
        failure = each["failure"]
        assert each["correct"] or "not installed" in failure, (name, failure)
        assert not each["correct"] or each["views_per_second"] > 0
