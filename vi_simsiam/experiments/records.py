"""What the results of an experiment say: by arm and data set, as plain numbers that tables and figures show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vi_simsiam.config import PLACE_FIELDS
from vi_simsiam.engine.verdict import COLLAPSE_THRESHOLD
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.results import unpack_bits
from vi_simsiam.experiments.plan import MEASURES
from vi_simsiam.experiments.statistics import Difference, concentration_ratio, difference, estimate
from vi_simsiam.text import counted


@dataclass(frozen=True)
class Experiment:
    """A plan and those of its runs that have a result."""

    plan: dict[str, Any]
    arms: dict[str, list[dict[str, Any]]]
    """By arm, in the plan's order: runs with a result, in the order of their seeds."""
    trials: list[dict[str, Any]]
    """The same of trials, those of the experiment "tuned"."""
    chosen: dict[str, Any]
    """By arm, {"trial", and the settings that it has by it}; empty before the trials are done."""
    missing: list[str]
    """Planned runs without a result: not run yet, interrupted or failed."""

    def __repr__(self) -> str:
        runs = counted(sum(map(len, self.arms.values())), "run")
        return f"Experiment({self.plan['experiment']}: {counted(len(self.arms), 'arm')}, {runs}, {len(self.missing)} missing)"

    @classmethod
    def read(cls, out: Path) -> Experiment:
        """Read OUT/plan.json and OUT/results/*.json; of an experiment with trials OUT/trials/results/*.json and OUT/chosen.json.

        Raises:
            InputError: there is no plan, or a file is damaged.
        """
        plan = _load(out / "plan.json", ("experiment", "arms"))
        names = [arm["name"] for arm in plan["arms"]]
        results, trials = (_results(folder / "results") for folder in (out, out / "trials"))
        chosen = (
            _load(out / "chosen.json", ("chosen",))["chosen"]
            if (out / "chosen.json").exists()
            else {}
        )
        planned = [
            (trial["name"], plan["trials"]["seed"])
            for trial in (plan.get("trials") or {}).get("arms", [])
        ]
        planned += [
            (name, seed)
            for name in names
            for seed in range((plan.get("options") or {}).get("seeds") or 0)
        ]
        there = {(result["arm"], result["seed"]) for result in (*results, *trials)}
        return cls(
            plan,
            {name: [result for result in results if result["arm"] == name] for name in names},
            trials,
            chosen,
            [f"{arm} with seed {seed}" for arm, seed in planned if (arm, seed) not in there],
        )

    @property
    def data(self) -> list[str]:
        """Data sets in the plan's order."""
        return list(dict.fromkeys(arm["data"] for arm in self.plan["arms"]))

    def on(self, data: str) -> dict[str, list[dict[str, Any]]]:
        """Arms on one data set, also those without a finished run."""
        return {
            arm["name"]: self.arms[arm["name"]] for arm in self.plan["arms"] if arm["data"] == data
        }

    def short(self, arm: str) -> str:
        """The arm's name without that of its data set, which an experiment on several of them adds."""
        data = next((each["data"] for each in self.plan["arms"] if each["name"] == arm), "")
        return arm.removesuffix(f"-{data.replace(':', '-')}")

    def reference(self, data: str) -> str | None:
        """The arm that others on this data set are compared with: the primary comparison's."""
        primary = self.plan.get("primary")
        if primary is None:
            return None
        return next(
            (arm for arm in self.on(data) if self.short(arm) == self.short(primary["against"])),
            None,
        )


def collect(experiment: Experiment) -> dict[str, Any]:
    """The numbers of an experiment as plain JSON types; accuracies are shares."""
    plan, primary = experiment.plan, experiment.plan.get("primary")
    runs = [run for arm in experiment.arms.values() for run in arm]
    found = None
    if primary is not None:
        arms = [experiment.arms[primary[role]] for role in ("arm", "against")]
        found = {
            **primary,
            "short": [experiment.short(primary[role]) for role in ("arm", "against")],
            "means": [accuracy_of(arm, primary["measure"]) for arm in arms],
            "diverged": [sum(bool(run.get("diverged")) for run in arm) for arm in arms],
            "difference": compare(arms[0], arms[1], primary["measure"]),
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
    names = measures((run for runs in arms.values() for run in runs), MEASURES)
    described = {arm["name"]: arm for arm in experiment.plan["arms"]}
    rows = {}
    for arm, runs in arms.items():
        compared = reference is not None and arm != reference
        rows[arm] = {
            "short": experiment.short(arm),
            "note": described[arm].get("note", ""),
            "inferred": described[arm].get("inferred", []),
            "seeds": [run["seed"] for run in runs],
            "diverged": [run["seed"] for run in runs if run.get("diverged")],
            "accuracy": {name: accuracy_of(runs, name) for name in names},
            "difference": {name: compare(runs, arms[str(reference)], name) for name in names}
            if compared
            else {},
            "published": experiment.plan.get("published", {}).get(arm, {}),
            "uncertainty": uncertainty_of(runs),
            "stability": stability_of(runs),
            "seconds": _range(run["seconds"] for run in runs if run.get("seconds") is not None),
        }
    differing, common = settings(arms)
    every = [run for runs in arms.values() for run in runs]
    return {
        "reference": reference,
        "measures": names,
        "images": _occurring(run.get("images") for run in every),
        "val_images": _occurring(run.get("val_images") for run in every),
        "arms": rows,
        "differing": differing,
        "common": common,
        "times": _times(arms, experiment, data),
    }


def _times(
    arms: dict[str, list[dict[str, Any]]], experiment: Experiment, data: str
) -> dict[str, Any] | None:
    """Training seconds to the kNN accuracies that all runs reached in the end, and to the published one."""
    with_progress = {arm: [run for run in runs if _progress(run)] for arm, runs in arms.items()}
    last = [_progress(run)[-1][1] for runs in with_progress.values() for run in runs]
    if not last:
        return None
    levels = {name: share * min(last) for name, share in _SHARES.items()}
    published = experiment.plan.get("published", {})
    for figures in (published[arm] for arm in arms if arm in published):
        if "knn200" in figures:
            levels["published"] = figures["knn200"]
    rows = {
        arm: [times_to(runs, level) for level in levels.values()]
        for arm, runs in with_progress.items()
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
                arm for arm, choice in experiment.chosen.items() if choice["trial"] == trial["name"]
            ],
        }
        for trial in planned["arms"]
    ]
    return {
        "measure": planned["measure"],
        "seed": planned["seed"],
        "held_out": planned["held_out"],
        "rows": rows,
    }


def measures(runs: Iterable[dict[str, Any]], order: Sequence[str]) -> list[str]:
    """Accuracies that any run has: those in `order` first, then the others."""
    found = dict.fromkeys(
        name for run in runs for name, value in run.get("accuracy", {}).items() if value is not None
    )
    return [name for name in order if name in found] + [name for name in found if name not in order]


def accuracy_of(runs: list[dict[str, Any]], measure: str) -> dict[str, Any] | None:
    """Mean, standard deviation and n of an accuracy over the seeds of an arm; None if no run has it."""
    return _estimate(run.get("accuracy", {}).get(measure) for run in runs)


def uncertainty_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The same of every number in the runs' uncertainty; of what is no number, the values that occur."""
    flat = [run.get("uncertainty") or {} for run in runs]
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for each in flat for name in each):
        values = [each.get(name) for each in flat]
        if any(isinstance(value, str) for value in values):
            found[name] = sorted({value for value in values if isinstance(value, str)})
        else:
            found[name] = _estimate(values)
    return found


def compare(
    first: list[dict[str, Any]], second: list[dict[str, Any]], measure: str
) -> dict[str, Any] | None:
    """The accuracy of one arm minus that of another: with an interval where the runs say which images they got right.

    Returns:
        `Difference.to_dict()`; without bits {"value", "low": None, "high": None, "verdict": None, ...}; None if an arm was not
        measured.

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
            raise InputError(
                f"results: runs were measured on {' and '.join(map(str, sorted(sizes)))} images; not alike"
            )
        bits = [
            np.stack(
                [unpack_bits(run["correct"][measure], run["val_images"]).numpy() for run in arm]
            )
            for arm in arms
        ]
        found: Difference = difference(bits[0], bits[1])
        return found.to_dict()
    means = [float(np.mean([run["accuracy"][measure] for run in arm])) for arm in arms]
    none = dict.fromkeys(("low", "high", "verdict", "images", "over_seeds"))
    return {"value": means[0] - means[1], **none, "seeds": [len(arm) for arm in arms]}


def columns(run: dict[str, Any]) -> dict[str, NDArray[np.float64]]:
    """The curve of a run as float64 columns, NaN where a value is missing, with "ratio", kappa / kappa*, where it has kappa."""
    found = {
        name: np.array([math.nan if value is None else float(value) for value in values])
        for name, values in (run.get("curve") or {}).items()
        if isinstance(values, list)
    }
    if "kappa" in found and "cosine" in found:
        found["ratio"] = concentration_ratio(found["kappa"], found["cosine"])
    return found


def stability_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How an arm's runs ended, means over seeds: the last epoch's kappa / kappa*, z-std and effective rank, the gradient norm.

    Returns:
        {"ratio", "z_std", "effective_rank", "grad_median", "grad_max": estimate or None, "collapsed" and
        "diverged": number of runs, "runs": how many of all have a curve}.
    """
    rows = [_ending(columns(run)) for run in runs]
    found: dict[str, Any] = {name: _estimate(row.get(name) for row in rows) for name in _ENDINGS}
    spread = [row["z_std"] for row in rows if "z_std" in row]
    found["collapsed"] = sum(value < COLLAPSE_THRESHOLD for value in spread)
    found["diverged"] = sum(bool(run.get("diverged")) for run in runs)
    return {**found, "runs": len(spread)}


def times_to(runs: list[dict[str, Any]], level: float) -> list[float | None]:
    """Training seconds until the kNN accuracy (k = 200) during training first was at least `level`; None where it never was."""
    found: list[float | None] = []
    for run in runs:
        found.append(
            min((seconds for seconds, share in _progress(run) if share >= level), default=None)
        )
    return found


def settings(
    arms: dict[str, list[dict[str, Any]]],
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Fields of the runs' configurations: those in which arms differ, {field: {arm: value}}, and those that all have.

    The seed, and where and how a run happened, are left out. Where the runs of an arm differ, its value is a list of all values.
    """
    flat = {arm: [dict(_flat(run["config"])) for run in runs] for arm, runs in arms.items() if runs}
    differing: dict[str, dict[str, Any]] = {}
    common: dict[str, Any] = {}
    for name in dict.fromkeys(name for runs in flat.values() for run in runs for name in run):
        if name == "seed" or name in PLACE_FIELDS:
            continue
        values = {arm: _one([run.get(name) for run in runs]) for arm, runs in flat.items()}
        first = next(iter(values.values()))
        if all(value == first for value in values.values()):
            common[name] = first
        else:
            differing[name] = values
    return differing, common


_SHARES = {"8/10 of all runs' last": 0.8, "9/10 of it": 0.9, "all runs' last": 1.0}
_ENDINGS = ("ratio", "z_std", "effective_rank", "grad_median", "grad_max")


def _progress(run: dict[str, Any]) -> list[tuple[float, float]]:
    """Training seconds and kNN accuracy (k = 200) of every look that was taken during training."""
    curve = run.get("curve") or {}
    return list(zip(curve.get("knn200_seconds", ()), curve.get("knn200", ()), strict=True))


def _ending(curve: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    """Means of the last epoch, and median and maximum of the gradient norm over the whole training; without what is missing."""
    epoch = curve.get("epoch", np.empty(0))
    if not len(epoch):
        return {}
    last = epoch > epoch[-1] - 1
    shown = {name: curve[name][last] for name in _ENDINGS if name in curve}
    found = {
        name: float(np.nanmean(values))
        for name, values in shown.items()
        if np.isfinite(values).any()
    }
    norm = curve.get("grad_norm", np.empty(0))
    if np.isfinite(norm).any():
        found.update(grad_median=float(np.nanmedian(norm)), grad_max=float(np.nanmax(norm)))
    return found


def _estimate(values: Iterable[Any]) -> dict[str, Any] | None:
    numbers = [float(value) for value in values if value is not None and math.isfinite(value)]
    return vars(estimate(numbers)) if numbers else None


def _occurring(values: Iterable[Any]) -> list[Any]:
    return sorted({value for value in values if value is not None})


def _range(values: Iterable[Any]) -> list[Any] | None:
    found = sorted(values)
    return [found[0], found[-1]] if found else None


def _one(values: list[Any]) -> Any:
    """The value that all have, or the list of those that occur."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found[0] if len(found) == 1 else found


def _flat(plain: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for name, value in plain.items():
        items += (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else [(prefix + name, value)]
        )
    return items


def _results(folder: Path) -> list[dict[str, Any]]:
    found = [_load(path, ("arm", "seed", "data", "config")) for path in folder.glob("*.json")]
    return sorted(found, key=lambda result: (result["arm"], result["seed"]))


def _load(path: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"out: {path.parent} has no {path.name}; it must be the folder of an experiment"
        )
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"out: {path} cannot be read ({error})") from error
    lacking = [name for name in needed if not isinstance(content, dict) or name not in content]
    if lacking or not isinstance(content, dict):
        raise InputError(
            f"out: {path} lacks {', '.join(lacking) or 'its fields'}; it is no file of an experiment"
        )
    return content
