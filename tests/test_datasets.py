"""Data sets by name: the embedded one, folders, and published ones without touching the network."""

from __future__ import annotations

import hashlib
import pickle
import urllib.error
from importlib import resources
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from vi_simsiam.data import datasets
from vi_simsiam.data.cache import pack
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.errors import InputError

PIXELS = {
    "train": "dcda5d31d243feac2ab8288403fb2d43b54ca240d7c12197455f1e39d833ad86",
    "val": "96315b1732ab731e68b8def3c284f34b605f7deb7a61e683c7d786265c827c83",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = mock.Mock(side_effect=AssertionError("a test reached for the network"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


def images(folder: Path, *names: str) -> None:
    """Save small images under these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (len(name), 0, 0)).save(folder / name)


def test_fashion_mini_is_the_official_subset() -> None:
    splits = open_dataset("fashion-mini")
    for source, name, per_class in ((splits.train, "train", 800), (splits.val, "val", 200)):
        assert isinstance(source, datasets.ArraySource)
        assert source.images.shape == (10 * per_class, 28, 28)
        assert hashlib.sha256(source.images.tobytes()).hexdigest() == PIXELS[name]
        assert np.bincount(source.labels).tolist() == [per_class] * 10  # type: ignore[arg-type]
        assert source.describe(17) == f"fashion-mini/{name}/17"
    assert splits.train.classes is not None
    assert splits.train.classes[9] == "Ankle boot"
    np.testing.assert_array_equal(splits.train.labels[:4], [9, 0, 0, 3])  # type: ignore[index]
    licence = (resources.files("vi_simsiam") / "assets" / "FASHION_MNIST_LICENSE").read_text()
    assert "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in licence


def test_unknown_names_list_the_accepted() -> None:
    accepted = "folder of images, a pack file, or one of fashion-mini, cifar10, imagenette"
    for spec in ("mnist", "", "folder:", "pack:", "Imagenette", "folder"):
        with pytest.raises(
            InputError, match=f"data: '{spec}' is not there; it must be a {accepted}"
        ):
            open_dataset(spec)
    with pytest.raises(InputError, match=r"did you mean 'imagenette'\?"):
        open_dataset("imagenet")


def test_paths_need_no_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing folder or file is opened, but a known name comes before such a folder."""
    images(tmp_path, "photos/1.png", "photos/2.png", "fashion-mini/1.png")
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset("photos").train) == len(open_dataset("folder:photos").train) == 2
    assert len(open_dataset("fashion-mini").train) == 8000
    pack(open_dataset("photos").train, tmp_path / "mine.pack", workers=1)
    assert len(open_dataset("mine.pack").train) == 2


def test_folder_with_classes(tmp_path: Path) -> None:
    images(tmp_path, "train/n02086240/2.png", "train/n02086240/deep/1.JPEG", "train/a/3.jpg")
    splits = open_dataset(f"folder:{tmp_path}")
    assert (splits.name, splits.val) == (f"folder:{tmp_path}", None)
    assert splits.train.classes == ("a", "Shih-Tzu")
    np.testing.assert_array_equal(splits.train.labels, [0, 1, 1])
    assert [Path(splits.train.describe(i)).name for i in range(3)] == ["3.jpg", "2.png", "1.JPEG"]
    images(tmp_path, "val/a/1.png", "val/n02086240/1.png")
    val = open_dataset(f"folder:{tmp_path}").val
    assert val is not None
    assert val.classes == splits.train.classes
    np.testing.assert_array_equal(val.labels, [0, 1])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "^{}: no such folder; folder:PATH needs a folder of images$"),
        (("../data",), "is not a folder"),
        (("train/.hidden.png",), r"holds no image that Pillow opens\.$"),
        (
            ("train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png"),
            "only in train/: b; only in val/: c$",
        ),
        (("train/a/1.png", "train/1.png"), "both images and class folders"),
        (("train/a/1.png", "val/1.png"), "only in train/: a; only in val/: none$"),
    ],
)
def test_folder_mistakes_are_named(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    if names == ("../data",):
        (tmp_path / "data").write_text("")
    else:
        images(tmp_path / "data", *names)
    with pytest.raises(InputError, match=message.format(tmp_path / "data")):
        open_dataset(f"folder:{tmp_path / 'data'}")


@pytest.fixture
def small_imagenette(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let copies of 2 + 1 images count as complete."""
    for name, entry in list(datasets._PUBLISHED.items()):
        small = datasets._Published(entry.folders, 2, 1, entry.url, entry.md5)
        monkeypatch.setitem(datasets._PUBLISHED, name, small)


def unpack(folder: Path) -> None:
    images(folder, "train/n01440764/1.JPEG", "train/n01440764/2.JPEG", "val/n01440764/1.JPEG")


@pytest.mark.usefixtures("small_imagenette")
def test_unpacked_copies_are_recognised(tmp_path: Path) -> None:
    """The first of these in the order of preference, if it is complete."""
    for folder in ("cifar10", "imagenette", "imagenette2-160", "imagenette2", "imagenette2-320"):
        name = "cifar10" if folder == "cifar10" else "imagenette"
        unpack(tmp_path / folder)
        splits = open_dataset(name, root=tmp_path)
        assert (splits.name, splits.train.classes) == (name, ("tench",))
        assert splits.val is not None
        assert splits.val.describe(0).startswith(str(tmp_path / folder / "val"))
    images(tmp_path, "imagenette2-320/val/n01440764/2.JPEG")
    with pytest.raises(InputError, match=r"holds 2 \+ 2 images .* imagenette has 2 \+ 1"):
        open_dataset("imagenette", root=tmp_path)


def test_missing_copies_without_download(tmp_path: Path) -> None:
    for name, places in (
        ("imagenette", "looked for .*imagenette2-320, "),
        ("cifar10", "in .*cifar-10-batches-py or .*cifar10, "),
    ):
        with pytest.raises(InputError, match=f"^{name}: no .*{places}.*downloading is off"):
            open_dataset(name, root=tmp_path, download=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_imagenette")
@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), EOFError("no route"), None])
def test_download_is_checksummed_and_moved_when_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    calls = []

    def fake(url: str, root: str, *, extract_root: str, md5: str, remove_finished: bool) -> None:
        calls.append((url, root, md5))
        unpack(Path(extract_root) / folder.name)
        assert not folder.exists()
        if error:
            raise error

    folder = tmp_path / "imagewoof2-320"
    monkeypatch.setattr(datasets, "download_and_extract_archive", fake)
    if error:
        with pytest.raises(InputError, match=rf"^.*\(no route\).* recognised as {folder}.*$"):
            open_dataset("imagewoof", root=tmp_path)
        assert list(tmp_path.iterdir()) == []
        return
    for _ in range(2):
        assert len(open_dataset("imagewoof", root=tmp_path).train) == 2
    url = "https://s3.amazonaws.com/fast-ai-imageclas/imagewoof2-320.tgz"
    assert calls == [(url, str(tmp_path), "0f46d997ec2264e97609196c95897a44")]
    assert list(tmp_path.iterdir()) == [folder]


def test_cifar10_original_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two images each, with checksums that stand for the official ones."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    listed = []
    for number, (name, _) in enumerate(CIFAR10.train_list + CIFAR10.test_list):
        data = np.full((2, 3072), number, np.uint8)
        content = pickle.dumps({"data": data, "labels": [number, 0]})
        (folder / name).write_bytes(content)
        listed.append([name, hashlib.md5(content).hexdigest()])
    meta = pickle.dumps({"label_names": [f"class{i}" for i in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(CIFAR10, "test_list", listed[5:])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": hashlib.md5(meta).hexdigest()})
    images(tmp_path / "cifar10", "train/cat/1.jpg")
    splits = open_dataset("cifar10", root=tmp_path)
    np.testing.assert_array_equal(splits.train.labels, [0, 0, 1, 0, 2, 0, 3, 0, 4, 0])
    assert splits.val is not None
    np.testing.assert_array_equal(splits.val.image(0), np.full((32, 32, 3), 5))
    assert splits.val.describe(1) == "cifar10/val/1"
    (folder / "data_batch_3").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"no complete copy in .*downloading is off"):
        open_dataset("cifar10", root=tmp_path, download=False)
