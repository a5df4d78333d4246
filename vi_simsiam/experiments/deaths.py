"""The experiment "deaths": how many of many short trainings end with a network or a concentration that has stopped learning.

The loss as it is, the likelihood alone with kappa = (D-1) softplus(raw), and SimSiam beside them, over dimensions, learning
rates and seeds. Nothing is measured but the training itself: a run's last lines of metrics, and how far its concentration
was from the best one on the way.

OUT/runs.json       a row for every run
OUT/summary.md      the counts
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vi_simsiam.config import SOFTPLUS, LossConfig, TrainConfig, preset
from vi_simsiam.engine.checkpoint import write_atomically, write_json
from vi_simsiam.engine.verdict import LEAST_COSINE, LEAST_RATIO
from vi_simsiam.errors import InputError
from vi_simsiam.experiments.plan import Arm, Plan, PlanOptions, finished, scaled, with_data
from vi_simsiam.paths import printable

DIMS, RATES = (128, 256, 512, 2048), (0.0125, 0.03, 0.06, 0.1)
_SIMSIAM = 4
"""Runs of SimSiam, which the others are held to."""
_LOG_EVERY = 5
_LINES = 5
"""Lines of metrics that are averaged: one batch says little about a concentration."""
_LOW, _HIGH = 0.5, 2.0
"""Where a concentration that follows its best value lies, as a multiple of it."""


def deaths(options: PlanOptions) -> Plan:
    """`seeds` runs of the loss as it is at every D and learning rate, a quarter as many of softplus, at most four of SimSiam.

    Raises:
        InputError: fewer than two epochs, or an arm that there is not.
    """
    options = with_data(options, "fashion-mini")
    base = dataclasses.replace(scaled(preset(options.preset), options), log_every=_LOG_EVERY)
    if base.epochs < 2:
        raise InputError(
            f"epochs: {base.epochs} is not accepted; kappa is followed from the second epoch on"
        )
    arms = []
    for dim in DIMS if options.dim is None else (options.dim,):
        for rate in RATES:
            model = dataclasses.replace(base.model, dim=dim)
            config = dataclasses.replace(base, lr=rate, model=model, loss=LossConfig())
            softplus = dataclasses.replace(config, loss=SOFTPLUS)
            simsiam = dataclasses.replace(config, method="simsiam")
            at = f"d{dim}-lr{rate:g}"
            arms += [
                Arm(f"vi-simsiam-{at}", config, "the default loss"),
                Arm(
                    f"softplus-{at}",
                    softplus,
                    "the likelihood alone, kappa = (D-1) softplus(raw)",
                    seeds=-(-options.seeds // 4),
                ),
                Arm(f"simsiam-{at}", simsiam, "SimSiam", seeds=min(options.seeds, _SIMSIAM)),
            ]
    made = finished("deaths", options, arms, (arms[0].name, arms[1].name, ""), measures=())
    return dataclasses.replace(made, primary=None)  # it counts, and compares nothing


def summarise_deaths(out: Path) -> Path:
    """Write OUT/runs.json and OUT/summary.md from OUT/results/*.json, whatever runs are there; returns the path of the latter.

    Raises:
        InputError: a result is damaged.
    """
    paths = sorted((out / "results").glob("*.json"))
    results = [_read(path) for path in paths]
    rows = _judged([_row(path, result) for path, result in zip(paths, results, strict=True)])
    options = json.loads((out / "plan.json").read_text())["options"]
    runs = {"runs": rows, "made": {"options": _said(options), **_made(results)}}
    write_json(out / "runs.json", runs)
    text = markdown(runs)
    write_atomically(out / "summary.md", lambda file: file.write(printable(text).encode()))
    return out / "summary.md"


def _said(options: dict[str, Any]) -> str:
    given = {
        name: " ".join(value) if isinstance(value, list) else value
        for name, value in options.items()
    }
    return ", ".join(
        f"{name} {value}" for name, value in given.items() if value is not None and name != "trials"
    )


def _made(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Where, with what and when the runs were made."""
    versions = results[0]["versions"]
    return {
        "devices": ", ".join(sorted({result["device"] for result in results})),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commits": ", ".join(sorted({str(result["commit"]) for result in results})),
        "measured": max(result["date"] for result in results).partition("T")[0],
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"out: {path} is damaged ({error})") from error
    return result


def _row(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The row of a result."""
    try:
        config = TrainConfig.from_dict({**result["config"], "data_root": "data", "cache_dir": None})
        curve = {name: np.array(values) for name, values in result["curve"].items()}
        row: dict[str, Any] = {
            "arm": result["arm"].partition("-d")[0] if config.method == "vi-simsiam" else "simsiam",
            "data": result["data"],
            "dim": config.model.dim,
            "lr": config.lr,
            "seed": result["seed"],
            "steps": result["steps"],
        }
        if "diverged" in result:
            return {**row, "cosine": 0.0, "dead": "diverged"}
        row["cosine"] = _end(curve["cosine"])
        if config.method == "vi-simsiam":
            row |= {"kappa": _end(curve["kappa"]), "kappa_best": _end(curve["kappa_best"])}
            later = curve["epoch"] > 1
            kappa, best = (_smooth(curve[name][later]) for name in ("kappa", "kappa_best"))
            ratios = kappa / np.maximum(best, 1e-6)
            row |= {
                "least_ratio": float(f"{ratios.min():.3g}"),
                "largest_ratio": float(f"{ratios.max():.3g}"),
            }
        return row
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"out: {path} is damaged ({error})") from error


def _end(values: np.ndarray) -> float:
    return float(f"{values[-_LINES:].mean():.4g}")


def _smooth(values: np.ndarray) -> np.ndarray:
    return (
        np.convolve(values, np.ones(_LINES) / _LINES, mode="valid")
        if len(values) >= _LINES
        else values
    )


def _judged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the reason for which a run counts as dead, None for those that live.

    A concentration is dead below a tenth of the best one. A network is dead if predictions and targets end at right angles
    where SimSiam's, with the same images, D and learning rate, do not: in the run with the same seed, which has the same
    batches in the same order, or else on the average of its seeds.
    """
    reference: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        if row["arm"] == "simsiam":
            reference.setdefault((row["data"], row["dim"], row["lr"]), {})[row["seed"]] = row[
                "cosine"
            ]
    judged = []
    for row in rows:
        simsiam = reference.get((row["data"], row["dim"], row["lr"]), {-1: 0.0})
        reasons = []
        if "kappa" in row and row["kappa"] < LEAST_RATIO * row["kappa_best"]:
            reasons.append("kappa")
        if (
            row["cosine"]
            < LEAST_COSINE
            < simsiam.get(row["seed"], statistics.mean(simsiam.values()))
        ):
            reasons.append("cosine")
        judged.append({"dead": " and ".join(reasons) or None} | row)
    return judged


def markdown(runs: dict[str, Any]) -> str:
    """What the runs show: the counts over all, by D and by learning rate."""
    rows = runs["runs"]
    by_arm = _groups(rows, "arm")
    counts = "; ".join(f"{arm} {_dead(group)}" for (arm,), group in by_arm.items())
    held = ""
    if ours := [row for row in rows if row["arm"] == "vi-simsiam"]:
        kept = sum(
            "kappa" in row and _LOW <= row["kappa"] / max(row["kappa_best"], 1e-6) <= _HIGH
            for row in ours
        )
        follow = sum(
            "kappa" in row and _LOW <= row["least_ratio"] <= row["largest_ratio"] <= _HIGH
            for row in ours
        )
        held = (
            f" At the end kappa is between {_LOW} and {_HIGH:g} times the best one in {kept} of {len(ours)} runs of vi-simsiam,"
            f" throughout from the second epoch on in {follow}."
        )
    sections = {
        "Result": f"Dead runs: {counts}. SimSiam, to which the others are held, counts only where it diverges.{held}",
        "Dimensions": _table(rows, "D", "dim"),
        "Learning rates": _table(rows, "learning rate", "lr"),
        "Runs": "\n".join(f"- {name}: {value}" for name, value in runs["made"].items()),
    }
    return "# Experiment deaths\n" + "".join(
        f"\n## {title}\n\n{text}\n" for title, text in sections.items()
    )


def _dead(rows: Sequence[dict[str, Any]]) -> str:
    """The number of dead runs, with the reasons in brackets."""
    reasons = Counter(row["dead"] for row in rows if row["dead"] is not None)
    named = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    return f"{reasons.total()} of {len(rows)}{f' ({named})' if named else ''}"


def _groups(
    rows: Sequence[dict[str, Any]], *names: str
) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return dict(sorted(groups.items()))


def _table(rows: Sequence[dict[str, Any]], title: str, name: str) -> str:
    lines = [
        f"| data | loss | {title} | runs | dead | cosine at the end | below {LEAST_COSINE} | least κ/κ* | largest κ/κ* |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (data, arm, value), group in _groups(rows, "data", "arm", name).items():
        dead = sum(row["dead"] is not None for row in group)
        cosine = f"{statistics.median(row['cosine'] for row in group):.2f}"
        low = sum(row["cosine"] < LEAST_COSINE and row["dead"] != "diverged" for row in group)
        least, largest = (
            _span(row[ratio] for row in group if ratio in row)
            for ratio in ("least_ratio", "largest_ratio")
        )
        lines.append(
            f"| {data} | {arm} | {value:g} | {len(group)} | {dead} | {cosine} | {low} | {least} | {largest} |"
        )
    return "\n".join(lines)


def _span(values: Iterable[float]) -> str:
    found = list(values)
    if not found:
        return "-"
    low, high = np.quantile(found, (0.05, 0.95))
    return f"{low:.2f} to {high:.2f}"
