"""Sources give 8-bit RGB however an image is stored, and name files that they cannot read."""

from __future__ import annotations

import io
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
import webdataset
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.PngImagePlugin import PngImageFile

from vi_simsiam.cli import main
from vi_simsiam.config import DecodeConfig
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.items import DatasetSource, as_source
from vi_simsiam.data.sources import (
    ArraySource,
    FileSource,
    UnreadableError,
)
from vi_simsiam.data_names import joined_spec
from vi_simsiam.errors import InputError
from vi_simsiam.inference.images import open_images

GRAY = np.array([[0, 50], [128, 255]], dtype=np.uint8)
ALL = DecodeConfig(frames="all")
COLOUR = np.stack([GRAY, GRAY[::-1], GRAY.T], axis=2)


def save(path: Path, size: tuple[int, int] = (6, 5), colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(colour).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def save_frames(path: Path, count: int, seed: int = 0) -> Path:
    """Every frame is other noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 6, 5), dtype=np.uint8)
    first, *others = map(Image.fromarray, noise)
    first.save(path, save_all=True, append_images=others)
    return path


def test_array_source_gives_the_stored_pixels() -> None:
    source = ArraySource(np.stack([GRAY, GRAY // 2]), np.array([1, 0]), ("a", "b"), "set/train")
    np.testing.assert_array_equal(source.image(0), np.repeat(GRAY[:, :, None], 3, axis=2))
    assert source.describe(1) == "set/train/1"
    twin = pickle.loads(pickle.dumps(source))
    assert (twin.image(1), twin.classes) == (source.image(1), ("a", "b"))
    np.testing.assert_array_equal(ArraySource(COLOUR[None]).image(0), COLOUR)


def test_sources_refuse_what_does_not_fit() -> None:
    images = np.zeros((3, 4, 4), np.uint8)
    for arguments, error, message in (
        ((images.astype(np.float32),), TypeError, "float32 must be uint8"),
        ((images.reshape(3, 4, 1, 2, 2),), InputError, r"shape \(3, 4, 1, 2, 2\)"),
        ((images, np.array([0, 1]), "ab"), InputError, r"labels: shape \(2,\) must be \(3,\)"),
        ((images, np.array([0, 1, 2]), "ab"), InputError, r"values must lie in \[0, 2\)"),
        ((images, np.array([0, 1, 2])), InputError, "both or neither"),
    ):
        with pytest.raises(error, match=message):
            ArraySource(*arguments)


def test_unreadable_files_are_named_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1600)
    good, huge = save(tmp_path / "good.png"), save(tmp_path / "huge.png", (64, 64))
    whole = save(tmp_path / "whole.jpg", (40, 40)).read_bytes()
    expected = {
        "truncated.jpg": "truncated",
        "empty.jpg": "^an empty file$",
        "text.jpg": "^not a JPEG",
        "missing.jpg": "^No such file or directory$",
        huge.name: "exceeds limit of",
        "pipe.png": "^no regular file$",
    }
    paths = [good, *(tmp_path / name for name in expected), good]
    paths[1].write_bytes(whole[: len(whole) // 2])
    paths[2].write_bytes(b"")
    paths[3].write_text("not an image")
    os.mkfifo(tmp_path / "pipe.png")
    source = FileSource(paths)
    for index, (name, reason) in enumerate(expected.items(), 1):
        with pytest.raises(UnreadableError, match=rf"{name}: cannot be read .+\)$") as caught:
            source.image(index)
        assert caught.value.entry.path == str(tmp_path / name)
        assert re.search(reason, caught.value.entry.reason)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert source.image(0).size == source.image(len(paths) - 1).size == (6, 5)
    assert ArraySource(COLOUR[None, :1]).dimensions(0) == (1, 2)
    monkeypatch.setattr(FileSource, "image", None)  # a file's header is enough
    assert source.dimensions(0) == (5, 6)
    with pytest.raises(UnreadableError, match=r"^.*missing\.jpg: cannot be read .*No such file"):
        source.dimensions(4)


def test_fingerprints_change_with_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = save(tmp_path / "a.png"), save(tmp_path / "b.png")
    labels, files = np.array([0, 1]), [first, second]
    source = FileSource(files, labels, "xy", "set")
    monkeypatch.chdir(tmp_path)
    assert FileSource(["a.png", "b.png"], labels, "xy").fingerprint() == source.fingerprint()
    sources = [source, FileSource(files[::-1], labels, "xy"), FileSource(files, labels[::-1], "xy")]
    sources += [FileSource(files, labels, "xz"), FileSource(files)]
    for decode in (DecodeConfig(background="red"), DecodeConfig(value_range="file")):
        sources.append(FileSource(files, labels, "xy", decode=decode))
    seen = {each.fingerprint() for each in sources}
    first.unlink()
    seen.add(source.fingerprint())
    status = second.stat()
    second.write_bytes(b"")
    os.utime(second, ns=(status.st_atime_ns, status.st_mtime_ns))
    seen.add(source.fingerprint())
    assert len(seen) == 9
    assert ArraySource(COLOUR[None]).fingerprint() is None


def test_a_dataset_gives_images_of_every_kind() -> None:
    chw = torch.from_numpy(COLOUR).permute(2, 0, 1)
    deep = Image.fromarray(GRAY.astype(np.uint16) * 257)
    pair, fortran = [chw, torch.tensor(3)], COLOUR.copy(order="F")
    colour = [Image.fromarray(COLOUR), COLOUR, chw, (COLOUR, 1), pair, fortran]
    gray = [Image.fromarray(GRAY), GRAY, GRAY[:, :, None], torch.from_numpy(GRAY)[None], (deep,)]
    source = as_source(colour + gray)  # type: ignore[arg-type]
    assert isinstance(source, DatasetSource)
    assert (len(source), source.labels, source.classes, source.name) == (11, None, None, "list")
    for index in range(len(source)):
        expected = COLOUR if index < len(colour) else np.repeat(GRAY[:, :, None], 3, axis=2)
        np.testing.assert_array_equal(np.asarray(source.image(index)), expected)
        assert source.image(index).mode == "RGB"
    assert source.describe(4) == "list/4"
    assert as_source(source) is source


def test_a_dataset_of_something_else_is_refused() -> None:
    for item, given in (
        ("a.png", "str"),
        ((), "tuple"),
        (np.float32(COLOUR), r"ndarray of float32, shape \(2, 2, 3\)"),
        (np.zeros((2, 2, 4), np.uint8), r"ndarray of uint8, shape \(2, 2, 4\)"),
        (np.zeros((0, 2), np.uint8), r"ndarray of uint8, shape \(0, 2\)"),
        (torch.zeros(2, 2, dtype=torch.uint8), r"Tensor of torch.uint8, shape \(2, 2\)"),
    ):
        with pytest.raises(InputError, match=rf"^list/1: {given} must be a PIL image, a uint8 num"):
            as_source([COLOUR, item]).image(1)  # type: ignore[arg-type]


def test_data_sets_that_cannot_be_read() -> None:
    with pytest.raises(UnreadableError, match=r"set/2: cannot .* \(IndexError: list index out"):
        DatasetSource([COLOUR], "set").image(2)  # type: ignore[arg-type]
    with pytest.raises(UnreadableError, match=r"list/0: cannot be read .* \(ValueError: 0 x 0 pix"):
        DatasetSource([Image.new("RGB", (0, 0))]).image(0)  # type: ignore[arg-type]
    for wrong, name in ((3, "int"), ("imagenette", "str"), ({1, 2}, "set")):
        with pytest.raises(InputError, match=f"source: {name} must be an ImageSource or a map-st"):
            as_source(wrong)  # type: ignore[arg-type]


def test_one_percent_may_be_unreadable(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png")
    for bad, more in ((2, None), (3, ""), (4, ", ...")):
        source = FileSource([*(f"{number}.png" for number in range(bad)), *[good] * (200 - bad)])
        if more is None:
            assert len(in_memory(source, workers=0)) == 198
            continue
        message = (
            rf"files: {bad} of 200 images cannot .* 2\.png \(No such file or directory\){more}$"
        )
        with pytest.raises(InputError, match=message):
            in_memory(source, workers=0)


@pytest.mark.parametrize("kind", ["gif", "tif", "png"])
def test_frames_are_the_same_in_any_order(tmp_path: Path, kind: str) -> None:
    source = FileSource([save_frames(tmp_path / f"{name}.{kind}", 6) for name in "ab"], decode=ALL)
    alone = [np.asarray(FileSource(source.paths, decode=ALL).image(index)) for index in range(12)]
    with ThreadPoolExecutor(3) as pool:
        for order in ([*range(12)] * 3, [*range(11, -1, -1)], [0, 2, 2, 7, 1, 8, 3, 5]):
            for index, image in zip(order, pool.map(source.image, order), strict=True):
                np.testing.assert_array_equal(image, alone[index])
                assert source.dimensions(index) == (6, 5)
                np.testing.assert_array_equal(source.image(index), alone[index])
    source.image(1)
    save_frames(tmp_path / f"a.{kind}", 7, seed=1)
    assert not np.array_equal(source.image(2), alone[2]), "it was replaced meanwhile"


def test_frames_of_a_png_that_are_undone_leave_nothing_behind(tmp_path: Path) -> None:
    """A sprite that moves over a transparent ground: a frame has one sprite, in any order."""
    frames = []
    for place in range(4):
        pixels = np.zeros((4, 16, 4), np.uint8)
        pixels[:, 4 * place : 4 * place + 4] = (0, 255, 0, 255)
        frames.append(Image.fromarray(pixels))
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], disposal=2, blend=1)
    source = FileSource([tmp_path / "a.png"], decode=ALL)
    assert len(source) == 4
    for index in (0, 1, 2, 3, 3, 1, 2):
        green = np.asarray(source.image(index))[..., 0] == 0
        alone = np.asarray(FileSource(source.paths, decode=ALL).image(index))[..., 0] == 0
        assert green.sum() == 16
        np.testing.assert_array_equal(green, alone)


@pytest.mark.parametrize("kind", [GifImageFile, PngImageFile])
def test_a_long_animation_is_read_once(
    kind: type[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_frames(tmp_path / f"long.{kind.format.lower()}", 40)
    source = FileSource([path], decode=ALL)
    seek = mock.Mock(side_effect=kind._seek)
    monkeypatch.setattr(kind, "_seek", lambda *arguments: seek(*arguments))
    for index in range(40):
        source.image(index)
    assert 40 <= seek.call_count < 3 * 40


def test_a_file_whose_frames_cannot_be_counted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_frames(tmp_path / "moving.gif", 3)
    with monkeypatch.context() as patch:
        patch.setattr(GifImageFile, "n_frames", property(lambda self: [].pop()))
        source = FileSource([path, save(tmp_path / "one.png")], decode=ALL)
        with pytest.raises(UnreadableError, match=r"moving\.gif: .*pop from empty list"):
            source.image(0)
    with pytest.raises(UnreadableError, match=r"moving\.gif: .*\(its frames cannot be counted\)"):
        source.image(0)
    with pytest.raises(InputError, match="1 of 2 images cannot be read"):
        in_memory(source, workers=0)


def test_all_frames_of_files_in_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = save_frames(tmp_path / "moving.gif", 3), save(tmp_path / "one.png")
    moving = Image.open(path)
    moving.seek(1)
    source = open_images([path, moving, str(other)], ALL)
    monkeypatch.setattr(FileSource, "_count_frames", None)  # they are counted once
    places = [source.describe(index) for index in range(len(source))]
    assert places == [str(path), f"{path}#1", f"{path}#2", "images/1", str(other)]
    images = [np.asarray(source.image(index)) for index in range(len(source))]
    np.testing.assert_array_equal(images[1], images[3])
    assert not np.array_equal(images[1], images[2])
    (note,) = source.notes
    assert note.startswith("images: 1 PIL image with several frames, of which the current one")
    assert open_images([moving]).notes == open_images([Image.open(other)], ALL).notes == ()


def test_images_of_other_channels_in_files(tmp_path: Path) -> None:
    """Gray of 16 bits as PNG in Parquet, five channels of 16 bits as TIFF in tar."""
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256
    encoded = io.BytesIO()
    Image.fromarray(deep).save(encoded, "PNG")
    table = pa.table({"image": [{"bytes": encoded.getvalue(), "path": None}]})
    pq.write_table(table, tmp_path / "gray.parquet")
    bands = np.stack([deep + channel for channel in range(5)], 2)
    encoded = io.BytesIO()
    tifffile.imwrite(encoded, bands, planarconfig="contig")
    with webdataset.TarWriter(str(tmp_path / "bands.tar")) as shard:
        shard.write({"__key__": "field", "tif": encoded.getvalue()})
    for name, expected in (("gray.parquet", deep[:, :, None]), ("bands.tar", bands)):
        decode = DecodeConfig(channels=expected.shape[2], bits=16)
        source = open_dataset(str(tmp_path / name), decode=decode).train
        assert source.dimensions(0) == (16, 16)
        np.testing.assert_array_equal(source.array(0), expected)


def test_contradictions_of_a_table_are_named(tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    rows = ["path,label,split", "a.png,0,train", "b.png,1,train", "a.png,1,train", "b.png,1,val"]
    (tmp_path / "photos.csv").write_text("\n".join([*rows, "c.png,0,val"]))
    train = open_dataset(str(tmp_path / "photos.csv")).train
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1]
    assert any("1 image with two labels, of which the first is used" in x for x in train.notes)
    assert any("1 image in the training and the validation part" in x for x in train.notes)


def test_folders_share_a_file_with_other_labels_and_parts(tmp_path: Path) -> None:
    one = tmp_path / "one" / "train" / "cat" / "a.png"
    one.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(one)
    for place in ("train/dog", "val/dog", "val/cat", "train/cat"):
        (tmp_path / "two" / place).mkdir(parents=True)
        name = tmp_path / "two" / place / "b.png"
        if place.startswith("val/d") or place == "train/dog":
            os.link(one, name)
        else:
            Image.new("RGB", (9, 8)).save(name)
    splits = open_dataset(joined_spec([tmp_path / "one", tmp_path / "two"]))
    train, val = splits.train, splits.val
    assert val is not None
    assert (len(train), len(val)) == (2, 2)
    assert any("1 image with two labels" in x for x in train.notes)
    assert any("1 image in the training and the validation part" in x for x in train.notes)


def test_many_folders_with_long_names(tmp_path: Path) -> None:
    folders = [tmp_path / f"{number:02d}{'x' * 200}" for number in range(30)]
    for folder in folders:
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    spec = joined_spec(folders)
    assert len(open_dataset(spec).train) == 30
    out = str(tmp_path / "views.png")
    assert main(["views", "--data", *map(str, folders), "--out", out, "--images", "2"]) == 0
