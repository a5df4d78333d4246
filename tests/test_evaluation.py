"""Features of the three encoders, and the summary of a run."""

from __future__ import annotations

import base64
import functools
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import CPU, SIZE, TinyBackbone, gray_source, make_run, skip_rendering
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from vi_simsiam.config import AugmentConfig, ModelConfig, TrainConfig
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.data.views import eval_view
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.run import load_run
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation import features as features_module
from vi_simsiam.evaluation import summary
from vi_simsiam.evaluation.features import (
    ENCODERS,
    calibrate_batch_norm,
    collect,
    labelled_splits,
    pixels,
    untrained_backbone,
)
from vi_simsiam.evaluation.linear import LinearConfig, evaluate_linear
from vi_simsiam.evaluation.results import pack_bits, unpack_bits
from vi_simsiam.evaluation.summary import evaluate_run, summary_line
from vi_simsiam.inference.forward import extract


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank figures, and a linear probe of a few steps."""
    skip_rendering(monkeypatch)
    probe = functools.partial(evaluate_linear, config=LinearConfig(epochs=1, min_steps=5))
    monkeypatch.setattr(summary, "evaluate_linear", probe)


def stacked(source: ArraySource, size: int = SIZE) -> Tensor:
    view = eval_view(size)
    return torch.stack([view(source.image(i)) for i in range(len(source))])


def features_of(backbone: nn.Module, source: ArraySource, **options: object) -> Tensor:
    return extract(backbone, source, size=SIZE, device=CPU, **{"workers": 0, **options})  # type: ignore[arg-type]


class OneOfTwo(World):
    """A rank of two that keeps its part of the rows."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank=rank, size=2)

    def gather_rows(self, rows: Tensor) -> Tensor:
        return rows


@pytest.mark.parametrize("images", [1, 5])
def test_ranks_compute_a_part_of_the_features_each(images: int) -> None:
    """The parts of both ranks, in their order, are the whole; one image is too few to share."""
    source, backbone = gray_source(images), TinyBackbone()
    whole = features_of(backbone, source)
    parts = [features_of(backbone, source, world=OneOfTwo(rank), batch_size=2) for rank in range(2)]
    lengths = [1, 1] if images == 1 else [images // 2, images - images // 2]
    assert [len(part) for part in parts] == lengths
    torch.testing.assert_close(parts[0] if images == 1 else torch.cat(parts), whole)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 1)])
def test_features_are_those_of_eval_mode_in_image_order(batch_size: int, workers: int) -> None:
    source, backbone = gray_source(11), TinyBackbone()
    found = features_of(backbone, source, batch_size=batch_size, workers=workers)
    with torch.no_grad():
        expected = backbone.eval()(stacked(source))
    assert found.dtype == torch.float32
    assert not found.is_inference(), "a classifier must be able to train on them"
    torch.testing.assert_close(found, expected)


def test_damaged_weights_and_empty_sources_are_refused() -> None:
    backbone = TinyBackbone()
    with torch.no_grad():
        backbone.linear.bias[0] = torch.nan
    with pytest.raises(InputError, match="features: those of gray are not finite"):
        features_of(backbone, gray_source(5))
    nothing = ArraySource(np.zeros((0, 8, 8), np.uint8), name="nothing")
    with pytest.raises(InputError, match="nothing holds no images"):
        features_of(TinyBackbone(), nothing)


def test_calibration_averages_shuffled_batches_of_equal_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features_module, "CALIBRATION_IMAGES", 20)
    source, norm = gray_source(24), nn.BatchNorm2d(3)
    norm.running_mean.fill_(100)
    norm.num_batches_tracked.fill_(50)
    calibrate_batch_norm(
        nn.Sequential(norm).eval(), source, size=SIZE, seed=5, device=CPU, workers=0, batch_size=8
    )
    # Three batches of six; two images of the first twenty are left over.
    order = np.random.default_rng(5).permutation(24)[:18]
    batches = stacked(source)[order].reshape(3, 6, 3, SIZE, SIZE)
    assert norm.num_batches_tracked == 3
    torch.testing.assert_close(norm.running_mean, batches.mean((0, 1, 3, 4)))
    variances = torch.stack([b.var((0, 2, 3)) for b in batches])
    torch.testing.assert_close(norm.running_var, variances.mean(0))
    assert (norm.training, norm.momentum) == (False, 0.1)


def test_untrained_backbone_is_drawn_from_the_seed_and_complete(tmp_path: Path) -> None:
    config, source = make_run(tmp_path).config, gray_source(16)
    state = torch.get_rng_state()
    first = untrained_backbone(config, source, device=CPU, workers=0)
    again = untrained_backbone(config, source, device=CPU, workers=0)
    other = untrained_backbone(replace(config, seed=1), source, device=CPU, workers=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    assert (first.layer1[0].bn2.weight == 1).all(), "a residual branch starts at zero"
    with torch.no_grad():
        inside = first.conv1(stacked(source))
    torch.testing.assert_close(first.bn1.running_mean, inside.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.bn1.running_var, inside.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "side"), [(8, 8), (64, 32)])
def test_pixels_are_the_view_at_no_more_than_32(size: int, side: int) -> None:
    source = gray_source(3, side=40)
    torch.testing.assert_close(pixels(source, size, workers=0), stacked(source, side).flatten(1))


def test_collect_gives_every_encoder_of_both_splits(tmp_path: Path) -> None:
    train, val = gray_source(24), gray_source(10, name="gray val")
    run, stages = make_run(tmp_path, train=train, val=val), []
    sets = collect(run, report=stages.append)
    assert tuple(sets.train) == tuple(sets.val) == ENCODERS
    assert {name: tuple(x.shape) for name, x in sets.val.items()} == {
        "trained": (10, 4),
        "untrained": (10, 512),
        "pixels": (10, 3 * SIZE * SIZE),
    }
    assert [len(x) for x in sets.train.values()] == [24, 24, 24]
    assert sets.train_labels.tolist() == train.labels.tolist()
    assert sets.val_labels.tolist() == val.labels.tolist()
    torch.testing.assert_close(sets.val["trained"], features_of(run.model.backbone, val))
    assert "trained features of 24 train images" in stages


@pytest.mark.parametrize("count", [0, 8, 9])
def test_bits_are_packed_in_base64_and_come_back(count: int) -> None:
    bits = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    text = pack_bits(bits)
    assert torch.equal(unpack_bits(text, count), bits)
    assert base64.b64decode(text) == np.packbits(bits.numpy()).tobytes()


def test_bits_of_another_number_or_kind_are_refused() -> None:
    with pytest.raises(InputError, match="2 bytes given for 8 values; 1 must be given"):
        unpack_bits("gYA=", 8)
    with pytest.raises(InputError, match="'g-A=' .* base64"):
        unpack_bits("g-A=", 9)


@pytest.mark.usefixtures("quick")
def test_evaluating_a_run_writes_everything_and_ends_with_the_summary(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "run [red]", val=gray_source(10)), io.StringIO()
    evaluate_run(run, console=Console(file=out))
    results = [json.loads((run.path / f"{name}.json").read_text()) for name in ("knn", "linear")]
    lines = out.getvalue().splitlines()
    assert lines[-2:] == [
        summary_line(name, each) for name, each in zip(("kNN", "linear"), results, strict=True)
    ]
    result = {"top1": {"trained": 0.71249, "untrained": 0.55, "pixels": 0.75}}
    assert summary_line("kNN", result) == "kNN top-1: 71.2 % (untrained 55.0 %, pixels 75.0 %)"
    assert lines[:3] == [f"figure {run.path / name}.png" for name in ("curves", "density", "kappa")]
    assert results[0]["settings"]["k"] == 20


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (gray_source(4, labelled=False), gray_source(4), "mine has no labels"),
        (gray_source(4), None, "mine has no validation images"),
        (gray_source(4), gray_source(4, labelled=False), "validation images of mine have no lab"),
        (gray_source(0), gray_source(4), "has no training images"),
        (gray_source(8), gray_source(0), "has no validation images"),
        (gray_source(8), gray_source(9, classes=3), r"differ in their classes \(class 2\)"),
        (gray_source(8, classes=1), gray_source(4, classes=1), "has one class"),
    ],
)
def test_data_that_cannot_be_evaluated_on_is_named(
    train: ArraySource, val: ArraySource | None, message: str
) -> None:
    with pytest.raises(InputError, match=f"data: .*{message}") as error:
        labelled_splits(Splits("mine", train, val))
    assert "class" in str(error.value)


@pytest.mark.usefixtures("quick")
def test_a_run_without_a_log_and_with_few_images_is_evaluated(tmp_path: Path) -> None:
    """No curves are drawn, and all training images are neighbours."""
    run, out = make_run(tmp_path, train=gray_source(6), val=gray_source(4)), io.StringIO()
    (tmp_path / "metrics.jsonl").unlink()
    evaluate_run(run, console=Console(file=out))
    assert out.getvalue().startswith(f"figure {tmp_path / 'density.png'}")
    assert (tmp_path / "linear.json").is_file()
    assert "with k = 6, all training images" in out.getvalue()
    # Figures are drawn before the labels are needed.
    run = make_run(tmp_path / "other", train=gray_source(24, labelled=False))
    with pytest.raises(InputError, match="class folders"):
        evaluate_run(run, console=Console(file=out))
    assert {"curves.png", "kappa.png"} <= {path.name for path in run.path.iterdir()}


@pytest.mark.usefixtures("small_network")
def test_a_run_is_opened_where_its_cache_folder_is_not(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    config = TrainConfig(
        data=f"folder:{tmp_path / 'images'}",
        batch_size=2,
        epochs=1,
        workers=0,
        device="cpu",
        cache_dir=tmp_path / "cache",
        augment=AugmentConfig(size=8),
        model=ModelConfig(dim=8, projector_hidden=8, predictor_hidden=8),
    )
    Trainer(config, tmp_path / "run", console=Console(quiet=True)).fit()
    (tmp_path / "cache").rename(tmp_path / "moved")
    (tmp_path / "cache").touch()
    run = load_run(tmp_path / "run", device="cpu", workers=0)
    with pytest.raises(InputError, match="cache_dir: .* name another place"):
        run.readable(run.splits.train)
    run = load_run(tmp_path / "run", device="cpu", workers=0, cache_dir=tmp_path / "moved")
    images, _ = run.readable(run.splits.train)
    assert images.path is not None
    assert images.path.parent == tmp_path / "moved"
