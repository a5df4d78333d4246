"""Launches of a step: counts, and their purpose by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from benchmark_cases import CPU, scripted_pipeline
from torch import Tensor, nn

from vi_simsiam.benchmarks.step_parts import (
    OTHER,
    by_kind,
    kind_of,
    launches_markdown,
    launches_of,
)

NORM, CONV = "BatchNorm, addition, ReLU, max-pool", "convolutions"
LINEAR, COPY = "linear layers", "conversions and copies"
ATEN = "void at::native::"
ELEMENTWISE = f"{ATEN}vectorized_elementwise_kernel<8, at::native::"


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

    def step() -> None:
        if not prepared:
            prepared.append(torch.ones(3, 3) @ torch.ones(3, 3))
        prepared[0].relu()

    assert [(each["name"], each["count"]) for each in launches_of(step, CPU)] == [("aten::relu", 1)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x64", CONV),
        ("cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16>", CONV),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float>", CONV),
        ("nvjet_tst_64x64_64x13_4x1_v_bz_splitK_TNN", LINEAR),
        ("cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_32x6_tn>", LINEAR),
        ("aten::mm", LINEAR),
        (f"{ATEN}batch_norm_backward_reduce_channels_last_kernel<4, c10::BFloat16>", NORM),
        (f"{ELEMENTWISE}CUDAFunctor_add<c10::BFloat16>>", NORM),
        (f"{ELEMENTWISE}(anonymous namespace)::launch_clamp_scalar(at::TensorIteratorBase&)", NORM),
        (f"{ATEN}max_pool_forward_nhwc<c10::BFloat16, int>", NORM),
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
