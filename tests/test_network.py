"""The network as a training step calls it: with which layers, and with weights in bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_trainer import config
from torch import Tensor

from vi_simsiam.backbones import build_backbone
from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.graph_rules import Rules
from vi_simsiam.engine.network import Bfloat16Weights, training_network, use_kernels
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError
from vi_simsiam.models import VISimSiam
from vi_simsiam.ops.stem_convolution import _OverBlocks


def _model() -> VISimSiam:
    torch.manual_seed(0)
    backbone, _ = build_backbone("resnet18")
    backbone.layer3 = backbone.layer4 = torch.nn.Identity()
    model = VISimSiam(
        backbone,
        features=128,
        dim=64,
        projector_hidden=32,
        predictor_hidden=16,
        local_predictor=True,
    )
    return model.to(memory_format=torch.channels_last)


def _gradients(
    network: object, model: VISimSiam, views: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(network(views), "eager")  # type: ignore[operator]
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


def test_bfloat16_weights_are_those_of_autocast() -> None:
    """Loss and gradients, in float32 and in the weights' layout; unused weights have none."""
    model = _model()
    views = [torch.randn(4, 3, 32, 32).bfloat16() for _ in range(2)]
    plain, converted = copy.deepcopy(model), copy.deepcopy(model)
    expected, wanted = _gradients(plain, plain, views)
    loss, found = _gradients(Bfloat16Weights(converted), converted, views)
    torch.testing.assert_close(loss, expected)
    assert {name for name, gradient in found.items() if gradient is None} == {
        name for name in found if name.startswith("local_predictor.")
    }
    for name, weight in converted.named_parameters():
        gradient = found[name]
        if gradient is not None:
            assert gradient.dtype == torch.float32
            assert gradient.stride() == weight.stride(), name
            torch.testing.assert_close(gradient, wanted[name])


def test_layers_of_a_training_network() -> None:
    model = _model()
    assert training_network(model, kernels=False, bf16=True) is model
    assert (model.shared_passes, model.fused) == (True, False)
    assert isinstance(training_network(model, kernels=True, bf16=True), Bfloat16Weights)
    assert (model.shared_passes, model.fused) == (True, True)
    assert training_network(model, kernels=True) is model
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(_model())
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten()
    own = VISimSiam(torch.nn.Sequential(*layers), features=8 * 36, dim=64)
    for other in (synchronised, own):
        assert training_network(other, kernels=True, bf16=True) is other
        assert not other.shared_passes, "its BatchNorm would normalise the views as one batch"
        assert not other.fused
    compiled = training_network(model, kernels=True, compiled=True, bf16=True)
    assert not isinstance(compiled, Bfloat16Weights)
    assert not model.fused


def test_the_stems_weight_is_rearranged_on_the_device() -> None:
    """A table made on the host would be copied in every step, which a CUDA graph cannot."""
    weight = torch.empty(8, 3, 7, 7, device="meta", requires_grad=True)
    with Rules(torch.device("meta"), (weight,)):
        (gradient,) = torch.autograd.grad(_OverBlocks.apply(weight).sum(), weight)
    assert gradient.shape == weight.shape


def test_unavailable_kernels_are_refused_before_the_folder_is_touched(
    image_folder: Path, tmp_path: Path
) -> None:
    settings = config(image_folder, kernels="on")
    message = "kernels: 'on' cannot be used: .* not cpu; auto and off run here"
    with pytest.raises(InputError, match=message):
        Trainer(settings, tmp_path / "run", console=Console(quiet=True))
    assert not (tmp_path / "run").exists()
    for kernels in ("auto", "off"):
        assert not use_kernels(TrainConfig(kernels=kernels), World("cpu"))  # type: ignore[arg-type]


def test_kernels_or_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vi_simsiam.engine.network.why_unavailable", lambda name, device_type: None)
    world = World("cpu")
    assert use_kernels(TrainConfig(kernels="on"), world)
    assert not use_kernels(TrainConfig(kernels="auto", compile=True), world)
    for changes, reason in (
        ({"compile": True}, "compile replaces them"),
        ({"sync_batch_norm": True}, "statistics over several GPUs, as with sync_batch_norm"),
    ):
        with pytest.raises(InputError, match=f"kernels: 'on' cannot be used: .*{reason}"):
            use_kernels(TrainConfig(kernels="on", **changes), world)  # type: ignore[arg-type]
