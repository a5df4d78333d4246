"""Tables, plots and documents from result files; accuracy of the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_cases import (
    CPU,
    MODES,
    given,
    scripted_pipeline,
    scripted_result,
    shown,
    slower,
)

from vi_simsiam.benchmarks import accuracy, plots, report, tables
from vi_simsiam.benchmarks.peers import textbook_loss
from vi_simsiam.cli import main
from vi_simsiam.errors import InputError
from vi_simsiam.ops.multiview_loss import LossForm

PIPELINE = ("augment", "step", "train")


@pytest.fixture
def result() -> dict[str, Any]:
    return scripted_result()


def sections(*names: str) -> str:
    return "\n".join(f"<!-- bench: {name} -->\n<!-- /bench -->" for name in names)


def test_tables_show_no_figure_that_is_wrong_or_noisy(result: dict[str, Any]) -> None:
    noisy = slower(result, 1.0, spread=0.25)
    text = tables.loss_markdown(noisy)
    assert "| 64 x 512, float32 | 40.0 | 20.0 | 10.0 | too noisy to tell | 50% |" in text
    assert "lie 20 % of its median or more apart" in text
    assert "lie 20 % of" not in tables.loss_markdown(result)
    terminal = shown(tables.modes_case(noisy["cases"][0]))
    assert terminal.count("too noisy to tell") == 1
    assert "noisy" not in shown(tables.modes_case(result["cases"][0]))
    failure = "inaccurate: loss error 1.0e-02, allowed 1e-06"
    result["cases"][0]["providers"]["cpu"].update(correct=False, failure=failure)
    text = tables.loss_markdown(result)
    assert "| 64 x 512, float32 | 40.0 | 20.0 | - | - |" in text
    assert f"No time for cpu ({failure})." in text
    made = scripted_pipeline("augment")
    made["cases"][0]["providers"]["lightly"]["time"]["upper_us"] *= 1.3
    text = tables.augment_markdown(made)
    assert "| 2x128, batch 64 | 12,000 | 1,000 | ImportError | too noisy to tell |" in text
    assert "4.00 x" in text


def test_a_page_is_written_from_the_files_that_it_names(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r").mkdir()
    path = tmp_path / "r" / "multiview_loss.json"
    path.write_text(json.dumps(result))
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- bench: table r/multiview_loss.json -->\nold\n<!-- /bench -->\nbetween\n"
        + sections("host r/none.json", "plots r/multiview_loss.json", "launches r/none.json")
        + "\nafter\n"
    )
    assert main(["bench", "report", str(page)]) == 0
    assert "written: 4 sections" in capsys.readouterr().out
    text = page.read_text()
    assert "| 64 x 512, float32 | 40.0 | 20.0 | 10.0 | 2.00 x | 50% |" in text
    assert "old" not in text
    assert text.count("Not measured.") == 3
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert report.fill(text, tmp_path) == text
    (tmp_path / "r" / "multiview_loss_speedup.png").write_bytes(b"")
    assert "![multiview loss speedup](r/multiview_loss_speedup.png)" in report.fill(text, tmp_path)
    assert main(["bench", "report"]) == 2
    for kind, problem in {
        "poem": "is none of table",
        "": "is none of table",
        "step": "names",
    }.items():
        with pytest.raises(InputError, match=f"section '{kind}' {problem}"):
            report.fill(sections(kind), tmp_path)
    path.write_text(json.dumps({**result, "cases": [{}]}))
    with pytest.raises(InputError, match="loss.json is damaged .*cases.* lacks the key 'name'"):
        report.fill(sections("table r/multiview_loss.json"), tmp_path)


def test_tables_and_plots_of_the_pipelines(tmp_path: Path) -> None:
    for name in PIPELINE:
        made = scripted_pipeline(name)
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
        (drawn,) = plots.draw(made, tmp_path)
        assert drawn.read_bytes().startswith(b"\x89PNG")
    targets = "pipeline-gpu-targets augment.json step.json train.json"
    kinds = ("augment augment.json", "layers step.json", "train train.json", "plots step.json")
    text = report.fill(sections(*kinds, targets, "pipeline-cpu-targets none/train.json"), tmp_path)
    layers = "| vi-simsiam, 2x128, batch 64: our kernels, all views in one pass | 1.03 | 1.00 |"
    for line in (
        "| 2x128, batch 64 | 12,000 | 1,000 | ImportError | 12.00 x |",
        "No figure for kornia (ImportError: kornia is not installed).",
        f"{layers} 2.00 x |",
        "| vi-simsiam | 400 | 1.60 x | 110.0 | 20.0 | 3.0 | 30.0 | 80.0% | 60.0 | 2.00 |",
        "The target is a kNN accuracy of 75.0%.",
        "![step](step.png)",
        "| at most 1.05 times | 1.10 times",
        "| at least 2 times | not measured | - |",
    ):
        assert line in text


def test_plots_need_no_times(result: dict[str, Any], tmp_path: Path) -> None:
    for found in result["cases"][0]["providers"].values():
        found.update(correct=False, failure="out of memory")
    result["cases"][0]["copy"] = dict.fromkeys(MODES)
    without_cases = [{**scripted_pipeline(benchmark), "cases": []} for benchmark in PIPELINE]
    for made in (result, *without_cases):
        for path in plots.draw(made, tmp_path):
            assert path.stat().st_size > 1000


def test_parts_of_an_experiments_summary_are_shown(tmp_path: Path) -> None:
    def filled(what: str) -> str:
        return report.fill(sections(f"experiment {what}"), tmp_path)

    assert "Not measured." in filled("r/summary.md result")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "summary.md").write_text(
        "# E\n\n## Result\n\nA line.\n\n## Time to accuracy\n\n| a |\n|---|\n"
    )
    _, *lines, _ = filled("r/summary.md time-to-accuracy result").splitlines()
    assert lines == ["| a |", "|---|", "", "A line."]
    assert "Not measured." in filled("r/summary.md figures")
    (tmp_path / "r" / "stability.png").write_bytes(b"")
    assert "\n![stability of the runs](r/stability.png)\n" in filled("r/summary.md figures")
    with pytest.raises(InputError, match="'poem'; it has result, time-to-accuracy, figures"):
        filled("r/summary.md poem")
    with pytest.raises(InputError, match="needs a summary.md and the parts"):
        filled("r/summary.md")


def test_a_section_shows_every_gpu(tmp_path: Path) -> None:
    targets = " ".join(f"results/GPU/{name}.json" for name in PIPELINE)
    page = sections("step results/GPU/step.json", f"pipeline-gpu-targets {targets}")
    for place in ("cpu/step", "nvidia-h200/step", "nvidia-h100/augment", "nvidia-h100/step"):
        name, found = place.split("/")
        path = tmp_path / "results" / f"{place}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(scripted_pipeline(found)))
        page = report.fill(page, tmp_path)
        assert ("`nvidia-" in page) == (name == "nvidia-h100"), "headings only where there are two"
        assert page.count("Not measured.") == (name == "cpu")
    step, targets = page.split("<!-- /bench -->")[:2]
    for section in (step, targets):
        assert section.index("`nvidia-h100`") < section.index("`nvidia-h200`")
    assert step.count("| vi-simsiam, 2x128, batch 64 | 1.05 |") == 2
    views = [line for line in targets.splitlines() if line.startswith("| views/s at 2x128")]
    assert ["not measured" in line for line in views] == [False, True], "it has no such result"
    other = sections("step OTHER_GPU/step.json")
    assert "Not measured." in report.fill(other, tmp_path / "results")


@pytest.mark.parametrize("kappa", accuracy.KAPPAS)
def test_cosines_are_exact_and_eager_keeps_ten_times_the_digits_of_textbook(kappa: float) -> None:
    for cosine in accuracy.cosines(kappa):
        views, targets = accuracy._inputs(cosine, kappa, CPU)
        assert (views[0][:, : accuracy.DIM].double() ** 2).sum().item() == 4096**2
        assert (views[0][0, : accuracy.DIM] @ targets[0][0]).item() / 4096 == cosine
        assert 0.2 < (accuracy.DIM - 1) * cosine / (1 - cosine) / kappa < 5
    form = LossForm("power_spherical")
    textbook = accuracy.errors(lambda p, z: textbook_loss(p, z, form).mean(), kappa, CPU)
    eager = accuracy.errors(given(form), kappa, CPU)
    assert eager["value"] <= textbook["value"] / 10
    assert eager["derivative"] <= textbook["derivative"] / 10


def test_accuracy_command_writes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "KAPPAS", (1e4,))
    monkeypatch.setattr(accuracy, "cosines", lambda kappa: [0.75])
    assert main(["bench", "accuracy", "--device", "cpu", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cpu" / "accuracy.json").read_text())
    assert {"textbook", "eager", "cpu"} == result["providers"].keys()
    result["providers"]["cpu"] = "not available: not built"
    text = accuracy.markdown_table(result)
    assert "| `cpu` | not available: not built |" in text
    assert f"| `eager` | {result['providers']['eager'][0]['value']:.1e}" in text
