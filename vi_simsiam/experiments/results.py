"""The numbers of an experiment, by data set and arm: what tables and figures show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vi_simsiam.config import PLACE_FIELDS, flat
from vi_simsiam.engine.verdict import COLLAPSE_THRESHOLD
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.results import unpack_bits
from vi_simsiam.experiments.plan import MEASURES
from vi_simsiam.experiments.statistics import concentration_ratio, difference, estimate
from vi_simsiam.text import counted

Run = dict[str, Any]
"""The content of a result file."""
Arms = dict[str, list[Run]]
_LEVELS = {"8/10 of all runs' last": 0.8, "9/10 of it": 0.9, "all runs' last": 1.0}
_ENDINGS = ("ratio", "z_std", "effective_rank", "grad_median", "grad_max")


@dataclass(frozen=True)
class Experiment:
    """A plan and those of its runs that have a result."""

    plan: dict[str, Any]
    arms: Arms
    """By arm, in the plan's order: runs with a result, in the order of their seeds."""
    trials: list[Run]
    """Trials with a result (experiment "tuned")."""
    chosen: dict[str, Any]
    """By arm, {"trial", and its settings}; empty before the trials are done."""
    missing: list[str]
    """Planned runs without a result: not run yet, interrupted or failed."""

    def __repr__(self) -> str:
        arms = counted(len(self.arms), "arm")
        runs = counted(sum(map(len, self.arms.values())), "run")
        return f"Experiment({self.plan['experiment']}: {arms}, {runs}, {len(self.missing)} missing)"

    @classmethod
    def read(cls, out: Path) -> Experiment:
        """Read plan.json and results/*.json of the folder, and its trials if it has any.

        Raises:
            InputError: there is no plan, or a file is damaged.
        """
        plan = load(out / "plan.json", ("experiment", "arms"))
        results, trials = (_results(folder / "results") for folder in (out, out / "trials"))
        file = out / "chosen.json"
        chosen = load(file, ("chosen",))["chosen"] if file.exists() else {}
        tried = plan.get("trials") or {"arms": []}
        seeds = (plan.get("options") or {}).get("seeds") or 0
        names = [arm["name"] for arm in plan["arms"]]
        planned = [(trial["name"], tried["seed"]) for trial in tried["arms"]]
        planned += [(name, seed) for name in names for seed in range(seeds)]
        found = {(result["arm"], result["seed"]) for result in (*results, *trials)}
        arms = {name: [result for result in results if result["arm"] == name] for name in names}
        missing = [f"{arm} with seed {seed}" for arm, seed in planned if (arm, seed) not in found]
        return cls(plan, arms, trials, chosen, missing)

    @property
    def data(self) -> list[str]:
        """Data sets in the plan's order."""
        return list(dict.fromkeys(arm["data"] for arm in self.plan["arms"]))

    def on(self, data: str) -> Arms:
        """Arms on one data set, also those without a finished run."""
        names = [arm["name"] for arm in self.plan["arms"] if arm["data"] == data]
        return {name: self.arms[name] for name in names}

    def short(self, arm: str) -> str:
        """The arm's name without the data set that an experiment on several of them appends."""
        data = next((each["data"] for each in self.plan["arms"] if each["name"] == arm), "")
        return arm.removesuffix(f"-{data.replace(':', '-')}")

    def reference(self, data: str) -> str | None:
        """The arm that others on this data set are compared with, as in the primary comparison."""
        primary = self.plan.get("primary")
        if primary is None:
            return None
        short = self.short(primary["against"])
        return next((arm for arm in self.on(data) if self.short(arm) == short), None)


def collect(experiment: Experiment) -> dict[str, Any]:
    """The numbers of an experiment as plain JSON types; accuracies are shares."""
    plan, primary = experiment.plan, experiment.plan.get("primary")
    runs = all_runs(experiment.arms)
    found = None
    if primary is not None:
        pair = (primary["arm"], primary["against"])
        first, second = (experiment.arms[arm] for arm in pair)
        found = {
            **primary,
            "short": [experiment.short(arm) for arm in pair],
            "means": [_accuracy(arm, primary["measure"]) for arm in (first, second)],
            "diverged": [len(_diverged(arm)) for arm in (first, second)],
            "difference": _compare(first, second, primary["measure"]),
        }
    return {
        "experiment": plan["experiment"],
        "created": plan.get("created"),
        "primary": found,
        "data": {data: _data_set(experiment, data) for data in experiment.data},
        "trials": _trials(experiment),
        "chosen": experiment.chosen,
        "missing": experiment.missing,
        "devices": sorted({run["device"] for run in runs}),
        "versions": _occurring(
            f"{name} {value}" for run in runs for name, value in run.get("versions", {}).items()
        ),
        "commits": _occurring(run.get("commit") for run in runs),
        "dates": _range(str(run["date"])[:10] for run in runs if run.get("date")),
    }


def _data_set(experiment: Experiment, data: str) -> dict[str, Any]:
    arms, reference = experiment.on(data), experiment.reference(data)
    every = all_runs(arms)
    names = measures(every)
    described = {arm["name"]: arm for arm in experiment.plan["arms"]}
    published = experiment.plan.get("published", {})
    rows = {}
    for arm, runs in arms.items():
        against = {} if reference in (None, arm) else {name: arms[str(reference)] for name in names}
        rows[arm] = {
            "short": experiment.short(arm),
            "note": described[arm].get("note", ""),
            "inferred": described[arm].get("inferred", []),
            "seeds": [run["seed"] for run in runs],
            "diverged": _diverged(runs),
            "accuracy": {name: _accuracy(runs, name) for name in names},
            "difference": {name: _compare(runs, other, name) for name, other in against.items()},
            "published": published.get(arm, {}),
            "uncertainty": _uncertainty(runs),
            "stability": stability_of(runs),
            "seconds": _range(run["seconds"] for run in runs if run.get("seconds") is not None),
        }
    differing, common = _settings(arms)
    return {
        "reference": reference,
        "measures": names,
        "images": _occurring(run.get("images") for run in every),
        "val_images": _occurring(run.get("val_images") for run in every),
        "arms": rows,
        "differing": differing,
        "common": common,
        "times": _times(arms, published),
    }


def _times(arms: Arms, published: dict[str, Any]) -> dict[str, Any] | None:
    """Training seconds to the kNN accuracies that all runs reached, and to the published one."""
    progress = {
        # Training seconds and kNN accuracy (k = 200) of every measurement during training.
        arm: [
            list(zip(curve["knn200_seconds"], curve["knn200"], strict=True))
            for curve in (run.get("curve") or {} for run in runs)
            if curve.get("knn200")
        ]
        for arm, runs in arms.items()
    }
    last = [each[-1][1] for runs in progress.values() for each in runs]
    if not last:
        return None
    levels = {name: share * min(last) for name, share in _LEVELS.items()}
    for arm in arms:
        if "knn200" in published.get(arm, {}):
            levels["published"] = published[arm]["knn200"]

    def first_time(run: list[tuple[float, float]], level: float) -> float | None:
        return min((seconds for seconds, share in run if share >= level), default=None)

    rows = {
        arm: [[first_time(run, level) for run in runs] for level in levels.values()]
        for arm, runs in progress.items()
    }
    return {"common": min(last), "levels": levels, "arms": rows}


def _trials(experiment: Experiment) -> dict[str, Any] | None:
    planned = experiment.plan.get("trials")
    if not planned:
        return None
    runs = {run["arm"]: run for run in experiment.trials}
    rows = [
        {
            "trial": trial["name"],
            "settings": trial.get("settings", {}),
            "accuracy": runs.get(trial["name"], {}).get("accuracy", {}).get(planned["measure"]),
            "diverged": bool(runs.get(trial["name"], {}).get("diverged")),
            "chosen_by": [
                arm for arm, own in experiment.chosen.items() if own["trial"] == trial["name"]
            ],
        }
        for trial in planned["arms"]
    ]
    return {**{name: planned[name] for name in ("measure", "seed", "held_out")}, "rows": rows}


def measures(runs: Iterable[Run]) -> list[str]:
    """Accuracies that any run has: those of `MEASURES` first, then the others."""
    accuracies = [run.get("accuracy", {}) for run in runs]
    found = [name for each in accuracies for name in each if each[name] is not None]
    return [name for name in dict.fromkeys((*MEASURES, *found)) if name in found]


def _accuracy(runs: list[Run], measure: str) -> dict[str, Any] | None:
    """Mean, standard deviation and n of an accuracy over seeds; None if no run has it."""
    return _estimate(run.get("accuracy", {}).get(measure) for run in runs)


def _uncertainty(runs: list[Run]) -> dict[str, Any]:
    """Estimates of the numbers in the runs' uncertainty, and the values that occur of strings."""
    flat = [run.get("uncertainty") or {} for run in runs]
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for each in flat for name in each):
        values = [each.get(name) for each in flat]
        strings = {value for value in values if isinstance(value, str)}
        found[name] = sorted(strings) if strings else _estimate(values)
    return found


def _compare(first: list[Run], second: list[Run], measure: str) -> dict[str, Any] | None:
    """The accuracy of one arm minus that of another.

    Returns:
        `Difference.to_dict()`; with None for the interval and what follows from it if a run has no
        bits that show which images it got right; None if an arm was not measured.

    Raises:
        InputError: runs were measured on different numbers of images, or their bits are damaged.
    """
    arms = [
        [run for run in arm if run.get("accuracy", {}).get(measure) is not None]
        for arm in (first, second)
    ]
    if not all(arms):
        return None
    if all(measure in run.get("correct", {}) for arm in arms for run in arm):
        sizes = {run["val_images"] for arm in arms for run in arm}
        if len(sizes) > 1:
            given = " and ".join(map(str, sorted(sizes)))
            raise InputError(f"results: runs were measured on {given} images; not alike")
        (size,) = sizes
        bits = [
            np.stack([unpack_bits(run["correct"][measure], size).numpy() for run in arm])
            for arm in arms
        ]
        return difference(*bits).to_dict()
    means = [float(np.mean([run["accuracy"][measure] for run in arm])) for arm in arms]
    none = dict.fromkeys(("low", "high", "verdict", "images", "over_seeds"))
    return {"value": means[0] - means[1], **none, "seeds": [len(arm) for arm in arms]}


def columns(run: Run) -> dict[str, NDArray[np.float64]]:
    """The curve of a run as float64 columns, NaN where a value is missing.

    A run with kappa has the column "ratio", kappa / kappa*.
    """
    found = {
        name: np.array(values, dtype=np.float64)
        for name, values in (run.get("curve") or {}).items()
        if isinstance(values, list)
    }
    if "kappa" in found and "cosine" in found:
        found["ratio"] = concentration_ratio(found["kappa"], found["cosine"])
    return found


def stability_of(runs: list[Run]) -> dict[str, Any]:
    """The state at the end of an arm's trainings, as means over seeds.

    Returns:
        {"ratio", "z_std", "effective_rank", "grad_median", "grad_max": estimate or None,
        "collapsed" and "diverged": number of runs, "runs": number of runs with a curve}.
    """
    rows = [_ending(columns(run)) for run in runs]
    spread = [row["z_std"] for row in rows if "z_std" in row]
    return {
        **{name: _estimate(row.get(name) for row in rows) for name in _ENDINGS},
        "collapsed": sum(value < COLLAPSE_THRESHOLD for value in spread),
        "diverged": len(_diverged(runs)),
        "runs": len(spread),
    }


def _ending(curve: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    """Means of the last epoch, and median and maximum of the gradient norm over the training."""
    epoch = curve.get("epoch", np.empty(0))
    if not len(epoch):
        return {}
    last = epoch > epoch[-1] - 1
    shown = {name: curve[name][last] for name in _ENDINGS if name in curve}
    found = {name: np.nanmean(part) for name, part in shown.items() if np.isfinite(part).any()}
    norm = curve.get("grad_norm", np.empty(0))
    if np.isfinite(norm).any():
        found |= {"grad_median": np.nanmedian(norm), "grad_max": np.nanmax(norm)}
    return {name: float(value) for name, value in found.items()}


def _settings(arms: Arms) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Settings in which arms differ, {field: {arm: value}}, and those that all have.

    The seed and the fields of the place are left out. Where the runs of an arm differ, its value is
    the list of all values.
    """
    found = {arm: [flat(run["config"]) for run in runs] for arm, runs in arms.items() if runs}
    differing: dict[str, dict[str, Any]] = {}
    common: dict[str, Any] = {}
    for name in dict.fromkeys(name for runs in found.values() for run in runs for name in run):
        if name == "seed" or name in PLACE_FIELDS:
            continue
        values = {arm: _one([run.get(name) for run in runs]) for arm, runs in found.items()}
        first = next(iter(values.values()))
        if all(value == first for value in values.values()):
            common[name] = first
        else:
            differing[name] = values
    return differing, common


def _one(values: list[Any]) -> Any:
    """The value that all have, or the list of those that occur."""
    found = [value for i, value in enumerate(values) if value not in values[:i]]
    return found[0] if len(found) == 1 else found


def _estimate(values: Iterable[Any]) -> dict[str, Any] | None:
    numbers = [float(value) for value in values if value is not None and math.isfinite(value)]
    return vars(estimate(numbers)) if numbers else None


def all_runs(arms: Arms) -> list[Run]:
    """Runs of all arms."""
    return [run for runs in arms.values() for run in runs]


def _diverged(runs: list[Run]) -> list[int]:
    """Seeds of the runs whose loss stopped being finite."""
    return [run["seed"] for run in runs if run.get("diverged")]


def _occurring(values: Iterable[Any]) -> list[Any]:
    return sorted({value for value in values if value is not None})


def _range(values: Iterable[Any]) -> list[Any] | None:
    found = sorted(values)
    return [found[0], found[-1]] if found else None


def _results(folder: Path) -> list[Run]:
    found = [load(path, ("arm", "seed", "data", "config")) for path in folder.glob("*.json")]
    return sorted(found, key=lambda result: (result["arm"], result["seed"]))


def load(path: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Read a JSON file of an experiment.

    Raises:
        InputError: the file is missing or damaged, or lacks one of the fields `needed`.
    """
    if not path.is_file():
        raise InputError(
            f"out: {path.parent} has no {path.name}; it must be the folder of an experiment"
        )
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"out: {path} cannot be read ({error})") from error
    fields = content if isinstance(content, dict) else {}
    lacking = [name for name in needed if name not in fields]
    if lacking or not isinstance(content, dict):
        raise InputError(
            f"out: {path} lacks {', '.join(lacking) or 'its fields'}; "
            "it is no file of an experiment"
        )
    return content
