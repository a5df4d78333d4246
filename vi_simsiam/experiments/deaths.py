"""Summary of the experiment "deaths": trainings whose network or concentration stopped learning.

OUT/runs.json       a row for every run
OUT/summary.md      the counts
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.verdict import LEAST_COSINE, LEAST_RATIO
from vi_simsiam.errors import InputError
from vi_simsiam.experiments.forms import read_plan, read_run
from vi_simsiam.experiments.runner import MARKDOWN, PLAN, RESULTS
from vi_simsiam.files import write_json, write_text
from vi_simsiam.text import each_text, markdown

_LINES = 5
"""Lines of metrics that are averaged, since the concentration of one batch is noisy."""
_LOW, _HIGH = 0.5, 2.0
"""Range of a concentration that follows its best value, as multiples of that value."""
_LEAST_BEST = 1e-6
_COLUMNS = (
    "runs", "dead", "cosine at the end", f"below {LEAST_COSINE}", "least κ/κ*", "largest κ/κ*",
)  # fmt: skip

Row = dict[str, Any]


def summarise_deaths(out: Path) -> Path:
    """Write OUT/runs.json and OUT/summary.md from the results; returns the path of summary.md."""
    results = [read_run(path) for path in sorted((out / RESULTS).glob("*.json"))]
    rows = _judged([_row(result) for result in results])
    given = read_plan(out / PLAN)["options"]
    options = (
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in given.items()
        if value is not None and name != "trials"
    )
    runs = {
        "runs": rows,
        "made": {
            "options": ", ".join(options),
            "devices": ", ".join(sorted({result["device"] for result in results})),
            "versions": ", ".join(f"{name} {of}" for name, of in results[0]["versions"].items()),
            "commits": ", ".join(sorted({str(result["commit"]) for result in results})),
            "measured": max(result["date"] for result in results).partition("T")[0],
        },
    }
    path = out / MARKDOWN
    write_json(out / "runs.json", runs)
    write_text(path, deaths_markdown(runs))
    return path


def _row(result: dict[str, Any]) -> Row:
    config = TrainConfig.from_dict({**result["config"], "data_root": "data", "cache_dir": None})
    curve = {name: np.array(values) for name, values in result["curve"].items()}
    row = {
        "arm": result["arm"].partition("-d")[0] if config.method == "vi-simsiam" else "simsiam",
        "data": result["data"],
        "dim": config.model.dim,
        "lr": config.lr,
        "seed": result["seed"],
        "steps": result.get("steps"),
    }
    if "diverged" in result:
        return {**row, "cosine": 0.0, "dead": "diverged"}
    needed = ("cosine", *(("kappa", "kappa_best") if config.method == "vi-simsiam" else ()))
    if missing := [name for name in needed if name not in curve]:
        name = f"{result['arm']} with seed {result['seed']}"
        raise InputError(f"out: the curve of {name} lacks {', '.join(missing)}")
    row["cosine"] = _end(curve["cosine"])
    if config.method == "vi-simsiam":
        row |= {"kappa": _end(curve["kappa"]), "kappa_best": _end(curve["kappa_best"])}
        later = curve["epoch"] > 1
        kappa, best = (_smooth(curve[name][later]) for name in ("kappa", "kappa_best"))
        ratios = kappa / np.maximum(best, _LEAST_BEST)
        if len(ratios):
            row["least_ratio"] = float(f"{ratios.min():.3g}")
            row["largest_ratio"] = float(f"{ratios.max():.3g}")
    return row


def _end(values: NDArray[np.float64]) -> float:
    return float(f"{values[-_LINES:].mean():.4g}")


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(values) < _LINES:
        return values
    return np.convolve(values, np.ones(_LINES) / _LINES, mode="valid")


def _judged(rows: Sequence[Row]) -> list[Row]:
    """Add the reason why a run counts as dead; None for a run that is alive.

    A concentration is dead below a tenth of the best one. A network is dead if predictions and
    targets end at right angles while SimSiam's, on the same images and with the same D and learning
    rate, do not: SimSiam's run with the same seed, which has the same batches in the same order, or
    the mean of its seeds where that run is missing.
    """
    reference: dict[tuple[Any, ...], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["arm"] == "simsiam":
            reference[row["data"], row["dim"], row["lr"]][row["seed"]] = row["cosine"]
    judged = []
    for row in rows:
        simsiam = reference[row["data"], row["dim"], row["lr"]]
        cosine = simsiam.get(row["seed"], statistics.mean(simsiam.values() or [0.0]))
        reasons = []
        if "kappa" in row and row["kappa"] < LEAST_RATIO * row["kappa_best"]:
            reasons.append("kappa")
        if row["cosine"] < LEAST_COSINE < cosine:
            reasons.append("cosine")
        judged.append({"dead": " and ".join(reasons) or None} | row)
    return judged


def deaths_markdown(runs: dict[str, Any]) -> str:
    """summary.md: the counts over all runs, by D and by learning rate."""
    runs = each_text(runs, markdown)
    rows = runs["runs"]
    by_arm = _groups(rows, "arm")
    counts = "; ".join(f"{arm} {_dead(group)}" for (arm,), group in by_arm.items())
    result = (
        f"Dead runs: {counts}. SimSiam, to which the others are held, counts only where it "
        "diverges."
    )
    if ours := [row for row in rows if row["arm"] == "vi-simsiam"]:
        fitted = [row for row in ours if "kappa" in row]
        ratios = [row["kappa"] / max(row["kappa_best"], _LEAST_BEST) for row in fitted]
        kept = sum(_LOW <= ratio <= _HIGH for ratio in ratios)
        spans = [row for row in fitted if "least_ratio" in row]
        follow = sum(_LOW <= row["least_ratio"] <= row["largest_ratio"] <= _HIGH for row in spans)
        result += (
            f" At the end kappa is between {_LOW} and {_HIGH:g} times the best one in {kept} of "
            f"{len(ours)} runs of vi-simsiam, throughout from the second epoch on in {follow}."
        )
    sections = {
        "Result": result,
        "Dimensions": _table(rows, "D", "dim"),
        "Learning rates": _table(rows, "learning rate", "lr"),
        "Runs": "\n".join(f"- {name}: {value}" for name, value in runs["made"].items()),
    }
    parts = (f"\n## {title}\n\n{text}\n" for title, text in sections.items())
    return "# Experiment deaths\n" + "".join(parts)


def _dead(rows: Sequence[Row]) -> str:
    """The number of dead runs, with the reasons in brackets."""
    reasons = Counter(row["dead"] for row in rows if row["dead"] is not None)
    named = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    return f"{reasons.total()} of {len(rows)}{f' ({named})' if named else ''}"


def _groups(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return dict(sorted(found.items()))


def _table(rows: Sequence[Row], title: str, name: str) -> str:
    head = f"| data | loss | {title} | {' | '.join(_COLUMNS)} |"
    lines = [head, "|---|---|" + "---:|" * (1 + len(_COLUMNS))]
    for (data, arm, value), group in _groups(rows, "data", "arm", name).items():
        cells = (
            len(group),
            sum(row["dead"] is not None for row in group),
            f"{statistics.median(row['cosine'] for row in group):.2f}",
            sum(row["cosine"] < LEAST_COSINE and row["dead"] != "diverged" for row in group),
            _span([row["least_ratio"] for row in group if "least_ratio" in row]),
            _span([row["largest_ratio"] for row in group if "largest_ratio" in row]),
        )
        lines.append(f"| {data} | {arm} | {value:g} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _span(values: list[float]) -> str:
    if not values:
        return "-"
    low, high = np.quantile(values, (0.05, 0.95))
    return f"{low:.2f} to {high:.2f}"
