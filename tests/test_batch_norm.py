"""BatchNorm with the addition and the ReLU after it: the public function, and networks that are
made of it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from batch_norm_cases import *  # noqa: F403
from batch_norm_cases import close, draw, exact, parameters_of, results
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torchvision.models import resnet

from vi_simsiam import SimSiam, VISimSiam
from vi_simsiam.backbones import build_backbone
from vi_simsiam.errors import BackendUnavailableError, InputError
from vi_simsiam.normalisation import PerView
from vi_simsiam.ops.backends import interpreting, why_unavailable
from vi_simsiam.ops.batch_norm import batch_norm_act


@pytest.fixture
def fused() -> str:
    """The backend of the imported cases."""
    reason = why_unavailable("cpu", "cpu")
    if reason is not None:
        pytest.skip(reason)
    return "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 1, 1, 1), 1),
        ((6, 3, 5, 7), 3),  # no column of a vector
        ((4, 83, 3, 3), 2),  # columns of whole vectors and single ones
        ((64, 64, 16, 16), 2),  # several tiles
        ((34, 9000), 2),  # few rows in a tile
    ],
    ids=str,
)
def test_tiles_blocks_and_dtypes(
    fused: str, shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    x, gradient, residual = (draw(shape, dtype, seed) for seed in range(3))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = [None if t is None else t.to(wide) for t in parameters_of(shape[1], True)]
    given, options = (x, residual, parameters, gradient), {"groups": groups, "relu": True}
    want = exact(*given, **options)
    got = results(*given, **options, momentum=0.3, eps=1e-3, backend=fused)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    close(got, want, rtol=tolerance, atol=tolerance)


def test_gradients_by_differences(fused: str) -> None:
    x, residual = draw((6, 5, 2, 3), torch.float64), draw((6, 5, 2, 3), torch.float64, seed=1)
    weight, bias, _, _ = (t.double() for t in parameters_of(5, True))
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]

    def result(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        given = x, weight, bias, None, None
        return batch_norm_act(*given, residual=residual, groups=3, backend=fused)

    assert torch.autograd.gradcheck(result, inputs)


def test_tensors_without_memory_of_their_own_are_left_to_eager(fused: str) -> None:
    """Fake, traced, transformed and negated ones."""
    x, other = draw((4, 3, 5, 5)), draw((4, 3, 5, 5), seed=1)

    def result(x: Tensor, residual: Tensor) -> Tensor:
        y = batch_norm_act(x, None, None, None, None, groups=2, residual=residual)
        return (y * other).sum()

    want = result(x, other)
    traced = make_fx(result)(draw((4, 3, 5, 5), seed=2), other)
    torch.testing.assert_close(traced(x, other), want)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(result(leaf, other), leaf)
    torch.testing.assert_close(torch.func.grad(result)(x, other), gradient)
    torch.testing.assert_close(result(x, torch._neg_view(-other)), want)
    with FakeTensorMode():
        fake = torch.empty(4, 3, 5, 5, memory_format=torch.channels_last)
        assert batch_norm_act(fake, None, None, None, None, residual=fake).shape == fake.shape
    y = batch_norm_act(leaf, None, None, None, None, backend=fused)
    (negated,) = torch.autograd.grad(y, leaf, torch._neg_view(-other))
    y = batch_norm_act(leaf, None, None, None, None, backend=fused)
    torch.testing.assert_close(negated, torch.autograd.grad(y, leaf, other)[0])
    with pytest.raises(InputError, match="takes tensors with memory of their own"):
        batch_norm_act(torch._neg_view(x), None, None, None, None, backend=fused)


def test_a_saved_program_is_the_norm(fused: str, tmp_path: Path) -> None:
    """Result and new running statistics of a program that torch.export saved."""

    class Norm(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            numbers = self.weight, self.bias, self.running_mean, self.running_var
            return batch_norm_act(x, *numbers, groups=2, residual=x)

    x, norm = draw((4, 6, 3, 3)), Norm(6)
    program = torch.export.export(copy.deepcopy(norm), (x,))
    assert "vi_simsiam.batch_norm_act" in str(program.graph)
    torch.export.save(program, tmp_path / "norm.pt2")
    loaded = torch.export.load(tmp_path / "norm.pt2").module()
    torch.testing.assert_close(loaded(x), norm(x))
    torch.testing.assert_close(dict(loaded.named_buffers()), dict(norm.named_buffers()))


def test_the_number_of_threads_changes_no_bit(fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (32, 64, 8, 8)
    given = draw(shape), draw(shape, seed=1), parameters_of(64, True), draw(shape, seed=2)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        found.append(results(*given, groups=2, backend=fused))
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


def test_the_reference_is_separate_passes() -> None:
    x, residual = torch.randn(2, 6, 4, 3, 3, dtype=torch.float64).unbind(0)
    weight, bias = torch.randn(2, 4, dtype=torch.float64).unbind(0)
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    y = batch_norm_act(x, weight, bias, mean, var, groups=3, residual=residual, backend="eager")
    want_mean, want_var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for part, added, result in zip(x.chunk(3), residual.chunk(3), y.chunk(3), strict=True):
        want = F.batch_norm(part, want_mean, want_var, weight, bias, training=True)
        torch.testing.assert_close(result, (want + added).relu())
    torch.testing.assert_close((mean, var), (want_mean, want_var))
    evaluated = batch_norm_act(x, weight, bias, mean, var, groups=3, relu=False, training=False)
    torch.testing.assert_close(evaluated, F.batch_norm(x, mean, var, weight, bias))
    torch.testing.assert_close((mean, var), (want_mean, want_var))
    narrow = x[..., 0, 0].bfloat16(), residual[..., 0, 0].float()
    result = batch_norm_act(narrow[0], *[None] * 4, residual=narrow[1], backend="eager")
    assert result.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 3, 2), {}, r"x: shape \(4, 3, 2\) must be \(N, C, height, width\) or \(N, C\)"),
        ((4, 3), {"groups": 3}, "groups: 3 must divide the batch of 4"),
        ((4, 3), {"groups": 0}, "groups: 0 must divide"),
        ((4, 3), {"groups": 4}, "in 4 groups must hold more than one value per channel and group"),
        ((1, 3, 1, 1), {}, "more than one value"),
        (
            (4, 3),
            {"residual": torch.zeros(4, 1)},
            r"residual: shape \(4, 1\) must be that of x, \(4, 3\)",
        ),
        (
            (4, 3),
            {"residual": torch.zeros(4, 3, device="meta")},
            "residual: on meta, must be on x's device cpu",
        ),
        ((4, 3), {"backend": "cudnn"}, "backend: 'cudnn' is none of auto, eager, triton, cpu"),
    ],
)
def test_wrong_input_is_named(
    shape: tuple[int, ...], options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        batch_norm_act(torch.randn(shape), None, None, None, None, **options)


@pytest.mark.skipif(torch.cuda.is_available() or interpreting(), reason="Triton can run here")
def test_a_backend_that_cannot_run_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="'triton' cannot run on cpu tensors"):
        batch_norm_act(torch.randn(4, 3), None, None, None, None, backend="triton")


def _pair(
    kind: type[SimSiam], name: str = "resnet18", way: str = "fused"
) -> tuple[SimSiam, SimSiam]:
    """The same network of two blocks twice; the second one passes views of one size together."""
    torch.manual_seed(0)
    backbone, _ = build_backbone(name, stem="small")
    backbone.layer1, backbone.layer2 = backbone.layer1[:1], backbone.layer2[:1]
    backbone.layer3 = backbone.layer4 = nn.Identity()
    apart = kind(
        backbone,
        features=128 if name == "resnet18" else 512,
        dim=16,
        projector_hidden=16,
        predictor_hidden=8,
        local_predictor=True,
    )
    # Residual branches start at zero, and with them the gradients of what they hold.
    for module in apart.modules():
        if isinstance(module, PerView) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    apart.double().to(memory_format=torch.channels_last)
    together = copy.deepcopy(apart)
    setattr(together, way, True)
    return apart, together


def _views(step: int) -> list[Tensor]:
    """Two global views and a local one."""
    generator = torch.Generator().manual_seed(step)
    views = [
        torch.randn(6, 3, size, size, generator=generator, dtype=torch.float64) * (i + 1) + i
        for i, size in enumerate((8, 8, 4))
    ]
    return [view.contiguous(memory_format=torch.channels_last) for view in views]


@pytest.mark.parametrize(
    ("kind", "backbone", "way", "steps"),
    [
        (VISimSiam, "resnet18", "fused", 4),
        (SimSiam, "resnet50", "fused", 1),
        (VISimSiam, "resnet18", "shared_passes", 2),
    ],
    ids=["basic", "bottleneck", "not fused"],
)
def test_training_steps_are_those_of_separate_passes(
    kind: type[SimSiam], backbone: str, way: str, steps: int
) -> None:
    models = _pair(kind, backbone, way)
    optimisers = [torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9) for model in models]
    passes: list[int] = []
    models[1].backbone.register_forward_pre_hook(
        lambda module, images: passes.append(len(images[0]))
    )
    for step in range(steps):
        losses = []
        for model, optimiser in zip(models, optimisers, strict=True):
            optimiser.zero_grad()
            loss = model.loss(model(_views(step)), "eager")
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-8)
    assert passes == [12, 6] * steps
    apart, together = models
    for (name, p), q in zip(apart.named_parameters(), together.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(
            q.grad, p.grad, msg=lambda m, n=name: f"{n}: {m}", rtol=1e-6, atol=1e-8
        )
    torch.testing.assert_close(together.state_dict(), apart.state_dict(), rtol=1e-6, atol=1e-8)
    assert together.backbone.bn1.num_batches_tracked == 3 * steps
    assert together.local_predictor[1].num_batches_tracked == steps


@pytest.mark.parametrize("joint", [False, True])
def test_target_networks_and_joint_statistics(joint: bool) -> None:
    apart, together = _pair(SimSiam)
    for model in (apart, together):
        model.add_target()
        model.joint_statistics = joint
        model.update_target(torch.tensor(0.5))
    first, second = (model(_views(0)) for model in (apart, together))
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(together.state_dict(), apart.state_dict())
    assert together.target[0].bn1.num_batches_tracked == (1 if joint else 2)


def test_evaluation_does_not_change() -> None:
    """That of the whole network, and of a part of one that trains, which counts no batch."""
    apart, together = _pair(VISimSiam)
    apart(_views(0))
    together.load_state_dict(apart.state_dict())
    before = copy.deepcopy(together.state_dict())
    first, second = (model.eval()(_views(1)) for model in (apart, together))
    assert all(
        torch.equal(x, y) for x, y in zip(first.predictions, second.predictions, strict=True)
    )
    torch.testing.assert_close(together.state_dict(), before, rtol=0, atol=0)
    together.train().backbone.eval()
    together(_views(0))
    assert together.backbone.bn1.num_batches_tracked == 3
    assert together.projector[1].num_batches_tracked == 6


@torch.no_grad()
def test_layers_with_settings_of_their_own() -> None:
    """A norm in eval mode within a training block, a first convolution of stride 1 and another
    pool."""
    apart, together = _pair(SimSiam)
    for model in (apart, together):
        model.backbone.layer1[0].bn2.eval()
        model.backbone.conv1.stride = (1, 1)
        model.backbone.maxpool = nn.MaxPool2d(2)
    wanted, found = apart(_views(0)), together(_views(0))
    torch.testing.assert_close(found.predictions, wanted.predictions)
    torch.testing.assert_close(dict(together.named_buffers()), dict(apart.named_buffers()))


def test_outside_of_a_step_modules_are_torch_s() -> None:
    """In training mode, too: one batch, counted."""
    _, together = _pair(VISimSiam)
    plain = copy.deepcopy(together)
    plain.fused = False
    images = _views(0)[0]
    torch.testing.assert_close(together.backbone(images), plain.backbone(images))
    assert together.backbone.bn1.num_batches_tracked == 1
    copies = [copy.deepcopy(together), pickle.loads(pickle.dumps(together))]
    want = together(_views(0))
    for model in copies:
        torch.testing.assert_close(model(_views(0)), want)
        assert model.state_dict().keys() == together.state_dict().keys()


def test_names_are_torchvision_s() -> None:
    network, _ = build_backbone("resnet50")
    known = resnet.resnet50().state_dict()
    assert [name for name in known if not name.startswith("fc.")] == list(network.state_dict())
    assert isinstance(network, resnet.ResNet)
