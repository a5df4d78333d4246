"""The benchmark of BatchNorm, addition and ReLU: its cases, its gate, its tables and targets."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from benchmark_cases import CPU, ScriptedTimer, needs_gpu, scale, shown
from torch import Tensor

from vi_simsiam import SimSiam, normalisation
from vi_simsiam.benchmarks import batch_norm, harness, report, tables
from vi_simsiam.benchmarks.batch_norm import (
    NormCase,
    Provider,
    draw_inputs,
    norm_cases,
    norms,
    torch_layers,
)
from vi_simsiam.benchmarks.results import EAGER
from vi_simsiam.benchmarks.targets import targets_for
from vi_simsiam.cli import main
from vi_simsiam.ops.batch_norm import batch_norm_act
from vi_simsiam.ops.stem_pool import batch_norm_relu_max_pool

TINY, WIDER = NormCase(32, 64, 3, 1, residual=True), NormCase(128, 64, 3, 1, residual=False)
BY_VIEW, TORCH, WITHOUT_CUDNN = EAGER
ONE_PASS = Provider(torch_layers)
RIGHT = {BY_VIEW: Provider(partial(torch_layers, views=1), apart=True), TORCH: ONE_PASS}


def measured(
    *microseconds: float | Exception, case: NormCase = TINY, **extra: Provider | str
) -> dict[str, Any]:
    timer = ScriptedTimer(*microseconds)
    return batch_norm.measure_case(case, CPU, {**RIGHT, **extra}, timer, rounds=3)


@pytest.mark.parametrize("size", [32, 128])
def test_the_norms_are_those_of_the_network(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def act(x: Tensor, *, residual: Tensor | None, relu: bool, **more: Any) -> Tensor:
        if relu and x.dim() == 4:
            found.append((x.shape[1], x.shape[2], residual is not None))
        return batch_norm_act(x, residual=residual, relu=relu, **more)

    def act_pool(x: Tensor, **more: Any) -> Tensor:
        found.append((x.shape[1], x.shape[2], False))
        return batch_norm_relu_max_pool(x, **more)

    monkeypatch.setattr(normalisation, "batch_norm_act", act)
    monkeypatch.setattr(normalisation, "batch_norm_relu_max_pool", act_pool)
    model = SimSiam("resnet18", dim=16, projector_hidden=16, predictor_hidden=16)
    model.fused = True
    model([torch.randn(2, 3, size, size)] * 2)
    largest_first = sorted(
        set(found), key=lambda norm: NormCase(size, 64, *norm).least_bytes("forward_backward")
    )[::-1]
    assert norms(size) == largest_first


def test_cases_and_the_bytes_that_they_move() -> None:
    assert [case.name for case in norm_cases("cpu", short=True)] == [
        "2x32 batch 64 64@16 float32",
        "2x32 batch 64 64@8 residual float32",
        "2x32 batch 64 64@8 float32",
        "2x32 batch 64 128@4 residual float32",
    ]
    plain, added, *_ = norm_cases("cuda", short=False)
    assert plain.label == "2x128, batch 64: 64 x 64 x 64, bfloat16"
    unit = 2 * 64 * 64 * 64 * 64 * 2
    assert plain.least_bytes("forward") == 3 * unit
    assert plain.least_bytes("forward_backward") == (3 + 5) * unit
    unit //= 4
    assert added.least_bytes("forward") == 4 * unit
    assert added.least_bytes("forward_backward") == (4 + 7) * unit
    for kind in ("cpu", "cuda"):
        names = [case.name for case in norm_cases(kind, short=False)]
        assert len(set(names)) == len(names) == 8
        assert names[:4] == [case.name for case in norm_cases(kind, short=True)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_views_together_and_apart_are_the_same_inputs(dtype: str) -> None:
    """Where rounding may decide on the sign of the ReLU's input, the gradient is 0."""
    case = NormCase(32, 16, 5, 3, residual=True, dtype=dtype)
    inputs = draw_inputs(case, CPU, torch.Generator().manual_seed(0))
    (whole,) = inputs.together
    assert whole.x.shape == case.shape
    assert whole.x.dtype == case.torch_dtype
    for name in ("x", "residual", "gradient"):
        both = getattr(whole, name)
        assert both.is_contiguous(memory_format=torch.channels_last)
        apart = [getattr(each, name) for each in inputs.apart]
        assert torch.equal(torch.cat(apart), both)
        assert apart[0].data_ptr() == both.data_ptr()
    options: dict[str, Any] = {"groups": 2, "relu": False, "backend": "eager"}
    parameters = [each.double() for each in inputs.affine]
    given = (whole.x.double(), *parameters, None, None)
    before = batch_norm_act(*given, residual=whole.residual.double(), **options)  # type: ignore[misc,union-attr]
    flows = whole.gradient != 0
    assert flows.any()
    assert not flows[before.abs() < 1e-4].any()
    assert (flows.sum() < flows.numel()) == (dtype == "bfloat16")


def test_the_gate_refuses_what_computes_another_function() -> None:
    def scaled(x: Tensor, residual: Tensor, *others: Tensor) -> Tensor:
        return torch_layers(x, residual * (1 + 1e-5), *others)

    def forgetful(x: Tensor, residual: Tensor, *others: Tensor) -> Tensor:
        return torch_layers(x, residual, *others[:2], *map(torch.clone, others[2:]))

    def unscaled(x: Tensor, residual: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        return torch_layers(x, residual, weight.detach() + 0 * weight, *others)

    wrong = {
        "joint": (partial(torch_layers, views=1), "output error"),
        "scaled": (scaled, "output error"),
        "forgetful": (forgetful, "running statistics error"),
        "unscaled": (unscaled, "parameter gradient error"),
    }
    made = {name: Provider(layers) for name, (layers, _) in wrong.items()}
    case = measured(9, 40, 30, **made, missing="not available: not built")
    for name, (_, kind) in wrong.items():
        found = case["providers"][name]
        assert found["failure"].startswith(f"inaccurate: {kind} "), name
        assert found["forward"] is found["forward_backward"] is None
    for name in RIGHT:
        found = case["providers"][name]
        assert found["correct"]
        assert found["forward_backward"]["bytes_per_second"] > 0
    assert case["providers"]["missing"]["failure"] == "not available: not built"
    text = shown(tables.modes_case(case))
    assert "missing (not available: not built)" in text
    assert "joint (inaccurate: output error" in text
    json.loads(json.dumps(case, allow_nan=False))


def test_providers_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a GPU run on a CPU, too; ours is the public function, here with another backend."""
    backends = []

    def act(*given: Any, backend: str, **named: Any) -> Tensor:
        backends.append(backend)
        return batch_norm_act(*given, backend="eager", **named)

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with mock.patch.object(batch_norm, "why_unavailable", return_value=None):
        on_gpu, on_cpu = (batch_norm.make_providers(torch.device(kind)) for kind in ("cuda", "cpu"))
    assert list(on_gpu) == [BY_VIEW, TORCH, WITHOUT_CUDNN, "torch.compile", "triton"]
    assert list(on_cpu) == [BY_VIEW, TORCH, "torch.compile", "cpu"]
    monkeypatch.setattr(batch_norm, "batch_norm_act", act)
    found = measured(1, **on_gpu, cpu=on_cpu["cpu"])["providers"]
    assert {name: each["failure"] for name, each in found.items()} == dict.fromkeys(found)
    assert {"triton", "cpu"} <= set(backends)
    with mock.patch.object(batch_norm, "why_unavailable", return_value="not built"):
        assert batch_norm.make_providers(CPU)["cpu"] == "not available: not built"


def test_run_writes_a_file_that_page_and_comparison_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {**RIGHT, "torch.compile": ONE_PASS, "cpu": ONE_PASS}
    monkeypatch.setattr(batch_norm, "norm_cases", lambda *_, short: (TINY, WIDER))
    monkeypatch.setattr(batch_norm, "make_providers", lambda device: dict(made))
    monkeypatch.setattr(harness, "timer_for", lambda device: ScriptedTimer(9, 40, 30, 20, 10))
    command = ["bench", "batch_norm", "--device", "cpu", "--rounds", "3", "--out", str(tmp_path)]
    assert main(command) == 0
    path = tmp_path / "cpu" / "batch_norm.json"
    assert f"written: {path}" in capsys.readouterr().out
    page = "<!-- bench: batch-norm cpu/batch_norm.json -->\n<!-- /bench -->"
    lines = report.fill(page, tmp_path).splitlines()
    assert lines[1:7] == [
        "| us | torch, view by view | torch | torch.compile | cpu | GB/s | of a copy's speed "
        "| faster than torch | faster than torch.compile |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {case.label}, {mode} | 40.0 | 30.0 | 20.0 | 10.0 | {rate:.1f} | 90% | 3.00 x "
            "| 2.00 x |"
            for case, mode, rate in (
                (TINY, "forward", 4 * 0.1536),
                (TINY, "forward + backward", 11 * 0.1536),
                (WIDER, "forward", 3 * 0.1536),
                (WIDER, "forward + backward", 8 * 0.1536),
            )
        ),
    ]
    assert main(["bench", "compare", str(path), str(path)]) == 0
    assert "0 slower beyond the noise" in capsys.readouterr().out
    missing = page.replace("cpu/", "GPU/")
    assert "Not measured." in report.fill(missing, tmp_path)


def test_short_leaves_out_what_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {**RIGHT, "torch.compile": ONE_PASS}
    monkeypatch.setattr(batch_norm, "make_providers", lambda device: dict(made))
    monkeypatch.setattr(harness, "timer_for", lambda device: ScriptedTimer(9, 40, 30))
    monkeypatch.setattr(harness.Suite, "cases", lambda *_: [(TINY, "left out: no time")])
    (case,) = batch_norm.run(batch_norm.Options(device="cpu", rounds=3))["cases"]
    assert case["providers"]["torch.compile"]["failure"] == "left out: no time"


def test_targets() -> None:
    """Met, not met or not measured; on a CPU only views of 32 pixels count."""
    cases = [measured(9, 40, 30, 10, case=case, cpu=ONE_PASS) for case in (TINY, WIDER)]

    def judged(kind: str) -> tuple[str, str]:
        (target,) = targets_for("batch_norm", kind, cases)
        return target.figure, target.met

    assert judged("cpu") == ("3.00 times", "yes")
    assert judged("cuda")[0].startswith("90% (least of 2 cases: ")
    assert judged("cuda")[1] == "yes"
    cases.append(measured(9, 40, 30, case=WIDER, cpu="not available: not built"))
    assert "; no figure for 1 case more)" in judged("cuda")[0]
    assert judged("cuda")[1] == "-", "met by some cases alone"
    cases.pop()
    scale(cases[1]["providers"]["cpu"]["forward_backward"]["time"], 2.5)
    assert judged("cpu") == ("3.00 times", "yes")
    assert judged("cuda") == (f"36% (least of 2 cases: {WIDER.label})", "no")
    scale(cases[0]["providers"]["cpu"]["forward_backward"]["time"], 2.5)
    assert judged("cpu") == ("1.20 times", "no")
    times = cases[0]["providers"][TORCH]["forward_backward"]["time"]
    times.update(lower_us=1.0, upper_us=100.0)
    assert judged("cpu")[1] == "too noisy to tell"
    cases[0]["providers"]["cpu"].update(harness.failed("inaccurate: 1e-2"))
    assert judged("cpu") == ("not measured", "-")
    cases.clear()
    assert judged("cpu") == judged("cuda") == ("not measured", "-")


@pytest.mark.gpu
@needs_gpu
def test_gpu_case_has_all_figures() -> None:
    device = torch.device("cuda")
    made = batch_norm.make_providers(device)
    del made["torch.compile"]
    case = NormCase(32, 64, 64, 16, residual=True, dtype="bfloat16")
    timer = harness.timer_for(device)
    found = batch_norm.measure_case(case, device, made, timer, rounds=5)["providers"]
    assert {name: each["failure"] for name, each in found.items()} == dict.fromkeys(made)
    for each in found.values():
        both = each["forward_backward"]
        assert both["time"]["median_us"] > 0
        assert both["host"]["median_us"] > 0
        assert 0 < both["copy_share"] < 1.2
