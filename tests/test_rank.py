"""`vi-simsiam rank`: the order, the picture's two ends, and refused input."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from inference_cases import DIM, ON_CPU, save_images, save_run
from PIL import Image

import vi_simsiam
from vi_simsiam.cli import main
from vi_simsiam.data.contact_sheet import thumbnails
from vi_simsiam.data.files import find_images
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.inference import embed
from vi_simsiam.inference.embed import Table, draw_ranking, write_ranking


def table(concentration: list[float] | None) -> Table:
    """Images 0, 2, 4, ... of a source whose image i is gray of value 10 i."""
    count = 6 if concentration is None else len(concentration)
    levels = (10 * np.arange(2 * count, dtype=np.uint8))[:, None, None]
    images = ArraySource(np.broadcast_to(levels, (2 * count, 8, 8)).copy(), name="gray")
    kappa = None if concentration is None else np.array(concentration, np.float32)
    uncertainty = None if kappa is None else 10 / (kappa + 10)
    nothing = np.empty((count, 0), np.float32)
    return Table(images, 2 * np.arange(count), nothing, kappa, uncertainty)


def test_the_least_certain_comes_first(tmp_path: Path) -> None:
    """Equal ones keep their order."""
    write_ranking(table([5, 0, 7.25, 5]), tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text().splitlines() == [
        "rank,path,kappa,uncertainty",
        "1,gray/2,0,1",
        f"2,gray/0,5,{np.float32(10 / 15):.9g}",
        f"3,gray/6,5,{np.float32(10 / 15):.9g}",
        f"4,gray/4,7.25,{np.float32(10 / 17.25):.9g}",
    ]


def test_the_picture_shows_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extreme one first, the images' own pixels, and kappa/(D - 1) in the captions."""
    drawn: list[tuple[str, list[tuple[Image.Image, str]]]] = []
    monkeypatch.setattr(embed, "thumbnails", drawn.extend)
    draw_ranking(table([50, 0, 123456, 4.849, 0.0312]), 11, 9)
    assert [title.split(":")[0] for title, _ in drawn] == ["Least certain", "Most certain"]
    shown = [[(image.getpixel((0, 0)), text) for image, text in images] for _, images in drawn]
    low = [((20,) * 3, "0"), ((80,) * 3, "0.00312"), ((60,) * 3, "0.485")]
    assert shown == [low, [((40,) * 3, "12,346"), ((0,) * 3, "5")]]


def test_thumbnails_take_rows_of_eight() -> None:
    image = Image.new("RGB", (300, 200), (255, 0, 0))
    sheet = np.asarray(thumbnails([("nine", [(image, "1")] * 9), ("one", [(image, "κ")])]))
    red = (sheet == (255, 0, 0)).all(-1)
    assert red.sum() == 10 * 112 * 112
    assert red.any(1).sum() == 3 * 112
    assert red.any(0).sum() == 8 * 112


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run")
    images = tmp_path / "images"
    save_images(images, 7)
    (images / "broken.png").write_bytes(b"nothing")
    out = tmp_path / "out" / "v1.2"

    def fails(*arguments: object) -> str:
        assert main(["rank", *map(str, arguments), *ON_CPU]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    command = [run, images, "-k", 2, "--out", out]
    assert f"out: {out.parent} is no folder" in fails(*command)
    out.parent.mkdir()
    assert main(["rank", *map(str, command), *ON_CPU]) == 0
    said = capsys.readouterr()
    assert said.out == f"written: {out}.csv (7 images, 1 skipped)\nwritten: {out}.png\n"
    assert "skipped: " in said.err
    assert sorted(path.name for path in out.parent.iterdir()) == ["v1.2.csv", "v1.2.png"]
    rows = list(csv.DictReader((out.parent / "v1.2.csv").open()))
    paths = find_images(images).paths[:7]
    encoding = vi_simsiam.load(run, "cpu").encode(paths)
    assert encoding.concentration is not None
    order = [paths.index(row["path"]) for row in rows]
    assert sorted(order) == list(range(7))
    # By the concentrations in the file, which are those of the encoder but for rounding.
    kappas = np.array([float(row["kappa"]) for row in rows])
    assert (np.diff(kappas) >= 0).all()
    np.testing.assert_allclose(kappas, encoding.concentration[order], rtol=1e-4)
    uncertainties = [float(row["uncertainty"]) for row in rows]
    np.testing.assert_allclose(uncertainties, (DIM - 1) / (kappas + DIM - 1), rtol=1e-5)
    with Image.open(f"{out}.png") as picture:
        assert picture.format == "PNG"
    assert "v1.2.csv exists; say --overwrite" in fails(*command)
    assert main(["rank", *map(str, command), "--overwrite", *ON_CPU]) == 0

    capsys.readouterr()
    new = ["--out", tmp_path / "new"]
    simsiam = save_run(tmp_path / "simsiam" / "run", "simsiam")
    assert "is SimSiam, which predicts no" in fails(simsiam, images, *new)
    assert "k: 0 must be at least 1" in fails(run, images, *new, "-k", 0)
    assert not list(tmp_path.glob("new*"))
