"""The tutorial: all its blocks run in order, with smaller numbers and coarse figures."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from vi_simsiam.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
# Text of the page, and its replacement.
SMALLER = {
    "--images 4000 --epochs 4 --held-out 0.2": "--images 64 --epochs 1 --held-out 0.008",
    "--images 400 --corruption-images 50": "--images 24 --corruption-images 2",
    "len(source), 20)": "len(source), 125)",
}


def blocks() -> list[tuple[str, str]]:
    """Return language and text of every fenced block, made smaller."""
    text = PAGE
    for original, smaller in SMALLER.items():
        assert text.count(original) == 1, original
        text = text.replace(original, smaller)
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


@pytest.mark.usefixtures("short_probes")
def test_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    names: dict[str, Any] = {}
    assert PAGE.count("```") == 2 * len(blocks())
    for language, text in blocks():
        if language == "python":
            exec(text, names)
            continue
        assert language == "sh"
        for line in text.splitlines():
            assert main(shlex.split(line)[1:]) == 0, f"{line}: {capsys.readouterr().err}"
    table = next(line for line in capsys.readouterr().out.splitlines() if "linear top-5" in line)
    assert "kNN top-1" in table

    results = ("curves.png", "kappa.png", "knn.json", "linear.json", "uncertainty.json")
    for name in (*(f"runs/first/{result}" for result in results), "ranking.csv", "ranking.png"):
        assert (tmp_path / name).is_file(), name
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    images, encoding = names["images"], names["encoding"]
    assert encoding.embedding.shape == (len(images), 512)
    assert names["table"].num_rows == len(images)
    assert names["joined"].concentration.shape == (len(images),)
    for found, expected in (
        (names["features"][0], encoding.embedding[0]),
        (names["distribution"].concentration[0], encoding.concentration[0]),
    ):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)
    card = (tmp_path / "exported" / "timm" / "README.md").read_text()
    assert not re.search(r"\| trained \| not measured", card)
