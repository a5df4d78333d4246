"""Tests and benchmarks that need a GPU, in stages, the most useful first, within 25 minutes.

    python scripts/gpu.py                              all stages, whether or not one fails
    python scripts/gpu.py step loss                    these two
    python scripts/gpu.py --seconds 540 step loss      these two, within nine minutes

Benchmarks write benchmarks/results/ after every case, so that a stopped one leaves what it has
measured. A result file holds what was measured last, which is less here than with `make bench`.
"""

from __future__ import annotations

import argparse
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

ROOT = Path(__file__).parents[1]
_SECONDS = 25 * 60.0
_SECONDS_TO_END = 10.0
"""From SIGTERM to SIGKILL."""
_LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class Stage:
    """A command with its limit, several times its duration with compiled kernels.

    The first stages compile them.
    """

    seconds: float
    command: Sequence[str]
    """The words after `python -m`; a path of tests may be a pattern with *."""
    variables: Mapping[str, str] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """The whole command."""
        found = (
            sorted(map(str, Path().glob(word))) if word.startswith("tests/") else [word]
            for word in self.command
        )
        return [sys.executable, "-m", *(word for words in found for word in words)]


def _tests(seconds: float, *arguments: str, **variables: str) -> Stage:
    spread = ("-n", "8", "--dist", "loadgroup")  # tests of a group follow one another
    return Stage(seconds, ("pytest", *spread, "--durations=5", *arguments), variables)


def _ours(seconds: float, *arguments: str) -> Stage:
    return Stage(seconds, ("vi_simsiam", *arguments))


def _bench(seconds: float, *arguments: str) -> Stage:
    return _ours(seconds, "bench", *arguments, "--out", "benchmarks/results")


_IN_GRAPH_STAGE = (
    *("graph_gpu", "step", "device_feed", "channel_feed", "classifiers", "linear", "evaluation"),
)
_OWN_STAGES = "not sanitizer and not offsets"
_PAGES = ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
STAGES = {
    "info": _ours(180, "info", "--check"),
    "captured": _ours(
        150,
        *["train", "--epochs", "1", "--capture", "on", "--out", "runs/gpu-captured", "--overwrite"],
    ),
    "step": _bench(240, "step", "--short", "--kernels", "--only", "2x128 batch 64"),
    "graph": _tests(130, "-m", "gpu", *(f"tests/test_{name}.py" for name in _IN_GRAPH_STAGE)),
    "losses": _tests(160, "tests/test_multiview_loss*.py", VI_SIMSIAM_TEST_DEVICE="cuda"),
    "kernels": _tests(120, "-m", "gpu", "tests/test_triton_kernels.py"),
    "loss": _bench(180, "loss", "--short"),
    "batch_norm": _bench(100, "batch_norm", "--short"),
    "accuracy": _bench(60, "accuracy"),
    "augment": _bench(120, "augment", "--short"),
    "train": _bench(300, "train", "--short", "--size", "128"),
    "tests": _tests(
        100, "-m", "gpu", "-k", _OWN_STAGES, "tests/test_gpu.py", "tests/test_*bench*.py"
    ),
    "sanitizer": _tests(110, "-m", "gpu", "-k", "sanitizer or offsets", "tests/test_gpu.py"),
    "report": _ours(20, "bench", "report", *_PAGES),
}


def main(
    names: Sequence[str], stages: Mapping[str, Stage] = STAGES, seconds: float = _SECONDS
) -> int:
    """Run the stages of these names, or all, within `seconds`.

    Returns:
        0 if all passed, 1 if one did not, 2 for an unknown name or without a GPU, 130 when
        interrupted.
    """
    if unknown := [name for name in names if name not in stages]:
        print(f"gpu: no stage {unknown[0]!r}; there are {', '.join(stages)}", file=sys.stderr)
        return 2
    if not _gpu_found():
        # Tests would be skipped, and benchmarks would replace the figures of the CPU.
        print("gpu: no CUDA device found", file=sys.stderr)
        return 2
    order = list(names or stages)
    verdicts: list[str] = []
    code, end = 0, time.monotonic() + seconds - _SECONDS_TO_END
    if "report" in order:  # reserve its time: it shows what the others measured
        end -= stages["report"].seconds + _SECONDS_TO_END
    for name in order:
        start = time.monotonic()
        limit = stages[name].seconds
        if name != "report":
            limit = min(limit, end - start)
        if limit < _LEAST_SECONDS:
            verdicts.append(f"{name:12}NOT RUN: no time left")
            code = 1
            continue
        command = shlex.join(stages[name].command)
        print(f"\ngpu: {name}, at most {limit:.0f} s: {command}", flush=True)
        try:
            failed = _run(stages[name], limit)
        except KeyboardInterrupt:
            verdicts.append(f"{name:12}interrupted")
            code = 130
            break
        taken = time.monotonic() - start
        problem = "over its limit" if taken >= limit else f"exit code {failed}"
        verdict = f"FAILED: {problem}" if failed else "passed"
        verdicts.append(f"{name:12}{verdict:24}{taken:6.0f} s")
        code = 1 if failed else code
    print("\n" + "\n".join(verdicts))
    return code


def _gpu_found() -> bool:
    import torch  # only here: it takes seconds

    return torch.cuda.is_available()


def _run(stage: Stage, limit: float) -> int:
    """Run a stage to its end or its limit; return its exit code.

    `timeout` ends all processes of the stage at the limit, and when this one is interrupted or
    killed: they would keep the GPU.
    """
    ending = ["setpriv", "--pdeathsig", "TERM", "timeout", f"--kill-after={_SECONDS_TO_END}"]
    command = [*ending, str(limit), *stage.arguments()]
    process = subprocess.Popen(command, env={**os.environ, **stage.variables})
    try:
        return process.wait()
    finally:
        process.terminate()
        process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what a stage that has ended left


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tests and benchmarks that need a GPU, in stages.")
    stages_help = f"{', '.join(STAGES)}; all of them if none is given"
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=stages_help)
    seconds_help = "limit of all together (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=_SECONDS, help=seconds_help)
    given = parser.parse_args()
    os.chdir(ROOT)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the stage would live on
        signal.signal(number, signal.default_int_handler)
    sys.exit(main(given.stages, seconds=given.seconds))
