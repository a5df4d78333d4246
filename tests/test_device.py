"""Settings of the device: memory that a CPU step takes again, and repeated bits on a GPU."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import environment
from rich.console import Console
from test_trainer import config

from vi_simsiam.engine.train import Trainer

FAULTS = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: count small pages
import torch
from vi_simsiam.engine.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(48 << 18)  # 48 MB, above glibc's limit for its own memory
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
faults()
print(first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="options of glibc")
def test_freed_memory_is_taken_again_without_new_pages() -> None:
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 8000
    assert after < 0.2 * before


def test_a_deterministic_run_fixes_the_workspace_of_cublas(
    small_network: None, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything can use cuBLAS; torch's own switch is on during training alone."""
    name, seen = "CUBLAS_WORKSPACE_CONFIG", []
    monkeypatch.setenv(name, ":16:8")
    for value in (":16:8", ":4096:8"):
        settings = config(image_folder, epochs=1, deterministic=True)
        trainer = Trainer(settings, tmp_path / value, console=Console(quiet=True))
        assert os.environ[name] == value
        trainer.fit(epoch_done=lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
        monkeypatch.delenv(name)
    assert seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()
