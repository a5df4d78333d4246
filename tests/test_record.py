"""`vi-simsiam bench record`: recipes, runs with a clock and caches of their own, and tables."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from experiment_cases import tiny_config

from vi_simsiam.benchmarks import record, record_run, report
from vi_simsiam.benchmarks.recipes import RECORDS, Change, Record
from vi_simsiam.cli import main
from vi_simsiam.config import flat, preset
from vi_simsiam.engine import processes
from vi_simsiam.errors import InputError, TrainingError
from vi_simsiam.experiments import progress

TINY = Record(
    "fashion-mini",
    base=tiny_config("fashion-mini", images=40),
    threshold=0.6,
    every=1,
    changes=(
        Change("larger rate", {"lr": 0.04}),
        Change("local views", {"augment.local_views": 2, "augment.local_size": 8}),
    ),
    val_images=16,
)
# Seed 2 does not learn, and "larger rate" is twice as fast; seed 3 fails and seed 4 waits.
STAND_IN = """
    import json, os, pathlib, sys, time
    spec = json.loads(pathlib.Path(sys.argv[1]).read_text())
    config, run = spec["config"], pathlib.Path(spec["folder"])
    caches = {name: value for name, value in os.environ.items() if "CACHE" in name}
    with open(os.environ["SEEN"], "a") as file:
        line = {"seed": config["seed"], "lr": config["lr"], "offline": config["offline"]}
        line |= {"elapsed": time.monotonic() - spec["started"]}
        line |= {name: spec[name] for name in ("every", "val_images")}
        file.write(json.dumps({**line, "caches": caches, "pid": os.getpid()}) + "\\n")
    time.sleep(0.05)
    if config["seed"] == 3:
        sys.exit("no memory left")
    while config["seed"] == 4:
        time.sleep(0.02)
    run.mkdir()
    for epoch, accuracy in enumerate((0.3, 0.3 if config["seed"] == 2 else 0.7, 0.5), 1):
        values = (accuracy, epoch, (10 + config["seed"]) * epoch * 0.02 / config["lr"], 5 * epoch)
        names = ("knn200", "knn200_epoch", "knn200_seconds", "step")
        with open(run / "progress.jsonl", "a") as file:
            file.write(json.dumps(dict(zip(names, values))) + "\\n")
"""

PROVENANCE = {
    "date": "2026-11-29", "commit": "abc", "processor": "a processor", "driver": None,
    "versions": {"torch": "2.14.1"},
}  # fmt: skip


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lines of the stand-ins that run in place of trainings."""
    script = tmp_path / "stand_in.py"
    script.write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setattr(record, "_WORKER", (sys.executable, "-S", str(script)))
    monkeypatch.setattr(processes, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(record, "RECORDS", {**RECORDS, "fashion-mini": TINY})
    monkeypatch.setattr(
        record, "provenance", lambda device: {**PROVENANCE, "device": f"{device.type}"}
    )
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    return tmp_path / "seen"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def options(tmp_path: Path, **changed: Any) -> record.Options:
    given = {"device": "cpu", "seeds": 1, "out": tmp_path / "out", **changed}
    return record.Options(**given)


def row(text: str, title: str) -> list[str]:
    """The cells of the row of a Markdown table."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
    return line.strip("| ").split(" | ")


def test_rows_have_all_changes_up_to_their_own() -> None:
    base, faster, local = (TINY.config(row) for row in range(3))
    assert base == TINY.base
    assert faster == dataclasses.replace(base, lr=0.04)
    views = dataclasses.replace(base.augment, local_views=2, local_size=8)
    assert local == dataclasses.replace(faster, augment=views)
    assert TINY.settings(2) == {"lr": 0.04, "augment.local_views": 2, "augment.local_size": 8}


def test_the_demo_is_the_last_recipe_of_its_record() -> None:
    found = RECORDS["fashion-mini"]
    assert found.config(len(found.changes)) == preset("demo")


@pytest.mark.parametrize("name", RECORDS)
def test_recipes_change_no_task(name: str) -> None:
    found = RECORDS[name]
    assert 0 < found.threshold < 1
    assert len(found.rows) > 1
    fixed = {"data", "images", "held_out", "init", "model.pretrained"}
    base = flat(found.base.to_dict())
    assert (base["init"], base["model.pretrained"], base["held_out"]) == (None, False, 0)
    for number in range(1, len(found.rows)):
        now = flat(found.config(number).to_dict())
        before = flat(found.config(number - 1).to_dict())
        changed = {field for field in now if now[field] != before[field]}
        assert changed
        assert not changed & fixed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((Change("a", {"learning_rate": 1}),), "changes: 'learning_rate' is none of method"),
        ((Change("a", {"augment.crop_scales": 1}),), "did you mean 'augment.crop_scale'"),
        ((Change("a", {"augment": {}}),), "changes: 'augment' is none of"),
        ((Change("a", {"images": 9}),), "changes: 'images' is fixed"),
        ((Change("a", {"model.pretrained": True}),), "'model.pretrained' is fixed"),
        ((Change("a", {"epochs": 0}),), "epochs: 0 is not accepted"),
        ((Change("a"), Change("a")), "two rows of fashion-mini are called 'a'"),
    ],
)
def test_wrong_changes_are_refused(changes: tuple[Change, ...], message: str) -> None:
    with pytest.raises(InputError) as error:
        dataclasses.replace(TINY, changes=changes)
    assert message in str(error.value)


def test_quartiles_beside_infinities() -> None:
    inf = math.inf
    assert record.quartiles([3, 1, 2, 5, 4]) == (2, 3, 4)
    assert record.quartiles([1, 2]) == (1.25, 1.5, 1.75)
    assert record.quartiles([7]) == (7, 7, 7)
    assert record.quartiles([inf, 1, 2, 3, inf]) == (2, 3, inf)
    assert record.quartiles([1, inf]) == (inf, inf, inf)
    assert record.quartiles([inf, 1, inf]) == (inf, inf, inf)
    assert record.quartiles([inf] * 4) == (inf, inf, inf)


def test_runs_are_alone_with_caches_of_their_own(
    seen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launch, launched = record._Run.launch, list[record._Run]()

    def launch_alone(run: record._Run) -> None:
        assert not any(other.running for other in launched)
        launched.append(run)
        launch(run)

    monkeypatch.setattr(record._Run, "launch", launch_alone)
    before = time.monotonic()
    record.run(options(tmp_path, seeds=2, change=("base", "1")))
    found = lines(seen)
    assert all(0 < line["elapsed"] < time.monotonic() - before for line in found)
    assert all((line["every"], line["val_images"]) == (1, 16) for line in found)
    assert [(line["seed"], line["lr"]) for line in found] == [
        (0, 0.02), (0, 0.04), (1, 0.02), (1, 0.04),
    ]  # fmt: skip
    assert all(line["offline"] for line in found)
    caches = [line["caches"][name] for line in found for name in record._CACHES]
    assert len(set(caches)) == 4 * len(record._CACHES)
    assert not any(Path(cache).parents[1].exists() for cache in caches), "removed at the end"
    printed = capsys.readouterr().out
    assert "seed 1, larger rate: 60.0 % after 11.0 s; at the end 50.0 % after 16.5 s" in printed


def measured(tmp_path: Path, **changed: Any) -> list[int]:
    """Seeds of the base in the result file after a command."""
    (case,) = record.run(options(tmp_path, change=("0",), **changed))["cases"]
    return [run["seed"] for run in case["runs"]]


def test_further_seeds_are_added_to_those_of_the_same_code(seen: Path, tmp_path: Path) -> None:
    assert measured(tmp_path) == [0]
    assert measured(tmp_path, seeds=3) == [0, 1, 2]
    assert [line["seed"] for line in lines(seen)] == [0, 1, 2]
    assert measured(tmp_path, first_seed=5) == [0, 1, 2, 5]


@pytest.mark.parametrize(
    "changed", ["recipe", "data", "commit", "device", "processor", "driver", "versions"]
)
def test_runs_of_other_code_or_another_machine_are_not_pooled(
    seen: Path, tmp_path: Path, changed: str
) -> None:
    assert measured(tmp_path) == [0]
    path = tmp_path / "out" / "cpu" / "record.json"
    content = json.loads(path.read_text())
    (case,) = content["cases"]
    case[changed] = {"other": "1"} if isinstance(case[changed], dict) else "other"
    path.write_text(json.dumps(content))
    assert measured(tmp_path, first_seed=1) == [1]


def test_uncommitted_code_may_have_changed_between_two_commands(
    seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROVENANCE, "commit", "abc+changes")
    assert measured(tmp_path) == [0]
    assert measured(tmp_path, first_seed=1) == [1]


def test_code_that_changes_during_a_run_ends_the_benchmark(
    seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measured(tmp_path) == [0]
    launch = record._Run.launch

    def launch_and_commit(run: record._Run) -> None:
        launch(run)
        monkeypatch.setitem(PROVENANCE, "commit", "def")

    monkeypatch.setattr(record._Run, "launch", launch_and_commit)
    with pytest.raises(TrainingError, match="seed 1, base: the code changed from abc to def"):
        measured(tmp_path, seeds=3)
    content = json.loads((tmp_path / "out" / "cpu" / "record.json").read_text())
    assert [run["seed"] for run in content["cases"][0]["runs"]] == [0]


def test_a_failed_run_ends_the_benchmark_and_the_others_are_kept(
    seen: Path, tmp_path: Path
) -> None:
    message = "seed 3, base: failed with exit code 1: no memory left"
    with pytest.raises(TrainingError, match=message):
        record.run(options(tmp_path, first_seed=2, seeds=2, change=("0", "1")))
    assert [line["seed"] for line in lines(seen)] == [2, 2, 3], "none is started after it"
    content = json.loads((tmp_path / "out" / "cpu" / "record.json").read_text())
    assert [run["seed"] for run in content["cases"][0]["runs"]] == [2]


def test_an_interruption_ends_the_run(
    seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = record._Run.launch

    def launch_and_interrupt(run: record._Run) -> None:
        launch(run)
        end = time.monotonic() + 20
        while not (seen.exists() and seen.stat().st_size) and time.monotonic() < end:
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(record._Run, "launch", launch_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        record.run(options(tmp_path, first_seed=4, seeds=2, change=("0",)))
    (line,) = lines(seen)
    with pytest.raises(ProcessLookupError):
        os.kill(line["pid"], 0)


def test_the_table_has_medians_over_all_seeds_and_what_is_not_measured(
    seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        record,
        "RECORDS",
        {
            "fashion-mini": dataclasses.replace(TINY, published="by X"),
            **{name: RECORDS[name] for name in ("cifar10-90",)},
        },
    )
    gains = []
    record.run(options(tmp_path, seeds=2, change=("base",)))
    for seeds in (1, 2, 3):  # too few; apart; overlapping, since one seed does not reach it
        monkeypatch.setattr(record, "_SEEDS", max(2, seeds))
        result = record.run(options(tmp_path, seeds=seeds, change=("base", "larger rate")))
        gains.append(row(record.markdown_tables(result), "larger rate")[-1])
    assert gains == ["-", "2.00", "too noisy to tell"]
    section = "<!-- bench: record out/{}/record.json -->\n<!-- /bench -->"
    assert "Not measured." in report.fill(section.format("GPU"), tmp_path)
    text = report.fill(section.format("cpu"), tmp_path)
    base = "22.0 (21.0 to not reached)"
    accuracies = "50.0 %"
    assert "| fashion-mini | seconds to 60.0 %, median (quartiles) |" in text
    assert row(text, "base") == ["base", base, "2 of 3", accuracies, "-"]
    faster = "11.0 (10.5 to not reached)"
    assert row(text, "larger rate")[1:4] == [faster, "2 of 3", accuracies]
    assert row(text, "local views") == ["local views", "not measured", "-", "-", "-"]
    assert "Measured by others, on other hardware: by X." in text
    assert "Data: fashion-mini. a processor; PyTorch 2.14.1; 2026-11-29." in text
    assert "Not measured on this device: cifar10-90." in text
    monkeypatch.setattr(record, "_SEEDS", 1)
    for case in result["cases"]:
        case["commit"] = "abc+changes"
    assert row(record.markdown_tables(result), "larger rate")[-1] == "-"
    monkeypatch.setitem(PROVENANCE, "processor", "another")
    result = record.run(options(tmp_path, change=("1",)))
    assert row(record.markdown_tables(result), "larger rate")[-1] == "-"


def test_a_median_that_is_not_reached_has_no_gain(
    seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_SEEDS", 1)
    result = record.run(options(tmp_path, first_seed=2, change=("0", "1")))
    text = record.markdown_tables(result)
    assert row(text, "base")[1:3] == ["not reached", "0 of 1"]
    assert row(text, "larger rate")[-1] == "-"


def test_a_row_of_another_recipe_is_not_shown(
    seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = record.run(options(tmp_path, change=("0", "1")))
    now = dataclasses.replace(TINY, changes=(Change("larger rate", {"lr": 0.05}),))
    monkeypatch.setattr(record, "RECORDS", {"fashion-mini": now})
    text = record.markdown_tables(result)
    assert row(text, "base")[1] != "not measured"
    assert row(text, "larger rate")[1] == "not measured"
    other = dataclasses.replace(now, threshold=0.2)
    monkeypatch.setattr(record, "RECORDS", {"fashion-mini": other})
    assert row(record.markdown_tables(result), "base")[1] == "10.0", "the first epoch"


def test_a_run_measures_all_images_by_the_clock_it_is_given(
    image_folder: Path, tmp_path: Path, small_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, extract = [], progress.extract

    def counting(backbone: Any, source: Any, **named: Any) -> Any:
        numbers.append(len(source))
        return extract(backbone, source, **named)

    monkeypatch.setattr(progress, "extract", counting)
    monkeypatch.setattr(progress, "_MOST", (20, 8))
    config = tiny_config(f"folder:{image_folder}", epochs=3)
    folder, spec = tmp_path / "run", tmp_path / "spec.json"
    content = {"every": 2, "val_images": 10, "folder": str(folder), "config": config.to_dict()}
    before = time.monotonic()
    spec.write_text(json.dumps({**content, "started": before - 1000}))
    assert record_run.main(spec) == 0
    assert numbers == [40, 10] * 2
    first, last = progress.read_progress(folder)
    assert (first["knn200_epoch"], last["knn200_epoch"]) == (2, 3)
    assert 1000 < first["knn200_seconds"] < last["knn200_seconds"]
    assert last["knn200_seconds"] < 1000 + time.monotonic() - before
    assert record_run.main(spec) == 2, "the folder holds a run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--record fashion", "record: 'fashion' is none of imagenette-75"),
        ("--change fast", "change: 'fast' is none of base"),
        ("--change 9", "change: '9' is none of base"),
        ("--seeds 0", "seeds: 0"),
        ("--first-seed -1", "first_seed: -1"),
        ("--data {unlabelled}", "has no labels"),
        ("--device cuda:99", "device: 'cuda:99' is not here"),
    ],
)
def test_unusable_options(
    arguments: str, message: str, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments.format(unlabelled=image_folder / "train" / "dark").split()
    assert main(["bench", "record", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
