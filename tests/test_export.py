"""Exports to torchvision, timm, safetensors and ONNX: other libraries compute the run's outputs."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from evaluation_cases import SIZE as TINY
from evaluation_cases import make_run
from inference_cases import DIM, SIZE, code_blocks, largest, network_run, run_code, save_run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vi_simsiam.cli.export import export
from vi_simsiam.config import LossConfig
from vi_simsiam.data.sources import FileSource
from vi_simsiam.data.views import eval_view
from vi_simsiam.engine.run import Run
from vi_simsiam.errors import InputError
from vi_simsiam.export import export_run, formats, load_safetensors
from vi_simsiam.models import VISimSiam


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose features do not matter."""
    return network_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folders(tiny: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("exports")
    return {name: export_run(tiny, name, place / name) for name in ("timm", "safetensors")}


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@torch.no_grad()
def test_timm_loads_blocks_of_three_convolutions(tmp_path: Path, images: Tensor) -> None:
    """The tests of the model card load the other networks."""
    run = network_run(tmp_path, "resnet50")
    weights = export_run(run, "timm") / "model.safetensors"
    network = timm.create_model("resnet50", num_classes=0, checkpoint_path=str(weights))
    assert largest(network.eval()(images), run.model.backbone(images)) < 1e-5


def test_timm_preprocesses_as_the_evaluation_does(folders: dict[str, Path]) -> None:
    model = timm.create_model(f"local-dir:{folders['timm']}", pretrained=True, num_classes=0)
    seen = timm.data.resolve_model_data_config(model)
    assert list(seen["input_size"]) == [3, SIZE, SIZE]
    assert (seen["interpolation"], seen["crop_pct"], seen["crop_mode"]) == ("bicubic", 1, "center")
    assert list(seen["mean"]) == [0.485, 0.456, 0.406]
    assert list(seen["std"]) == [0.229, 0.224, 0.225]
    pixels = np.random.default_rng(2).integers(0, 256, (20, 37, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    transformed = timm.data.create_transform(**seen, is_training=False)(image)
    torch.testing.assert_close(transformed, eval_view(SIZE)(image), rtol=0, atol=1e-6)


@pytest.mark.usefixtures("small_network")
@torch.no_grad()
def test_safetensors_gives_the_same_distribution(tmp_path: Path, images: Tensor) -> None:
    loss = LossConfig(
        concentration="detached",
        concentration_gain=3.0,
        concentration_scale=3.0,
        concentration_min=0.25,
        concentration_max=9.0,
    )
    run = network_run(tmp_path, stem="small", loss=loss)
    folder = export_run(run, "safetensors")
    model = load_safetensors(folder)
    assert isinstance(model, VISimSiam)
    assert isinstance(run.model, VISimSiam)
    assert not model.training
    found, expected = model.distribution(images), run.model.distribution(images)
    assert torch.equal(found.loc, expected.loc)
    assert torch.equal(found.concentration, expected.concentration)

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["method"], metadata["dim"]) == ("vi-simsiam", "8")
    numbers = [float(metadata[f"concentration_{name}"]) for name in ("scale", "gain", "min")]
    assert numbers == [run.model.form.scale, run.model.form.gain, loss.concentration_min]
    assert json.loads(metadata["preprocessing"])["size"] == SIZE


@pytest.mark.usefixtures("small_network")
def test_safetensors_of_simsiam_is_no_distribution(tmp_path: Path) -> None:
    """The moving average of a run is left out."""
    run = network_run(tmp_path, method="simsiam", ema=0.99)
    model = load_safetensors(export_run(run, "safetensors") / "model.safetensors")
    assert not isinstance(model, VISimSiam)
    weights, loaded = run.model.state_dict(), model.state_dict()
    assert any(name.startswith("target.") for name in weights)
    assert set(loaded) == {name for name in weights if not name.startswith("target.")}
    assert all(torch.equal(value, weights[name]) for name, value in loaded.items())


def test_safetensors_refuses_what_it_did_not_write(tmp_path: Path, tiny: Run) -> None:
    with pytest.raises(InputError, match=r"path: .*nothing.* is no file"):
        load_safetensors(tmp_path / "nothing")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(InputError, match="has no configuration of its model"):
        load_safetensors(foreign)
    config = json.dumps(formats.portable(tiny.config))
    save_file({"weight": torch.zeros(2)}, foreign, metadata={"config": config})
    with pytest.raises(InputError, match="do not fit the model"):
        load_safetensors(foreign)
    foreign.write_bytes(foreign.read_bytes()[:-4])
    with pytest.raises(InputError, match="cannot be read"):
        load_safetensors(foreign)


def test_a_file_that_is_not_the_run_is_not_kept(
    tmp_path: Path, tiny: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison catches a factor of 1.0001 in one layer of many."""
    weights = formats._weights

    def spoiled(module: nn.Module) -> dict[str, Tensor]:
        found = weights(module)
        name = next(name for name in found if name.endswith("bn1.weight"))
        return {**found, name: 1.0001 * found[name]}

    monkeypatch.setattr(formats, "_weights", spoiled)
    with pytest.raises(RuntimeError, match="gives another embedding than the run"):
        export_run(tiny, "torchvision", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_names_the_machine(folders: dict[str, Path], tiny: Run) -> None:
    assert tiny.config.data_root.is_absolute()
    for folder in folders.values():
        for name, written in content(folder).items():
            assert str(tiny.config.data_root).encode() not in written, name
            assert str(tiny.path).encode() not in written, name
    config = dataclasses.replace(tiny.config, data="folder:/home/someone/cats")
    assert formats.portable(config)["data"] == "folder:cats"


def test_an_earlier_export_is_replaced_whole_with_overwrite(
    tmp_path: Path, tiny: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = tmp_path / "out"
    earlier.mkdir()
    for name in ("README.md", "config.json", "model.pth"):
        (earlier / name).write_text("earlier")
    with pytest.raises(InputError, match=r"out: .* exists; say --overwrite to replace it"):
        export_run(tiny, "safetensors", earlier)
    with monkeypatch.context() as patch:
        patch.setattr("vi_simsiam.export.folder.model_card", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_run(tiny, "torchvision", earlier, overwrite=True)
    assert set(content(earlier).values()) == {b"earlier"}
    assert list(tmp_path.iterdir()) == [earlier]
    export_run(tiny, "safetensors", earlier, overwrite=True)
    assert set(content(earlier)) == {"README.md", "config.json", "model.safetensors"}
    assert list(tmp_path.iterdir()) == [earlier]


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path, tiny: Run) -> None:
    for name in ("config.json", "notes.txt", "README.md"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(InputError, match="holds other files"):
            export_run(tiny, "torchvision", tmp_path, overwrite=True)
    assert set(content(tmp_path).values()) == {b"mine"}
    with pytest.raises(InputError, match="is a file or a link"):
        export_run(tiny, "torchvision", tmp_path / "notes.txt", overwrite=True)


def test_another_format_or_stem_is_refused(tmp_path: Path, tiny: Run) -> None:
    model = dataclasses.replace(tiny.config.model, stem="small")
    small = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, model=model))
    with pytest.raises(InputError, match="resnet18 has no stem 'small'"):
        export_run(small, "timm", tmp_path / "timm")
    accepted = "format: 'keras' is none of torchvision, timm, safetensors, onnx"
    with pytest.raises(InputError, match=accepted):
        export_run(tiny, "keras", tmp_path / "keras")
    assert not list(tmp_path.iterdir())


def test_the_check_is_reported_and_images_that_are_gone_have_a_stand_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run")
    assert export([str(run), "--format", "torchvision"]) == 0
    *notes, checked, written = capsys.readouterr().out.splitlines()
    assert "checked on fashion-mini, not on the run's own images" in notes[0]
    assert checked.startswith("model.pth checked on 8 images of fashion-mini/val: differs by ")
    assert written == f"written: {run / 'export' / 'torchvision'}"
    settings = json.loads((run / "export" / "torchvision" / "config.json").read_text())
    assert settings["check"]["images"] == 8
    assert 0 <= settings["check"]["differences"]["embedding"] < 1e-5
    network = [settings[name] for name in ("architecture", "stem", "num_features")]
    assert network == ["resnet18", "imagenet", 512]
    assert (settings["dim"], settings["training"]["data"]) == (DIM, "folder:gone")
    with pytest.raises(InputError, match="no such folder"):
        export([str(run), "--format", "torchvision", "--data", "folder:/no/such/place"])


def test_unreadable_images_are_passed_over_and_damaged_weights_refused(
    tmp_path: Path, tiny: Run
) -> None:
    paths = [str(tmp_path / f"{number}.png") for number in range(12)]
    for number, path in enumerate(paths):
        if number < 5:
            Path(path).write_bytes(b"")
        else:
            tiny.splits.train.image(number).save(path)

    def on(paths: list[str], name: str) -> Run:
        splits = dataclasses.replace(tiny.splits, train=FileSource(paths, name=name), val=None)
        return dataclasses.replace(tiny, splits=splits)

    folder = export_run(on(paths, "/home/someone/some"), "torchvision", tmp_path / "out")
    check = json.loads((folder / "config.json").read_text())["check"]
    assert (check["images"], check["source"]) == (7, "someone/some")
    with pytest.raises(InputError, match="data: none holds no image to check the export with"):
        export_run(on(paths[:5], "none"), "torchvision", tmp_path / "other")
    damaged = dataclasses.replace(tiny, model=copy.deepcopy(tiny.model))
    damaged.model.state_dict()["backbone.layer1.0.conv1.weight"].fill_(torch.nan)
    with pytest.raises(InputError, match=r"are not finite; its weights are damaged"):
        export_run(damaged, "torchvision", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four residual blocks, which are exported to ONNX sooner."""
    found = network_run(tmp_path_factory.mktemp("run"), stem="small")
    for name in ("layer1", "layer2", "layer3", "layer4"):
        layer = getattr(found.model.backbone, name)
        setattr(found.model.backbone, name, layer[:1])
    return found


@pytest.fixture(scope="module")
def onnx_folder(small: Run) -> Path:
    return export_run(small, "onnx")


def session_of(folder: Path) -> onnxruntime.InferenceSession:
    path = str(folder / "model.onnx")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def hide(package: str, patch: pytest.MonkeyPatch) -> None:
    """Make a package look as if it were not installed."""
    find = importlib.util.find_spec
    patch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))


@torch.no_grad()
def test_any_batch_gives_embedding_and_distribution(small: Run, onnx_folder: Path) -> None:
    assert isinstance(small.model, VISimSiam)
    onnx.checker.check_model(onnx.load(onnx_folder / "model.onnx"))
    session = session_of(onnx_folder)
    assert [(end.name, end.shape[1:]) for end in session.get_inputs()] == [
        ("images", [3, SIZE, SIZE])
    ]
    names = ["embedding", "loc", "concentration"]
    assert [end.name for end in session.get_outputs()] == names
    for batch in (1, 5):
        images = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))
        embedding, loc, kappa = session.run(names, {"images": images.numpy()})
        expected = small.model.distribution(images)
        assert largest(embedding, small.model.backbone(images)) < 1e-5
        assert largest(loc, expected.loc) < 1e-5
        assert kappa.shape == (batch,)
        assert largest(kappa, expected.concentration) < 1e-5
    settings = json.loads((onnx_folder / "config.json").read_text())
    assert set(settings["check"]["differences"]) == set(names)


def test_the_card_of_a_graph_runs(onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(onnx_folder)
    names = run_code(code_blocks(Path("README.md").read_text())[:1])
    assert names["features"].shape == (2, 512)
    assert names["loc"].shape == (2, 8)
    assert names["kappa"].shape == (2,)


@torch.no_grad()
def test_the_graph_of_simsiam_gives_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without onnxruntime, too: then nothing is compared, and the card states that."""
    hide("onnxruntime", monkeypatch)
    run = make_run(tmp_path, method="simsiam")
    lines: list[str] = []
    folder = export_run(run, "onnx", report=lines.append)
    reason = "onnxruntime is not installed (pip install 'vi-simsiam[onnx]')"
    assert lines == [f"model.onnx was not checked: {reason}"]
    assert "was not checked against the run" in (folder / "README.md").read_text()
    session = session_of(folder)
    assert [output.name for output in session.get_outputs()] == ["embedding"]
    images = torch.randn(3, 3, TINY, TINY)
    (embedding,) = session.run(None, {"images": images.numpy()})
    assert largest(embedding, run.model.backbone(images)) < 1e-5


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    hide(package, monkeypatch)
    message = rf"format: onnx needs {package}; .*pip install 'vi-simsiam\[onnx\]'"
    with pytest.raises(InputError, match=message):
        export_run(make_run(tmp_path), "onnx")
    assert not (tmp_path / "export").exists()
