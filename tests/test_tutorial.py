"""The tutorial: every block of it runs, in order, in an empty folder, with the numbers in `SMALLER` and coarse figures."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from vi_simsiam.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
# What the page says, and what is run.
SMALLER = {
    "--images 4000 --epochs 4 --held-out 0.2": "--images 160 --epochs 1 --held-out 0.01",
    "--images 400 --corruption-images 50": "--images 32 --corruption-images 4",
    "len(source), 20)": "len(source), 125)",
}


def blocks() -> list[tuple[str, str]]:
    """Language and text of every fenced block, made smaller."""
    text = PAGE
    for said, done in SMALLER.items():
        assert text.count(said) == 1, said
        text = text.replace(said, done)
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


def test_every_block_is_one_that_can_be_run() -> None:
    assert {language for language, _ in blocks()} == {"sh", "python"}
    assert PAGE.count("```") == 2 * len(blocks())
    commands = [
        line for language, text in blocks() if language == "sh" for line in text.splitlines()
    ]
    assert all(line.startswith("vi-simsiam ") for line in commands)


def test_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("vi_simsiam.evaluation.style._DPI", 40)
    names: dict[str, Any] = {}
    for language, text in blocks():
        if language == "python":
            exec(text, names)
            continue
        for line in text.splitlines():
            assert main(shlex.split(line)[1:]) == 0, f"{line}: {capsys.readouterr().err}"

    for name in (
        "curves.png",
        "kappa.png",
        "knn.json",
        "linear.json",
        "uncertainty.json",
        "report.html",
    ):
        assert (tmp_path / "runs" / "first" / name).is_file(), name
    assert (tmp_path / "ranking.csv").is_file()
    assert (tmp_path / "ranking.png").is_file()
    images, encoding = names["images"], names["encoding"]
    assert encoding.embedding.shape == (len(images), 512)
    assert names["table"].num_rows == len(images)
    assert names["joined"].concentration.shape == (len(images),)
    torch.testing.assert_close(
        names["features"][0].detach(), encoding.embedding[0], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        names["distribution"].concentration[0].detach(),
        encoding.concentration[0],
        rtol=1e-4,
        atol=1e-5,
    )
    card = (tmp_path / "exported" / "timm" / "README.md").read_text()
    assert not re.search(r"\| trained \| not measured", card)
