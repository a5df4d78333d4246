"""Tutorials: all of their commands and Python run, in the order of the page, on smaller data."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_cases import save_images

from vi_simsiam.cli import main

DOCS = Path(__file__).parents[1] / "docs"

Texts = dict[str, str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder in which a tutorial runs, without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def walk(page: str, smaller: Texts, capsys: pytest.CaptureFixture[str], *, end: str = "") -> Any:
    """Run the blocks of a page, up to the heading `end`; `smaller` replaces parts of its text.

    Returns the names of its Python, and the printed lines.
    """
    text = (DOCS / f"{page}.md").read_text()
    if end:
        text, found, _ = text.partition(f"\n## {end}\n")
        assert found, end
    for original, replacement in smaller.items():
        assert text.count(original) == 1, original
        text = text.replace(original, replacement)
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    assert text.count("```") == 2 * len(blocks) > 2
    names: dict[str, Any] = {}
    for language, block in blocks:
        if language == "python":
            exec(block, names)
            continue
        assert language == "sh"
        for line in block.splitlines():
            assert main(shlex.split(line)[1:]) == 0, f"{line}: {capsys.readouterr().err}"
    return names, capsys.readouterr().out.splitlines()


@pytest.mark.usefixtures("short_probes")
def test_a_first_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = {
        "--images 4000 --epochs 3 --held-out 0.2": "--images 32 --epochs 1 --held-out 0.004",
        "--images 400 --corruption-images 50": "--images 12 --corruption-images 1",
        "len(source), 20)": "len(source), 250)",
    }
    names, lines = walk("tutorial", smaller, capsys)
    table = next(line for line in lines if "linear top-5" in line)
    assert "kNN top-1" in table
    results = ("curves.png", "kappa.png", "knn.json", "linear.json", "uncertainty.json")
    for name in (*(f"runs/first/{result}" for result in results), "ranking.csv", "ranking.png"):
        assert (folder / name).is_file(), name
    assert (folder / "runs" / "first" / "report.html").is_file()
    images, encoding = names["images"], names["encoding"]
    assert encoding.embedding.shape == (len(images), 512)
    assert names["table"].num_rows == len(images)
    assert names["joined"].concentration.shape == (len(images),)
    for found, expected in (
        (names["features"][0], encoding.embedding[0]),
        (names["distribution"].concentration[0], encoding.concentration[0]),
    ):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)
    card = (folder / "exported" / "timm" / "README.md").read_text()
    assert not re.search(r"\| trained \| not measured", card)


@pytest.mark.usefixtures("short_probes", "small_network")
def test_a_public_encoder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = {
        "--images 2000 --epochs 2": "--images 32 --epochs 1",
        "--images 4000 --epochs 4 --held-out 0.2": "--images 32 --epochs 1 --held-out 0.004",
    }
    _, lines = walk("public-encoder", smaller, capsys, end="With weights of others")
    rows = [line.split()[1] for line in lines if line.startswith("│ ")]
    answer = (DOCS / "public-encoder.md").read_text().split("\n## ")[3]
    assert rows == re.findall(r"^\| `(\w+)` \|", answer, re.MULTILINE)


@pytest.mark.usefixtures("short_probes")
def test_a_finished_encoder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = {
        "--images 4000 --epochs 4": "--images 32 --epochs 1",
        "--data fashion-mini --images 4000": "--data fashion-mini --images 64 --epochs 3",
        "rank runs/unsure fashion-mini --out": "rank runs/unsure pictures --out",
        "rank runs/unsure fashion-mini --by": "rank runs/unsure pictures --by",
        "clean fashion-mini": "clean pictures",
        "--images 400 --corruption-images 50": "--images 12 --corruption-images 1",
    }
    save_images(folder / "pictures", 12)
    names, _ = walk("finished-encoder", smaller, capsys)
    assert names["fitted"].calibration["error"] < 0.2
    assert names["fitted"].encoder.encode(names["pictures"]).uncertainty.shape == (800,)
    for name in ("by-kappa.png", "by-distance.csv", "cleaning/index.html"):
        assert (folder / name).is_file(), name
    assert "calibration" in (folder / "runs" / "unsure" / "uncertainty.json").read_text()


@pytest.mark.usefixtures("short_probes", "small_network")
def test_images_in_other_forms(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = {"--epochs 2 --out runs/table": "--epochs 1 --out runs/table"}
    walk("image-forms", smaller, capsys, end="All forms")
    for name in ("table", "parquet", "tar", "arrays"):
        assert list((folder / "runs" / name).glob("checkpoint-*.safetensors")), name
    assert (folder / "ranking.csv").read_text().count("pictures.parquet") == 200
