"""Several seeds at once, with a small program in the place of the training command."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vi_simsiam.errors import InputError
from vi_simsiam.experiments import seeds
from vi_simsiam.experiments.seeds import run_seeds

# Trains three steps of 50 ms; what it is told and does follows `vi-simsiam train`.
STAND_IN = """
    import json, os, pathlib, signal, sys, time
    words = sys.argv[1:]
    seed, out = int(words[words.index("--seed") + 1]), pathlib.Path(words[words.index("--out") + 1])
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    out.mkdir(exist_ok=True)
    with (out / "calls").open("a") as file:
        file.write(json.dumps([words, os.environ["OMP_NUM_THREADS"]]) + "\\n")
    checkpoint = out / "checkpoint.pt"
    step = int(checkpoint.read_text()) if "--resume" in words else 0
    checkpoint.write_text(str(step))
    print("starting", flush=True)
    if f"--fail={seed}" in words and "--resume" not in words:
        print("vi-simsiam: the loss is not finite at step 2\\n", file=sys.stderr)
        sys.exit(2)
    while step < 3 and not stop:
        time.sleep(0.05)
        if f"--wait={seed}" not in words or "--resume" in words:
            step += 1
            checkpoint.write_text(str(step))
    if stop:
        print(f"interrupted, saved at step {step}")
        sys.exit(130)
    state = {"state": "dead", "since": 2} if f"--dead={seed}" in words else {"state": "learning"}
    (out / "metrics.jsonl").write_text(json.dumps({"step": step, **state}) + "\\n")
    last = [word.partition("=")[2] for word in words if word.startswith("--last=")]
    if not last:
        (out / "knn.json").write_text(json.dumps({"top1": {"trained": 0.7 + 0.1 * seed}}))
    print(*last or ["done"])
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "stand_in.py"
    script.write_text(textwrap.dedent(STAND_IN))
    return [sys.executable, "-S", str(script)]


@pytest.fixture
def run(command: list[str], tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs seeds in tmp_path/out; returns the exit code and what was printed."""

    def call(*arguments: str, seeds: int | None = None, first: int = 0) -> tuple[int, str]:
        said = io.StringIO()
        console = Console(file=said, width=200)
        code = run_seeds(
            arguments, seeds, first, tmp_path / "out", command=command, console=console
        )
        return code, said.getvalue()

    return call


def calls(out: Path, seed: int) -> list[Any]:
    return [json.loads(line) for line in (out / f"seed-{seed}" / "calls").read_text().splitlines()]


def states(out: Path) -> list[str]:
    return [each["state"] for each in json.loads((out / "seeds.json").read_text())["runs"]]


def test_every_seed_is_a_run_of_its_own(
    run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeds, "cores", lambda: 9)
    out = tmp_path / "out"
    code, said = run(
        "--seeds",
        "2",
        "--lr",
        "0.1",
        "--seed=1",
        "--out",
        "elsewhere",
        "--evaluate",
        seeds=2,
        first=1,
    )
    assert code == 0
    for seed in (1, 2):
        expected = [
            "--lr",
            "0.1",
            "--evaluate",
            "--seed",
            str(seed),
            "--out",
            str(out / f"seed-{seed}"),
        ]
        assert calls(out, seed) == [[expected, "4"]], "nine cores for two runs are four each"
        assert (out / f"seed-{seed}.log").read_text() == "starting\ndone\n"
    content = json.loads((out / "seeds.json").read_text())
    assert [each["top1"] for each in content["runs"]] == [
        {"kNN": pytest.approx(0.8)},
        {"kNN": pytest.approx(0.9)},
    ]
    assert [each["metrics"] for each in content["runs"]] == [{"step": 3, "state": "learning"}] * 2
    assert content["runs_per_hour"] == pytest.approx(2 * 3600 / content["seconds"], rel=0.01)
    assert content["seconds"] > max(each["seconds"] for each in content["runs"]) > 0.15
    assert "seed 1: done in 0 s  kNN top-1 80.0 %" in said
    assert "kNN top-1: mean 85.0 %, standard deviation 7.1 % over 2 seeds" in said
    assert f"2 of 2 runs done, {content['runs_per_hour']:.3g} runs/hour" in said


def test_a_run_that_stopped_learning_is_named(run: Callable[..., tuple[int, str]]) -> None:
    code, said = run("--dead=0", seeds=2)
    assert code == 0
    assert "seed 0: done in 0 s  kNN top-1 70.0 %  dead since step 2\n" in said
    assert "seed 1: done in 0 s  kNN top-1 80.0 %\n" in said


@pytest.mark.parametrize(
    ("last", "line"),
    [
        ("dead since step 2: kappa is small", "dead since step 2: kappa is small"),
        ("not evaluated: no labels", "not evaluated: no labels  dead since step 2"),
    ],
)
def test_it_is_named_once_without_an_accuracy(
    run: Callable[..., tuple[int, str]], last: str, line: str
) -> None:
    _, said = run("--dead=0", f"--last={last}", seeds=1)
    assert f"seed 0: done in 0 s  {line}\n" in said


def test_runs_are_at_the_same_time(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    run(seeds=3)
    content = json.loads((tmp_path / "out" / "seeds.json").read_text())
    assert content["seconds"] < sum(each["seconds"] for each in content["runs"])


def test_a_seed_that_fails_leaves_the_others_alone(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, said = run("--fail=1", "--config", "mine.yaml", "--preset=demo", seeds=3)
    assert code == 1
    assert states(out) == ["done", "failed", "done"]
    assert calls(out, 1)[0][0][:3] == ["--fail=1", "--config", "mine.yaml"]
    assert (
        "seed 1: failed with exit code 2: vi-simsiam: the loss is not finite at step 2 (see" in said
    )
    assert "2 of 3 runs done" in said
    assert "--resume" in said
    assert "mean" not in said, "no mean of those that happened to survive"

    code, said = run("--resume")
    assert code == 0
    assert states(out) == ["done"] * 3
    assert len(calls(out, 0)) == 1, "what is finished stays finished"
    resumed = ["--fail=1", "--seed", "1", "--out", str(out / "seed-1"), "--resume"]
    assert calls(out, 1)[1][0] == resumed, (
        "with the settings that it began with, not those of the file today"
    )
    assert "runs/hour" not in said, "only a part of them was run"
    assert json.loads((out / "seeds.json").read_text())["runs_per_hour"] is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_reaches_all_and_all_go_on(
    run: Callable[..., tuple[int, str]], tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"

    def interrupt() -> None:
        written = (
            out / "seeds.json",
            out / "seed-2" / "calls",
        )  # in either order: the runs begin before they are noted
        while not (all(file.exists() for file in written) and states(out)[0] == "done"):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    threading.Thread(target=interrupt, daemon=True).start()
    code, said = run("--wait=1", "--wait=2", seeds=3)
    assert code == 130
    assert signal.getsignal(number) is handler
    assert states(out) == ["done", "interrupted", "interrupted"]
    assert "seed 1: interrupted  interrupted, saved at step 0" in said
    assert f"vi-simsiam train --out {out} --resume" in said

    (
        out / "seed-2" / "checkpoint.pt"
    ).unlink()  # as if it had been stopped before its first checkpoint
    (out / "seed-2" / "calls").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds, "cores", lambda: 2)
        threading.Thread(
            target=_interrupt_once_started, args=(out / "seed-2" / "calls", number), daemon=True
        ).start()
        assert run("--resume")[0] == 130
    assert states(out) == ["done", "done", "interrupted"]
    assert calls(out, 1)[-1][0][-1] == "--resume"
    assert calls(out, 2)[0][0][-1] == "--overwrite", "there was nothing to go on from"
    assert (out / "seed-1.log").read_text().count("starting") == 2, "the log goes on, too"


def _interrupt_once_started(file: Path, number: int) -> None:
    while not file.read_text():
        time.sleep(0.05)
    time.sleep(1)
    os.kill(os.getpid(), number)


@pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists(), reason="processes are looked up in /proc"
)
def test_a_killed_parent_knows_what_was_finished_and_what_still_runs(
    run: Callable[..., tuple[int, str]], command: list[str], tmp_path: Path
) -> None:
    """seeds.json is written when a run starts or ends, not only when all have ended."""
    out = tmp_path / "out"
    program = "from pathlib import Path; from vi_simsiam.experiments.seeds import run_seeds; " + (
        f"run_seeds(['--wait=1'], 2, 0, Path({str(out)!r}), command={command!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not ((out / "seeds.json").exists() and states(out)[0] == "done"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert states(out) == ["done", "running"]
    left = json.loads((out / "seeds.json").read_text())["runs"][1]["process"]
    try:
        with pytest.raises(InputError, match=f"seed 1 in .* is still running, as process {left}"):
            run("--resume")
    finally:
        os.kill(left, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while _runs(left):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert run("--resume")[0] == 0
    assert len(calls(out, 0)) == 1
    assert len(calls(out, 1)) == 2


def _runs(process: int) -> bool:
    """Whether it is there, and not only waiting for whoever adopted it to notice its end."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


def test_nothing_runs_on_after_an_error_of_our_own(
    run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write, written = tmp_path / "out", seeds.write_json, []

    def full(path: Path, content: dict[str, Any]) -> None:
        write(path, content)
        written.append(content)
        if len(written) == 2:  # when the first run has ended
            raise OSError("no space left")

    monkeypatch.setattr(seeds, "write_json", full)
    with pytest.raises(OSError, match="no space left"):
        run("--wait=1", seeds=2)
    assert "interrupted, saved at step 0" in (out / "seed-1.log").read_text()


def test_not_under_torchrun(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="seeds: not under torchrun"):
        run(seeds=2)


def test_folders_and_numbers_that_cannot_be_used(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for number in (0, -1):
        with pytest.raises(InputError, match=f"seeds: {number} is not accepted"):
            run(seeds=number)
    with pytest.raises(InputError, match="only one of them"):
        run("--resume", "--overwrite", seeds=2)
    with pytest.raises(InputError, match="holds no seeds.json"):
        run("--resume")
    assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        run("--overwrite", seeds=2)
    (out / "thesis.txt").unlink()
    assert run(seeds=2)[0] == 0
    with pytest.raises(InputError, match="already holds runs; say --resume"):
        run(seeds=2)
    with pytest.raises(InputError, match="started with 2 seeds, not 3"):
        run("--resume", seeds=3)
    assert run("--overwrite", seeds=2)[0] == 0
    assert "--overwrite" in calls(out, 0)[1][0]
    (out / "seeds.json").write_text('{"runs": [')
    with pytest.raises(InputError, match="seeds.json is damaged"):
        run("--resume")
