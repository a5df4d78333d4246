"""Images as they come: turned TIFFs, arrays in archives, names of samples, and few levels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image, ImageOps
from test_channels import FIVE, GRAY, deep
from test_image_forms import COLOURS, LABELS, colours, labels, png, refused, write_tar

from vi_simsiam.config import DecodeConfig
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.channels import file_size, read_file
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.listing import matching
from vi_simsiam.data.sources import FileSource
from vi_simsiam.data_names import joined_spec
from vi_simsiam.errors import InputError


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_files_are_turned_upright_as_pillow_turns_them(
    tmp_path: Path, orientation: int
) -> None:
    tifffile = pytest.importorskip("tifffile")
    stored, path = deep(1, 5)[0], str(tmp_path / "a.tif")
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(path, stored, photometric="minisblack", extratags=tags, planarconfig="contig")
    flat = Image.fromarray((stored[..., 0] >> 4).astype(np.uint8))
    flat.getexif()[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(flat))
    found = read_file(path, FIVE)
    assert np.array_equal(found[..., 0] >> 4, expected)
    assert found.shape[2] == 5
    assert file_size(path) == expected.shape
    planes = np.moveaxis(stored, -1, 0)
    tifffile.imwrite(
        path, planes, photometric="minisblack", extratags=tags, planarconfig="separate"
    )
    assert np.array_equal(read_file(path, FIVE), found)


def npy(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, image)
    return content.getvalue()


def test_arrays_in_archives_tables_and_several_folders(tmp_path: Path) -> None:
    images = deep(4, 5)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as shard:
        for number, image in enumerate(images):
            shard.write({"__key__": f"{number}", "npy": npy(image), "cls": b"cat"})
    table = pa.table({"image": pa.array([npy(image) for image in images])})
    pq.write_table(table, tmp_path / "a.parquet")
    for name, part in (("x", images[:2]), ("y", images[2:])):
        (tmp_path / name).mkdir()
        for number, image in enumerate(part):
            np.save(tmp_path / name / f"{number}.npy", image)
    folders = joined_spec([str(tmp_path / "x"), str(tmp_path / "y")])
    for spec in (str(tmp_path / "a.tar"), str(tmp_path / "a.parquet"), folders):
        source = open_dataset(spec, decode=FIVE).train
        assert source.dimensions(0) == (20, 24)
        packed = in_memory(source, workers=0)
        assert [np.array_equal(packed.array(n), images[n]) for n in range(4)] == [True] * 4
    refused(str(tmp_path / "a.tar"), "holds no images")  # RGB takes none from arrays
    damaged = pa.table({"image": pa.array([npy(images[0])[:-2]])})
    pq.write_table(damaged, tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b.parquet:0 \(shape \(20, 24, 5\) in 4,798 bytes\)"):
        in_memory(open_dataset(str(tmp_path / "b.parquet"), decode=FIVE).train, workers=0)


def test_the_image_of_a_sample_has_one_dot_in_its_name(tmp_path: Path) -> None:
    """A mask before the image is not taken for it, and what is left out is counted and named."""
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as shard:
        for number, name in enumerate(LABELS):
            parts = {"a.mask.png": png(0), "PNG": png(number), "Cls": name.encode()}
            shard.write({"__key__": f"{number:04}"} | parts)
    source = open_dataset(str(path)).train
    assert [source.image(index).getpixel((3, 3)) for index in range(6)] == COLOURS
    assert labels(source) == LABELS
    (note,) = source.notes
    assert "6 images such as 0000.a.mask.png left out: as in WebDataset" in note
    assert "'a.mask.png' is no suffix of images" in note

    twice = open_dataset(write_tar(tmp_path / "b.tar", jpg=png(0))).train
    assert "6 further images of the same samples left out" in str(twice.notes)

    with webdataset.TarWriter(str(path)) as shard:
        for number in range(3):
            shard.write({"__key__": "photo", f"{number}.png": png(number)})
    refused(str(path), "holds no images; 3 images such as photo.0.png left out: as in WebDataset")


def test_labels_are_those_of_the_part_cls(tmp_path: Path) -> None:
    """WebDataset decodes .json, and gives none of its fields a meaning."""
    spec = write_tar(tmp_path / "a.tar", json=b'{"label": 3}', txt=b"a cat")
    source = open_dataset(spec).train
    assert (labels(source), source.notes) == (LABELS, ())


@pytest.mark.parametrize("pattern", ["{2..0}", "{0..2}", "{09..11}", "{8..011}", "{11..09}"])
def test_braces_count_as_those_of_webdataset(tmp_path: Path, pattern: str) -> None:
    names = webdataset.shardlists.expand_urls(f"{tmp_path}/{pattern}.tar")
    for name in names:
        Path(name).touch()
    assert matching(f"{tmp_path}/{pattern}.tar", ".tar") == names
    assert len(names) in (3, 4)


def test_parts_named_downwards_are_read_in_that_order(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", range(number, number + 1))
    assert colours(open_dataset(f"tar:{tmp_path}/{{2..0}}.tar")) == COLOURS[2::-1]


def test_sixteen_bits_that_become_few_levels_are_named(tmp_path: Path) -> None:
    for number, image in enumerate(deep(3, 1)):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{number}.png")
    narrow = DecodeConfig(channels=1)
    (note,) = in_memory(open_dataset(str(tmp_path), decode=narrow).train, workers=0).notes
    assert "become 16 levels of 8 bits; --bits 16 keeps them apart" in note
    assert not in_memory(open_dataset(str(tmp_path), decode=GRAY).train, workers=0).notes
    full = np.linspace(0, 65535, 480).astype(np.uint16).reshape(20, 24)
    flat = np.full((20, 24), 9, np.uint8)  # as dark, but of 8 bits
    for image in (full, flat):
        Image.fromarray(image).save(tmp_path / "one.png")
        source = FileSource([tmp_path / "one.png"], decode=narrow)
        assert not in_memory(source, workers=0).notes
