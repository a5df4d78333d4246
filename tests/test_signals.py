"""Signals at any moment of a command: one line, exit code 130, and no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import environment
from test_commands import run

from vi_simsiam import files
from vi_simsiam.engine.checkpoint import checkpoints, load_last
from vi_simsiam.engine.saving import Saver

pytestmark = [
    pytest.mark.usefixtures("small_runs"),
    pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX alone has these signals"),
]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
AT_AN_IMPORT = """
import os, runpy, sys
module, number, *sys.argv = sys.argv[1:]
def watch(event, arguments):
    global module
    if event == "import" and arguments[0] == module:
        module = None
        os.kill(os.getpid(), int(number))
sys.addaudithook(watch)
runpy.run_module("vi_simsiam", run_name="__main__", alter_sys=True)
"""
LINE = "vi-simsiam: interrupted\n"
TINY = (
    "--batch-size 8 --size 16 --dim 16 --projector-hidden 16 --predictor-hidden 16"
    " --device cpu --workers 0 --quiet"
)


@pytest.mark.parametrize(
    ("module", "number"),
    [
        *(("numpy._core.numeric", number) for number in SIGNALS),
        ("vi_simsiam.config_parts", signal.SIGINT),
        ("torch", signal.SIGINT),
    ],
)
def test_a_signal_during_an_import(module: str, number: signal.Signals, tmp_path: Path) -> None:
    """NumPy and torch would swallow KeyboardInterrupt, and fail much later."""
    train = ["vi-simsiam", "train", "--out", str(tmp_path / "run"), "--device", "cpu"]
    command = [sys.executable, "-c", AT_AN_IMPORT, module, str(int(number)), *train]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr, ended.stdout) == (130, LINE, "")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_before_the_command_line_handles_it() -> None:
    given = ["vi_simsiam.text", str(int(signal.SIGINT)), "vi-simsiam", "info"]
    command = [sys.executable, "-c", AT_AN_IMPORT, *given]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize(("ignored", "code"), [(True, 0), (False, 130)], ids=["nohup", "terminal"])
def test_the_end_of_the_terminal(
    ignored: bool,
    code: int,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run under nohup goes on; another one is saved."""
    monkeypatch.setattr(Saver, "due", lambda saver: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        words = f"train --data {image_folder} --out {tmp_path / 'run'} --epochs 2 {TINY}"
        assert run(words, capsys)[0] == code
    finally:
        signal.signal(signal.SIGHUP, before)
    assert load_last(tmp_path / "run").step == (10 if ignored else 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_while_a_checkpoint_is_written(
    number: signal.Signals,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is left half written. Only Ctrl-C ends the writing: batch systems repeat others."""
    out = tmp_path / "run"
    monkeypatch.setattr(Saver, "due", lambda saver: os.kill(os.getpid(), number))
    flush, interrupted = os.fsync, []

    def fsync(descriptor: int) -> None:
        flush(descriptor)
        if checkpoints(out) and not interrupted:  # the one after that of step 0
            interrupted.append(1)
            for _ in range(2):
                os.kill(os.getpid(), number)

    monkeypatch.setattr(files.os, "fsync", fsync)
    words = f"train --data {image_folder} --out {out} --epochs 2 {TINY}"
    assert run(words, capsys)[0] == 130
    assert not [path for path in out.iterdir() if path.name.startswith(".checkpoint")]
    assert load_last(out).step == (0 if number == signal.SIGINT else 1)


@pytest.fixture(scope="module")
def trained(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the network of a process that is not patched."""
    out = tmp_path_factory.mktemp("trained") / "run"
    words = f"train --data {image_folder} --out {out} --epochs 1 {TINY}"
    command = [sys.executable, "-m", "vi_simsiam", *words.split()]
    subprocess.run(command, env=environment(), check=True)
    return out


@pytest.mark.soak
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "command",
    [
        f"train --data IMAGES --out OUT --overwrite {TINY} --workers 1",
        "evaluate RUN",
        "info",
        "bench accuracy --out OUT",
    ],
    ids=lambda command: command.split()[0],
)
def test_a_signal_at_any_moment(
    command: str, number: signal.Signals, image_folder: Path, trained: Path, tmp_path: Path
) -> None:
    places = {"IMAGES": str(image_folder), "OUT": str(tmp_path / "out"), "RUN": str(trained)}
    words = [places.get(word, word) for word in command.split()]
    for moment in (0.2, 0.3, 0.5, 0.8, 1.1, 1.5, 2.0, 2.5, 3.0, 4.0):
        process = subprocess.Popen(
            [sys.executable, "-m", "vi_simsiam", *words],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        time.sleep(moment)
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=120)
        assert process.returncode in (0, 130, -number), err  # 0: it was faster
        assert "Traceback" not in err
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
