"""`make gpu`: its stages follow one another whatever becomes of them, each within its limit, and their commands are right."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
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
    for name, code in {
        "works": "print('it works')",
        "fails": "raise SystemExit(3)",
        "leaves": LEAVES_A_PROCESS,
        "variable": "import os; assert os.environ['WHICH'] == 'this'",
    }.items():
        Path(f"{name}.py").write_text(code)
    return module


def test_a_failure_and_a_limit_keep_no_stage_from_running(gpu: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
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
    summary = [line.split()[:2] for line in printed.splitlines()[-4:]]
    assert summary == [["first", "FAILED:"], ["second", "FAILED:"], ["third", "passed"], ["fourth", "passed"]]
    assert "exit code 3" in printed
    assert "over its limit" in printed
    assert gpu.main(["third"], stages) == 0


@pytest.mark.parametrize(("runs", "limit"), [("0", 60), ("120", 10)])
def test_a_stage_leaves_no_process(runs: str, limit: float, gpu: ModuleType) -> None:
    gpu.main([], {"only": gpu.Stage(limit, ["leaves", runs])})
    child = int(Path("child").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_interrupted(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(stage: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "_run", interrupt)
    assert gpu.main(["info"]) == 130


def test_a_name_that_is_no_stage(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["stap"]) == 2
    assert "no stage 'stap'; there are info, captured, step" in capsys.readouterr().err


def test_all_end_within_25_minutes(gpu: ModuleType) -> None:
    assert sum(stage.seconds for stage in gpu.STAGES.values()) <= 25 * 60


def test_the_commands_are_right(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that shows without a GPU: their options are accepted, and their tests are there."""

    class ReachedError(Exception):
        pass

    def reached(*_: object, **__: object) -> None:
        raise ReachedError

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("vi_simsiam.info.facts", reached)
    monkeypatch.setattr("vi_simsiam.engine.trainer.Trainer", reached)
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
    marked = {str(path) for path in Path("tests").glob("test_*.py") if marks.search(path.read_text())}
    named = {word for stage in gpu.STAGES.values() for word in stage.arguments() if word.startswith("tests/")}
    assert {"tests/test_step.py", "tests/test_gpu.py", "tests/test_knn.py"} <= marked
    assert marked <= named


def test_without_a_gpu() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "gpu.py"), "info"]
    result = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "gpu: no CUDA device found\n")
