"""Training, evaluation, packing and encoding share pixels of a file, and warn in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

import vi_simsiam
from vi_simsiam.cli import main
from vi_simsiam.config import DecodeConfig
from vi_simsiam.data.contact_sheet import contact_sheet
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.sources import DatasetSource, FileSource
from vi_simsiam.data.views import eval_square, eval_view, normalised
from vi_simsiam.errors import ImageWarning, InputError


@pytest.fixture
def icons(tmp_path: Path) -> Path:
    """Eight transparent icons whose hidden pixels are noise, one of them deep and one turned."""
    folder = tmp_path / "icons"
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 20, 4), dtype=np.uint8)
        pixels[..., 3] = 255 * np.tri(16, 20, number, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 12).save(folder / "6.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.arange(320, dtype=np.uint32).reshape(16, 20).astype(np.uint8))
    turned.save(folder / "7.png", exif=exif)
    return folder


RANGE = (
    "values of 1 image range from 0 to 3828 only, and 0 to 65535 become black to white; "
    "train or pack with --value-range 0 3828 to keep them apart"
)


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
    with pytest.warns(ImageWarning, match=RANGE):
        found = encoder.encode(icons).embedding
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    opened = [Image.open(path) for path in direct.paths]
    with pytest.warns(ImageWarning, match=RANGE):
        np.testing.assert_allclose(encoder.encode(opened).embedding, expected, rtol=1e-4, atol=1e-5)

    table = str(tmp_path / "x.parquet")
    assert main(["embed", str(run), str(icons), "--out", table, "--device", "cpu"]) == 0
    assert capfd.readouterr().err.count(f"warning: {icons}: {RANGE}\n") == 1
    with pytest.raises(InputError, match=r"icons\.pack .* background white, .* background red"):
        open_dataset(str(packed), decode=DecodeConfig(background="red"))
    resume = ["--out", str(run), "--resume", "--background", "red"]
    assert main(["train", "--data", str(packed), *resume]) == 2
    assert "holds images decoded with background white" in capfd.readouterr().err


def test_the_sheet_of_views_names_what_is_lost(icons: Path) -> None:
    with pytest.warns(ImageWarning, match=RANGE):
        contact_sheet(open_dataset(str(icons)).train, "none", images=8)


@pytest.mark.parametrize(
    "options",
    [
        "--value-range 0",
        "--value-range dtyp",
        "--value-range 5 1",
        "--background grass",
        "--frames last",
    ],
)
def test_options_that_cannot_be_used(options: str, capfd: pytest.CaptureFixture[str]) -> None:
    name, value, *_ = options.removeprefix("--").split()
    assert main(["views", *options.split()]) == 2
    message = capfd.readouterr().err
    assert name.replace("-", "_") in message.replace("-", "_")
    assert value in message
    assert message.count("\n") == 1


def test_a_strip_is_cut_before_it_is_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    resize = Image.Image.resize

    def note(self: Image.Image, size: tuple[int, int], *options: Any, **more: Any) -> Image.Image:
        sizes.append(max(size))
        return resize(self, size, *options, **more)

    monkeypatch.setattr(Image.Image, "resize", note)
    plain = v2.Compose([*eval_square(32).transforms[1:], v2.PILToTensor(), normalised()])
    noise = np.random.default_rng(0).integers(0, 256, (1, 12_001, 3), dtype=np.uint8)
    for width in (301, 300, 7):
        for pixels in (noise[:, :width], noise[:, :width].transpose(1, 0, 2)):
            image = Image.fromarray(np.ascontiguousarray(pixels))
            np.testing.assert_allclose(eval_view(32)(image), plain(image), atol=0.02)
    square = Image.fromarray(np.ascontiguousarray(noise[0, :12_000].reshape(100, 120, 3)))
    np.testing.assert_array_equal(eval_view(32)(square), plain(square))
    sizes.clear()
    for pixels in (noise, noise.transpose(1, 0, 2)):
        eval_view(32)(Image.fromarray(np.ascontiguousarray(pixels)))
    assert max(sizes) <= 32 * 5


def test_an_image_without_pixels_is_named() -> None:
    with pytest.raises(InputError, match=r"list/0: cannot be read as an image \(0 x 0 pixels\)"):
        DatasetSource([Image.new("RGB", (0, 0))]).image(0)  # type: ignore[arg-type]
