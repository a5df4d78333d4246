"""Convolutions with a result of few positions, and the networks on CPUs that use them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import profile

from vi_simsiam import SimSiam
from vi_simsiam.backbones import build_backbone
from vi_simsiam.ops import small_map_convolution as op
from vi_simsiam.ops.small_map_convolution import small_map_convolution, takes

MAPS = [(1, 1), (2, 2), (1, 2), (2, 1), (3, 3), (4, 4)]
CASES = [
    (size, kernel, stride, padding)
    for size, kernel, stride in itertools.product(MAPS, [1, 3, 5, 7], [1, 2])
    for padding in {0, 1, 2, kernel // 2}
    if min(size) + 2 * padding >= kernel
]


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return values.contiguous(memory_format=torch.channels_last).requires_grad_()


def convolution(channels: int = 3, out: int = 5, kernel: int = 3, **options: object) -> nn.Conv2d:
    options = {"padding": kernel // 2, "bias": False} | options
    layer = nn.Conv2d(channels, out, kernel, **options)  # type: ignore[arg-type]
    return layer.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("batch", [3, 0])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_values_and_gradients_are_torchs(batch: int, layout: torch.memory_format) -> None:
    for size, kernel, stride, padding in CASES:
        x, weight = (
            each.detach().contiguous(memory_format=layout).requires_grad_()
            for each in (drawn(batch, 3, *size), drawn(5, 3, kernel, kernel))
        )
        want = F.conv2d(x, weight, stride=stride, padding=padding)
        y = small_map_convolution(x, weight, (stride, stride), (padding, padding))
        torch.testing.assert_close(y, want, msg=lambda text: f"{size, kernel, text}")  # noqa: B023
        gradient = drawn(*y.shape).detach()
        found = torch.autograd.grad(y, (x, weight), gradient)
        torch.testing.assert_close(found, torch.autograd.grad(want, (x, weight), gradient))
        assert found[1].is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_those_of_differences() -> None:
    for size, kernel, stride in [((2, 2), (3, 3), (1, 1)), ((1, 3), (1, 5), (1, 2))]:
        numbers = stride, (kernel[0] // 2, kernel[1] // 2)
        given = drawn(2, 2, *size), drawn(3, 2, *kernel)
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x, w: small_map_convolution(x, w, *numbers), given)  # noqa: B023


def test_a_weight_is_neither_copied_nor_its_gradient() -> None:
    layer = convolution()
    x = drawn(2, 3, 2, 2, dtype=torch.float32)
    found: list[int] = []
    layer.weight.register_hook(lambda gradient: found.append(gradient.data_ptr()))
    small_map_convolution(x, layer.weight, (1, 1), (1, 1)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.stride() == layer.weight.stride()
    assert [layer.weight.grad.data_ptr()] == found
    views = [taps for _, taps, _ in op._products(x, layer.weight, x[:, :, :2], (1, 1), (1, 1))]
    memory = layer.weight.untyped_storage().data_ptr()
    assert views
    assert all(view.untyped_storage().data_ptr() == memory for view in views)


@pytest.mark.parametrize(("trained", "frozen"), [(0, 1), (1, 0)])
def test_nothing_is_computed_for_what_needs_no_gradient(trained: int, frozen: int) -> None:
    given = drawn(2, 3, 1, 1), drawn(5, 3, 3, 3)
    given[frozen].requires_grad_(False)
    y = small_map_convolution(*given, (1, 1), (1, 1))
    with profile() as profiler:
        y.backward(torch.ones_like(y))
    assert [event.name for event in profiler.events()].count("aten::addmm_") == 1
    assert given[trained].grad is not None
    assert given[frozen].grad is None


def run(given: tuple[Tensor, Tensor], stride: int, *, ours: bool) -> tuple[Tensor, ...]:
    """Result and gradients of a convolution with padding 1."""
    leaves = tuple(each.detach().requires_grad_() for each in given)
    numbers = (stride, stride), (1, 1)
    y = small_map_convolution(*leaves, *numbers) if ours else F.conv2d(*leaves, None, *numbers)
    gradient = drawn(*y.shape).detach().bfloat16().to(y.dtype)
    return y, *torch.autograd.grad(y, leaves, gradient)


@pytest.mark.parametrize(("size", "kernel", "stride"), [(1, 3, 1), (2, 3, 1), (4, 3, 2), (7, 9, 1)])
def test_rounding(size: int, kernel: int, stride: int) -> None:
    """Errors against float64: in float32 those that a sum of its terms may have; in bfloat16 and
    under autocast at most twice torch's."""
    given = drawn(16, 32, size, size), drawn(24, 32, kernel, kernel)
    narrow = given[0].bfloat16(), given[1].bfloat16()
    wide, single = (
        tuple(each.to(kind) for each in narrow) for kind in (torch.float64, torch.float)
    )
    exact = run(wide, stride, ours=False)
    bounds = run(tuple(each.abs() for each in wide), stride, ours=False)
    terms = 32 * kernel**2
    for found, want, most in zip(run(single, stride, ours=True), exact, bounds, strict=True):
        assert found.dtype == torch.float32
        assert (found - want).abs().max() <= terms * 2**-24 * most.abs().max()
    for inputs, autocast in ((narrow, False), (single, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, torchs = (run(inputs, stride, ours=mine) for mine in (True, False))
        for found, reference, want in zip(ours, torchs, exact, strict=True):
            assert found.dtype == reference.dtype
            assert (found - want).abs().max() <= 2 * (reference - want).abs().max() + 1e-12


@pytest.mark.parametrize(
    ("options", "size", "taken"),
    [
        ({}, 1, True),
        ({}, 2, True),
        ({"stride": 2}, 4, True),
        ({"kernel": 1, "stride": 2}, 3, True),
        ({"kernel": 7}, 2, True),
        ({}, 3, False),
        ({"stride": 2}, 5, False),
        ({"bias": True}, 1, False),
        ({"dilation": 2, "padding": 2}, 1, False),
        ({"channels": 4, "out": 4, "groups": 2}, 1, False),
        ({"padding_mode": "circular"}, 2, False),
        ({"padding": "same"}, 1, False),
        ({"padding": 0}, 2, False),
    ],
    ids=str,
)
def test_what_is_taken(options: dict[str, object], size: int, taken: bool) -> None:
    """Up to four positions of plain convolutions in channels_last; the rest is torch's."""
    layer = convolution(**options)  # type: ignore[arg-type]
    x = drawn(2, layer.in_channels, size, size).detach().float()
    assert takes(x, layer) == taken
    assert not takes(x.to("meta"), layer)
    if layer.kernel_size != (1, 1):  # for those the layouts are the same
        assert not takes(x, layer.to(memory_format=torch.contiguous_format))


def network(name: str) -> SimSiam:
    """A ResNet of four blocks, whose maps are 4x4, 2x2, 1x1 and 1x1 for images of 16 pixels."""
    torch.manual_seed(0)
    backbone, features = build_backbone(name)
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        del stage[1:]
    model = SimSiam(backbone, features=features, dim=16, projector_hidden=16, predictor_hidden=8)
    return model.double().to(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "taken"), [("resnet18", 9), ("resnet50", 11)])
def test_a_fused_step_is_one_of_separate_passes(
    name: str, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, gradients and running statistics; evaluation keeps torch's layers.

    All convolutions of the last three blocks are ours, but for a first one of 1x1 with stride 1,
    whose result has 4x4 positions.
    """
    calls: list[torch.Size] = []

    def counted(x: Tensor, *numbers: object) -> Tensor:
        calls.append(x.shape)
        return small_map_convolution(x, *numbers)  # type: ignore[arg-type]

    monkeypatch.setattr(op, "small_map_convolution", counted)
    apart = network(name)
    fused = copy.deepcopy(apart)
    fused.fused = True
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=generator) for _ in range(2)]
    losses, counts = [], []
    for model in (apart, fused):
        losses.append(model.loss(model(views), "eager"))
        losses[-1].backward()
        counts.append(len(calls))
    assert counts == [0, taken]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-12)
    for (key, p), q in zip(apart.named_parameters(), fused.named_parameters(), strict=True):
        assert p.grad is not None, key
        assert q[1].grad is not None, key
        assert q[1].grad.stride() == q[1].stride(), key
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(q[1].grad, p.grad, rtol=1e-7, atol=1e-9 * scale)
    torch.testing.assert_close(fused.state_dict(), apart.state_dict())
    fused.eval()(views)
    assert len(calls) == taken


def test_convolutions_with_hooks_stay_torchs() -> None:
    fused, called = network("resnet18"), []
    fused.fused = True
    block = fused.backbone.layer4[0]
    for layer in (block.conv1, block.downsample, block.downsample[0]):
        layer.register_forward_hook(lambda layer, *_: called.append(layer))
    fused([torch.randn(6, 3, 16, 16, dtype=torch.float64) for _ in range(2)])
    assert called == [block.downsample[0], block.downsample, block.conv1]
