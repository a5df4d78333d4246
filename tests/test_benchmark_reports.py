"""Targets, tables, plots and documents from result files; and the accuracy of the loss."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_cases import CPU, given, scripted_pipeline, scripted_result, slower

from vi_simsiam.benchmarks import accuracy, multiview_loss, plots, report, tables
from vi_simsiam.benchmarks.baselines import textbook_loss
from vi_simsiam.benchmarks.cases import MODES, Case
from vi_simsiam.benchmarks.targets import targets_for, targets_of
from vi_simsiam.cli import main
from vi_simsiam.cli.commands import BENCHMARKS
from vi_simsiam.errors import InputError
from vi_simsiam.ops.multiview_loss import LossForm

PIPELINE = ("augment", "step", "train")
IMAGENETTE = "200 epochs of ImageNette-128, 2x128, batch 64"


def sections(*names: str) -> str:
    return "\n".join(f"<!-- bench: {name} -->\n<!-- /bench -->" for name in names)


@pytest.fixture
def result() -> dict[str, Any]:
    return scripted_result()


def test_targets_are_measured_or_say_so(result: dict[str, Any]) -> None:
    unmeasured = [t for kind in ("cuda", "cpu") for t in targets_for("multiview_loss", kind, [])]
    for target in unmeasured:
        assert (target.figure, target.met) == ("not measured", None)
    assert "| - |" in tables.targets_markdown(unmeasured)
    result["cases"][0].update(name="power_spherical 256x2048 2x2 float32")
    eager, compiled, nowhere = targets_of(result)
    assert (eager.figure, eager.met) == ("4.00 times", True)
    assert (compiled.figure, compiled.met) == ("2.00 times", True)
    assert (nowhere.figure, nowhere.met) == ("slower in none of 4 comparisons", True)
    nowhere = targets_of(slower(result, 2.1))[2]
    assert nowhere.met is False
    assert nowhere.figure.startswith("slower in 2 of 4, by 1.05 times at worst (64 x 512, float32")


def test_gpu_targets_read_the_right_cases(result: dict[str, Any]) -> None:
    """The copy at 32768 x 2048, torch.compile from 200 MB on, eager at small batches."""
    cases = []
    for case in (Case(32768, 2048, dtype="bfloat16"), Case(64, 2048, dtype="bfloat16")):
        made = copy.deepcopy(result["cases"][0])
        least_bytes = {mode: case.least_bytes(mode) for mode in MODES}
        fields = ("name", "batch", "dim", "dtype")
        made.update({name: getattr(case, name) for name in fields}, least_bytes=least_bytes)
        made["providers"]["triton"] = made["providers"].pop("cpu")
        made["providers"]["cuda"] = copy.deepcopy(made["providers"]["triton"])
        made["providers"]["cuda"]["forward_backward"]["time"]["median_us"] = 12.0
        made["copy"]["forward_backward"]["median_us"] = 9.5
        cases.append(made)
    found = [(each.figure, each.met) for each in targets_for("multiview_loss", "cuda", cases)]
    assert found == [
        ("triton 1.05, cuda 1.26", True),
        ("not measured", None),
        ("2.00 times", True),
        ("2.00 times", False),
        ("2.00 times", False),
        ("4.00 times", False),
        ("slower in none of 8 comparisons", True),
        ("farthest apart: Triton / CUDA 0.83 at 64 x 2048, bfloat16", False),
    ]


def test_markdown_comes_from_the_file(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "loss.json").write_text(json.dumps(result))
    (page := tmp_path / "page.md").write_text(
        "before\n<!-- bench: table r/loss.json -->\nold\n<!-- /bench -->\nbetween\n"
        "<!-- bench: host r/none.json -->\n<!-- /bench -->\n"
        "<!-- bench: plots r/loss.json -->\n<!-- /bench -->\nafter\n"
    )
    assert main(["bench", "report", str(page)]) == 0
    capsys.readouterr()
    text = page.read_text()
    assert "| 64 x 512, float32 | 40.0 | 20.0 | 10.0 | 2.00 x | 50% |" in text
    assert multiview_loss.loss_markdown(result) in text
    assert "old" not in text
    assert text.count("Not measured.") == 2
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert report.fill(text, tmp_path) == text
    plots.draw(result, tmp_path / "r")
    assert "![multiview loss speedup](r/multiview_loss_speedup.png)" in report.fill(text, tmp_path)
    assert main(["bench", "report"]) == 2
    page.write_text(sections("poem r/loss.json"))
    assert main(["bench", "report", str(page)]) == 2
    assert "section 'poem' is none of table" in capsys.readouterr().err
    for kind in report._KINDS:
        with pytest.raises(InputError, match=f"bench: section '{kind}' n"):
            report.fill(sections(kind), tmp_path)
    with pytest.raises(InputError, match="section '' is none of"):
        report.fill(sections(""), tmp_path)
    (tmp_path / "r" / "loss.json").write_text(json.dumps({**result, "cases": [{}]}))
    with pytest.raises(InputError, match="r/loss.json lacks what section 'table' shows"):
        report.fill(sections("table r/loss.json"), tmp_path)


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


def test_a_wrong_provider_shows_no_figure_in_markdown(result: dict[str, Any]) -> None:
    failure = "inaccurate: loss error 1.0e-02, allowed 1e-06"
    result["cases"][0]["providers"]["cpu"].update(correct=False, failure=failure)
    text = multiview_loss.loss_markdown(result)
    assert "| 64 x 512, float32 | 40.0 | 20.0 | - | - |" in text
    assert f"No time for cpu ({failure})." in text


def test_plots_need_no_times(result: dict[str, Any], tmp_path: Path) -> None:
    for case in result["cases"]:
        for found in case["providers"].values():
            found.update(correct=False, failure="out of memory")
        case["copy"] = {"forward": None, "forward_backward": None}
    for path in (*plots.draw(result, tmp_path), *plots.draw({**result, "cases": []}, tmp_path)):
        assert path.stat().st_size > 1000


def test_accuracy_cosines_are_exact_and_around_the_optimum() -> None:
    for kappa in accuracy.KAPPAS:
        for cosine in accuracy.cosines(kappa):
            views, targets = accuracy._inputs(cosine, kappa, CPU)
            assert (views[0][:, : accuracy.DIM].double() ** 2).sum().item() == 4096**2
            assert (views[0][0, : accuracy.DIM] @ targets[0][0]).item() / 4096 == cosine
            assert 0.2 < (accuracy.DIM - 1) * cosine / (1 - cosine) / kappa < 5


def test_eager_keeps_ten_times_the_digits_of_textbook() -> None:
    form = LossForm("power_spherical")
    for kappa in accuracy.KAPPAS:
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


def test_bench_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in BENCHMARKS)


def test_pipeline_targets_are_measured_or_say_so() -> None:
    made = {name: scripted_pipeline(name) for name in PIPELINE}
    for name in made:
        for kind in ("cuda", "cpu"):
            for target in targets_for(name, kind, []):
                assert (target.figure, target.met) == ("not measured", None)
    found = [target for result in made.values() for target in targets_of(result)]
    figures = {target.what: (target.figure, target.met) for target in found}
    assert figures == {
        "views/s at 2x128, batch 64, against lightly's": ("12.0 times", True),
        "views/s at 2x224, batch 64, against lightly's": ("4.0 times", False),
        "training step against the same network's forward and backward alone, same kernels": (
            "1.10 times (most of 2 cases: simsiam, 2x224, batch 64)",
            False,
        ),
        "forward and backward of the network alone, with our kernels, against torch.compile": (
            "1.25 times (vi-simsiam, 2x128, batch 64; no figure for 1 case more)",
            False,
        ),
        "exposed augmentation": ("1.9% (most of 2 cases: vi-simsiam, 2x128, batch 64)", True),
        f"{IMAGENETTE}: training": ("110 s", True),
        f"{IMAGENETTE}: cold start and kNN evaluation": ("50 s", False),
        f"{IMAGENETTE}: peak memory beside the images": ("2.00 GB", True),
    }
    (on_cpu,) = targets_of({**made["train"], "device_type": "cpu"})
    assert on_cpu.met
    assert on_cpu.figure == "1.60 times (400 and 250; 200 epochs of 9,469 images)"
    shorter = copy.deepcopy(made["train"]["cases"][1]) | {"images": 64}
    shorter["providers"]["lightly"]["time"]["median_us"] /= 10
    made["train"]["cases"].append(shorter)
    longest = targets_of({**made["train"], "device_type": "cpu"})
    assert longest == [on_cpu], "of several trainings the longest counts"
    assert targets_of({**made["step"], "device_type": "cpu"}) == []
    for case in made["train"]["cases"]:
        case["images"] = 640
    assert {target.met for target in targets_of(made["train"])} == {None}, "a part of ImageNette"


def test_pipeline_markdown_and_plots_come_from_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in PIPELINE:
        result = scripted_pipeline(name)
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
        (drawn,) = plots.draw(result, tmp_path)
        assert drawn.read_bytes().startswith(b"\x89PNG")
        plots.draw({**result, "cases": []}, tmp_path / "empty")
    page = tmp_path / "page.md"
    page.write_text(
        sections(
            "augment augment.json",
            "step step.json",
            "phases step.json",
            "train train.json",
            "plots step.json",
            "layers step.json",
            "pipeline-gpu-targets augment.json step.json train.json",
            "pipeline-cpu-targets train.json",
            "step none.json",
            "pipeline-cpu-targets none.json",
        )
    )
    assert main(["bench", "report", str(page)]) == 0
    capsys.readouterr()
    text = page.read_text()
    assert "| 2x128, batch 64 | 12,000 | 1,000 | ImportError | 12.00 x |" in text
    assert "No figure for kornia (ImportError: kornia is not installed)." in text
    assert "| vi-simsiam, 2x128, batch 64 | 1.05 | 1.00 | 1.25 | 1.05 x | 1.9% | 40.0% |" in text
    assert "| simsiam, 2x224, batch 64 | 1.10 | 1.00 | - | 1.10 x |" in text
    assert (
        "| vi-simsiam, 2x128, batch 64: our kernels, all views in one pass | 1.03 | 1.00 | 2.00 x |"
        in text
    )
    assert "| ms | augmentation | exposed augmentation | forward |" in text
    assert "| vi-simsiam | 400 | 1.60 x | 110.0 | 20.0 | 3.0 | 30.0 | 80.0% | 60.0 | 2.00 |" in text
    assert "| lightly | 250 | 1.00 x | 200.0 | 20.0 | - | 30.0 | 79.0% | - | - |" in text
    assert "The target is a kNN accuracy of 75.0%." in text
    assert "![step](step.png)" in text
    assert "| at most 1.05 times | 1.10 times" in text
    assert text.count("Not measured.") == 1
    assert "| at least 1.5 times | not measured | - |" in text
    assert report.fill(text, tmp_path) == text
    page.write_text(sections("pipeline-gpu-targets step.json"))
    assert main(["bench", "report", str(page)]) == 2
    assert "needs the result files of augment, step, train" in capsys.readouterr().err


def test_a_section_shows_every_gpu(tmp_path: Path) -> None:
    page = sections(
        "step results/GPU/step.json",
        "pipeline-gpu-targets " + " ".join(f"results/GPU/{name}.json" for name in PIPELINE),
    )
    (tmp_path / "results" / "cpu").mkdir(parents=True)
    (tmp_path / "results" / "cpu" / "step.json").write_text("{}")
    text = report.fill(page, tmp_path)
    assert text.count("Not measured.") == 1
    assert text.count("| not measured |") == 8
    for place in ("nvidia-h200/step", "nvidia-h100/augment", "nvidia-h100/step"):
        name, found = place.split("/")
        path = tmp_path / "results" / name / f"{found}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(scripted_pipeline(found)))
        text = report.fill(text, tmp_path)
        if name == "nvidia-h200":
            assert "`nvidia-" not in text, "no heading where there is one"
            assert "Not measured." not in text
    step, targets = text.split("<!-- /bench -->")[:2]
    for section in (step, targets):
        assert section.index("`nvidia-h100`") < section.index("`nvidia-h200`")
    assert step.count("| vi-simsiam, 2x128, batch 64 | 1.05 |") == 2
    views = [line for line in targets.splitlines() if line.startswith("| views/s at 2x128")]
    assert ["not measured" in line for line in views] == [False, True], "it has no such result"
    within = sections("step GPU/step.json")
    assert "| vi-simsiam, 2x128, batch 64 | 1.05 |" in report.fill(within, tmp_path / "results")
    assert "Not measured." in report.fill(within.replace("GPU", "OTHER_GPU"), tmp_path / "results")
