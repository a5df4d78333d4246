"""uncertainty.json from end to end, and the damage of images by level."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_cases import gray_source, make_run
from inference_cases import save_run
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits
from torchvision.transforms.v2.functional import gaussian_blur

from vi_simsiam.cli import main
from vi_simsiam.cli.evaluate import print_result
from vi_simsiam.data.datasets import Splits, open_dataset
from vi_simsiam.data.loader import eval_pixels
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.engine.forward import random_views
from vi_simsiam.engine.run import Run
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation import uncertainty
from vi_simsiam.evaluation.comparisons import comparisons
from vi_simsiam.evaluation.corruptions import LEVELS, MAGNITUDES, corrupt
from vi_simsiam.evaluation.figures import certainty
from vi_simsiam.evaluation.foreign import builtin_sets
from vi_simsiam.evaluation.metrics import level_trend
from vi_simsiam.evaluation.scores import image_scores
from vi_simsiam.evaluation.uncertainty import evaluate_uncertainty

TINY_SCORES = {
    "kappa", "embedding_norm", "stage1_norm", "stage2_norm", "projection_norm", "prediction_norm",
    "view_agreement", "knn_distance", "mahalanobis", "mahalanobis_label_free", "softmax", "energy",
    "edge_energy", "contrast", "jpeg_size",
}  # fmt: skip


def noisy_source(count: int, *, seed: int = 0, labelled: bool = True) -> ArraySource:
    """Three classes of brightness that overlap, of 10 x 8 pixels."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    levels = 60 + 60 * labels[:, None, None, None] + generator.normal(0, 30, (count, 1, 1, 1))
    images = (levels + generator.normal(0, 15, (count, 10, 8, 3))).clip(0, 255).astype(np.uint8)
    classes = ["dark", "gray", "bright"]
    return ArraySource(images, *((labels, classes) if labelled else (None, None)), "noisy")


def tiny_run(folder: Path, **options: Any) -> Run:
    sources = {"train": noisy_source(60), "val": noisy_source(40, seed=1), **options}
    return make_run(folder, **sources)


def evaluate(run: Run, **options: Any) -> dict[str, Any]:
    return evaluate_uncertainty(run, **{"corruption_images": 0, **options})


def write_images(folder: Path, source: ArraySource) -> Path:
    """A labelled source as class folders of PNG files."""
    assert source.labels is not None
    assert source.classes is not None
    for i, label in enumerate(source.labels):
        place = folder / "train" / source.classes[label]
        place.mkdir(parents=True, exist_ok=True)
        source.image(i).save(place / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def result(run: Run) -> dict[str, Any]:
    """Every validation image is damaged, seven at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uncertainty, "_BATCH", 7)
        return evaluate(run, corruption_images=40)


def test_every_part_is_measured_and_written(run: Run, result: dict[str, Any]) -> None:
    assert json.loads((run.path / "uncertainty.json").read_text()) == result
    json.dumps(result, allow_nan=False)
    assert [result[name] for name in ("data", "dim", "images")] == ["gray", 8, 40]
    assert set(result["scores"]) == TINY_SCORES
    assert next(iter(result["scores"])) == "kappa"
    counts = [row["count"] for row in result["calibration"]["bins"]]
    assert result["calibration"]["pairs"] == sum(counts) == 40 * 12
    found = result["misclassification"]
    assert set(found["scores"]) == set(found["risk_coverage"]) == TINY_SCORES
    assert 0.4 < found["accuracy"] < 1
    wrong = 1 - found["accuracy"]
    assert found["random"] == pytest.approx({"aurc": wrong, "augrc": wrong / 2})
    for figures in found["scores"].values():
        assert set(figures) == {"auroc", "aurc", "augrc"}
        assert found["oracle"]["aurc"] <= figures["aurc"]
    seen = {name: part["seen_classes"] for name, part in result["retrieval"].items()}
    assert seen == {"validation": True, "digits": False}
    assert set(result["ood"]) == {"noise", "digits"}
    for part in result["ood"].values():
        assert (part["kind"], part["images"]) == ("far", 40)
        assert set(part["scores"]) == TINY_SCORES - {"view_agreement"}
        assert all(set(each) == {"auroc", "aupr", "fpr95"} for each in part["scores"].values())
    assert set(result["corruptions"]) == set(MAGNITUDES)
    for part in result["corruptions"].values():
        assert set(part["scores"]) == TINY_SCORES - {"view_agreement"}


def test_figures_are_those_of_the_concentrations(run: Run, result: dict[str, Any]) -> None:
    def concentrations(run: Run, source: ArraySource) -> NDArray[np.float64]:
        found = certainty(dataclasses.replace(run, splits=Splits("", source, None)))
        assert found is not None
        return found.values

    assert isinstance(run.splits.val, ArraySource)
    kappa = concentrations(run, run.splits.val)
    noise_source, digits = (each.source for each in builtin_sets(run.config, 40, 0))
    digit = np.rint(load_digits().images[0] * 255 / 16)
    np.testing.assert_array_equal(np.asarray(digits.image(0))[..., 0], digit)
    noise = concentrations(run, noise_source)
    pairs = noise[:, None] - kappa[None]
    expected = np.mean(pairs < 0) + np.mean(pairs == 0) / 2
    assert result["ood"]["noise"]["scores"]["kappa"]["auroc"] == pytest.approx(expected, abs=2e-3)
    for part in result["corruptions"].values():
        assert part["median_kappa"][0] == pytest.approx(np.median(kappa), rel=1e-4)
    gray = concentrations(run, ArraySource(np.full((1, 8, 8, 3), 128, np.uint8)))
    blank = result["corruptions"]["blank"]
    assert blank["median_kappa"][5] == pytest.approx(gray[0], rel=1e-4)
    assert blank["scores"]["contrast"]["monotone"] == 1, "every level is grayer"
    ((pixels, _),) = eval_pixels(run.splits.val, 8, 100, 0)
    damaged = [corrupt(pixels, "noise", level, numbers=np.arange(40)) for level in range(6)]
    trend = level_trend(np.stack([image_scores(images)["jpeg_size"] for images in damaged]))
    assert result["corruptions"]["noise"]["scores"]["jpeg_size"] == trend


def test_cosines_are_those_with_the_network_that_makes_the_targets(tmp_path: Path) -> None:
    class FirstAxis(torch.nn.Module):
        def forward(self, views: torch.Tensor) -> torch.Tensor:
            return torch.eye(8)[:1].expand(len(views), 8)

    run = tiny_run(tmp_path)
    run.model.target = FirstAxis()  # type: ignore[assignment]
    images = run.readable(run.splits.val or run.splits.train)[0]
    pixels, numbers = [np.asarray(images.image(i)) for i in range(40)], np.arange(40)
    options = {"views": 4, "seed": 0, "device": run.device, "later_epochs": False}
    views = random_views(pixels, numbers, run.config.augment, **options)
    with torch.no_grad():
        expected = float(run.model.distribution(views.flatten(0, 1)).loc[:, 0].mean())
    found = evaluate(run)["calibration"]["observed"]
    assert found == pytest.approx(expected, abs=1e-5)


def test_choices_depend_on_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncertainty, "TRAIN_IMAGES", 30)
    run, few = tiny_run(tmp_path), {"images": 20, "corruption_images": 2}
    first = evaluate(run, **few)
    torch.rand(3)
    assert evaluate(run, **few) == first
    assert (first["images"], first["settings"]["train_images"]) == (20, 30)
    other = evaluate(run, **few, seed=1)
    for part in ("calibration", "misclassification", "corruptions"):
        assert other[part] != first[part]


def test_without_labels_the_rest_is_measured(tmp_path: Path) -> None:
    train, val = (noisy_source(count, labelled=False) for count in (60, 40))
    result = evaluate(tiny_run(tmp_path, train=train, val=val))
    assert result["misclassification"] is None
    assert "validation" not in result["retrieval"]
    assert any("no labels" in note for note in result["settings"]["notes"])
    assert result["calibration"]["pairs"] == 480
    for part in result["ood"].values():
        assert {"kappa", "mahalanobis", "knn_distance"} <= set(part["scores"])
        assert "softmax" not in part["scores"]


def test_validation_images_or_all_classes_but_one_may_be_missing(tmp_path: Path) -> None:
    result = evaluate(tiny_run(tmp_path, val=None))
    assert (result["images"], result["settings"]["train_images"]) == (30, 30)
    assert any("no validation images" in note for note in result["settings"]["notes"])

    dark = ArraySource(noisy_source(12).images, np.zeros(12, np.int64), ["dark", "gray", "bright"])
    result = evaluate(tiny_run(tmp_path / "dark", train=dark))
    assert result["misclassification"] is None
    note = "one class among 12 training images: misclassification is not measured"
    assert note in result["settings"]["notes"]


def test_other_data_sets_are_detected_by_kind_and_name(tmp_path: Path, run: Run) -> None:
    pixels = np.random.default_rng(2).integers(150, 256, (12, 9, 9, 3), dtype=np.uint8)
    write_images(tmp_path / "digits", ArraySource(pixels, np.arange(12) % 2, ["x", "bright"]))
    write_images(tmp_path / "a=b", gray_source(12))
    specs = [f"near=folder:{tmp_path}/digits", f"folder:{tmp_path}/a=b", "far=fashion-mini"]
    elsewhere = dataclasses.replace(run.config, data="folder:elsewhere")
    run = dataclasses.replace(run, path=tmp_path, config=elsewhere)
    result = evaluate(run, ood=specs)
    kinds = {name: part["kind"] for name, part in result["ood"].items()}
    named = {"digits-2": "near", "a=b": "given", "fashion-mini": "far"}
    assert kinds == {**named, "noise": "far", "digits": "far"}
    assert result["ood"]["fashion-mini"]["images"] == 40
    assert "view_agreement" in result["ood"]["digits-2"]["scores"]
    seen = {name for name, part in result["retrieval"].items() if part["seen_classes"]}
    assert seen == {"validation", "digits-2"}
    assert set(result["retrieval"]) == {"validation", *named, "digits"}
    assert result["settings"]["overlapping_classes"] == {"digits-2": ["bright"]}
    assert "digits-2 shares classes with the run's data: bright" in result["settings"]["notes"]


def test_the_runs_own_images_are_at_most_half_of_another_data_set(tmp_path: Path) -> None:
    own, other = noisy_source(30), noisy_source(30, seed=5)
    for name, count in (("own", 20), ("most", 11), ("mixed", 8)):
        images = np.concatenate([own.images[:count], other.images[: 20 - count]])
        write_images(tmp_path / name, ArraySource(images, np.arange(20) % 2, ["x", "y"]))
    run = tiny_run(tmp_path / "run", train=own)
    files = dataclasses.replace(run, splits=open_dataset(f"folder:{tmp_path}/own"))
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for each, ood, message in (
        (run, [f"folder:{tmp_path}/own"], "20 of 20 images of own are the run's own"),
        (run, [f"folder:{tmp_path}/most"], "11 of 20 images of most are the run's own"),
        (files, [f"folder:{tmp_path}/link"], "holds images of the run's own data"),
        (run, ["fashion-mini"], "holds images of the run's own data"),  # named in config.json
        (run, ["near=cifar10", "far=cifar10"], "twice"),
        (run, ["far=mars"], "data: 'mars' is not there"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(each, ood=ood)
    assert not (run.path / "uncertainty.json").exists()
    result = evaluate(run, ood=[f"folder:{tmp_path}/mixed"])
    assert "8 of 20 images of mixed are the run's own" in result["settings"]["notes"]


def test_bad_input_is_refused(run: Run, tmp_path: Path) -> None:
    simsiam = tiny_run(tmp_path / "simsiam", method="simsiam")
    other_classes = tiny_run(tmp_path / "other", val=gray_source(12))
    few = tiny_run(tmp_path / "few", train=noisy_source(3), val=None)
    for each, options, message in (
        (run, {"images": 1}, "images: 1 .* at least 2"),
        (run, {"seed": -1}, "seed: -1"),
        (run, {"corruption_images": -1}, "corruption_images: -1"),
        (simsiam, {}, "predicts no concentration"),
        (other_classes, {}, "differ in their classes"),
        (few, {}, "at least 4"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(each, **options)
    assert not (simsiam.path / "uncertainty.json").exists()


def test_no_errors_and_a_constant_concentration_leave_figures_out(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, train=gray_source(40), val=gray_source(20))
    last = run.model.predictor[-1]
    assert isinstance(last, torch.nn.Linear)
    last.weight.data[8] = 0
    result = evaluate(run)
    assert result["corruptions"] == {}
    assert result["ood"]["noise"]["scores"]["kappa"] == {"auroc": 0.5, "aupr": 0.5, "fpr95": 1.0}
    assert len(result["calibration"]["bins"]) == 1
    found = result["misclassification"]
    assert found["accuracy"] == 1
    assert found["scores"]["kappa"] == {"auroc": None, "aurc": 0.0, "augrc": 0.0}
    json.dumps(result, allow_nan=False)
    print_result(result, console := Console(record=True, width=120))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["misclassification", "AUROC", "-", "none", "-", "-"] in lines


@pytest.mark.usefixtures("small_network")
def test_the_command_prints_a_table_and_writes_the_file(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = save_run(tmp_path / "run")
    command = ["uncertainty", str(out), "--data", f"folder:{image_folder}", "--device", "cpu"]
    options = "--workers 0 --ood near=fashion-mini --images 6 --corruption-images 1"
    assert main([*command, *options.split()]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    result = json.loads((out / "uncertainty.json").read_text())
    assert result["images"] == 6
    assert result["ood"]["fashion-mini"]["kind"] == "near"
    assert f"{result['calibration']['expected']:.3f}" in printed
    ahead = [row.ahead for row in comparisons(result) if row.ahead is not None]
    assert f"in {sum(ahead)} of {len(ahead)} comparisons" in printed
    assert "fashion-mini (near)" in printed
    assert main([*command, "--ood", "mars"]) == 2
    assert capsys.readouterr().err.startswith("vi-simsiam: data: 'mars' is not there")


def pictures(count: int = 6, side: int = 28) -> NDArray[np.uint8]:
    """Fashion-MNIST, coloured and enlarged smoothly: the same content at every size."""
    source = open_dataset("fashion-mini").train
    images = [source.image(i).resize((side, side), Image.Resampling.BICUBIC) for i in range(count)]
    tints = np.random.default_rng(0).uniform(0.5, 1, (count, 1, 1, 3))
    return (np.stack([np.asarray(image) for image in images]) * tints).astype(np.uint8)


def damage(images: NDArray[np.uint8], kind: str, level: int) -> float:
    return float(np.abs(corrupt(images, kind, level).astype(float) - images).mean())


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_damage_grows_with_the_level(kind: str) -> None:
    images = pictures(side=16)
    damages = [damage(images, kind, level) for level in LEVELS]
    assert damages[0] == 0
    assert all(after > before for before, after in itertools.pairwise(damages))
    damaged = corrupt(images, kind, 5)
    assert (damaged.shape, damaged.dtype) == (images.shape, np.uint8)


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_the_damage_of_an_image_does_not_depend_on_the_batch(kind: str) -> None:
    images, numbers = pictures(), np.array([3, 14, 15, 92, 65, 35])
    together = corrupt(images, kind, 3, seed=5, numbers=numbers)
    for i in range(6):
        alone = corrupt(images[i : i + 1], kind, 3, seed=5, numbers=numbers[i : i + 1])
        np.testing.assert_array_equal(together[i], alone[0])
    other = corrupt(images, kind, 3, seed=6, numbers=numbers)
    assert np.array_equal(together, other) == (kind not in ("noise", "occlusion"))


@pytest.mark.parametrize("kind", [kind for kind in MAGNITUDES if kind != "jpeg"])
def test_small_and_large_images_lose_as_much(kind: str) -> None:
    small, large = pictures(12, 28), pictures(12, 112)
    for level in LEVELS[1:]:
        # Lengths are whole pixels, and a blur narrower than a pixel changes little at 28 pixels.
        assert damage(large, kind, level) == pytest.approx(damage(small, kind, level), rel=0.35)


def test_blur_is_gaussian() -> None:
    images = pictures(2, 40)
    for level, share in enumerate(MAGNITUDES["blur"], 1):
        sigma = share * 40
        taps = 2 * round(4 * sigma) + 1
        floats = torch.from_numpy(images).permute(0, 3, 1, 2).double()
        peer = gaussian_blur(floats, [taps, taps], [sigma, sigma]).permute(0, 2, 3, 1).numpy()
        assert np.abs(corrupt(images, "blur", level) - peer).max() < 0.51


def test_noise_has_the_stated_deviation_and_grain() -> None:
    gray = np.full((4, 96, 96, 3), 128, np.uint8)
    noise = corrupt(gray, "noise", 2).astype(float) - 128
    assert noise.std() == pytest.approx(255 * MAGNITUDES["noise"][1], rel=0.03)
    assert len(np.unique(noise.reshape(4, -1), axis=0)) == 4, "every image has noise of its own"
    cells = noise.reshape(4, 32, 3, 32, 3, 3)
    np.testing.assert_array_equal(cells, np.broadcast_to(cells[:, :, :1, :, :1], cells.shape))
    neighbours = cells[:, :, 0, :-1, 0].ravel(), cells[:, :, 0, 1:, 0].ravel()
    assert np.abs(np.corrcoef(*neighbours)[0, 1]) < 0.05


def test_squares_cover_the_stated_area_and_contain_the_smaller_ones() -> None:
    white = np.full((60, 40, 40, 3), 255, np.uint8)
    before = np.zeros((60, 40, 40), dtype=bool)
    for level, share in enumerate(MAGNITUDES["occlusion"], 1):
        damaged = corrupt(white, "occlusion", level)
        covered = (damaged == 128).all(-1)
        assert ((damaged == 255).all(-1) | covered).all()
        assert (covered | ~before).all()
        assert covered.mean((1, 2)) == pytest.approx(share, abs=0.03)
        before = covered
    for side in (covered.any(2).argmax(1), covered.any(1).argmax(1)):
        assert set(side) == {0, 1, 2, 3, 4, 5}, "35 of 40 pixels leave six positions"


def test_contrast_keeps_the_mean_brightness_and_blank_ends_in_gray() -> None:
    images = np.random.default_rng(0).integers(60, 200, (3, 16, 16, 3), dtype=np.uint8)
    luma = np.array([0.299, 0.587, 0.114])
    bright = images @ luma
    for level, factor in enumerate(MAGNITUDES["contrast"], 1):
        faded = corrupt(images, "contrast", level) @ luma
        assert faded.mean((1, 2)) == pytest.approx(bright.mean((1, 2)), abs=0.3)
        assert faded.std((1, 2)) == pytest.approx(factor * bright.std((1, 2)), rel=0.05)
    assert (corrupt(images, "blank", 5) == 128).all()
    assert np.abs(corrupt(images, "blank", 2) - (0.6 * images + 0.4 * 128)).max() <= 0.5 + 1e-9


def test_jpeg_is_pillows() -> None:
    images, buffer = pictures(2, 40), io.BytesIO()
    Image.fromarray(images[1]).save(buffer, "JPEG", quality=10)
    np.testing.assert_array_equal(corrupt(images, "jpeg", 3)[1], np.asarray(Image.open(buffer)))
