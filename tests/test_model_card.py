"""The model card: its code runs, its figures are those of the files, and gaps are named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from evaluation_cases import uncertainty_result
from huggingface_hub import ModelCardData
from inference_cases import SIZE, code_blocks, network_run, run_code
from PIL import Image

from vi_simsiam.config import LossConfig, flat
from vi_simsiam.data.pixels import to_rgb
from vi_simsiam.data.views import eval_view
from vi_simsiam.engine.checkpoint import Checkpoint
from vi_simsiam.engine.run import Run
from vi_simsiam.errors import InputError, RunWarning
from vi_simsiam.export import export_run
from vi_simsiam.export.folder import model_card

CHECK = {"images": 8, "source": "fashion-mini/val", "differences": {"embedding": 1.25e-7}}
VERSIONS = {"vi-simsiam": "1.2.3", "torch": "9.9"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return network_run(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(base: Run, tmp_path: Path) -> Run:
    """A run in a folder that holds no results yet."""
    return dataclasses.replace(base, path=tmp_path)


def card(run: Run) -> str:
    return model_card(run, "safetensors", check=CHECK, versions=VERSIONS)


def front_matter(text: str) -> ModelCardData:
    return ModelCardData(**yaml.safe_load(text.split("---\n")[1]))


def table(text: str, first: str) -> list[list[str]]:
    """Cells of the rows that follow the table head whose first cell is `first`."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize(
    "format", ["torchvision", "torchvision, small", "torchvision, medium", "timm", "safetensors"]
)
def test_the_code_loads_the_weights_and_the_image(
    run: Run, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    format, _, stem = format.partition(", ")
    if stem:
        run = network_run(run.path, stem=stem, method="simsiam")
    monkeypatch.chdir(export_run(run, format))
    pixels = np.random.default_rng(0).integers(0, 256, (25, 33, 4), dtype=np.uint8)
    Image.fromarray(pixels).save("image.jpg", "PNG")  # transparent here and there
    code = code_blocks(Path("README.md").read_text())
    assert any("vi_simsiam" in block for block in code) == (format == "safetensors")
    names = run_code(code)
    if format == "safetensors":
        encoding = names["encoding"].embedding
        torch.testing.assert_close(encoding, names["encoder"].encode(names["images"]).embedding)
    with torch.no_grad():
        expected = run.model.backbone(torch.zeros(2, 3, SIZE, SIZE))
    torch.testing.assert_close(names["features"].clone(), expected, rtol=1e-5, atol=1e-5)
    view = eval_view(SIZE)(to_rgb(Image.open("image.jpg"))).unsqueeze(0)
    torch.testing.assert_close(names["images"], view, rtol=0, atol=1e-6)


def test_without_results_everything_is_not_measured(run: Run) -> None:
    text = card(run)
    assert [row[0] for row in table(text, "encoder")] == ["trained", "untrained", "pixels"]
    assert {cell for row in table(text, "encoder") for cell in row[1:]} == {"not measured"}
    assert {row[1] for row in table(text, "measures of kappa")} == {"not measured"}
    assert "the run has no log of its progress" in text
    data = front_matter(text)
    assert data.eval_results is data.license is None
    assert (data.library_name, data.pipeline_tag) == ("vi-simsiam", "image-feature-extraction")
    assert data.datasets == ["zalando-datasets/fashion_mnist"]
    tags = ["self-supervised-learning", "vi-simsiam", "uncertainty", "safetensors"]
    assert data.tags == tags
    assert "this card names none" in text


def test_results_are_those_of_the_files(run: Run) -> None:
    top1 = {"trained": 0.81234, "untrained": 0.5, "pixels": 0.25}
    linear = {"top1": top1, "top5": None, "held_out_top1": {"trained": 0.7}}
    (run.path / "knn.json").write_text(json.dumps({"top1": top1}))
    (run.path / "linear.json").write_text(json.dumps(linear))
    text = card(run)
    trained, untrained, _ = table(text, "encoder")
    assert trained == ["trained", "81.2 %", "81.2 %", "not measured", "70.0 %", "not measured"]
    assert untrained == ["untrained", "50.0 %", "50.0 %", *["not measured"] * 3]
    results = front_matter(text).eval_results
    assert results is not None
    found = {result.metric_name: result.metric_value for result in results}
    assert found == {"kNN": 0.81234, "linear": 0.81234, "linear, held out": 0.7}


def test_results_of_earlier_weights_are_not_measured(run: Run) -> None:
    (run.path / "knn.json").write_text(json.dumps({"top1": {"trained": 0.8}, "step": 0}))
    (run.path / "linear.json").write_text(json.dumps({"top1": {"trained": 0.9}, "step": 1}))
    Checkpoint(1, 0.0, 8, {}).save(run.path / "checkpoint-00000001.safetensors")
    with pytest.warns(RunWarning, match="knn.json is left out: it is of step 0, .* at step 1;"):
        text = card(run)
    assert table(text, "encoder")[0][1:3] == ["not measured", "90.0 %"]
    results = front_matter(text).eval_results
    assert [result.metric_name for result in results or ()] == ["linear"]


def test_kappa_stands_beside_the_best_trivial_score_and_the_best_of_the_others(run: Run) -> None:
    result = uncertainty_result()
    result["calibration"]["error"] = 0.0123

    def scores(key: str, **given: float | None) -> dict[str, Any]:
        others = {"auroc": None, "aurc": 0.5, "spearman": None, "monotone": 0.5}
        return {"scores": {name: others | {key: value} for name, value in given.items()}}

    far, damaged = {"kind": "far", "images": 9}, result["corruptions"]["blur"]
    result["misclassification"] |= scores("auroc", kappa=0.6, softmax=0.8, contrast=0.55)
    shares = {"kappa": 0.61, "jpeg_size": 0.5}
    result["retrieval"]["unseen"] = {"seen_classes": False, "recall_at_1": 0.5, "scores": shares}
    del result["retrieval"]["validation"], result["retrieval"]["cifar10"]
    result["ood"] = {"noise": far | scores("auroc", kappa=0.9)}
    result["corruptions"] = {
        "blur": damaged | scores("spearman", kappa=0.2, contrast=0.9),
        "noise": damaged | scores("spearman", kappa=None, contrast=0.1),
    }
    (run.path / "uncertainty.json").write_text(json.dumps(result))
    assert table(card(run), "measures of kappa") == [
        ["calibration error of E[mu.z] (0 is best)", "0.0123", "-", "-"],
        ["misclassification, AUROC", "0.600", "0.550 (contrast)", "0.800 (softmax)"],
        ["retrieval: unseen, R-AUROC", "0.610", "0.500 (jpeg_size)", "-"],
        ["noise (far), AUROC", "0.900", "-", "-"],
        ["corruption: blur, Spearman", "0.200", "0.900 (contrast)", "-"],
        ["corruption: noise, Spearman", "not defined", "0.100 (contrast)", "-"],
    ]
    absent = {"calibration": None, "misclassification": None, "retrieval": None, "corruptions": {}}
    (run.path / "uncertainty.json").write_text(json.dumps(result | absent))
    first, *rows = table(card(run), "measures of kappa")
    assert first[0] == "noise (far), AUROC"
    names = [row[0].partition(",")[0].partition(" ")[0] for row in rows]
    assert names == ["calibration", "misclassification", "retrieval", "corruptions"]
    assert all(row[1:] == ["not measured", "-", "-"] for row in rows)


def test_every_setting_the_versions_and_the_check_are_there(run: Run) -> None:
    (run.path / "metrics.jsonl").write_text('{"step": 7, "epoch": 0.5, "loss": -0.25}\n')
    text = card(run)
    settings = dict(table(text, "setting"))
    assert settings["`augment.crop_scale`"] == "[0.2, 1.0]"
    names = set(flat(run.config.to_dict())) - {"data_root", "cache_dir"}
    assert set(settings) == {f"`{name}`" for name in names}
    assert "the log ends at epoch 0.50 with a loss of -0.25" in text
    assert "vi-simsiam 1.2.3, torch 9.9." in text
    assert "compared with the run on 8 images of\nfashion-mini/val" in text
    assert "1.2e-07 in `embedding`" in text


def test_simsiam_has_no_kappa_and_a_constant_one_is_called_a_control(run: Run) -> None:
    config = dataclasses.replace(run.config, method="simsiam", data="folder:/home/someone/cats")
    text = card(dataclasses.replace(run, config=config))
    assert "kappa" not in text
    assert "images of one's own (cats)" in text
    assert "someone" not in text
    assert front_matter(text).datasets is None
    loss = LossConfig(concentration="constant", concentration_value=1.0)
    config = dataclasses.replace(run.config, loss=loss)
    assert 'a control, "constant"' in card(dataclasses.replace(run, config=config))
    assert "a control" not in card(run)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("linear", "{", "is damaged"),
        ("uncertainty", '{"calibration": null}', "is damaged .*lacks the key 'data'"),
    ],
)
def test_an_unusable_result_is_named(run: Run, name: str, content: str, problem: str) -> None:
    (run.path / f"{name}.json").write_text(content)
    again = f"vi-simsiam {name} {run.path} makes it again"  # the command that writes the file
    with pytest.raises(InputError, match=rf"run: .*{name}\.json {problem}.*; {again}"):
        card(run)
