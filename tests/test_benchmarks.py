"""The benchmark of the loss: wrong, missing or too large providers, timers, and runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from benchmark_cases import (
    CPU,
    TINY,
    ScriptedTimer,
    drawn,
    given,
    needs_gpu,
    shown,
)
from torch import Tensor

from vi_simsiam.benchmarks import harness, multiview_loss, plots, tables
from vi_simsiam.benchmarks.batch_norm import norm_cases
from vi_simsiam.benchmarks.cases import Case, cases_for, view_cases
from vi_simsiam.benchmarks.harness import interleave
from vi_simsiam.benchmarks.modes import check, errors
from vi_simsiam.benchmarks.multiview_loss import Provider, reference, results
from vi_simsiam.benchmarks.peers import textbook_loss
from vi_simsiam.benchmarks.results import COMPILED
from vi_simsiam.benchmarks.step import step_cases
from vi_simsiam.benchmarks.train_peers import PROVIDERS
from vi_simsiam.cli import BENCHMARKS, main
from vi_simsiam.engine import graph
from vi_simsiam.errors import InputError
from vi_simsiam.ops.multiview_loss import LossForm, eager_loss


def measured(timer: harness.Timer, **extra: Provider | str) -> dict[str, Any]:
    made = {"eager": given(TINY.form), **extra}
    return multiview_loss.measure_case(TINY, CPU, made, timer, rounds=3)


def test_the_gate_refuses_wrong_results_and_prints_no_time_for_them() -> None:
    def without_gradient(predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        views = [predictions[0], predictions[1].detach()]
        return eager_loss(views, targets, TINY.form).mean() + predictions[1].sum() * 0

    factors = {"wrong": 1 + 1e-5, "nan": float("nan")}
    made = {name: given(TINY.form, factor) for name, factor in factors.items()}
    case = measured(ScriptedTimer(1, 2), half=without_gradient, **made)
    assert case["providers"]["eager"]["correct"]
    assert case["providers"]["eager"]["forward_backward"]["copy_share"] == 0.5
    for name in ("wrong", "half", "nan"):
        found = case["providers"][name]
        assert not found["correct"]
        assert found["failure"].startswith("inaccurate: ")
        assert found["forward"] is found["forward_backward"] is None
    wrong, exact = (case["providers"][name]["gradient_error"] for name in ("wrong", "eager"))
    # In float32 the factor is off by eps / 2 at most; eager's own error adds to that.
    assert wrong == pytest.approx(1e-5, abs=2 * exact + torch.finfo(torch.float32).eps)
    assert f"gradient error {wrong:.1e}, allowed" in case["providers"]["wrong"]["failure"]
    assert case["providers"]["nan"]["gradient_error"] is None
    json.loads(json.dumps(case, allow_nan=False))
    rows = [line.split() for line in shown(tables.modes_case(case)).splitlines()]
    assert [row[3] for row in rows if row[1:2] == ["wrong"]] == ["inaccurate"]


def test_a_gradient_left_unwritten_is_not_hidden_by_the_memory_of_the_last_result() -> None:
    """The first call's gradients are overwritten with NaN, which a second call must replace."""
    exact = reference(*drawn(TINY), TINY.form, torch.float64)
    loss, gradients = exact["loss"][0].item(), exact["gradient"]
    buffers = [torch.zeros(3, 21), torch.zeros(3, 21)]

    class Lazy(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: Any, *predictions: Tensor) -> Tensor:
            return torch.tensor(loss, dtype=torch.float32)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            for buffer, right in zip(buffers, gradients, strict=True):
                if Lazy.calls == 0:
                    buffer.copy_(right)
            Lazy.calls += 1
            return tuple(buffers)

    allowed = {"loss error": 1e-6, "gradient error": 1e-6}
    run = partial(results, lambda p, z: Lazy.apply(*p), drawn(TINY))
    found = check(run, exact, allowed)
    assert Lazy.calls == 2
    assert not found["correct"]
    assert found["gradient_error"] is None


def test_what_cannot_run_or_lacks_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under graph capture the allocator's error is the context of the capture's own."""

    def out_of_memory(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    in_capture = RuntimeError("operation failed due to a previous error during capture")
    in_capture.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    missing = "not available: it takes CUDA tensors"
    case = measured(
        ScriptedTimer(1, in_capture, 3), cpu=given(TINY.form), oom=out_of_memory, triton=missing
    )
    found = case["providers"]
    assert found["oom"]["failure"] == "out of memory"
    assert found["triton"]["failure"] == missing
    assert found["eager"]["forward_backward"] == {"failure": "out of memory"}
    assert found["eager"]["correct"]
    assert found["cpu"]["forward_backward"]["time"]["median_us"] == 3
    text = shown(tables.modes_case(case))
    assert "oom (out of memory)" in text
    assert any("eager" in line and "out of memory" in line for line in text.splitlines())
    broken = measured(ScriptedTimer(1, mock.Mock(side_effect=ValueError("broke"))))
    both = broken["providers"]["eager"]["forward_backward"]
    assert both == {"failure": "ValueError: broke"}
    without_copy = measured(ScriptedTimer(MemoryError()))
    assert without_copy["providers"]["eager"]["correct"]
    assert without_copy["providers"]["eager"]["forward"] == {"failure": "out of memory"}
    monkeypatch.setattr(multiview_loss, "draw_inputs", out_of_memory)
    assert measured(ScriptedTimer(1))["providers"]["eager"]["failure"] == "out of memory", "inputs"


def test_measures_are_taken_in_turn_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def measure(name: str) -> float:
        taken.append(name)
        if name == "bad" and len(taken) > 3:
            raise ValueError("broke")
        return float(len(taken))

    clock = mock.Mock(side_effect=range(100))
    monkeypatch.setattr(harness.time, "perf_counter", clock)
    times, failures = interleave(
        {name: lambda name=name: measure(name) for name in ("a", "bad", "b")},  # type: ignore[misc]
        rounds=50,
        seconds=6.5,
    )
    assert taken[:8] == ["a", "bad", "b", "a", "bad", "b", "a", "b"]
    assert failures == {"bad": "ValueError: broke"}
    assert times.keys() == {"a", "b"}
    assert times["a"]["rounds"] == 11
    assert times["a"]["lower_us"] < times["a"]["median_us"] < times["a"]["upper_us"]


def test_cuda_timer_captures_enough_distinct_calls() -> None:
    """On a fake torch: every set in the graph, warm-up before capture, replay before timing."""
    with mock.patch.object(harness, "torch") as fake, mock.patch.object(graph, "torch", fake):
        fake.cuda.graph_pool_handle.side_effect = ["first pool", "second pool", "third pool"]
        fake.cuda.get_device_properties.return_value.L2_cache_size = 100
        fake.cuda.Event.return_value.elapsed_time.return_value = 8.0
        timer = harness.CudaTimer(torch.device("cuda:0"))
        assert timer.distinct_bytes == 300
        calls: list[int] = []
        many = timer.prepare(calls.append, list(range(40)), 10)
        assert calls == [0, 1, 2, *range(40)]
        order: list[str] = []
        fake.cuda.CUDAGraph.return_value.replay.side_effect = lambda: order.append("replay")
        fake.cuda.Event.return_value.record.side_effect = lambda: order.append("record")
        assert many["time"]() == pytest.approx(8000 / 40)
        assert order == ["replay", "record", "replay", "record"], "busy before the timed replay"
        calls.clear()
        few = timer.prepare(calls.append, [0, 1], 5 * 10**8)
        assert calls == [0, 1, 0, 0, 1, 0, 1]
        assert few["time"]() == 2000
        assert few["host"]() >= 0
        for done in (0, 3):  # in warm-up, and in the capture
            broken = mock.Mock(side_effect=[*[None] * done, ValueError("broke")])
            with pytest.raises(ValueError, match="broke"):
                timer.prepare(broken, [0], 10**10)
        timer.prepare(calls.append, [0], 10**10)
        timer.prepare(calls.append, [0], 10**10)
        pools = [call.kwargs["pool"] for call in fake.cuda.graph.call_args_list]
        assert pools == ["first pool"] * 3 + ["second pool"] * 2, "a failed capture's is dropped"
        fake.cuda.memory_allocated.return_value = 10
        fake.cuda.max_memory_allocated.return_value = 35
        assert timer.peak_bytes(lambda: None) == 25
        timer.release()
        timer.prepare(calls.append, [0], 10**10)
        assert fake.cuda.graph.call_args.kwargs["pool"] == "third pool"


@pytest.mark.gpu
@needs_gpu
def test_gpu_case_has_all_figures() -> None:
    device = torch.device("cuda")
    timer = harness.timer_for(device)
    made = multiview_loss.make_providers(TINY.form, device)
    made = {name: provider for name, provider in made.items() if "compile" not in name}
    case = multiview_loss.measure_case(Case(1024, 512), device, made, timer, rounds=5)
    for name in ("eager", "triton"):
        both = case["providers"][name]["forward_backward"]
        assert both["time"]["median_us"] > 0
        assert both["host"]["median_us"] > 0
        assert both["peak_bytes"] >= 2 * 1024 * 513 * 4
        assert 0 < both["copy_share"] < 1.2


def test_cases_and_inputs_are_those_of_training() -> None:
    case = Case(64, 2048, 8, 2, "bfloat16")
    assert case.least_bytes("forward") == (8 * 64 * 2049 + 2 * 64 * 2048) * 2
    assert case.least_bytes("forward_backward") == (2 * 8 * 64 * 2049 + 2 * 64 * 2048) * 2
    predictions, targets = drawn(dataclasses.replace(case, batch=2, views=3))
    assert all(p.shape == (2, 2049) and p.stride() == (2064, 1) for p in predictions)
    assert all(p.is_leaf and p.requires_grad for p in predictions)
    assert [z.shape for z in targets] == [(2, 2048)] * 2
    assert predictions[0].detach().as_strided((2, 15), (2064, 1), 2049).isnan().all()
    assert not any(x.isnan().any() for x in (*predictions, *targets))
    for device, count, few in (("cpu", 15, 5), ("cuda", 5 * 4 * 2 * 2 + 3, 8)):
        found = [c.name for c in cases_for(device, short=False)]
        assert len(set(found)) == len(found) == count
        assert found[:few] == [c.name for c in cases_for(device, short=True)]


@pytest.mark.parametrize("form", [LossForm("power_spherical", 19.0), LossForm("cosine")], ids=str)
def test_reference_in_pieces_and_textbook_are_eager(
    form: LossForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions, targets = drawn(Case(7, 20, 3, 2, distribution=form.distribution))
    doubles = [p.double() for p in predictions], [z.double() for z in targets]
    loss = eager_loss(*doubles, form).mean()
    whole = {"loss": [loss.detach()], "gradient": torch.autograd.grad(loss, predictions)}
    monkeypatch.setattr(multiview_loss, "_CHUNK_ELEMENTS", 130)
    pieces = reference(predictions, targets, form, torch.float64)
    assert pieces["loss"][0].item() == pytest.approx(loss.item(), rel=1e-14)
    assert max(errors(pieces, whole).values()) < 1e-7
    assert textbook_loss(*doubles, form).mean().item() == pytest.approx(loss.item(), rel=1e-11)
    wrong = {**whole, "loss": [torch.tensor(math.nan)]}
    assert math.isnan(errors(wrong, whole)["loss error"])


def test_providers_that_are_not_here_give_the_reason() -> None:
    made = multiview_loss.make_providers(TINY.form, CPU)
    assert list(made) == ["textbook", "eager", "torch.compile", "cpu"]
    with mock.patch.object(multiview_loss, "why_unavailable", return_value="built without nvcc"):
        on_gpu = multiview_loss.make_providers(TINY.form, torch.device("cuda"))
    assert on_gpu["cuda"] == "not available: built without nvcc"
    assert list(on_gpu)[2:4] == list(COMPILED)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[LossForm]:
    """Four tiny cases and two providers with given times; the forms of the cases measured."""
    cases = tuple(Case(batch, 20) for batch in (3, 4, 5, 6))
    measured: list[LossForm] = []

    def some(form: LossForm, device: torch.device) -> dict[str, Provider | str]:
        measured.append(form)
        return {"eager": given(form), COMPILED[1]: given(form), "cpu": "not available: not built"}

    monkeypatch.setattr(multiview_loss, "cases_for", lambda _, short: cases)
    monkeypatch.setattr(multiview_loss, "make_providers", some)
    monkeypatch.setattr(harness, "timer_for", lambda device: ScriptedTimer(5, 40, 20))
    return measured


def test_run_writes_file_and_plots_and_resumes(tmp_path: Path, made: list[LossForm]) -> None:
    options = multiview_loss.Options(device="cpu", only=" 3x20", rounds=3, out=tmp_path)
    multiview_loss.run(options)
    path = tmp_path / "cpu" / "multiview_loss.json"
    written = json.loads(path.read_text())
    assert [case["name"] for case in written["cases"]] == ["power_spherical 3x20 2x2 float32"]
    assert {"date", "commit", "device", "processor", "driver", "versions"} <= written.keys()
    for plot in plots.plot_paths("multiview_loss", path.parent):
        assert plot.read_bytes().startswith(b"\x89PNG")
    both = dataclasses.replace(options, only="2x2", resume=True)
    with mock.patch.object(plots, "draw", return_value=[]):
        resumed = multiview_loss.run(both)
    assert len(made) == len(resumed["cases"]) == 4, "the case that was there is not measured again"
    path.write_text(path.read_text().replace(written["versions"]["torch"], "0.1"))
    with pytest.raises(InputError, match="was measured with versions"):
        multiview_loss.run(both)
    with pytest.raises(InputError, match="'65x'; there are .*, 'power_spherical 6x20 2x2 float32'"):
        multiview_loss.run(dataclasses.replace(options, only="65x"))


@pytest.mark.usefixtures("made")
def test_short_keeps_its_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """First the provider that compiles longest is left out, then whole cases."""
    options = multiview_loss.Options(device="cpu", short=True, rounds=3)
    suite = harness.Suite("multiview_loss", options)
    with monkeypatch.context() as patch:
        clock = mock.Mock(side_effect=[0.0, 0.0, 40.0, 90.0])
        patch.setattr(harness.time, "perf_counter", clock)
        found = list(suite.cases([Case(batch, 20) for batch in (3, 4, 5)], 100.0))
    reason = "left out: it compiles longest, and --short had used 40 s"
    assert found == [(Case(3, 20), None), (Case(4, 20), reason)]
    left = "left out: power_spherical 5x20 2x2 float32; --short has used 90 s"
    assert left in capsys.readouterr().out
    monkeypatch.setattr(harness.Suite, "cases", lambda *_: found)
    first, second = (case["providers"] for case in multiview_loss.run(options)["cases"])
    assert first[COMPILED[1]]["correct"]
    assert second[COMPILED[1]]["failure"] == reason


def test_the_help_shows_what_only_accepts(capsys: pytest.CaptureFixture[str]) -> None:
    for benchmark, accepted in {
        "loss": [cases_for("cpu", short=False)[0].name],
        "batch_norm": [norm_cases("cpu", short=True)[1].name],
        "augment": [view_cases("cuda", short=False)[2].name],
        "step": [step_cases("cuda", short=False)[2].name],
        "train": list(PROVIDERS),
    }.items():
        assert main(["bench", benchmark, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert [name for name in accepted if name not in text] == []
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in BENCHMARKS)
