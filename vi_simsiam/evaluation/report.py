"""report.html: all that is known of a run on one page that needs no other file.

Figures and thumbnails are part of the page, there is no script in it, and it asks for nothing over a network. Every
number stands in the page as its result file has it, in the `value` of a <data> element, beside the rounded one.
"""

from __future__ import annotations

import base64
import io
import json
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vi_simsiam import __version__
from vi_simsiam.config import PLACE_FIELDS, TrainConfig, flat
from vi_simsiam.engine.checkpoint import write_atomically
from vi_simsiam.engine.run import METRICS, Run, read_config
from vi_simsiam.engine.verdict import Health
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.figures import (
    Certainty,
    certainty,
    draw_curves,
    draw_kappa,
    extremes,
    logged,
)
from vi_simsiam.evaluation.kappa_figures import draw_density
from vi_simsiam.evaluation.scores import TRIVIAL
from vi_simsiam.evaluation.style import number, shown
from vi_simsiam.evaluation.uncertainty import comparisons
from vi_simsiam.evaluation.uncertainty_figures import (
    UNCERTAINTY,
    draw_uncertainty,
    read_uncertainty,
    score_label,
)
from vi_simsiam.paths import printable
from vi_simsiam.text import METHODS, counted

REPORT = "report.html"
ACCURACIES = {"knn": "kNN", "linear": "linear", "logistic": "logistic"}
"""Result files, each named like the command that writes it, and what their accuracy is called."""
_GALLERY, _SIDE = 24, 128


@dataclass(frozen=True)
class Number:
    """A cell: the number as its file has it, and as it is read."""

    value: float
    text: str


def write_report(folder: Path, run: Run | None = None, problem: str | None = None) -> Path:
    """Write RUN/report.html and return its path; the figures are drawn anew from the files of the run.

    Args:
        folder: a run folder.
        run: the run, for the images it is most and least certain of; None to leave them out.
        problem: why there is no `run`, as the page is to say it.

    Raises:
        InputError: no run there, nothing was logged or evaluated yet, or a file that cannot be read.
    """
    from jinja2 import Environment, StrictUndefined

    config = read_config(folder)
    results = {
        name: read_result(folder / f"{name}.json")
        for name in ACCURACIES
        if (folder / f"{name}.json").is_file()
    }
    check_material(folder)
    uncertainty = read_uncertainty(folder) if (folder / UNCERTAINTY).is_file() else None
    found = None if run is None else certainty(run)
    health = Health.of_run(folder, config)
    figures = [
        draw_curves(folder) if logged(folder) else None,
        draw_density(folder),
        *draw_uncertainty(folder),
    ]
    if run is not None:
        figures.append(draw_kappa(run, found))
    try:
        content = {
            "title": f"{METHODS[config.method]} on {shown(config.data)}",
            "facts": _facts(config, results),
            "cards": [*_accuracy_cards(results), *_calibration_card(uncertainty)],
            "compared": None if uncertainty is None else compared(uncertainty),
            "accuracies": _accuracy_table(results),
            "lacking": [(label, name) for name, label in ACCURACIES.items() if name not in results],
            "makes": {
                command: shlex.join(["vi-simsiam", command, str(folder)])
                for command in ("evaluate", "uncertainty", *ACCURACIES)
            },
            "figures": {path.stem: figure_uri(path) for path in figures if path is not None},
            "gallery": None if found is None else gallery(found),
            "problem": problem,
            "unwell": health.line if health is not None and health.short else None,
            "simsiam": config.method == "simsiam",
            "dim": config.model.dim,
            "uncertainty": None if uncertainty is None else _tables(uncertainty),
            "remarks": [] if uncertainty is None else uncertainty["settings"].get("notes", []),
            "notes": {} if uncertainty is None else uncertainty.get("scores", {}),
            "settings": settings(config),
            "evaluations": _evaluation_settings({**results, "uncertainty": uncertainty or {}}),
            "versions": _versions({**results, "uncertainty": uncertainty or {}}),
            "commands": _commands(folder, config),
        }
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise InputError(
            f"report: a result in {folder} lacks what the report shows ({error!r})"
        ) from error
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = files("vi_simsiam").joinpath("assets/report.html").read_text(encoding="utf-8")
    page = environment.from_string(template).render(**content)
    write_atomically(folder / REPORT, lambda file: file.write(printable(page).encode()))
    return folder / REPORT


def check_material(folder: Path) -> None:
    """Refuse a run of which there is nothing to report, before anything is computed.

    Raises:
        InputError: nothing was logged or evaluated yet.
    """
    results = [folder / name for name in (UNCERTAINTY, *(f"{name}.json" for name in ACCURACIES))]
    if not (logged(folder) or any(path.is_file() for path in results)):
        evaluate = shlex.join(["vi-simsiam", "evaluate", str(folder)])
        raise InputError(
            f"report: {folder} has no {METRICS} and no result yet; train it, or run {evaluate}"
        )


def read_result(path: Path) -> dict[str, Any]:
    """A result file's JSON object.

    Raises:
        InputError: it is damaged.
    """
    again = f"{shlex.join(['vi-simsiam', path.stem, str(path.parent)])} makes it again"
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # JSON and Unicode errors alike
        raise InputError(f"report: {path} cannot be read ({error}); {again}") from error
    if not isinstance(content, dict):
        raise InputError(f"report: {path} holds no JSON object; {again}")
    return content


def compared(uncertainty: dict[str, Any]) -> dict[str, Any] | None:
    """The concentration beside the best of the trivial scores, wherever both are defined, and what that says.

    One run says nothing about chance: the sentence counts and calls nothing better.

    Returns:
        "table", "sentence", "trivial", the names of the trivial scores, and "card", the first row as a headline; None
        where nothing was compared.
    """
    rows, ahead, cards = [], 0, []
    for row in comparisons(uncertainty):
        if row.kappa is None or row.value is None or row.baseline is None:
            continue
        ahead += bool(row.ahead)
        gap = Number(row.kappa - row.value, f"{row.kappa - row.value:+.3f}".replace("-", "−"))
        rows.append(
            [
                _words(row.part),
                row.measure,
                _digits(row.kappa),
                score_label(row.baseline),
                _digits(row.value),
                gap,
            ]
        )
        beside = [(f"best trivial score, {score_label(row.baseline)}", _digits(row.value))]
        cards.append(
            {
                "title": f"{row.measure} of κ",
                "number": _digits(row.kappa),
                "about": row.part,
                "others": beside,
            }
        )
    if not rows:
        return None
    header = ["part", "measure", "κ", "best trivial score", "its figure", "κ minus it"]
    return {
        "table": _table("κ beside the best trivial score", header, rows),
        "sentence": f"κ is ahead of the best trivial score in {ahead} of {counted(len(rows), 'comparison')}.",
        "trivial": [score_label(name) for name in TRIVIAL if name in uncertainty["scores"]],
        "card": cards[0],
    }


def gallery(found: Certainty) -> list[dict[str, Any]]:
    """The least and the most certain images as thumbnails, with captions, in two groups."""
    groups = zip(("Least certain", "Most certain"), extremes(found.values, _GALLERY), strict=True)
    spread = float(found.values.max() - found.values.min())
    result = []
    for title, indices in groups:
        images = []
        for index in indices.tolist():
            label = None if found.source.labels is None else int(found.source.labels[index])
            name = (
                "" if label is None or found.source.classes is None else found.source.classes[label]
            )
            uri, small = thumbnail_uri(found.source.image(index))
            kappa = Number(float(found.values[index]), number(float(found.values[index]), spread))
            images.append({"uri": uri, "small": small, "kappa": kappa, "name": name, "index": index,
                           "place": found.source.describe(index)})  # fmt: skip
        result.append({"title": title, "images": images, "kind": found.kind})
    return result


def thumbnail_uri(image: Image.Image) -> tuple[str, bool]:
    """An image's centre square as data URI, and whether it is so small that its pixels are to be shown as they are."""
    side = min(image.size)
    if side <= _SIDE // 2:
        return _data_uri(ImageOps.fit(image, (side, side)), "PNG", optimize=True), True
    return _data_uri(
        ImageOps.fit(image, (_SIDE, _SIDE), Image.Resampling.LANCZOS), "JPEG", quality=82
    ), False


def figure_uri(path: Path) -> dict[str, Any]:
    """A figure as data URI, with a palette: lines and text look the same in a quarter of the bytes; and its size."""
    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(256 if path.stem == "kappa" else 64)
    return {
        "uri": _data_uri(reduced, "PNG", optimize=True),
        "width": reduced.width,
        "height": reduced.height,
    }


def settings(config: TrainConfig) -> list[dict[str, Any]]:
    """Every setting of a run: group, name, value, default, and whether the two differ."""
    defaults = flat(TrainConfig().to_dict())
    rows = []
    for name, value in flat(config.to_dict()).items():
        group = (
            "place"
            if name in PLACE_FIELDS
            else "training"
            if "." not in name
            else name.partition(".")[0]
        )
        default = defaults.get(name)
        rows.append({"group": group, "name": name.rpartition(".")[2], "value": _plain(value), "default": _plain(default),
                     "differs": _plain(value) != _plain(default)})  # fmt: skip
    order = ("training", "decode", "augment", "model", "loss", "place")
    return sorted(rows, key=lambda row: order.index(row["group"]))


def train_arguments(config: TrainConfig) -> list[str]:
    """Options of `vi-simsiam train` that give this configuration, but for where and how it runs."""
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
    new = Path(f"{folder}-again")
    commands = [["train", *train_arguments(config), "--out", str(new)], ["evaluate", str(new)]]
    if config.method == "vi-simsiam":
        commands.append(["uncertainty", str(new)])
    return [shlex.join(["vi-simsiam", *command]) for command in [*commands, ["report", str(new)]]]


def _facts(config: TrainConfig, results: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    facts = [
        ("Method", METHODS[config.method]),
        ("Data", shown(config.data)),
        ("Network", config.model.backbone),
    ]
    facts += [
        ("D", f"{config.model.dim:,}"),
        ("Epochs", f"{config.epochs:,}"),
        ("Seed", str(config.seed)),
    ]
    for result in list(results.values())[:1]:
        facts.append(
            ("Images", f"{result['train_images']:,} training, {result['val_images']:,} validation")
        )
    return facts


def _accuracy_cards(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    cards = []
    for name, result in results.items():
        top1 = result["top1"]
        others = [
            (encoder, _percent(share)) for encoder, share in top1.items() if encoder != "trained"
        ]
        cards.append(
            {
                "title": f"{ACCURACIES[name]} top-1",
                "number": _percent(top1["trained"]),
                "about": "",
                "others": others,
            }
        )
    return cards


def _calibration_card(uncertainty: dict[str, Any] | None) -> list[dict[str, Any]]:
    part = (uncertainty or {}).get("calibration")
    if not part:
        return []
    others = [
        ("expected cosine", _digits(part["expected"])),
        ("observed", _digits(part["observed"])),
    ]
    return [
        {
            "title": "calibration error",
            "number": _digits(part["error"]),
            "about": "",
            "others": others,
        }
    ]


def _accuracy_table(results: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    labels = {"top1": "top-1", "top5": "top-5", "held_out_top1": "held-out top-1"}
    measures = {f"{ACCURACIES[name]} {label}": result[key] for name, result in results.items()
                for key, label in labels.items() if isinstance(result.get(key), dict)}  # fmt: skip
    encoders = dict.fromkeys(encoder for shares in measures.values() for encoder in shares)
    rows = [
        [encoder, *(_percent(shares.get(encoder)) for shares in measures.values())]
        for encoder in encoders
    ]
    return (
        _table("Accuracy on the validation images", ["features", *measures], rows)
        if measures
        else None
    )


def _tables(uncertainty: dict[str, Any]) -> dict[str, Any]:
    """The tables of each part of uncertainty.json that is there."""
    tables: dict[str, Any] = {}
    names = list(uncertainty["scores"])
    if part := uncertainty.get("calibration"):
        rows = [[str(i), _digits(bin_["expected"]), _digits(bin_["observed"]), _count(bin_["count"])]
                for i, bin_ in enumerate(part["bins"], start=1)]  # fmt: skip
        tables["calibration"] = _table(
            "Expected and observed cosine", ["bin", "expected", "observed", "pairs"], rows
        )
    if part := uncertainty.get("misclassification"):
        caption = f"Images that the {part['classifier']} classifier gets wrong (accuracy {100 * part['accuracy']:.1f} %)"
        given = {**part["scores"], "oracle": part["oracle"], "random": part["random"]}
        tables["misclassification"] = _score_table(
            caption, given, ("auroc", "aurc", "augrc"), [*names, "oracle", "random"]
        )
    if sets := uncertainty.get("retrieval"):
        columns = {
            f"{name} ({'seen' if part['seen_classes'] else 'unseen'} classes)": part
            for name, part in sets.items()
        }
        rows = [["recall at 1", *(_digits(part["recall_at_1"]) for part in columns.values())]]
        rows += [
            [score_label(name), *(_digits(part["scores"].get(name)) for part in columns.values())]
            for name in names
        ]
        tables["retrieval"] = _table(
            "AUROC for queries whose nearest neighbour is of another class",
            ["score", *columns],
            rows,
        )
    tables["ood"] = [
        _score_table(f"{name}: {counted(part['images'], 'foreign image')} ({part['kind']})", part["scores"], ("auroc", "aupr", "fpr95"), names)
        for name, part in (uncertainty.get("ood") or {}).items()
    ]  # fmt: skip
    if kinds := uncertainty.get("corruptions"):
        levels = [f"level {level}" for level in next(iter(kinds.values()))["levels"]]
        rows = [
            [_words(kind), *(_digits(value) for value in part["median_kappa"])]
            for kind, part in kinds.items()
            if part["median_kappa"] is not None
        ]
        header = ["corruption", *(_words(kind) for kind in kinds)]
        tables["corruptions"] = (
            [_table("Median κ / (D − 1)", ["corruption", *levels], rows)] if rows else []
        )
        for key, caption in (
            ("spearman", "Spearman's ρ of score and level"),
            ("monotone", "Share of steps to the next level at which the score of an image rises"),
        ):
            rows = [
                [
                    score_label(name),
                    *(_digits(part["scores"].get(name, {}).get(key)) for part in kinds.values()),
                ]
                for name in names
            ]
            tables["corruptions"].append(_table(caption, ["score", *header[1:]], rows))
    return tables


def _score_table(
    caption: str, scores: dict[str, Any], keys: Iterable[str], names: list[str]
) -> dict[str, Any]:
    labels = {
        "auroc": "AUROC ↑",
        "aurc": "AURC ↓",
        "augrc": "AUGRC ↓",
        "aupr": "AUPR ↑",
        "fpr95": "FPR95 ↓",
    }
    rows = [
        [score_label(name), *(_digits(scores[name].get(key)) for key in keys)]
        for name in names
        if name in scores
    ]
    return _table(caption, ["score", *(labels[key] for key in keys)], rows)


def _table(caption: str, header: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    return {"caption": caption, "header": header, "rows": rows}


def _evaluation_settings(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Settings of every evaluation; those that its source does not state are marked as inferred."""
    rows = []
    for evaluation, result in results.items():
        given = dict(result.get("settings") or {})
        inferred = given.pop("inferred", None) or ()
        given.pop("notes", None)  # said beside the results
        rows += [{"evaluation": evaluation, "name": name, "value": _plain(value), "inferred": name in inferred}
                 for name, value in given.items()]  # fmt: skip
    return rows


def _versions(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = {name: result["versions"] for name, result in results.items() if result.get("versions")}
    packages = dict.fromkeys(package for versions in found.values() for package in versions)
    rows = [
        [package, *(versions.get(package) for versions in found.values())] for package in packages
    ]
    return {
        "report": __version__,
        **_table("Versions that made each result", ["package", *found], rows),
    }


def _plain(value: object) -> str:
    return (
        ", ".join(_plain(each) for each in value) if isinstance(value, list | tuple) else str(value)
    )


def _percent(share: float | None) -> Number | None:
    return (
        None if share is None or not math.isfinite(share) else Number(share, f"{100 * share:.1f} %")
    )


def _digits(value: float | None) -> Number | None:
    return (
        None
        if value is None or not math.isfinite(value)
        else Number(value, f"{value:.3f}".replace("-", "−"))
    )


def _count(value: int) -> Number:
    return Number(value, f"{value:,}")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind, **options) if image.mode not in (
        "RGB",
        "P",
    ) else image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
