"""Nothing executes from a file, and nothing is written outside the folder that is named."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inference_cases import ON_CPU, save_images, save_run
from trust_cases import Payload, archived, pickled

from vi_simsiam import load
from vi_simsiam.cli import main
from vi_simsiam.engine.checkpoint import FORMER
from vi_simsiam.engine.processes import Process
from vi_simsiam.engine.run import load_run
from vi_simsiam.errors import InputError
from vi_simsiam.export import load_safetensors


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """The run; its files are links but for those that a test replaces."""
    (tmp_path / "run").mkdir()
    for file in saved.iterdir():
        (tmp_path / "run" / file.name).symlink_to(file)
    return tmp_path / "run"


def replace(file: Path, content: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def replace_checkpoint(run: Path, name: str, content: bytes) -> None:
    for file in run.glob("checkpoint*"):
        file.unlink()
    (run / name).write_bytes(content)


def archived_before(trap: Path) -> bytes:
    buffer = io.BytesIO()
    content = {"format": 1, "model": Payload(trap)}
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def numpy_file(trap: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(trap)], object), allow_pickle=True)
    return buffer.getvalue()


def numpy_archive(trap: Path) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, train_images=np.array([Payload(trap)], object))
    return buffer.getvalue()


def test_the_payload_is_live(tmp_path: Path) -> None:
    pickle.loads(pickled(tmp_path / "a"))
    torch.load(io.BytesIO(archived(tmp_path / "b")), weights_only=False)
    np.load(io.BytesIO(numpy_file(tmp_path / "c")), allow_pickle=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def one_line(capsys: pytest.CaptureFixture[str], *expected: str) -> None:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vi-simsiam: ")
    assert all(part in line for part in expected), line


WAYS: dict[str, Callable[[Path, Path], list[str]]] = {
    "evaluate": lambda run, images: ["evaluate", str(run), *ON_CPU],
    "figures": lambda run, images: ["figures", str(run), *ON_CPU],
    "embed": lambda run, images: ["embed", str(run), str(images), *ON_CPU],
    "rank": lambda run, images: ["rank", str(run), str(images), *ON_CPU],
    "export": lambda run, images: ["export", str(run), "--format", "torchvision"],
    "resume": lambda run, images: ["train", "--resume", "--out", str(run), "--data", str(images)],
    "init": lambda run, images: [
        *("train", "--init", str(run), "--out", f"{run}-new", "--data", str(images)),
        *("--batch-size", "2", *ON_CPU),
    ],
}


NEW = "checkpoint-00000001.safetensors"
PAYLOADS = [(NEW, archived), (FORMER, pickled), (FORMER, archived), (FORMER, archived_before)]


@pytest.mark.parametrize(("name", "payload"), PAYLOADS)
@pytest.mark.parametrize("way", WAYS)
def test_no_checkpoint_executes(
    way: str,
    name: str,
    payload: Callable[[Path], bytes],
    run: Path,
    trap: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    images = save_images(tmp_path / "images", 4)[0].parent
    replace_checkpoint(run, name, payload(trap))
    assert main(WAYS[way](run, images)) == 2
    one_line(capsys, "run: ", name)


@pytest.mark.parametrize(("name", "payload"), PAYLOADS)
def test_no_checkpoint_executes_from_python(
    name: str, payload: Callable[[Path], bytes], run: Path, trap: Path
) -> None:
    replace_checkpoint(run, name, payload(trap))
    for open_run in (load, load_run):
        with pytest.raises(InputError, match="cannot be read"):
            open_run(run, device="cpu")


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.pkl", "x.pt", "x.pack", "x.onnx"])
def test_no_data_executes(
    name: str, trap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    makers = {"x.npz": numpy_archive, "x.npy": numpy_file, "x.pt": archived, "x.onnx": onnx_file}
    replace(tmp_path / name, makers.get(name, pickled)(trap))
    out = str(tmp_path / "new")
    assert main(["train", "--data", str(tmp_path / name), "--out", out, "--quiet"]) == 2
    one_line(capsys, name)
    images = tmp_path / "images"
    save_images(images, 2)
    (tmp_path / name).rename(images / "x.png")
    assert main(["views", "--data", str(images), "--out", str(tmp_path / "v.png")]) == 0


def onnx_file(trap: Path) -> bytes:
    """A graph whose weights lie in a file outside of its folder."""
    from onnx import TensorProto, helper

    weights = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    weights.ClearField("float_data")
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value=f"../../{trap}")
    graph = helper.make_graph([], "g", [], [], [weights])
    return bytes(helper.make_model(graph).SerializeToString())


HOSTILE: dict[str, Any] = {
    "a module": {"model": {"backbone": "os.system"}},
    "a class": {"model": {"__class__": "os.system", "backbone": "resnet18"}},
    "a dunder": {"__reduce__": ["os.system", "true"]},
    "a path": {"model": {"backbone": "../../evil.py"}},
    "code": {"decode": {"background": "__import__('os').system('true')"}},
    "a device": {"augment": {"size": {"py/object": "os.system"}}},
    "a list": {"loss": ["os.system"]},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("way", ["evaluate", "embed", "resume"])
def test_a_configuration_names_no_code(
    way: str,
    change: dict[str, Any],
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = json.loads((run / "config.json").read_text())
    for name, value in change.items():
        both = isinstance(value, dict) and isinstance(plain.get(name), dict)
        plain[name] = plain[name] | value if both else value
    replace(run / "config.json", json.dumps(plain).encode())
    assert main(WAYS[way](run, tmp_path)) == 2
    one_line(capsys)


@pytest.mark.parametrize(
    "tag", ["object/apply:os.mkdir [{}]", "object/new:os.mkdir [{}]", "name:os.mkdir ''"]
)
def test_settings_in_yaml_execute_nothing(
    tag: str, trap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"epochs: !!python/{tag.format(trap)}\n")
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "new")]) == 2
    one_line(capsys, "config: ", "line 1")


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": "[]"},
        {"config": '"os.system"'},
        {"config": "{}"},
        {"config": "!!python/object/apply:os.system ['true']"},
        {"config": json.dumps({"model": {"backbone": "os.system"}})},
        {"config": json.dumps({"model": ["resnet18"]})},
        {"other": "1"},
    ],
)
def test_metadata_of_safetensors_execute_nothing(metadata: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors", metadata)
    with pytest.raises(InputError, match="^(path|backbone|model|configuration)"):
        load_safetensors(tmp_path)


@pytest.mark.parametrize("payload", [pickled, archived])
def test_no_safetensors_execute(
    payload: Callable[[Path], bytes], trap: Path, tmp_path: Path
) -> None:
    replace(tmp_path / "model.safetensors", payload(trap))
    with pytest.raises(InputError, match="cannot be read"):
        load_safetensors(tmp_path)


def test_a_links_place_is_not_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of a run replace links; folders and logs that are links are refused."""
    outside, images = tmp_path / "outside", save_images(tmp_path / "images", 4)[0].parent
    outside.mkdir()
    mine = outside / "mine"
    mine.write_text("mine")
    for name in ("report.html", "curves.png", "knn.json", "metrics.jsonl"):
        (run / name).symlink_to(mine)
    (tmp_path / "x.parquet").symlink_to(mine)
    options = ["--out", str(tmp_path / "x.parquet"), "--overwrite", *ON_CPU]
    assert main(["embed", str(run), str(images), *options]) == 0
    assert not (tmp_path / "x.parquet").is_symlink()
    (run / "export").symlink_to(outside)
    capsys.readouterr()
    assert main(["export", str(run), "--format", "torchvision"]) == 2
    one_line(capsys, "export is a link; say where to write with --out")
    (tmp_path / "log").symlink_to(mine)
    with pytest.raises(OSError, match=r"symbolic links.*log"):
        Process(tmp_path / "log").start(["true"], threads=1, append=True)
    assert [path.name for path in outside.iterdir()] == ["mine"]
    assert mine.read_text() == "mine"
