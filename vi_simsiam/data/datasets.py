"""Data sets by name: the embedded Fashion-MNIST subset, image folders, packed files, CIFAR-10, ImageNette, ImageWoof."""

from __future__ import annotations

import http.client
import os
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_and_extract_archive

from vi_simsiam.config import NAMED_DATA, data_spec
from vi_simsiam.data.packed import open_pack
from vi_simsiam.data.sources import (
    IMAGE_SUFFIXES,
    ArraySource,
    FileSource,
    ImageSource,
    find_images,
    is_image,
    list_folder,
)
from vi_simsiam.errors import InputError, did_you_mean

ACCEPTED = f"a folder of images, a pack file, or one of {', '.join(NAMED_DATA)}"
"""What `open_dataset` takes, for messages."""

_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

_WORDNET_NAMES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
    "n02086240": "Shih-Tzu",
    "n02087394": "Rhodesian ridgeback",
    "n02088364": "beagle",
    "n02089973": "English foxhound",
    "n02093754": "Border terrier",
    "n02096294": "Australian terrier",
    "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog",
    "n02111889": "Samoyed",
    "n02115641": "dingo",
}
"""Class folders of ImageNette and ImageWoof are named by WordNet number."""

_DOWNLOAD_ERRORS = (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError, zlib.error)


@dataclass(frozen=True)
class Splits:
    """A data set: what is trained on, and what is evaluated on (None if it has no such part)."""

    name: str
    train: ImageSource
    val: ImageSource | None


@dataclass(frozen=True)
class _Published:
    """A published data set of class folders: under which names it is recognised, what it holds, where it comes from."""

    folders: tuple[str, ...]
    train: int
    val: int
    url: str = ""
    md5: str = ""


# The 320-pixel variants: crops of 224 pixels are not enlarged, and decoding costs a fraction of the full size.
# Version 1 archives have another split, which the numbers of images tell apart.
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


def open_dataset(spec: str, *, root: Path = Path("data"), download: bool = True) -> Splits:
    """Open a data set by name.

    - ``fashion-mini``: 8,000 + 2,000 Fashion-MNIST images of 28 pixels, embedded in the package.
    - a folder's path, or ``folder:PATH``: with PATH/train/CLASS/ folders a labelled set, and PATH/val/CLASS/ its validation part; otherwise
      every image under PATH/train, or under PATH if there is no such folder, without labels.
    - a file's path, or ``pack:FILE``: what `vi-simsiam pack` wrote to FILE, and its validation part beside it.
    - ``cifar10``, ``imagenette``, ``imagewoof``: an unpacked copy under `root`, or else a checksummed download to it.
      ImageNette and ImageWoof are version 2 at 320 pixels. A copy of either with fewer images is refused.

    Files are listed, not read; `vi_simsiam.data.cache.cached` finds damaged ones. Raises InputError for another name, a
    folder that does not hold what is described, or a download that is not allowed or fails.
    """
    root = Path(root).expanduser()
    if spec.lower().endswith(IMAGE_SUFFIXES) and Path(spec).expanduser().is_file():
        raise InputError(f"data: {spec} is an image; give the folder that it lies in")
    spec = data_spec(spec)
    if spec == "fashion-mini":
        return _fashion_mini()
    if spec.startswith("folder:") and spec != "folder:":
        return _folder(Path(spec.removeprefix("folder:")).expanduser(), spec)
    if spec.startswith("pack:") and spec != "pack:":
        path = Path(spec.removeprefix("pack:")).expanduser()
        val = validation_pack(path)
        return Splits(spec, open_pack(path), open_pack(val) if val.exists() else None)
    if spec == "cifar10":
        return _cifar10(root, download)
    if spec in _PUBLISHED:
        return _imagenet_subset(spec, root, download)
    raise InputError(f"data: {spec!r} is not there; it must be {ACCEPTED}{did_you_mean(spec, NAMED_DATA)}")


def validation_pack(path: Path) -> Path:
    """Where the validation part of a packed data set lies: mine.val.pack beside mine.pack."""
    return path.with_name(f"{path.stem}.val{path.suffix}")


def _fashion_mini() -> Splits:
    asset = resources.files("vi_simsiam") / "assets" / "fashion_mini.npz"
    with asset.open("rb") as stream, np.load(stream) as arrays:
        train, val = (
            ArraySource(
                arrays[f"{split}_images"],
                arrays[f"{split}_labels"].astype(np.int64),
                _FASHION_CLASSES,
                f"fashion-mini/{split}",
            )
            for split in ("train", "val")
        )
    return Splits("fashion-mini", train, val)


def _folder(path: Path, spec: str) -> Splits:
    if not path.exists():
        raise InputError(f"{path}: no such folder; folder:PATH needs a folder of images")
    if not path.is_dir():
        raise InputError(f"{path}: is not a folder; folder:PATH needs a folder of images")
    train_folder, val_folder = path / "train", path / "val"
    if not train_folder.is_dir():
        return Splits(spec, _unlabelled(path), None)
    train = _class_folders(train_folder)
    if train is None:
        return Splits(spec, _unlabelled(train_folder), None)
    val = _class_folders(val_folder) if val_folder.is_dir() else None
    if val_folder.is_dir() and val is None:
        raise InputError(f"{val_folder}: holds no class folders, {train_folder} does; give it the same ones or none")
    if val is not None and val.keys() != train.keys():
        raise InputError(
            f"{path}: classes of train/ and val/ must agree; only in train/: {_names(train.keys() - val.keys())}; "
            f"only in val/: {_names(val.keys() - train.keys())}"
        )
    return Splits(spec, _labelled(train, train_folder), None if val is None else _labelled(val, val_folder))


def _class_folders(folder: Path) -> dict[str, list[str]] | None:
    """Return the image paths of every class folder that has any; None if there is no such folder.

    Raises InputError if the folder holds images of its own besides.
    """
    entries = list_folder(folder)
    classes = {entry.name: find_images(entry.path) for entry in entries if entry.is_dir()}
    classes = {name: paths for name, paths in classes.items() if paths}
    if classes and any(is_image(entry) for entry in entries):
        raise InputError(
            f"{folder}: holds both images and class folders; move the images into class folders, or use "
            f"folder:{folder} to train on all of them without labels"
        )
    return classes or None


def _labelled(classes: dict[str, list[str]], folder: Path) -> FileSource:
    paths = [path for members in classes.values() for path in members]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(members) for members in classes.values()])
    return FileSource(paths, labels, [_WORDNET_NAMES.get(name, name) for name in classes], os.fspath(folder))


def _unlabelled(folder: Path) -> FileSource:
    paths = find_images(folder)
    if not paths:
        raise InputError(f"{folder}: holds no image; accepted are files ending in {', '.join(IMAGE_SUFFIXES)}")
    return FileSource(paths, name=os.fspath(folder))


def _names(classes: set[str]) -> str:
    listed = sorted(classes)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "") or "none"


def _cifar10(root: Path, download: bool) -> Splits:
    original = root / CIFAR10.base_folder
    if not original.is_dir() and (found := _unpacked("cifar10", root)) is not None:
        return found
    # torchvision checks every file of an unpacked copy against its MD5 and downloads only if one fails.
    try:
        parts = [CIFAR10(os.fspath(root), train=train, download=download) for train in (True, False)]
    except _DOWNLOAD_ERRORS as error:
        folders = f"{original} or {root / 'cifar10'}"
        if not download:
            raise InputError(f"cifar10: no complete copy in {folders}, and downloading is off") from error
        raise _download_failed("cifar10", CIFAR10.url, error, folders) from error
    train, val = (
        ArraySource(part.data, np.asarray(part.targets, dtype=np.int64), part.classes, f"cifar10/{split}")
        for part, split in zip(parts, ("train", "val"), strict=True)
    )
    return Splits("cifar10", train, val)


def _imagenet_subset(name: str, root: Path, download: bool) -> Splits:
    if (found := _unpacked(name, root)) is not None:
        return found
    published = _PUBLISHED[name]
    if not download:
        places = ", ".join(os.fspath(root / folder) for folder in published.folders)
        raise InputError(f"{name}: no copy found (looked for {places}), and downloading is off")
    folder = published.folders[0]
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Unpacked aside and moved at the end, so that an interrupted run leaves nothing that looks complete.
        with tempfile.TemporaryDirectory(prefix=f".{folder}-", dir=root) as aside:
            download_and_extract_archive(
                published.url, os.fspath(root), extract_root=aside, md5=published.md5, remove_finished=True
            )
            os.rename(Path(aside) / folder, root / folder)
    except _DOWNLOAD_ERRORS as error:
        raise _download_failed(name, published.url, error, os.fspath(root / folder)) from error
    return _complete(name, root / folder)


def _unpacked(name: str, root: Path) -> Splits | None:
    """Return the first unpacked copy under `root`, None without any. Raises InputError if it is not complete."""
    folders = (root / folder for folder in _PUBLISHED[name].folders)
    return next((_complete(name, folder) for folder in folders if folder.is_dir()), None)


def _complete(name: str, folder: Path) -> Splits:
    published = _PUBLISHED[name]
    splits = _folder(folder, name)
    train, val = len(splits.train), 0 if splits.val is None else len(splits.val)
    if (train, val) != (published.train, published.val):
        raise InputError(
            f"{folder}: holds {train:,} + {val:,} images in train/ + val/, {name} has {published.train:,} + "
            f"{published.val:,}; complete it, remove it, or use folder:{folder} to take it as it is"
        )
    return splits


def _download_failed(name: str, url: str, error: Exception, folders: str) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(
        f"{name}: {url} could not be downloaded ({reason}); an unpacked copy is recognised as {folders}, "
        "and folder:PATH takes any other"
    )
