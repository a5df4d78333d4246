"""Comparisons and targets of result files; noisy times get no verdict."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_cases import MODES, scale, scripted_pipeline, scripted_result, slower

from vi_simsiam.benchmarks.cases import Case
from vi_simsiam.benchmarks.compare import compare
from vi_simsiam.benchmarks.results import OURS, Ratio
from vi_simsiam.benchmarks.targets import Row, Target, targets_for
from vi_simsiam.cli import main

IMAGENETTE = "200 epochs of ImageNette-128, 2x128, batch 64"


@pytest.fixture
def result() -> dict[str, Any]:
    return scripted_result()


def targets_of(result: dict[str, Any], device_type: str | None = None) -> list[Target]:
    kind = device_type or result["device_type"]
    return targets_for(result["benchmark"], kind, result["cases"])


def compared(folder: Path, before: dict[str, Any], after: dict[str, Any] | str) -> int:
    """Exit code of `bench compare` for two results; the second may be any text."""
    old, new = folder / "before.json", folder / "after.json"
    old.write_text(json.dumps(before))
    new.write_text(after if isinstance(after, str) else json.dumps(after))
    return main(["bench", "compare", str(old), str(new)])


@pytest.mark.parametrize(
    ("change", "code"),
    [
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
    ("factor", "yardstick", "upper", "verdict"),
    [
        (1.5, 1.0, 1.0, "slower"),
        (1.5, 1.6, 1.0, ""),
        (1.5, 0.5, 1.0, "slower"),
        (0.5, 1.0, 1.0, "faster"),
        (1.5, 1.0, 1.3, "too noisy to tell"),
    ],
)
def test_compare_allows_what_a_quiet_yardstick_lost(
    factor: float, yardstick: float, upper: float, verdict: str
) -> None:
    before = scripted_pipeline("augment")
    after = copy.deepcopy(before)
    providers = after["cases"][0]["providers"]
    scale(providers["vi-simsiam"]["time"], factor)
    scale(providers["lightly"]["time"], yardstick)
    providers["lightly"]["time"]["upper_us"] *= upper
    found = next(each for each in compare(before, after) if each.provider == "vi-simsiam")
    assert found.verdict == verdict


@pytest.mark.parametrize("benchmark", ["multiview_loss", "augment"])
def test_compare_calls_a_lost_result_a_regression(result: dict[str, Any], benchmark: str) -> None:
    before = result if benchmark == "multiview_loss" else scripted_pipeline(benchmark)
    after = copy.deepcopy(before)
    after["cases"][0]["providers"]["lightly" if benchmark == "augment" else "cpu"].update(
        correct=False, failure="inaccurate: 1e-2"
    )
    assert {each.verdict for each in compare(before, after) if each.regression} == {
        "inaccurate: 1e-2"
    }
    assert not any(change.regression for change in compare(after, before)), "a new result is none"


_HEAD = (
    '{"benchmark": "multiview_loss", "device_type": "cpu", "device": "cpu", "processor": "some", '
    '"date": "today", "versions": {}, "cases": '
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[1]", "is not a dict"),
        ('{"benchmark": "step"}', "holds benchmark 'step', not 'multiview_loss'"),
        (_HEAD + '[{"batch": 3}]}', "lacks the key 'name'"),
        (_HEAD + "3}", "'cases' of dict is not a list"),
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


def test_compare_gives_noisy_times_no_verdict(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three times as slow, but on a busy machine: counted, but not part of the exit code."""
    busy = slower(result, 3.0, spread=0.25)
    busy["device"] = "another"
    assert compared(tmp_path, result, busy) == 0
    printed = capsys.readouterr().out
    assert "12 times compared; 0 slower beyond the noise. 2 too noisy to tell" in printed
    assert f"different device: {result['device']} and another" in printed
    providers = busy["cases"][0]["providers"]
    scale(providers["eager"]["forward"]["time"], 10)
    assert compared(tmp_path, result, busy) == 1
    assert "1 slower beyond the noise. 2 too noisy to tell" in capsys.readouterr().out
    for found in providers.values():
        for mode in MODES:
            for metric in ("time", "host"):
                found[mode][metric].update(lower_us=1.0, upper_us=500.0)
    assert compared(tmp_path, result, busy) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "results: all 12 times of" in error


def test_targets_of_the_loss(result: dict[str, Any]) -> None:
    """Measured or not, met or not; a noisy time decides nothing, a quiet one that fails does."""
    unmeasured = [t for kind in ("cuda", "cpu") for t in targets_for("multiview_loss", kind, [])]
    assert {(each.figure, each.met) for each in unmeasured} == {("not measured", "-")}
    result["cases"][0].update(name="power_spherical 256x2048 2x2 float32")
    assert [(each.figure, each.met) for each in targets_of(result)] == [
        ("4.00 times", "yes"),
        ("2.00 times", "yes"),
        ("slower in none of 4 comparisons", "yes"),
    ]
    nowhere = targets_of(slower(result, 2.1))[2]
    assert nowhere.met == "no"
    assert nowhere.figure.startswith("slower in 2 of 4, by 1.05 times at worst (64 x 512, float32")
    noisy = targets_of(slower(result, 1.0, spread=0.25))
    assert [target.met for target in noisy] == ["too noisy to tell"] * 3
    assert noisy[2].figure == "slower in none of 2 comparisons; 2 more too noisy to tell"
    lost = slower(result, 2.1)
    lost["cases"][0]["providers"]["cpu"]["forward"]["time"].update(lower_us=1.0, upper_us=90.0)
    nowhere = targets_of(lost)[2]
    assert nowhere.met == "no"
    assert nowhere.figure.startswith("slower in 1 of 3, by 1.05 times at worst")
    assert nowhere.figure.endswith("; 1 more too noisy to tell")


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
        ("1.05 times", "yes"),
        ("not measured", "-"),
        ("2.00 times", "yes"),
        ("2.00 times", "no"),
        ("2.00 times", "no"),
        ("4.00 times", "no"),
        ("slower in none of 8 comparisons", "yes"),
        ("1.20 times (most of 2 cases: 64 x 2048, bfloat16)", "no"),
    ]
    cases[0]["copy"]["forward_backward"].update(lower_us=1.0, upper_us=100.0)
    assert targets_for("multiview_loss", "cuda", cases)[0].met == "too noisy to tell"


def test_the_worst_quiet_case_is_a_targets_figure() -> None:
    def judged(*ratios: Ratio) -> tuple[str, str]:
        row = Row("a", "b", 1.0, lambda case: case["ratio"], shown="{:.1f} times")
        made = row([{"label": f"case {i}", "ratio": each} for i, each in enumerate(ratios)])
        return made.figure, made.met

    low, high, loud = Ratio(0.5, False), Ratio(2.0, False), Ratio(3.0, True)
    assert judged() == ("not measured", "-")
    assert judged(low, high) == ("2.0 times (most of 2 cases: case 1)", "no")
    one_quiet = "0.5 times (most of 1 case: case 0); 1 more too noisy to tell"
    assert judged(low, loud) == (one_quiet, "too noisy to tell")
    assert judged(high, loud)[1] == "no"
    assert judged(loud) == ("3.0 times", "too noisy to tell")


def test_targets_of_the_pipelines() -> None:
    made = {name: scripted_pipeline(name) for name in ("augment", "step", "train")}
    found = [target for result in made.values() for target in targets_of(result)]
    assert {target.what: (target.figure, target.met) for target in found} == {
        "views/s at 2x128, batch 64, against lightly's": ("12.0 times", "yes"),
        "views/s at 2x224, batch 64, against lightly's": ("4.0 times", "no"),
        "training step against the same network's forward and backward alone, same kernels": (
            "1.10 times (most of 2 cases: simsiam, 2x224, batch 64)",
            "no",
        ),
        "forward and backward of the network alone, with our kernels, against torch.compile": (
            "1.25 times (vi-simsiam, 2x128, batch 64; no figure for 1 case more)",
            "no",
        ),
        "exposed augmentation": ("1.9% (most of 2 cases: vi-simsiam, 2x128, batch 64)", "yes"),
        f"{IMAGENETTE}: training": ("110 s", "no"),
        f"{IMAGENETTE}: cold start and kNN evaluation": ("50 s", "no"),
        f"{IMAGENETTE}: peak memory beside the images": ("2.00 GB", "yes"),
    }
    (on_cpu,) = targets_of(made["train"], "cpu")
    assert on_cpu.met == "no"
    assert on_cpu.figure == "1.60 times (400 and 250; 200 epochs of 9,469 images)"
    shorter = copy.deepcopy(made["train"]["cases"][1]) | {"images": 64}
    shorter["providers"]["lightly"]["time"]["median_us"] /= 10
    made["train"]["cases"].append(shorter)
    assert targets_of(made["train"], "cpu") == [on_cpu], "of several trainings the longest counts"
    for result in made.values():
        for case in result["cases"]:
            for name in ("lightly", "step", "network alone, kernels", "vi-simsiam"):
                if name in case["providers"] and (result["benchmark"], name) != ("augment", OURS):
                    case["providers"][name]["time"]["upper_us"] *= 1.3
    found = [target for result in made.values() for target in targets_of(result)]
    assert [each.met for each in found] == ["too noisy to tell"] * 7 + ["yes"], "memory is no time"
    for case in made["train"]["cases"]:
        case["images"] = 640
    assert {target.met for target in targets_of(made["train"])} == {"-"}, "a part of ImageNette"
