"""Several seeds at once, with a small program in place of the training command."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
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

from vi_simsiam.engine.checkpoint import Checkpoint
from vi_simsiam.errors import InputError, RunWarning
from vi_simsiam.experiments import seeds
from vi_simsiam.experiments.seeds import run_seeds

# Trains three steps of 50 ms, with the options and output of `vi-simsiam train`.
STAND_IN = """
    import json, os, pathlib, signal, sys, time
    words = sys.argv[1:]
    seed, out = int(words[words.index("--seed") + 1]), pathlib.Path(words[words.index("--out") + 1])
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    out.mkdir(exist_ok=True)
    assert (out.parent / "seeds.json").exists(), "a kill now loses nothing"
    with (out / "calls").open("a") as file:
        file.write(json.dumps([words, os.environ["OMP_NUM_THREADS"]]) + "\\n")
    checkpoint = out / "checkpoint.pt"
    step = int(checkpoint.read_text()) if checkpoint.exists() else 0
    checkpoint.write_text(str(step))
    print("starting", flush=True)
    if f"--fail={seed}" in words and "--resume" not in words:
        print("vi-simsiam: the loss is not finite at step 2\\n", file=sys.stderr)
        sys.exit(2)
    while step < 3 and not stop:
        time.sleep(0.05)
        if f"--wait={seed}" not in words or words[-1] == "--resume":
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

Runs = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds are trained by the stand-in."""
    script = tmp_path / "stand_in.py"
    script.write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setattr(seeds, "_TRAIN", (sys.executable, "-S", str(script)))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def run(out: Path) -> Runs:
    """Runs seeds in `out`; returns the exit code and the output."""

    def call(*arguments: str, seeds: int | None = None, first: int = 0) -> tuple[int, str]:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            words = [word for word in arguments if word != "--resume"]
            code = run_seeds(words, seeds, first, out, resume="--resume" in arguments)
        return code, printed.getvalue()

    return call


def calls(out: Path, seed: int) -> list[Any]:
    """Words and number of threads of every process of a run."""
    return [json.loads(line) for line in (out / f"seed-{seed}" / "calls").read_text().splitlines()]


def states(out: Path) -> list[str]:
    return [each["state"] for each in json.loads((out / "seeds.json").read_text())["runs"]]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def first_is_done(out: Path) -> bool:
    return (out / "seeds.json").exists() and states(out)[0] == "done"


def test_every_seed_is_a_run_of_its_own(
    run: Runs, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeds, "cores", lambda: 9)
    replaced = ["--seeds", "2", "--seed=1", "--out", "elsewhere"]
    code, text = run("--lr", "0.1", *replaced, "--evaluate", seeds=2, first=1)
    assert code == 0
    for seed in (1, 2):
        own = ["--seed", str(seed), "--out", str(out / f"seed-{seed}")]
        assert calls(out, seed) == [[["--lr", "0.1", "--evaluate", *own], "4"]], "4 of 9 cores each"
        assert (out / f"seed-{seed}.log").read_text() == "starting\ndone\n"
    content = json.loads((out / "seeds.json").read_text())
    assert [each["top1"]["kNN"] for each in content["runs"]] == pytest.approx([0.8, 0.9])
    assert [each["metrics"] for each in content["runs"]] == [{"step": 3, "state": "learning"}] * 2
    assert all(0.15 < each["seconds"] < content["seconds"] for each in content["runs"])
    assert content["runs_per_hour"] == pytest.approx(2 * 3600 / content["seconds"], rel=0.01)
    assert re.search(r"^seed 1: done in \d s  kNN top-1 80.0 %$", text, re.MULTILINE)
    assert "kNN top-1: mean 85.0 %, standard deviation 7.1 % over 2 seeds" in text
    assert f"2 of 2 runs done, {content['runs_per_hour']:.3g} runs/hour" in text


def test_a_run_that_stopped_learning_is_named_once(run: Runs) -> None:
    for last, line in (
        (["--last=dead since step 2: kappa is small"], "dead since step 2: kappa is small"),
        (["--last=not evaluated: no labels"], "not evaluated: no labels  dead since step 2"),
        ([], "kNN top-1 70.0 %  dead since step 2"),
    ):
        code, text = run("--dead=0", *last, "--overwrite", seeds=1)
        assert code == 0
        assert re.search(rf"^seed 0: done in \d s  {line}$", text, re.MULTILINE)


def test_an_accuracy_of_earlier_weights_is_left_out(run: Runs, out: Path) -> None:
    assert run(seeds=2)[0] == 0
    for seed, step in ((0, 3), (1, 2)):
        Checkpoint(3, 0.0, 8, {}).save(out / f"seed-{seed}" / "checkpoint-00000003.safetensors")
        found = {"top1": {"trained": 0.7}, "step": step}
        (out / f"seed-{seed}" / "knn.json").write_text(json.dumps(found))
    with pytest.warns(RunWarning, match="seed-1/knn.json is left out: it is of step 2"):
        assert run("--resume")[0] == 0
    content = json.loads((out / "seeds.json").read_text())
    assert [each["top1"] for each in content["runs"]] == [{"kNN": 0.7}, {}]


def test_a_failed_seed_does_not_affect_the_others(run: Runs, out: Path) -> None:
    code, text = run("--fail=1", "--config", "mine.yaml", "--preset=demo", seeds=3)
    assert code == 1
    assert states(out) == ["done", "failed", "done"]
    assert calls(out, 1)[0][0][:3] == ["--fail=1", "--config", "mine.yaml"]
    reason = "vi-simsiam: the loss is not finite at step 2"
    assert f"seed 1: failed with exit code 2: {reason} (see {out / 'seed-1.log'})" in text
    assert "2 of 3 runs done, " in text
    assert text.endswith(f"; go on with: vi-simsiam train --out {out} --resume\n")
    assert "mean" not in text, "the mean of the remaining runs would be biased"

    code, text = run("--resume")
    assert code == 0
    assert states(out) == ["done"] * 3
    assert len(calls(out, 0)) == 1
    resumed = ["--fail=1", "--seed", "1", "--out", str(out / "seed-1"), "--resume"]
    assert calls(out, 1)[1][0] == resumed, "with its own settings, not those of the file today"
    assert "runs/hour" not in text, "this session ran only a part"
    assert json.loads((out / "seeds.json").read_text())["runs_per_hour"] is None


def test_an_interruption_reaches_all_and_all_can_continue(
    run: Runs, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = out / "seed-2" / "calls"

    def interrupt(number: signal.Signals, condition: Callable[[], object]) -> None:
        def wait() -> None:
            wait_for(condition)
            os.kill(os.getpid(), number)

        threading.Thread(target=wait, daemon=True).start()

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupt(signal.SIGTERM, lambda: started.exists() and first_is_done(out))
    code, text = run("--wait=1", "--wait=2", seeds=3)
    assert code == 130
    assert states(out) == ["done", "interrupted", "interrupted"]
    assert "seed 1: interrupted  interrupted, saved at step 0" in text
    assert f"vi-simsiam train --out {out} --resume" in text

    # As if seed 2 had been stopped before its first checkpoint.
    (out / "seed-2" / "checkpoint.pt").unlink()
    started.write_text("")
    monkeypatch.setattr(seeds, "cores", lambda: 2)
    interrupt(signal.SIGINT, lambda: started.read_text() and states(out)[1] == "done")
    assert run("--resume")[0] == 130
    assert states(out) == ["done", "done", "interrupted"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert calls(out, 1)[-1][0][-1] == "--resume"
    assert calls(out, 2)[0][0][-1] == "auto", "there was no checkpoint"
    assert (out / "seed-1.log").read_text().count("starting") == 2, "the log is appended to"


def test_a_repeated_command_adds_nothing_to_its_arguments(
    run: Runs, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with another cache folder, too, as in a container that is new at every start."""
    for number, words in enumerate(([], ["--resume"], ["--resume"])):
        monkeypatch.setenv("VI_SIMSIAM_CACHE", str(tmp_path / f"cache-{number}"))
        assert run("--fail=1", "--data", "mine", *words, seeds=2)[0] == (0 if words else 1)
        assert json.loads((out / "seeds.json").read_text())["arguments"] == [
            "--fail=1", "--data", "mine",
        ]  # fmt: skip
    monkeypatch.setenv("VI_SIMSIAM_CACHE", str(tmp_path / "other"))
    with pytest.raises(InputError, match="has not started the runs"):
        run("--resume")


@pytest.mark.skipif(sys.platform != "linux", reason="a death signal")
def test_the_seeds_of_a_killed_command_end_and_can_continue(run: Runs, out: Path) -> None:
    """seeds.json is written when a run starts or ends, not only when all have ended."""
    parent = multiprocessing.get_context("fork").Process(
        target=run_seeds, args=(["--wait=1"], 2, 0, out)
    )
    parent.start()
    wait_for(lambda: first_is_done(out))
    parent.kill()
    parent.join()
    assert states(out) == ["done", "running"]
    log, left = out / "seed-1.log", json.loads((out / "seeds.json").read_text())["runs"][1]
    wait_for(lambda: not seeds._is_running(left["process"], out / "seed-1"))
    assert "interrupted, saved at step 0" in log.read_text()
    assert run("--resume")[0] == 0
    assert [len(calls(out, seed)) for seed in (0, 1)] == [1, 2]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads /proc")
def test_a_seed_that_still_runs_is_not_started_again(out: Path) -> None:
    out.mkdir()
    command = [sys.executable, "-c", "import time; time.sleep(60)", str(out / "seed-1")]
    with subprocess.Popen(command) as process:
        left = [{"seed": n, "exit": None, "process": process.pid} for n in (0, 1)]
        (out / "seeds.json").write_text(json.dumps({"arguments": [], "runs": left}))
        try:
            wait_for(lambda: seeds._is_running(process.pid, out / "seed-1"))  # exec takes a moment
            message = f"seed 1 in .* is still running, as process {process.pid}"
            with pytest.raises(InputError, match=message):
                run_seeds([], None, 0, out, resume=True)
        finally:
            process.kill()


def test_folders_and_numbers_that_cannot_be_used(
    run: Runs, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, *arguments: str, seeds: int | None = 2, first: int = 0) -> None:
        with pytest.raises(InputError, match=message):
            run(*arguments, seeds=seeds, first=first)

    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        refused("seeds: not under torchrun")
    refused("seeds: 0 is not accepted", seeds=0)
    refused("seed: -1 is not accepted", first=-1)
    refused(f"seed: {2**63 - 1} is not accepted", first=2**63 - 1)
    refused("only one of them", "--resume", "--overwrite")
    refused("holds no seeds.json", "--resume", seeds=None)
    assert not out.exists()
    out.write_text("mine")
    refused("is a file, not a folder")
    out.unlink()
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused("holds other files", "--overwrite")
    (out / "thesis.txt").unlink()
    assert run(seeds=2)[0] == 0
    refused("already holds runs; say --resume")
    refused("seeds: 3 is not accepted; it must be 2, as .* was started with", "--resume", seeds=3)
    assert run("--overwrite", seeds=2)[0] == 0
    assert "--overwrite" in calls(out, 0)[1][0]
    (out / "seeds.json").write_text('{"runs": [')
    refused("seeds.json is damaged", "--resume", seeds=None)
    for content in ("[]", "{}", '{"arguments": [], "runs": []}', '{"arguments": [], "runs": [{}]}'):
        (out / "seeds.json").write_text(content)
        refused("seeds.json is damaged", "--resume", seeds=None)
