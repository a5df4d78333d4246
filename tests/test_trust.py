"""Nothing executes from a file, and nothing is written outside the folder that is named."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from inference_cases import ON_CPU, save_images, save_run
from torch.hub import load_state_dict_from_url
from torchvision.datasets import CIFAR10

from vi_simsiam import backbones, load
from vi_simsiam.cli import main
from vi_simsiam.data import datasets
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.engine.checkpoint import FORMER
from vi_simsiam.engine.processes import Process
from vi_simsiam.engine.run import load_run
from vi_simsiam.errors import InputError
from vi_simsiam.export import load_safetensors


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """A file that no test may make."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


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


def pickled(trap: Path) -> bytes:
    return pickle.dumps(Payload(trap), protocol=2)


def archived(trap: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": 1, "model": Payload(trap)}, buffer)
    return buffer.getvalue()


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


def test_no_frozen_run_executes(
    saved: Path, trap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "simsiam", "simsiam")
    replace_checkpoint(run, FORMER, archived(trap))
    options = ["--frozen-run", str(run), "--out", str(tmp_path / "new"), "--quiet"]
    assert main(["train", *options, "--images", "64", "--batch-size", "32"]) == 2
    one_line(capsys, FORMER)
    assert not (tmp_path / "new").exists()


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


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and its address on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves without a log."""

    def log_message(self, *given: object) -> None:
        """Print nothing."""


def entry(name: str, content: bytes = b"x", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    info.size = len(content) if info.isreg() else 0
    return info, content


def archive(entries: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


FOLDER = "imagewoof2-320"
ESCAPES = {
    "above": [entry("../../out")],
    "a link out": [entry("a", type=tarfile.SYMTYPE, linkname="../../.."), entry("a/out")],
    "an absolute link": [entry("a", type=tarfile.SYMTYPE, linkname="/"), entry("a/out")],
    "a hard link": [entry(f"{FOLDER}/a", type=tarfile.LNKTYPE, linkname="../../../secret")],
    "a device": [entry(f"{FOLDER}/a", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
    "a pipe": [entry(f"{FOLDER}/a", type=tarfile.FIFOTYPE)],
}


def publish(patch: pytest.MonkeyPatch, url: str, content: bytes) -> None:
    patch.setenv("no_proxy", "*")
    published = datasets._Published((FOLDER,), 1, 1, url, hashlib.md5(content).hexdigest())
    patch.setitem(datasets._PUBLISHED, "imagewoof", published)


@pytest.mark.parametrize("entries", ESCAPES.values(), ids=ESCAPES)
def test_an_archive_stays_in_its_folder(
    entries: list[tuple[tarfile.TarInfo, bytes]],
    server: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the checksum that is expected: whoever makes the archive may give it, too."""
    content, (folder, address) = archive(entries), server
    (folder / "x.tgz").write_bytes(content)
    publish(monkeypatch, f"{address}/x.tgz", content)
    root = tmp_path / "deep" / "root"
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(InputError, match=r"imagewoof: http://.* could not be downloaded \(.+\)"):
        open_dataset("imagewoof", root=root)
    assert list(root.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "secret", "served"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["root"]


def test_a_wrong_byte_of_a_data_set_is_refused(
    server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = save_images(tmp_path / "images", 1)[0].read_bytes()
    parts = [entry(f"{FOLDER}/{part}/n02086240/0.png", image) for part in ("train", "val")]
    content, (folder, address) = archive(parts), server
    publish(monkeypatch, f"{address}/x.tgz", content)
    root = tmp_path / "root"
    (folder / "x.tgz").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="corrupted"):
        open_dataset("imagewoof", root=root)
    assert list(root.iterdir()) == []
    (folder / "x.tgz").write_bytes(content)
    assert len(open_dataset("imagewoof", root=root).train) == 1
    assert [path.name for path in root.iterdir()] == [FOLDER]


def test_a_wrong_byte_of_cifar10_is_refused(
    server: tuple[Path, str], trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are pickles, and are read only with the checksums that torchvision has."""
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list] + ["batches.meta"]
    parts = [entry(f"{CIFAR10.base_folder}/{name}", pickled(trap)) for name in names]
    content, (folder, address) = archive(parts), server
    (folder / CIFAR10.filename).write_bytes(content)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(CIFAR10, "url", f"{address}/{CIFAR10.filename}")
    root = tmp_path / "root"
    with pytest.raises(InputError, match=r"could not be downloaded \(.*corrupted"):
        open_dataset("cifar10", root=root)
    assert list(root.iterdir()) == []
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    with pytest.raises(InputError, match=r"could not be downloaded \(.*corrupted"):
        open_dataset("cifar10", root=root)


def test_weights_are_checked_and_no_pickles(
    server: tuple[Path, str], trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder, address), cache = server, tmp_path / "torch"
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("TORCH_HOME", str(cache))
    plain, hostile = io.BytesIO(), archived(trap)
    torch.save({"w": torch.ones(1)}, plain)

    def offer(content: bytes, name: str) -> str:
        file = f"w-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        (folder / name).write_bytes(content)
        weights = SimpleNamespace(url=f"{address}/{name or file}")
        weights.get_state_dict = functools.partial(load_state_dict_from_url, weights.url)
        monkeypatch.setattr(backbones, "_weights", lambda name: weights)
        return file

    content = plain.getvalue()
    name = offer(content, "w.pth")
    offer(content[:-1] + b"!", name)
    with pytest.raises(InputError, match=r"could not be downloaded \(invalid hash value"):
        backbones.fetch_weights("resnet18", download=True)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    offer(content, name)
    backbones.fetch_weights("resnet18", download=True)
    backbones.fetch_weights("resnet18", download=False)
    kept = cache / "hub" / "checkpoints" / name
    kept.write_bytes(content[:-1] + b"!")
    with pytest.raises(InputError, match=f"{kept} is damaged, as its SHA-256 begins with"):
        backbones.fetch_weights("resnet18", download=False)

    offer(hostile, offer(hostile, "w.pth"))
    with pytest.raises(InputError, match="holds no weights; remove it"):
        backbones.fetch_weights("resnet18", download=True)
    with pytest.raises(InputError, match="holds no weights; remove it"):
        backbones.build_backbone("resnet18", pretrained=True)
