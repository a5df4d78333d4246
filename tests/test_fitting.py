"""A mean direction and a concentration fitted to a frozen encoder."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_backbone
from inference_cases import network_run, save_images, save_run
from torch import nn

import vi_simsiam
from vi_simsiam import fitting as fitting_module
from vi_simsiam.cli import main
from vi_simsiam.config import DecodeConfig, TrainConfig
from vi_simsiam.engine.checkpoint import Checkpoint, checkpoint_path, load_last
from vi_simsiam.engine.run import read_config
from vi_simsiam.errors import InputError, TrainingError
from vi_simsiam.evaluation.metrics import auroc
from vi_simsiam.export import export_run
from vi_simsiam.fitting import fit_concentration
from vi_simsiam.models import build_model

ON_CPU = TrainConfig(device="cpu", workers=0)


class Brightness(nn.Module):
    """Features that a view leaves nearly as they are in flat images, and changes in others."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean((2, 3))
        return torch.cat((means, means.square(), images[:, :, ::4, ::4].flatten(1)), 1)


class One(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((1, 2, 3))[:, None]


def two_kinds(count: int) -> np.ndarray:
    """Images (2 count, 16, 16, 3): first flat ones, whose views are alike, then noise."""
    generator = np.random.default_rng(0)
    flat = np.broadcast_to(generator.integers(0, 256, (count, 1, 1, 3)), (count, 16, 16, 3))
    noise = generator.integers(0, 256, (count, 16, 16, 3))
    return np.concatenate([flat, noise]).astype(np.uint8)


def test_kappa_is_large_where_views_predict_each_other() -> None:
    images = two_kinds(60)
    fitted = fit_concentration(Brightness(), images, config=ON_CPU, views=4, size=16, epochs=60)
    kappa = fitted.encoder.encode(images).concentration
    assert kappa is not None
    noise = np.arange(120) >= 60
    found_by_kappa = auroc(-kappa.double().numpy(), noise)
    assert found_by_kappa is not None
    assert found_by_kappa > 0.8
    found = fitted.calibration
    assert found["error"] < 0.25
    assert found["pairs"] == 12 * 12  # a tenth of the images, all ordered pairs of four views


def test_projections_are_standardised_features() -> None:
    images = two_kinds(20)
    encoder = fit_concentration(Brightness(), images, config=ON_CPU, views=4, size=16).encoder
    norm = encoder.model.projector[-1]
    found = encoder.encode(images)
    expected = (found.embedding - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(found.projection, expected)
    assert encoder.model.dim == found.embedding.shape[1]
    assert not any(x.requires_grad for x in encoder.model.backbone.parameters())


class Scaled(nn.Module):
    """Features of another scale, with a column that is constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean((2, 3)) * self.factor
        return torch.cat((means, torch.full_like(means[:, :1], 7.0)), 1)


def test_the_scale_of_features_changes_nothing() -> None:
    images = two_kinds(20)
    one, small = (
        fit_concentration(Scaled(factor), images, config=ON_CPU, views=4, size=16, epochs=2)
        for factor in (1.0, 1e-3)
    )
    projections = [each.encoder.encode(images).projection for each in (one, small)]
    torch.testing.assert_close(*projections, rtol=1e-3, atol=1e-3)
    assert 0.3 < projections[0][:, :3].std() < 3
    assert projections[0][:, 3].abs().max() < 1e-3
    assert one.calibration["error"] == pytest.approx(small.calibration["error"], abs=0.02)


def test_the_network_and_its_statistics_stay_as_they_are(tmp_path: Path) -> None:
    encoder = small_backbone()[0].train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    fit_concentration(encoder, two_kinds(10), config=ON_CPU, views=2, size=16, epochs=2)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert all(module.training for module in encoder.modules())


def test_the_same_seed_gives_the_same_run(image_folder: Path, small_network: None) -> None:
    def fit(seed: int) -> torch.Tensor:
        config = TrainConfig(device="cpu", workers=0, seed=seed)
        torch.manual_seed(7)
        encoder, _ = small_backbone()
        fitted = fit_concentration(encoder, str(image_folder), config=config, views=2, epochs=2)
        return torch.cat([x.flatten() for x in fitted.encoder.model.predictor.parameters()])

    assert torch.equal(fit(1), fit(1))
    assert not torch.equal(fit(1), fit(2))


def test_a_fitted_run_is_a_run(
    tmp_path: Path,
    image_folder: Path,
    short_probes: None,
    small_network: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("vi_simsiam.evaluation.features.build_backbone", small_backbone)
    out = tmp_path / "fitted"
    options = ["--data", str(image_folder), "--device", "cpu", "--workers", "0", "--epochs", "3"]
    command = ["fit-kappa", "resnet18", *options, "--out", str(out), "--views", "2"]
    assert main(command) == 2
    assert "encoder: resnet18 is a network of random weights" in capsys.readouterr().err
    torch.save(small_backbone()[0].state_dict(), tmp_path / "start.pth")
    command += ["--init", str(tmp_path / "start.pth")]
    assert main(command) == 0
    assert "calibration on views of images held out: expected cosine" in capsys.readouterr().out
    result = json.loads((out / "fitted.json").read_text())
    assert (result["images"], result["views"], result["calibration"]["pairs"]) == (36, 2, 8)
    encoding = vi_simsiam.load(out, "cpu").encode(image_folder / "val")
    assert encoding.concentration is not None
    assert encoding.concentration.std() > 0
    save_images(tmp_path / "others", 6)
    few = ["--device", "cpu", "--workers", "0"]
    for words in (
        ["doctor", str(out)],
        ["evaluate", str(out), *few],
        ["uncertainty", str(out), *few, "--corruption-images", "0"],
        ["report", str(out)],
        ["rank", str(out), str(tmp_path / "others"), *few, "--out", str(tmp_path / "ranking")],
        ["export", str(out), "--format", "safetensors"],
    ):
        assert main(words) == 0, words
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "a run of fit-kappa has no projector to train" in capsys.readouterr().err
    assert main(command) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert not (out / "uncertainty.json").exists()


def test_the_backbone_of_a_run_is_taken(tmp_path: Path) -> None:
    path = save_run(tmp_path / "run", "simsiam")
    save_images(tmp_path / "images", 12)
    fitted = fit_concentration(
        path, tmp_path / "images", out=tmp_path / "out", config=ON_CPU, views=2, epochs=1
    )
    saved, given = load_last(tmp_path / "out").model, load_last(path).model
    weights = [name for name in given if name.startswith("backbone.")]
    assert len(weights) > 100
    for name in weights:
        assert torch.equal(saved[name], given[name]), name
    assert fitted.encoder.config.augment.size == 16
    assert fitted.encoder.model.dim == 512
    with pytest.raises(InputError, match="out: .* is the encoder itself"):
        fit_concentration(path, tmp_path / "images", out=path, config=ON_CPU, overwrite=True)
    config = TrainConfig(device="cpu", init=tmp_path / "weights.pth")
    with pytest.raises(InputError, match="init: .* must be left out: the encoder has weights"):
        fit_concentration(path, tmp_path / "images", config=config)


@pytest.fixture
def fitting(tmp_path: Path, image_folder: Path, small_network: None) -> Callable[..., Path]:
    """Fit to two views of the images, into the same folder every time."""

    def fit(**options: Any) -> Path:
        torch.save(small_backbone()[0].state_dict(), tmp_path / "start.pth")
        config = replace(ON_CPU, init=tmp_path / "start.pth")
        given = {"config": config, "views": 2, "epochs": 1, **options}
        fit_concentration("resnet18", str(image_folder), out=tmp_path / "out", **given)
        return tmp_path / "out"

    return fit


def test_a_run_stays_until_the_new_one_is_there(
    fitting: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = fitting()
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(checkpoint: Checkpoint, path: Path) -> None:
        raise TrainingError("no room")

    monkeypatch.setattr(Checkpoint, "save", full)
    with pytest.raises(TrainingError, match="no room"):
        fitting(overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_run_that_came_meanwhile_stays(
    fitting: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = fitting_module.cached

    def slow(*arguments: Any, **options: Any) -> Any:
        save_run(tmp_path / "out")
        return decode(*arguments, **options)

    monkeypatch.setattr(fitting_module, "cached", slow)
    with pytest.raises(InputError, match="already holds a run"):
        fitting()
    assert load_last(tmp_path / "out").step == 1


def test_a_full_disk_is_one_line(
    fitting: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TrainingError, match="the features take .* for which there is no room"):
        fitting()


def test_channels_are_normalised_by_their_own_constants() -> None:
    images = np.random.default_rng(0).integers(20000, 22000, (12, 16, 16, 2), dtype=np.uint16)
    config = TrainConfig(device="cpu", workers=0, decode=DecodeConfig(channels=2, bits=16))
    encoder = fit_concentration(Scaled(1.0), images, config=config, views=2, size=16).encoder
    (means, stds) = encoder.config.augment.constants
    np.testing.assert_allclose(means, images.mean((0, 1, 2)) / 65535, rtol=1e-3)
    np.testing.assert_allclose(stds, images.std((0, 1, 2)) / 65535, rtol=1e-2)
    assert encoder.encode(images).embedding[:, :2].abs().max() < 0.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"encoder": "resnet1"}, r"backbone: 'resnet1'"),
        ({"encoder": "runs/resnet1"}, "encoder: runs/resnet1 is no folder; give a run folder"),
        ({"encoder": nn.Identity()}, r"encoder: it gives shape \(2, 3, 8, 8\) for 2 images"),
        ({"encoder": nn.Linear(9, 2)}, r"encoder: it cannot take views of 8 pixels \(mat1"),
        ({"encoder": One()}, "encoder: features of width 1 is not accepted"),
        ({"views": 1}, "views: 1 is not accepted; it must be between 2 and 256"),
        ({"epochs": 0}, "epochs: 0 is not accepted"),
        ({"images": two_kinds(1)}, "images: 2 is not accepted; it must be at least 4"),
        ({"out": "somewhere"}, "out: a run needs an encoder by name"),
        ({"encoder": "resnet18", "out": "somewhere"}, "out: a run needs images by name"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    given = {"encoder": Brightness(), "images": two_kinds(4), "size": 8, "config": ON_CPU}
    given |= changed
    if "out" in given:
        given["out"] = tmp_path / str(given["out"])
    with pytest.raises(InputError, match=message):
        fit_concentration(**given)  # type: ignore[arg-type]


def test_a_fit_without_a_run_folder_is_not_exported() -> None:
    state = torch.get_rng_state()
    fitted = fit_concentration(Brightness(), two_kinds(4), views=2, size=8, config=ON_CPU)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InputError, match="run: it was fitted without a run folder"):
        export_run(fitted.encoder.run, "safetensors")


def test_a_network_of_fixed_size_keeps_the_size_of_its_run(tmp_path: Path) -> None:
    """A run with another one could not be opened: the table of positions has another shape."""
    network_run(tmp_path / "run", "timm:test_vit")
    run = tmp_path / "run"
    config = read_config(run)
    checkpoint = Checkpoint(1, 0.0, 100, build_model(config).state_dict())
    checkpoint.save(checkpoint_path(run, 1))
    with pytest.raises(InputError, match="size: 48 is not accepted; it must be 16, as the run's"):
        fit_concentration(run, two_kinds(8), config=ON_CPU, views=2, size=48, epochs=1)
