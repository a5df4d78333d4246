"""A mean direction and a concentration fitted to a frozen encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_backbone
from inference_cases import network_run, save_images, save_run
from torch import nn

import vi_simsiam
from vi_simsiam.cli import main
from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.checkpoint import Checkpoint, checkpoint_path, load_last
from vi_simsiam.engine.run import read_config
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.metrics import auroc
from vi_simsiam.fitting import fit_concentration
from vi_simsiam.models import build_model

ON_CPU = TrainConfig(device="cpu", workers=0)


class Brightness(nn.Module):
    """Features that a view leaves nearly as they are in flat images, and changes in others."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean((2, 3))
        return torch.cat((means, means.square(), images[:, :, ::4, ::4].flatten(1)), 1)


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


def test_the_network_and_its_statistics_stay_as_they_are(tmp_path: Path) -> None:
    encoder, _ = small_backbone()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    fit_concentration(encoder, two_kinds(10), config=ON_CPU, views=2, size=16, epochs=2)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"encoder": "resnet1"}, r"backbone: 'resnet1'"),
        ({"encoder": nn.Identity()}, r"encoder: its output for 2 images is \(2, 3, 8, 8\)"),
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


def test_a_network_of_fixed_size_keeps_the_size_of_its_run(tmp_path: Path) -> None:
    """A run with another one could not be opened: the table of positions has another shape."""
    network_run(tmp_path / "run", "timm:test_vit")
    run = tmp_path / "run"
    config = read_config(run)
    checkpoint = Checkpoint(1, 0.0, 100, build_model(config).state_dict())
    checkpoint.save(checkpoint_path(run, 1))
    with pytest.raises(InputError, match="size: 48 is not accepted; it must be 16, as the run's"):
        fit_concentration(run, two_kinds(8), config=ON_CPU, views=2, size=48, epochs=1)
