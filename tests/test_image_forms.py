"""Images in lists, CSV, Parquet and tar files, and in several folders.

Tar archives are written by the library webdataset, Parquet files by pyarrow with the schema
metadata that the library `datasets` writes, tables by the module csv.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from vi_simsiam.cli import main
from vi_simsiam.cli.parsing import with_folders
from vi_simsiam.config import DecodeConfig, TrainConfig
from vi_simsiam.data.cache import cached, in_memory
from vi_simsiam.data.datasets import Splits, open_dataset
from vi_simsiam.data.subsets import select
from vi_simsiam.data_names import data_label, data_spec, joined_spec, located_spec
from vi_simsiam.errors import InputError

COLOURS = [(40 * number, 255 - 40 * number, 7) for number in range(6)]
LABELS = ["cat", "dog", "cat", "dog", "bird", "cat"]
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["dog", "cat", "fox", "bird"], "_type": "ClassLabel"},
}


def png(number: int, size: int = 16) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (size, size), COLOURS[number]).save(content, "PNG")
    return content.getvalue()


def write_files(folder: Path) -> list[str]:
    (folder / "deep").mkdir(parents=True, exist_ok=True)
    names = [f"deep/{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(png(number))
    return names


def write_list(folder: Path) -> str:
    names = write_files(folder)
    (folder / "photos.txt").write_text("\n".join(["", *names, ""]))
    return str(folder / "photos.txt")


def write_csv(folder: Path, name: str = "photos.csv", **columns: list[str]) -> str:
    table = {"path": write_files(folder), "label": LABELS} | columns
    with open(folder / name, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if name.endswith(".tsv") else ",")
        writer.writerows([list(table), *zip(*table.values(), strict=True)])
    return str(folder / name)


def write_parquet(path: Path, numbers: range = range(6), **columns: Any) -> str:
    names = FEATURES["label"]["names"]
    table = {
        "image": pa.array([{"bytes": png(n), "path": f"{n}.png"} for n in numbers]),
        "label": pa.array([names.index(LABELS[n]) for n in numbers]),
    } | columns
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = pa.table({name: each for name, each in table.items() if each is not None})
    pq.write_table(content.replace_schema_metadata(metadata), path, row_group_size=2)
    return str(path)


def write_tar(path: Path, numbers: range = range(6), **more: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as shard:
        for number in numbers:
            label = LABELS[number].encode()
            shard.write({"__key__": f"{number:04}", "png": png(number), "cls": label} | more)
    return str(path)


WRITERS: dict[str, Callable[[Path], str]] = {
    "list": write_list,
    "csv": write_csv,
    "tsv": lambda folder: write_csv(folder, "photos.tsv"),
    "parquet": lambda folder: write_parquet(folder / "photos.parquet"),
    "tar": lambda folder: write_tar(folder / "photos.tar"),
}


def colours(splits: Splits, part: str = "train") -> list[tuple[int, ...]]:
    source = getattr(splits, part)
    return [source.image(index).getpixel((3, 3)) for index in range(len(source))]


def labels(source: Any) -> list[str]:
    return [source.classes[label] for label in source.labels]


def refused(spec: str, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message) as error:
        open_dataset(spec, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", WRITERS)
def test_a_form_gives_the_images_with_their_labels_through_the_cache(
    form: str, tmp_path: Path
) -> None:
    spec = WRITERS[form](tmp_path)
    splits = open_dataset(spec)
    assert splits.val is None
    assert colours(splits) == COLOURS
    assert splits.train.dimensions(0) == (16, 16)
    if form == "list":
        assert splits.train.labels is None
    else:
        assert labels(splits.train) == LABELS
        by_name = ("bird", "cat", "dog")
        assert splits.train.classes == (("dog", "cat", "bird") if form == "parquet" else by_name)
    places = {"parquet": f"{spec}:5", "tar": f"{spec}/0005.png"}
    assert splits.train.describe(5) == places.get(form, str(tmp_path / "deep" / "5.png"))

    packed, unreadable = cached(splits.train, cache_dir=tmp_path / "cache", workers=2)
    assert not unreadable
    assert [packed.image(index).getpixel((3, 3)) for index in range(6)] == COLOURS
    fingerprint = open_dataset(spec).train.fingerprint()
    assert fingerprint == splits.train.fingerprint()
    holder = tmp_path / "deep" / "0.png" if form in ("list", "csv", "tsv") else Path(spec)
    os.utime(holder, (1, 1))
    assert open_dataset(spec).train.fingerprint() != fingerprint

    drawn = select(splits, images=3, held_out=0.34, seed=1)
    assert drawn.val is not None
    seen = colours(drawn) + colours(drawn, "val")
    assert len(set(seen)) == 5
    assert set(seen) <= set(COLOURS)
    again = pickle.loads(pickle.dumps(splits.train))
    assert again.image(4).getpixel((3, 3)) == COLOURS[4]


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_names_of_files_give_the_parts(form: str, tmp_path: Path) -> None:
    write = {"parquet": write_parquet, "tar": write_tar}[form]
    write(tmp_path / f"data/train-00000-of-00002.{form}", range(0, 2))
    write(tmp_path / f"data/train-00001-of-00002.{form}", range(2, 4))
    write(tmp_path / f"data/validation-00000-of-00001.{form}", range(4, 6))
    for place in ("", f"/data/*.{form}", f"/data/{{train,validation}}-0000[0-9]*.{form}"):
        splits = open_dataset(f"{form}:{tmp_path}{place}")
        assert colours(splits) == COLOURS[:4]
        assert colours(splits, "val") == COLOURS[4:]
        assert splits.val is not None
        assert splits.val.classes == splits.train.classes
    only = open_dataset(f"{form}:{tmp_path}/data/train-{{00000..00001}}-of-00002.{form}")
    assert (colours(only), only.val) == (COLOURS[:4], None)
    beyond = f"{form}:{tmp_path}/data/train-{{00000..00003}}-of-00002.{form}"
    refused(beyond, "no such file: .*0002-.*0003-")
    alone = open_dataset(f"{tmp_path}/data/validation-00000-of-00001.{form}")
    assert colours(alone) == COLOURS[4:]
    write(tmp_path / f"data/test-00000-of-00001.{form}", range(4, 6))
    tested = open_dataset(f"{form}:{tmp_path}")
    assert "2 images of the test part left out" in str(tested.train.notes)


def test_a_table_names_its_columns_and_parts(tmp_path: Path) -> None:
    parts = ["train", "train", "Valid", "train", "", "val"]
    spec = write_csv(tmp_path, split=parts, kind=["7", "10", "7", "10", "9", "7"])
    splits = open_dataset(spec)
    assert colours(splits) == [COLOURS[number] for number in (0, 1, 3, 4)]
    assert colours(splits, "val") == [COLOURS[number] for number in (2, 5)]
    named = open_dataset(f"csv:{spec}?path=path&label=kind&split=split")
    assert named.train.classes == ("7", "9", "10")
    assert labels(named.train) == ["7", "10", "10", "9"]
    refused(f"csv:{spec}?path=paht", "no column 'paht'; its columns are path, label, split, kind")
    refused(f"csv:{spec}?paths=path", "paths is not accepted")
    Path(spec).write_text("where,what\na,b\n")
    refused(spec, "has no column path or file .*csv:.*path=COLUMN")
    Path(spec).write_text("path,label\na\n")
    refused(spec, "line 2 has 1 value, the header has 2")
    Path(spec).write_text("path,split\na,elsewhere\n")
    refused(spec, "line 2: 'elsewhere' is no part")
    Path(spec).write_text("path;label\ndeep/0.png;a\ndeep/1.png;\n")
    refused(spec, "1 of 2 train images have no label, such as .*1.png")
    Path(spec).write_text("path\n")
    refused(spec, "names no image")


def test_missing_files_of_a_list_count_as_unreadable_images(tmp_path: Path) -> None:
    spec = write_list(tmp_path)
    Path(spec).write_text("\n".join(["deep/0.png"] * 2 + ["deep/gone.png", "deep/1.png"]))
    source = open_dataset(spec).train
    assert len(source) == 3
    assert "1 further mention of the same image left out" in str(source.notes)
    with pytest.raises(InputError, match=r"1 of 3 images cannot be read.*gone.png \(No such file"):
        in_memory(source, workers=0)


def test_damaged_images_in_files_are_named(tmp_path: Path) -> None:
    images = pa.array([{"bytes": b"no image", "path": "a"}, {"bytes": None, "path": "b"}])
    spec = write_parquet(tmp_path / "a.parquet", range(0, 2), image=images)
    with pytest.raises(InputError, match=r"a.parquet:0 \(not a JPEG.*a.parquet:1 \(the row holds"):
        in_memory(open_dataset(spec).train, workers=0)
    shard = tmp_path / "a.tar"
    with webdataset.TarWriter(str(shard)) as writer:
        writer.write({"__key__": "x", "jpg": b""})
    with pytest.raises(InputError, match=r"a.tar/x.jpg \(an empty file\)"):
        in_memory(open_dataset(str(shard)).train, workers=0)


def test_frames_and_threads(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in COLOURS[:3]]
    content = io.BytesIO()
    frames[0].save(content, "TIFF", save_all=True, append_images=frames[1:])
    animated = pa.array([content.getvalue()] * 4)
    spec = write_parquet(tmp_path / "a.parquet", range(0, 4), image=animated, label=None)
    splits = open_dataset(spec, decode=DecodeConfig(frames="all"))
    assert colours(splits) == COLOURS[:3] * 4
    assert splits.train.describe(4) == f"{spec}:1#1"
    found: list[list[tuple[int, ...]]] = []
    threads = [threading.Thread(target=lambda: found.append(colours(splits))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [COLOURS[:3] * 4] * 4


def test_labels_of_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    unknown = write_parquet(path, label=pa.array([-1] * 6))
    assert open_dataset(unknown).train.labels is None
    text = pa.array([*LABELS[:5], "ant"]).dictionary_encode()
    plain = pa.table({"img": pa.array([png(n) for n in range(6)]), "label": text})
    pq.write_table(plain, path)
    assert labels(open_dataset(str(path)).train) == [*LABELS[:5], "ant"]
    pq.write_table(plain.set_column(1, "label", pa.array([3, 10, 3, 10, 3, 3])), path)
    assert open_dataset(str(path)).train.classes == ("3", "10")
    refused(write_parquet(path, label=pa.array([9] * 6)), "label 9, but names for 4 classes")
    pq.write_table(plain.set_column(1, "label", pa.array([0.5] * 6)), path)
    refused(str(path), "labels of type double in column label")


def test_a_parquet_file_without_images_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), path)
    refused(str(path), "holds no images: no column of bytes among text, label")
    write_parquet(path)
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:40], b"", whole[:-8] + b"\xff\xff\xff\x7fPAR1"):
        path.write_bytes(damaged)
        refused(str(path), "is no Parquet file, or damaged")
    refused(f"parquet:{tmp_path / 'gone.parquet'}", "no such file")
    (tmp_path / "empty").mkdir()
    refused(f"parquet:{tmp_path / 'empty'}", r"holds no \*.parquet file")


def test_a_row_group_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr("vi_simsiam.data.parquet._MOST_BYTES", 100)
    refused(spec, "row group of more than")


def test_a_damaged_or_compressed_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    (tmp_path / "photo.png").write_bytes(png(0))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add(tmp_path / "photo.png", "a.png")
        second = archive.offset
        archive.add(tmp_path / "photo.png", "b.png")
    whole = path.read_bytes()
    path.write_bytes(whole[:second] + b"x" * 512 + whole[second + 512 :])
    refused(str(path), f"no header at byte {second:,}")
    path.write_bytes(whole[: second + 100])
    refused(str(path), f"no header at byte {second:,}")
    path.write_bytes(whole[: second + 520])
    refused(str(path), "it ends within a file")
    path.write_bytes(b"no archive")
    refused(str(path), "is no tar archive, or damaged")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(__file__, "a.png")
    refused(str(path), r"is compressed \(gzip\)")
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "notes.py")
    refused(str(path), "holds no images")


def test_no_member_is_a_path_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(png(0))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in (str(tmp_path / "secret"), "../secret.png"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(link)
    source = open_dataset(str(path)).train
    assert [source.describe(index) for index in range(len(source))] == [f"{path}/../secret.png"]
    with pytest.raises(InputError, match="not a JPEG"):
        source.image(0)


def test_several_folders_have_the_classes_of_all(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for number, place in enumerate(
        (first / "train/cat", first / "train/dog", second / "train/cat", second / "train/ant")
    ):
        place.mkdir(parents=True)
        (place / "x.png").write_bytes(png(number))
    (second / "val/ant").mkdir(parents=True)
    (second / "val/cat").mkdir()
    for name in ("ant", "cat"):
        (second / f"val/{name}/y.png").write_bytes(png(4))
    os.link(first / "train/cat/x.png", second / "train/cat/same.png")
    (second / "train/cat/link.png").symlink_to(first / "train/cat/x.png")
    spec = joined_spec([str(first), str(second)])
    splits = open_dataset(spec)
    assert splits.train.classes == ("ant", "cat", "dog")
    assert sorted(labels(splits.train)) == ["ant", "cat", "cat", "dog"]
    assert splits.val is not None
    assert splits.val.classes == splits.train.classes
    assert labels(splits.val) == ["ant", "cat"]
    bare = tmp_path / "c"
    bare.mkdir()
    (bare / "z.png").write_bytes(png(5))
    refused(joined_spec([str(first), str(bare)]), "a has class folders in train/, .*c has none")
    refused(joined_spec([str(first), str(tmp_path / "gone")]), "gone: no such folder")
    both = open_dataset(joined_spec([str(bare), str(bare)]))
    assert len(both.train) == 1


def test_names_of_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "a.csv", "a.TSV", "a.parquet", "a.tar", "a.pack"):
        Path(name).touch()
    kinds = [data_spec(name) for name in ("a.txt", "a.csv", "a.TSV", "a.parquet", "a.tar")]
    assert kinds == ["list:a.txt", "csv:a.csv", "csv:a.TSV", "parquet:a.parquet", "tar:a.tar"]
    assert data_spec("a.pack") == "pack:a.pack"
    for name in ("a", "b"):
        Path(name).mkdir()
    config = TrainConfig(data=["a", "folder:b"])  # type: ignore[arg-type]
    assert config.data == 'folders:["a", "b"]'
    assert TrainConfig.from_dict(config.to_dict() | {"data": ["a", "b"]}) == config
    located = config.located().data
    assert located == f'folders:["{tmp_path}/a", "{tmp_path}/b"]'
    assert located_spec("tar:x-{0..3}.tar") == f"tar:{tmp_path}/x-{{0..3}}.tar"
    assert data_label(located) == "folders:a+b"
    assert data_label("csv:/home/a.csv?path=b") == "csv:a.csv"
    with pytest.raises(InputError, match=r"a.txt is no folder"):
        joined_spec(["a", "a.txt"])
    refused("folders:[1]", r"must be folders:\[PATH, PATH, ...\]")
    words = ["--epochs", "2", "--data", "a", "b", "--out", "c"]
    assert with_folders(words) == ["--epochs", "2", "--data", config.data, "--out", "c"]
    assert with_folders(["--data", "a", "-x", "--data=b"]) == ["--data", config.data, "-x"]
    assert with_folders(["--data"]) == ["--data"]
    assert with_folders(["--data", "a"]) == ["--data", "a"]


def test_commands_take_several_folders_and_lists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_list(tmp_path)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.png").write_bytes(png(0))
    sheet = str(tmp_path / "views.png")
    folders = [str(tmp_path / name) for name in ("deep", "more")]
    heights = []
    for named in (folders, folders[:1]):
        assert main(["views", "--data", *named, "--out", sheet]) == 0
        with Image.open(sheet) as drawn:
            heights.append(drawn.height)
    assert heights[0] > heights[1]  # seven rows and six
    assert main(["pack", spec, "--out", str(tmp_path / "a.pack"), "--workers", "0"]) == 0
    assert "(6 images" in capsys.readouterr().out
    assert main(["train", "--data", folders[0], spec]) == 2
    assert "photos.txt is no folder" in capsys.readouterr().err
