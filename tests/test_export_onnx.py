"""Exports to ONNX: onnxruntime computes what the run computes, for any batch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from evaluation_cases import SIZE as TINY
from evaluation_cases import make_run
from inference_cases import SIZE, code_blocks, largest, network_run, run_code

from vi_simsiam.engine.run import Run
from vi_simsiam.errors import InputError
from vi_simsiam.export import export_run
from vi_simsiam.models import VISimSiam


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four residual blocks."""
    found = network_run(tmp_path_factory.mktemp("run"), stem="small")
    for name in ("layer1", "layer2", "layer3", "layer4"):
        layer = getattr(found.model.backbone, name)
        setattr(found.model.backbone, name, layer[:1])
    return found


@pytest.fixture(scope="module")
def folder(run: Run) -> Path:
    return export_run(run, "onnx")


def session_of(folder: Path) -> onnxruntime.InferenceSession:
    path = str(folder / "model.onnx")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def hide(package: str, patch: pytest.MonkeyPatch) -> None:
    """Make a package look as if it were not installed."""
    find = importlib.util.find_spec
    patch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))


@torch.no_grad()
def test_any_batch_gives_embedding_and_distribution(run: Run, folder: Path) -> None:
    assert isinstance(run.model, VISimSiam)
    onnx.checker.check_model(onnx.load(folder / "model.onnx"))
    session = session_of(folder)
    assert [(end.name, end.shape[1:]) for end in session.get_inputs()] == [
        ("images", [3, SIZE, SIZE])
    ]
    names = ["embedding", "loc", "concentration"]
    assert [end.name for end in session.get_outputs()] == names
    for batch in (1, 5):
        images = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))
        embedding, loc, kappa = session.run(names, {"images": images.numpy()})
        expected = run.model.distribution(images)
        assert largest(embedding, run.model.backbone(images)) < 1e-5
        assert largest(loc, expected.loc) < 1e-5
        assert kappa.shape == (batch,)
        assert largest(kappa, expected.concentration) < 1e-5
    settings = json.loads((folder / "config.json").read_text())
    assert set(settings["check"]["differences"]) == set(names)


def test_the_code_of_the_card_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names = run_code(code_blocks(Path("README.md").read_text())[:1])
    assert names["features"].shape == (2, 512)
    assert names["loc"].shape == (2, 8)
    assert names["kappa"].shape == (2,)


@torch.no_grad()
def test_simsiam_gives_the_embedding_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without onnxruntime, too: then nothing is compared, and the card states that."""
    hide("onnxruntime", monkeypatch)
    run = make_run(tmp_path, method="simsiam")
    lines: list[str] = []
    folder = export_run(run, "onnx", report=lines.append)
    reason = "onnxruntime is not installed (pip install 'vi-simsiam[onnx]')"
    assert lines == [f"model.onnx was not checked: {reason}"]
    assert "was not checked against the run" in (folder / "README.md").read_text()
    session = session_of(folder)
    assert [output.name for output in session.get_outputs()] == ["embedding"]
    images = torch.randn(3, 3, TINY, TINY)
    (embedding,) = session.run(None, {"images": images.numpy()})
    assert largest(embedding, run.model.backbone(images)) < 1e-5


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    hide(package, monkeypatch)
    message = rf"format: onnx needs {package}; .*pip install 'vi-simsiam\[onnx\]'"
    with pytest.raises(InputError, match=message):
        export_run(make_run(tmp_path), "onnx")
    assert not (tmp_path / "export").exists()
