"""`make gpu`: every stage runs within its limit, whether or not others fail."""

from __future__ import annotations

import importlib.util
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from vi_simsiam.cli import BENCHMARKS, main

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu.py"
# A process that only SIGKILL ends, with a child: both live on after the seconds of a stage.
STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "120"])  # ignores it, too
pathlib.Path("new").write_text(f"{os.getpid()} {child.pid}")
pathlib.Path("new").rename("stage")
time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """scripts/gpu.py, in an empty folder with modules to run in stages."""
    spec = importlib.util.spec_from_file_location("gpu_stages", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_stages", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(module, "_SECONDS_TO_END", 0.5)
    monkeypatch.chdir(tmp_path)
    for name, code in {
        "works": "print('it works')",
        "fails": "raise SystemExit(3)",
        "stubborn": STUBBORN,
        "variable": "import os; assert os.environ['WHICH'] == 'this'",
    }.items():
        Path(f"{name}.py").write_text(code)
    return module


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def _processes() -> list[int]:
    """The stubborn process and its child."""
    return [int(number) for number in Path("stage").read_text().split()]


def test_a_failure_and_a_limit_keep_no_stage_from_running(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The report's time is kept, a stage over its limit leaves no process, and one is too late."""
    stages = {
        "first": gpu.Stage(20, ["fails"]),
        "second": gpu.Stage(20, ["variable"], {"WHICH": "this"}),
        "third": gpu.Stage(2, ["stubborn", "120"]),
        "report": gpu.Stage(20, ["works"]),
        "last": gpu.Stage(60, ["works"]),
    }
    now = iter([0, 1, 2, 3, 4, 5, 7, 8, 9, 10])
    clock = SimpleNamespace(monotonic=lambda: float(next(now)))
    monkeypatch.setattr(gpu, "time", clock)
    assert gpu.main([], stages, seconds=30) == 1
    printed = capfd.readouterr().out
    assert "it works" in printed
    verdicts = dict(line.split(maxsplit=1) for line in printed.splitlines()[-5:])
    assert verdicts["first"].startswith("FAILED: exit code 3")
    assert verdicts["second"].startswith("passed")
    assert verdicts["third"].startswith("FAILED: over its limit")
    assert verdicts["report"].startswith("passed")
    assert verdicts["last"] == "NOT RUN: no time left"
    _until(lambda: all(map(_ended, _processes())))


def test_a_stage_that_passes_leaves_no_process(gpu: ModuleType) -> None:
    assert gpu.main([], {"only": gpu.Stage(60, ["stubborn", "0"])}) == 0
    _until(lambda: all(map(_ended, _processes())))


RUN = f"""
import importlib.util, signal, sys
spec = importlib.util.spec_from_file_location("gpu_stages", {str(SCRIPT)!r})
gpu = sys.modules["gpu_stages"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)
gpu._gpu_found = lambda: True
gpu._SECONDS_TO_END = 1.0
signal.signal(signal.SIGTERM, signal.default_int_handler)
stages = {{"first": gpu.Stage(300, ["stubborn", "120"]), "second": gpu.Stage(60, ["works"])}}
sys.exit(gpu.main([], stages))
"""


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_every_process_of_a_stage_ends_with_the_script(number: signal.Signals) -> None:
    command = [sys.executable, "-c", RUN]
    script = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    _until(Path("stage").exists)
    script.send_signal(number)
    code = script.wait(timeout=60)
    _until(lambda: all(map(_ended, _processes())))
    printed, _ = script.communicate()
    assert "second" not in printed
    if number == signal.SIGTERM:
        assert code == 130
        assert printed.splitlines()[-1].split() == ["first", "interrupted"]


def test_a_name_that_is_no_stage() -> None:
    command = [sys.executable, str(SCRIPT), "--seconds", "60", "stap"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no stage 'stap'; there are info, captured, step" in result.stderr


def test_without_a_gpu(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["info"]) == 2
    assert capsys.readouterr().err == "gpu: no CUDA device found\n"


def test_the_commands_are_right(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked without a GPU: their options are accepted, and every GPU test is in a stage."""

    class ReachedError(Exception):
        pass

    def reached(*_: object, **__: object) -> None:
        raise ReachedError

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("vi_simsiam.info.facts", reached)
    monkeypatch.setattr("vi_simsiam.engine.train.Trainer", reached)
    for name, _ in BENCHMARKS.values():
        monkeypatch.setattr(f"vi_simsiam.benchmarks.{name}.run", reached)
    commands = [stage.arguments() for stage in gpu.STAGES.values()]
    assert {tuple(command[:2]) for command in commands} == {(sys.executable, "-m")}
    assert {command[2] for command in commands} == {"pytest", "vi_simsiam"}
    for _, _, module, *arguments in commands:
        if module == "pytest":
            assert any(word.startswith("tests/") for word in arguments)
            assert not any("*" in word for word in arguments)
        else:
            with pytest.raises(ReachedError):
                main(arguments)
    named = {word for command in commands for word in command if word.startswith("tests/")}
    assert all(Path(name).exists() for name in named)
    mark = re.compile(r"^(@pytest\.mark\.gpu|@on_gpu\(|    pytest\.mark\.gpu,)", re.MULTILINE)
    tests = Path("tests").glob("test_*.py")
    marked = {str(path) for path in tests if mark.search(path.read_text())}
    assert {"tests/test_step.py", "tests/test_gpu.py", "tests/test_linear.py"} <= marked
    assert marked <= named
