"""The benchmark of the step: its losses, its parts, its launches, and a case on a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from benchmark_cases import CPU, needs_gpu, scripted_pipeline, shown
from test_pipeline_benchmarks import TINY
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vi_simsiam.benchmarks import cases, launches, plots, step, step_parts, tables
from vi_simsiam.benchmarks.cases import ViewCase
from vi_simsiam.benchmarks.harness import Timer, timer_for
from vi_simsiam.benchmarks.launches import (
    OTHER,
    by_kind,
    kind_of,
    launches_case,
    launches_markdown,
    launches_of,
)
from vi_simsiam.benchmarks.results import (
    AT_HAND,
    NETWORK,
    NETWORK_COMPILED,
    NETWORK_KERNELS,
    STEP,
)
from vi_simsiam.benchmarks.step_parts import Parts, StepCase, WholeStep
from vi_simsiam.config import Method, ModelConfig, TrainConfig
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.loader import MultiViewLoader
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import FileSource
from vi_simsiam.engine.train import Trainer

ONE_PASS, VIEW_BY_VIEW = f"{AT_HAND}, torch", f"{AT_HAND}, torch, view by view"
NORM, CONV = "BatchNorm, addition, ReLU, max-pool", "convolutions"
LINEAR, COPY = "linear layers", "conversions and copies"
ATEN = "void at::native::"
ELEMENTWISE = f"{ATEN}vectorized_elementwise_kernel<8, at::native::"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedImages:
    folder = tmp_path_factory.mktemp("generated")
    return in_memory(FileSource(cases.generate(folder, count=8, sides=TINY.sides)))


@dataclasses.dataclass(frozen=True)
class TinyStep(StepCase):
    @property
    def config(self) -> TrainConfig:
        small = ModelConfig(dim=16, projector_hidden=8, predictor_hidden=8)
        return dataclasses.replace(super().config, model=small)


class OperationTimer(Timer):
    """Counts PyTorch's operations instead of seconds: the same on a busy machine."""

    def release(self) -> None:
        """Keep it: the collector takes longer than a case."""

    @staticmethod
    def _time(call: Callable[[Any], object], sets: Sequence[Any], calls: int) -> float:
        class Counter(TorchDispatchMode):
            count = 0

            def __torch_dispatch__(
                self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                self.count += 1
                return operation(*args, **(kwargs or {}))

        with Counter() as counter:
            call(sets[0])
        return float(counter.count)


@pytest.fixture
def short_steps(small_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One convolution, one step a measurement, kernels, and no workers or compiler."""
    monkeypatch.setattr(step_parts, "why_unavailable", lambda *_: None)
    monkeypatch.setitem(step_parts.STEPS, "cpu", 1)
    monkeypatch.setattr(step, "_CHECKED_STEPS", 2)
    monkeypatch.setattr(step_parts, "MultiViewLoader", partial(MultiViewLoader, workers=0))
    monkeypatch.setattr(torch.compiler, "reset", mock.Mock())
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=RuntimeError("no compiler")))


@pytest.mark.usefixtures("short_steps")
def test_a_step_is_measured_whole_and_in_parts(packed: PackedImages) -> None:
    case = TinyStep(ViewCase(2, 16), "vi-simsiam")
    found = step.measure_case(case, packed, CPU, OperationTimer(), rounds=3)
    assert found["name"] == "vi-simsiam 2x16 batch 2"
    providers = found["providers"]
    assert providers[STEP]["losses"] == pytest.approx(found["losses"], abs=1e-4)
    assert providers[NETWORK_COMPILED]["failure"] == "RuntimeError: no compiler"
    timed = {name for name, provider in providers.items() if provider["time"] is not None}
    steps = (VIEW_BY_VIEW, ONE_PASS, AT_HAND)
    assert timed == {STEP, NETWORK, NETWORK_KERNELS, *steps, *step.PIECES}
    times = {name: providers[name]["time"]["median_us"] for name in timed}
    assert 50 < times[NETWORK] < times[ONE_PASS], "the loss and the optimizer come on top"
    assert times[NETWORK_KERNELS] < times[AT_HAND] < times[ONE_PASS] < times[VIEW_BY_VIEW]
    assert times["optimiser"] < times[AT_HAND]
    assert found["phases"]["backward"] > 0
    # Multiplications and additions of 4 views: forward, and the gradients of weights and, except
    # of the images, of inputs.
    convolution = 2 * 2 * (7 * 7) * 8 * (3 * 3 * 3)
    layers = Parts(case, CPU).model.modules()
    linear = [2 * 3 * m.in_features * m.out_features for m in layers if hasattr(m, "in_features")]
    assert found["flops"] == 4 * (convolution + sum(linear))
    text = shown(tables.step_case(found))
    assert "no compiler" in text
    assert f"losses of the plain loop: {found['losses'][0]:.4f}" in text


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("short_steps")
def test_launches_are_counted_after_all_times(
    packed: PackedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpu" / "step.json"
    timed: list[list[bool]] = []

    def count(call: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
        found = json.loads(path.read_text())["cases"]
        timed.append([case["providers"][STEP]["time"] is not None for case in found])
        return launches_of(call, device)

    both = [TinyStep(ViewCase(2, 16), method) for method in ("vi-simsiam", "simsiam")]
    monkeypatch.setattr(step, "_CHECKED_STEPS", 1)
    monkeypatch.setattr(step, "_images", lambda *_: packed)
    monkeypatch.setattr(step.harness, "timer_for", lambda device: OperationTimer())
    monkeypatch.setattr(step, "step_cases", lambda *_, short: both)
    monkeypatch.setattr(step, "launches_of", count)
    monkeypatch.setattr(plots, "draw", lambda *_: [])
    options = step.Options(device="cpu", rounds=3, kernels=True, out=tmp_path)
    step.run(options)
    assert timed == [[True, True]] * 6, "every time is in the file before"
    first, _ = json.loads(path.read_text())["cases"]
    assert first["method"] == "vi-simsiam"
    assert list(first["launches"]) == ["torch, view by view", "torch", "kernels"]
    counted = by_kind(first["launches"]["torch"])
    assert counted["loss"][0] == counted["SGD"][0] == 1
    assert f"({counted['convolutions'][0]})" in shown(launches_case(first))
    path.write_text(path.read_text().replace('"launches": ', '"other": ', 1))
    step.run(dataclasses.replace(options, resume=True))
    assert len(timed) == 9, "--resume counts only what is missing"


def test_layers_that_cannot_run_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training's layers have the short name, whichever they are."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(step_parts, "why_unavailable", lambda *_: None)
    steps = {VIEW_BY_VIEW: "torch, view by view", ONE_PASS: "torch"}
    assert step.layers_at_hand(CPU) == {**steps, AT_HAND: "kernels"}
    compiled = {f"{AT_HAND}, torch.compile": "torch.compile"}
    assert step.layers_at_hand(cuda) == {**steps, **compiled, AT_HAND: "kernels"}
    alone = {NETWORK: "torch", NETWORK_COMPILED: "torch.compile"}
    assert step.layers_alone(CPU) == {**alone, NETWORK_KERNELS: "kernels"}
    monkeypatch.setattr(step_parts, "why_unavailable", lambda name, kind: f"no {name} on {kind}")
    assert step.layers_at_hand(CPU) == {VIEW_BY_VIEW: "torch, view by view", AT_HAND: "torch"}
    assert step.layers_alone(CPU) == alone


@pytest.mark.parametrize(
    ("kernels", "one_pass", "ours"),
    [(True, "- | 2.00 | -", "1.03 | 1.00 | 2.00 x"), (False, "1.03 | 2.00 | 2.00 x", "- | - | -")],
)
def test_levers_in_markdown(kernels: bool, one_pass: str, ours: str) -> None:
    """A row for each kind of layers; where kernels cannot run, training's layers are torch's."""
    result = scripted_pipeline("step")
    case = result["cases"][0]
    if not kernels:
        del case["providers"][NETWORK_KERNELS]
    rows = tables.layers_markdown({**result, "cases": [case]}).splitlines()[2:6]
    assert rows == [
        f"| {case['label']}: PyTorch's, view by view | 2.06 | - | 1.00 x |",
        f"| {case['label']}: PyTorch's, all views in one pass | {one_pass} |",
        f"| {case['label']}: torch.compile, all views in one pass | - | 1.25 | - |",
        f"| {case['label']}: our kernels, all views in one pass | {ours} |",
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("short_steps")
def test_a_step_without_memory_is_a_result(packed: PackedImages) -> None:
    with mock.patch.object(Parts, "flops", side_effect=MemoryError()):
        found = step.measure_case(TinyStep(TINY, "simsiam"), packed, CPU, Timer(), rounds=3)
    assert {provider["failure"] for provider in found["providers"].values()} == {"out of memory"}
    assert step.count_launches(TinyStep(TINY, "simsiam"), found, CPU) == {}
    assert set(found["phases"].values()) == {None}
    assert "out of memory" in shown(tables.step_case(found))
    row = "| simsiam, 2x16+2x8, batch 4 | out of memory | out of memory | - | - | - | - |"
    assert row in tables.step_markdown({**scripted_pipeline("step"), "cases": [found]})


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("method", ["simsiam", "vi-simsiam"])
def test_the_network_of_the_step_is_the_trainers(method: Method, tmp_path: Path) -> None:
    parts = Parts(TinyStep(TINY, method), CPU)
    changed = {"device": "cpu", "data": "fashion-mini", "workers": 0, "cache_dir": tmp_path}
    trainer = Trainer(dataclasses.replace(parts.case.config, **changed), tmp_path / "run")  # type: ignore[arg-type]
    trainer.loader.close()
    for name in ("shared_passes", "joint_statistics"):
        assert getattr(parts.model, name) == getattr(trainer.model, name)
    assert parts.loss_scale == trainer.config.loss_scale
    weights = zip(parts.model.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in weights)


@pytest.mark.usefixtures("short_steps")
def test_a_step_that_trains_otherwise_is_refused(packed: PackedImages) -> None:
    parts = Parts(TinyStep(TINY, "simsiam"), CPU)
    expected = parts.plain_losses(parts.batches(packed, 2))
    whole = WholeStep(parts, packed, captured=True)
    whole.step.rates *= 50
    losses = whole.losses(2)
    whole.loader.close()
    assert losses[0] == pytest.approx(expected[0], abs=1e-5), "the same weights and views"
    found = step.judge(losses, expected, 1e-4)
    assert found["failure"].startswith("wrong: losses ")
    assert found["losses"] == losses
    assert not step.judge([math.nan, 1.0], [1.0, 1.0], 1e-4)["correct"]
    assert step.judge([-0.5, 8.00005], [-0.50005, 8.0], 1e-4)["correct"]
    assert not step.judge([0.5, 8.0005], [0.5, 8.0], 1e-4)["correct"]


def test_phases_are_differences() -> None:
    medians = {STEP: 110, AT_HAND: 100}
    medians |= dict(zip(step.PIECES, (30, 30, 32, 90, 6), strict=True))
    found = {name: {"time": {"median_us": value}} for name, value in medians.items()}
    assert step.phases(found) == {
        "augmentation": 30,
        "exposed augmentation": 10,
        "forward": 30,
        "loss": 2,
        "backward": 58,
        "optimiser": 6,
        "gaps": 4,
    }
    found["forward"]["time"] = None  # type: ignore[assignment]
    without = step.phases(found)
    assert (without["forward"], without["loss"], without["backward"]) == (None, None, 58)


def test_launches_of_a_step_are_counted_by_what_they_are_for() -> None:
    """On a CPU the operators that compute, in both directions; views and allocations do not.

    What a step prepares when it is first run does not count.
    """
    normalised = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    network = nn.Sequential(normalised, nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(5, 3, 4, 4)
    found = by_kind(launches_of(lambda: network(x).sum().backward(), CPU))
    assert found["convolutions"][0] == 4
    assert found["linear layers"][0] == 3
    assert found[NORM][0] >= 2 * 2 + 1, "with the counter of batches"
    assert all(us > 0 for _, us in found.values())
    assert launches_of(lambda: x.view(5, -1).t().detach(), CPU) == []
    prepared: list[Tensor] = []

    def twice() -> None:
        if not prepared:
            prepared.append(torch.ones(3, 3) @ torch.ones(3, 3))
        prepared[0].relu()

    (launched,) = launches_of(twice, CPU)
    assert (launched["name"], launched["count"]) == ("aten::relu", 1)


def test_functions_of_the_extension_are_counted_unless_an_operator_calls_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = SimpleNamespace(sqrt=math.sqrt)

    class Calling(Tensor):
        @classmethod
        def __torch_dispatch__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Tensor:
            return torch.full((), compiled.sqrt(4.0))

    calling = Tensor._make_subclass(Calling, torch.zeros(()))
    monkeypatch.setattr(launches, "extension", lambda: compiled)
    found = launches_of(lambda: (compiled.sqrt(9.0), torch.relu(calling)), CPU)
    assert {each["name"]: each["count"] for each in found} == {"sqrt": 1, "aten::relu": 1}
    assert compiled.sqrt is math.sqrt
    monkeypatch.setattr(launches, "extension", lambda: None)
    assert [each["name"] for each in launches_of(lambda: torch.ones(2).relu(), CPU)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x64", CONV),
        ("cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_32x6_tn>", LINEAR),
        (f"{ATEN}batch_norm_backward_reduce_channels_last_kernel<4, c10::BFloat16>", NORM),
        (f"{ELEMENTWISE}CUDAFunctor_add<c10::BFloat16>>", NORM),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>", NORM),
        ("aten::add_.Tensor", NORM),
        (f"{ATEN}multi_tensor_apply_kernel<at::native::FusedSgdMathFunctor<float, 3>>", "SGD"),
        (f"{ATEN}multi_tensor_apply_kernel<at::native::CopyFunctor<float, c10::BFloat16>>", COPY),
        ("Memcpy DtoD (Device -> Device)", COPY),
        ("triton_poi_fused_relu_3", "fused by torch.compile"),
        (f"{ATEN}reduce_kernel<512, 1, at::native::ReduceOp<float>>", OTHER),
    ],
)
def test_kinds_of_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_all_kernels_of_the_project_have_a_kind() -> None:
    names = [
        name
        for path in (Path(__file__).parents[1] / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    ]
    assert len(names) > 10
    assert {name: kind_of(name) for name in names if kind_of(name) == OTHER} == {}


def test_launches_in_markdown() -> None:
    result = scripted_pipeline("step")
    case = result["cases"][0]
    assert launches_markdown(result) == "Not measured."
    case["launches"] = {"kernels": []}
    assert "| all | 0 (0) |" in launches_markdown(result), "a profiler that sees nothing"
    entries = [("aten::convolution", 40, 1500.0), ("aten::mm", 3, 20.0), ("aten::sum", 2, 0.4)]
    counted = [
        {"kind": kind_of(name), "name": name, "count": count, "us": us}
        for name, count, us in entries
    ]
    case["launches"] = {"torch": counted, "kernels": counted[:1]}
    assert launches_markdown(result).splitlines()[:6] == [
        f"| {case['label']}: microseconds (launches) | torch | kernels |",
        "|---|---:|---:|",
        "| convolutions | 1,500 (40) | 1,500 (40) |",
        "| linear layers | 20 (3) | - |",
        "| everything else | 0 (2) | - |",
        "| all | 1,520 (45) | 1,500 (40) |",
    ]


@pytest.mark.gpu
@needs_gpu
def test_gpu_step_is_captured_and_has_all_phases() -> None:
    """With the default network: a tiny one amplifies the rounding of bfloat16."""
    device = torch.device("cuda")
    case = StepCase(ViewCase(32, 32, 2, 16, sides=(32, 40)), "vi-simsiam")
    made = step._images(case, "cuda")
    found = step.measure_case(
        case, made, device, timer_for(device), rounds=3, without_compile="left out"
    )
    failures = {n: each["failure"] for n, each in found["providers"].items() if each["failure"]}
    assert failures == dict.fromkeys((NETWORK_COMPILED, f"{AT_HAND}, torch.compile"), "left out")
    launches = step.count_launches(case, found, device)
    assert launches.keys() == {"torch, view by view", "torch", "kernels"}
    ours, theirs = (by_kind(launches[layers]) for layers in ("kernels", "torch, view by view"))
    assert ours["loss"][0] <= 2
    assert sum(count for count, _ in ours.values()) < sum(count for count, _ in theirs.values())
    assert all(us > 0 for _, us in ours.values())
    assert None not in found["phases"].values()
    whole = WholeStep(Parts(case, device), made, captured=True)
    whole.step.rates.zero_()
    losses = whole.losses(step._CHECKED_STEPS)
    whole.loader.close()
    tolerance = step._TOLERANCE["cuda"][case.method] / whole.step.loss_scale
    assert not step.judge(losses, found["losses"], tolerance)["correct"], "updates are missed"
