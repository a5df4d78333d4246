"""Summaries and figures of experiments, from folders with scripted results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiment_cases import (
    diverged,
    first_right,
    result,
    right,
    write_all,
    write_plan,
    write_result,
)
from matplotlib.figure import Figure
from PIL import Image

from vi_simsiam.errors import InputError
from vi_simsiam.experiments import figures
from vi_simsiam.experiments.plan import TRIAL_SEED, Arm, Plan
from vi_simsiam.experiments.results import Experiment
from vi_simsiam.experiments.statistics import difference
from vi_simsiam.experiments.tables import result_sentence, summarise
from vi_simsiam.experiments.worker import progress_curve


def arms(plan: Plan) -> dict[str, Arm]:
    return {arm.name: arm for arm in plan.arms}


def summarised(out: Path) -> tuple[dict[str, Any], str]:
    """The summary, and the content of summary.md."""
    return summarise(out), (out / "summary.md").read_text()


def ends(found: Any) -> str:
    """An interval in percentage points."""
    texts = (f"{100 * end:+.1f}".replace("-", "−") for end in found)
    return " to ".join("0.0" if text == "+0.0" else text for text in texts)


@pytest.mark.parametrize(
    ("ours", "theirs", "seeds", "wanted"),
    [
        ([300, 302], [200, 201], "2 seeds", "difference in favour of VI-SimSiam is shown."),
        ([200, 199], [300, 302], "2 seeds", "the other way, in favour of SimSiam, is shown."),
        ([250, 200, 300], [245, 205, 290], "3 seeds", "no difference shown."),
        ([300], [200], "1 seed", "these runs differ in favour of VI-SimSiam, which does not show"),
        ([200], [300, 301], "1 seed and 2 seeds", "these runs differ in favour of SimSiam, which"),
        ([200], [200], "1 seed", "no difference shown."),
    ],
)
def test_the_interval_decides_the_verdict(
    ours: list[int], theirs: list[int], seeds: str, wanted: str, tmp_path: Path
) -> None:
    plan = write_plan(tmp_path, "table1", data=("imagenette",), seeds=3)
    for name, counts in (("vi-simsiam", ours), ("simsiam", theirs)):
        for seed, count in enumerate(counts):
            write_result(tmp_path, result(arms(plan)[name], "table1", seed, **right(count)))
    summary, text = summarised(tmp_path)
    sentence = result_sentence(summary)
    assert sentence in text
    assert wanted in sentence
    means = [f"{np.mean(counts) / 4:.1f} %" for counts in (ours, theirs)]
    assert f"VI-SimSiam {means[0]} against SimSiam {means[1]}: " in sentence
    bits = [np.stack([first_right(count) for count in counts]) for counts in (ours, theirs)]
    found = difference(*bits)
    assert f"95 % interval {ends((found['low'], found['high']))}, {seeds}, 400 images" in sentence
    assert summary["primary"]["difference"] == found
    alone = min(len(ours), len(theirs)) == 1
    assert ("interval is over images only" in sentence) == alone
    assert ("over images only: an arm with one seed" in text) == alone


def test_a_run_without_a_result_is_missing(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, "table1", data=("imagenette",), seeds=1)
    write_result(tmp_path, result(arms(plan)["vi-simsiam"], "table1", 0))
    summary, text = summarised(tmp_path)
    assert result_sentence(summary).endswith("Not measured.")
    assert summary["missing"] == ["simsiam with seed 0"]
    assert "without a result (not run, interrupted or failed): simsiam with seed 0" in text

    nothing = tmp_path / "nothing"
    write_plan(nothing, "controls", seeds=1, arms=("byol",))
    summary = summarise(nothing)
    assert summary["missing"] == ["byol with seed 0"]
    assert "leave no primary comparison" in result_sentence(summary)
    assert figures.draw(nothing) == []


def test_accuracies_without_bits_have_no_interval(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, "table1", data=("imagenette",), seeds=1)
    for arm, accuracy in zip(plan.arms, (0.5, 0.6), strict=True):
        changes: dict[str, Any] = {"accuracy": {"linear": accuracy}, "correct": {}}
        write_result(tmp_path, result(arm, "table1", 0, **changes))
    _, text = summarised(tmp_path)
    assert "SimSiam 50.0 %: +10.0 points, 1 seed; no interval." in text
    assert "| VI-SimSiam | +10.0 |" in text
    assert "No interval: " in text


def test_accuracies_and_uncertainty_stand_beside_what_they_are_compared_with(
    tmp_path: Path,
) -> None:
    """Published figures, differences, and the best trivial score."""
    plan = write_all(tmp_path, "table1", seeds=2)
    ours = arms(plan)["vi-simsiam-imagewoof"]
    for seed, count in enumerate((240, 248)):
        uncertainty = {"aurc": 0.4, "aurc_baseline": 0.3 + 0.1 * seed, "ood_auroc": 0.7}
        uncertainty |= {"aurc_baseline_name": "edge_energy"}
        changes = {**right(count), "uncertainty": uncertainty}
        write_result(tmp_path, result(ours, "table1", seed, **changes))
    summary, text = summarised(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    woof = summary["data"]["imagewoof"]
    assert woof["reference"] == "simsiam-imagewoof"
    found = woof["arms"]["vi-simsiam-imagewoof"]
    accuracy, interval = found["accuracy"]["linear"], found["difference"]["linear"]
    assert accuracy == pytest.approx({"mean": 0.61, "sd": 0.02 / 2**0.5, "n": 2})
    assert interval["value"] == pytest.approx((244 - 204) / 400)
    for row in (
        "| SimSiam | 2 | 51.0 ± 1.4 | 51.0 ± 1.4 | 90.0 ± 0.0 |",
        "| VI-SimSiam | 2 | - | 61.0 ± 1.4 | - |",
        "| SimSiam, published | - | - | 72.4 | 97.5 |",
        f"| VI-SimSiam | - | +10.0 ({ends((interval['low'], interval['high']))}) | - |",
        "| VI-SimSiam | 0.0 (",  # no gain has no sign
        "| score | AURC | out-of-distribution AUROC |",
        "| VI-SimSiam | κ | 0.400 ± 0.000 | 0.700 ± 0.000 |",
        "| VI-SimSiam | best trivial | 0.350 ± 0.071 (edge_energy) | - |",
    ):
        assert row in text
    assert "| SimSiam | κ" not in text
    assert not list(tmp_path.glob(".*")), "no temporary files are left"


def test_stability_shows_how_runs_ended(tmp_path: Path) -> None:
    """kappa = 2 where kappa* is 4; the last of 20 epochs counts, all for the gradient norm."""
    plan = write_plan(tmp_path, "stability", dim=128, seeds=2, epochs=20)
    literal, scaled = arms(plan)["literal-d128"], arms(plan)["scaled-d128"]
    collapsing = result(literal, "stability", 0)
    collapsing["curve"]["z_std"][-1] = 0.1
    collapsing["curve"]["cosine"][0] = -0.1  # no kappa is the best one there
    for content in (collapsing, diverged(literal, "stability", 1), result(scaled, "stability", 0)):
        write_result(tmp_path, content)
    summary, text = summarised(tmp_path)
    found = summary["data"]["imagenette"]["arms"]
    ending = found["scaled-d128"]["stability"]
    means = [ending[name]["mean"] for name in ("ratio", "z_std", "grad_median", "grad_max")]
    assert means == pytest.approx([0.5, 0.9, 2, 3])
    ending = found["literal-d128"]["stability"]
    assert (ending["collapsed"], ending["diverged"], ending["runs"]) == (1, 1, 2)
    assert found["literal-d128"]["accuracy"]["linear"]["n"] == 1, "a diverged run has no accuracy"
    assert "| literal-d128 | 0.5 ± 0 | 0.5 ± 0.566 |" in text
    assert "| 1 of 2 | 1 of 2 |" in text
    assert "seeds 0, 1, 60 s of training each; diverged: 1" in text
    assert "Runs without an accuracy are left out (literal-d128: 1 diverged)." in text


def test_settings_that_differ_and_inferred_ones_are_marked(tmp_path: Path) -> None:
    plan = write_all(tmp_path, "table1", data=("imagenette",), seeds=2)
    other = result(plan.arms[1], "table1", 1)
    other["config"]["lr"] = 0.5
    write_result(tmp_path, other)
    summary, text = summarised(tmp_path)
    found = summary["data"]["imagenette"]
    assert found["differing"] == {
        "method": {"simsiam": "simsiam", "vi-simsiam": "vi-simsiam"},
        "lr": {"simsiam": 0.001, "vi-simsiam": [0.001, 0.5]},
    }
    assert found["common"]["epochs"] == 200
    assert not {"seed", "device", "workers", "data_root"} & found["common"].keys()
    for part in (
        "| `lr` | 0.001 | 0.001 0.5 |",
        "`model.dim`\\* 2048",
        "`epochs` 200",
        "source does not state it. Inferred as well: initial concentration.",
        "1,000 training images, 400 validation images, 224 x 224 pixels, 200 epochs",
        "- devices: cpu (1 thread)",
    ):
        assert part in text


def test_trials_and_their_choice(tmp_path: Path) -> None:
    plan = write_all(tmp_path, "tuned", seeds=1, trials=2)
    first, lost, _, last = plan.trials
    seed, folder = TRIAL_SEED, tmp_path / "trials"
    (folder / "results" / f"{lost.name}-seed-{seed}.json").unlink()
    write_result(folder, diverged(last, "tuned", seed))
    summary, text = summarised(tmp_path)
    assert summary["missing"] == [f"{lost.name} with seed {seed}"]
    chosen_by = [row["chosen_by"] for row in summary["trials"]["rows"]]
    assert chosen_by == [["simsiam"], [], ["vi-simsiam"], []]
    assert f"| {first.name} | {first.config.lr} |" in text
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {last.name} "))
    assert row.endswith("| diverged |  |")
    assert "80% of the training images and measured on the other 20%" in text
    (tmp_path / "chosen.json").unlink()
    assert "Nothing is chosen yet." in summarised(tmp_path)[1]


def test_time_to_accuracy_is_that_of_the_first_measurement(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, "lightly-imagenette", seeds=2)
    shares_of = {
        "simsiam": ([0.3, 0.68, 0.8], [0.3, 0.6, 0.7]),
        "vi-simsiam": ([0.3, 0.5, 0.7], [0.6, 0.5, 0.75]),
    }
    progress = tmp_path / "progress.jsonl"
    for name, runs in shares_of.items():
        for seed, shares in enumerate(runs):
            lines = [
                {"step": n, "knn200": share, "knn200_epoch": 10 * n, "knn200_seconds": 10.0 * n}
                for n, share in enumerate(shares, 1)
            ]
            progress.write_text("".join(json.dumps(line) + "\n" for line in lines))
            content = result(arms(plan)[name], "lightly-imagenette", seed)
            content["curve"] |= progress_curve(progress)
            write_result(tmp_path, content)
    summary, text = summarised(tmp_path)
    times = summary["data"]["imagenette"]["times"]
    assert times["common"] == 0.7
    assert list(times["levels"].values()) == pytest.approx([0.56, 0.63, 0.7, 0.752])
    assert times["arms"] == {
        "simsiam": [[20, 20], [20, 30], [30, 30], [30, None]],
        "vi-simsiam": [[30, 10], [30, 30], [30, 30], [None, None]],
    }
    assert "| SimSiam | 20 ± 0 | 25 ± 7.07 | 30 ± 0 | 30 (1 of 2 runs) |" in text
    assert "| VI-SimSiam | 20 ± 14.1 | 30 ± 0 | 30 ± 0 | not reached |" in text


def test_folders_that_cannot_be_summarised_are_named(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            summarise(tmp_path)

    plan = write_all(tmp_path, "table1", seeds=1, data=("imagenette",))
    for changes, message in (
        (right(90, 100), "runs were measured on 100 and 400 images"),
        ({"correct": right(9, 90)["correct"]}, "correct: 12 bytes given for 400 values; 50 must"),
    ):
        write_result(tmp_path, result(plan.arms[1], "table1", 0, **changes))
        refused(message)
    (tmp_path / "plan.json").write_text("{")
    refused(r"plan\.json cannot be read")


def test_stability_figure_has_a_column_for_each_dimension_and_parametrisation(
    tmp_path: Path,
) -> None:
    write_all(tmp_path / "stability", "stability", seeds=1, epochs=5)
    found = figures.groups(Experiment.read(tmp_path / "stability"))
    assert list(found) == [
        f"D = {dim}, κ = {kind}softplus" for dim in (128, 512, 2048) for kind in ("(D−1) ", "")
    ]
    literal = [f"literal-{kind}d512" for kind in ("", "bounded-", "clipped-")]
    assert list(found["D = 512, κ = softplus"]) == literal
    write_all(tmp_path / "controls", "controls", seeds=1, epochs=5)
    (column,) = figures.groups(Experiment.read(tmp_path / "controls")).values()
    assert {"simsiam", "byol", "vi-simsiam"} <= column.keys(), "the only parametrisation"


def test_figures_show_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_all(tmp_path, "table1", seeds=2, data=("imagenette",))
    write_result(tmp_path, diverged(plan.arms[0], "table1", 1))
    save, drawn = figures.save, []

    def saved(figure: Figure, path: Path) -> Path:
        drawn.append(figure)
        return save(figure, path)

    monkeypatch.setattr(figures, "save", saved)
    paths = figures.draw(tmp_path)
    assert [path.name for path in paths] == ["stability.png", "accuracy.png"]
    assert [Image.open(path).width for path in paths] == [1600] * 2
    stability, accuracy = drawn
    norms = next(axes for axes in stability.axes if axes.get_ylabel() == "gradient norm")
    lines = [line for line in norms.lines if len(line.get_xdata()) == 20]
    assert len(lines) == 4
    assert all(np.array_equal(line.get_ydata(), np.linspace(1, 3, 20)) for line in lines)
    assert [line.get_marker() for line in norms.lines].count("x") == 1, "the diverged run"
    runs = [line.get_xdata() for line in accuracy.axes[0].lines if line.get_marker() == "o"]
    assert [list(shares) for shares in runs] == [[50.0], [50.0, 52.0]]
