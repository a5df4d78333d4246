"""Make vi_simsiam/assets/fashion_mini.npz from the official Fashion-MNIST files.

    python scripts/make_fashion_mini.py FOLDER

FOLDER holds the four official idx files, gzipped. The first 800 images of each class of the
training file and the first 200 of each class of the test file are kept, in file order. The SHA-256
is that of the unpacked files, so a copy that was compressed again is accepted and a changed one is
not. The archive has no dates: the same zlib gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# SHA-256 of the unpacked files; the MD5 sums of torchvision.datasets.FashionMNIST also cover the
# dates in the gzip headers.
CONTENTS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SPLITS = {"train": ("train", 800), "val": ("t10k", 200)}
OUTPUT = Path(__file__).resolve().parent.parent / "vi_simsiam" / "assets" / "fashion_mini.npz"


def read_idx(path: Path, sha256: str) -> NDArray[np.uint8]:
    """Return the array in a gzipped idx file of unsigned bytes.

    Raises:
        ValueError: the content is not the official one.
    """
    content = gzip.decompress(path.read_bytes())
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path}: SHA-256 of the unpacked content is {found}, the official file has {sha256}"
        )
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", count=dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape.tolist())


def first_of_each_class(labels: NDArray[np.uint8], count: int) -> NDArray[np.intp]:
    """Return the sorted positions of the first `count` samples of every class."""
    positions = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(positions))


def write_npz(path: Path, arrays: dict[str, NDArray[np.uint8]]) -> None:
    """Write arrays for numpy.load, with a fixed date in place of the current one."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, member.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def main() -> None:
    """Read the files of the folder given on the command line and write the archive."""
    about = "Make the embedded data set from the official Fashion-MNIST files."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("folder", type=Path, help="folder with the four official files, gzipped")
    help_output = "file to write (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=OUTPUT, help=help_output)
    arguments = parser.parse_args()
    arrays = {}
    for split, (prefix, count) in SPLITS.items():
        names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        files = (arguments.folder / f"{name}.gz" for name in names)
        images, labels = (read_idx(file, CONTENTS[file.stem]) for file in files)
        chosen = first_of_each_class(labels, count)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[chosen], labels[chosen]
    write_npz(arguments.output, arrays)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
