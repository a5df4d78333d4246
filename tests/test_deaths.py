"""The experiment that counts trainings which stop learning: its plan, what counts as dead, and one run of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiment_results import diverged, result

from vi_simsiam.cli import main
from vi_simsiam.config import SOFTPLUS, LossConfig
from vi_simsiam.errors import InputError
from vi_simsiam.experiments.catalogue import plan
from vi_simsiam.experiments.deaths import summarise_deaths
from vi_simsiam.experiments.plan import Arm, PlanOptions


def test_every_loss_is_run_at_every_dimension_and_learning_rate() -> None:
    made = plan("deaths", PlanOptions(seeds=9, preset="demo"))
    assert len(made.arms) == 3 * 4 * 4
    assert (made.measures, made.primary) == ((), None)
    of: dict[str, list[Arm]] = {}
    for arm in made.arms:
        of.setdefault(arm.name.partition("-d")[0], []).append(arm)
    assert {name: {arm.seeds for arm in arms} for name, arms in of.items()} == {
        "vi-simsiam": {None}, "softplus": {3}, "simsiam": {4},
    }  # fmt: skip
    for arms in of.values():
        assert {arm.config.model.dim for arm in arms} == {128, 256, 512, 2048}
        assert {arm.config.lr for arm in arms} == {0.0125, 0.03, 0.06, 0.1}
    assert {arm.config.loss for arm in of["vi-simsiam"]} == {LossConfig()}
    assert plan("deaths", PlanOptions(preset="paper")).arms[0].config.loss == LossConfig(), (
        "not that of the preset"
    )
    assert {arm.config.loss for arm in of["softplus"]} == {SOFTPLUS}
    assert {arm.config.method for arm in of["simsiam"]} == {"simsiam"}
    assert {arm.config.model.dim for arm in plan("deaths", PlanOptions(dim=64)).arms} == {64}


def test_one_epoch_is_refused() -> None:
    with pytest.raises(InputError, match="epochs: 1 is not accepted"):
        plan("deaths", PlanOptions(preset="demo", epochs=1))


def written(folder: Path, *results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of runs.json for these results."""
    (folder / "results").mkdir(parents=True)
    (folder / "plan.json").write_text(
        json.dumps({"options": {"seeds": 9, "data": ["fashion-mini"], "trials": 8}})
    )
    for each in results:
        (folder / "results" / f"{each['arm']}-seed-{each['seed']}.json").write_text(
            json.dumps(each)
        )
    path = summarise_deaths(folder)
    assert path.read_text().startswith("# Experiment deaths\n\n## Result\n\nDead runs: ")
    rows: list[dict[str, Any]] = json.loads((folder / "runs.json").read_text())["runs"]
    return rows


def curve(**ends: float) -> dict[str, Any]:
    """20 lines over 2 epochs, of a run whose figures are at their ends throughout."""
    values = {"cosine": 0.5, "kappa": 1.0, "kappa_best": 1.0} | ends
    lines = {name: [value] * 20 for name, value in values.items()}
    return {"curve": {"epoch": np.linspace(0.1, 2, 20).tolist(), **lines}}


def test_what_counts_as_dead(tmp_path: Path) -> None:
    """A kappa below a tenth of the best one; a cosine at right angles where SimSiam's is not; a loss that is not finite."""
    arms = {arm.name: arm for arm in plan("deaths", PlanOptions(preset="demo", dim=128)).arms}

    def of(name: str, seed: int = 0, **ends: float) -> dict[str, Any]:
        return result(arms[name], "deaths", seed, **curve(**ends))

    rows = written(
        tmp_path / "all",
        of("simsiam-d128-lr0.06", cosine=0.4),
        of("vi-simsiam-d128-lr0.06"),
        of("vi-simsiam-d128-lr0.06", 1, kappa=0.09),
        of("vi-simsiam-d128-lr0.06", 2, kappa=0.11),
        of("vi-simsiam-d128-lr0.06", 3, cosine=0.05),
        of("vi-simsiam-d128-lr0.06", 4, cosine=0.05, kappa=0.01),
        diverged(arms["vi-simsiam-d128-lr0.06"], "deaths", 5),
        of("simsiam-d128-lr0.1", cosine=0.05),
        of("softplus-d128-lr0.1", cosine=0.05),
        of("simsiam-d128-lr0.1", 1, cosine=0.2),
        of("softplus-d128-lr0.1", 1, cosine=0.05),
        of("softplus-d128-lr0.1", 2, cosine=0.05),
        of("softplus-d128-lr0.03", cosine=0.05),
    )
    dead = {(row["arm"], row["lr"], row["seed"]): row["dead"] for row in rows}
    assert dead == {
        ("simsiam", 0.06, 0): None,
        ("vi-simsiam", 0.06, 0): None,
        ("vi-simsiam", 0.06, 1): "kappa",
        ("vi-simsiam", 0.06, 2): None,
        ("vi-simsiam", 0.06, 3): "cosine",
        ("vi-simsiam", 0.06, 4): "kappa and cosine",
        ("vi-simsiam", 0.06, 5): "diverged",
        ("simsiam", 0.1, 0): None,
        ("softplus", 0.1, 0): None,  # SimSiam does not learn there either
        ("simsiam", 0.1, 1): None,
        ("softplus", 0.1, 1): "cosine",
        ("softplus", 0.1, 2): "cosine",  # held to SimSiam's mean
        ("softplus", 0.03, 0): None,  # nothing to compare with
    }
    text = (tmp_path / "all" / "summary.md").read_text()
    assert (
        "simsiam 0 of 3; softplus 2 of 4 (cosine 2); vi-simsiam 4 of 6 (cosine 1, diverged 1, kappa 1, kappa and cosine 1)"
        in text
    )
    assert (
        "between 0.5 and 2 times the best one in 2 of 6 runs of vi-simsiam, throughout from the second epoch on in 2."
        in text
    )
    assert "| fashion-mini | vi-simsiam | 0.06 | 6 | 4 | 0.28 | 2 |" in text, (
        "what diverged has no cosine"
    )
    assert "| fashion-mini | simsiam | 0.1 | 2 | 0 | 0.12 | 1 |" in text
    assert "options: seeds 9, data fashion-mini" in text


def test_ratios_are_of_smoothed_figures_after_the_first_epoch(tmp_path: Path) -> None:
    arm = plan("deaths", PlanOptions(preset="demo", dim=128)).arms[0]
    lines = curve()
    lines["curve"]["kappa"] = [9.0] * 10 + [1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 0.5]
    (row,) = written(tmp_path / "one", result(arm, "deaths", 0, **lines))
    assert (row["least_ratio"], row["largest_ratio"]) == (1.0, 1.4)
    assert row["kappa"] == 1.3
    lines["curve"]["kappa"] = [1.0] * 14 + [20.0] + [1.0] * 5
    (row,) = written(tmp_path / "two", result(arm, "deaths", 0, **lines))
    text = (tmp_path / "two" / "summary.md").read_text()
    assert "in 1 of 1 runs of vi-simsiam, throughout from the second epoch on in 0." in text


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    arm = plan("deaths", PlanOptions(preset="demo", dim=128)).arms[0]
    for number, damaged in enumerate(({"curve": {}}, {"config": {"lr": -1}})):
        with pytest.raises(
            InputError, match=r"out: .*vi-simsiam-d128-lr0.0125-seed-0.json is damaged"
        ):
            written(tmp_path / str(number), result(arm, "deaths", 0, **damaged))


def test_a_run_leaves_its_curve_and_no_weights(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On images without labels: nothing is measured."""
    out, flat = tmp_path / "out", tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((image_folder / "train").rglob("*.png"))):
        shutil.copy(path, flat / f"{number}.png")
    command = f"experiment deaths --data {flat} --preset demo --size 8 --batch-size 8 --dim 16 --epochs 2 --seeds 1"
    given = [
        *command.split(),
        "--arms",
        "vi-simsiam-d16-lr0.06",
        "--out",
        str(out),
        "--devices",
        "cpu",
    ]
    assert main(given) == 0
    assert capsys.readouterr().out.endswith(f"{out / 'summary.md'}\n")
    (row,) = json.loads((out / "runs.json").read_text())["runs"]
    assert (row["arm"], row["dim"], row["lr"], row["steps"]) == ("vi-simsiam", 16, 0.06, 10)
    assert not (out / "runs" / "vi-simsiam-d16-lr0.06-seed-0").exists()
    assert main(given) == 0
    assert "1 of 1 run finished and kept" in capsys.readouterr().out
