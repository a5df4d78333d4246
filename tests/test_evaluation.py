"""Features of the three encoders and of random views, result files, and the summary of a run."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_cases import (
    CPU,
    SIZE,
    TinyBackbone,
    feature_sets,
    gray_source,
    make_run,
    skip_rendering,
)
from inference_cases import save_run
from rich.console import Console
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from vi_simsiam.cli import main
from vi_simsiam.cli.evaluate import evaluate_run
from vi_simsiam.config import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from vi_simsiam.data.cache import cached
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.data.subsets import labelled_splits
from vi_simsiam.data.views import draw_table, eval_view
from vi_simsiam.engine.checkpoint import Checkpoint, checkpoint_path
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.forward import extract
from vi_simsiam.engine.run import load_run
from vi_simsiam.errors import InputError, RunWarning
from vi_simsiam.evaluation import features as features_module
from vi_simsiam.evaluation.features import (
    ENCODERS,
    FeatureSets,
    collect,
    pixels,
    random_features,
    untrained_backbone,
)
from vi_simsiam.evaluation.knn import evaluate_knn
from vi_simsiam.evaluation.linear import LinearConfig, evaluate_linear
from vi_simsiam.evaluation.logistic import evaluate_logistic
from vi_simsiam.evaluation.moved import move
from vi_simsiam.evaluation.results import pack_bits, read_result, summary_lines, unpack_bits
from vi_simsiam.ops.augment import Column


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank figures, and a linear probe of a few steps."""
    skip_rendering(monkeypatch)
    short = LinearConfig(epochs=1, min_steps=5)
    monkeypatch.setattr(
        "vi_simsiam.evaluation.linear.evaluate_linear", lambda sets: evaluate_linear(sets, short)
    )


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


def test_untrained_statistics_are_averages_of_shuffled_batches_of_equal_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = nn.BatchNorm2d(3)
    monkeypatch.setattr(features_module, "CALIBRATION_IMAGES", 20)
    monkeypatch.setattr(features_module, "_BATCH", 8)
    monkeypatch.setattr(features_module, "build_backbone", lambda *_, **__: (norm, 3))
    source, config = gray_source(24), replace(make_run(tmp_path).config, seed=5)
    assert not untrained_backbone(config, source, device=CPU, workers=0).training
    # Three batches of six; two images of the first twenty are left over.
    order = np.random.default_rng(5).permutation(24)[:18]
    batches = stacked(source)[order].reshape(3, 6, 3, SIZE, SIZE)
    torch.testing.assert_close(norm.running_mean, batches.mean((0, 1, 3, 4)))
    variances = torch.stack([b.var((0, 2, 3)) for b in batches])
    torch.testing.assert_close(norm.running_var, variances.mean(0))


def test_untrained_backbone_is_drawn_from_the_seed_and_complete(tmp_path: Path) -> None:
    config, source = make_run(tmp_path).config, gray_source(16)
    state = torch.get_rng_state()
    first, again, other = (
        untrained_backbone(replace(config, seed=seed), source, device=CPU, workers=0)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    assert (first.layer1[0].bn2.weight == 1).all(), "a residual branch starts at zero"


@pytest.mark.parametrize(("size", "side"), [(8, 8), (64, 32)])
def test_pixels_are_the_view_at_no_more_than_32(size: int, side: int) -> None:
    source = gray_source(3, side=40)
    torch.testing.assert_close(pixels(source, size, workers=0), stacked(source, side).flatten(1))


def test_collect_gives_every_encoder_of_both_splits(tmp_path: Path) -> None:
    train, random = gray_source(24), np.random.default_rng(0)
    images = random.integers(0, 256, (10, SIZE, SIZE, 3), dtype=np.uint8)
    val = ArraySource(images, np.arange(10) % 2, train.classes, "coloured")
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
    moved = move(stacked(val), range(10))
    assert tuple(sets.moved) == ENCODERS
    torch.testing.assert_close(sets.moved["pixels"], moved.flatten(1))
    torch.testing.assert_close(sets.moved["trained"], run.model.backbone(moved))
    assert "trained features of 24 train images" in stages


def coloured(count: int) -> PackedImages:
    shape = (count, 20, 20, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return cached(ArraySource(images, np.arange(count) % 2, ["a", "b"], "coloured"))[0]


def passes(
    count: int, images: PackedImages, backbone: nn.Module, device: torch.device = CPU
) -> list[tuple[Tensor, Tensor]]:
    """The first passes of random views."""
    found = random_features(backbone, images, size=SIZE, device=device, workers=0)
    return [next(found) for _ in range(count)]


def cropped_and_flipped(images: PackedImages, row: np.ndarray) -> Tensor:
    """The view of a table row by torchvision alone."""
    image = np.asarray(images.image(int(row[Column.SAMPLE])))
    pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
    top, left = int(row[Column.TOP]), int(row[Column.LEFT])
    height, width = int(row[Column.HEIGHT]), int(row[Column.WIDTH])
    view = tv.resized_crop(pixels, top, left, height, width, [SIZE, SIZE], antialias=True)
    view = tv.horizontal_flip(view) if row[Column.FLIP] else view
    return tv.normalize(view, list(IMAGENET_MEAN), list(IMAGENET_STD))


def test_random_features_are_those_of_crops_and_flips_in_eval_mode() -> None:
    images, backbone = coloured(12), TinyBackbone().train()
    found = passes(6, images, backbone)
    assert backbone.training
    backbone.eval()
    off = {"jitter_prob": 0.0, "grayscale_prob": 0.0, "blur_prob": 0.0}
    policy = AugmentConfig(size=SIZE, crop_scale=(0.08, 1.0), **off)
    sizes = {"heights": images.heights, "widths": images.widths, "samples": np.arange(12)}
    tables = [draw_table(policy, seed=0, epoch=epoch, **sizes) for epoch in range(3)]
    for (features, index), table in zip(found, np.concatenate(tables), strict=True):
        assert index.tolist() == list(range(12))
        views = torch.stack([cropped_and_flipped(images, row) for row in table])
        with torch.no_grad():
            torch.testing.assert_close(features, backbone(views), rtol=1e-4, atol=1e-4)


def test_few_images_are_left_over_and_others_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "_BATCH", 4)
    indices = [index for _, index in passes(6, coloured(11), TinyBackbone())]
    assert [len(index.unique()) for index in indices] == [9] * 6  # three batches of three
    assert set(torch.cat(indices).tolist()) == set(range(11))


@pytest.mark.gpu
def test_cuda_gives_the_random_features_of_the_cpu() -> None:
    images, cuda = coloured(12), torch.device("cuda")
    _, (expected, index) = passes(2, images, TinyBackbone())
    _, (found, found_index) = passes(2, images, TinyBackbone().to(cuda), cuda)
    assert torch.equal(found_index, index)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "evaluate", "package"),
    [
        ("knn", evaluate_knn, "torch"),
        ("linear", evaluate_linear, "timm"),
        ("logistic", evaluate_logistic, "scikit-learn"),
    ],
)
def test_result_files_have_the_accuracies_and_correct_images(
    tmp_path: Path, name: str, evaluate: Callable[[FeatureSets], dict[str, Any]], package: str
) -> None:
    (tmp_path / f"{name}.json").write_text("an older result")
    result = evaluate(feature_sets(tmp_path, val=27))
    assert json.loads((tmp_path / f"{name}.json").read_text()) == json.loads(json.dumps(result))
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.json"]
    assert result["evaluation"] == name
    assert (result["train_images"], result["val_images"], result["classes"]) == (60, 27, 3)
    assert result["features"] == dict.fromkeys(ENCODERS, 8)
    assert {"vi-simsiam", "torch", package} <= set(result["versions"])
    assert result["top1"]["trained"] == 1.0
    assert 0 < result["top1"]["untrained"] < 0.7
    for encoder, share in result["top1"].items():
        correct = unpack_bits(result["correct"][encoder], 27)
        assert correct.double().mean() == pytest.approx(share)
    if name != "knn":
        assert result["top5_counts"] == 3
        assert set(result["top5"].values()) == {1.0}


def test_a_result_is_that_of_the_last_checkpoint(tmp_path: Path) -> None:
    """Files of older versions have no step, and the former checkpoint has none in its name."""
    evaluate_knn(feature_sets(tmp_path))
    file = tmp_path / "knn.json"
    result = json.loads(file.read_text())
    assert result["step"] == 40
    for name in ("checkpoint.pt", "checkpoint-best.safetensors"):
        (tmp_path / name).touch()
        assert read_result(tmp_path, "knn") == result
    Checkpoint(0, 0.0, 8, {}).save(checkpoint_path(tmp_path, 0))
    with pytest.warns(RunWarning, match="is left out: it is of step 40, the run is at step 0; "):
        assert read_result(tmp_path, "knn") is None
    Checkpoint(40, 0.0, 8, {}).save(checkpoint_path(tmp_path, 40))
    assert read_result(tmp_path, "knn") == result
    Checkpoint(50, 0.0, 8, {}).save(checkpoint_path(tmp_path, 50))
    with pytest.warns(RunWarning, match="it is of step 40, the run is at step 50; "):
        assert read_result(tmp_path, "knn") is None
    checkpoint_path(tmp_path, 50).write_text("damaged")
    assert read_result(tmp_path, "knn") == result, "an evaluation falls back as well"
    del result["step"]
    file.write_text(json.dumps(result))
    assert read_result(tmp_path, "knn") == result


@pytest.mark.usefixtures("small_network")
def test_the_step_of_an_unfinished_run_is_printed_and_written(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run")
    words = [str(run), "--data", str(image_folder), "--device", "cpu", "--workers", "0"]
    first = Checkpoint.load(run / "checkpoint-00000001.safetensors")
    options = {"uncertainty": ["--images", "6", "--corruption-images", "0"]}
    for images, end in ((64, ", measured at step 1 of 100"), (1, "")):
        replace(first, images=images).save(run / "checkpoint-00000001.safetensors")
        for name in ("knn", "logistic", "uncertainty"):
            assert main([name, *words, *options.get(name, ())]) == 0
            line = capsys.readouterr().out.splitlines()[-1]
            assert line.endswith(end)
            assert ("measured at" in line) == bool(end)
            assert json.loads((run / f"{name}.json").read_text())["step"] == 1


def test_bits_are_packed_in_base64_and_come_back() -> None:
    bits = torch.rand(9, generator=torch.Generator().manual_seed(0)) < 0.5
    text = pack_bits(bits)
    assert torch.equal(unpack_bits(text, 9), bits)
    assert base64.b64decode(text) == np.packbits(bits.numpy()).tobytes()
    for damaged in ("gYA=", "g-A="):
        with pytest.raises(InputError, match=f"correct: '{damaged}' is not 8 values in base64"):
            unpack_bits(damaged, 8)


@pytest.mark.usefixtures("quick")
def test_evaluating_a_run_writes_everything_and_ends_with_the_summary(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "run [red]", val=gray_source(10)), io.StringIO()
    evaluate_run(run, World(CPU), Console(file=out))
    results = [json.loads((run.path / f"{name}.json").read_text()) for name in ("knn", "linear")]
    lines = out.getvalue().splitlines()
    assert lines[-5:] == summary_lines(dict(zip(("kNN", "linear"), results, strict=True)))
    result = {"top1": {"trained": 0.71249, "untrained": 0.55, "pixels": 0.75}}
    line = "kNN top-1: 71.2 % (untrained 55.0 %, pixels 75.0 %)"
    assert summary_lines({"kNN": result}) == [line]
    moved = line.replace(":", " of moved images:")
    result["moved_top1"] = result["top1"]
    assert summary_lines({"kNN": result}) == [line, moved]
    few = line.replace(":", " from 10 labels a class:")
    result["few_labels_top1"] = result["top1"]
    assert summary_lines({"kNN": result}) == [line, few, moved]
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
    run = replace(run, step=7)
    (tmp_path / "metrics.jsonl").unlink()
    evaluate_run(run, World(CPU), Console(file=out))
    assert out.getvalue().startswith(f"figure {tmp_path / 'density.png'}")
    assert (tmp_path / "linear.json").is_file()
    end = ", measured at step 7 of 40"
    assert f"with k = 6, all training images{end}\n" in out.getvalue()
    assert out.getvalue().endswith(f"{end}\n")
    # Figures are drawn before the labels are needed.
    run = make_run(tmp_path / "other", train=gray_source(24, labelled=False))
    with pytest.raises(InputError, match="class folders"):
        evaluate_run(run, World(CPU), Console(file=out))
    assert {"curves.png", "kappa.png"} <= {path.name for path in run.path.iterdir()}


@pytest.mark.usefixtures("small_network")
def test_a_run_is_opened_where_its_cache_folder_is_not(tmp_path: Path, image_folder: Path) -> None:
    folder, data = save_run(tmp_path / "run"), f"folder:{image_folder}"
    (tmp_path / "cache").touch()
    options = {"device": "cpu", "workers": 0, "data": data}
    run = load_run(folder, **options, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="cache_dir: .* name another place"):
        run.readable(run.splits.train)
    run = load_run(folder, **options, cache_dir=tmp_path / "moved")
    images, _ = run.readable(run.splits.train)
    assert images.path is not None
    assert images.path.parent == tmp_path / "moved"
