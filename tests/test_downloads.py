"""Downloads: a wrong byte is refused and removed, and archives stay in their folder."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inference_cases import save_images
from torch.hub import load_state_dict_from_url
from torchvision.datasets import CIFAR10
from trust_cases import archived, pickled

from vi_simsiam import backbones
from vi_simsiam.data import datasets
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.errors import InputError


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
