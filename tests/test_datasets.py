"""Data sets by name: the embedded one, folders, and published ones without touching the network.

Images are found by what Pillow opens, each once, and what is passed over is counted.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import sys
import urllib.error
from importlib import resources
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from PIL import Image, features
from torchvision.datasets import CIFAR10

from vi_simsiam.data import datasets, files
from vi_simsiam.data.cache import pack
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.files import find_images
from vi_simsiam.data.sources import FileSource
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


def save(path: Path, kind: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (200, 20, 20)).save(path, kind)
    return path


def save_all(folder: Path, *names: str) -> None:
    for name in names:
        save(folder / name)


def names(folder: Path) -> list[str]:
    return [os.path.relpath(path, folder) for path in find_images(folder).paths]


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
    accepted = "folder of images, a list .*, a pack file, or one of fashion-mini, cifar10"
    for spec in ("mnist", "", "folder:", "pack:", "Imagenette", "folder"):
        with pytest.raises(
            InputError, match=f"data: '{spec}' is not there; it must be a {accepted}"
        ):
            open_dataset(spec)
    with pytest.raises(InputError, match=r"did you mean 'imagenette'\?"):
        open_dataset("imagenet")


def test_paths_need_no_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing folder or file is opened, but a known name comes before such a folder."""
    save_all(tmp_path, "photos/1.png", "photos/2.png", "fashion-mini/1.png")
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset("photos").train) == len(open_dataset("folder:photos").train) == 2
    assert len(open_dataset("fashion-mini").train) == 8000
    pack(open_dataset("photos").train, tmp_path / "mine.pack", workers=1)
    assert len(open_dataset("mine.pack").train) == 2


def test_folder_with_classes(tmp_path: Path) -> None:
    save_all(tmp_path, "train/n02086240/2.png", "train/n02086240/deep/1.JPEG", "train/a/3.jpg")
    splits = open_dataset(f"folder:{tmp_path}")
    assert (splits.name, splits.val) == (f"folder:{tmp_path}", None)
    assert splits.train.classes == ("a", "Shih-Tzu")
    np.testing.assert_array_equal(splits.train.labels, [0, 1, 1])
    assert [Path(splits.train.describe(i)).name for i in range(3)] == ["3.jpg", "2.png", "1.JPEG"]
    save_all(tmp_path, "val/a/1.png", "val/n02086240/1.png")
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
        (("train/a/1.png", "val/1.png"), "holds no class folders"),
    ],
)
def test_folder_mistakes_are_named(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    if names == ("../data",):
        (tmp_path / "data").write_text("")
    else:
        save_all(tmp_path / "data", *names)
    with pytest.raises(InputError, match=message.format(tmp_path / "data")):
        open_dataset(f"folder:{tmp_path / 'data'}")


@pytest.fixture
def small_imagenette(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let copies of 2 + 1 images count as complete."""
    for name, entry in list(datasets._PUBLISHED.items()):
        small = datasets._Published(entry.folders, 2, 1, entry.url, entry.md5)
        monkeypatch.setitem(datasets._PUBLISHED, name, small)


def unpack(folder: Path) -> None:
    save_all(folder, "train/n01440764/1.JPEG", "train/n01440764/2.JPEG", "val/n01440764/1.JPEG")


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
    save_all(tmp_path, "imagenette2-320/val/n01440764/2.JPEG")
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
        assert root == extract_root
        calls.append((url, Path(root).parent, md5))
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
    assert calls == [(url, tmp_path, "0f46d997ec2264e97609196c95897a44")]
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
    save_all(tmp_path / "cifar10", "train/cat/1.jpg")
    splits = open_dataset("cifar10", root=tmp_path)
    np.testing.assert_array_equal(splits.train.labels, [0, 0, 1, 0, 2, 0, 3, 0, 4, 0])
    assert splits.val is not None
    np.testing.assert_array_equal(splits.val.image(0), np.full((32, 32, 3), 5))
    assert splits.val.describe(1) == "cifar10/val/1"
    (folder / "data_batch_3").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"no complete copy in .*downloading is off"):
        open_dataset("cifar10", root=tmp_path, download=False)


def test_find_images_is_sorted_and_skips_what_is_hidden(tmp_path: Path) -> None:
    shown = ["a.JPG", "b/1.jpeg", "b/2.PNG", "b/deep/0.tif", "c.txt.png"]
    save_all(tmp_path, *shown[::-1], ".hidden.png", ".cache/x.png", "b/._1.jpeg")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert names(tmp_path) == shown


def test_formats_are_those_that_pillow_opens(tmp_path: Path) -> None:
    kinds = {"jfif": "JPEG", "tga": "TGA", "ico": "ICO", "mpo": "MPO"}
    kinds |= {"avif": "AVIF"} if features.check("avif") else {}
    kinds |= {"jp2": "JPEG2000"} if features.check("jpg_2000") else {}
    for suffix, kind in kinds.items():
        save(tmp_path / f"image.{suffix}", kind)
    save(tmp_path / "without", "PNG")
    save(tmp_path / "1.2.840.113", "JPEG")
    (tmp_path / "README").write_text("P5 is no picture")
    found = find_images(tmp_path)
    assert len(found.paths) == len(kinds) + 2
    assert found.passed_over == {"": 1}
    source = FileSource(found.paths)
    for index in range(len(source)):
        assert np.abs(np.asarray(source.image(index)).astype(int) - (200, 20, 20)).max() <= 6


def test_what_is_passed_over_is_counted_by_suffix(tmp_path: Path) -> None:
    for name in ("a.heic", "b.HEIC", "a.npy", "b.npy", "c.npy", "labels.csv", "Makefile"):
        (tmp_path / name).write_bytes(b"something")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert find_images(tmp_path).note() == (
        "8 files passed over: 3 .npy, 2 .heic (pip install pillow-heif to read them), "
        "1 without suffix, 1 .csv, 1 broken links"
    )


def test_a_plugin_that_is_installed_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = ModuleType("pillow_heif")
    plugin.register_heif_opener = lambda: Image.register_extension("PNG", ".heic")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.registered_extensions()))
    save(tmp_path / "a.heic", "PNG")
    files._suffixes.cache_clear()
    try:
        assert names(tmp_path) == ["a.heic"]
    finally:
        files._suffixes.cache_clear()


def test_no_decoder_that_runs_programs(tmp_path: Path) -> None:
    for name in ("script.jpg", "page.eps"):
        (tmp_path / name).write_bytes(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n"
        )
    assert names(tmp_path) == ["script.jpg"]
    with pytest.raises(InputError, match="not a JPEG"):
        FileSource([tmp_path / "script.jpg"]).image(0)


def test_each_file_counts_once_where_it_lies(tmp_path: Path) -> None:
    image = save(tmp_path / "data" / "b" / "1.png")
    save(tmp_path / "beside.png")
    os.link(image, tmp_path / "data" / "b" / "2.png")
    (tmp_path / "data" / "a").mkdir()
    for link, target in {
        "a/0.png": image,
        "a/up": "..",
        "a/further": tmp_path,
        "c": "b",
        "self.png": "self.png",
        "lost.png": "nowhere.png",
    }.items():
        (tmp_path / "data" / link).symlink_to(target)
    found = find_images(tmp_path / "data")
    assert names(tmp_path / "data") == ["b/1.png", "lost.png", "self.png"]
    assert found.note() == "3 further names (links) of images and folders left out"
    with pytest.raises(InputError, match=r"self\.png: cannot be read .* \(Too many levels"):
        FileSource(found.paths).image(2)


def test_a_folder_that_may_not_be_entered_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are still found, to be reported when they are read."""
    save_all(tmp_path, "0.png", "closed/1.png")
    (tmp_path / "closed" / "2.txt").touch()
    status = os.stat

    def refuse(path: str, **options: bool) -> os.stat_result:
        if "closed" in Path(path).parts[:-1]:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return status(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    found = find_images(tmp_path)
    assert [Path(path).name for path in found.paths] == ["0.png", "1.png"]
    assert found.passed_over == {".txt": 1}
    closed = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(os, "scandir", mock.Mock(side_effect=closed))
    with pytest.raises(InputError, match=rf"{tmp_path}: cannot be listed \(Permission denied\)"):
        find_images(tmp_path)


@pytest.mark.parametrize(
    ("link", "target", "hard", "note"),
    [
        ("dog/2.png", "cat/1.png", True, "cat/1.png (not dog/2.png)"),
        ("cat/0.png", "dog/1.png", False, "dog/1.png (not cat/0.png)"),
        ("cat/more", "dog/all", False, "dog/all (not cat/more)"),
        ("cat/2.png", "cat/1.png", True, None),
        ("cat/again", "cat", False, None),
        ("cat/loop", "", False, None),
    ],
)
def test_what_lies_in_two_classes_is_named(
    tmp_path: Path, link: str, target: str, hard: bool, note: str | None
) -> None:
    save_all(tmp_path / "train", "cat/1.png", "dog/1.png", "dog/all/1.png")
    (os.link if hard else os.symlink)(tmp_path / "train" / target, tmp_path / "train" / link)
    train = open_dataset(str(tmp_path)).train
    assert len(train) == 3
    named = [line.rpartition("in one: ")[2] for line in train.notes if "two classes" in line]
    assert named == ([note] if note else [])


def test_links_in_class_folders(tmp_path: Path) -> None:
    """Links elsewhere are followed."""
    save_all(tmp_path, "store/x/1.png", "store/2.png", "data/train/dog/3.png")
    (tmp_path / "data" / "train" / "cat").symlink_to(tmp_path / "store" / "x")
    (tmp_path / "data" / "train" / "dog" / "two.png").symlink_to(tmp_path / "store" / "2.png")
    train = open_dataset(str(tmp_path / "data")).train
    assert names(tmp_path / "data" / "train") == ["cat/1.png", "dog/3.png", "dog/two.png"]
    assert train.classes == ("cat", "dog")
    np.testing.assert_array_equal(train.labels, [0, 1, 1])


@pytest.mark.parametrize(("train", "val"), [("Train", "valid"), ("training", "Validation")])
def test_the_parts_by_their_usual_names(tmp_path: Path, train: str, val: str) -> None:
    save_all(tmp_path, f"{train}/a/1.png", f"{train}/b/2.png", "test/a/5.png", "6.png")
    save_all(tmp_path, f"{val}/a/3.png", f"{val}/b/4.png")
    splits = open_dataset(str(tmp_path))
    assert (len(splits.train), splits.val and len(splits.val)) == (2, 2)
    note = f"{tmp_path / train}: only {train}/ and {val}/ are read, not 6.png, test"
    assert splits.train.notes == (note,)
    (tmp_path / "VAL").mkdir()
    with pytest.raises(InputError, match=f"holds VAL and {val}; only one of them can be meant"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("val", [(), ("val/1.png",), ("val/a/1.png",)])
def test_photos_without_classes_have_no_validation_part(
    tmp_path: Path, val: tuple[str, ...]
) -> None:
    save_all(tmp_path, "train/1.png", "test/1.png", *val)
    splits = open_dataset(str(tmp_path))
    assert splits.val is splits.train.labels is None
    note = f"{tmp_path / 'train'}: only train/ is read, not test"
    note += ", val; validation needs class folders in train/ and val/" if val else ""
    assert splits.train.notes == (note,)


def test_a_class_that_vanishes_is_named(tmp_path: Path) -> None:
    save(tmp_path / "train" / "cat" / "1.png")
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "1.heic").write_bytes(b"something")
    assert open_dataset(str(tmp_path)).train.notes == (
        f"{tmp_path / 'train'}: 1 file passed over: 1 .heic (pip install pillow-heif to read them)",
        f"{tmp_path / 'train'}: no image, and so no class, in dog",
    )
    (tmp_path / "train" / "cat" / "1.png").unlink()
    with pytest.raises(InputError, match=r"train: holds no image .* passed over: 1 \.heic"):
        open_dataset(str(tmp_path))
