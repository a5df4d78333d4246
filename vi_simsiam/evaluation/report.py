"""report.html: all results of a run on one page that needs no other file.

Figures and thumbnails are embedded, there is no script, and nothing is loaded over a network.
Every number stands in the page as in its result file, in the `value` of a <data> element, beside
the rounded one.
"""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vi_simsiam import __version__
from vi_simsiam.config import PLACE_FIELDS, TrainConfig, flat
from vi_simsiam.engine.kernels import kernels_of
from vi_simsiam.engine.log import read_log
from vi_simsiam.engine.run import METRICS, Run, read_config
from vi_simsiam.engine.verdict import Health
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.comparisons import comparisons
from vi_simsiam.evaluation.corruptions import LEVELS
from vi_simsiam.evaluation.figures import (
    Certainty,
    certainty,
    draw_curves,
    draw_density,
    draw_kappa,
)
from vi_simsiam.evaluation.results import ACCURACIES, accuracies, read_result
from vi_simsiam.evaluation.scores import TRIVIAL
from vi_simsiam.evaluation.style import number, shown
from vi_simsiam.evaluation.uncertainty_figures import draw_uncertainty, score_label
from vi_simsiam.files import write_text
from vi_simsiam.inference.ranking import extremes
from vi_simsiam.text import METHODS, counted, fill_template, show

REPORT = "report.html"
_RESULTS = (*ACCURACIES, "uncertainty")
_GALLERY, _SIDE = 24, 128
_LABELS = {
    "auroc": "AUROC ↑",
    "aurc": "AURC ↓",
    "augrc": "AUGRC ↓",
    "aupr": "AUPR ↑",
    "fpr95": "FPR95 ↓",
}
_TRENDS = {
    "spearman": "Spearman's ρ of score and level",
    "monotone": "Share of steps to the next level at which the score of an image rises",
}


@dataclass(frozen=True)
class Number:
    """A cell: the number as its file has it, and as it is displayed."""

    value: float
    text: str


def write_report(folder: Path, open_run: Callable[[], Run] | None = None) -> Path:
    """Write RUN/report.html and return its path; the figures are drawn anew from the run's files.

    Args:
        folder: a run folder.
        open_run: opens the run of VI-SimSiam for its most and least certain images; None to leave
            them out, as where it raises InputError, whose message is printed and on the page.

    Raises:
        InputError: no run there, nothing was logged or evaluated yet, or a file cannot be read.
    """
    config = read_config(folder)
    notes: list[str] = []
    files = {name: read_result(folder, name, notes) for name in _RESULTS}
    left_out = {"Results": "; ".join(notes)} if notes else {}
    results = {name: result for name, result in files.items() if result is not None}
    makes = {
        command: shlex.join(["vi-simsiam", command, str(folder)])
        for command in ("evaluate", *_RESULTS)
    }
    lines, damaged = read_log(folder)
    if not results and not lines:
        raise InputError(
            f"report: {folder} has no {METRICS} and no result yet; train it, or run "
            f"{makes['evaluate']}"
        )
    run, problem = None, None
    if open_run is not None and config.method == "vi-simsiam":
        try:
            run = open_run()
        except InputError as error:
            problem = str(error)
            show(f"images left out: {problem}")
    found = None if run is None else certainty(run)
    figures = [*draw_curves(folder), *draw_density(folder), *draw_uncertainty(folder)]
    if run is not None:
        figures += draw_kappa(run, found)
    health = Health.of_run(folder, config)
    content = {
        "title": f"{METHODS[config.method]} on {shown(config.data)}",
        "figures": {path.stem: figure_uri(path) for path in figures},
        "gallery": None if found is None else gallery(found),
        "problem": problem,
        "unwell": health.line if health is not None and health.short else None,
        "simsiam": config.method == "simsiam",
        **_results(results),
        "facts": _facts(folder, config, results, damaged) | left_out,
        "makes": makes,
        "settings": settings(config),
        "evaluations": _evaluation_settings(results),
        "versions": _versions(results),
        "report_version": __version__,
        "commands": _commands(folder, config),
    }
    write_text(folder / REPORT, fill_template("report.html", content, escape=True))
    return folder / REPORT


def compared(uncertainty: dict[str, Any]) -> dict[str, Any] | None:
    """The concentration beside the best of the trivial scores, wherever both are defined.

    One run does not show what is due to chance: the sentence counts, and calls nothing better.

    Returns:
        "table", "sentence", "trivial", the names of the trivial scores, and "card", the first row
        as a headline; None where nothing was compared.
    """
    found = [row for row in comparisons(uncertainty) if row.gap is not None]
    if not found:
        return None
    trivial = {row.part: score_label(str(row.baseline)) for row in found}
    columns: dict[str, dict[str, Any]] = {
        "measure": {row.part: row.measure for row in found},
        "κ": {row.part: row.kappa for row in found},
        "best trivial score": trivial,
        "its figure": {row.part: row.value for row in found},
        "κ minus it": {row.part: _number(row.gap, "+.3f") for row in found},
    }
    first, ahead = found[0], sum(bool(row.ahead) for row in found)
    beside = {f"best trivial score, {trivial[first.part]}": first.value}
    return {
        "table": _table("κ beside the best trivial score", "part", columns),
        "sentence": f"κ is ahead of the best trivial score in {ahead} of "
        f"{counted(len(found), 'comparison')}.",
        "trivial": [score_label(name) for name in TRIVIAL if name in uncertainty["scores"]],
        "card": _card(f"{first.measure} of κ", first.kappa, beside, about=first.part),
    }


def gallery(found: Certainty) -> list[dict[str, Any]]:
    """The least and the most certain images as thumbnails with captions, in two groups."""
    source, values = found.source, found.values
    labels, classes = source.labels, source.classes
    spread = float(values.max() - values.min())
    groups = []
    ends = zip(("Least certain", "Most certain"), extremes(values, _GALLERY), strict=True)
    for title, indices in ends:
        images = []
        for index in indices.tolist():
            name = "" if labels is None or classes is None else classes[int(labels[index])]
            kappa = Number(float(values[index]), number(float(values[index]), spread))
            uri, small = thumbnail_uri(source.image(index))
            image = {"uri": uri, "small": small, "kappa": kappa, "name": name, "index": index}
            images.append({**image, "place": source.describe(index)})
        groups.append({"title": title, "images": images, "kind": found.kind})
    return groups


def thumbnail_uri(image: Image.Image) -> tuple[str, bool]:
    """An image's centre square as data URI; True if it is small, to be shown pixel by pixel."""
    side = min(image.size)
    if side <= _SIDE // 2:
        return _data_uri(ImageOps.fit(image, (side, side)), "PNG", optimize=True), True
    thumbnail = ImageOps.fit(image, (_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return _data_uri(thumbnail, "JPEG", quality=82), False


def figure_uri(path: Path) -> dict[str, Any]:
    """A figure as data URI, and its size; with a palette, it takes a quarter of the bytes."""
    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(256 if path.stem == "kappa" else 64)
    uri = _data_uri(reduced, "PNG", optimize=True)
    return {"uri": uri, "width": reduced.width, "height": reduced.height}


def settings(config: TrainConfig) -> list[dict[str, Any]]:
    """Every setting of a run: group, name, value, default, and True if the two differ."""
    defaults = flat(TrainConfig().to_dict())
    rows = []
    for path, value in flat(config.to_dict()).items():
        part, _, name = path.rpartition(".")
        group = "place" if path in PLACE_FIELDS else part or "training"
        given, default = _plain(value), _plain(defaults.get(path))
        row = {"group": group, "name": name, "value": given, "default": default}
        rows.append({**row, "differs": given != default})
    order = ("training", "decode", "augment", "model", "loss", "place")
    return sorted(rows, key=lambda row: order.index(row["group"]))


def train_arguments(config: TrainConfig) -> list[str]:
    """Options of `vi-simsiam train` for this configuration, without those of place and machine."""
    defaults, arguments = flat(TrainConfig().to_dict()), []
    for name, value in flat(config.to_dict()).items():
        if name in PLACE_FIELDS or _plain(value) == _plain(defaults.get(name)):
            continue
        flag = name.rpartition(".")[2].replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list | tuple) else [value]
            arguments += [f"--{flag}", *(str(each) for each in values)]
    return arguments


def _commands(folder: Path, config: TrainConfig) -> list[str]:
    new = f"{folder}-again"
    commands = [["train", *train_arguments(config), "--out", new], ["evaluate", new]]
    if config.method == "vi-simsiam":
        commands.append(["uncertainty", new])
    return [shlex.join(["vi-simsiam", *command]) for command in [*commands, ["report", new]]]


def _facts(
    folder: Path, config: TrainConfig, results: dict[str, dict[str, Any]], damaged: int
) -> dict[str, str]:
    facts = {
        "Method": METHODS[config.method],
        "Data": shown(config.data),
        "Network": config.model.backbone,
        "D": f"{config.model.dim:,}",
        "Epochs": f"{config.epochs:,}",
        "Seed": str(config.seed),
        "Kernels": kernels_of(folder, config),
    }
    first = next((results[name] for name in ACCURACIES if name in results), {})
    if {"train_images", "val_images"} <= first.keys():
        images = f"{first['train_images']:,} training, {first['val_images']:,} validation"
        facts["Images"] = images
    if damaged:
        facts["Log"] = f"{counted(damaged, 'damaged line')} of {METRICS} left out"
    return facts


def _results(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Cards and tables of the results."""
    measured = {title: results[name] for name, title in ACCURACIES.items() if name in results}
    cards = []
    for title, result in measured.items():
        others = dict(result["top1"])
        cards.append(_card(f"{title} top-1", others.pop("trained", None), others, form=".1%"))
    measures = accuracies(measured)
    table = _table("Accuracy on the validation images", "features", measures, form=".1%")
    uncertainty = results.get("uncertainty")
    if uncertainty is not None and (part := uncertainty["calibration"]):
        others = {"expected cosine": part["expected"], "observed": part["observed"]}
        cards.append(_card("calibration error", part["error"], others))
    return {
        "cards": cards,
        "compared": None if uncertainty is None else compared(uncertainty),
        "accuracies": table if measures else None,
        "lacking": {title: name for name, title in ACCURACIES.items() if name not in results},
        "uncertainty": None if uncertainty is None else _tables(uncertainty),
    }


def _tables(uncertainty: dict[str, Any]) -> dict[str, Any]:
    """The tables of each part of uncertainty.json that is there."""
    names = list(uncertainty["scores"])
    tables: dict[str, Any] = {
        "remarks": uncertainty["settings"].get("notes", []),
        "notes": uncertainty["scores"],
    }
    keys = {"expected": "expected", "observed": "observed", "pairs": "count"}
    bins = (uncertainty["calibration"] or {"bins": []})["bins"]
    columns: dict[str, dict[str, Any]] = {
        heading: {str(i): row[key] for i, row in enumerate(bins, start=1)}
        for heading, key in keys.items()
    }
    tables["calibration"] = _table("Expected and observed cosine", "bin", columns)
    if part := uncertainty["misclassification"]:
        caption = (
            f"Images that the {part['classifier']} classifier gets wrong "
            f"(accuracy {100 * part['accuracy']:.1f} %)"
        )
        scores = {**part["scores"], "oracle": part["oracle"], "random": part["random"]}
        tables["misclassification"] = _measures(caption, scores, ("auroc", "aurc", "augrc"))
    if sets := uncertainty["retrieval"]:
        columns = {
            f"{name} ({'seen' if part['seen_classes'] else 'unseen'} classes)": {
                "recall at 1": part["recall_at_1"],
                **part["scores"],
            }
            for name, part in sets.items()
        }
        caption = "AUROC for queries whose nearest neighbour is of another class"
        tables["retrieval"] = _table(caption, "score", columns, ("recall at 1", *names))
    tables["ood"] = []
    for name, part in uncertainty["ood"].items():
        caption = f"{name}: {counted(part['images'], 'foreign image')} ({part['kind']})"
        tables["ood"].append(_measures(caption, part["scores"], ("auroc", "aupr", "fpr95")))
    if kinds := uncertainty["corruptions"]:
        columns = {
            f"level {level}": {kind: part["median_kappa"][level] for kind, part in kinds.items()}
            for level in LEVELS
        }
        tables["corruptions"] = [_table("Median κ / (D − 1)", "corruption", columns)]
        for key, caption in _TRENDS.items():
            columns = {
                kind: {name: row[key] for name, row in part["scores"].items()}
                for kind, part in kinds.items()
            }
            tables["corruptions"].append(_table(caption, "score", columns, names))
    return tables


def _measures(caption: str, scores: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A table of measures of scores."""
    columns = {
        _LABELS[key]: {name: values.get(key) for name, values in scores.items()} for key in keys
    }
    return _table(caption, "score", columns)


def _table(
    caption: str,
    corner: str,
    columns: Mapping[str, Mapping[str, Any]],
    names: Iterable[str] | None = None,
    form: str = ".3f",
) -> dict[str, Any]:
    """A table of {heading: {row: cell}}; `names` of rows, where not every one is in a column.

    Numbers are shown in the format `form`, whole ones as counts.
    """
    names = names or dict.fromkeys(name for column in columns.values() for name in column)
    rows = []
    for name in names:
        label = score_label(name) if corner == "score" else name.replace("_", " ")
        rows.append([label, *(_cell(column.get(name), form) for column in columns.values())])
    return {"caption": caption, "header": [corner, *columns], "rows": rows}


def _cell(value: str | float | Number | None, form: str) -> str | Number | None:
    if isinstance(value, int | float):
        return _number(value, "," if isinstance(value, int) else form)
    return value


def _card(
    title: str,
    number: float | None,
    others: Mapping[str, float | None],
    *,
    about: str = "",
    form: str = ".3f",
) -> dict[str, Any]:
    beside = {name: _number(value, form) for name, value in others.items()}
    return {"title": title, "number": _number(number, form), "others": beside, "about": about}


def _evaluation_settings(results: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, bool]]:
    """Name, value and evaluation of every setting, and True if its source does not state it."""
    rows = []
    for evaluation, result in results.items():
        given = result.get("settings") or {}
        inferred = given.get("inferred") or ()
        for name, value in given.items():
            if name not in ("inferred", "notes"):  # the notes stand beside the results
                rows.append((name, _plain(value), evaluation, name in inferred))
    return rows


def _versions(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = {name: result["versions"] for name, result in results.items() if result.get("versions")}
    return _table("Versions that made each result", "package", found)


def _plain(value: object) -> str:
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


def _number(value: float | None, form: str = ".3f") -> Number | None:
    if value is None or not math.isfinite(value):
        return None
    return Number(value, f"{value:{form}}".replace("%", " %").replace("-", "−"))


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    (image if image.mode in ("RGB", "P") else image.convert("RGB")).save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
