"""`vi-simsiam info --check`: it passes here, and what is broken fails by its name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from graph_cases import StandIn
from torch import Tensor

from vi_simsiam import self_check_cases
from vi_simsiam.cli import main
from vi_simsiam.engine.graph import Captured
from vi_simsiam.info import facts
from vi_simsiam.ops import multiview_loss_fused
from vi_simsiam.ops.backends import extension
from vi_simsiam.self_check import run_checks
from vi_simsiam.self_check_cases import OPERATIONS

needs_extension = pytest.mark.skipif(
    extension() is None, reason="needs the C++ extension, whose loss is broken here"
)


def check(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The exit code, and the lines after the report."""
    code = main(["info", "--check"])
    out, err = capsys.readouterr()
    assert err == ""
    return code, re.split(r"^  cpu  .*\n", out, maxsplit=1, flags=re.MULTILINE)[1].splitlines()


def failed(lines: list[str]) -> dict[str, str]:
    """Names of the checks that failed, and what is printed after each."""
    found = (re.fullmatch(r"(\S.*?) +FAILED +(\S.*)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a training step takes as long as all others; here it computes nothing."""
    one = [torch.ones(1, dtype=torch.float64)]
    case = self_check_cases.Case(lambda: one, [one] * 3)
    monkeypatch.setattr("vi_simsiam.self_check.training_step", lambda *_: case)


@pytest.mark.usefixtures("no_training")
def test_all_pass(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = check(capsys)
    assert code == 0
    *checks, last = lines
    passed = [line for line in checks if " ok " in line]
    skipped = [line for line in checks if " skipped " in line]
    assert last == f"{len(passed)} checks passed" + (f", {len(skipped)} skipped" if skipped else "")
    shown = (
        r"\S.*, (float32|bfloat16) +ok +error \S+ \(allowed \S+\)   "
        r"first call [\d.]+ (s|ms|us), then [\d.]+ (s|ms|us)"
    )
    assert all(re.fullmatch(shown, line) for line in passed)
    names = [re.split(" {2,}", line)[0] for line in passed]
    assert "training step, float32" in names
    assert ("VI-SimSiam loss, cpu, bfloat16" in names) == (extension() is not None)
    if not torch.cuda.is_available():
        found = [re.split(" {2,}", line) for line in skipped]
        reason = "not available: no CUDA device found"
        named = ("triton (7 operations)", "cuda (2 operations)", "captured step, bfloat16")
        assert [[name, "skipped", reason] for name in named] == [
            each for each in found if each[0] in named
        ]


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    checks = {each["name"]: each for each in found.pop("checks")}
    assert found == facts()
    step = checks["training step, float32"]
    assert step["passed"] is True
    assert 0 <= step["error"] <= step["allowed"]
    assert step["first_call_seconds"] > 0
    assert step["later_call_seconds"] > 0
    if not torch.cuda.is_available():
        triton = checks["triton (7 operations)"]
        assert (triton["passed"], triton["why"]) == (None, "not available: no CUDA device found")


@needs_extension
@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_kernel_that_is_wrong_fails_by_its_name(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By one percent, in one dtype of one form of the loss, and all else passes."""
    launch = multiview_loss_fused.launch_loss

    def broken(
        p: Any, z: Any, k: Any, loss: Tensor, mean: Any, gradient: Tensor | None, kg: Any, call: Any
    ) -> None:
        launch(p, z, k, loss, mean, gradient, kg, call)
        off = loss if part == "loss" else gradient
        if (
            call.backend == "cpu"
            and call.distribution == "cosine"
            and p[0].dtype == torch.float32
            and off is not None
        ):
            off.mul_(1.01)

    monkeypatch.setattr(multiview_loss_fused, "launch_loss", broken)
    code, lines = check(capsys)
    found = failed(lines)
    assert code == 1
    assert list(found) == ["SimSiam loss, cpu, float32"]
    line = found["SimSiam loss, cpu, float32"]
    error = re.match(r"wrong results   error (\S+) \(allowed 1.0e-05\)", line)
    assert error
    assert float(error[1]) == pytest.approx(0.01, rel=0.02)
    assert re.match(r"1 of \d+ checks failed", lines[-1])


@needs_extension
@pytest.mark.usefixtures("no_training")
def test_what_is_raised_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And NaN fails; the others go on."""
    operation = OPERATIONS["SimSiam loss"]

    def call(inputs: Any, backend: str) -> Any:
        if backend == "cpu" and inputs[0].dtype == torch.float32:
            raise RuntimeError("\nCUDA error: an illegal memory access was encountered\nmore\n")
        results = operation.call(inputs, backend)
        return [results[0].fill_(torch.nan), *results[1:]] if backend == "cpu" else results

    monkeypatch.setitem(OPERATIONS, "SimSiam loss", operation._replace(call=call))
    code, lines = check(capsys)
    found = failed(lines)
    assert code == 1
    assert list(found) == ["SimSiam loss, cpu, float32", "SimSiam loss, cpu, bfloat16"]
    raised, not_finite = found.values()
    assert raised == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert not_finite.startswith("results are not finite   first call")
    assert main(["info", "--check", "--json"]) == 1
    checks = {each["name"]: each for each in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["SimSiam loss, cpu, float32"]["why"].startswith("RuntimeError: CUDA error")
    assert checks["SimSiam loss, cpu, bfloat16"]["error"] is None


def test_a_step_that_trains_otherwise_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the momentum."""
    new = self_check_cases._new_step

    def without(*arguments: Any) -> Any:
        step = new(*arguments)
        step.optimizer.param_groups[0]["momentum"] = 0.0
        return step

    monkeypatch.setattr(self_check_cases, "_new_step", without)
    code, lines = check(capsys)
    assert code == 1
    assert list(failed(lines)) == ["training step, float32"]


class _Forgetful(StandIn):
    """Replays nothing."""

    def replay(self) -> None:
        pass


class _Idle(StandIn):
    """Replays without the updates of the weights."""

    def replay(self) -> None:
        with mock.patch.object(torch.optim.SGD, "step"):
            super().replay()


@pytest.mark.parametrize(("graph", "fits"), [(StandIn, True), (_Forgetful, False), (_Idle, False)])
def test_the_captured_step_is_held_to_the_step(
    graph: type[StandIn], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the graph; the views are waves, since those made on a CPU cannot be
    captured."""
    made: list[Captured] = []

    def capture(step: Callable[..., Any], *, state: Any, mode: str) -> Captured:
        made.append(Captured(step, state=state, mode=mode, warmup=3, backend=graph))
        return made[0]

    def waves(pixels: Tensor, table: Tensor, size: int, *, dtype: torch.dtype) -> Tensor:
        places = torch.arange(size * size).view(size, size)
        phases = places * table[..., 13:16, None, None] + table[..., :1, None, None]
        return phases.sin().to(dtype)

    monkeypatch.setattr(self_check_cases, "_SIDE", 18)
    monkeypatch.setattr(self_check_cases, "capture", capture)
    monkeypatch.setattr(self_check_cases, "augment", waves)
    case = self_check_cases.captured_step(torch.device("cpu"))
    errors = []
    for (exact,) in case.expected:
        (losses,) = case.run()
        errors.append(
            losses.shape != exact.shape or ((losses - exact).abs().max() / exact.abs().max()).item()
        )
    assert made[0].captured
    assert (max(errors) <= case.allowed) == fits


def test_kernels_in_the_interpreter() -> None:
    """The loss of two images, BatchNorm and the first convolution, in a process of its own; the
    other operations take longer."""
    script = """
import torch
from vi_simsiam import self_check
from vi_simsiam.cli import main
from vi_simsiam.self_check_cases import OPERATIONS, Case
one = [torch.ones(1, dtype=torch.float64)]
self_check.training_step = lambda *_: Case(lambda: one, [one])
loss = OPERATIONS["VI-SimSiam loss"]
def two_images(dtype):
    predictions, targets, factor = loss.draw(dtype)
    return predictions[:, :2], targets[:, :2], factor[:2]
OPERATIONS["VI-SimSiam loss"] = loss._replace(draw=two_images)
for name in ("add + ReLU", "ReLU + max-pool"):
    del OPERATIONS["BatchNorm + " + name]
del OPERATIONS["SimSiam loss"], OPERATIONS["augmentation"]
raise SystemExit(main(["info", "--check"]))
"""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels are not checked")
    # In the folder of triton_tools, which makes the interpreter faster.
    options = {"cwd": Path(__file__).parent, "env": os.environ | {"TRITON_INTERPRET": "1"}}
    command = [sys.executable, "-c", "import triton_tools\n" + script]
    result = subprocess.run(command, **options, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "RuntimeWarning" not in result.stderr
    for name in ("VI-SimSiam loss", "BatchNorm + ReLU", "first convolution"):
        for dtype in ("float32", "bfloat16"):
            assert re.search(
                rf"^{re.escape(name)}, triton, {dtype} +ok +error .* first call \S+ m?s$",
                result.stdout,
                re.M,
            )


@pytest.mark.usefixtures("no_training")
def test_what_is_not_available_is_not_run_and_an_extension_that_does_not_load_fails() -> None:
    why = {name: f"no {name}" for name in ("eager", "triton", "cuda")}
    why["cpu"] = "the C++ extension does not load (file too short)"
    backends = {name: {"available": False, "why": reason} for name, reason in why.items()}
    begun: list[str] = []
    findings = {each.name: each for each in run_checks(backends, begun.append)}
    assert begun == list(findings)
    skipped = {name: each.why for name, each in findings.items() if each.passed is None}
    assert skipped["cuda (2 operations)"] == "not available: no cuda"
    assert skipped["captured step, bfloat16"] == "not available: no triton"
    assert len(skipped) == 4
    assert [name for name, each in findings.items() if each.passed is False] == [
        "cpu (2 operations)"
    ]
