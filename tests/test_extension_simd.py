"""Every set of vector instructions that the extension can use on this machine, chosen by
VI_SIMSIAM_SIMD."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vi_simsiam.ops.backends import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the C++ extension")
NAMES = {"baseline": ("128 bit", "plain loops"), "avx2": ("avx2",), "avx512": ("avx512",)}


def run(simd: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    environment["VI_SIMSIAM_SIMD"] = simd
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("simd", NAMES)
def test_every_path_passes_the_tests_of_the_cpu_backend(simd: str) -> None:
    chosen = run(simd, "-c", "import vi_simsiam._C as c; print(c.build_info()['simd'])")
    if "does not run here" in chosen.stderr:
        pytest.skip(f"this processor has no {simd}: its path is not checked")
    assert chosen.stdout.strip() in NAMES[simd], chosen.stderr
    files = [
        str(Path(__file__).with_name(name))
        for name in ("test_extension.py", "test_multiview_loss.py")
    ]
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-k", "cpu", "--tb=short")
    result = run(simd, "-m", "pytest", *options, *files)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_what_does_not_run_here_is_named() -> None:
    result = run("avx9", "-m", "vi_simsiam", "info")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "vi-simsiam: VI_SIMSIAM_SIMD: 'avx9' does not run here; accepted: baseline"
    )
    assert result.stderr.count("\n") == 1
