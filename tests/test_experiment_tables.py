"""Summaries and figures of experiments, from folders with scripted results."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiment_cases import (
    COMMITTED,
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
from vi_simsiam.evaluation.results import pack_bits
from vi_simsiam.experiments import figures
from vi_simsiam.experiments.plan import TRIAL_SEED, Arm, Plan
from vi_simsiam.experiments.results import Experiment
from vi_simsiam.experiments.statistics import difference
from vi_simsiam.experiments.tables import result_sentence, summarise


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


def test_nothing_measured_is_no_error(tmp_path: Path) -> None:
    write_plan(tmp_path, "controls", seeds=1, arms=("byol",))
    summary = summarise(tmp_path)
    assert summary["missing"] == ["byol with seed 0"]
    assert "leave no primary comparison" in result_sentence(summary)
    assert figures.draw(tmp_path) == []


def test_accuracies_without_bits_have_no_interval(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, "table1", data=("imagenette",), seeds=1)
    for arm, accuracy in zip(plan.arms, (0.5, 0.6), strict=True):
        changes: dict[str, Any] = {"accuracy": {"linear": accuracy}, "correct": {}}
        write_result(tmp_path, result(arm, "table1", 0, **changes))
    _, text = summarised(tmp_path)
    assert "SimSiam 50.0 %: +10.0 points, 1 seed; no interval." in text
    assert "| VI-SimSiam | +10.0 |" in text
    assert "No interval: " in text


def test_a_fitted_distribution_has_the_features_of_its_runs(tmp_path: Path) -> None:
    """Their difference is 0 by construction; where the images that are right differ, it is not."""
    plan = write_plan(tmp_path, "kappa", seeds=2, data=("fashion-mini",))
    for name, arm in arms(plan).items():
        for seed in (0, 1):
            content = result(arm, "kappa", seed)
            if name == "fitted":
                content["config"]["model"]["projector"] = "standardised"
            write_result(tmp_path, content)
    assert "| fitted | the same features |" in summarised(tmp_path)[1]
    assert "| VI-SimSiam | 0.0 (" in summarised(tmp_path)[1], "equal by chance"
    content |= right(204)
    write_result(tmp_path, content)
    assert "| fitted | −0.5 (" in summarised(tmp_path)[1]


def comparable(folder: Path) -> tuple[Any, str]:
    """The content of summary.json and summary.md, rounded and without the drawn intervals."""

    def kept(content: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in content.items() if name not in ("low", "high")}

    text = (folder / "summary.json").read_text()
    numbers = json.loads(text, object_hook=kept, parse_float=lambda digits: f"{float(digits):.6g}")
    ends = r"[+−]?[\d.]+ to [+−]?[\d.]+"
    return numbers, re.sub(ends, "", (folder / "summary.md").read_text())


@pytest.mark.parametrize("name", sorted(path.parent.name for path in COMMITTED.glob("*/plan.json")))
def test_committed_summaries_are_those_of_their_results(name: str, tmp_path: Path) -> None:
    shutil.copytree(COMMITTED / name, tmp_path / name, ignore=shutil.ignore_patterns("summary.*"))
    summarise(tmp_path / name)
    assert comparable(tmp_path / name) == comparable(COMMITTED / name)


def test_committed_bins_of_kappa_are_those_of_the_results() -> None:
    folder = COMMITTED / "tuned-cifar10"
    runs = json.loads((folder / "calibration.json").read_text())
    assert len(runs) == 5
    for name, run in runs.items():
        found = json.loads((folder / "results" / f"{name}.json").read_text())["uncertainty"]
        off = [each["count"] * abs(each["expected"] - each["observed"]) for each in run["bins"]]
        assert sum(off) / run["pairs"] == pytest.approx(found["calibration_error"])


def test_what_happened_to_runs_and_trials_is_said(tmp_path: Path) -> None:
    """Runs that are missing, diverged, collapsed or have other settings."""
    plan = write_all(tmp_path, "tuned", seeds=2, trials=2)
    first, lost, _, last = plan.trials
    simsiam, ours = plan.arms
    folder = tmp_path / "trials"
    (folder / "results" / f"{lost.name}-seed-{TRIAL_SEED}.json").unlink()
    (tmp_path / "results" / "simsiam-seed-1.json").unlink()
    write_result(folder, diverged(last, "tuned", TRIAL_SEED))
    write_result(tmp_path, diverged(ours, "tuned", 1))
    other = result(ours, "tuned", 0)
    other["config"]["lr"] = 0.5
    other["curve"]["z_std"][-1] = 0.1
    other["curve"]["cosine"][0] = -0.1  # no kappa is the best one there
    write_result(tmp_path, other)
    summary, text = summarised(tmp_path)
    assert summary["missing"] == [f"{lost.name} with seed {TRIAL_SEED}", "simsiam with seed 1"]
    (found,) = (each["arms"]["vi-simsiam"] for each in summary["data"].values())
    means = [found["stability"][name]["mean"] for name in ("ratio", "grad_median", "grad_max")]
    assert means == pytest.approx([0.5, 2, 3])
    assert found["accuracy"]["linear"]["n"] == 1, "a diverged run has no accuracy"
    assert text.count("| diverged |") == 2, "the trial, and the head of the stability table"
    for part in (
        "Runs without an accuracy are left out (VI-SimSiam: 1 diverged).",
        f"| `lr` | {simsiam.config.lr} | 0.5 {ours.config.lr} |",
        "| 1 of 2 | 1 of 2 |",
        "seeds 0, 1, 60 s of training each; diverged: 1",
        f"not run, interrupted or failed): {lost.name} with seed 1000; simsiam with seed 1",
        f"| {first.name} | {first.config.lr} |",
    ):
        assert part in text
    (tmp_path / "chosen.json").unlink()
    assert "Nothing is chosen yet." in summarised(tmp_path)[1]


def test_a_chosen_value_at_the_edge_of_its_range_is_marked(tmp_path: Path) -> None:
    """SimSiam's choice is the middle of the grid, VI-SimSiam's has the largest learning rate."""
    write_all(tmp_path, "tuned", seeds=1)
    path = tmp_path / "chosen.json"
    content = json.loads(path.read_text())
    content["chosen"] = {
        "simsiam": {"trial": "trial-simsiam-10"},
        "vi-simsiam": {"trial": "trial-vi-simsiam-18"},
    }
    path.write_text(json.dumps(content))
    _, text = summarised(tmp_path)
    head = "| trial | lr | weight_decay | logistic probe, % | chosen for |"
    assert head in text, "settings that no trial varies have no column"
    assert "| trial-vi-simsiam-18 | 0.9765625 | 0.0005 | - | vi-simsiam |" in text
    within = "within the range 0.0001 to 0.0125"
    rates = "range 0.025 to 0.9765625"
    assert f"- SimSiam: `lr` 0.15625, within the {rates}; `weight_decay` 0.0005, {within}\n" in text
    assert f"- VI-SimSiam: `lr` 0.9765625, at the edge of the {rates}; " in text
    assert text.count("do not show that the range was wide enough") == 1
    content["chosen"]["vi-simsiam"]["trial"] = "trial-simsiam-10"
    path.write_text(json.dumps(content))
    assert "wide enough" not in summarised(tmp_path)[1]
    content["chosen"]["vi-simsiam"]["trial"] = "nothing"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"chosen.json is damaged \(it has an arm or a trial that"):
        summarise(tmp_path)


def test_time_to_accuracy_is_that_of_the_first_measurement(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, "lightly-imagenette", seeds=2)
    shares_of = {
        "simsiam": ([0.3, 0.68, 0.8], [0.3, 0.6, 0.7]),
        "vi-simsiam": ([0.3, 0.5, 0.7], [0.6, 0.5, 0.75]),
    }
    for name, runs in shares_of.items():
        for seed, shares in enumerate(runs):
            content = result(arms(plan)[name], "lightly-imagenette", seed)
            content["curve"] |= {"knn200": shares, "knn200_seconds": [10, 20, 30]}
            write_result(tmp_path, content)
    text = summarised(tmp_path)[1]
    assert "| SimSiam | 20 ± 0 | 25 ± 7.07 | 30 ± 0 | 30 (1 of 2 runs) |" in text
    assert "| VI-SimSiam | 20 ± 14.1 | 30 ± 0 | 30 ± 0 | not reached |" in text


def test_a_foreign_set_may_have_any_name(tmp_path: Path) -> None:
    plan = write_all(tmp_path, "kappa", seeds=1)
    figures: dict[str, float | str] = {"ood_auroc": 0.6, "ood_auroc_brand_name": 0.6}
    figures |= {"ood_auroc_baseline": 0.7, "ood_auroc_baseline_name": "contrast"}
    write_result(tmp_path, result(plan.arms[1], "kappa", 0, uncertainty=figures))
    assert "0.700 (contrast)" in summarised(tmp_path)[1]
    figures["ood_auroc_baseline_name"] = 0.5
    write_result(tmp_path, result(plan.arms[1], "kappa", 0, uncertainty=figures))
    with pytest.raises(InputError, match="numbers, and names as text"):
        summarise(tmp_path)


def test_folders_that_cannot_be_summarised_are_named(tmp_path: Path) -> None:
    plan = write_all(tmp_path, "table1", seeds=1, data=("imagenette",))
    bits = pack_bits(torch.zeros(100, dtype=torch.bool))
    for changes, message in (
        ({"val_images": 100, "correct": {"linear": bits}}, "measured on 100 and 400 images"),
        ({"correct": {"linear": "AAAA"}}, "correct: 'AAAA' is not 400 values in base64"),
    ):
        write_result(tmp_path, result(plan.arms[1], "table1", 0, **changes))
        with pytest.raises(InputError, match=message):
            summarise(tmp_path)
    for content, message in (("[]", "is not a dict"), ('{"arm": "a"}', "lacks the key 'seed'")):
        (tmp_path / "results" / "damaged.json").write_text(content)
        with pytest.raises(InputError, match=rf"damaged.json is damaged .*{message}"):
            summarise(tmp_path)


def test_stability_figure_has_a_column_for_each_dimension_and_parametrisation() -> None:
    found = figures.groups(Experiment.read(COMMITTED / "stability"))
    assert list(found) == [
        f"D = {dim}, κ = {kind}softplus" for dim in (128, 512, 2048) for kind in ("(D−1) ", "")
    ]
    literal = [f"literal-{kind}d512" for kind in ("", "bounded-", "clipped-")]
    assert list(found["D = 512, κ = softplus"]) == literal
    (column,) = figures.groups(Experiment.read(COMMITTED / "controls")).values()
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
