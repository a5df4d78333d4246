"""Scores of all images for each kind of problem, and the issues above the thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from vi_simsiam.cleaning.anchors import anchor_cosines, anchors
from vi_simsiam.cleaning.duplicates import THRESHOLD, find_copies
from vi_simsiam.cleaning.facts import collect_facts
from vi_simsiam.cleaning.labels import doubt
from vi_simsiam.data.sources import ImageSource, Unreadable
from vi_simsiam.errors import InputError
from vi_simsiam.inference.embed import Table, collect
from vi_simsiam.inference.encoder import Encoder
from vi_simsiam.inference.label_free import Score, measured
from vi_simsiam.text import brief_repr

Kind = Literal[
    "unreadable",
    "leakage",
    "exact_duplicate",
    "near_duplicate",
    "blank",
    "off_topic",
    "label_error",
]

KINDS: dict[Kind, str] = {
    "unreadable": "Files that cannot be read as images",
    "leakage": "Validation images with a copy among the training images",
    "exact_duplicate": "Images with the same pixels as an earlier one",
    "near_duplicate": "Images nearly the same as an earlier one",
    "blank": "Images of one colour, noise or blur",
    "off_topic": "Images unlike all others",
    "label_error": "Images whose label is probably wrong",
}
"""Kinds of problems in the order of the results, in words."""

BLANK = 4.25
"""Robust z-score of the roughness from which an image counts as blank."""
NOISE, FLAT = 0.7, 0.01
"""Roughness above which, and contrast below which, an image counts as blank in any set."""
OFF_TOPIC = 6.0
"""Mean of two robust z-scores from which an image counts as off topic."""
MARGIN = 0.5
"""Margin of the suggested class over the label from which a label counts as wrong."""
_DISTANCES: tuple[Score, ...] = ("knn_distance", "mahalanobis")
_FEWEST = 20  # images from which medians and deviations are taken
_SMOOTHEST = 1e-4  # is added to the roughness before its logarithm


class Issue(NamedTuple):
    """A problem of one image."""

    kind: Kind
    score: float
    reason: str
    row: int
    """Row of the image in the scores; -1 for an unreadable one."""
    path: str
    other: int = -1
    """Row of the image that it copies; -1 for none."""


@dataclass(frozen=True)
class Findings:
    """N images that can be read, training images before validation images, and their problems."""

    parts: Sequence[Table]
    """The training images, and the validation images if there are any."""
    where: NDArray[np.int64]
    """(N, 2) part, and row in its table."""
    scores: dict[str, NDArray[np.float64]]
    """(N,) by kind: "near_duplicate", "blank", "off_topic", and with labels "label_error"; NaN for
    an image without this score. Each rises with the problem. Also "anchor_cosine", that of the
    nearest image without content (`anchors`), and "kappa", except for SimSiam."""
    labels: NDArray[np.int64] | None
    """(N,) classes; None without labels."""
    classes: tuple[str, ...] | None
    """Names of the classes; None without labels."""
    issues: list[Issue] = field(default_factory=list)
    """By kind in the order of `KINDS`, the worst first."""

    __repr__ = brief_repr

    def path(self, row: int) -> str:
        """The path of a row's image, as returned by `os.fsdecode`."""
        part, place = map(int, self.where[row])
        return self.parts[part].path(place)

    def image(self, row: int) -> Image.Image:
        """A row's image in mode RGB; raises UnreadableError if it can no longer be read."""
        part, place = map(int, self.where[row])
        table = self.parts[part]
        return table.source.image(int(table.indices[place]))

    def of_kind(self, kind: Kind) -> list[Issue]:
        """The issues of one kind, the worst first."""
        return [issue for issue in self.issues if issue.kind == kind]


def examine(
    encoder: Encoder,
    sources: Sequence[ImageSource],
    folder: Path,
    *,
    batch_size: int = 256,
    similarity: float = THRESHOLD,
    console: Console | None = None,
) -> Findings:
    """Look for problems in one or two parts of a data set; its files are only read.

    Images are read twice, and compared in N^2 F operations; 4 F + 2,336 bytes are kept of each. The
    same images give the same findings on one machine, but for rounding.

    Args:
        encoder: a run of SimSiam or VI-SimSiam.
        sources: the images, or training images and validation images; one image at least.
        folder: where temporary files are made.
        batch_size: images that the network takes at a time.
        similarity: correlation of thumbnails from which images are near duplicates, in (0, 1].
        console: shows progress and skipped images; None for no output.

    Raises:
        InputError: no image can be read, a number is out of range, or outputs are not finite.
    """
    if not 0 < similarity <= 1:
        raise InputError(f"similarity: {similarity} must be above 0, and at most 1")
    unreadable: list[Unreadable] = []
    tables, kept, facts = [], [], []
    for source in filter(len, sources):
        table = collect(encoder, source, folder, batch_size=batch_size, console=console)
        unreadable += table.skipped
        rows, found = collect_facts(
            source, table.indices, threads=max(1, encoder.run.workers), skipped=unreadable.append
        )
        tables.append(table)
        kept.append(rows)
        facts.append(found)
    if not sum(map(len, kept)):
        raise InputError("images: none of them can be read")
    where = np.concatenate(
        [np.stack([np.full(len(rows), part), rows], 1) for part, rows in enumerate(kept)]
    )
    whole = [
        table.embedding if len(rows) == len(table.indices) else table.embedding[rows]
        for table, rows in zip(tables, kept, strict=True)
    ]
    embedding = whole[0] if len(whole) == 1 else np.concatenate(whole)
    each = np.concatenate(facts)
    labels = _labels(tables, kept)
    classes = None if labels is None else tables[0].source.classes

    copies = find_copies(embedding, each, device=encoder.device, threshold=similarity)
    scores = {"near_duplicate": copies.similarity}
    first = tables[0]
    drawn = anchors(first.source, first.indices[kept[0]], encoder.size)
    scores["blank"] = np.abs(_robust(np.log(each["roughness"] + _SMOOTHEST)))
    scores["anchor_cosine"] = anchor_cosines(encoder, embedding, drawn)
    scores["off_topic"] = _off_topic(embedding, encoder)
    doubts = None
    if labels is not None and classes is not None:
        doubts = doubt(embedding, labels, len(classes))
    if doubts is not None:
        scores["label_error"] = doubts.score
    if all(table.concentration is not None for table in tables):
        concentrations = [
            np.asarray(table.concentration, np.float64)[rows]
            for table, rows in zip(tables, kept, strict=True)
        ]
        scores["kappa"] = np.concatenate(concentrations)
    findings = Findings(tables, where, scores, labels, classes)

    issues = findings.issues
    issues += [Issue("unreadable", 1.0, entry.reason, -1, entry.path) for entry in unreadable]
    for row in np.flatnonzero(copies.other >= 0).tolist():
        other, value = int(copies.other[row]), float(copies.pair[row])
        exact = bool(each["digest"][row] == each["digest"][other])
        further = int(copies.other[other])
        if exact and further >= 0 and where[row, 0] == where[other, 0] != where[further, 0]:
            exact, other, value = False, further, float(copies.pair[other])
        reason = "the same pixels" if exact else f"correlation {value:.3f} of the thumbnails"
        kind: Kind = "exact_duplicate" if exact else "near_duplicate"
        if where[row, 0] != where[other, 0]:
            kind, reason = "leakage", f"{reason}, in training and validation"
        issues.append(Issue(kind, value, reason, row, findings.path(row), other))
    blank = (each["roughness"] > NOISE) | (each["contrast"] < FLAT) | (scores["blank"] >= BLANK)
    for row in np.flatnonzero(blank).tolist():
        reason = (
            f"contrast {each['contrast'][row]:.3f}, roughness {each['roughness'][row]:.4f} "
            "(0 is flat or blurred, 1 is noise)"
        )
        issues.append(Issue("blank", float(scores["blank"][row]), reason, row, findings.path(row)))
    for row in np.flatnonzero((scores["off_topic"] >= OFF_TOPIC) & ~blank).tolist():
        value = float(scores["off_topic"][row])
        reason = f"{value:.1f} deviations farther from the others than the median image"
        issues.append(Issue("off_topic", value, reason, row, findings.path(row)))
    if doubts is not None and labels is not None and classes is not None:
        wrong = doubts.confident & (doubts.score >= MARGIN)
        for row in np.flatnonzero(wrong).tolist():
            reason = f"labelled {classes[labels[row]]}, looks like {classes[doubts.suggested[row]]}"
            value = float(doubts.score[row])
            issues.append(Issue("label_error", value, reason, row, findings.path(row)))
    order = {kind: place for place, kind in enumerate(KINDS)}
    issues.sort(key=lambda issue: (order[issue.kind], -issue.score))
    return findings


def _labels(tables: Sequence[Table], kept: Sequence[NDArray[np.int64]]) -> NDArray[np.int64] | None:
    found = []
    for table, rows in zip(tables, kept, strict=True):
        if table.source.labels is None or table.source.classes != tables[0].source.classes:
            return None
        found.append(table.source.labels[table.indices[rows]])
    return np.concatenate(found)


def _off_topic(embedding: NDArray[np.float32], encoder: Encoder) -> NDArray[np.float64]:
    """Mean robust z-score of the distances to the nearest images and to the mean of all."""
    if len(embedding) < 2:
        return np.zeros(len(embedding))
    found = np.zeros(len(embedding))
    for name in _DISTANCES:
        found += _robust(measured(name, embedding, encoder.device)) / 2
    return found


def _robust(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Deviations from the median in units of 1.4826 medians of absolute deviations, (N,).

    That unit is the standard deviation of a normal distribution. Zeros for fewer than 20 values,
    and where more than half of them are equal.
    """
    away = values.astype(np.float64) - np.median(values)
    unit = 1.4826 * float(np.median(np.abs(away)))
    if len(values) < _FEWEST or unit < 1e-9:
        return np.zeros(len(values))
    scores: NDArray[np.float64] = away / unit
    return scores
