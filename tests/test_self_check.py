"""`vi-simsiam info --check`: it passes here, and what is broken fails by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from graph_cases import StandIn
from torch import Tensor

from vi_simsiam import self_check
from vi_simsiam.cli import main
from vi_simsiam.engine.graph import Captured
from vi_simsiam.engine.sgd import CPUFusedSGD
from vi_simsiam.info import facts
from vi_simsiam.ops import multiview_loss_fused
from vi_simsiam.ops.backends import extension, why_unavailable
from vi_simsiam.self_check import OPERATIONS, Case, planned

needs_extension = pytest.mark.skipif(
    extension() is None, reason="needs the C++ extension, whose loss is broken here"
)


def checked(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
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
    monkeypatch.setattr(self_check, "training_step", lambda *_: Case(lambda: one, [one] * 3))


def test_all_pass(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = checked(capsys)
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
        no_device = "no CUDA device found"
        not_built = why_unavailable("cuda", "cuda")  # without nvcc, or without a C++ compiler
        for name, reason in {
            "triton (7 operations)": no_device,
            "cuda (2 operations)": not_built or no_device,
            "captured step, bfloat16": no_device,
        }.items():
            assert [name, "skipped", f"not available: {reason}"] in found


@needs_extension
@pytest.mark.usefixtures("no_training")
def test_a_kernel_that_is_wrong_fails_by_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By one percent of the gradient, in one dtype of one form of the loss; all else passes."""
    launch = multiview_loss_fused.launch_loss

    def broken(*arguments: Any) -> None:
        launch(*arguments)
        predictions, gradient, call = arguments[0], arguments[5], arguments[7]
        wrong = (call.backend, call.distribution, predictions[0].dtype)
        if wrong == ("cpu", "cosine", torch.float32) and gradient is not None:
            gradient.mul_(1.01)

    monkeypatch.setattr(multiview_loss_fused, "launch_loss", broken)
    code, lines = checked(capsys)
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
    """And NaN fails; the others go on, also in JSON."""
    operation = OPERATIONS["SimSiam loss"]

    def call(inputs: Any, backend: str) -> Any:
        if backend == "cpu" and inputs[0].dtype == torch.float32:
            raise RuntimeError("\nCUDA error: an illegal memory access was encountered\nmore\n")
        results = operation.call(inputs, backend)
        return [results[0].fill_(torch.nan), *results[1:]] if backend == "cpu" else results

    monkeypatch.setitem(OPERATIONS, "SimSiam loss", operation._replace(call=call))
    code, lines = checked(capsys)
    found = failed(lines)
    assert code == 1
    assert list(found) == ["SimSiam loss, cpu, float32", "SimSiam loss, cpu, bfloat16"]
    raised, not_finite = found.values()
    assert raised == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert not_finite.startswith("results are not finite   first call")
    assert main(["info", "--check", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    checks = {each["name"]: each for each in printed.pop("checks")}
    assert printed == facts()
    assert checks["SimSiam loss, cpu, float32"]["why"] == raised
    assert checks["SimSiam loss, cpu, bfloat16"]["error"] is None
    good = checks["VI-SimSiam loss, cpu, float32"]
    assert good["passed"] is True
    assert 0 <= good["error"] <= good["allowed"]
    assert min(good["first_call_seconds"], good["later_call_seconds"]) > 0


def test_a_step_that_trains_otherwise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the momentum."""
    new = self_check._new_step

    def without(*arguments: Any) -> Any:
        step = new(*arguments)
        step.optimizer.param_groups[0]["momentum"] = 0.0
        return step

    monkeypatch.setattr(self_check, "_new_step", without)
    found = self_check.check("step", dict(planned(facts()["backends"]))["training step, float32"])
    assert (found.passed, found.why) == (False, "wrong results")


class _Idle(StandIn):
    """Replays without the updates of the weights."""

    def replay(self) -> None:
        with mock.patch.object(CPUFusedSGD, "step"):
            super().replay()


@pytest.mark.parametrize(("graph", "fits"), [(StandIn, True), (_Idle, False)])
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

    monkeypatch.setattr(self_check, "_SIDE", 18)
    monkeypatch.setattr(self_check, "CALLS", 6)
    monkeypatch.setattr(self_check, "capture", capture)
    monkeypatch.setattr(self_check, "augment", waves)
    found = self_check.check("step", lambda: self_check.captured_step(torch.device("cpu")))
    assert made[0].captured
    assert (found.passed, found.why) == (fits, None if fits else "wrong results")


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_reference_passes_its_own_check(name: str) -> None:
    """In float32, also that of kernels for which there is no device."""
    found = self_check.check(
        name, lambda: OPERATIONS[name].case("eager", torch.device("cpu"), torch.float32)
    )
    assert found.passed, found


def test_what_is_not_available_is_not_run_and_an_extension_that_does_not_load_fails() -> None:
    why = {name: f"no {name}" for name in ("eager", "triton", "cuda")}
    why["cpu"] = "the C++ extension does not load (file too short)"
    backends = {name: {"available": False, "why": reason} for name, reason in why.items()}
    findings = [self_check.check(*each) for each in planned(backends) if isinstance(each[1], str)]
    skipped = {each.name: each.why for each in findings if each.passed is None}
    assert skipped["cuda (2 operations)"] == "not available: no cuda"
    assert skipped["captured step, bfloat16"] == "not available: no triton"
    assert len(skipped) == 4
    assert [each.name for each in findings if each.passed is False] == ["cpu (4 operations)"]
