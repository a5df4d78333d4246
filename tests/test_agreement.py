"""Neighbours that runs of several seeds have in common, against brute force."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_cases import CPU, skip_rendering
from inference_cases import ON_CPU, save_images, save_run, save_seeds
from numpy.typing import NDArray
from pyarrow import parquet
from test_embed import cosines
from test_every_option import called
from torch import nn

import vi_simsiam
from vi_simsiam.cli import main, use
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.data.subsets import at_most
from vi_simsiam.engine import processes
from vi_simsiam.engine.forward import nearest
from vi_simsiam.engine.run import load_run
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.scores import Network, Seeds, views_of
from vi_simsiam.experiments import agreement
from vi_simsiam.inference import embed, label_free
from vi_simsiam.inference.embed import Table, with_agreement
from vi_simsiam.inference.encoder import Encoder
from vi_simsiam.inference.label_free import common_neighbours, neighbour_agreement
from vi_simsiam.models import SimSiam


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seeds(tmp_path_factory.mktemp("seeds") / "runs")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    save_images(folder, 24)
    return folder


def shares(spaces: list[NDArray[np.float64]], count: int) -> NDArray[np.float64]:
    """Mean shares over pairs, from the cosines (N, K) in each space."""
    near = [[set(row[:count]) for row in np.argsort(-each, axis=1).tolist()] for each in spaces]
    pairs = list(itertools.combinations(near, 2))
    rows = [[len(a & b) / count for a, b in zip(*pair, strict=True)] for pair in pairs]
    return np.mean(rows, axis=0)


def run_command(command: str, *options: object) -> int:
    return main([command, *map(str, options), *ON_CPU])


def test_shares_of_neighbours_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[2, 7, 0], [5, 3, 4]])
    third = torch.tensor([[8, 9, 7], [1, 2, 0]])
    torch.testing.assert_close(common_neighbours(first, second), torch.tensor([2 / 3, 1]).double())
    monkeypatch.setattr(label_free, "NEIGHBOURS", 3)
    monkeypatch.setattr(label_free, "nearest", functools.partial(nearest, block=1))
    keys = torch.eye(10)
    spaces = [keys[near].sum(1) for near in (first, second, third)]
    found = neighbour_agreement(spaces, [keys] * 3, torch.device("cpu"))
    # Of the pairs 1-2, 1-3 and 2-3.
    np.testing.assert_allclose(found, [(2 + 0 + 1) / 9, 1 / 3])


@pytest.mark.parametrize("own", [True, False])
def test_a_folder_of_seeds_adds_a_column(
    own: bool, seeds: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the file is that of its first run; the run that failed is left out."""
    for module in (embed, label_free):
        monkeypatch.setattr(module, "NEIGHBOURS", 4)
    save_images(others := tmp_path / "others", 15, seed=9)
    options = [] if own else ["--reference", others]
    out = tmp_path / "seeds.parquet"
    assert run_command("embed", seeds, images, *options, "--out", out) == 0
    spaces = []
    for seed in (5, 6, 7):
        encoder = vi_simsiam.load(seeds / f"seed-{seed}", "cpu")
        rows = encoder.encode(images).embedding.numpy()
        spaces.append(cosines(rows, rows if own else encoder.encode(others).embedding.numpy()))
        if own:
            np.fill_diagonal(spaces[-1], -np.inf)
    for each in spaces:  # rounding exchanges no neighbours
        assert np.diff(np.sort(-each)[:, 3:5]).min() > 1e-5
    table = parquet.read_table(out)
    found = table["neighbour_agreement"].to_numpy()
    assert found.min() < found.max()
    np.testing.assert_allclose(found, shares(spaces, 4), atol=1e-6)
    assert json.loads(table.schema.metadata[b"vi_simsiam"])["seeds"] == [5, 6, 7]

    single = tmp_path / "single.parquet"
    assert run_command("embed", seeds / "seed-5", images, *options, "--out", single) == 0
    assert parquet.read_table(single).equals(table.drop(["neighbour_agreement"]))


def test_images_are_ranked_by_the_agreement(seeds: Path, images: Path, tmp_path: Path) -> None:
    """SimSiam has the score, too; a single image has no neighbours."""
    simsiam, out = save_seeds(tmp_path / "simsiam", "simsiam", count=2), tmp_path / "features"
    for folder in (seeds, simsiam):
        options = ("--by", "neighbour_agreement", "--out", out, "--overwrite")
        assert run_command("rank", folder, images, *options) == 0
        rows = list(csv.DictReader(out.with_suffix(".csv").open()))
        values = [float(row["neighbour_agreement"]) for row in rows]
        assert values == sorted(values)
        table = out.with_suffix(".parquet")
        assert run_command("embed", folder, images, "--out", table, "--overwrite") == 0
        columns = parquet.read_table(table).to_pydict()
        saved = dict(zip(columns["path"], columns["neighbour_agreement"], strict=True))
        assert values == pytest.approx([saved[row["path"]] for row in rows])
    one = images / "000.png"
    assert run_command("embed", seeds, one, "--out", table, "--overwrite") == 0
    assert "neighbour_agreement" not in parquet.read_table(table).column_names


def test_folders_that_cannot_be_used(
    seeds: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Path, by: str = "neighbour_agreement", what: Path = images) -> str:
        assert run_command("rank", folder, what, "--by", by, "--out", tmp_path / "out") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "out.csv").exists()
        return line

    assert "needs at least 2 images; 1 can be read" in refused(seeds, what=images / "000.png")
    assert "is one run, and not a folder" in refused(save_seeds(tmp_path / "one", count=1))
    failed = tmp_path / "failed"
    save_run(failed / "seed-0")
    (failed / "seeds.json").write_text('{"arguments": [], "runs": [{"seed": 0, "exit": 1}]}')
    assert f"no run in {failed} has finished" in refused(failed)
    (failed / "seeds.json").write_text('{"arguments": [], "runs": [{"seed": "../x", "exit": 0}]}')
    assert "seeds.json is damaged" in refused(failed)


def test_images_that_change_between_two_runs_are_refused() -> None:
    source = ArraySource(np.zeros((4, 8, 8), np.uint8), name="photos")
    rows = np.eye(4, dtype=np.float32)
    first, other = (Table(source, np.array(x), rows[: len(x)], None, None) for x in ([0, 1], [0]))
    for tables, references in (([first, other], None), ([first, first], [other, first])):
        with pytest.raises(InputError, match="images: photos changed while the runs read it"):
            with_agreement(tables, references, CPU)


def other_seed(seed: int) -> SimSiam:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return SimSiam(backbone, features=24, dim=8, projector_hidden=6, predictor_hidden=6).eval()


def test_the_score_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """In several batches, of training images and of others; without other seeds there is none."""
    monkeypatch.setattr(label_free, "NEIGHBOURS", 3)
    draw = np.random.default_rng(0)
    known, pixels = (draw.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8) for n in (13, 9))
    first, *others = models = [other_seed(seed) for seed in range(3)]
    network, seeds = Network(first, CPU), Seeds([Network(each, CPU) for each in others])
    training, _ = network.observe(seeds.watch(np.array_split(known, 2)))
    seeds.refer(training)
    embedding, _ = network.observe(seeds.watch(np.array_split(pixels, 4)))
    found = seeds.scores(embedding)["neighbour_agreement"]
    with torch.no_grad():
        spaces = [
            cosines(*(model.backbone(views_of(each)).numpy() for each in (pixels, known)))
            for model in models
        ]
    assert min(np.diff(np.sort(-each)[:, 2:4]).min() for each in spaces) > 1e-5
    np.testing.assert_allclose(found, 1 - shares(spaces, 3), atol=1e-12)
    assert found.min() < found.max()
    assert Seeds([]).scores(embedding) == {}


@pytest.mark.usefixtures("small_network")
def test_uncertainty_of_a_folder_of_seeds(
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The result is the first run's, with a score more in every part."""
    skip_rendering(monkeypatch)
    folder = save_seeds(tmp_path / "runs", count=2)
    command = ["uncertainty", folder, "--data", f"folder:{image_folder}", "--images", 8]
    assert run_command(*command, "--corruption-images", 2) == 0
    place = folder / "seed-5" / "uncertainty.json"
    assert f"written to {place}" in " ".join(capsys.readouterr().out.split())
    result = json.loads(place.read_text())
    assert "runs of several seeds" in result["scores"]["neighbour_agreement"]
    for part in (*result["ood"].values(), *result["corruptions"].values()):
        assert "neighbour_agreement" in part["scores"]
    assert run_command("report", folder / "seed-5", "--data", f"folder:{image_folder}") == 0
    assert "neighbour agreement" in (folder / "seed-5" / "report.html").read_text()
    assert not (folder / "seed-6" / "uncertainty.json").exists()

    config = json.loads((folder / "seed-6" / "config.json").read_text())
    config |= {"data": "folder:/moved", "augment": {**config["augment"], "size": 20}}
    (folder / "seed-6" / "config.json").write_text(json.dumps(config))
    applied = (folder, image_folder, "--out", tmp_path / "out.parquet")
    for words in (command, ["embed", *applied], ["rank", *applied]):
        capsys.readouterr()
        assert run_command(*words) == 2
        assert "seed-6 differs from" in (error := capsys.readouterr().err)
        assert error.endswith("in more than its seed: augment.size: 16 -> 20\n")


def test_only_the_agreement_opens_the_other_seeds(
    seeds: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, opened = use._load, []

    def noted(options: Any, run: Path) -> Encoder:
        opened.append(run.name)
        return load(options, run)

    monkeypatch.setattr(use, "_load", noted)
    for by, wanted in (
        ("kappa", ["seed-5"]),
        ("neighbour_agreement", ["seed-5", "seed-6", "seed-7"]),
    ):
        opened.clear()
        assert run_command("rank", seeds, images, "--by", by, "--out", tmp_path / by) == 0
        assert opened == wanted


@pytest.mark.usefixtures("small_runs")
def test_trainings_of_several_seeds_end_with_the_share(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By brute force; without validation images on training images, and only with --evaluate."""
    monkeypatch.setattr(agreement, "NEIGHBOURS", 3)
    monkeypatch.setattr(agreement, "IMAGES", 10)
    in_process = SimpleNamespace(**vars(subprocess) | {"Popen": called})
    monkeypatch.setattr(processes, "subprocess", in_process)
    options = "--size 16 --epochs 1 --batch-size 8 --dim 16 --seeds 3 --device cpu --workers 0"
    command = ["train", "--data", str(images), "--out", str(out := tmp_path / "runs")]
    command += ["--overwrite", *options.split()]
    assert main(command) == 0
    assert "neighbours in common" not in capsys.readouterr().out
    assert "agreement" not in json.loads((out / "seeds.json").read_text())

    assert main([*command, "--evaluate"]) == 0
    found = json.loads((out / "seeds.json").read_text())["agreement"]
    spaces = []
    for seed in range(3):
        run = load_run(out / f"seed-{seed}")
        source = at_most(run.splits.train, 10)
        rows = vi_simsiam.load(run.path, "cpu").encode(source).embedding.numpy()
        spaces.append(cosines(rows, rows))
        np.fill_diagonal(spaces[-1], -np.inf)
        gap = np.diff(np.sort(-spaces[-1])[:, 2:4]).min()
        assert gap > 1e-5, gap  # rounding exchanges no neighbours
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = {f"seed-{a} seed-{b}": shares([spaces[a], spaces[b]], 3).mean() for a, b in pairs}
    assert found["pairs"] == pytest.approx(expected)
    assert [found[name] for name in ("neighbours", "images", "split")] == [3, 10, "training"]
    share, ends = np.mean([*expected.values()]), (min(expected.values()), max(expected.values()))
    text = " ".join(capsys.readouterr().out.split())
    assert f"neighbours in common: {100 * share:.1f} % ({100 * ends[0]:.1f} to" in text
    assert "of the 3 nearest, over 3 pairs of seeds and 10 training images" in text
    (out / "seed-1" / "config.json").write_text("{")
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert "neighbours not compared: run: " in capsys.readouterr().out
