"""Data sets by name: an embedded Fashion-MNIST subset, folders, packs, and published sets."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_and_extract_archive

from vi_simsiam.config import NAMED_DATA, DecodeConfig, data_spec
from vi_simsiam.data.files import find_images, is_image, list_folder
from vi_simsiam.data.listing import Entry, Listed, read_csv, read_list, sources
from vi_simsiam.data.packed import open_pack
from vi_simsiam.data.parquet import read_parquet
from vi_simsiam.data.sources import ArraySource, FileSource, ImageSource
from vi_simsiam.data.tar import read_tar
from vi_simsiam.data_names import LISTING_KINDS, data_label, data_places
from vi_simsiam.downloads import downloading
from vi_simsiam.errors import InputError, did_you_mean
from vi_simsiam.paths import user_path

ACCEPTED = (
    "a folder of images, a list of paths (.txt, .csv), Parquet or tar files, a pack file, or one "
    f"of {', '.join(NAMED_DATA)}"
)
"""The names that `open_dataset` accepts, for messages."""

_TRAIN_NAMES = ("train", "training")
_VAL_NAMES = ("val", "valid", "validation")
"""Folders of the two parts of a data set, in any case."""

_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip

_WORDNET_NAMES = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player",
    "n03000684": "chain saw", "n03028079": "church", "n03394916": "French horn",
    "n03417042": "garbage truck", "n03425413": "gas pump", "n03445777": "golf ball",
    "n03888257": "parachute", "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback",
    "n02088364": "beagle", "n02089973": "English foxhound", "n02093754": "Border terrier",
    "n02096294": "Australian terrier", "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog", "n02111889": "Samoyed", "n02115641": "dingo",
}  # fmt: skip
"""Class folders of ImageNette and ImageWoof are named by WordNet number."""

_RECOGNISED = "an unpacked copy is recognised as {}, and folder:PATH takes any other"


@dataclass(frozen=True)
class Splits:
    """A data set: its training images and its validation images, None without such a part."""

    name: str
    train: ImageSource
    val: ImageSource | None


@dataclass(frozen=True)
class _Published:
    """A published data set of class folders: folder names, numbers of images, and download."""

    folders: tuple[str, ...]
    train: int
    val: int
    url: str = ""
    md5: str = ""


# The 320-pixel variants: crops of 224 pixels are not enlarged, and decoding costs a fraction of the
# full size. Version 1 archives have another split, and so other numbers of images.
_PUBLISHED = {
    "cifar10": _Published(("cifar10",), 50000, 10000),
    "imagenette": _Published(
        ("imagenette2-320", "imagenette2", "imagenette2-160", "imagenette"),
        9469,
        3925,
        "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz",
        "3df6f0d01a2c9592104656642f5e78a3",
    ),
    "imagewoof": _Published(
        ("imagewoof2-320", "imagewoof2", "imagewoof2-160", "imagewoof"),
        9025,
        3929,
        "https://s3.amazonaws.com/fast-ai-imageclas/imagewoof2-320.tgz",
        "0f46d997ec2264e97609196c95897a44",
    ),
}


def open_dataset(
    spec: str,
    *,
    root: Path = Path("data"),
    download: bool = True,
    decode: DecodeConfig | None = None,
) -> Splits:
    """Open a data set by name.

    - ``fashion-mini``: 8,000 + 2,000 Fashion-MNIST images of 28 pixels, embedded in the package.
    - a folder's path, or ``folder:PATH``: with PATH/train/CLASS/ folders a labelled set, and
      PATH/val/CLASS/ (or valid/, validation/) its validation part; otherwise every image under
      PATH/train, or under PATH if there is no such folder, without labels.
    - ``folders:[PATH, ...]``: several such folders, a JSON list (`data_names.joined_spec`),
      with the classes of all of them; a file that two of them hold counts once.
    - ``list:FILE``, ``csv:FILE``, ``parquet:PATH``, ``tar:PATH``: see `data.listing`. A file's path
      is enough where its suffix is .txt, .csv, .tsv, .parquet or .tar.
    - a file's path, or ``pack:FILE``: a file of `vi-simsiam pack`, with its validation part.
    - ``cifar10``, ``imagenette``, ``imagewoof``: an unpacked copy under `root`, or else a
      checksummed download to it. ImageNette and ImageWoof are version 2 at 320 pixels. A copy of
      either with fewer images is refused.

    Files are listed, not read; `vi_simsiam.data.cache.cached` finds damaged ones.

    Args:
        spec: the name.
        root: folder of downloaded data sets.
        download: allow a download.
        decode: how files become pixels; None for the default, or that of a pack file.

    Raises:
        InputError: an unknown name, a folder without the files described, a download that is not
            allowed or fails, or a pack file of images that were decoded otherwise.
    """
    root, decode = user_path("data_root", root), decode or DecodeConfig()
    named, spec = spec, data_spec(spec)
    kind, _, place = spec.partition(":")
    if kind == "pack" and named != spec and is_image(place):
        raise InputError(f"data: {place} is an image; give the folder that it lies in")
    if spec in NAMED_DATA and not decode.is_rgb:
        raise InputError(f"channels, bits: {spec} is RGB with 8 bits; leave these options out")
    if spec == "fashion-mini":
        return _fashion_mini()
    if kind == "folder" and place:
        return _folder(Path(place), spec, decode)
    if kind == "folders":
        return Splits(spec, *sources(data_label(spec), _joined(data_places(spec), decode), decode))
    if kind in LISTING_KINDS and place:
        readers: dict[str, Callable[[str], Listed]] = {
            "list": read_list,
            "csv": read_csv,
            "parquet": read_parquet,
            "tar": functools.partial(read_tar, arrays=not decode.is_rgb),
        }
        return Splits(spec, *sources(place, readers[kind](place), decode))
    if kind == "pack" and place:
        path = Path(place)
        val, packed = validation_pack(path), open_pack(path)
        if decode not in (DecodeConfig(), packed.decode):
            held, asked = (
                ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(each).items())
                for each in (packed.decode, decode)
            )
            raise InputError(
                f"background, value_range, frames, channels, bits: {path} holds images decoded "
                f"with {held}, and "
                f"{asked} is asked for; leave these options out, or pack the images again"
            )
        return Splits(spec, packed, open_pack(val) if val.exists() else None)
    if spec == "cifar10":
        return _cifar10(root, download, decode)
    if spec in _PUBLISHED:
        return _imagenet_subset(spec, root, download, decode)
    raise InputError(
        f"data: {spec!r} is not there; it must be {ACCEPTED}{did_you_mean(spec, NAMED_DATA)}"
    )


def validation_pack(path: Path) -> Path:
    """Return the path of a pack's validation part: mine.val.pack beside mine.pack."""
    return path.with_name(f"{path.stem}.val{path.suffix}")


def _fashion_mini() -> Splits:
    asset = resources.files("vi_simsiam") / "assets" / "fashion_mini.npz"
    with asset.open("rb") as stream, np.load(stream) as arrays:
        parts = []
        for part in ("train", "val"):
            labels = arrays[f"{part}_labels"].astype(np.int64)
            name = f"fashion-mini/{part}"
            parts.append(ArraySource(arrays[f"{part}_images"], labels, _FASHION_CLASSES, name))
    return Splits("fashion-mini", *parts)


def _folder(path: Path, spec: str, decode: DecodeConfig) -> Splits:
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "no such folder"
        raise InputError(f"{path}: {problem}; folder:PATH needs a folder of images")
    train_folder, val_folder = _part(path, _TRAIN_NAMES), _part(path, _VAL_NAMES)
    if train_folder is None:
        return Splits(spec, _images(path, decode, labelled=False), None)
    train, val = _images(train_folder, decode), None
    read = [train_folder.name]
    if val_folder is not None and train.labels is not None:
        val = _images(val_folder, decode, required=False)
        read.append(val_folder.name)
    inside = {e.name for e in list_folder(path) if os.path.isdir(e.path) or is_image(e.path)}
    if beside := inside - set(read):
        verb = "is" if val is None else "are"
        note = f"only {'/ and '.join(read)}/ {verb} read, not {_names(beside)}"
        if val_folder is not None and val is None:
            note += f"; validation needs class folders in {read[0]}/ and {val_folder.name}/"
        train.notes += (f"{train_folder}: {note}",)
    if val is not None and val.labels is None:
        raise InputError(
            f"{val_folder}: holds no class folders, {train_folder} does; "
            "give it the same ones or none"
        )
    if val is not None and val.classes != train.classes:
        names, others = set(train.classes or ()), set(val.classes or ())
        raise InputError(
            f"{path}: classes of {read[0]}/ and {read[1]}/ must agree; "
            f"only in {read[0]}/: {_names(names - others)}; "
            f"only in {read[1]}/: {_names(others - names)}"
        )
    for part in filter(None, (train, val)):
        if part.classes is not None:
            part.classes = tuple(_WORDNET_NAMES.get(name, name) for name in part.classes)
    return Splits(spec, train, val)


def _joined(folders: list[str], decode: DecodeConfig) -> Listed:
    """The images of several folders, each with class folders or none of them with any."""
    entries: list[Entry] = []
    notes: list[str] = []
    first: dict[object, str] = {}  # of several names of a file
    has_labels: dict[str, bool] = {}
    for folder in folders:
        # Entries are files, whose frames are counted once, in the end.
        single = dataclasses.replace(decode, frames="first")
        splits = _folder(Path(folder), f"folder:{folder}", single)
        has_labels[folder] = splits.train.labels is not None
        for part, source in (("train", splits.train), ("val", splits.val)):
            if not isinstance(source, FileSource):
                continue
            notes += source.notes
            labels, classes = source.labels, source.classes or ()
            for index, path in enumerate(source.paths):
                file: object = path
                with contextlib.suppress(OSError):  # to be reported when it is read
                    status = os.stat(path)
                    file = status.st_dev, status.st_ino
                label = None if labels is None else classes[labels[index]]
                entries.append(Entry(first.setdefault(file, path), label, part))
    if len(set(has_labels.values())) > 1:
        bare = next(folder for folder, has in has_labels.items() if not has)
        full = next(folder for folder, has in has_labels.items() if has)
        raise InputError(
            f"data: {full} has class folders in train/, {bare} has none; "
            "all of several folders need them, or none"
        )
    return Listed(entries, (), notes)


def _part(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The folder of a part, by any of its names."""
    entries = [entry for entry in list_folder(folder) if entry.name.lower() in names]
    found = [Path(entry.path) for entry in entries if os.path.isdir(entry.path)]
    if len(found) > 1:
        both = " and ".join(path.name for path in found)
        raise InputError(f"{folder}: holds {both}; only one of them can be meant")
    return found[0] if found else None


def _images(
    folder: Path, decode: DecodeConfig, *, labelled: bool = True, required: bool = True
) -> FileSource:
    """All images in a folder, with its class folders as classes if it has any."""
    found = find_images(folder, arrays=not decode.is_rgb)
    if required and not found.paths:
        raise InputError(f"{folder}: holds no image that Pillow opens. {found.note()}".rstrip())
    inside = functools.partial(os.path.relpath, start=folder)
    homes = [inside(path).split(os.sep) for path in found.paths]
    names = sorted({parts[0] for parts in homes if len(parts) > 1}) if labelled else []
    if names and any(len(parts) == 1 for parts in homes):
        raise InputError(
            f"{folder}: holds both images and class folders; move the images into class folders, "
            f"or use folder:{folder} to train on all of them without labels"
        )
    notes, labels = [found.note()], None
    if names:
        numbers = {name: number for number, name in enumerate(names)}
        labels = np.array([numbers[parts[0]] for parts in homes], np.int64)
        folders = {entry.name for entry in list_folder(folder) if os.path.isdir(entry.path)}
        if empty := folders - set(names):
            notes.append(f"no image, and so no class, in {_names(empty)}")
        ambiguous = set()
        for other, first in found.repeated:
            places = inside(first), inside(other)
            if len({place.split(os.sep)[0] for place in places} & folders) == 2:
                ambiguous.add(f"{places[0]} (not {places[1]})")
        if ambiguous:
            notes.append(f"in two classes by links, and counted in one: {_names(ambiguous)}")
    return FileSource(
        found.paths,
        labels,
        names or None,
        os.fspath(folder),
        decode=decode,
        notes=[f"{folder}: {note}" for note in notes if note],
    )


def _names(classes: set[str]) -> str:
    listed = sorted(classes)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more or "none"


def _cifar10(root: Path, download: bool, decode: DecodeConfig) -> Splits:
    original = root / CIFAR10.base_folder
    if not original.is_dir() and (found := _unpacked("cifar10", root, decode)) is not None:
        return found
    read = functools.partial(CIFAR10, os.fspath(root))
    copies = f"{original} or {root / 'cifar10'}"
    try:  # torchvision checks the MD5 of every file
        data = [read(train) for train in (True, False)]
    except RuntimeError as error:
        if not download:
            message = f"cifar10: no complete copy in {copies}, and downloading is off"
            raise InputError(message) from error
        with downloading("cifar10", CIFAR10.url, _RECOGNISED.format(copies)):
            try:
                data = [read(train, download=True) for train in (True, False)]
            except BaseException:  # torchvision leaves what has another checksum
                (root / CIFAR10.filename).unlink(missing_ok=True)
                raise
    parts = []
    for part, name in zip(data, ("cifar10/train", "cifar10/val"), strict=True):
        labels = np.asarray(part.targets, dtype=np.int64)
        parts.append(ArraySource(part.data, labels, part.classes, name))
    return Splits("cifar10", *parts)


def _imagenet_subset(name: str, root: Path, download: bool, decode: DecodeConfig) -> Splits:
    if (found := _unpacked(name, root, decode)) is not None:
        return found
    published = _PUBLISHED[name]
    if not download:
        places = ", ".join(os.fspath(root / folder) for folder in published.folders)
        raise InputError(f"{name}: no copy found (looked for {places}), and downloading is off")
    folder = published.folders[0]
    with downloading(name, published.url, _RECOGNISED.format(root / folder)):
        root.mkdir(parents=True, exist_ok=True)
        # Loaded and unpacked aside and moved at the end: an interruption, or an archive with
        # another checksum, leaves nothing.
        with tempfile.TemporaryDirectory(prefix=f".{folder}-", dir=root) as aside:
            download_and_extract_archive(
                published.url, aside, extract_root=aside, md5=published.md5, remove_finished=True
            )
            os.rename(Path(aside) / folder, root / folder)
    return _imagenet_subset(name, root, False, decode)


def _unpacked(name: str, root: Path, decode: DecodeConfig) -> Splits | None:
    """The first unpacked copy under `root`, if any. Raises InputError if it is incomplete."""
    published = _PUBLISHED[name]
    folder = next((root / each for each in published.folders if (root / each).is_dir()), None)
    if folder is None:
        return None
    splits = _folder(folder, name, decode)
    train, val = len(splits.train), 0 if splits.val is None else len(splits.val)
    if (train, val) != (published.train, published.val):
        raise InputError(
            f"{folder}: holds {train:,} + {val:,} images in train/ + val/, "
            f"{name} has {published.train:,} + {published.val:,}; "
            f"complete it, remove it, or use folder:{folder} to take it as it is"
        )
    return splits
