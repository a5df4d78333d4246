"""Selection of training images: shares of classes, held-out parts, and files in both parts."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packing_cases import Items, noise, stored_files
from PIL import Image

from vi_simsiam.config import DecodeConfig
from vi_simsiam.data import MultiViewLoader
from vi_simsiam.data.cache import cached, in_memory, pack
from vi_simsiam.data.datasets import Splits, open_dataset
from vi_simsiam.data.items import DatasetSource
from vi_simsiam.data.packed import open_pack
from vi_simsiam.data.sources import ArraySource, FileSource, ImageSource
from vi_simsiam.data.subsets import select, subset
from vi_simsiam.errors import InputError


def source(counts: tuple[int, ...], name: str = "some") -> ArraySource:
    """Image i is uniformly i; labels are mixed."""
    labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    labels = labels[np.argsort(np.random.PCG64(0).random_raw(len(labels)))]
    images = np.repeat(np.arange(len(labels), dtype=np.uint8), 6).reshape(-1, 2, 3)
    return ArraySource(images, labels, [f"class {i}" for i in range(len(counts))], name)


def numbers(images: ImageSource) -> list[int]:
    return [int(np.asarray(images.image(i))[0, 0, 0]) for i in range(len(images))]


def chosen(counts: tuple[int, ...], **options: Any) -> Splits:
    return select(Splits("some", source(counts), None), **options)


@pytest.mark.parametrize(
    ("counts", "images", "expected"),
    [
        ((40, 40, 40), 32, [11, 11, 10]),
        ((57, 33, 10), 10, [6, 3, 1]),  # quotas 5.7, 3.3, 1.0
        ((50, 26, 24), 7, [3, 2, 2]),  # quotas 3.5, 1.82, 1.68: the largest remainders win
        ((3, 2, 1), 6, [3, 2, 1]),
    ],
)
def test_classes_keep_their_shares(
    counts: tuple[int, ...], images: int, expected: list[int]
) -> None:
    whole = source(counts)
    train = select(Splits("some", whole, None), images=images).train
    assert train.labels is not None
    assert whole.labels is not None
    assert np.bincount(train.labels, minlength=3).tolist() == expected
    kept = numbers(train)
    assert kept == sorted(set(kept)), "as in the source, each once"
    assert train.labels.tolist() == whole.labels[kept].tolist()
    assert train.classes == whole.classes
    assert [train.describe(i) for i in range(len(train))] == [f"some/{i}" for i in kept]


def test_a_draw_is_its_seeds_and_a_smaller_one_lies_in_it() -> None:
    first, other = (numbers(chosen((50, 50), images=40, seed=seed).train) for seed in (1, 2))
    assert first != other
    assert set(numbers(chosen((50, 50), images=20, seed=1).train)) < set(first)
    assert first[:6] == [2, 4, 5, 9, 12, 14], "the same in every version of numpy"


def test_what_is_held_out_is_not_trained_on() -> None:
    few, many = (chosen((60, 30, 10), images=images, held_out=0.2, seed=4) for images in (30, None))
    assert few.val is not None
    assert many.val is not None
    held = numbers(few.val)
    assert numbers(many.val) == held
    assert np.bincount(few.val.labels).tolist() == [12, 6, 2]  # type: ignore[arg-type]
    assert few.val.describe(0) == f"some/{held[0]}"
    assert sorted(numbers(many.train) + held) == list(range(100))
    assert len(few.train) == 30
    assert not set(numbers(few.train)) & set(held)


def test_without_labels_it_is_a_plain_draw() -> None:
    splits = select(Splits("items", DatasetSource(Items(12)), None), images=5, held_out=0.25)  # type: ignore[arg-type]
    assert splits.val is not None
    assert (len(splits.train), len(splits.val)) == (5, 3)
    places = [part.describe(i) for part in (splits.train, splits.val) for i in range(len(part))]
    assert len(set(places)) == 8
    index = int(places[0].rsplit("/", 1)[1])
    assert np.array_equal(np.asarray(splits.train.image(0)), noise(2 + index % 3, 3, index))
    assert splits.train.dimensions(0) == (2 + index % 3, 3)
    assert splits.train.fingerprint() is None
    assert splits.train.labels is None


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ((50, 50), {"images": 81, "held_out": 0.2}, "images: 81 .* some has 80 to train on"),
        ((50, 50), {"held_out": 0.001}, "held_out: 0.001 .* of 100 images that is none"),
        ((50, 50), {"held_out": 0.999}, "held_out: .* 100 images it leaves none to train on"),
        ((1,), {"held_out": 0.2}, "held_out: 0.2 is not accepted; of 1 image that is none"),
    ],
)
def test_too_many_images_and_none_held_out_are_named(
    counts: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        chosen(counts, **options)


def test_files_stay_files_and_are_cached_by_what_they_are(tmp_path: Path) -> None:
    files = stored_files(tmp_path / "images")
    part, other = (subset(files, np.array(indices)) for indices in ([1, 4, 6], [1, 4, 5]))
    assert isinstance(part, FileSource)
    assert part.paths == tuple(files.paths[i] for i in (1, 4, 6))
    assert len({source.fingerprint() for source in (files, part, other)}) == 3
    packed, _ = cached(part, cache_dir=tmp_path / "cache", workers=0)
    assert [packed.describe(i) for i in range(3)] == list(part.paths)
    assert packed.labels is not None
    assert packed.labels.tolist() == [1, 0, 0]


@pytest.mark.parametrize("on_disk", [False, True])
def test_packed_images_share_the_pixels(tmp_path: Path, on_disk: bool) -> None:
    """Each image of ragged sizes has its own bytes and label, also pickled and in a loader."""
    files = stored_files(tmp_path / "images")
    whole = in_memory(files, workers=0)
    if on_disk:
        pack(files, tmp_path / "images.pack", workers=0)
        whole = open_pack(tmp_path / "images.pack")
    indices = np.array([6, 0, 3])
    part = subset(subset(whole, np.arange(6, -1, -1)), 6 - indices, "part")
    assert cached(part)[0] is part
    sent = pickle.dumps(part)
    assert (len(sent) < 2000) == on_disk or not on_disk
    for images in (part, pickle.loads(sent)):
        assert (images.name, len(images)) == ("part", 3)
        for i, index in enumerate(indices):
            assert np.array_equal(np.asarray(images.image(i)), np.asarray(whole.image(index)))
            assert images.dimensions(i) == whole.dimensions(index)
            assert images.describe(i) == whole.describe(index)
            assert images.labels[i] == index % 2
    copied = DatasetSource([whole.image(i) for i in indices])  # type: ignore[arg-type]
    loaders = (MultiViewLoader(x, "none", 3, seed=1, workers=0) for x in (part, copied))
    a, b = (next(loader.epoch(0)) for loader in loaders)
    assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def test_files_that_both_parts_hold_are_left_out_of_both(
    image_folder: Path, tmp_path: Path
) -> None:
    """A copy under another name and class; a file of equal size and other content stays."""
    data = Path(shutil.copytree(image_folder, tmp_path / "data"))
    dark, other = data / "train" / "dark", data / "val" / "bright" / "zz.png"
    taken, twice, near = dark / "03.png", dark / "zz.png", dark / "near.png"
    shutil.copy(taken, other)
    shutil.copy(dark / "05.png", twice)
    content = (data / "val" / "dark" / "00.png").read_bytes()
    near.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    splits = open_dataset(f"folder:{data}")
    kept = select(splits)
    assert (len(kept.train), len(kept.val or ())) == (len(splits.train) - 1, 16)
    assert isinstance(kept.train, FileSource)
    assert set(splits.train.paths) - set(kept.train.paths) == {str(taken)}  # type: ignore[attr-defined]
    assert set(splits.val.paths) - set(kept.val.paths) == {str(other)}  # type: ignore[union-attr]
    assert select(splits, distinct=False) == splits
    assert select(kept) == kept, "nothing asked for and nothing to drop"
    # With a held-out part a second copy within the training images could lie on the other side.
    held = select(splits, held_out=0.5, seed=3)
    paths = {*held.train.paths, *held.val.paths}  # type: ignore[union-attr]
    assert len(paths) == 40, "20 + 20 files, a near one, less the one in the validation part"
    assert str(twice) not in paths


@pytest.mark.parametrize("packed", [False, True])
def test_frames_of_a_file_are_held_out_together(tmp_path: Path, packed: bool) -> None:
    for number in range(12):
        frames = [Image.new("L", (4, 4), 20 * number + frame) for frame in range(4)]
        frames[0].save(tmp_path / f"{number}.tif", save_all=True, append_images=frames[1:])
    whole: ImageSource = FileSource(sorted(tmp_path.iterdir()), decode=DecodeConfig(frames="all"))
    whole = in_memory(whole, workers=0) if packed else whole
    parts = select(Splits("stacks", whole, None), held_out=0.25)
    assert parts.val is not None
    assert (len(parts.train), len(parts.val)) == (36, 12)
    held = {parts.val.describe(index).partition("#")[0] for index in range(12)}
    assert not held & {parts.train.describe(index).partition("#")[0] for index in range(36)}
