"""Settings from a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vi_simsiam.cli.config_file import read_settings, updated
from vi_simsiam.config import SOFTPLUS, AugmentConfig, LossConfig, TrainConfig, preset
from vi_simsiam.errors import InputError


def settings(tmp_path: Path, text: str) -> dict[str, object]:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return read_settings(path)


def test_a_runs_configuration_comes_back(tmp_path: Path) -> None:
    config = preset("paper")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert updated(TrainConfig(), read_settings(tmp_path / "config.json")) == config


def test_an_older_runs_configuration_keeps_its_loss(tmp_path: Path) -> None:
    """Its file has no link and no cosine weight; a part of a loss gets the defaults instead."""
    saved = TrainConfig().to_dict()
    for name in ("concentration_link", "cosine_weight"):
        del saved["loss"][name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(saved))
    assert updated(preset("demo"), read_settings(file)).loss == SOFTPLUS
    for own in (
        {"concentration_min": 1.0},
        {"concentration_scale": 511.0, "concentration_min": 1.0, "loss_scale": 0.002},
    ):
        file.write_text(f"augment: {{size: 96}}\nmodel: {{dim: 512}}\nloss: {json.dumps(own)}\n")
        assert updated(preset("demo"), read_settings(file)).loss == LossConfig(**own)


def test_settings_stand_side_by_side_or_in_their_parts(tmp_path: Path) -> None:
    """YAML reads 1e-3 as text; a setting that is not in the file keeps its value."""
    common = "epochs: 20\nlr: 1e-3\nclip_norm: 1\n"
    flat = f"{common}size: 64\nbatch-size: 32\ncrop_scale: [3e-1, 1]\n"
    nested = f"{common}batch_size: 32\naugment:\n  size: 64\n  crop_scale: [0.3, 1.0]\n"
    augment = AugmentConfig(size=64, crop_scale=(0.3, 1.0))
    expected = TrainConfig(epochs=20, lr=1e-3, batch_size=32, clip_norm=1.0, augment=augment)
    for text in (flat, nested):
        assert updated(TrainConfig(), settings(tmp_path, text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "config: no setting is called 'epoch'; did you mean 'epochs'?"),
        ("augment: {sise: 3}", "config: no setting is called 'sise'; did you mean 'size'?"),
        ("augment: 3", "config: augment: 3 is not accepted; it must hold settings by name"),
        ("augment:", "config: augment: None is not accepted"),
        ("data_root: 3", "data_root: 3 is not accepted; it must be a path"),
        ("frozen_run: [a]", "frozen_run: ['a'] is not accepted; it must be a path"),
        ("epochs: many", "epochs: 'many' is not accepted; it must be an integer"),
        ("lr: fast", "lr: 'fast' is not accepted; it must be a number"),
        ("compile: 1", "compile: 1 is not accepted; it must be true or false"),
        ("crop_scale: [0.2]", r"crop_scale: (0.2,) is not accepted; it must be 2 numbers"),
        ("method: byol", "method: 'byol' is none of vi-simsiam, simsiam"),
        ("- 3", "holds no settings"),
        ("", "holds no settings"),
        ("size: 3\na: [", "cannot be read (line "),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        updated(TrainConfig(), settings(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    message = r"config: .*nothing.yaml cannot be read \(No such file or directory\)"
    with pytest.raises(InputError, match=message):
        read_settings(tmp_path / "nothing.yaml")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bytes cannot be read \(it is not text\)"):
        read_settings(tmp_path / "bytes")
