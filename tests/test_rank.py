"""`vi-simsiam rank`: the order, the picture's two ends, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from inference_cases import DIM, save_images, save_run
from PIL import Image

import vi_simsiam
from vi_simsiam.cli import main
from vi_simsiam.data import contact_sheet
from vi_simsiam.data.contact_sheet import thumbnails
from vi_simsiam.data.files import find_images
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.errors import InputError
from vi_simsiam.inference import rank
from vi_simsiam.inference.embed import Table
from vi_simsiam.inference.rank import draw_ranking, shown, write_ranking

ON_CPU = ["--device", "cpu", "--workers", "1"]


def table(concentration: list[float] | None) -> Table:
    """Images 0, 2, 4, ... of a source whose image i is gray of value 10 i."""
    count = 6 if concentration is None else len(concentration)
    levels = np.broadcast_to(
        (10 * np.arange(2 * count, dtype=np.uint8))[:, None, None], (2 * count, 8, 8)
    )
    kappa = None if concentration is None else np.array(concentration, np.float32)
    return Table(
        ArraySource(levels.copy(), name="gray"),
        2 * np.arange(count),
        np.empty((count, 0), np.float32),
        kappa,
        None if kappa is None else 10 / (kappa + 10),
    )


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


@pytest.mark.parametrize(
    ("k", "low", "high"), [(1, [1], [2]), (2, [1, 4], [2, 0]), (9, [1, 4, 3], [2, 0])]
)
def test_the_picture_shows_both_ends(
    k: int, low: list[int], high: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extreme one first, none twice, the images' own pixels, and kappa/(D - 1) in the captions."""
    drawn: list[tuple[str, list[tuple[Image.Image, str]]]] = []

    def record(groups: list[tuple[str, list[tuple[Image.Image, str]]]]) -> Image.Image:
        drawn.extend(groups)
        return thumbnails(groups)

    monkeypatch.setattr(rank, "thumbnails", record)
    kappa = [5, 0, 7.25, 4, 1.5]
    picture = draw_ranking(table(kappa), 11, k)
    assert [title.split(":")[0] for title, _ in drawn] == ["Least certain", "Most certain"]
    for (_, images), rows in zip(drawn, (low, high), strict=True):
        assert [image.getpixel((0, 0))[0] for image, _ in images] == [20 * row for row in rows]  # type: ignore[index]
        assert [float(caption) for _, caption in images] == [
            pytest.approx(kappa[row] / 10, rel=5e-3) for row in rows
        ]
    first = contact_sheet._MARGIN + 28
    assert picture.getpixel((contact_sheet._MARGIN + 5, first + 5)) == (20 * low[0],) * 3


def test_one_image_has_one_end() -> None:
    picture = draw_ranking(table([3.0]), 11, 4)
    assert picture.height < 200


def test_captions() -> None:
    assert [shown(value) for value in (0.0, 0.00312, 0.4849, 27.21, 12345.6)] == [
        "0",
        "0.00312",
        "0.485",
        "27.2",
        "12,346",
    ]


def test_thumbnails_take_rows_of_eight() -> None:
    image = Image.new("RGB", (300, 200), (255, 0, 0))
    sheet = np.asarray(thumbnails([("nine", [(image, "1")] * 9), ("one", [(image, "κ")])]))
    red = (sheet == (255, 0, 0)).all(-1)
    assert red.sum() == 10 * 112 * 112
    assert red.any(1).sum() == 3 * 112
    assert red.any(0).sum() == 8 * 112


def test_simsiam_cannot_be_ranked(tmp_path: Path) -> None:
    for function in (
        lambda t: write_ranking(t, tmp_path / "r.csv"),
        lambda t: draw_ranking(t, 11, 2),
    ):
        with pytest.raises(InputError, match="SimSiam run predicts no concentration"):
            function(table(None))
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run")
    save_images(tmp_path / "images", 7)
    (tmp_path / "images" / "broken.png").write_bytes(b"nothing")
    out = tmp_path / "out" / "v1.2"
    command = ["rank", str(run), str(tmp_path / "images"), "-k", "2", "--out", str(out), *ON_CPU]
    assert main(command) == 2
    assert f"out: {out.parent} is no folder" in capsys.readouterr().err
    out.parent.mkdir()
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out == f"written: {out}.csv (7 images, 1 skipped)\nwritten: {out}.png\n"
    assert "skipped: " in said.err
    assert sorted(path.name for path in out.parent.iterdir()) == ["v1.2.csv", "v1.2.png"]
    rows = list(csv.DictReader((out.parent / "v1.2.csv").open()))
    encoding = vi_simsiam.load(run, "cpu").encode(
        paths := find_images(tmp_path / "images").paths[:7]
    )
    assert encoding.concentration is not None
    places = [paths.index(row["path"]) for row in rows]
    assert sorted(places) == list(range(7))
    # By the concentrations in the file, which are those of the encoder but for rounding.
    kappas = np.array([float(row["kappa"]) for row in rows])
    assert (np.diff(kappas) >= 0).all()
    np.testing.assert_allclose(kappas, encoding.concentration[places], rtol=1e-4)
    for row, kappa in zip(rows, kappas, strict=True):
        assert float(row["uncertainty"]) == pytest.approx((DIM - 1) / (kappa + DIM - 1), rel=1e-5)
    with Image.open(f"{out}.png") as picture:
        assert picture.format == "PNG"
    assert main(command) == 2
    assert "v1.2.csv exists; say --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0

    (tmp_path / "simsiam").mkdir()
    simsiam = save_run(tmp_path / "simsiam" / "run", "simsiam")
    for arguments, message in (
        (
            [str(simsiam), str(tmp_path / "images"), "--out", str(tmp_path / "new")],
            "is SimSiam, which predicts no",
        ),
        (
            [str(run), str(tmp_path / "images"), "--out", str(tmp_path / "new"), "-k", "0"],
            "k: 0 must be at least 1",
        ),
    ):
        capsys.readouterr()
        assert main(["rank", *arguments, *ON_CPU]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1
        assert message in said.err
    assert not list(tmp_path.glob("new*"))
