"""`make gpu`: every stage runs within its limit, whether or not others fail."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from vi_simsiam.cli import main
from vi_simsiam.cli.commands import BENCHMARKS

ROOT = Path(__file__).parents[1]
LEAVES_A_PROCESS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
pathlib.Path("child").write_text(str(child.pid))
time.sleep(float(sys.argv[1]))
"""
STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
pathlib.Path("new").write_text(f"{os.getpid()} {child.pid}")
pathlib.Path("new").rename("stage")
time.sleep(300)
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """scripts/gpu.py, in an empty folder with modules to run in stages."""
    spec = importlib.util.spec_from_file_location("gpu_stages", ROOT / "scripts" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_stages", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_SECONDS_TO_END", 3.0)
    for name, code in {
        "works": "print('it works')",
        "fails": "raise SystemExit(3)",
        "leaves": LEAVES_A_PROCESS,
        "stubborn": STUBBORN,
        "variable": "import os; assert os.environ['WHICH'] == 'this'",
    }.items():
        Path(f"{name}.py").write_text(code)
    return module


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def test_a_failure_and_a_limit_keep_no_stage_from_running(
    gpu: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    stages = {
        "first": gpu.Stage(20, ["fails"]),
        "second": gpu.Stage(3, ["leaves", "120"]),
        "third": gpu.Stage(20, ["works"]),
        "fourth": gpu.Stage(20, ["variable"], {"WHICH": "this"}),
    }
    start = time.monotonic()
    assert gpu.main([], stages) == 1
    assert time.monotonic() - start < 60
    printed = capfd.readouterr().out
    assert "it works" in printed
    verdicts = [line.split(maxsplit=1)[1] for line in printed.splitlines()[-4:]]
    assert verdicts[0].startswith("FAILED: exit code 3")
    assert verdicts[1].startswith("FAILED: over its limit")
    assert [verdict.split()[0] for verdict in verdicts[2:]] == ["passed", "passed"]
    assert gpu.main(["third"], stages) == 0


@pytest.mark.parametrize(("runs", "limit"), [("0", 60), ("120", 5)])
def test_a_stage_leaves_no_process(runs: str, limit: float, gpu: ModuleType) -> None:
    gpu.main([], {"only": gpu.Stage(limit, ["leaves", runs])})
    _until(lambda: _ended(int(Path("child").read_text())))


def test_interrupted(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "_run", interrupt)
    assert gpu.main(["info"]) == 130
    assert capsys.readouterr().out.splitlines()[-1].split() == ["info", "interrupted"]


SCRIPT = f"""
import importlib.util, signal, sys
spec = importlib.util.spec_from_file_location("gpu_stages", {str(ROOT / "scripts" / "gpu.py")!r})
gpu = sys.modules["gpu_stages"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)
gpu.torch.cuda.is_available = lambda: True
gpu._SECONDS_TO_END = 5.0
for number in gpu._STOP:
    signal.signal(number, signal.default_int_handler)
stages = {{
    "first": gpu.Stage(float(sys.argv[1]), ["stubborn"]),
    "second": gpu.Stage(60, ["works"]),
}}
sys.exit(gpu.main([], stages))
"""


def _stubborn(limit: float) -> tuple[subprocess.Popen[str], list[int]]:
    """The script with a stage that only SIGKILL ends, and the processes of the stage."""
    command = [sys.executable, "-c", SCRIPT, str(limit)]
    script = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _until(Path("stage").exists)
    return script, [int(number) for number in Path("stage").read_text().split()]


@pytest.mark.usefixtures("gpu")
def test_a_stage_ends_with_a_script_that_is_killed() -> None:
    script, (stage, child) = _stubborn(300)
    script.kill()
    _until(lambda: _ended(stage))
    os.kill(child, signal.SIGKILL)  # a plain process does not notice that its parent has ended


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("limit", "signals"), [(300, 2), (5, 1)])
def test_every_process_of_a_stage_ends_however_often_the_script_is_interrupted(
    limit: float, signals: int
) -> None:
    """Interrupted while it runs and while it is being ended, or while it ends at its limit."""
    script, processes = _stubborn(limit)
    if signals == 1:
        time.sleep(limit)
    for _ in range(signals):
        script.send_signal(signal.SIGTERM)
        time.sleep(1)
    printed, _ = script.communicate(timeout=60)
    assert script.returncode == 130
    assert "second" not in printed
    _until(lambda: all(map(_ended, processes)))


def test_the_report_has_its_time(gpu: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    """A stage that is over its limit leaves that of the report; what has no time left is named."""
    stages = {
        "first": gpu.Stage(60, ["stubborn"]),
        "report": gpu.Stage(20, ["works"]),
        "last": gpu.Stage(60, ["works"]),
    }
    assert gpu.main([], stages, seconds=31) == 1
    first, report, last = (
        line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines()[-3:]
    )
    assert (first[0], first[1][:22]) == ("first", "FAILED: over its limit")
    assert (report[0], report[1][:6]) == ("report", "passed")
    assert last == ["last", "NOT RUN: no time left"]


def test_a_name_that_is_no_stage(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["stap"]) == 2
    assert "no stage 'stap'; there are info, captured, step" in capsys.readouterr().err


def test_the_commands_are_right(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked without a GPU: their options are accepted, and their tests exist."""

    class ReachedError(Exception):
        pass

    def reached(*_: object, **__: object) -> None:
        raise ReachedError

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("vi_simsiam.info.facts", reached)
    monkeypatch.setattr("vi_simsiam.engine.train.Trainer", reached)
    for name, _ in BENCHMARKS.values():
        monkeypatch.setattr(f"vi_simsiam.benchmarks.{name}.run", reached)
    seen: set[str] = set()
    for stage in gpu.STAGES.values():
        python, _, module, *arguments = stage.arguments()
        assert python == sys.executable
        seen.add(module)
        if module == "pytest":
            assert not any("*" in word for word in arguments)
            assert all(Path(word).exists() for word in arguments if word.startswith("tests/"))
            assert any(word.startswith("tests/") for word in arguments)
        else:
            with pytest.raises(ReachedError):
                main(arguments)
    assert seen == {"pytest", "vi_simsiam"}


def test_every_gpu_test_is_in_a_stage(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    marks = re.compile(r"^(@pytest\.mark\.gpu|@on_gpu\(|    pytest\.mark\.gpu,)", re.MULTILINE)
    marked = {
        str(path) for path in Path("tests").glob("test_*.py") if marks.search(path.read_text())
    }
    named = {
        word
        for stage in gpu.STAGES.values()
        for word in stage.arguments()
        if word.startswith("tests/")
    }
    assert {"tests/test_step.py", "tests/test_gpu.py", "tests/test_knn.py"} <= marked
    assert marked <= named


def test_without_a_gpu() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "gpu.py"), "info"]
    result = subprocess.run(
        command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (2, "gpu: no CUDA device found\n")
