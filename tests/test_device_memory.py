"""Memory that a step on a CPU takes again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from processes import environment

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
