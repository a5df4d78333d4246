"""Figures of a run: the metrics read, the images selected, and the curves drawn."""

from __future__ import annotations

import functools
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from evaluation_cases import SIZE, gray_source, make_run
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry
from PIL import Image

from vi_simsiam.data.sources import ArraySource
from vi_simsiam.data.views import eval_view
from vi_simsiam.errors import ImageWarning, InputError
from vi_simsiam.evaluation import figures, style
from vi_simsiam.evaluation.figures import (
    concentrations,
    draw_curves,
    draw_kappa,
    moving_average,
    read_metrics,
)
from vi_simsiam.inference.rank import extremes


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that would be saved, in order; none is rendered."""
    saved: list[Figure] = []

    def record(figure: Figure, path: Path, colours: int | None = None) -> Path:
        saved.append(figure)
        return path

    monkeypatch.setattr(figures, "save", record)
    return saved


def test_figures_are_small_files_of_one_size(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 30, 3), dtype=np.uint8)
    photographs = [Image.fromarray(each).resize((128, 96), 3) for each in noise]
    run = make_run(tmp_path, val=ArraySource(np.stack([*map(np.asarray, photographs)])), lines=400)
    before = dict(matplotlib.rcParams)
    paths = [draw_curves(tmp_path), draw_kappa(run)]
    assert dict(matplotlib.rcParams) == before
    assert paths == [tmp_path / "curves.png", tmp_path / "kappa.png"]
    for path in paths:
        assert path is not None
        assert Image.open(path).size == (1600, 680)
        assert path.stat().st_size < 300_000


def test_metrics_are_read_as_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": -1.5}\n{"step": 20, "loss": NaN, "kappa": 3}\n')
    columns = read_metrics(path)
    assert list(columns) == ["step", "loss", "kappa"]
    np.testing.assert_array_equal(columns["loss"], [-1.5, np.nan])
    np.testing.assert_array_equal(columns["kappa"], [np.nan, 3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no metrics.jsonl"),
        ("", "is empty"),
        ('{"step": 1}\n{"step": 2, "lo', "line 2 cannot be read"),
        ('{"step": "one"}\n', "line 1 cannot be read"),
        ("[1, 2]\n", "line 1 cannot be read"),
    ],
)
def test_damaged_metrics_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_metrics(path)
    with pytest.raises(InputError, match="holds no run"):
        draw_curves(tmp_path)


def test_moving_average_keeps_short_series_and_straight_lines() -> None:
    short = np.random.default_rng(0).normal(size=99)
    np.testing.assert_allclose(moving_average(short), short)
    line = np.arange(500.0)
    np.testing.assert_allclose(moving_average(line)[5:-5], line[5:-5])
    np.testing.assert_allclose(moving_average(np.full(500, 3.0)), 3)
    spike = np.zeros(500)
    spike[250] = 11
    np.testing.assert_allclose(moving_average(spike)[244:257], [0] + [1] * 11 + [0], atol=1e-12)


def test_concentrations_are_the_models_in_image_order(tmp_path: Path) -> None:
    source = gray_source(9)
    run = make_run(tmp_path)
    images = torch.stack([eval_view(SIZE)(source.image(i)) for i in range(9)])
    with torch.no_grad():
        expected = run.model.distribution(images).concentration / 7
    found = concentrations(run, source)
    assert len(set(found)) == 9
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with torch.no_grad():
        run.model.predictor[-1].bias.fill_(torch.nan)
    with pytest.raises(InputError, match="concentrations that are not finite"):
        draw_kappa(run)
    assert not (tmp_path / "kappa.png").exists()


@pytest.mark.parametrize("lines", [1, 400])
def test_curves_show_the_metrics(tmp_path: Path, drawn: list[Figure], lines: int) -> None:
    run = make_run(tmp_path, lines=lines)
    draw_curves(run.path)
    panels = {title: axes for axes in drawn[0].axes if (title := axes.get_title(loc="left"))}
    logged = read_metrics(tmp_path / "metrics.jsonl")
    loss = panels["loss (0 = no better than chance)"]
    np.testing.assert_allclose(loss.lines[0].get_ydata(), logged["loss"])
    concentration = panels["concentration κ / (D − 1)"]
    np.testing.assert_allclose(concentration.lines[0].get_ydata(), logged["kappa"])
    best = {line.get_label(): line.get_ydata() for line in concentration.lines}
    expected = moving_average(logged["kappa_best"])
    np.testing.assert_allclose(best["best for the cosines"], expected)
    assert len(panels) == 6

    draw_curves(make_run(tmp_path / "simsiam", method="simsiam").path)
    titles = [axes.get_title(loc="left") for axes in drawn[1].axes]
    assert len(titles) == 6
    assert "learning rate" in titles
    assert not any("concentration" in title for title in titles)


def thumbnails(figure: Figure) -> list[tuple[str, np.ndarray]]:
    """Caption and pixels of every thumbnail, in order."""
    return [
        (axes.get_title(), np.asarray(axes.images[0].get_array()))
        for part in figure.subfigs
        for axes in part.axes
        if axes.images
    ]


def test_kappa_shows_the_images_at_both_ends(tmp_path: Path, drawn: list[Figure]) -> None:
    val = gray_source(40)
    run = make_run(tmp_path, val=val)
    draw_kappa(run)
    values = concentrations(run, val)
    low, high = extremes(values, 8)
    shown = thumbnails(drawn[0])
    assert len(shown) == 16
    for (caption, pixels), index in zip(shown, [*low, *high], strict=True):
        assert float(caption) == pytest.approx(values[index], abs=np.ptp(values) / 100)
        assert (pixels == val.images[index, 0, 0, 0]).all()
    histogram = drawn[0].subfigs[0].axes[0]
    assert sum(bar.get_height() for bar in histogram.patches) == 40
    assert len({caption for caption, _ in shown}) > 8


@pytest.mark.parametrize("val", [None, ArraySource(np.zeros((0, 8, 8), np.uint8))])
def test_kappa_falls_back_to_the_training_images(
    tmp_path: Path, drawn: list[Figure], val: ArraySource | None
) -> None:
    """With five images of one certainty."""
    same = ArraySource(np.full((5, 8, 8), 9, np.uint8))
    draw_kappa(make_run(tmp_path, train=same, val=val))
    assert "5 training images" in drawn[0].get_suptitle()
    assert len(thumbnails(drawn[0])) == 5
    assert sum(bar.get_height() for bar in drawn[0].subfigs[0].axes[0].patches) == 5


def test_simsiam_has_no_kappa(tmp_path: Path) -> None:
    run = make_run(tmp_path, method="simsiam")
    assert draw_kappa(run) is None
    assert not (tmp_path / "kappa.png").exists()
    with pytest.raises(InputError, match="SimSiam predicts no concentration"):
        concentrations(run, run.splits.train)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("there", [True, False])
def test_characters_without_a_glyph_get_another_font_or_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """matplotlib would warn of each, and draw boxes."""
    others = [FontEntry(fname="/fonts/cjk.ttf", name="CJK")] if there else []
    own, missing = style._characters, {ord("猫"), ord("Ạ")}

    def characters(file: str) -> set[int]:
        return missing if "cjk" in file else own(file) - missing

    monkeypatch.setattr(style.fontManager, "ttflist", [*style.fontManager.ttflist, *others])
    monkeypatch.setattr(style, "_characters", characters)
    monkeypatch.setattr(style, "_font_with", functools.cache(style._font_with.__wrapped__))
    drawn = [style.figure(f"data {name}") for name in ("猫Ạ", "猫Ạ", "cats")]
    titles = [each._suptitle for each in drawn]
    if there:
        for each in drawn:
            style._spell(each)
        assert [title.get_text() for title in titles] == ["data 猫Ạ", "data 猫Ạ", "data cats"]
        assert [title.get_fontfamily()[1:] for title in titles] == [["CJK"], ["CJK"], []]
        return
    with pytest.warns(ImageWarning, match="no font here has all characters of the names") as said:
        list(map(style._spell, drawn))
    for number, each in enumerate(drawn):
        style.save(each, tmp_path / f"{number}.png")
    assert len(said) == 1
    assert [title.get_text() for title in titles] == ["data \\u732bA", "data \\u732bA", "data cats"]
