"""The summary of the experiment "deaths", which counts trainings that stop learning."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiment_cases import COMMITTED, diverged, result, write_plan, write_result

from vi_simsiam.cli import main
from vi_simsiam.experiments import runner, worker
from vi_simsiam.experiments.catalogue import plan
from vi_simsiam.experiments.deaths import deaths_markdown, summarise_deaths
from vi_simsiam.experiments.plan import PlanOptions


def written(folder: Path, *results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of runs.json for these results."""
    write_plan(folder, "deaths", seeds=9)
    for each in results:
        write_result(folder, each)
    summarise_deaths(folder)
    rows: list[dict[str, Any]] = json.loads((folder / "runs.json").read_text())["runs"]
    return rows


def curve(**ends: float) -> dict[str, Any]:
    """20 lines over 2 epochs, of a run whose figures are at their ends throughout."""
    values = {"cosine": 0.5, "kappa": 1.0, "kappa_best": 1.0} | ends
    lines = {name: [value] * 20 for name, value in values.items()}
    return {"curve": {"epoch": np.linspace(0.1, 2, 20).tolist(), **lines}}


def test_what_counts_as_dead(tmp_path: Path) -> None:
    """A kappa below a tenth of the best, a cosine of 0 unlike SimSiam's, or a loss not finite."""
    arms = {arm.name: arm for arm in plan("deaths", PlanOptions(preset="demo", dim=128)).arms}
    cases: list[tuple[str, float, int, dict[str, float], str | None]] = [
        ("simsiam", 0.06, 0, {"cosine": 0.4}, None),
        ("vi-simsiam", 0.06, 0, {}, None),
        ("vi-simsiam", 0.06, 1, {"kappa": 0.09}, "kappa"),
        ("vi-simsiam", 0.06, 2, {"kappa": 0.11}, None),
        ("vi-simsiam", 0.06, 3, {"cosine": 0.05}, "cosine"),
        ("vi-simsiam", 0.06, 4, {"cosine": 0.05, "kappa": 0.01}, "kappa and cosine"),
        ("simsiam", 0.1, 0, {"cosine": 0.05}, None),
        ("softplus", 0.1, 0, {"cosine": 0.05}, None),  # SimSiam does not learn there either
        ("simsiam", 0.1, 1, {"cosine": 0.2}, None),
        ("softplus", 0.1, 1, {"cosine": 0.05}, "cosine"),
        ("softplus", 0.1, 2, {"cosine": 0.05}, "cosine"),  # compared with SimSiam's mean
        ("softplus", 0.03, 0, {"cosine": 0.05}, None),  # nothing to compare with
    ]
    results = [
        result(arms[f"{name}-d128-lr{lr}"], "deaths", seed, **curve(**ends))
        for name, lr, seed, ends, _ in cases
    ]
    lost = diverged(arms["vi-simsiam-d128-lr0.06"], "deaths", 5)
    rows = written(tmp_path, *results, lost)
    dead = {(row["arm"], row["lr"], row["seed"]): row["dead"] for row in rows}
    assert dead == {
        **{(name, lr, seed): reason for name, lr, seed, _, reason in cases},
        ("vi-simsiam", 0.06, 5): "diverged",
    }
    assert "options: seeds 9, data fashion-mini" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("data", ["fashion-mini", "cifar10", "cluttered", "cluttered-longer"])
def test_committed_summaries_are_those_of_their_runs(data: str) -> None:
    folder = COMMITTED / "deaths" / data
    found = deaths_markdown(json.loads((folder / "runs.json").read_text()))
    assert found == (folder / "summary.md").read_text()


def test_ratios_are_of_smoothed_figures_after_the_first_epoch(tmp_path: Path) -> None:
    arm = plan("deaths", PlanOptions(preset="demo", dim=128)).arms[0]
    lines = curve()
    lines["curve"]["kappa"] = [9.0] * 10 + [1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 0.5]
    (row,) = written(tmp_path / "one", result(arm, "deaths", 0, **lines))
    assert (row["least_ratio"], row["largest_ratio"]) == (1.0, 1.4)
    assert row["kappa"] == 1.3


@pytest.mark.usefixtures("small_network")
def test_a_run_leaves_its_curve_and_no_weights(
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On images without labels: nothing is measured. The run is done in this process."""
    out, flat = tmp_path / "out", tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((image_folder / "train").rglob("*.png"))):
        shutil.copy(path, flat / f"{number}.png")
    sizes = "--preset demo --size 8 --batch-size 8 --dim 16 --epochs 2 --seeds 1 --devices cpu"
    arm = "vi-simsiam-d16-lr0.06"
    given = f"experiment deaths --data {flat} --out {out} --arms {arm} {sizes}".split()
    monkeypatch.setattr(runner, "_WORKER", (sys.executable, "-S", "-c", "raise SystemExit(1)"))
    assert main(given) == 1
    assert worker.main(out / "runs" / f"{arm}-seed-0.json") == 0
    assert not (out / "runs" / f"{arm}-seed-0").exists()
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 run finished and kept" in printed
    assert printed.endswith(f"{out / 'summary.md'}\n")
    (row,) = json.loads((out / "runs.json").read_text())["runs"]
    assert (row["arm"], row["dim"], row["lr"], row["steps"]) == ("vi-simsiam", 16, 0.06, 10)
