"""Every set of vector instructions that the extension can use on this machine, chosen by
VI_SIMSIAM_SIMD."""

from __future__ import annotations

import subprocess
import sys

import pytest
from processes import environment, run_tests

from vi_simsiam.ops.backends import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the C++ extension")
NAMES = {"baseline": ("128 bit", "plain loops"), "avx2": ("avx2",), "avx512": ("avx512",)}


def run(simd: str, *command: str) -> subprocess.CompletedProcess[str]:
    given = environment(VI_SIMSIAM_SIMD=simd)
    return subprocess.run([sys.executable, *command], env=given, capture_output=True, text=True)


@pytest.mark.parametrize("simd", NAMES)
def test_every_path_passes_the_tests_of_the_cpu_backend(simd: str) -> None:
    chosen = run(simd, "-c", "import vi_simsiam._C as c; print(c.build_info()['simd'])")
    if "does not run here" in chosen.stderr:
        pytest.skip(f"this processor has no {simd}: its path is not checked")
    assert chosen.stdout.strip() in NAMES[simd], chosen.stderr
    files = ("tests/test_extension.py", "tests/test_multiview_loss.py")
    run_tests("-p", "no:xdist", "-k", "cpu", *files, VI_SIMSIAM_SIMD=simd)


def test_what_does_not_run_here_is_named() -> None:
    result = run("avx9", "-m", "vi_simsiam", "info")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "vi-simsiam: VI_SIMSIAM_SIMD: 'avx9' does not run here; accepted: baseline"
    )
    assert result.stderr.count("\n") == 1
