"""Findings as files: issues.csv, scores.csv, a contact sheet for each kind, and index.html."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vi_simsiam import __version__
from vi_simsiam.cleaning.find import KINDS, Findings, Issue, Kind
from vi_simsiam.data.contact_sheet import thumbnails
from vi_simsiam.data.sources import UnreadableError
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.report import thumbnail_uri
from vi_simsiam.files import naming, write_atomically, write_text
from vi_simsiam.inference.ranking import no_formula
from vi_simsiam.text import counted, fill_template

ISSUES, SCORES, PAGE = "issues.csv", "scores.csv", "index.html"
_SHOWN = 32
_PARTS = ("train", "val")


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that must not be written to, before anything is computed.

    Raises:
        InputError: it is a file or a link, holds other files, or earlier results without
            `overwrite`; or its own folder is not there.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"out: {folder} is a file or a link, not a folder")
    if not folder.parent.is_dir():
        raise InputError(f"out: {folder.parent} is no folder; make it first")
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if names - {ISSUES, SCORES, PAGE, *map(_sheet, KINDS)}:
        raise InputError(f"out: {folder} holds other files; give an empty or new folder")
    if names and not overwrite:
        raise InputError(f"out: {folder} exists; say --overwrite to replace it")


def write_findings(findings: Findings, folder: Path, title: str) -> None:
    """Write all files, each atomically; sheets of kinds that are no longer found are removed.

    issues.csv has kind, score, reason, path and the path of the other image of a pair; scores.csv
    all images with their part, class and scores. Paths are as `inference.embed.write_ranking`
    writes them.

    Args:
        findings: what was found.
        folder: is made if it is not there.
        title: of the page.
    """
    with naming(folder):
        folder.mkdir(exist_ok=True)
    groups = []
    for kind, words in KINDS.items():
        issues = findings.of_kind(kind)
        images = _images(findings, issues[:_SHOWN])
        sheet = folder / _sheet(kind)
        if images:
            drawn = thumbnails([(words, [(image, text) for _, image, text in images])])
            write_atomically(sheet, partial(drawn.save, format="PNG"))
        else:
            sheet.unlink(missing_ok=True)
        shown = {id(issue): image for issue, image, _ in images}
        groups.append(_group(findings, kind, issues, shown))
    _write_csv(folder / SCORES, _score_rows(findings))
    _write_csv(folder / ISSUES, _issue_rows(findings))
    content = {
        "title": title,
        "images": counted(len(findings.where), "image"),
        "groups": groups,
        "version": __version__,
    }
    write_text(folder / PAGE, fill_template("cleaning.html", content, escape=True))


def _sheet(kind: str) -> str:
    return f"{kind}.png"


def _images(findings: Findings, issues: Sequence[Issue]) -> list[tuple[Issue, Image.Image, str]]:
    """The images of issues that can be read, with their scores; of a pair both, side by side."""
    found = []
    for issue in issues:
        if issue.row < 0:
            continue
        try:
            image = findings.image(issue.row)
            if issue.other >= 0:
                image = _pair(image, findings.image(issue.other))
        except UnreadableError:
            continue  # changed since
        found.append((issue, image, f"{issue.score:.3g}"))
    return found


def _pair(left: Image.Image, right: Image.Image) -> Image.Image:
    """Both images in one square, each squeezed to half of its width."""
    side = max(64, *left.size, *right.size)
    side = min(side, 256) // 2 * 2
    drawn = Image.new("RGB", (side, side))
    drawn.paste(left.resize((side // 2, side)), (0, 0))
    drawn.paste(right.resize((side // 2, side)), (side // 2, 0))
    return drawn


def _group(
    findings: Findings, kind: Kind, issues: Sequence[Issue], shown: dict[int, Image.Image]
) -> dict[str, Any]:
    """A section of the page."""
    rows = []
    for issue in issues[:_SHOWN]:
        image = shown.get(id(issue))
        uri, small = (None, False) if image is None else thumbnail_uri(image)
        other = findings.path(issue.other) if issue.other >= 0 else ""
        rows.append(
            {
                "uri": uri,
                "small": small,
                "score": f"{issue.score:.3g}",
                "reason": issue.reason,
                "path": issue.path,
                "other": other,
            }
        )
    return {"kind": kind, "title": KINDS[kind], "count": len(issues), "rows": rows}


def _issue_rows(findings: Findings) -> Iterable[list[str]]:
    yield ["kind", "score", "reason", "path", "other"]
    for issue in findings.issues:
        other = findings.path(issue.other) if issue.other >= 0 else ""
        yield [
            issue.kind,
            f"{issue.score:.6g}",
            no_formula(issue.reason),
            no_formula(issue.path),
            no_formula(other),
        ]


def _score_rows(findings: Findings) -> Iterable[list[str]]:
    named = findings.labels is not None
    yield ["path", "part", *(["class"] if named else []), *findings.scores]
    for row, (part, _) in enumerate(findings.where.tolist()):
        label = []
        if findings.labels is not None and findings.classes is not None:
            label = [no_formula(findings.classes[findings.labels[row]])]
        values = [column[row] for column in findings.scores.values()]
        numbers = ["" if np.isnan(value) else f"{value:.6g}" for value in values]
        yield [no_formula(findings.path(row)), _PARTS[part], *label, *numbers]


def _write_csv(path: Path, rows: Iterable[list[str]]) -> None:
    text = io.StringIO()
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        # Python before 3.13 does not quote a carriage return, at which readers end the row.
        (quoted if any("\r" in cell for cell in row) else plain).writerow(row)
    content = text.getvalue().encode("utf-8", "surrogateescape")
    write_atomically(path, lambda file: file.write(content))
