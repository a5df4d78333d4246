"""Backbones of timm and of one's own, and weights that a run starts from."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from test_trainer import config, train
from torch import Tensor, nn
from trust_cases import archived, pickled

from vi_simsiam import load
from vi_simsiam.backbones import build_backbone, own_size
from vi_simsiam.cli import main
from vi_simsiam.config import AugmentConfig, ModelConfig, TrainConfig
from vi_simsiam.data.views import eval_view
from vi_simsiam.engine.kernels import why_unusable
from vi_simsiam.engine.network import own_norm, training_network
from vi_simsiam.engine.origin import ORIGIN, is_own, places
from vi_simsiam.engine.run import START, load_run, read_config
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.features import collect
from vi_simsiam.export import export_run, load_safetensors
from vi_simsiam.models import SimSiam, VISimSiam, build_model
from vi_simsiam.normalisation import PerViewBatchNorm2d
from vi_simsiam.other_backbones import TRUSTED
from vi_simsiam.weights import load_backbone, read_tensors

RESNET, VIT, SIZES = "timm:test_resnet", "timm:test_vit", (32, 16)
HEADS = {"dim": 16, "projector_hidden": 16, "predictor_hidden": 16}
OWN = """
import torch
made = []
def pooled():
    made.append(1)
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
def maps():
    return torch.nn.Conv2d(3, 4, 3)
def text():
    return "network"
def fails():
    raise ValueError("no weights here")
class Sized(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that can be imported, which is forgotten afterwards."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "own_nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    return "own_nets"


def settings(folder: Path, backbone: str, **changes: Any) -> TrainConfig:
    chosen = config(folder, epochs=1, workers=0, **changes)
    augment = dataclasses.replace(chosen.augment, size=32, local_size=16)
    return dataclasses.replace(
        chosen, augment=augment, model=ModelConfig(backbone=backbone, **HEADS)
    )


@pytest.mark.parametrize("name", [RESNET, VIT])
def test_a_timm_backbone_takes_views_normalised_as_imagenet(name: str) -> None:
    torch.manual_seed(0)
    network, features = build_backbone(name, sizes=(32,))
    own = timm.create_model(
        name.partition(":")[2], num_classes=0, **({"img_size": 32} if name == VIT else {})
    )
    assert features == own.num_features
    own.load_state_dict(network.state_dict())  # timm's names, and no others
    pixels = torch.rand(2, 3, 32, 32)
    data = timm.data.resolve_model_data_config(own)
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    imagenet_mean, imagenet_std = (
        torch.tensor(each).view(3, 1, 1)
        for each in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    )
    assert not torch.equal(mean, imagenet_mean)
    with torch.no_grad():
        found = network.eval()((pixels - imagenet_mean) / imagenet_std)
        expected = own.eval()((pixels - mean) / std)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [RESNET, VIT])
def test_a_timm_backbone_of_other_channels(name: str) -> None:
    network, features = build_backbone(name, sizes=(32,), channels=5, constants=None)
    assert network.eval()(torch.zeros(1, 5, 32, 32)).shape == (1, features)
    assert not {each for each, _ in network.named_buffers() if "input" in each}


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("timm:test_resnt", (32,), "timm has no model 'test_resnt' .* did you mean 'test_resnet'?"),
        ("timm:hf-hub:a/b", (32,), "timm has no model 'hf-hub:a/b'"),
        ("timm:test_vit.r224", (32,), "timm has no weights 'r224' of test_vit; it has r160_in1k"),
        (VIT, (33,), "cannot take views of 33 pixels .* own size is --size 160"),
        ("timm:convnext_atto", (8,), "cannot take views of 8 pixels"),
        ("module:own_nets.maps", (32,), "gives shape .*; it must give pooled features"),
        ("module:own_nets.Sized", SIZES, "another width per size .3072 for 32 pixels, 768 for 16"),
        ("module:own_nets.text", (32,), "returns str; it must return a torch.nn.Module"),
        ("module:own_nets.fails", (32,), "does not run .no weights here."),
        ("module:own_nets.poold", (32,), "has no 'poold'; did you mean 'pooled'?"),
        ("module:nowhere.net", (32,), "No module named 'nowhere'"),
        ("module:net", (32,), "must be module:PACKAGE.ATTRIBUTE"),
    ],
)
def test_a_backbone_that_cannot_be_used(
    name: str, sizes: tuple[int, ...], message: str, own_module: str
) -> None:
    with pytest.raises(InputError, match=f"^backbone: .*{message}") as caught:
        build_backbone(name, sizes=sizes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "timm:"}, "backbone: 'timm:' is not accepted"),
        ({"backbone": "hub:x"}, "backbone: 'hub:x' is not accepted"),
        ({"backbone": RESNET, "stem": "small"}, "stem: 'small' .* 'imagenet' with timm:"),
        ({"backbone": "module:a.b", "pretrained": True}, "pretrained: .* --init"),
    ],
)
def test_contradicting_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig(**changes)


def test_weights_to_start_from_come_from_one_place() -> None:
    with pytest.raises(InputError, match="init: .* None with pretrained"):
        TrainConfig(init=Path("weights.pth"), model=ModelConfig(pretrained=True))


def test_the_size_of_the_views() -> None:
    given = {"init": Path("weights.pth")}
    for name, changes, size in (("resnet18", given, None), (RESNET, {}, None), (VIT, {}, 160)):
        assert own_size(TrainConfig(model=ModelConfig(name), **changes)) == size
    assert own_size(TrainConfig(model=ModelConfig(RESNET), **given)) == 160


@pytest.mark.parametrize("name", [RESNET, VIT, "timm:test_efficientnet"])
def test_views_pass_together_as_one_by_one(name: str) -> None:
    torch.manual_seed(0)
    backbone, features = build_backbone(name, sizes=SIZES)
    views = [torch.randn(4, 3, 32, 32) for _ in range(2)] + [torch.randn(4, 3, 16, 16)]
    model = VISimSiam(backbone, features=features, **HEADS).train()
    alone = model(views).predictions
    training_network(model, kernels=True)
    assert model.shared_passes == (name != "timm:test_efficientnet")
    for found, expected in zip(model(views).predictions, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_reason_why_kernels_are_not_used() -> None:
    chosen = TrainConfig(model=ModelConfig("timm:test_efficientnet", **HEADS), device="cpu")
    found = why_unusable(chosen, "cpu", build_model(chosen))
    assert found == "the backbone has BatchNorm layers of its own (backbone.bn1)"
    assert own_norm(build_backbone("timm:test_vit")[0]) is None


def test_statistics_of_other_kinds_of_norms_count() -> None:
    assert own_norm(nn.Sequential(timm.layers.EvoNorm2dB0(4))) == "0"
    assert own_norm(nn.Sequential(PerViewBatchNorm2d(4), nn.InstanceNorm2d(4))) is None


def test_residual_branches_of_the_untrained_network_are_open() -> None:
    network, _ = build_backbone(RESNET, zero_init_residual=False)
    assert all(m.weight.any() for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    usual, _ = build_backbone(RESNET)
    assert not all(m.weight.any() for m in usual.modules() if isinstance(m, nn.BatchNorm2d))


def resnet() -> nn.Module:
    torch.manual_seed(1)
    return build_backbone(RESNET)[0]


def nested(**parts: Any) -> dict[str, Any]:
    return {"epoch": 3, "args": None, **parts}


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in weights.items()}


WRITTEN: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda w: w,
    "data parallel": lambda w: prefixed("module.", w),
    "MoCo": lambda w: nested(state_dict=prefixed("module.encoder_q.", w)),
    "DINO": lambda w: nested(
        student=prefixed("module.backbone.", {n: x + 1 for n, x in w.items()}),
        teacher=prefixed("backbone.", w),
    ),
    "a classifier": lambda w: {**w, "fc.weight": torch.zeros(10, 96), "fc.bias": torch.zeros(10)},
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_names_of_other_programs(kind: str, tmp_path: Path) -> None:
    weights = {name: x.clone() for name, x in resnet().state_dict().items()}
    torch.save(WRITTEN[kind](weights), tmp_path / "weights.pth")
    torch.manual_seed(2)
    other, _ = build_backbone(RESNET)
    line = load_backbone(other, read_tensors(tmp_path / "weights.pth"), "weights.pth")
    total = sum(not name.endswith("num_batches_tracked") for name in weights)
    assert line.startswith(f"init: {total} of the backbone's {total} tensors are those of")
    assert ("2 other tensors" in line) == (kind == "a classifier")
    for name, tensor in other.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, weights[name]), name


def test_weights_of_another_network(tmp_path: Path) -> None:
    weights = dict(resnet().state_dict())
    few = {name: x for name, x in weights.items() if not name.startswith("layer")}
    network, _ = build_backbone(RESNET)
    before = {name: x.clone() for name, x in network.state_dict().items()}
    narrow = weights | {"conv1.0.weight": torch.zeros(8, 3, 3, 3)}
    broken = weights | {"conv1.0.weight": torch.full_like(weights["conv1.0.weight"], torch.nan)}
    for given, message in (
        (few, r"it has \d+ of the \d+ tensors of the backbone; layer1.* are missing"),
        (narrow, r"1 tensor of another shape, such as conv1.0.weight, .8, 3, 3, 3. and not"),
        ({}, r"it has 0 of the"),
        (broken, "weights that are not finite"),
    ):
        with pytest.raises(InputError, match=f"init: w.pth .*{message}"):
            load_backbone(network, given, "w.pth")
    assert all(torch.equal(before[name], x) for name, x in network.state_dict().items())


def test_a_stem_of_another_shape_is_named() -> None:
    weights = dict(build_backbone("resnet18")[0].state_dict())
    small, _ = build_backbone("resnet18", stem="small")
    with pytest.raises(InputError, match="conv1.weight, .* and not .*; --stem chooses"):
        load_backbone(small, weights, "w.pth")


@pytest.mark.parametrize("content", [pickled, archived, lambda trap: b"", lambda trap: b"x" * 99])
def test_a_file_that_holds_no_tensors(content: Callable[[Path], bytes], tmp_path: Path) -> None:
    for suffix in (".pth", ".safetensors"):
        file = tmp_path / f"weights{suffix}"
        file.write_bytes(content(tmp_path / "trap"))
        with pytest.raises(InputError, match=f"init: {file} cannot be read"):
            read_tensors(file)
    assert not (tmp_path / "trap").exists()
    for name, message in (("w.npz", "must be a run folder, or a file"), ("w.pth", "cannot be")):
        with pytest.raises(InputError, match=f"init: .*{name} .*{message}"):
            read_tensors(tmp_path / name)


def test_a_run_from_given_weights_says_whether_training_helped(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = dict(resnet().state_dict())
    save_file(start, tmp_path / "start.safetensors")
    chosen = settings(image_folder, RESNET, init=tmp_path / "start.safetensors")
    trainer = train(chosen, tmp_path / "run")
    run = load_run(tmp_path / "run", device="cpu", workers=0)
    sets = collect(run)
    assert list(sets.train) == ["trained", "starting", "untrained", "pixels"]
    own = build_backbone(RESNET)[0]
    own.load_state_dict(start)
    view = eval_view(32)(run.splits.val.image(0))
    expected = own.eval()(view[None]).detach()
    torch.testing.assert_close(sets.val["starting"][:1], expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(sets.val["starting"], sets.val["trained"])
    assert main(["knn", str(tmp_path / "run"), "--device", "cpu", "--workers", "0"]) == 0
    assert "starting" in capsys.readouterr().out
    (tmp_path / "start.safetensors").unlink()  # a finished run needs it no longer
    assert load_run(tmp_path / "run", device="cpu").config == trainer.config
    again = dataclasses.replace(chosen, init=tmp_path / "run")
    train(again, tmp_path / "next")
    first = load_file(tmp_path / "next" / START)
    for name, tensor in trainer.model.backbone.named_parameters():
        assert torch.equal(first[f"model.{name}"], tensor.detach().contiguous()), name
    train(dataclasses.replace(chosen, init=None), tmp_path / "next", overwrite=True)
    assert not (tmp_path / "next" / START).exists()


@pytest.mark.parametrize("name", [RESNET, VIT])
def test_exports_of_timm_backbones(name: str, image_folder: Path, tmp_path: Path) -> None:
    train(settings(image_folder, name), tmp_path / "run")
    run = load_run(tmp_path / "run", device="cpu", workers=0)
    lines: list[str] = []
    folder = export_run(run, "timm", report=lines.append)
    network = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, run.model.backbone.state_dict()[key]), key
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["mean"] == [0.5] * 3
    export_run(run, "safetensors", report=lines.append)
    assert len(lines) == 2
    with pytest.raises(InputError, match="torchvision has no timm:.*; timm, safetensors and onnx"):
        export_run(run, "torchvision")
    model = load_safetensors(tmp_path / "run" / "export" / "safetensors")
    assert isinstance(model, SimSiam)


def test_a_module_of_ones_own(
    own_module: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"module:{own_module}.pooled"
    chosen = settings(image_folder, name)
    train(chosen, tmp_path / "run")
    assert is_own(tmp_path / "run", places(read_config(tmp_path / "run")))
    load_run(tmp_path / "run", device="cpu", workers=0)
    with pytest.raises(InputError, match="timm has no module:.*; safetensors and onnx take"):
        export_run(load_run(tmp_path / "run", device="cpu"), "timm")
    export = export_run(load_run(tmp_path / "run", device="cpu"), "safetensors")
    (tmp_path / "run" / ORIGIN).unlink()
    monkeypatch.delitem(sys.modules, own_module)
    for open_it in (load, load_run, lambda path: train(chosen, path, resume=True)):
        with pytest.raises(InputError, match=f"run code of {name}; .* {TRUSTED}={own_module}"):
            open_it(tmp_path / "run")
    with pytest.raises(InputError, match=f"run code of {name}"):
        load_safetensors(export)
    assert own_module not in sys.modules, "nothing was imported"
    monkeypatch.setenv(TRUSTED, f"others,{own_module}")
    assert isinstance(load_safetensors(export), SimSiam)
    monkeypatch.delenv(TRUSTED)
    assert load_safetensors(export), "the user's program has imported it"


def test_code_of_installed_packages_needs_trust(image_folder: Path, tmp_path: Path) -> None:
    train(settings(image_folder, RESNET), tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    content = json.loads(file.read_text())
    for name in ("os.getpid", "torch.nn.Identity", "vi_simsiam.cli.main", "__main__.main"):
        content["model"]["backbone"] = f"module:{name}"
        file.write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"run code of module:{name}"):
            read_config(tmp_path / "run")


def test_a_configuration_from_elsewhere_names_no_weights_and_no_code(
    image_folder: Path, tmp_path: Path, own_module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = settings(image_folder, RESNET, init=tmp_path / "theirs.pth").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(plain))
    command = ["train", "--config", str(tmp_path / "config.json"), "--data", str(image_folder)]
    assert main([*command, "--out", str(tmp_path / "new")]) == 2
    assert f"names the weights {tmp_path / 'theirs.pth'}" in capsys.readouterr().err
    plain = settings(image_folder, f"module:{own_module}.pooled").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert main([*command, "--out", str(tmp_path / "new")]) == 2
    assert "would run code of module:own_nets.pooled" in capsys.readouterr().err
    assert own_module not in sys.modules


def test_weights_of_timm_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(repository: str, filename: str, **options: Any) -> str:
        assert (repository, filename) == ("timm/test_vit.r160_in1k", "model.safetensors")
        raise LocalEntryNotFoundError("caches")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    chosen = TrainConfig(model=ModelConfig(VIT, pretrained=True, **HEADS))
    with pytest.raises(
        InputError, match="pretrained: .* .the Hugging Face Hub cannot be reached.;"
    ):
        build_model(chosen)
    with pytest.raises(InputError, match="no copy of timm/test_vit.* downloading is off"):
        build_model(dataclasses.replace(chosen, offline=True))
    with pytest.raises(InputError, match="pretrained: .* no weights of timm:test_vit4"):
        build_model(
            dataclasses.replace(chosen, model=ModelConfig("timm:test_vit4", pretrained=True))
        )


def test_weights_of_timm_from_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    published = timm.create_model("test_vit").state_dict()
    save_file(published, tmp_path / "model.safetensors")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **b: str(tmp_path / "model.safetensors")
    )
    parts = ModelConfig(VIT, pretrained=True, **HEADS)
    model = build_model(TrainConfig(model=parts, augment=AugmentConfig(size=160)))
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, published[name]), name
    smaller = build_model(TrainConfig(model=parts, augment=AugmentConfig(size=32)))
    assert smaller.backbone.pos_embed.shape < published["pos_embed"].shape
