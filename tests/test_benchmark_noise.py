"""Noisy times get no verdict, wherever one is given: comparisons, targets and tables."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_cases import scripted_pipeline, scripted_result, shown, slower

from vi_simsiam.benchmarks import tables
from vi_simsiam.benchmarks.compare import compare
from vi_simsiam.benchmarks.ratios import Ratio
from vi_simsiam.benchmarks.targets import Row, targets_of
from vi_simsiam.cli import main


@pytest.fixture
def result() -> dict[str, Any]:
    return scripted_result()


def test_compare_gives_noisy_times_no_verdict(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three times as slow, but measured on a busy machine: no verdict, said so, and no part of the exit code."""

    def compared(after: dict[str, Any]) -> tuple[int, str, str]:
        for name, content in (("a", result), ("b", after)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        code = main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
        return code, *capsys.readouterr()

    code, said, _ = compared(slower(result, 3.0, spread=0.25))
    assert code == 0
    assert (
        "12 times compared; 0 slower beyond the noise. 2 too noisy to tell: the exit code does not rest"
        in said
    )
    assert [
        change.verdict
        for change in compare(result, slower(result, 3.0, spread=0.25))
        if change.noisy
    ] == ["too noisy to tell"] * 2
    busy = slower(result, 3.0, spread=0.25)
    busy["cases"][0]["providers"]["eager"]["forward"]["time"].update(
        median_us=400.0, lower_us=400.0, upper_us=400.0
    )
    code, said, _ = compared(busy)
    assert (code, "1 slower beyond the noise. 2 too noisy to tell" in said) == (1, True)
    for found in busy["cases"][0]["providers"].values():
        for mode in ("forward", "forward_backward"):
            for metric in ("time", "host"):
                found[mode][metric].update(lower_us=1.0, upper_us=500.0)
    code, said, error = compared(busy)
    assert (code, error.count("\n")) == (2, 1)
    assert "results: all 12 times of" in error


def test_compare_trusts_no_noisy_yardstick() -> None:
    """What else became slower explains a slower time only where it was measured well."""
    before = scripted_pipeline("augment")
    after = copy.deepcopy(before)
    after["cases"][0]["providers"]["vi-simsiam"]["time"].update(
        median_us=1e6, lower_us=1e6, upper_us=1e6
    )
    after["cases"][0]["providers"]["lightly"]["time"]["upper_us"] *= 1.3
    (ours,) = (each for each in compare(before, after)[:2] if each.provider == "vi-simsiam")
    assert (ours.verdict, ours.regression) == ("too noisy to tell", False)


def test_targets_rest_on_no_noisy_time(result: dict[str, Any]) -> None:
    result["cases"][0].update(name="power_spherical 256x2048 2x2 float32")
    noisy = slower(result, 1.0, spread=0.25)
    eager, compiled, nowhere = targets_of(noisy)
    for target in (eager, compiled, nowhere):
        assert (target.met, target.noisy) == (None, True)
    assert eager.figure == "4.00 times"
    assert nowhere.figure == "slower in none of 2 comparisons; 2 more too noisy to tell"
    assert tables.targets_markdown([eager]).endswith("| 4.00 times | too noisy to tell |")
    # A quiet comparison that fails decides all the same.
    lost = slower(result, 2.1)
    for case in lost["cases"][:1]:
        case["providers"]["cpu"]["forward"]["time"].update(lower_us=1.0, upper_us=90.0)
    nowhere = targets_of(lost)[2]
    assert nowhere.met is False
    assert nowhere.figure.startswith("slower in 1 of 3, by 1.05 times at worst")
    assert nowhere.figure.endswith("; 1 more too noisy to tell")


def test_the_worst_quiet_case_is_a_targets_figure() -> None:
    def judged(*ratios: Ratio) -> tuple[str, bool | None, bool]:
        row = Row("a", "b", 1.0, lambda case: case["ratio"], shown="{:.1f} times")
        made = row([{"label": f"case {i}", "ratio": each} for i, each in enumerate(ratios)])
        return made.figure, made.met, made.noisy

    low, high = Ratio(0.5, False), Ratio(2.0, False)
    loud = Ratio(3.0, True)
    assert judged() == ("not measured", None, False)
    assert judged(low, high) == ("2.0 times (most of 2 cases: case 1)", False, False)
    assert judged(low, loud) == (
        "0.5 times (most of 1 case: case 0); 1 more too noisy to tell",
        None,
        True,
    )
    assert judged(high, loud)[1:] == (False, False)
    assert judged(loud) == ("3.0 times", None, True)


def test_tables_show_no_ratio_of_noisy_times(result: dict[str, Any]) -> None:
    noisy = slower(result, 1.0, spread=0.25)
    text = tables.loss_markdown(noisy)
    assert "| 64 x 512, float32 | 40.0 | 20.0 | 10.0 | too noisy to tell | 50% |" in text
    assert "lie 20 % of its median or more apart" in text
    assert "lie 20 % of" not in tables.loss_markdown(result)
    assert shown(tables.loss_case(noisy["cases"][0])).count("too noisy to tell") == 1
    made = scripted_pipeline("augment")
    made["cases"][0]["providers"]["lightly"]["time"]["upper_us"] *= 1.3
    text = tables.augment_markdown(made)
    assert "| 2x128, batch 64 | 12,000 | 1,000 | ImportError | too noisy to tell |" in text
    assert "4.00 x" in text


def test_pipeline_targets_rest_on_no_noisy_time() -> None:
    made = {name: scripted_pipeline(name) for name in ("augment", "step", "train")}
    for name, providers in (
        ("augment", {"lightly"}),
        ("step", {"step", "network alone, kernels"}),
        ("train", {"vi-simsiam"}),
    ):
        for case in made[name]["cases"]:
            for provider in providers & case["providers"].keys():
                case["providers"][provider]["time"]["upper_us"] *= 1.3
    found = [target for result in made.values() for target in targets_of(result)]
    assert [target.noisy for target in found] == [True] * 7 + [False], "memory is no time"
    assert [target.met for target in found] == [None] * 7 + [True]
