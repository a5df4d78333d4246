"""The networks: shapes, the padded output, BatchNorm over views, and refused arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vi_simsiam import PowerSpherical, SimSiam, VISimSiam
from vi_simsiam.backbones import build_backbone
from vi_simsiam.config import LossConfig, ModelConfig, Stem, TrainConfig
from vi_simsiam.errors import InputError
from vi_simsiam.functional import cosine_loss, power_spherical_loss
from vi_simsiam.models import build_model
from vi_simsiam.weights import load_backbone


def small(kind: type[SimSiam], dim: int = 20) -> SimSiam:
    torch.manual_seed(0)
    return kind(nn.Flatten(), features=48, dim=dim, projector_hidden=24, predictor_hidden=8)


def views(count: int = 2) -> list[torch.Tensor]:
    return list(torch.randn(count, 6, 3, 4, 4, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(("kind", "width"), [(SimSiam, 20), (VISimSiam, 21)])
def test_predictions_and_targets(kind: type[SimSiam], width: int) -> None:
    model = small(kind)
    output = model(views(3))
    # Rows are a multiple of 16 elements.
    assert [tuple(p.shape) for p in output.predictions] == [(6, 32)] * 3
    assert all((p[:, width:] == 0).all() for p in output.predictions)
    assert [tuple(t.shape) for t in output.targets] == [(6, 20)] * 2
    assert not any(t.requires_grad for t in output.targets)
    used = [p[:, :width] for p in output.predictions]
    if kind is SimSiam:
        expected, simsiam = cosine_loss(used, output.targets), torch.tensor(0.0)
    else:
        expected = power_spherical_loss(
            used,
            output.targets,
            concentration_scale=19.0,
            concentration_link="quadratic",
            concentration_gain=4 / math.sqrt(8),
        )
        simsiam = cosine_loss([p[:, :20] for p in used], output.targets)
    torch.testing.assert_close(model.loss(output), expected + simsiam)
    torch.testing.assert_close(model.loss(output, loss_scale=0.25), expected / 4 + simsiam)


def test_gradient_reaches_every_weight_except_the_padding() -> None:
    model = small(VISimSiam)
    model.loss(model(views())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    last = model.predictor[-1]
    assert isinstance(last, nn.Linear)
    assert last.weight.grad is not None
    assert (last.weight.grad[21:] == 0).all()
    assert (last.weight.grad[:21].abs().sum(1) > 0).all()


def test_every_view_is_normalised_by_its_own_statistics() -> None:
    """A view's prediction does not depend on other views; BatchNorm counts one update a view."""
    model = small(SimSiam)
    first, second = views()
    alone = model([first, first]).predictions[0]
    together = model([first, 1000 * second]).predictions[0]
    torch.testing.assert_close(alone, together)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    assert {norm.num_batches_tracked.item() for norm in norms} == {4}


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 8), ("medium", 16), ("small", 32)])
def test_stems_of_a_torchvision_backbone(stem: Stem, side: int) -> None:
    """Residual branches start at zero unless asked otherwise."""
    options = {"zero_init_residual": False} if stem == "imagenet" else {}
    network, features = build_backbone("resnet18", stem=stem, **options)
    seen = []
    network.layer1.register_forward_pre_hook(
        lambda module, images: seen.append(images[0].shape[-1])
    )
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, features) == (2, 512)
    assert seen == [side]
    assert (network.layer1[0].bn2.weight == (1 if stem == "imagenet" else 0)).all()


def test_concentration_and_distribution() -> None:
    own = {"features": 48, "dim": 20, "projector_hidden": 24}
    model = VISimSiam(nn.Flatten(), concentration_min=3.0, **own).eval()  # type: ignore[arg-type]
    prediction = torch.zeros(4, 21)
    torch.testing.assert_close(model.concentration(prediction), torch.full((4,), 19 * 0.0202 + 3))
    images = views()[0]
    distribution = model.distribution(images)
    assert isinstance(distribution, PowerSpherical)
    raw = model.predictor(model.projector(model.backbone(images)))
    torch.testing.assert_close(distribution.loc, F.normalize(raw[:, :20], dim=1))
    x = 4 * raw[:, 20] / math.sqrt(512)
    r = x.clamp(min=0.02)
    torch.testing.assert_close(distribution.concentration, 19 * (r + r * r / 2) + 3)
    literal = VISimSiam(
        nn.Flatten(),
        concentration_scale=1.0,
        concentration_link="softplus",
        **own,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(literal.concentration(prediction), torch.full((4,), 0.6931472))


class _Shapes(nn.Module):
    """A backbone that records the shapes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(images.shape))
        return self.norm(images).mean((2, 3))


def test_joint_statistics_are_those_of_all_views_of_a_size() -> None:
    """Views of different brightness look alike by their own statistics, but not jointly."""
    bright = [torch.rand(8, 3, 10, 10), torch.rand(8, 3, 10, 10) + 5]
    local = [torch.rand(8, 3, 6, 6)] * 3
    apart, together = (SimSiam(_Shapes(), features=3, dim=16) for _ in range(2))
    together.load_state_dict(apart.state_dict())
    together.joint_statistics = True
    first, second = apart([*bright, *local]), together([*bright, *local])
    assert apart.backbone.seen == [(8, 3, 10, 10)] * 2 + [(8, 3, 6, 6)] * 3
    assert together.backbone.seen == [(16, 3, 10, 10), (24, 3, 6, 6)]
    assert [x.shape for x in second.predictions] == [x.shape for x in first.predictions]
    assert len(second.targets) == 2
    expected = together.projector(together.backbone(torch.cat(bright)))
    torch.testing.assert_close(torch.cat(second.targets), expected)
    assert not torch.allclose(second.targets[0], first.targets[0], atol=0.1)


def test_running_statistics_weigh_the_views_as_documented() -> None:
    """Global views have mean 0, local views 1: the running mean is the local views' share."""
    views = [torch.zeros(4, 3, 10, 10)] * 2 + [torch.ones(4, 3, 6, 6)] * 6
    for joint, share in ((False, 0.82), (True, 0.53)):
        model = SimSiam(_Shapes(), features=3, dim=16, projector_hidden=8, predictor_hidden=8)
        model.joint_statistics = joint
        for _ in range(60):
            model(views)
        assert model.backbone.norm.running_mean.mean().item() == pytest.approx(share, abs=0.005)


def test_views_that_adjoin_in_memory_pass_without_a_copy() -> None:
    model = small(SimSiam)
    model.shared_passes = True
    seen: list[int] = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].data_ptr()))
    images = torch.randn(3, 6, 4, 4, 3).permute(0, 1, 4, 2, 3)
    adjacent = list(images.unbind(0))
    others = [adjacent[::-1], [adjacent[0], adjacent[2]], [x.clone() for x in adjacent]]
    others += [[adjacent[0], adjacent[1].mT], [adjacent[0], torch._neg_view(adjacent[1])]]
    for given in (adjacent, *others):
        copied = [x.clone() for x in given]
        torch.testing.assert_close(model(given).predictions, model(copied).predictions)
    assert seen[0] == images.data_ptr()
    assert images.data_ptr() not in seen[1:]
    trained = [[x.clone().requires_grad_() for x in adjacent], list(images.requires_grad_())]
    found = []
    for given in trained:
        loss = torch.stack(model(given).predictions)[..., :20].square().sum()
        found.append(torch.autograd.grad(loss, given))
    torch.testing.assert_close(found[1], found[0])


def test_build_model_follows_the_configuration() -> None:
    network = ModelConfig("resnet34", "small", dim=40, projector_hidden=16, predictor_hidden=12)
    loss = LossConfig(
        concentration_scale=2.0, concentration_min=0.5, concentration_gain=3.0, cosine_weight=0.5
    )
    model = build_model(TrainConfig(model=network, loss=loss))
    assert isinstance(model, VISimSiam)
    assert (model.form.scale, model.form.minimum, model.dim) == (2.0, 0.5, 40)
    assert (model.form.gain, model.cosine_weight) == (pytest.approx(3 / 12**0.5), 0.5)
    assert len(model.backbone.layer3) == 6
    assert model.predictor[0].weight.shape == (12, 40)
    assert model.projector[0].weight.shape == (16, 512)
    assert not model.joint_statistics
    other = build_model(TrainConfig(method="simsiam", batch_norm="joint"))
    assert type(other) is SimSiam
    assert other.joint_statistics


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("vgg11", {}, "backbone: 'vgg11' is none of .*resnet18"),
        (nn.Flatten(), {}, "features: the width"),
        (nn.Flatten(), {"features": 4, "dim": 1}, "dim: 1"),
    ],
)
def test_wrong_models_are_named(
    backbone: str | nn.Module, options: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        SimSiam(backbone, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_of_another_kind_are_refused(dtype: torch.dtype) -> None:
    backbone, _ = build_backbone("resnet18")
    tensors = {name: value.to(dtype) for name, value in backbone.state_dict().items()}
    with pytest.raises(InputError, match="init: x.pth: .* is of torch.* must be of torch.float32"):
        load_backbone(backbone, tensors, "x.pth")
    half = {name: value.half() for name, value in backbone.state_dict().items()}
    assert load_backbone(backbone, half, "x.pth").startswith("init: 100 of the backbone's 100")
