"""Tests and benchmarks that need a GPU, in stages, the most useful first; their limits add up to 25 minutes.

    python scripts/gpu.py              every stage; one that fails or exceeds its limit does not keep the next from running
    python scripts/gpu.py step loss    these two

Benchmarks write benchmarks/results/ case by case, so that one that is stopped leaves what it has measured. A result file holds
what was measured last, which is less here than what `make bench` measures.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
_SECONDS_TO_END = 10.0
_RESULTS = ("--out", "benchmarks/results")


@dataclass(frozen=True)
class Stage:
    """A command with its limit."""

    seconds: float
    command: Sequence[str]
    """The words after `python -m`; a * in the path of a test stands for all names that fit."""
    variables: Mapping[str, str] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """The whole command."""
        found = (sorted(map(str, Path().glob(word))) if word.startswith("tests/") else [word] for word in self.command)
        return [sys.executable, "-m", *(word for words in found for word in words)]


def _tests(seconds: float, *arguments: str, **variables: str) -> Stage:
    spread = ("-n", "8", "--dist", "loadgroup")  # tests of a group follow one another
    return Stage(seconds, ("pytest", *spread, "--durations=5", *arguments), variables)


def _ours(seconds: float, *arguments: str) -> Stage:
    return Stage(seconds, ("vi_simsiam", *arguments))


_OWN_STAGES = "not losses_on and not sanitizer and not offsets"
STAGES = {
    "info": _ours(60, "info", "--check"),
    "captured": _ours(90, "train", "--epochs", "1", "--capture", "on", "--out", "runs/gpu-captured", "--overwrite"),
    "step": _ours(160, "bench", "step", "--short", "--kernels", "--only", "2x128 batch 64", *_RESULTS),
    "graph": _tests(
        130, "-m", "gpu", *(f"tests/test_{name}.py" for name in ("graph_gpu", "step", "device_feed", "knn", "linear", "augmented"))
    ),
    "losses": _tests(160, "tests/test_multiview_loss*.py", VI_SIMSIAM_TEST_DEVICE="cuda"),
    "kernels": _tests(120, "-m", "gpu", "tests/test_triton_kernels.py", "tests/test_augment_kernels.py"),
    "loss": _ours(180, "bench", "loss", "--short", *_RESULTS),
    "accuracy": _ours(30, "bench", "accuracy", *_RESULTS),
    "augment": _ours(120, "bench", "augment", "--short", *_RESULTS),
    "train": _ours(220, "bench", "train", "--short", "--size", "128", "--out", "benchmarks/results/short"),
    "tests": _tests(100, "-m", "gpu", "-k", _OWN_STAGES, "tests/test_gpu.py", "tests/test_*bench*.py"),
    "sanitizer": _tests(110, "-m", "gpu", "-k", "sanitizer or offsets", "tests/test_gpu.py"),
    "report": _ours(20, "bench", "report", "README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))),
}  # fmt: skip


def main(names: Sequence[str], stages: Mapping[str, Stage] = STAGES) -> int:
    """Run the stages of these names, or all; 0 if all passed, 1 if one did not, 2 for a name that is none or no GPU, 130 for Ctrl-C."""
    if unknown := [name for name in names if name not in stages]:
        print(f"gpu: no stage {unknown[0]!r}; there are {', '.join(stages)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():  # tests would be skipped, and benchmarks replace the figures of the CPU
        print("gpu: no CUDA device found", file=sys.stderr)
        return 2
    verdicts: list[str] = []
    code = 0
    try:
        for name in names or stages:
            stage = stages[name]
            print(f"\ngpu: {name}, at most {stage.seconds:.0f} s: {shlex.join(stage.command)}", flush=True)
            start = time.monotonic()
            problem = _run(stage)
            verdicts.append(f"{name:12}{problem or 'passed':24}{time.monotonic() - start:6.0f} s")
            code = 1 if problem else code
    except KeyboardInterrupt:
        code = 130
    print("\n" + "\n".join(verdicts))
    return code


def _run(stage: Stage) -> str | None:
    """Run a stage to its end or its limit; what was wrong with it."""
    process = subprocess.Popen(stage.arguments(), env={**os.environ, **stage.variables}, start_new_session=True)
    try:
        code = process.wait(stage.seconds)
    except subprocess.TimeoutExpired:
        return "FAILED: over its limit"
    finally:
        _end(process)
    return None if code == 0 else f"FAILED: exit code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a stage with all its processes: those that it has left, too, would slow the next one down."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)


if __name__ == "__main__":
    os.chdir(ROOT)
    for number in (signal.SIGTERM, signal.SIGHUP):  # the stage would live on
        signal.signal(number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
