"""Names of files and folders that are not UTF-8, from images to results."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import parquet
from rich.console import Console

import vi_simsiam
from vi_simsiam.cli import main
from vi_simsiam.data.cache import cached
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.packed import open_pack
from vi_simsiam.engine.run import read_config
from vi_simsiam.evaluation.foreign import _free_name
from vi_simsiam.evaluation.style import shown
from vi_simsiam.experiments.seeds import _is_running
from vi_simsiam.export.formats import load_safetensors
from vi_simsiam.paths import printable, utf8_path

CAFE = os.fsdecode(b"caf\xe9")
SMALL = "--dim 16 --projector-hidden 16 --predictor-hidden 16 --epochs 1 --device cpu --workers 0"


def succeed(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def folder(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a run; names of folder, class and files are not UTF-8."""
    folder = tmp_path_factory.mktemp("names") / CAFE
    try:
        shutil.copytree(image_folder, folder / CAFE)
        for part in ("train", "val"):
            (folder / CAFE / part / "dark").rename(folder / CAFE / part / CAFE)
            for path in (folder / CAFE / part / CAFE).iterdir():
                path.rename(path.with_name(f"{path.stem}{CAFE}.png"))
    except OSError:
        pytest.skip("this file system takes no such names: training, results and exports with them")
    succeed("train", "--data", folder / CAFE, "--out", folder / "run", "--quiet", *SMALL.split())
    return folder


def images_of(folder: Path) -> set[bytes]:
    return {os.fsencode(path) for path in (folder / CAFE).rglob("*.png")}


def test_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, pack = folder / "run", folder / f"{CAFE}.pack"
    assert read_config(run).data == f"folder:{folder / CAFE}"
    assert list(run.glob("events.out.tfevents.*"))
    assert (run / "metrics.jsonl").stat().st_size
    succeed("train", "--out", run, "--resume")
    assert "already at its last step" in capsys.readouterr().out
    succeed("pack", folder / CAFE, "--out", pack)
    assert f"written: {printable(str(pack))} (40 images" in capsys.readouterr().out
    packed = open_pack(pack)
    assert packed.classes == ("bright", CAFE)
    assert {os.fsencode(packed.describe(index)) for index in range(40)} <= images_of(folder)
    succeed("train", "--data", f"pack:{pack}", "--out", folder / "again", *SMALL.split())
    succeed("train", "--config", run / "config.json", "--out", folder / "copy", "--quiet")
    assert read_config(folder / "copy").data == read_config(run).data


def test_results_can_be_joined_to_the_files(folder: Path, tmp_path: Path) -> None:
    own, out = (folder / "run", folder / CAFE), tmp_path / f"{CAFE}.parquet"
    succeed("embed", *own, "--out", out, "--neighbours", 1)
    columns = parquet.read_table(io.BytesIO(out.read_bytes())).to_pydict()
    assert set(columns["path_bytes"]) == images_of(folder)
    assert columns["path"] == [printable(os.fsdecode(path)) for path in columns["path_bytes"]]
    assert {path for paths in columns["neighbours"] for path in paths} <= set(columns["path"])
    succeed("rank", *own, "--out", tmp_path / CAFE, "-k", 2)
    with (tmp_path / f"{CAFE}.csv").open(errors="surrogateescape", newline="") as file:
        assert {os.fsencode(row["path"]) for row in csv.DictReader(file)} == images_of(folder)
    names = {b"caf\xe9.parquet", b"caf\xe9.csv", b"caf\xe9.png"}
    assert {os.fsencode(path.name) for path in tmp_path.iterdir()} == names


def test_pages_and_pictures_show_names_escaped(folder: Path) -> None:
    succeed("report", folder / "run")
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "VI-SimSiam on caf\\udce9" in page
    assert (folder / "run" / "kappa.png").is_file()
    assert shown(f"folder:/a/{CAFE}") == _free_name(f"pack:/a/{CAFE}.pack", set()) == "caf\\udce9"
    succeed("views", "--data", folder / CAFE, "--out", folder / f"{CAFE}.png", "--images", 2)


@pytest.mark.parametrize("name", ["two\nlines", "red\x1b[31m"])
def test_a_message_stays_one_line(
    name: str, folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = shutil.copytree(image_folder / "val", tmp_path / "images")
    try:
        (images / f"{name}.png").write_bytes(b"no image")
    except OSError:
        pytest.skip("this file system takes no such names")
    for refused in (
        f"pack {images} --out {tmp_path}/pack",
        f"embed {folder}/run {images} --out {tmp_path}/a.parquet",
    ):
        main(refused.split())
        (line,) = [each for each in capsys.readouterr().err.splitlines() if "images" in each]
        assert f"{repr(name)[1:-1]}.png" in line


def test_exports(folder: Path) -> None:
    """timm reads its folder by a path."""
    for name in ("safetensors", "timm"):
        succeed("export", folder / "run", "--format", name)
    exported = folder / "run" / "export"
    loaded = load_safetensors(exported / "safetensors").state_dict()
    own = vi_simsiam.load(folder / "run", "cpu").model.state_dict()
    assert all((loaded[name] == own[name]).all() for name in loaded)
    card = (exported / "safetensors" / "README.md").read_text(encoding="utf-8")
    assert "caf\\udce9" in card
    assert (exported / "timm" / "model.safetensors").is_file()


def test_lines_that_python_prints(folder: Path, tmp_path: Path) -> None:
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    source, console = open_dataset(str(folder / CAFE)).train, Console(file=printed)
    cached(source, cache_dir=tmp_path, workers=0, console=console)
    printed.seek(0)
    assert "caf\\udce9/train: 40 images" in printed.read()


@pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists(), reason="Linux: a running seed is found by its folder"
)
def test_a_process_is_looked_for_by_its_folder(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "input('started')", str(tmp_path / CAFE)]
    with subprocess.Popen(sleep, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(7) == b"started"
        assert _is_running(process.pid, tmp_path / CAFE)
        assert not _is_running(process.pid, tmp_path / "caf")
        process.communicate(b"\n")


def test_a_link_replaces_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    with utf8_path(tmp_path) as same:
        assert same == tmp_path
    place = tmp_path / CAFE
    place.mkdir()
    with utf8_path(place) as link:
        (link / "x").write_text("")
        assert str(link).isascii()
    assert (place / "x").is_file()
    assert not link.parent.exists()
