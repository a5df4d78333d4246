"""Files of earlier versions are opened with their values; those of later ones are refused."""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_cases import skip_rendering
from rich.console import Console

import vi_simsiam
from vi_simsiam.benchmarks.report import fill
from vi_simsiam.cli import main
from vi_simsiam.config import SOFTPLUS, TrainConfig, flat
from vi_simsiam.data.cache import cached
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.packed import FORMAT_VERSION, open_pack
from vi_simsiam.engine.run import load_model, read_config
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.results import ACCURACIES, accuracies, read_result, unpack_bits
from vi_simsiam.experiments.results import Experiment, collect
from vi_simsiam.settings import read_settings, updated

FIXTURES = Path(__file__).parent / "fixtures"
CONFIGS: dict[str, dict[str, Any]] = json.loads((FIXTURES / "configs.json").read_text())
CPU = torch.device("cpu")


@pytest.fixture(params=["run-1", "run-2"])
def run(request: pytest.FixtureRequest, tmp_path: Path, small_network: None) -> Path:
    """A copy of the run of each format."""
    return shutil.copytree(FIXTURES / request.param, tmp_path / "run")


@pytest.fixture
def run_with_results(tmp_path: Path, small_network: None) -> Path:
    """A copy of the run of format 1, which was evaluated."""
    return shutil.copytree(FIXTURES / "run-1", tmp_path / "run")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line with which a command refuses its input."""
    assert main([str(each) for each in arguments]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_checkpoint_gives_its_weights(run: Path) -> None:
    config, model, step, steps = load_model(run, CPU)
    assert (step, steps) == (3, 4)
    assert (config.images, config.model.dim, config.augment.size) == (32, 8, 12)
    expected = [-0.0521, -0.2578, 0.1097, -0.2557, -0.2765, 0.0047, 0.2753, -0.0875, -0.0091]
    bias = model.state_dict()["predictor.3.bias"]
    assert bias.tolist() == pytest.approx(expected + 7 * [0.0], abs=1e-4)
    total = sum(float(value.double().sum()) for value in model.state_dict().values())
    assert total == pytest.approx(87.5225598)


def test_a_concentration_above_a_frozen_run_is_a_detached_one(small_network: None) -> None:
    images = (np.arange(2 * 12 * 12 * 3) % 256).astype(np.uint8).reshape(2, 12, 12, 3)
    encoder = vi_simsiam.load(FIXTURES / "run-3", "cpu")
    found = encoder.encode(images)
    assert encoder.config.loss.concentration == "detached"
    assert found.concentration.tolist() == pytest.approx([8.5268, 7.3241], rel=1e-4)
    assert found.loc[:, 0].tolist() == pytest.approx([0.3007, 0.3003], rel=1e-3)
    settings = read_settings(FIXTURES / "run-3" / "config.json")
    with pytest.raises(InputError, match="no setting is called 'frozen_run'"):
        updated(TrainConfig(), settings)  # it would train another network
    loss = {"concentration": "global"}
    plain = json.loads((FIXTURES / "run-3" / "config.json").read_text())
    shared = TrainConfig.from_dict(plain | {"loss": plain["loss"] | loss})
    assert shared.loss.concentration == "global", "a number for all images has no other layer"


def test_a_run_goes_on_to_its_end(run: Path) -> None:
    trainer = Trainer(read_config(run), run, resume=True, quiet=True)
    assert trainer.step == 3
    trainer.fit()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert Trainer(trainer.config, run, resume=True, quiet=True).step == 4


def test_results_of_a_run_have_their_values(
    run_with_results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_rendering(monkeypatch)
    run = run_with_results
    results = {name: read_result(run, name) or {} for name in (*ACCURACIES, "uncertainty")}
    uncertainty = results.pop("uncertainty")
    found = {title: shares["trained"] for title, shares in accuracies(results).items()}
    assert [found[f"{name} top-1"] for name in ACCURACIES] == [0.3805, 0.482, 0.5065]
    right = unpack_bits(results["knn"]["correct"]["trained"], 2000)
    assert int(right.sum()) == 761
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert 'value="0.3805"' in page
    assert f'value="{uncertainty["calibration"]["error"]}"' in page


def test_a_pack_of_format_2_gives_its_images() -> None:
    splits = open_dataset(f"pack:{FIXTURES / 'pack-2.pack'}", root=Path("none"), download=False)
    assert splits.val is not None
    for images, first in ((splits.train, 0), (splits.val, 6)):
        assert images.classes == ("even", "odd")
        for index in range(len(images)):
            name = images.describe(index)
            number = int(Path(name).stem)
            pixels = np.asarray(images.image(index))
            assert pixels.shape == (4 + number, 9 - number, 3)
            assert (pixels == 30 * number).all()
            assert images.labels is not None
            assert images.labels[index] == number % 2
            assert number >= first
    assert (len(splits.train), len(splits.val)) == (6, 2)


def test_a_pack_of_format_1_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "views", "--data", FIXTURES / "pack-1.pack")
    assert line.endswith("pack-1.pack has format version 1, this release reads 2: "
                         "pack the images again")  # fmt: skip


def test_a_cached_file_of_format_1_is_decoded_again(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_dataset(f"folder:{image_folder}", root=tmp_path, download=False).train
    expected, _ = cached(source, cache_dir=tmp_path / "cache", workers=0)
    (file,) = (tmp_path / "cache").iterdir()
    file.unlink()
    shutil.copy(FIXTURES / "pack-1.pack", file)
    console = Console(width=500)
    found, _ = cached(source, cache_dir=tmp_path / "cache", workers=0, console=console)
    assert "has format version 1" in capsys.readouterr().out
    assert (found.pixels == expected.pixels).all()
    assert (open_pack(file).pixels == expected.pixels).all()


@pytest.mark.parametrize("version", CONFIGS)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_saved_configurations_keep_their_values(version: str, preset: str, tmp_path: Path) -> None:
    plain = CONFIGS[version][preset]
    (tmp_path / "config.json").write_text(json.dumps(plain))
    if plain["loss"].get("concentration_link") == "squareplus":  # it was dropped again
        with pytest.raises(InputError, match="concentration_link: 'squareplus' is none of"):
            read_config(tmp_path)
        return
    config = read_config(tmp_path)
    found, saved = flat(config.to_dict()), flat(plain)
    assert saved.pop("frozen_run", None) is None  # no option any more
    assert json.loads(json.dumps({name: found[name] for name in saved})) == saved
    if "cosine_weight" not in plain["loss"]:  # the likelihood alone was the only loss
        assert config.loss.cosine_weight == 0
        assert config.loss.concentration_link == SOFTPLUS.concentration_link
    new = found.keys() - saved.keys() - {"loss.cosine_weight", "loss.concentration_link"}
    defaults = flat(TrainConfig().to_dict())
    assert {name: found[name] for name in new} == {name: defaults[name] for name in new}


def test_an_experiment_gives_its_numbers() -> None:
    experiment = Experiment.read(FIXTURES / "experiment")
    assert list(experiment.arms) == ["simsiam", "vi-simsiam"]
    assert [len(runs) for runs in experiment.arms.values()] == [1, 1]
    assert len(experiment.missing) == 4
    summary = collect(experiment)
    assert summary["primary"]["difference"]["value"] == pytest.approx(0.001)
    arm = summary["data"]["fashion-mini"]["arms"]["vi-simsiam"]
    assert arm["accuracy"]["linear"]["mean"] == 0.6305


def test_a_summary_and_a_benchmark_are_shown() -> None:
    page = "<!-- bench: {} -->\n<!-- /bench -->"
    summary = fill(page.format("experiment experiment/summary.md result"), FIXTURES)
    assert "VI-SimSiam 82.5 % against SimSiam 80.5 %" in summary
    table = fill(page.format("accuracy accuracy.json"), FIXTURES)
    assert "| `cpu` | 2.9e-04, 1.2e-08 | 2.6e-04, 1.2e-09 | 2.6e-04, 1.7e-10 |" in table


def test_a_checkpoint_of_a_later_format_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = run.glob("checkpoint*")
    if file.suffix == ".pt":
        torch.save({**torch.load(file, weights_only=True), "format": 9}, file)
    else:
        content = bytearray(file.read_bytes().replace(rb"\"format\": 2", rb"\"format\": 9"))
        checksum = rb'"crc32":"'
        start = content.index(checksum) + len(checksum)
        content[start : start + 8] = 8 * b"0"
        content[start : start + 8] = b"%08x" % zlib.crc32(content)
        file.write_bytes(content)
    before = file.read_bytes()
    for command in (("knn", run), ("train", "--out", run, "--resume")):
        line = refused(capsys, *command)
        assert re.search(r"(a later|an unknown) version of vi-simsiam", line)
    assert file.read_bytes() == before


def test_a_pack_of_a_later_format_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((FIXTURES / "pack-2.pack").read_bytes())
    content[8:12] = struct.pack("<I", FORMAT_VERSION + 1)
    content[60:64] = struct.pack("<I", zlib.crc32(content[:60]))
    (tmp_path / "later.pack").write_bytes(content)
    line = refused(capsys, "views", "--data", tmp_path / "later.pack")
    assert f"has format version {FORMAT_VERSION + 1}, this release reads {FORMAT_VERSION}" in line


def test_a_configuration_of_a_later_version_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = json.loads((run / "config.json").read_text())
    for changed in (plain | {"invention": 1}, plain | {"loss": plain["loss"] | {"invention": 1}}):
        (run / "config.json").write_text(json.dumps(changed))
        assert "invention" in refused(capsys, "knn", run)
