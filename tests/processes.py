"""Functions and tests of other files, run in a process of their own."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import small_backbone

ROOT = Path(__file__).parents[1]
_IMPORTED = [f"vi_simsiam.cli.{name}" for name in ("train", "evaluate", "doctor")]


def environment(**variables: str) -> dict[str, str]:
    """The variables of this process without pytest's own, and these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return kept | variables


def start(function: Callable[..., int], *arguments: Any) -> Any:
    """Start a process that returns the function's exit code; its runs have a small backbone.

    It is not forked from this one: PyTorch's threads would be missing in it, and waited for.
    """
    context = multiprocessing.get_context("forkserver")  # torch is imported once
    context.set_forkserver_preload(["torch._dynamo", "torch.utils.tensorboard", *_IMPORTED])
    process = context.Process(target=_call, args=(function, arguments))
    process.start()
    return process


def _call(function: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    import torch

    from vi_simsiam import models
    from vi_simsiam.evaluation import features

    torch.set_num_threads(1)
    for module in (models, features):
        module.build_backbone = small_backbone  # type: ignore[attr-defined]
    sys.exit(function(*arguments))


def run_tests(*arguments: str, wrapper: tuple[str, ...] = (), **variables: str) -> str:
    """Run pytest with these arguments and variables; all must pass. Returns the output."""
    command = [*wrapper, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    command += arguments
    given = environment(**variables)
    result = subprocess.run(command, env=given, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-3000:]
    assert re.search(r"\d+ passed", result.stdout), result.stdout
    return result.stdout
