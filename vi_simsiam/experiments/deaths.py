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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vi_simsiam.config import SOFTPLUS, TrainConfig, preset
from vi_simsiam.engine.checkpoint import write_atomically, write_json
from vi_simsiam.errors import InputError
from vi_simsiam.experiments.plan import Arm, Plan, PlanOptions, finished, scaled, with_data
from vi_simsiam.text import counted

DIMS, RATES = (128, 256, 512, 2048), (0.0125, 0.03, 0.06, 0.1)
_LOG_EVERY = 5
_LINES = 5
"""Lines of metrics that are averaged: one batch says little about a concentration."""
_LEAST_COSINE, _LEAST_RATIO = 0.1, 0.1


def deaths(options: PlanOptions) -> Plan:
    """`seeds` runs of the loss as it is at every D and learning rate, a third as many of the softplus, one of SimSiam."""
    options = with_data(options, "fashion-mini")
    base = dataclasses.replace(scaled(preset(options.preset), options), log_every=_LOG_EVERY)
    arms = []
    for dim in DIMS if options.dim is None else (options.dim,):
        for rate in RATES:
            config = dataclasses.replace(base, lr=rate, model=dataclasses.replace(base.model, dim=dim))
            softplus = dataclasses.replace(config, loss=SOFTPLUS)
            simsiam = dataclasses.replace(config, method="simsiam")
            at = f"d{dim}-lr{rate:g}"
            arms += [
                Arm(f"vi-simsiam-{at}", config, "the default loss"),
                Arm(
                    f"softplus-{at}",
                    softplus,
                    "the likelihood alone, kappa = (D-1) softplus(raw)",
                    seeds=-(-options.seeds // 3),
                ),
                Arm(f"simsiam-{at}", simsiam, "SimSiam", seeds=1),
            ]
    return finished("deaths", options, arms, (arms[0].name, arms[1].name, "cosine"), measures=())


def summarise_deaths(out: Path) -> Path:
    """Write OUT/runs.json and OUT/summary.md from OUT/results/*.json, whatever runs are there; returns the path of the latter.

    Raises:
        InputError: a result is damaged.
    """
    rows = _judged([_row(path) for path in sorted((out / "results").glob("*.json"))])
    write_json(out / "runs.json", {"runs": rows})
    options = json.loads((out / "plan.json").read_text())["options"]
    text = markdown(rows, options)
    write_atomically(out / "summary.md", lambda file: file.write(text.encode()))
    return out / "summary.md"


def _row(path: Path) -> dict[str, Any]:
    """What counts of a result."""
    try:
        result = json.loads(path.read_text())
        config = TrainConfig.from_dict({**result["config"], "data_root": "data", "cache_dir": None})
        curve = {name: np.array(values) for name, values in result["curve"].items()}
        row: dict[str, Any] = {
            "arm": result["arm"].partition("-d")[0] if config.method == "vi-simsiam" else "simsiam",
            "data": result["data"],
            "dim": config.model.dim,
            "lr": config.lr,
            "seed": result["seed"],
            "steps": result["steps"],
            "cosine": _end(curve["cosine"]),
        }
        if config.method == "vi-simsiam":
            row |= {"kappa": _end(curve["kappa"]), "kappa_best": _end(curve["kappa_best"])}
            later = curve["epoch"] > 1
            kappa, best = (_smooth(curve[name][later]) for name in ("kappa", "kappa_best"))
            ratios = kappa / np.maximum(best, 1e-6)
            row |= {"least_ratio": float(f"{ratios.min():.3g}"), "largest_ratio": float(f"{ratios.max():.3g}")}
        return row
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"out: {path} is damaged ({error})") from error


def _end(values: np.ndarray) -> float:
    return float(f"{values[-_LINES:].mean():.4g}")


def _smooth(values: np.ndarray) -> np.ndarray:
    return np.convolve(values, np.ones(_LINES) / _LINES, mode="valid") if len(values) >= _LINES else values


def _judged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the reason for which a run counts as dead, None for those that live.

    A concentration is dead below a tenth of the best one. A network is dead if predictions and targets end at right angles
    where SimSiam's, with the same images, D and learning rate, do not.
    """
    reference: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row["arm"] == "simsiam":
            reference.setdefault((row["data"], row["dim"], row["lr"]), []).append(row["cosine"])
    judged = []
    for row in rows:
        dead = None
        simsiam = reference.get((row["data"], row["dim"], row["lr"]), [])
        if "kappa" in row and row["kappa"] < _LEAST_RATIO * row["kappa_best"]:
            dead = "kappa"
        if row["cosine"] < _LEAST_COSINE and simsiam and statistics.mean(simsiam) > _LEAST_COSINE:
            dead = "cosine" if dead is None else "kappa and cosine"
        judged.append({**row, "dead": dead})
    return judged


def markdown(rows: Sequence[dict[str, Any]], options: dict[str, Any]) -> str:
    """The counts by arm and D, and by arm and learning rate."""
    said = ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)
    lines = [
        "# Experiment deaths",
        "",
        f"{counted(len(rows), 'run')} ({said}). Dead: at the end kappa is below a tenth of the best one for the cosines, or the "
        f"cosine is below {_LEAST_COSINE} where SimSiam's is above it. Ratio: kappa over the best one, smoothed over "
        f"{_LINES * _LOG_EVERY} steps, from the end of the first epoch on, the range of the middle nine tenths of the runs.",
        "",
    ]
    for title, key in (("D", "dim"), ("learning rate", "lr")):
        lines += [
            f"| data | loss | {title} | runs | dead | cosine at the end | least ratio | largest ratio |",
            "|---|" * 8,
        ]
        lines[-1] = "|---|---|---|---|---|---|---|---|"
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault((row["data"], row["arm"], row[key]), []).append(row)
        for (data, arm, value), group in sorted(groups.items()):
            dead = sum(row["dead"] is not None for row in group)
            cosine = f"{statistics.median(row['cosine'] for row in group):.2f}"
            least, largest = (
                _span(row[name] for row in group if name in row) for name in ("least_ratio", "largest_ratio")
            )
            lines.append(f"| {data} | {arm} | {value:g} | {len(group)} | {dead} | {cosine} | {least} | {largest} |")
        lines.append("")
    for arm in sorted({row["arm"] for row in rows}):
        group = [row for row in rows if row["arm"] == arm]
        lines.append(f"- {arm}: {sum(row['dead'] is not None for row in group)} of {counted(len(group), 'run')} dead.")
    return "\n".join(lines) + "\n"


def _span(values: Iterable[float]) -> str:
    found = list(values)
    if not found:
        return "-"
    low, high = np.quantile(found, (0.05, 0.95))
    return f"{low:.2f} to {high:.2f}"
