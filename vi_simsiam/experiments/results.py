"""The numbers of an experiment, by data set and arm: what tables and figures show."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vi_simsiam.config import PLACE_FIELDS, TrainConfig, flat
from vi_simsiam.engine.verdict import COLLAPSE_THRESHOLD
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.results import unpack_bits
from vi_simsiam.experiments.forms import Chosen, read_plan, read_run
from vi_simsiam.experiments.plan import MEASURES, TUNED
from vi_simsiam.experiments.purposes import compared
from vi_simsiam.experiments.runner import CHOSEN, PLAN, RESULTS, TRIALS
from vi_simsiam.experiments.statistics import difference, estimate
from vi_simsiam.files import read_json

Run = dict[str, Any]
"""The content of a result file."""
Arms = dict[str, list[Run]]
_LEVELS = {"8/10 of all runs' last": 0.8, "9/10 of it": 0.9, "all runs' last": 1.0}
_NO_INTERVAL = dict.fromkeys(("low", "high", "verdict", "images", "over_seeds"))
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

    @classmethod
    def read(cls, out: Path) -> Experiment:
        """Read plan.json and results/*.json of the folder, and its trials if it has any."""
        plan = read_plan(out / PLAN)
        results, trials = (_results(folder / RESULTS) for folder in (out, out / TRIALS))
        chosen: dict[str, Any] = {}
        if os.path.lexists(out / CHOSEN):
            chosen |= read_json(out / CHOSEN, Chosen, "out")["chosen"]
        names = [arm["name"] for arm in plan["arms"]]
        tried = plan["trials"] or {"arms": []}
        planned = [(trial["name"], tried["seed"]) for trial in tried["arms"]]
        planned += [(name, seed) for name in names for seed in range(plan["options"]["seeds"])]
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
        (data,) = (each["data"] for each in self.plan["arms"] if each["name"] == arm)
        return arm.removesuffix(f"-{data.replace(':', '-')}")

    def purposes(self) -> dict[str, list[dict[str, Any]]]:
        """The scores that the plan compares, `compared` on each data set; empty without any."""
        found = {}
        for data in self.data if self.plan.get("scores") else ():
            arms = {self.short(arm): runs for arm, runs in self.on(data).items()}
            found[data] = compared(self.plan["scores"], arms)
        return found

    def reference(self, data: str) -> str | None:
        """The arm that others on this data set are compared with, as in the primary comparison."""
        if (primary := self.plan["primary"]) is None:
            return None
        short = self.short(primary["against"])
        return next((arm for arm in self.on(data) if self.short(arm) == short), None)


def collect(experiment: Experiment) -> dict[str, Any]:
    """The numbers of an experiment as plain JSON types; accuracies are shares."""
    plan, primary = experiment.plan, experiment.plan["primary"]
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
    content = {
        "experiment": plan["experiment"],
        "created": plan["created"],
        "primary": found,
        "data": {data: _data_set(experiment, data) for data in experiment.data},
        "trials": _trials(experiment),
        "chosen": experiment.chosen,
        "missing": experiment.missing,
        "devices": sorted({run["device"] for run in runs}),
        "versions": _occurring(
            f"{name} {value}" for run in runs for name, value in run["versions"].items()
        ),
        "commits": _occurring(run["commit"] for run in runs),
        "dates": _range(run["date"][:10] for run in runs),
    }
    if purposes := experiment.purposes():
        content["purposes"] = purposes
    return content


def _data_set(experiment: Experiment, data: str) -> dict[str, Any]:
    arms, reference = experiment.on(data), experiment.reference(data)
    every = all_runs(arms)
    names = measures(every)
    described = {arm["name"]: arm for arm in experiment.plan["arms"]}
    published = experiment.plan["published"]
    rows = {}
    for arm, runs in arms.items():
        against = {} if reference in (None, arm) else {name: arms[str(reference)] for name in names}
        rows[arm] = {
            "short": experiment.short(arm),
            "note": described[arm]["note"],
            "inferred": described[arm]["inferred"],
            "seeds": [run["seed"] for run in runs],
            "diverged": _diverged(runs),
            "accuracy": {name: _accuracy(runs, name) for name in names},
            "difference": {name: _compare(runs, other, name) for name, other in against.items()},
            "published": published.get(arm, {}),
            "uncertainty": _uncertainty(runs),
            "stability": _stability(runs),
            "seconds": _range(run["seconds"] for run in runs if run["seconds"] is not None),
        }
    differing, common = _settings(arms)
    return {
        "reference": reference,
        "measures": names,
        "images": _occurring(run["images"] for run in every),
        "val_images": _occurring(run["val_images"] for run in every),
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
            list(zip(run["curve"]["knn200_seconds"], run["curve"]["knn200"], strict=True))
            for run in runs
            if "knn200" in run["curve"]
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
    planned = experiment.plan["trials"]
    if not planned:
        return None
    nothing: Run = {"accuracy": {}}
    runs = {run["arm"]: run for run in experiment.trials}
    rows = [
        {
            "trial": trial["name"],
            "settings": trial["settings"],
            "accuracy": runs.get(trial["name"], nothing)["accuracy"].get(planned["measure"]),
            "diverged": "diverged" in runs.get(trial["name"], nothing),
            "chosen_by": [
                arm for arm, own in experiment.chosen.items() if own["trial"] == trial["name"]
            ],
        }
        for trial in planned["arms"]
    ]
    return {
        **{name: planned[name] for name in ("measure", "seed", "held_out")},
        "rows": rows,
        "choices": [_choice(experiment, arm) for arm in experiment.chosen],
    }


def _choice(experiment: Experiment, name: str) -> dict[str, Any]:
    """The settings of an arm's best trial, each with the smallest and the largest one tried.

    Raises InputError if chosen.json names an arm or a trial that was not planned.
    """
    trials = {trial["name"]: trial for trial in experiment.plan["trials"]["arms"]}
    trial = experiment.chosen[name]["trial"]
    if name not in experiment.arms or trial not in trials:
        raise InputError(
            f"out: {CHOSEN} is damaged (it has an arm or a trial that was not planned)"
        )
    best = trials[trial]
    own = [each for each in trials.values() if all(each[x] == best[x] for x in ("method", "data"))]
    tried = {each: [one["settings"][each] for one in own] for each in TUNED}
    return {
        "short": experiment.short(name),
        "settings": {
            each: {"value": best["settings"][each], "low": min(x), "high": max(x)}
            for each, x in tried.items()
        },
    }


def measures(runs: Iterable[Run]) -> list[str]:
    """Accuracies that any run has."""
    found = {name for run in runs for name in run["accuracy"]}
    return [name for name in MEASURES if name in found]


def _accuracy(runs: list[Run], measure: str) -> dict[str, Any] | None:
    return estimate(run["accuracy"].get(measure) for run in runs)


def _uncertainty(runs: list[Run]) -> dict[str, Any]:
    """Estimates of the numbers in the runs' uncertainty, and the values that occur of strings."""
    flat = [run["uncertainty"] for run in runs]
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for each in flat for name in each):
        values = [each[name] for each in flat if name in each]
        strings = {value for value in values if isinstance(value, str)}
        found[name] = sorted(strings) if strings else estimate(values)
    return found


def _compare(first: list[Run], second: list[Run], measure: str) -> dict[str, Any] | None:
    """The `difference` of two arms' accuracies; None if one of them was not measured.

    Without an interval if the features are the same, or a run has no bits that show which images it
    got right. Raises InputError if runs were measured on different numbers of images, or their bits
    are damaged.
    """
    arms = [[run for run in arm if measure in run["accuracy"]] for arm in (first, second)]
    if not all(arms):
        return None
    if _same_features(first, second):
        return {**_NO_INTERVAL, "value": 0.0, "seeds": [len(arm) for arm in arms], "same": True}
    if all(measure in run["correct"] for arm in arms for run in arm):
        sizes = _occurring(run["val_images"] for arm in arms for run in arm)
        if len(sizes) > 1:
            given = " and ".join(map(str, sizes))
            raise InputError(f"results: runs were measured on {given} images; not alike")
        return difference(
            *(
                np.stack([unpack_bits(run["correct"][measure], sizes[0]).numpy() for run in arm])
                for arm in arms
            )
        )
    means = [float(np.mean([run["accuracy"][measure] for run in arm])) for arm in arms]
    return {
        **_NO_INTERVAL,
        "value": means[0] - means[1],
        "seeds": [len(arm) for arm in arms],
    }


def _same_features(first: list[Run], second: list[Run]) -> bool:
    """True if distributions were fitted to the runs of the second arm, whose features they have."""
    fitted = all(TrainConfig.from_dict(run["config"]).fitted for run in first)
    right = [[run["correct"] for run in runs] for runs in (first, second)]
    return fitted and all(right[0]) and right[0] == right[1]


def columns(run: Run) -> dict[str, NDArray[np.float64]]:
    """The curve of a run as float64 columns.

    A run with kappa has the column "ratio", kappa / kappa*, where kappa* = (D - 1) c / (1 - c)
    minimises the loss at the cosine c; it is NaN for c outside (0, 1).
    """
    found = {name: np.array(values, dtype=np.float64) for name, values in run["curve"].items()}
    if "kappa" in found:
        cosine = found["cosine"]
        inside = np.where((cosine > 0) & (cosine < 1), cosine, np.nan)
        found["ratio"] = found["kappa"] * (1 - inside) / inside
    return found


def _stability(runs: list[Run]) -> dict[str, Any]:
    """The state at the end of an arm's trainings, as means over seeds, and numbers of runs."""
    endings = [_ending(columns(run)) for run in runs if "epoch" in run["curve"]]
    return {
        **{name: estimate(ending.get(name) for ending in endings) for name in _ENDINGS},
        "collapsed": sum(ending.get("z_std", 1.0) < COLLAPSE_THRESHOLD for ending in endings),
        "diverged": len(_diverged(runs)),
        "runs": len(endings),
    }


def _ending(curve: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    """Means of the last epoch, and median and maximum of the gradient norm over the training."""
    last = curve["epoch"] > curve["epoch"][-1] - 1
    shown = {name: curve[name][last] for name in _ENDINGS if name in curve}
    found = {name: np.nanmean(part) for name, part in shown.items() if np.isfinite(part).any()}
    norm = curve.get("grad_norm", last[:0])
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
        first, *others = values.values()
        if all(value == first for value in others):
            common[name] = first
        else:
            differing[name] = values
    return differing, common


def _one(values: list[Any]) -> Any:
    """The value that all have, or the list of those that occur."""
    found = [value for i, value in enumerate(values) if value not in values[:i]]
    return found[0] if len(found) == 1 else found


def all_runs(arms: Arms) -> list[Run]:
    """Runs of all arms."""
    return [run for runs in arms.values() for run in runs]


def _diverged(runs: list[Run]) -> list[int]:
    """Seeds of the runs whose loss stopped being finite."""
    return [run["seed"] for run in runs if "diverged" in run]


def _occurring(values: Iterable[Any]) -> list[Any]:
    return sorted({value for value in values if value is not None})


def _range(values: Iterable[Any]) -> list[Any] | None:
    found = sorted(values)
    return [found[0], found[-1]] if found else None


def _results(folder: Path) -> list[Run]:
    found = [read_run(path) for path in folder.glob("*.json")]
    return sorted(found, key=lambda run: (run["arm"], run["seed"]))
