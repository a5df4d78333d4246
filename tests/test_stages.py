"""The stages of ResNets, timm's networks and modules of one's own, and their lengths."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from vi_simsiam.stages import NAMES, RESNET, recorded, stages


class Own(nn.Module):
    """A stem, six blocks in a list of which the third is skipped, and a layer of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(6))
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.stem(images))
        for number, block in enumerate(self.blocks):
            maps = block(maps) if number != 2 else maps
        tokens, _ = self.lstm(maps.flatten(2).mT)
        pooled: Tensor = tokens.mean(1)
        return pooled


class Around(nn.Module):
    """Another module, and nothing else."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.inner(images)
        return found


def lengths(network: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.no_grad(), recorded(network.eval()) as found:
        features = network(images)
    assert not any(part._forward_hooks for part in network.modules())
    assert set(found) <= set(stages(network)) <= set(NAMES)
    return features, found


def timm_network(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(name, num_classes=0, **options)
    return network


def test_places_of_common_networks() -> None:
    resnet = dict(zip(RESNET, RESNET, strict=True))
    assert stages(torchvision.models.resnet18()) == stages(timm_network("test_resnet")) == resnet
    inner = {name: f"inner.{name}" for name in RESNET}
    assert stages(Around(torchvision.models.resnet18())) == inner
    # Six blocks: the last of each quarter, rounded up.
    places = ["blocks.1", "blocks.2", "blocks.4", "blocks.5"]
    assert list(stages(timm_network("test_vit")).values()) == places
    assert list(stages(Around(timm_network("test_vit"))).values()) == [f"inner.{x}" for x in places]
    found = stages(timm_network("test_convnext"))
    assert found == {f"stage{i + 1}": f"stages.{i}" for i in range(4)}


def test_places_of_a_module_of_ones_own() -> None:
    # Of the stem, six blocks and the last layer.
    places = ["blocks.0", "blocks.2", "blocks.4", "lstm"]
    assert list(stages(Own()).values()) == places
    assert stages(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())) == {"stage1": "0"}
    assert stages(nn.Flatten()) == {}
    with pytest.warns((FutureWarning, DeprecationWarning)):
        scripted = torch.jit.script(torchvision.models.resnet18())
    listed = Around(nn.ModuleList([scripted]))
    assert stages(scripted) == stages(Around(scripted)) == stages(listed) == {}  # no hooks there


def test_maps_of_a_convolutional_network_are_averaged() -> None:
    network, images = timm_network("test_convnext"), torch.randn(3, 3, 64, 64)
    _, found = lengths(network, images)
    with torch.no_grad():
        inner = network.stem(images)
        for name, stage in zip(stages(network), network.stages, strict=True):
            inner = stage(inner)
            torch.testing.assert_close(found[name], inner.mean((2, 3)).norm(dim=1))


def test_tokens_of_a_transformer_are_averaged() -> None:
    """Those of its last stage are the features of a network that averages them itself."""
    network = timm_network("test_vit", img_size=32, global_pool="avg", class_token=False)
    network.fc_norm, images = nn.Identity(), torch.randn(3, 3, 32, 32)
    features, found = lengths(network, images)
    assert list(found) == [f"stage{number}" for number in range(1, 5)]
    torch.testing.assert_close(found["stage4"], features.norm(dim=1))


def test_maps_with_their_channels_last_are_averaged() -> None:
    """As many channels as rows: only the network's own note tells them apart."""
    options = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 8}
    network = timm_network(
        "swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(2, 2), **options
    )
    network.norm = nn.Identity()
    for module in (network, Around(network)):
        features, found = lengths(module, torch.randn(3, 3, 16, 16))
        assert list(found) == ["stage1", "stage2"]
        torch.testing.assert_close(found["stage2"], features.norm(dim=1))


def test_maps_of_torchvisions_networks_are_averaged() -> None:
    swin, convnext = torchvision.models.swin_t(), torchvision.models.convnext_tiny()
    swin.head = nn.Identity()
    features, found = lengths(swin, torch.randn(2, 3, 32, 32))
    last = list(stages(swin).values()).index("norm") + 1
    torch.testing.assert_close(found[f"stage{last}"], features.norm(dim=1))
    images = torch.randn(2, 3, 32, 32)
    _, found = lengths(convnext, images)  # it permutes inside of its blocks alone
    with torch.no_grad():
        maps = convnext.features(images)
    torch.testing.assert_close(found["stage1"], maps.mean((2, 3)).norm(dim=1))


def test_a_stage_that_is_not_called_or_gives_no_tensor_has_no_length() -> None:
    places = stages(network := Own())
    _, found = lengths(network, torch.randn(2, 3, 8, 8))
    assert [places[name] for name in found] == ["blocks.0", "blocks.4"]


def test_passes_in_other_threads_are_not_recorded() -> None:
    network, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), torch.randn(2, 3, 8, 8)
    with torch.no_grad(), recorded(network) as found:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(network, images).result()
        assert not found
        network(images[:1])
    assert found["stage1"].shape == (1,)
