"""What the README shows works as shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from inference_cases import save_images, save_run

from vi_simsiam.benchmarks.report import fill

ROOT = Path(__file__).parents[1]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_images_are_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "runs" / "mine")
    save_images(tmp_path / "photos", 3)
    names: dict[str, object] = {}
    exec(python_blocks()[1], names)
    encoding = names["encoding"]
    assert encoding.embedding.shape == (3, 512)  # type: ignore[attr-defined]
    expected = (encoding.dim - 1) / (encoding.concentration + encoding.dim - 1)  # type: ignore[attr-defined]
    assert torch.equal(encoding.uncertainty, expected)  # type: ignore[attr-defined]


def test_python_example_runs() -> None:
    code, _ = python_blocks()
    names: dict[str, object] = {}
    exec(code, names)
    predictions, kappa, model = names["output"].predictions, names["kappa"], names["model"]  # type: ignore[attr-defined]
    assert [tuple(p.shape) for p in predictions] == [(8, 2064)] * 2
    assert kappa.shape == (8,)  # type: ignore[attr-defined]
    assert (kappa > 0).all()  # type: ignore[operator, attr-defined]
    gradients = [p.grad for p in model.parameters()]  # type: ignore[attr-defined]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


def test_links_and_pictures_exist() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    links = [
        link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not link.startswith("http")
    ]
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_tables_are_those_of_the_result_files() -> None:
    """The figures in the README are the committed ones: nobody typed them."""
    text = (ROOT / "README.md").read_text()
    assert "<!-- bench: table benchmarks/results/cpu/multiview_loss.json -->" in text
    assert fill(text, ROOT) == text
    for path in ROOT.glob("benchmarks/results/*/multiview_loss.json"):
        for case in json.loads(path.read_text())["cases"]:
            wrong = [
                found["failure"]
                for found in case["providers"].values()
                if "inaccurate" in (found["failure"] or "")
            ]
            assert case["providers"]["eager"]["correct"], case["name"]
            assert wrong in ([], [case["providers"]["textbook"]["failure"]]), case["name"]


def test_no_blank_is_left() -> None:
    assert re.findall(r"\b[A-Z]+_(?:LINES|TABLE|MINUTES)\b", (ROOT / "README.md").read_text()) == []
