"""First commands of a user, at full size: each must learn under any seed, threads and SIMD.

They take minutes each; only `make soak` runs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import TEXTS

pytestmark = pytest.mark.soak

_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "VI_SIMSIAM_SIMD": "avx2",
    "OMP_NUM_THREADS": "2",
}
_BASELINE = {
    "ATEN_CPU_CAPABILITY": "default",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
    "VI_SIMSIAM_SIMD": "baseline",
    "OMP_NUM_THREADS": "1",
}
_ENVIRONMENTS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "AVX2": _AVX2,
    "baseline": _BASELINE,
}


def run(command: str, folder: Path, **environment: str) -> None:
    """Run a command in a folder."""
    script = "import sys; from vi_simsiam.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", script, *command.split()[1:], "--device", "cpu"]
    done = subprocess.run(
        words, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def assert_learned(run_folder: Path) -> None:
    """Check that each later line is "learning", kappa is near its best, and both probes gained."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").open()]
    late = [line for line in lines if line["epoch"] > 1]
    assert {line["state"] for line in late} == {"learning"}
    ratio = sum(line["kappa"] for line in late) / sum(line["kappa_best"] for line in late)
    assert 0.5 < ratio < 2
    for name in ("knn", "linear"):
        top1 = json.loads((run_folder / f"{name}.json").read_text())["top1"]
        assert top1["trained"] > top1["untrained"], name


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_tutorials_run_learns(tmp_path: Path, seed: int) -> None:
    lines = TEXTS["tutorial"].splitlines()
    train = next(line for line in lines if line.startswith("vi-simsiam train "))
    assert train.endswith(" --out runs/first")
    run(f"{train} --seed {seed}", tmp_path)
    run("vi-simsiam evaluate runs/first", tmp_path)
    assert_learned(tmp_path / "runs" / "first")


@pytest.mark.parametrize("environment", _ENVIRONMENTS.values(), ids=_ENVIRONMENTS)
def test_the_demo_learns(tmp_path: Path, environment: dict[str, str]) -> None:
    run("vi-simsiam train --evaluate --out runs/demo", tmp_path, **environment)
    assert_learned(tmp_path / "runs" / "demo")
