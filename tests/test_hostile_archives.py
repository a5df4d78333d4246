"""Archives, tables and settings that were made to do harm, or that name files of others."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_image_forms import png, refused, write_tar

from vi_simsiam.config import DecodeConfig
from vi_simsiam.data.channels import file_size, read_file
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.errors import InputError
from vi_simsiam.settings import read_settings

GRAY = DecodeConfig(channels=1, bits=16)


def test_a_tar_file_cannot_lead_back(tmp_path: Path) -> None:
    """A size below 0 would place the next header before this one."""
    path = tmp_path / "a.tar"
    write_tar(path)
    content = bytearray(path.read_bytes())
    header = content[:512]
    header[124:136] = (-512).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert tarfile.TarInfo.frombuf(bytes(header), "utf-8", "strict").size == -512
    path.write_bytes(bytes(header) + content[512:])
    refused(str(path), "a.tar is no tar archive, or damaged")


def test_an_image_of_many_rows_is_kept_once(tmp_path: Path) -> None:
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (180, 180, 3), np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    file = content.getvalue()
    assert len(file) > 90_000
    images = pa.array([{"bytes": file}] * 300)
    rows = [file] * 300
    kinds = (pa.binary(), pa.large_binary(), pa.binary_view())
    for number, column in enumerate((images, *(pa.array(rows, kind) for kind in kinds))):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"image": column}), path)
        before = pa.total_allocated_bytes()
        source = open_dataset(str(path)).train
        assert source.image(299).tobytes() == source.image(0).tobytes()
        assert pa.total_allocated_bytes() - before < 5_000_000


def test_labels_of_a_table_may_be_unknown(tmp_path: Path) -> None:
    path, images = tmp_path / "a.parquet", pa.array([png(0)] * 3)
    pq.write_table(pa.table({"image": images, "label": pa.nulls(3)}), path)
    assert open_dataset(str(path)).train.labels is None
    pq.write_table(pa.table({"image": images, "label": [0.5, 1.0, 2.0]}), path)
    refused(str(path), "has labels of type double in column label; accepted are integers and text")


def test_a_microscopes_file_is_read_by_itself(tmp_path: Path) -> None:
    """Its metadata say that the planes of the series are in two files."""
    tifffile = pytest.importorskip("tifffile")
    planes = "".join(
        f'<TiffData FirstT="{k}" IFD="0" PlaneCount="1"><UUID FileName="t{k}.ome.tif">urn:uuid:{k}'
        "0000000-1111-1111-1111-111111111111</UUID></TiffData>"
        for k in range(2)
    )
    for k in range(2):
        text = (
            '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:{k}0000000-1111-1111-1111-111111111111"><Image ID="Image:0"><Pixels '
            'ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="8" SizeY="8" SizeZ="1" '
            f'SizeC="1" SizeT="2">{planes}</Pixels></Image></OME>'
        )
        pixels = np.full((8, 8), 100 + k, np.uint16)
        tifffile.imwrite(tmp_path / f"t{k}.ome.tif", pixels, description=text, metadata=None)
    for k in range(2):
        found = read_file(str(tmp_path / f"t{k}.ome.tif"), GRAY)
        assert (found.shape, found.min(), found.max()) == ((8, 8, 1), 100 + k, 100 + k)


def test_sizes_of_an_array_are_above_zero(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.ones((2, 3), np.uint8))
    path.write_bytes(path.read_bytes().replace(b"(2, 3), ", b"(-2, -3)"))
    with pytest.raises(ValueError, match=r"shape \(-2, -3\) in 6 bytes"):
        file_size(str(path))


def test_gray_of_sixteen_bits_comes_in_portable_graymaps_too(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 4 3 65535\n" + values.astype(">u2").tobytes())
    assert np.array_equal(read_file(str(path), GRAY)[..., 0], values)


def test_settings_that_double_with_every_line_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 {lr: 1}"] + [
        f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 41)
    ]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"mine\.yaml cannot be read \(line 2: .*merge"):
        read_settings(path)
