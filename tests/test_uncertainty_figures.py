"""Figures of uncertainty.json and of the density: what they show is what the file and the library say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from evaluation_cases import make_run
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from report_cases import KINDS, SCORES, uncertainty_result

from vi_simsiam.distributions import HypersphericalUniform, PowerSpherical
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation import uncertainty_figures
from vi_simsiam.evaluation.figures import CONCENTRATIONS, COSINES, draw_density, surprise
from vi_simsiam.evaluation.style import STYLE, number, shown
from vi_simsiam.evaluation.uncertainty_figures import (
    best_others,
    draw_uncertainty,
    read_uncertainty,
    targets,
)


def written(folder: Path, result: dict[str, Any]) -> Path:
    (folder / "uncertainty.json").write_text(json.dumps(result))
    return folder


def panels(draw: Callable[[dict[str, Any]], Figure], result: dict[str, Any]) -> list[Axes]:
    with matplotlib.rc_context(STYLE):
        return draw(result).axes


def curves(axes: Axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        str(line.get_label()): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
        for line in axes.lines
    }


def points(axes: Axes) -> list[float]:
    """Values of the dots of a dot plot, from the top row down."""
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    return [
        float(np.ravel(line.get_xdata())[0])
        for line in sorted(dots, key=lambda line: np.ravel(line.get_ydata())[0])
    ]


def test_every_part_has_its_figure(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    paths = draw_uncertainty(written(tmp_path, uncertainty_result()))
    assert [path.name for path in paths] == [
        "reliability.png",
        "risk_coverage.png",
        "corruptions.png",
        "scores.png",
    ]
    assert dict(matplotlib.rcParams) == before
    for path in paths:
        assert Image.open(path).width == 1600
        assert path.stat().st_size < 300_000


def test_parts_that_are_absent_are_left_out(tmp_path: Path) -> None:
    assert draw_uncertainty(tmp_path) == []
    result = uncertainty_result()
    for part in ("misclassification", "ood", "corruptions"):
        del result[part]
    assert [path.name for path in draw_uncertainty(written(tmp_path, result))] == [
        "reliability.png"
    ]


def test_reliability_shows_the_bins_that_hold_pairs() -> None:
    result = uncertainty_result()
    result["calibration"]["bins"].insert(0, {"expected": None, "observed": None, "count": 0})
    bins = result["calibration"]["bins"][1:]
    left, right = panels(uncertainty_figures.reliability, result)
    expected, observed = curves(left)["bin of pairs"]
    np.testing.assert_array_equal(expected, [each["expected"] for each in bins])
    np.testing.assert_array_equal(observed, [each["observed"] for each in bins])
    diagonal = curves(left)["expected = observed"]
    np.testing.assert_array_equal(diagonal[0], diagonal[1])
    assert [bar.get_height() for bar in right.patches] == [each["count"] for each in bins]


def test_risk_coverage_shows_kappa_the_best_others_and_both_limits() -> None:
    result = uncertainty_result()
    part = result["misclassification"]
    left, right = panels(uncertainty_figures.risk_coverage, result)
    drawn = curves(left)
    np.testing.assert_array_equal(drawn["κ"][1], part["risk_coverage"]["kappa"]["risk"])
    ranked = sorted(
        (name for name in SCORES if name != "kappa"), key=lambda name: part["scores"][name]["aurc"]
    )
    assert ranked[0].replace("_", " ") in {label.removesuffix(" *") for label in drawn}
    assert any(label.endswith(" *") for label in drawn)
    assert set(drawn["random"][1]) == {1 - part["accuracy"]}
    # Of 200 images 149 are right: by hand, the share of errors among the first n when the errors come last.
    wrong = np.array([0] * 149 + [1] * 51)
    risk = np.cumsum(wrong) / np.arange(1, 201)
    np.testing.assert_allclose(drawn["oracle"][1], risk[1::2], atol=1e-12)
    np.testing.assert_array_equal(
        points(right), sorted(values["aurc"] for values in part["scores"].values())
    )


def test_corruptions_show_medians_and_correlations() -> None:
    result = uncertainty_result()
    left, right = panels(uncertainty_figures.corruptions, result)
    for kind in KINDS:
        np.testing.assert_array_equal(
            curves(left)[kind.replace("_", " ")][1], result["corruptions"][kind]["median_kappa"]
        )
    shown_scores = curves(right)
    np.testing.assert_array_equal(
        shown_scores["κ"][0],
        [result["corruptions"][kind]["scores"]["kappa"]["spearman"] for kind in KINDS],
    )
    assert [label.get_text() for label in right.get_yticklabels()] == [
        kind.replace("_", " ") for kind in KINDS
    ]
    assert sum(label.endswith(" *") for label in shown_scores) >= 1


def test_scores_show_every_auroc() -> None:
    result = uncertainty_result()
    del result["ood"]["noise"]["scores"]["softmax"]
    result["misclassification"]["scores"]["energy"]["auroc"] = math.nan
    axes = panels(uncertainty_figures.scores, result)
    assert [each.get_title(loc="left") for each in axes] == [
        "misclassified", "held-out (near)", "noise (far)", "mine (given)",
    ]  # fmt: skip
    for panel, values in zip(axes, targets(result).values(), strict=True):
        np.testing.assert_array_equal(
            points(panel), [values.get(name, math.nan) for name in SCORES]
        )
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert labels[0] == "κ"
    assert {label for label in labels if label.endswith("*")} == {
        "edge energy *",
        "contrast *",
        "jpeg size *",
    }


def test_best_others_always_hold_an_image_statistic() -> None:
    values = {
        "kappa": 0.9,
        "energy": 0.8,
        "softmax": 0.7,
        "knn_distance": 0.6,
        "contrast": 0.5,
        "jpeg_size": 0.4,
    }
    assert best_others(values) == ["energy", "softmax", "contrast"]
    assert best_others({**values, "contrast": 0.75}) == ["energy", "contrast"]
    assert best_others({**values, "energy": math.nan}) == ["softmax", "knn_distance", "contrast"]
    assert best_others({"kappa": 0.9}) == []


@pytest.mark.parametrize("text", ["", '{"data": ', "[1]", "\udcff"])
def test_damaged_results_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "uncertainty.json").write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match="uncertainty.json"):
        read_uncertainty(tmp_path)


def test_results_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    result = uncertainty_result()
    del result["misclassification"]["oracle"]
    with pytest.raises(
        InputError, match=r"lacks what risk_coverage.png shows \(KeyError\('oracle'\)\)"
    ):
        draw_uncertainty(written(tmp_path, result))
    with pytest.raises(InputError, match="vi-simsiam uncertainty"):
        read_uncertainty(tmp_path / "nowhere")
    result["calibration"]["bins"] = []
    (tmp_path / "uncertainty.json").write_text(json.dumps(result))
    with pytest.raises(
        InputError,
        match=rf"lacks what reliability.png shows .*; vi-simsiam uncertainty {tmp_path} makes it",
    ):
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
    monkeypatch.setattr(
        "vi_simsiam.evaluation.figures.save",
        lambda figure, path: saved.append(figure) or path,
    )
    assert draw_density(make_run(tmp_path).path) == tmp_path / "density.png"
    assert "−log PS" in saved[0].get_suptitle()
    assert "D = 8 " in saved[0].get_suptitle()
    left, right = saved[0].axes
    drawn = curves(left)
    assert len(drawn) == len(CONCENTRATIONS)
    loc = torch.eye(8, dtype=torch.float64)[0]
    for label, (cosine, values) in drawn.items():
        kappa = 7 * float(label.split()[0])
        point = (
            cosine[300] * loc
            + math.sqrt(1 - cosine[300] ** 2) * torch.eye(8, dtype=torch.float64)[1]
        )
        expected = -float(
            PowerSpherical(loc, torch.tensor(kappa, dtype=torch.float64)).log_prob(point)
        )
        assert values[300] == pytest.approx(expected, rel=1e-9)
    minima = [float(line.get_xdata()[0]) for line in right.lines if line.get_marker() == "o"]
    assert minima == sorted(minima)
    assert len(minima) == len(COSINES)


def test_simsiam_has_no_density(tmp_path: Path) -> None:
    assert draw_density(make_run(tmp_path, method="simsiam").path) is None
    assert not (tmp_path / "density.png").exists()


def test_density_is_a_picture_of_1600_pixels(tmp_path: Path) -> None:
    path = draw_density(make_run(tmp_path).path)
    assert path is not None
    assert Image.open(path).size == (1600, 680)


def test_numbers_and_data_sets_are_named_shortly() -> None:
    assert [number(value, 2.5) for value in (0.0, 0.0002, 0.004, 0.1234, 2.6612)] == [
        "0.00",
        "0.0002",
        "0.004",
        "0.12",
        "2.66",
    ]
    assert number(1234.5, 1000.0) == "1,234"
    assert [shown(data) for data in ("cifar10", "folder:/a/b", "pack:/a/c.pack")] == [
        "cifar10",
        "b",
        "c.pack",
    ]
