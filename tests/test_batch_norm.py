"""BatchNorm with the addition and the ReLU after it: the public function, and networks that are
made of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vi_simsiam import SimSiam, VISimSiam
from vi_simsiam.backbones import build_backbone
from vi_simsiam.errors import BackendUnavailableError, InputError
from vi_simsiam.normalisation import PerView
from vi_simsiam.ops.backends import interpreting
from vi_simsiam.ops.batch_norm import batch_norm_act


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


def test_the_result_has_the_dtype_of_its_input() -> None:
    x = torch.randn(4, 3, dtype=torch.bfloat16)
    assert (
        batch_norm_act(x, None, None, None, None, residual=torch.randn(4, 3), backend="eager").dtype
        == x.dtype
    )


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
        ((4, 3), {"backend": "cudnn"}, "backend: 'cudnn' is none of auto, eager, triton"),
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
    kind: type[SimSiam], backbone: str, dtype: torch.dtype = torch.float64
) -> tuple[SimSiam, SimSiam]:
    """The same network twice, the second one fused."""
    torch.manual_seed(0)
    apart = kind(
        backbone,
        dim=16,
        projector_hidden=16,
        predictor_hidden=8,
        local_predictor=True,
        stem="small",
    )
    # Residual branches start at zero, and with them the gradients of what they hold.
    for module in apart.modules():
        if isinstance(module, PerView) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    apart.to(dtype).to(memory_format=torch.channels_last)
    together = copy.deepcopy(apart)
    together.fused = True
    return apart, together


def _views(step: int, dtype: torch.dtype = torch.float64, local: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    sizes = [8] * 2 + [4] * local
    views = [
        torch.randn(6, 3, size, size, generator=generator, dtype=torch.float64) * (i + 1) + i
        for i, size in enumerate(sizes)
    ]
    return [view.to(dtype).contiguous(memory_format=torch.channels_last) for view in views]


@pytest.mark.parametrize(
    ("kind", "backbone", "steps"),
    [(VISimSiam, "resnet18", 10), (SimSiam, "resnet50", 1)],
    ids=["basic", "bottleneck"],
)
def test_training_steps_are_those_of_separate_passes(
    kind: type[SimSiam], backbone: str, steps: int
) -> None:
    models = _pair(kind, backbone)
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
        # Ten steps make much of the last digit: a ReLU passes what another does not.
        torch.testing.assert_close(
            q.grad, p.grad, msg=lambda m, n=name: f"{n}: {m}", rtol=1e-3, atol=1e-5
        )
    torch.testing.assert_close(together.state_dict(), apart.state_dict(), rtol=1e-4, atol=1e-6)
    assert together.backbone.bn1.num_batches_tracked == 3 * steps
    assert together.local_predictor[1].num_batches_tracked == steps


@pytest.mark.parametrize("joint", [False, True])
def test_target_networks_and_joint_statistics(joint: bool) -> None:
    apart, together = _pair(SimSiam, "resnet18")
    for model in (apart, together):
        model.add_target()
        model.joint_statistics = joint
        model.update_target(torch.tensor(0.5))
    first, second = (model(_views(0)) for model in (apart, together))
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(together.state_dict(), apart.state_dict())
    assert together.target[0].bn1.num_batches_tracked == (1 if joint else 2)


def test_evaluation_does_not_change() -> None:
    apart, together = _pair(VISimSiam, "resnet18")
    apart(_views(0))
    together.load_state_dict(apart.state_dict())
    before = copy.deepcopy(together.state_dict())
    first, second = (model.eval()(_views(1)) for model in (apart, together))
    assert all(
        torch.equal(x, y) for x, y in zip(first.predictions, second.predictions, strict=True)
    )
    torch.testing.assert_close(together.state_dict(), before, rtol=0, atol=0)


def test_a_frozen_backbone_counts_nothing() -> None:
    _, together = _pair(VISimSiam, "resnet18")
    together.backbone.eval()
    together(_views(0))
    assert together.backbone.bn1.num_batches_tracked == 0
    assert together.projector[1].num_batches_tracked == 3


@torch.no_grad()
def test_layers_with_settings_of_their_own() -> None:
    """A norm in eval mode within a training block, a first convolution of stride 1 and another
    pool, in double precision."""
    torch.manual_seed(0)
    model = SimSiam(dim=16, projector_hidden=16, predictor_hidden=8).double().train()
    backbone = model.backbone
    backbone.layer1[0].bn2.eval()
    backbone.conv1.stride = (1, 1)
    backbone.maxpool = nn.MaxPool2d(2)
    views = [torch.randn(4, 3, 16, 16, dtype=torch.float64) for _ in range(2)]
    expected = copy.deepcopy(model)
    model.fused = True
    wanted, found = expected(views), model(views)
    torch.testing.assert_close(found.predictions, wanted.predictions)
    torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()))


def test_outside_of_a_step_modules_are_torch_s() -> None:
    """In training mode, too: one batch, counted."""
    _, together = _pair(VISimSiam, "resnet18")
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
    import torchvision

    network, _ = build_backbone("resnet50")
    known = torchvision.models.resnet50().state_dict()
    assert [name for name in known if not name.startswith("fc.")] == list(network.state_dict())
    assert isinstance(network, torchvision.models.ResNet)


def test_compiled_it_is_the_same() -> None:
    """The reference under torch.compile; the fused operators are traced in the interpreter's and
    the GPU's cases."""
    apart, together = _pair(SimSiam, "resnet18")
    torch._dynamo.reset()
    compiled = torch.compile(together, backend="aot_eager")
    torch.testing.assert_close(compiled(_views(0)), apart(_views(0)))
    torch.testing.assert_close(together.state_dict(), apart.state_dict())
