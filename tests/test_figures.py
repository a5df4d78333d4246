"""Figures: the metrics read, the images selected, and the numbers of uncertainty.json drawn."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from evaluation_cases import SIZE, gray_source, make_run, skip_rendering, uncertainty_result
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry
from PIL import Image

from vi_simsiam.data.sources import ArraySource
from vi_simsiam.data.views import eval_view
from vi_simsiam.distributions import HypersphericalUniform
from vi_simsiam.errors import ImageWarning, InputError
from vi_simsiam.evaluation import figures, style, uncertainty_figures
from vi_simsiam.evaluation.corruptions import MAGNITUDES
from vi_simsiam.evaluation.figures import (
    CONCENTRATIONS,
    COSINES,
    certainty,
    draw_curves,
    draw_density,
    draw_kappa,
    moving_average,
    read_metrics,
    surprise,
)
from vi_simsiam.evaluation.scores import DESCRIPTIONS
from vi_simsiam.evaluation.style import STYLE
from vi_simsiam.evaluation.uncertainty_figures import draw_uncertainty
from vi_simsiam.inference.ranking import extremes


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that would be saved, in order; none is rendered."""
    saved: list[Figure] = []

    def record(figure: Figure, path: Path, colours: int | None = None) -> Path:
        saved.append(figure)
        return path

    monkeypatch.setattr(figures, "save", record)
    return saved


def test_figures_are_small_files_of_one_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 30, 3), dtype=np.uint8)
    photographs = [Image.fromarray(each).resize((128, 96), 3) for each in noise]
    run = make_run(tmp_path, val=ArraySource(np.stack([*map(np.asarray, photographs)])), lines=400)
    before = dict(matplotlib.rcParams)
    assert draw_kappa(run) == [tmp_path / "kappa.png"]
    assert Image.open(tmp_path / "kappa.png").size == (1600, 680)
    assert (tmp_path / "kappa.png").stat().st_size < 300_000
    monkeypatch.setattr(style, "_DPI", 40)
    paths = [*draw_curves(tmp_path), *draw_density(tmp_path)]
    assert paths == [tmp_path / "curves.png", tmp_path / "density.png"]
    assert [Image.open(path).size for path in paths] == [(320, 136)] * 2
    assert dict(matplotlib.rcParams) == before


def test_metrics_are_read_as_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ('{"step": 10, "loss": -1.5}', '{"step": 20, "loss": NaN, "kappa": 3, "state": "dead"}')
    path.write_text("\n".join(lines))
    columns = read_metrics(tmp_path)
    assert list(columns) == ["step", "loss", "kappa"]
    np.testing.assert_array_equal(columns["loss"], [-1.5, np.nan])
    np.testing.assert_array_equal(columns["kappa"], [np.nan, 3])


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
    run = make_run(tmp_path, val=source)
    images = torch.stack([eval_view(SIZE)(source.image(i)) for i in range(9)])
    with torch.no_grad():
        expected = run.model.distribution(images).concentration / 7
    found = certainty(run)
    assert found is not None
    assert len(set(found.values)) == 9
    np.testing.assert_allclose(found.values, expected, rtol=1e-5)
    with torch.no_grad():
        run.model.predictor[-1].bias.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite; the model's weights are damaged"):
        draw_kappa(run)
    assert not (tmp_path / "kappa.png").exists()


@pytest.mark.parametrize("lines", [1, 400])
def test_curves_show_the_metrics(tmp_path: Path, drawn: list[Figure], lines: int) -> None:
    run = make_run(tmp_path, lines=lines)
    draw_curves(run.path)
    panels = {title: axes for axes in drawn[0].axes if (title := axes.get_title(loc="left"))}
    logged = read_metrics(tmp_path)
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
    found = certainty(run)
    assert found is not None
    values = found.values
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
    for place, each in enumerate(drawn):
        style.save(each, tmp_path / f"{place}.png")
    assert len(said) == 1
    assert [title.get_text() for title in titles] == ["data \\u732bA", "data \\u732bA", "data cats"]


def written(folder: Path, result: dict[str, Any]) -> Path:
    (folder / "uncertainty.json").write_text(json.dumps(result))
    return folder


def panels(draw: Callable[[dict[str, Any]], Figure], result: dict[str, Any]) -> list[Axes]:
    with matplotlib.rc_context(STYLE):
        return draw(result).axes


def curves(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (np.ravel(line.get_xdata()).tolist(), list(line.get_ydata()))
        for line in axes.lines
    }


def points(axes: Axes) -> list[float]:
    """Values of the dots of a dot plot, from the top row down."""
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    dots.sort(key=lambda line: np.ravel(line.get_ydata())[0])
    return [float(np.ravel(line.get_xdata())[0]) for line in dots]


def test_every_part_that_is_there_has_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(style, "_DPI", 40)
    assert draw_uncertainty(tmp_path) == []
    result = uncertainty_result()
    paths = draw_uncertainty(written(tmp_path, result))
    names = ["reliability.png", "risk_coverage.png", "corruptions.png", "scores.png"]
    assert [path.name for path in paths] == names
    assert [Image.open(path).width for path in paths] == [320] * 4
    skip_rendering(monkeypatch)
    result |= {"misclassification": None, "ood": {}, "corruptions": {}}
    paths = draw_uncertainty(written(tmp_path, result))
    assert [path.name for path in paths] == ["reliability.png"]


def test_reliability_shows_the_bins() -> None:
    result = uncertainty_result()
    bins = result["calibration"]["bins"]
    left, right = panels(uncertainty_figures.reliability, result)
    expected, observed = ([each[key] for each in bins] for key in ("expected", "observed"))
    assert curves(left)["bin of pairs"] == (expected, observed)
    diagonal = curves(left)["expected = observed"]
    assert diagonal[0] == diagonal[1]
    assert [bar.get_height() for bar in right.patches] == [each["count"] for each in bins]


def test_risk_coverage_shows_kappa_the_best_others_and_both_limits() -> None:
    result = uncertainty_result()
    part = result["misclassification"]
    left, right = panels(uncertainty_figures.risk_coverage, result)
    drawn = curves(left)
    assert drawn["κ"][1] == part["risk_coverage"]["kappa"]["risk"]
    area = {name: values["aurc"] for name, values in part["scores"].items()}
    best = min((name for name in DESCRIPTIONS if name != "kappa"), key=lambda name: area[name])
    assert best.replace("_", " ") in {label.removesuffix(" *") for label in drawn}
    assert any(label.endswith(" *") for label in drawn)
    assert set(drawn["random"][1]) == {1 - part["accuracy"]}
    # Of 200 images 149 are right: the share of errors among the first n when the errors come last.
    wrong = np.array([0] * 149 + [1] * 51)
    risk = np.cumsum(wrong) / np.arange(1, 201)
    np.testing.assert_allclose(drawn["oracle"][1], risk[1::2], atol=1e-12)
    assert points(right) == sorted(area.values())


def test_corruptions_show_medians_and_correlations() -> None:
    result = uncertainty_result()
    left, right = panels(uncertainty_figures.corruptions, result)
    labels = [kind.replace("_", " ") for kind in MAGNITUDES]
    parts = [result["corruptions"][kind] for kind in MAGNITUDES]
    assert [curves(left)[label][1] for label in labels] == [part["median_kappa"] for part in parts]
    trends = [part["scores"]["kappa"]["spearman"] for part in parts]
    assert curves(right)["κ"][0] == trends
    assert [label.get_text() for label in right.get_yticklabels()] == labels
    assert any(label.endswith(" *") for label in curves(right))


def test_scores_show_every_auroc() -> None:
    result = uncertainty_result()
    del result["ood"]["noise"]["scores"]["softmax"]
    result["misclassification"]["scores"]["energy"]["auroc"] = None
    axes = panels(uncertainty_figures.scores, result)
    titles = ["misclassified", "held-out (near)", "noise (far)", "mine (given)"]
    assert [each.get_title(loc="left") for each in axes] == titles
    parts = [result["misclassification"], *result["ood"].values()]
    for panel, part in zip(axes, parts, strict=True):
        expected = [part["scores"].get(name, {}).get("auroc") for name in DESCRIPTIONS]
        np.testing.assert_array_equal(points(panel), np.array(expected, dtype=float))
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert labels[0] == "κ"
    marked = {label for label in labels if label.endswith("*")}
    assert marked == {"edge energy *", "contrast *", "jpeg size *"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"data": ', "line 1"),
        ("[1]", "not a dict"),
        ("\udcff", "utf-8"),
        ('{"ood": {}, "calibration": {}}', "lacks the key 'data'"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "uncertainty.json").write_text(text, errors="surrogateescape")
    again = "; vi-simsiam uncertainty /.* makes it again"
    with pytest.raises(InputError, match=f"json is damaged .*{problem}.*{again}"):
        draw_uncertainty(tmp_path)


@pytest.mark.parametrize("dim", [3, 128])
def test_surprise_is_minus_the_true_log_density(dim: int) -> None:
    # D = 3 in closed form: PS = (1 + kappa) (1 + c)^kappa / (4 pi 2^kappa).
    cosine, kappa = np.array([-0.5, 0.0, 0.7]), np.array([0.0, 2.0, 5.0])
    found = surprise(kappa / (dim - 1), cosine, dim)
    if dim == 3:
        density = (1 + kappa) * (1 + cosine) ** kappa / (4 * np.pi * 2**kappa)
        np.testing.assert_allclose(found, -np.log(density), rtol=1e-12)
    uniform = -HypersphericalUniform(dim, dtype=torch.float64).log_prob(
        torch.eye(dim, dtype=torch.float64)[0]
    )
    assert found[0] == pytest.approx(float(uniform), rel=1e-12)


def test_density_shows_the_runs_dimension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Figure] = []
    target = "vi_simsiam.evaluation.figures.save"
    monkeypatch.setattr(target, lambda figure, path: saved.append(figure) or path)
    simsiam = make_run(tmp_path / "simsiam", method="simsiam")
    assert draw_density(simsiam.path) == draw_kappa(simsiam) == []
    assert draw_density(make_run(tmp_path).path) == [tmp_path / "density.png"]
    assert "−log PS" in saved[0].get_suptitle()
    assert "D = 8 " in saved[0].get_suptitle()
    left, right = saved[0].axes
    drawn = curves(left)
    assert len(drawn) == len(CONCENTRATIONS)
    cosine, values = drawn["4"]
    expected = surprise(np.array([4.0]), np.array(cosine), 8)
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    minima = [float(line.get_xdata()[0]) for line in right.lines if line.get_marker() == "o"]
    assert minima == sorted(minima)
    assert len(minima) == len(COSINES)
