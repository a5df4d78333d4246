"""The configuration: values, JSON, settings from a file, and those that suit a data set."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vi_simsiam.config import (
    POLICIES,
    PRESETS,
    SOFTPLUS,
    AugmentConfig,
    DecodeConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
    preset,
)
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.decoding import median_side
from vi_simsiam.data.defaults import suited, suited_size
from vi_simsiam.data.sources import ArraySource, FileSource
from vi_simsiam.errors import InputError
from vi_simsiam.settings import read_settings, updated

VARIANT = TrainConfig(
    init=Path("runs/a"),
    images=100,
    held_out=0.2,
    loss=LossConfig(concentration="global", concentration_max=1e5),
    augment=AugmentConfig(local_views=2),
    model=ModelConfig(local_predictor=True),
)


@pytest.mark.parametrize("config", [*PRESETS.values(), VARIANT])
def test_configurations_survive_json_and_a_file(config: TrainConfig, tmp_path: Path) -> None:
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    assert updated(TrainConfig(), read_settings(file)) == config


def test_an_older_versions_configuration_keeps_its_loss(tmp_path: Path) -> None:
    """A part of a loss is no saved one, and gets the defaults."""
    older = json.loads(json.dumps(TrainConfig(epochs=7).to_dict()))
    for name in ("concentration_link", "cosine_weight"):  # they could not be chosen
        del older["loss"][name]
    assert TrainConfig.from_dict(older) == TrainConfig(epochs=7, loss=SOFTPLUS)
    without = older | {"method": "simsiam"}
    assert TrainConfig.from_dict(without) == TrainConfig(method="simsiam", epochs=7)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(older))
    assert updated(preset("demo"), read_settings(file)).loss == SOFTPLUS
    for own in (
        {"concentration_min": 1.0},
        {"concentration_scale": 511.0, "concentration_min": 1.0, "loss_scale": 0.002},
    ):
        part = {"augment": {"size": 96}, "model": {"dim": 512}, "loss": own}
        file.write_text(json.dumps(part))
        assert updated(preset("demo"), read_settings(file)).loss == LossConfig(**own)
        assert TrainConfig.from_dict(part).loss == LossConfig(**own)


BAD: dict[type, dict[str, tuple[object, ...]]] = {
    TrainConfig: {
        "epochs": (0, -3, 2.5), "workers": (1.5, -1), "lr": ("fast", True, 0.0, math.nan, math.inf),
        "data": (3,), "compile": ("yes",), "batch_size": (1,), "momentum": (1.0,),
        "weight_decay": (math.nan,), "warmup_epochs": (100.0,), "clip_norm": (0.0,),
        "seed": (-1, 2**63), "split_seed": (-1,), "log_every": (0,), "save_every": (-1.0, math.inf),
        "method": ("byol",), "precision": ("fp16",), "kernels": ("fast",), "images": (1,),
        "held_out": (1.0, -0.1), "ema": (0.0, 1.0, math.nan),
    },
    AugmentConfig: {
        "size": (4,), "local_size": (4,), "local_views": (15,), "crop_scale": ((0.2,), (0.5, 0.2)),
        "crop_ratio": (1.0, (1.0, math.inf)), "local_scale": ((0.0, 1.0),), "flip_prob": (1.1,),
        "jitter": ((0.1, 0.1, 0.1, 0.6),), "blur_sigma": ((0.0, 1.0),),
    },
    ModelConfig: {
        "dim": (16.5, 1), "stem": ("tiny",), "projector_hidden": (0, 2**34),
        "predictor_hidden": (0, 2**17),
    },
    LossConfig: {
        "concentration_scale": (0.0,), "loss_scale": (math.nan,), "concentration_min": (-1.0,),
        "concentration_link": ("exp",), "concentration_gain": (0.0, math.inf),
        "cosine_weight": (-0.5, math.nan), "concentration": ("median",),
        "concentration_value": (1.0,), "concentration_max": (0.0, math.inf),
    },
    DecodeConfig: {
        "frames": ("last",), "background": ("no colour", "#00000080"),
        "value_range": ((1.0, 0.0), (0.0, math.inf), (1.0,), "none"),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_values_are_named(kind: type) -> None:
    for name, values in BAD[kind].items():
        for value in values:
            with pytest.raises(InputError, match=rf"^{name}: .*{re.escape(str(value))}"):
                kind(**{name: value})
    with pytest.raises(InputError, match="preset: 'fast' is none of default"):
        preset("fast")


def test_a_run_finds_its_data_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for given, located in (
        ("pack:some/mine.pack", f"pack:{tmp_path / 'some' / 'mine.pack'}"),
        ("folder:some", f"folder:{tmp_path / 'some'}"),
        ("pack:", "pack:"),  # the error has it as given
        ("cifar10", "cifar10"),
        ("photos", f"folder:{tmp_path / 'photos'}"),
    ):
        assert TrainConfig(data=given).located().data == located
    assert VARIANT.located().init == tmp_path / "runs" / "a"


CONSTANT = {"concentration": "constant", "concentration_value": 2.0}
ZERO = CONSTANT | {"concentration_value": 0.0}
CROSSED = {"concentration_max": 3.0, "concentration_min": 4.0}
BOUNDED = LossConfig(concentration_max=9.0)
SIMSIAM = {"method": "simsiam"}
LOCAL = {"model": ModelConfig(local_predictor=True)}
EQUAL = {"augment": AugmentConfig(local_views=2, local_size=224)}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (LossConfig, {"concentration": "constant"}, "concentration_value: None is not accepted"),
        (LossConfig, ZERO, "concentration_value: 0.0 is"),
        (LossConfig, CROSSED, "concentration_max: .* 4"),
        (LossConfig, CONSTANT | {"concentration_max": 9.0}, "concentration_max: 9.0 is .* None"),
        (TrainConfig, SIMSIAM | {"loss": LossConfig(**CONSTANT)}, "concentration: constant is"),
        (TrainConfig, SIMSIAM | {"loss": BOUNDED}, "concentration_max: 9"),
        (TrainConfig, LOCAL, "local_predictor: True is"),
        (TrainConfig, LOCAL | EQUAL, "local_predictor: True is"),
        (ModelConfig, {"stem": "small", "pretrained": True}, "pretrained: .* stem 'imagenet'"),
    ],
)
def test_parts_that_do_not_go_together_are_named(
    kind: type, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        kind(**values)


def settings(tmp_path: Path, text: str) -> dict[str, object]:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return read_settings(path)


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
        ("augment: {crop_scale: 3}", "crop_scale: 3 is not accepted; it must be 2 numbers"),
        ("epoch: 3", "config: no setting is called 'epoch'; did you mean 'epochs'?"),
        ("augment: {sise: 3}", "config: no setting is called 'sise'; did you mean 'size'?"),
        ("augment: 3", "config: augment: 3 is not accepted; it must hold settings by name"),
        ("augment:", "config: augment: None is not accepted"),
        ("data_root: 3", "data_root: 3 is not accepted; it must be a path"),
        ("init: [a]", "init: ['a'] is not accepted; it must be a path"),
        ("epochs: many", "epochs: 'many' is not accepted; it must be an integer"),
        ("lr: fast", "lr: 'fast' is not accepted; it must be a number"),
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


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("nothing", "No such file or directory"), ("bytes", "it is not text")):
        with pytest.raises(InputError, match=rf"{name} cannot be read \({reason}\)"):
            read_settings(tmp_path / name)


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
        (60_000, 28, 28, "medium", 512, 0.0, 3, 0.375),  # MNIST
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
