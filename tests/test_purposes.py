"""Scores of uncertainty by purpose: their figures, the table and the picture, from made-up runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_cases import uncertainty_result
from experiment_cases import result, write_plan, write_result
from matplotlib.figure import Figure

from vi_simsiam.errors import InputError
from vi_simsiam.experiments import figures
from vi_simsiam.experiments.forms import read_plan
from vi_simsiam.experiments.plan import Plan
from vi_simsiam.experiments.purposes import PURPOSES, SCORES, purposes
from vi_simsiam.experiments.tables import summarise

SEEDS = (0, 1)


def figures_of(arm: str, seed: int) -> dict[str, dict[str, float]]:
    """AUROCs of a run: those of vi-simsiam's kappa are 0.6 and 0.8, and of softmax 0.95 or 0.7."""
    kappa = {"vi-simsiam": 0.6 + 0.2 * seed, "fitted": 0.65}[arm]
    scores = {"kappa": kappa, "embedding_norm": 0.4, "softmax": 0.95, "neighbour_agreement": 0.99}
    found = {name: dict(scores) for name in PURPOSES if name != "near"}
    del found["far"]["embedding_norm"]
    found["refusing"]["softmax"] = 0.7
    found["retrieval"]["embedding_norm"] = 0.702
    return found


def write_all(out: Path, **options: Any) -> Plan:
    """A finished experiment "kappa"."""
    plan = write_plan(out, "kappa", seeds=len(SEEDS), **options)
    for arm in plan.arms:
        for seed in SEEDS:
            name = arm.name.removesuffix(f"-{arm.config.data}")
            changes = {} if name == "simsiam" else {"purposes": figures_of(name, seed)}
            write_result(out, result(arm, "kappa", seed, **changes))
    return plan


def lines_of(text: str) -> dict[str, list[str]]:
    """The lines of the tables in the section "Purposes", by their first cell."""
    _, _, rest = text.partition("## Purposes\n")
    rows = [line.strip("| ").split(" | ") for line in rest.partition("\n## ")[0].splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


def test_every_purpose_is_the_mean_of_its_parts() -> None:
    """Damage counts at all levels, covered images from level 3 on, empty ones from level 4 on."""
    result = uncertainty_result()
    for kind, part in result["corruptions"].items():
        levels = [0.9] * 5 if kind == "noise" else [0.5, 0.5, 0.6, 0.7, 0.8]
        part["scores"]["kappa"]["aurocs"] = levels
    found = purposes(result)
    assert found.keys() == PURPOSES.keys()
    assert found["damaged"]["kappa"] == pytest.approx((3 * 0.62 + 0.9) / 4)
    assert found["covered"]["kappa"] == pytest.approx(0.7)
    assert found["empty"]["kappa"] == pytest.approx(0.75)
    retrieval, ood = result["retrieval"], result["ood"]
    wanted = {
        "refusing": result["misclassification"]["scores"]["softmax"]["auroc"],
        "retrieval": retrieval["validation"]["scores"]["softmax"],
        "retrieval_unseen": retrieval["cifar10"]["scores"]["softmax"],
        "near": ood["held-out"]["scores"]["softmax"]["auroc"],
        "far": ood["noise"]["scores"]["softmax"]["auroc"],
    }
    assert {name: found[name]["softmax"] for name in wanted} == wanted

    digits = {name: {"auroc": 0.5} for name in ood["noise"]["scores"] if name != "view_agreement"}
    ood["digits"] = {"kind": "far", "images": 9, "scores": digits}
    ood["noise"]["scores"]["contrast"]["auroc"] = None
    far = purposes(result)["far"]
    assert far["softmax"] == pytest.approx((wanted["far"] + 0.5) / 2)
    assert far.keys() == digits.keys() - {"contrast"}, "measured on every set"
    nothing = {"misclassification": None, "retrieval": None, "ood": {}, "corruptions": {}}
    assert purposes(nothing) == {}


def test_jpeg_is_left_out_where_images_are_not_rgb() -> None:
    result = uncertainty_result()
    for kind, part in result["corruptions"].items():
        part["scores"]["kappa"]["aurocs"] = [{"blur": 0.6, "noise": 0.9}.get(kind, 0.75)] * 5
    del result["corruptions"]["jpeg"]
    assert purposes(result)["damaged"]["kappa"] == pytest.approx(0.75)


def test_scores_and_their_arms_are_named_before_any_run(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, "kappa")
    saved = read_plan(tmp_path / "plan.json")
    assert [tuple(score) for score in saved["scores"]] == list(SCORES)
    assert ("vi-simsiam", "kappa") in SCORES
    arms = {arm.name: arm for arm in plan.arms}
    assert list(arms) == ["simsiam", "vi-simsiam", "fitted"]
    assert (arms["fitted"].fitted, arms["fitted"].after) == (True, "simsiam")
    assert saved["primary"]["measure"] == "logistic"
    saved["scores"][0] = ["vi-simsiam"]
    (tmp_path / "plan.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match=r"plan.json is damaged .*an arm and a score"):
        summarise(tmp_path)


def test_the_table_has_a_line_for_every_score_and_marks_the_best(tmp_path: Path) -> None:
    write_all(tmp_path)
    summary = summarise(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    lines = lines_of(text)
    heads = [head for name, head in PURPOSES.items() if name != "near"]
    assert lines["score"] == heads, "no column without a figure"
    assert lines["κ of VI-SimSiam"] == ["**0.70 ± 0.14**"] * 7
    assert lines["κ of fitted"] == ["0.65 ± 0.00"] * 7
    embedding = ["0.40 ± 0.00"] * 7
    embedding[heads.index("foreign, far")] = "-"
    embedding[heads.index("retrieval")] = "**0.70 ± 0.00**"
    assert lines["embedding norm"] == embedding
    labelled = ["-"] * 7
    labelled[heads.index("refusing")] = "0.70 ± 0.00"
    labelled[heads.index("foreign, far")] = "0.95 ± 0.00"
    assert lines["softmax †"] == labelled, "compared for some purposes, and never marked as best"
    assert "neighbour agreement" not in lines, "not in the plan"
    assert "highest mean among the 3 scores without labels. It is chosen afterwards" in text
    (rows,) = summary["purposes"].values()
    assert rows[0]["runs"]["empty"] == [0.6, 0.8]


def test_results_from_before_are_shown_without_purposes(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, "kappa", seeds=1)
    for arm in plan.arms:
        write_result(tmp_path, result(arm, "kappa", 0))
    summarise(tmp_path)
    assert "Purposes" not in (tmp_path / "summary.md").read_text()
    assert "purposes.png" not in [path.name for path in figures.draw(tmp_path)]


def test_the_picture_shows_every_run_and_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Figure] = {}

    def saved(figure: Figure, path: Path) -> Path:
        drawn[path.name] = figure
        return path

    monkeypatch.setattr(figures, "save", saved)
    write_all(tmp_path, data=("fashion-mini", "cifar10"))
    assert tmp_path / "purposes.png" in figures.draw(tmp_path)
    panels = drawn["purposes.png"].axes
    assert len(panels) == 14
    assert [panels[i].get_title(loc="left") for i in (0, 7)] == [
        "fashion-mini: refusing",
        "cifar10: refusing",
    ]
    lowest = [axes.xaxis.get_tick_params()["labelbottom"] for axes in panels]
    # Seven panels in four columns: the fourth has one less.
    ends = [False] * 3 + [True] + [False] * 3, [False] * 3 + [True] * 4
    assert lowest == [*ends[0], *ends[1]]
    chance, runs, mean, *others = panels[0].lines
    assert list(chance.get_xdata()) == [0.5, 0.5]
    assert list(runs.get_xdata()) == [0.6, 0.8]
    assert list(mean.get_xdata()) == pytest.approx([0.7])
    assert len(others) == 2 * 3
    names = ["κ of VI-SimSiam", "κ of fitted", "embedding norm", "softmax †"]
    for number, axes in enumerate(panels):
        first = number in (0, 4, 7, 11)  # of a line; another data set may have other scores
        titles = [label.get_text() for label in axes.get_yticklabels()]
        assert titles == (names if first else [""] * len(names))
