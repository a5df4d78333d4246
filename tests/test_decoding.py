"""Processes that decode give the images in order, hold few of them, and end when they should.

Training, evaluation, packing and encoding share the pixels of a file, and warn in one line.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from packing_cases import Items, stored_files
from PIL import Image
from torchvision.transforms import v2

import vi_simsiam
from vi_simsiam.cli import main
from vi_simsiam.config import DecodeConfig, policy
from vi_simsiam.data import decoding
from vi_simsiam.data.cache import cached, in_memory
from vi_simsiam.data.contact_sheet import contact_sheet
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.decoding import decode
from vi_simsiam.data.items import DatasetSource
from vi_simsiam.data.sources import FileSource, Unreadable
from vi_simsiam.data.views import eval_view, normalised
from vi_simsiam.errors import ImageWarning, InputError, TrainingError


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one image, so that a few images keep several processes busy."""
    monkeypatch.setattr(decoding, "_CHUNK_BYTES", 1)


class Unpicklable(Items):
    def __reduce__(self) -> str:
        raise TypeError("holds an open file")

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        assert multiprocessing.parent_process() is None
        return super().__getitem__(index)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", [Items, Unpicklable])
def test_datasets_are_decoded_in_order(kind: type[Items]) -> None:
    chunks = list(decode(DatasetSource(kind(9), "mine"), workers=3))
    assert [chunk.kept for chunk in chunks] == [[index] for index in range(9)]
    assert [chunk.sizes for chunk in chunks] == [[(2 + index % 3, 3)] for index in range(9)]
    assert [chunk.pixels for chunk in chunks] == [kind(9)[index][0].tobytes() for index in range(9)]


def test_an_image_too_large_for_the_format_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MOST_BYTES", 3 * 3 * 3)
    (chunk,) = decode(DatasetSource(Items(3), "mine"), workers=0)
    assert chunk.kept == [0, 1]
    assert chunk.unreadable == [Unreadable("mine/2", "3 x 4 pixels")]


class Deadly(Items):
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.usefixtures("small_chunks")
def test_failures_of_workers_are_one_line() -> None:
    with pytest.raises(TrainingError, match=r"^mine: a process that decodes images has ended.*$"):
        in_memory(DatasetSource(Deadly(4), "mine"), workers=2)
    with pytest.raises(InputError, match=r"^list/1: str must be a PIL image.*$"):
        in_memory(DatasetSource([Items(1)[0], "text"]), workers=2)
    with pytest.raises(InputError, match="workers: -1 must be at least 0"):
        in_memory(DatasetSource(Items(4)), workers=-1)


class Slow(FileSource):
    def image(self, index: int) -> Image.Image:
        time.sleep(0.1)
        return super().image(index)


def build(source: FileSource, folder: Path, errors: Path) -> None:
    """Fill a cache in a process with a group and standard error of its own."""
    os.setsid()
    sys.stderr = errors.open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    cached(source, cache_dir=folder, workers=2)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_build_ends_all_processes(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "cache"
    source, errors = Slow(stored_files(tmp_path / "set").paths * 100), tmp_path / "errors"
    context = multiprocessing.get_context("fork")
    process = context.Process(target=build, args=(source, folder, errors))
    process.start()
    group, deadline = process.pid, time.monotonic() + 60
    assert group is not None
    while not (folder.is_dir() and any(folder.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # workers are decoding
    unfinished = set(folder.iterdir())
    assert unfinished
    # Ctrl-C reaches all processes of a terminal; a process is killed alone.
    (os.killpg if number == signal.SIGINT else os.kill)(group, number)
    process.join(30)
    while _group_exists(group) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _group_exists(group)
    if number == signal.SIGINT:
        assert errors.read_text().count("Traceback") == 1
        assert errors.read_text().endswith("KeyboardInterrupt\n")
    assert set(folder.iterdir()) == (set() if number == signal.SIGINT else unfinished)


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def icons(tmp_path: Path) -> Path:
    """Transparent icons whose hidden pixels are noise, a deep image and a turned one."""
    folder = tmp_path / "icons"
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 20, 4), dtype=np.uint8)
        pixels[..., 3] = 255 * np.tri(16, 20, number, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    ramp = np.arange(320, dtype=np.uint16).reshape(16, 20)
    Image.fromarray(ramp * 12).save(folder / "6.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ramp.astype(np.uint8)).save(folder / "7.png", exif=exif)
    return folder


RANGE = (
    "values of 1 image range from 0 to 3828 only, and 0 to 65535 become black to white; "
    "train or pack with --value-range 0 3828 to keep them apart"
)


@pytest.mark.usefixtures("small_network")
def test_a_run_and_all_that_follows_it_share_the_rule(
    icons: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VI_SIMSIAM_CACHE", str(tmp_path / "cache"))
    packed, run = tmp_path / "icons.pack", tmp_path / "run"
    small = ["--size", "16", "--epochs", "1", "--dim", "8", "--device", "cpu", "--workers", "0"]
    assert main(["pack", str(icons), "--out", str(packed), "--background", "white"]) == 0
    assert f"warning: {icons}: {RANGE}\n" in capfd.readouterr().err
    assert main(["train", "--data", str(packed), "--out", str(run), *small]) == 0
    assert RANGE in capfd.readouterr().err
    assert json.loads((run / "config.json").read_text())["decode"]["background"] == "white"

    direct = FileSource(sorted(icons.iterdir()), decode=DecodeConfig(background="white"))
    train = open_dataset(str(packed)).train
    for index in range(len(direct)):
        np.testing.assert_array_equal(train.image(index), direct.image(index))

    encoder = vi_simsiam.load(run, "cpu")
    expected = encoder.encode(train).embedding
    for images in (icons, [Image.open(path) for path in direct.paths]):
        with pytest.warns(ImageWarning, match=RANGE):
            found = encoder.encode(images).embedding
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

    with pytest.warns(ImageWarning, match=RANGE):
        contact_sheet(open_dataset(str(icons)).train, policy("none"), images=8)
    resume = ["--out", str(run), "--resume", "--background", "red"]
    assert main(["train", "--data", str(packed), *resume]) == 2
    line = capfd.readouterr().err
    assert re.search(r"icons\.pack holds images .* background white, .* background red", line)


def test_a_strip_is_cut_before_it_is_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    resize = v2.Resize(32, v2.InterpolationMode.BICUBIC)
    plain = v2.Compose([resize, v2.CenterCrop(32), v2.PILToTensor(), normalised()])
    noise = np.random.default_rng(0).integers(0, 256, (1, 12_001, 3), dtype=np.uint8)

    def strips(width: int) -> list[Image.Image]:
        pixels = noise[:, :width]
        return [Image.fromarray(pixels.copy()), Image.fromarray(pixels.reshape(width, 1, 3))]

    for image in (*strips(301), *strips(300), *strips(7)):
        np.testing.assert_allclose(eval_view(32)(image), plain(image), atol=0.02)
    resize = mock.Mock(side_effect=Image.Image.resize)
    monkeypatch.setattr(Image.Image, "resize", lambda *given, **options: resize(*given, **options))
    for image in strips(12_001):
        eval_view(32)(image)
    assert 0 < max(max(call.args[1]) for call in resize.call_args_list) <= 32 * 5
