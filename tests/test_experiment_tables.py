"""Summaries and figures of experiments, from folders with scripted results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiment_results import (
    IMAGES,
    diverged,
    first_right,
    packed,
    result,
    right,
    write_all,
    write_plan,
    write_result,
)
from PIL import Image

from vi_simsiam.errors import InputError
from vi_simsiam.experiments import results
from vi_simsiam.experiments.figures import draw, groups
from vi_simsiam.experiments.measure import progress_curve
from vi_simsiam.experiments.plan import Arm, Plan
from vi_simsiam.experiments.results import Experiment
from vi_simsiam.experiments.statistics import difference
from vi_simsiam.experiments.tables import result_sentence, summarise


def arms(plan: Plan) -> dict[str, Arm]:
    return {arm.name: arm for arm in plan.arms}


def compared(out: Path, ours: list[int], theirs: list[int], **options: Any) -> dict[str, Any]:
    """Summary of table1 on imagenette whose runs got so many images right, a number for each seed."""
    plan = write_plan(
        out, "table1", data=("imagenette",), seeds=max(len(ours), len(theirs)), **options
    )
    measure = plan.primary.measure if plan.primary is not None else "linear"
    for name, counts in (("vi-simsiam", ours), ("simsiam", theirs)):
        for seed, count in enumerate(counts):
            bits = first_right(count)
            changes = {
                "accuracy": {measure: float(bits.mean())},
                "correct": {measure: packed(bits)},
            }
            write_result(out, result(arms(plan)[name], "table1", seed, **changes))
    return summarise(out)


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted"),
    [
        ([300, 302, 301], [200, 199, 201], "a difference in favour of VI-SimSiam is shown."),
        (
            [200, 199, 201],
            [300, 302, 301],
            "a difference the other way, in favour of SimSiam, is shown.",
        ),
        ([250, 200, 300], [245, 205, 290], "no difference shown."),
    ],
)
def test_the_interval_decides_what_is_said(
    ours: list[int], theirs: list[int], wanted: str, tmp_path: Path
) -> None:
    summary = compared(tmp_path, ours, theirs)
    said = result_sentence(summary)
    found = difference(
        *(np.stack([first_right(count) for count in counts]) for counts in (ours, theirs))
    )
    assert said.endswith(wanted)
    assert (
        f"VI-SimSiam {np.mean(ours) / 4:.1f} % against SimSiam {np.mean(theirs) / 4:.1f} %: "
        in said
    )
    low, high = (f"{100 * end:+.1f}".replace("-", "−") for end in (found.low, found.high))
    assert f"95 % interval {low} to {high}, 3 seeds, 400 images" in said
    assert summary["primary"]["difference"] == found.to_dict()


def test_few_seeds_are_said(tmp_path: Path) -> None:
    one = result_sentence(compared(tmp_path / "one", [300], [200]))
    assert (
        "1 seed, 400 images: these runs differ in favour of VI-SimSiam, which does not show that the methods do."
        in one
    )
    assert one.endswith("The interval is over images only: the spread between seeds is not in it.")
    assert "over images only: an arm with one seed" in (tmp_path / "one" / "summary.md").read_text()
    two = result_sentence(compared(tmp_path / "two", [200], [300, 301]))
    assert (
        "1 seed and 2 seeds, 400 images: these runs differ in favour of SimSiam, which does not show"
        in two
    )
    nothing = compared(tmp_path / "none", [300], [])
    assert result_sentence(nothing).endswith("Not measured.")
    assert nothing["missing"] == ["simsiam with seed 0"]
    assert (
        "without a result (not run, interrupted or failed): simsiam with seed 0"
        in (tmp_path / "none" / "summary.md").read_text()
    )


def test_accuracy_table_has_means_published_figures_and_differences(tmp_path: Path) -> None:
    plan = write_all(tmp_path, "table1", seeds=2)
    for seed, count in enumerate((240, 248)):
        write_result(
            tmp_path, result(arms(plan)["vi-simsiam-imagewoof"], "table1", seed, **right(count))
        )
    summary = summarise(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    woof = summary["data"]["imagewoof"]
    assert woof["reference"] == "simsiam-imagewoof"
    found = woof["arms"]["vi-simsiam-imagewoof"]
    assert found["accuracy"]["linear"] == {
        "mean": pytest.approx(0.61),
        "sd": pytest.approx(0.02 / 2**0.5),
        "n": 2,
    }
    assert found["difference"]["linear"]["value"] == pytest.approx((244 - 204) / IMAGES)
    text = (tmp_path / "summary.md").read_text()
    assert "| SimSiam | 2 | 51.0 ± 1.4 | 51.0 ± 1.4 | 90.0 ± 0.0 |" in text
    assert "| VI-SimSiam | 2 | - | 61.0 ± 1.4 | - |" in text
    assert "| SimSiam, published | - | - | 72.4 | 97.5 |" in text
    interval = found["difference"]["linear"]
    low, high = (f"{100 * interval[end]:+.1f}".replace("-", "−") for end in ("low", "high"))
    assert f"| VI-SimSiam | - | +10.0 ({low} to {high}) | - |" in text
    assert "| VI-SimSiam | 0.0 (" in text, "no gain has no sign"
    assert not list(tmp_path.glob(".*")), "temporary files are gone"


def test_uncertainty_of_kappa_stands_beside_the_best_trivial_score(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, "table1", data=("imagenette",), seeds=2)
    for seed in range(2):
        write_result(tmp_path, result(arms(plan)["simsiam"], "table1", seed))
        figures = {
            "aurc": 0.4,
            "aurc_baseline": 0.3 + 0.1 * seed,
            "aurc_baseline_name": "edge_energy",
            "ood_auroc": 0.7,
        }
        write_result(
            tmp_path, result(arms(plan)["vi-simsiam"], "table1", seed, uncertainty=figures)
        )
    summarise(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "| score | AURC | out-of-distribution AUROC |" in text
    assert "| VI-SimSiam | κ | 0.400 ± 0.000 | 0.700 ± 0.000 |" in text
    assert "| VI-SimSiam | best trivial | 0.350 ± 0.071 (edge_energy) | - |" in text
    assert "| SimSiam | κ" not in text
    assert (
        "chosen afterwards for each figure among lengths of features and statistics of the pixels"
        in text
    )


def test_stability_says_how_runs_ended(tmp_path: Path) -> None:
    """kappa = 2 where kappa* is 4; the last of 20 epochs counts for z-std, all for the gradient norm."""
    plan = write_plan(tmp_path, "stability", dim=128, seeds=2, epochs=20)
    literal, scaled = arms(plan)["literal-d128"], arms(plan)["scaled-d128"]
    collapsing = result(literal, "stability", 0)
    collapsing["curve"]["z_std"][-1] = 0.1
    for content in (collapsing, diverged(literal, "stability", 1), result(scaled, "stability", 0)):
        write_result(tmp_path, content)
    found = summarise(tmp_path)["data"]["imagenette"]["arms"]
    ending = found["scaled-d128"]["stability"]
    assert ending["ratio"]["mean"] == pytest.approx(0.5)
    assert ending["z_std"]["mean"] == pytest.approx(0.9)
    assert (ending["grad_median"]["mean"], ending["grad_max"]["mean"]) == pytest.approx((2, 3))
    ending = found["literal-d128"]["stability"]
    assert (ending["collapsed"], ending["diverged"], ending["runs"]) == (1, 1, 2)
    assert found["literal-d128"]["accuracy"]["linear"]["n"] == 1, "a diverged run has no accuracy"
    text = (tmp_path / "summary.md").read_text()
    assert "| literal-d128 | 0.5 ± 0 | 0.5 ± 0.566 |" in text
    assert "| 1 of 2 | 1 of 2 |" in text
    assert "seeds 0, 1, 60 s of training each; diverged: 1" in text
    assert "Runs without an accuracy are left out (literal-d128: 1 diverged)." in text


def test_settings_are_told_apart_and_inferred_ones_marked(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, "table1", data=("imagenette",), seeds=2)
    for arm in plan.arms:
        for seed in range(2):
            write_result(tmp_path, result(arm, "table1", seed))
    other = result(plan.arms[1], "table1", 1)
    other["config"]["lr"] = 0.5
    write_result(tmp_path, other)
    found = summarise(tmp_path)["data"]["imagenette"]
    assert found["differing"] == {
        "method": {"simsiam": "simsiam", "vi-simsiam": "vi-simsiam"},
        "lr": {"simsiam": 0.001, "vi-simsiam": [0.001, 0.5]},
    }
    assert found["common"]["epochs"] == 200
    assert not {"seed", "device", "workers", "data_root"} & found["common"].keys()
    text = (tmp_path / "summary.md").read_text()
    assert "| `lr` | 0.001 | 0.001 0.5 |" in text
    assert "`model.dim`\\* 2048" in text
    assert "`epochs` 200" in text
    assert (
        "\\* inferred: the source does not state it. Inferred as well: initial concentration."
        in text
    )
    assert "1,000 training images, 400 validation images, 224 x 224 pixels, 200 epochs" in text
    assert "- devices: cpu (1 thread)" in text


def test_trials_and_what_they_chose(tmp_path: Path) -> None:
    plan = write_all(tmp_path, "tuned", seeds=1, trials=2)
    assert plan.trials is not None
    lost = plan.trials.arms[1]
    folder = tmp_path / "trials"
    (folder / "results" / f"{lost.name}-seed-{plan.trials.seed}.json").unlink()
    write_result(folder, diverged(plan.trials.arms[3], "tuned", plan.trials.seed))
    summary = summarise(tmp_path)
    assert summary["missing"] == [f"{lost.name} with seed {plan.trials.seed}"]
    assert [row["chosen_by"] for row in summary["trials"]["rows"]] == [
        ["simsiam"],
        [],
        ["vi-simsiam"],
        [],
    ]
    lines = (tmp_path / "summary.md").read_text().splitlines()
    (first,) = (line for line in lines if line.startswith(f"| {plan.trials.arms[0].name} "))
    assert first.split(" | ")[1] == f"{plan.trials.arms[0].config.lr}"
    (last,) = (line for line in lines if line.startswith(f"| {plan.trials.arms[3].name} "))
    assert last.endswith("| diverged |  |")
    assert any("80% of the training images and measured on the other 20%" in line for line in lines)
    (tmp_path / "chosen.json").unlink()
    assert (
        "Nothing is chosen yet." in (summarise(tmp_path), (tmp_path / "summary.md").read_text())[1]
    )


def test_time_to_accuracy_is_that_of_the_first_look(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, "lightly-imagenette", seeds=2)
    looks = {
        "simsiam": ([0.3, 0.68, 0.8], [0.3, 0.6, 0.7]),
        "vi-simsiam": ([0.3, 0.5, 0.7], [0.6, 0.5, 0.75]),
    }
    for name, shares in looks.items():
        for seed, knn in enumerate(shares):
            looked = tmp_path / "progress.jsonl"
            looked.write_text(
                "".join(
                    json.dumps(
                        {
                            "step": n,
                            "knn200": share,
                            "knn200_epoch": 10 * n,
                            "knn200_seconds": 10.0 * n,
                        }
                    )
                    + "\n"
                    for n, share in enumerate(knn, 1)
                )
            )
            content = result(arms(plan)[name], "lightly-imagenette", seed)
            content["curve"] |= progress_curve(looked)
            write_result(tmp_path, content)
    times = summarise(tmp_path)["data"]["imagenette"]["times"]
    assert times["common"] == 0.7
    assert times["levels"]["published"] == 0.752
    assert list(times["levels"].values())[:3] == pytest.approx([0.56, 0.63, 0.7])
    assert times["arms"] == {
        "simsiam": [[20, 20], [20, 30], [30, 30], [30, None]],
        "vi-simsiam": [[30, 10], [30, 30], [30, 30], [None, None]],
    }
    text = (tmp_path / "summary.md").read_text()
    assert "| SimSiam | 20 ± 0 | 25 ± 7.07 | 30 ± 0 | 30 (1 of 2 runs) |" in text
    assert "| VI-SimSiam | 20 ± 14.1 | 30 ± 0 | 30 ± 0 | not reached |" in text


def test_nothing_measured_is_no_error(tmp_path: Path) -> None:
    write_plan(tmp_path, "controls", seeds=1, arms=("byol",))
    summary = summarise(tmp_path)
    assert summary["missing"] == ["byol with seed 0"]
    assert "leave no primary comparison" in result_sentence(summary)
    assert draw(tmp_path) == []


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda out: (out / "plan.json").unlink(),
            "has no plan.json; it must be the folder of an experiment",
        ),
        (lambda out: (out / "plan.json").write_text("{"), "plan.json cannot be read"),
        (lambda out: (out / "plan.json").write_text("{}"), "plan.json lacks experiment, arms"),
        (lambda out: (out / "results" / "x.json").write_text("[]"), "x.json lacks arm, seed"),
    ],
)
def test_damaged_folders_are_named(break_it: Any, message: str, tmp_path: Path) -> None:
    write_all(tmp_path, "table1", seeds=1)
    break_it(tmp_path)
    with pytest.raises(InputError, match=message):
        summarise(tmp_path)


def test_different_images_are_not_compared(tmp_path: Path) -> None:
    plan = write_all(tmp_path, "table1", seeds=1, data=("imagenette",))
    bits = first_right(90, 100)
    changes = {"correct": {"linear": packed(bits)}, "accuracy": {"linear": 0.9}, "val_images": 100}
    write_result(tmp_path, result(plan.arms[1], "table1", 0, **changes))
    with pytest.raises(InputError, match="runs were measured on 100 and 400 images"):
        summarise(tmp_path)


def test_damaged_bits_are_named(tmp_path: Path) -> None:
    plan = write_all(tmp_path, "table1", seeds=1, data=("imagenette",))
    write_result(
        tmp_path, result(plan.arms[1], "table1", 0, correct={"linear": packed(first_right(9, 90))})
    )
    with pytest.raises(
        InputError, match="correct: 12 bytes given for 400 values; 50 must be given"
    ):
        summarise(tmp_path)


def test_stability_figure_has_a_column_for_each_dimension_and_parametrisation(
    tmp_path: Path,
) -> None:
    write_all(tmp_path / "stability", "stability", seeds=1, epochs=5)
    found = groups(Experiment.read(tmp_path / "stability"))
    assert list(found) == [
        f"D = {dim}, κ = {kind}softplus" for dim in (128, 512, 2048) for kind in ("(D−1) ", "")
    ]
    assert list(found["D = 512, κ = softplus"]) == [
        "literal-d512",
        "literal-bounded-d512",
        "literal-clipped-d512",
    ]
    write_all(tmp_path / "controls", "controls", seeds=1, epochs=5)
    (column,) = groups(Experiment.read(tmp_path / "controls")).values()
    assert {"simsiam", "byol", "vi-simsiam"} <= column.keys(), (
        "SimSiam stands beside the only parametrisation"
    )


def test_figures_are_drawn_and_show_the_runs(tmp_path: Path) -> None:
    plan = write_all(tmp_path, "table1", seeds=2, data=("imagenette",))
    before = [np.asarray(Image.open(path)) for path in draw(tmp_path)]
    assert [image.shape[1:] for image in before] == [(1600, 3)] * 2
    write_result(tmp_path, diverged(plan.arms[0], "table1", 1))
    after = [np.asarray(Image.open(path)) for path in draw(tmp_path)]
    assert all((a != b).any() for a, b in zip(before, after, strict=True))


def test_curves_with_gaps_are_read() -> None:
    curve = {"epoch": [1, 2], "kappa": [1.0, None], "cosine": [0.5, 0.5], "grad_norm": [None, 3.0]}
    found = results.columns({"curve": curve})
    assert found["ratio"] == pytest.approx([1.0, np.nan], nan_ok=True)
    ending = results.stability_of([{"curve": curve}, {"curve": {}}])
    assert (ending["ratio"], ending["grad_max"]["mean"]) == (None, 3.0)
