"""Forms of an experiment's files, with the ranges that its tables and figures rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, cast

from vi_simsiam.checks import NOT_NEGATIVE, SEED, Rule, at_least, is_name
from vi_simsiam.config import TrainConfig
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.forms import Count, Label, Share, Text
from vi_simsiam.evaluation.results import unpack_bits
from vi_simsiam.experiments.plan import MEASURES, TUNED
from vi_simsiam.files import read_json

_PROGRESS = ("knn200", "knn200_epoch", "knn200_seconds")

_Measure = Annotated[str, Rule(lambda x: x in MEASURES, f"one of {', '.join(MEASURES)}")]
_Seed = Annotated[int, SEED]
_Place = Annotated[str, Rule(lambda x: bool(x) and is_name(x), "a path")]
_Seconds = Annotated[float, NOT_NEGATIVE]
_Setting = float | bool | str | None


def _tried(settings: dict[str, _Setting]) -> bool:
    return all(type(settings.get(name)) in (int, float) for name in TUNED)


class _Arm(TypedDict):
    name: Label
    note: Text
    inferred: list[Label]
    data: Label


class _Trial(TypedDict):
    name: Label
    method: Label
    data: Label
    settings: Annotated[dict[Label, _Setting], Rule(_tried, f"numbers for {' and '.join(TUNED)}")]


class _Trials(TypedDict):
    seed: _Seed
    held_out: Share
    measure: _Measure
    arms: list[_Trial]


class _Primary(TypedDict):
    arm: Label
    against: Label
    measure: _Measure
    data: Label


class _Options(TypedDict):
    seeds: Annotated[int, Rule(lambda x: 1 <= x <= 1000, "between 1 and 1000")]


_FEW = Rule(lambda x: len(x) <= 100, "at most 100 entries")
_ARMS = Rule(
    lambda x: len(x) <= 100 and len({arm["name"] for arm in x}) == len(x),
    "at most 100 arms with different names",
)


_SCORE = Rule(lambda x: len(x) == 2, "an arm and a score")


class _Plan(TypedDict):
    experiment: Label
    primary: _Primary | None
    arms: Annotated[list[_Arm], _ARMS]
    published: dict[Label, dict[Label, Share]]
    options: _Options
    trials: _Trials | None
    scores: NotRequired[Annotated[list[Annotated[list[Label], _SCORE]], _FEW] | None]
    created: Label


class _Choice(TypedDict):
    trial: Label


class Chosen(TypedDict):
    """chosen.json."""

    accuracy: dict[Label, Share]
    chosen: dict[Label, _Choice]


def _agree(curve: dict[str, list[Any]]) -> bool:
    """True if the columns of the log have one length, and those of the kNN accuracies one."""
    progress = {len(curve[name]) for name in _PROGRESS if name in curve}
    logged = {len(values) for name, values in curve.items() if name not in _PROGRESS}
    whole = {"knn200", "knn200_seconds"} <= curve.keys() if progress else True
    needed = {"epoch", "cosine"} <= curve.keys() if logged else True
    return whole and needed and all(len(x) <= 1 and 0 not in x for x in (progress, logged))


def _named(figures: dict[str, float | str]) -> bool:
    # A data set, whose name is part of its figures', may be called anything else.
    return all(name.endswith("_baseline_name") == isinstance(x, str) for name, x in figures.items())


class RunResult(TypedDict):
    """results/ARM-seed-N.json."""

    arm: Label
    seed: _Seed
    data: Label
    method: Label
    config: dict[str, Any]
    images: Count | None
    seconds: _Seconds | None
    curve: Annotated[dict[Label, list[float]], Rule(_agree, "columns of one length with an epoch")]
    accuracy: dict[Label, Share]
    correct: dict[Label, str]
    val_images: Annotated[int, at_least(1)] | None
    uncertainty: Annotated[dict[Label, float | str], Rule(_named, "numbers, and names as text")]
    device: Label
    versions: dict[Label, Label | None]
    commit: Label | None
    date: Label
    purposes: NotRequired[Annotated[dict[Label, Annotated[dict[Label, Share], _FEW]], _FEW]]
    steps: NotRequired[Count | None]
    diverged: NotRequired[Text]


class Spec(TypedDict):
    """runs/ARM-seed-N.json, the specification of a run."""

    experiment: Label
    arm: Label
    seed: _Seed
    config: dict[str, Any]
    fitted: bool
    after: _Place | None
    folder: _Place
    result: _Place
    measures: list[Label]
    uncertainty: bool
    ood: list[_Place]
    val_images: Annotated[int, at_least(1)] | None
    progress_every: Annotated[int, at_least(1)] | None


class Trained(TypedDict):
    """trained.json."""

    steps: NotRequired[Count]
    images: NotRequired[Count]
    seconds: NotRequired[_Seconds]


class ProgressLine(TypedDict):
    """A line of progress.jsonl."""

    knn200: Share
    knn200_epoch: Annotated[float, NOT_NEGATIVE]
    knn200_seconds: _Seconds
    step: Annotated[float, NOT_NEGATIVE]


class _SeedRun(TypedDict):
    seed: _Seed
    exit: int | None
    seconds: NotRequired[_Seconds]
    process: NotRequired[int | None]


_RUNS = Rule(
    lambda x: 0 < len(x) == len({run["seed"] for run in x}),
    "runs of different seeds, at least one",
)


class Seeds(TypedDict):
    """seeds.json."""

    arguments: list[str]
    runs: Annotated[list[_SeedRun], _RUNS]


def read_plan(path: Path) -> dict[str, Any]:
    """The content of plan.json.

    Raises:
        InputError: there is none, or it is damaged.
    """
    plan = read_json(path, _Plan, "out")
    names, primary = {arm["name"] for arm in plan["arms"]}, plan["primary"]
    if primary is not None and not {primary["arm"], primary["against"]} <= names:
        raise InputError(f"out: {path} is damaged (an arm of the primary comparison is missing)")
    return cast(dict[str, Any], plan)


def read_run(path: Path) -> dict[str, Any]:
    """The content of a run's result file; its curve may hold NaN.

    Raises:
        InputError: there is none, or it is damaged.
    """
    run = cast(dict[str, Any], read_json(path, RunResult, "out", finite=False))
    try:
        TrainConfig.from_dict(run["config"])
        for bits in run["correct"].values():
            unpack_bits(bits, run["val_images"] or 0)
    except InputError as error:
        raise InputError(f"out: {path} is damaged ({error})") from error
    return run
