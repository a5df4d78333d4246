"""Comparisons of result files, and noisy times, which get no verdict anywhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from benchmark_cases import compared, scripted_pipeline, scripted_result, shown, slower

from vi_simsiam.benchmarks import multiview_loss, tables
from vi_simsiam.benchmarks.compare import compare
from vi_simsiam.benchmarks.ratios import Ratio
from vi_simsiam.benchmarks.targets import Row, targets_of
from vi_simsiam.cli import main


@pytest.fixture
def result() -> dict[str, Any]:
    return scripted_result()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"factor": 1.0}, 0),
        ({"factor": 0.5}, 0),
        ({"factor": 1.015}, 0),
        ({"factor": 1.05}, 1),
        ({"factor": 1.05, "spread": 0.06}, 0),
        ({"factor": 1.10, "spread": 0.06}, 1),
        ({"factor": 1.20, "copied": 1.19}, 0),
        ({"factor": 1.20, "copied": 0.5}, 1),
    ],
    ids=str,
)
def test_compare_judges_by_the_recorded_noise(
    result: dict[str, Any],
    change: dict[str, float],
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert compared(tmp_path, result, slower(result, **change)) == code
    printed = capsys.readouterr().out
    assert f"{2 * code} slower beyond the noise" in printed
    assert ("slower │" in printed) == bool(code)


@pytest.mark.parametrize(
    ("factor", "yardstick", "regressions"),
    [(1.0, 1.0, 0), (1.5, 1.0, 1), (1.5, 1.6, 0), (1.5, 0.5, 1)],
)
def test_compare_allows_what_the_yardstick_lost(
    factor: float, yardstick: float, regressions: int
) -> None:
    before = scripted_pipeline("augment")
    after = copy.deepcopy(before)
    case = after["cases"][0]
    for name, times in (("vi-simsiam", factor), (case["yardstick"], yardstick)):
        for quartile in ("median_us", "lower_us", "upper_us"):
            case["providers"][name]["time"][quartile] *= times
    found = [change for change in compare(before, after) if change.provider == "vi-simsiam"]
    assert sum(change.regression for change in found) == regressions


@pytest.mark.parametrize(
    ("benchmark", "provider"), [("multiview_loss", "cpu"), ("augment", "vi-simsiam")]
)
def test_compare_calls_a_lost_result_a_regression(
    result: dict[str, Any], benchmark: str, provider: str
) -> None:
    before = result if benchmark == "multiview_loss" else scripted_pipeline(benchmark)
    after = copy.deepcopy(before)
    after["cases"][0]["providers"][provider].update(correct=False, failure="inaccurate: 1e-2")
    changes = [change for change in compare(before, after) if change.regression]
    assert {(change.provider, change.verdict) for change in changes} == {
        (provider, "inaccurate: 1e-2")
    }
    assert not any(change.regression for change in compare(after, before)), "a new result is none"


_HEAD = '{"benchmark": "multiview_loss", "device_type": "cpu", "cases": '


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON file"),
        ("[1]", "holds benchmark None, not 'multiview_loss'"),
        ('{"benchmark": "accuracy"}', "holds benchmark 'accuracy'"),
        ('{"benchmark": "multiview_loss", "cases": [{"batch": 3}]}', "is of an older version"),
        (_HEAD + '[{"batch": 3}]}', "lacks what is compared ('name')"),
        (_HEAD + "3}", "lacks what is compared"),
        (_HEAD + "[]}", "no timed case in common"),
    ],
)
def test_compare_names_bad_input_in_one_line(
    result: dict[str, Any],
    content: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert compared(tmp_path, result, content) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_compare_needs_two_files_of_one_benchmark(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = scripted_pipeline("step")
    assert compared(tmp_path, step, step) == 0
    assert compared(tmp_path, scripted_pipeline("augment"), step) == 2
    assert "holds benchmark 'step', not 'augment'" in capsys.readouterr().err
    assert main(["bench", "compare", str(tmp_path / "before.json"), str(tmp_path / "none")]) == 2
    assert "cannot be read (No such file or directory)" in capsys.readouterr().err


def test_compare_gives_noisy_times_no_verdict(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three times as slow, but on a busy machine: counted, but not part of the exit code."""
    busy = slower(result, 3.0, spread=0.25)
    assert compared(tmp_path, result, busy) == 0
    printed = capsys.readouterr().out
    assert "12 times compared; 0 slower beyond the noise. 2 too noisy to tell" in printed
    noisy = [change.verdict for change in compare(result, busy) if change.noisy]
    assert noisy == ["too noisy to tell"] * 2
    providers = busy["cases"][0]["providers"]
    slow = dict.fromkeys(("median_us", "lower_us", "upper_us"), 400.0)
    providers["eager"]["forward"]["time"].update(slow)
    assert compared(tmp_path, result, busy) == 1
    assert "1 slower beyond the noise. 2 too noisy to tell" in capsys.readouterr().out
    for found in providers.values():
        for mode in ("forward", "forward_backward"):
            for metric in ("time", "host"):
                found[mode][metric].update(lower_us=1.0, upper_us=500.0)
    assert compared(tmp_path, result, busy) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "results: all 12 times of" in error


def test_compare_trusts_no_noisy_yardstick() -> None:
    """A slower yardstick explains a slower time only where it was measured well."""
    before = scripted_pipeline("augment")
    after = copy.deepcopy(before)
    providers = after["cases"][0]["providers"]
    slow = dict.fromkeys(("median_us", "lower_us", "upper_us"), 1e6)
    providers["vi-simsiam"]["time"].update(slow)
    providers["lightly"]["time"]["upper_us"] *= 1.3
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
    text = multiview_loss.loss_markdown(noisy)
    assert "| 64 x 512, float32 | 40.0 | 20.0 | 10.0 | too noisy to tell | 50% |" in text
    assert "lie 20 % of its median or more apart" in text
    assert "lie 20 % of" not in multiview_loss.loss_markdown(result)
    assert shown(multiview_loss.loss_case(noisy["cases"][0])).count("too noisy to tell") == 1
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
