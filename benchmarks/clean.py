"""Problems put into a set of images, and how many of them `vi-simsiam clean` finds.

Every kind of problem is found among the clean images and those with that problem; images that were
copied are left out. The average precision is that of a score, the rest that of the issues listed.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from vi_simsiam.checks import require
from vi_simsiam.cleaning.find import Kind, examine
from vi_simsiam.config import preset
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.data_names import data_label
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.foreign import builtin_sets
from vi_simsiam.evaluation.metrics import aupr
from vi_simsiam.inference.encoder import Encoder, load
from vi_simsiam.text import counted, markdown_grid, print_line

from .clean_scores import CLEAN, scores_by_kind
from .contamination import BLANK, CROPPED, ENCODED, EXACT, FOREIGN, KINDS, LABEL, contaminate
from .results import provenance, read_result, result_path, write_result
from .tables import terminal_table, where

NAME = "clean"
_DIGITS = "digits"
_ISSUES: dict[str, Kind] = {
    EXACT: "exact_duplicate",
    ENCODED: "near_duplicate",
    CROPPED: "near_duplicate",
    BLANK: "blank",
    FOREIGN: "off_topic",
    LABEL: "label_error",
}
_FEWEST = 40


@dataclass(frozen=True)
class Options:
    """Options of `vi-simsiam bench clean`."""

    data: str = "fashion-mini"
    """A labelled data set, as for `train`."""
    encoder: Path | None = None
    """A run folder; None to train one with the preset demo, on the embedded images."""
    foreign: str = _DIGITS
    """A data set of other images; digits are those of scikit-learn."""
    images: int = 1000
    """Images taken from the data set."""
    seeds: int = 3
    """Draws of the images and of their problems."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """Folder for OUT/DEVICE/clean.json, which keeps the results of other data sets; None to print
    only."""


def run(options: Options) -> dict[str, Any]:
    """Put problems into a data set, look for them, and print and write what was found."""
    require("seeds", options.seeds, 1 <= options.seeds <= 100, "between 1 and 100")
    source = open_dataset(options.data).train
    if source.labels is None:
        raise InputError(f"data: {options.data} has no labels; wrong ones could not be found")
    fits = _FEWEST <= options.images <= len(source)
    require("images", options.images, fits, f"between {_FEWEST} and the {len(source):,} there are")
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        encoder = load(options.encoder or _trained(Path(folder, "run"), options), options.device)
        foreign = _foreign(options, encoder)
        path = options.out and result_path(options.out, NAME, encoder.device)
        cases = read_result(path, NAME)["cases"] if path is not None and path.exists() else []
        draws = []
        for seed in range(options.seeds):
            place = Path(folder, str(seed))
            place.mkdir()
            draws.append(_draw(encoder, source, foreign, place, options.images, seed))
            print_line(console, f"{options.data}: {counted(seed + 1, 'draw')} of {options.seeds}")
    case = {
        "name": data_label(options.data),
        "images": options.images,
        "encoder": f"{encoder.config.model.backbone}, {data_label(encoder.config.data)}",
        "foreign": data_label(options.foreign),
        "kinds": {kind: _joined([draw[kind] for draw in draws]) for kind in KINDS},
    }
    result = {
        "benchmark": NAME,
        "device_type": encoder.device.type,
        **provenance(encoder.device, ("imagehash",)),
        "cases": [*(each for each in cases if each["name"] != case["name"]), case],
    }
    console.print(terminal_table(None, *_table(case)))
    if path is not None:
        write_result(path, result)
        print_line(console, f"written: {path}")
    return result


def markdown_table(result: dict[str, Any]) -> str:
    """A table for each data set: a row for each score of each kind of problem."""
    tables = [
        f"{markdown_grid(*_table(case))}\n\nEncoder: {case['encoder']}; foreign images: "
        f"{case['foreign']}; {counted(_draws(case), 'draw')}."
        for case in result["cases"]
    ]
    return "\n\n".join([*tables, f"Medians, and ranges over the draws. {where(result)}"])


def _trained(folder: Path, options: Options) -> Path:
    config = dataclasses.replace(preset("demo"), device=options.device)
    Trainer(config, folder, console=Console(stderr=True)).fit()
    return folder


def _foreign(options: Options, encoder: Encoder) -> ImageSource:
    if options.foreign == _DIGITS:
        return builtin_sets(encoder.config, options.images, 0)[1].source
    found = open_dataset(options.foreign).train
    least = options.images // 20
    require("foreign", options.foreign, len(found) >= least, f"a set of {least} images or more")
    return found


def _draw(
    encoder: Encoder,
    source: ImageSource,
    foreign: ImageSource,
    folder: Path,
    images: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Figures of one contaminated set by kind."""
    made = contaminate(source, foreign, folder, images=images, seed=seed)
    findings = examine(encoder, [made.source], folder)
    table = findings.parts[0]
    assert len(findings.where) == len(made.kind), "an image that was written cannot be read"
    assert findings.labels is not None
    scores = scores_by_kind(findings, made.source, np.array(table.embedding), findings.labels)
    clean = made.kind == ""
    clean[made.origin[made.origin >= 0]] = False
    found = {}
    for kind in KINDS:
        positive = made.kind == kind
        among = clean | positive
        listed = np.zeros(len(clean), bool)
        listed[[issue.row for issue in findings.of_kind(_ISSUES[kind])]] = True
        found[kind] = {
            "scores": {
                name: value if isinstance(value, str) else _precision(value[among], positive[among])
                for name, value in scores[kind].items()
            },
            "found": float(listed[positive].mean()),
            "false_alarms": int(listed[clean].sum()),
            "clean": int(clean.sum()),
        }
    return found


def _precision(scores: np.ndarray, positive: np.ndarray) -> float:
    value = aupr(np.nan_to_num(scores, nan=float(np.nanmin(scores))), positive)
    assert value is not None
    return value


def _joined(draws: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several draws of one kind, as lists."""
    scores = {
        name: value if isinstance(value, str) else [draw["scores"][name] for draw in draws]
        for name, value in draws[0]["scores"].items()
    }
    rest = {name: [draw[name] for draw in draws] for name in ("found", "false_alarms", "clean")}
    return {"scores": scores, **rest}


def _table(case: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for kind, figures in case["kinds"].items():
        for name, values in figures["scores"].items():
            precision = values if isinstance(values, str) else _range(values, "{:.2f}")
            listed = ["", ""]
            if name == CLEAN:
                listed = [_range(figures[each], form) for each, form in _LISTED.items()]
            rows.append([kind if name == CLEAN else "", name, precision, *listed])
    head = [f"{case['name']}, {case['images']:,} images", "score", "average precision"]
    return [*head, "listed", "false alarms"], rows


_LISTED = {"found": "{:.0%}", "false_alarms": "{:,.0f}"}


def _range(values: list[float], form: str) -> str:
    low, middle, high = map(form.format, (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _draws(case: dict[str, Any]) -> int:
    return len(next(iter(case["kinds"].values()))["found"])
