"""The state of a run in words: what its files show, by which limit, and what to do about it."""

from __future__ import annotations

import contextlib
import math
import shlex
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine import verdict
from vi_simsiam.engine.checkpoint import last_step
from vi_simsiam.engine.failure import Failure
from vi_simsiam.engine.failure import read as read_failure
from vi_simsiam.engine.kernels import kernels_of
from vi_simsiam.engine.log import read_log
from vi_simsiam.engine.processes import locked
from vi_simsiam.engine.run import LOCK, METRICS, read_config
from vi_simsiam.engine.verdict import Health
from vi_simsiam.errors import InputError, RunWarning

Ending = Literal["finished", "going on", "not finite", "collapsed", "interrupted", "killed"]
Lines = Sequence[dict[str, Any]]

LEAST_RANK = 2.0
"""Effective rank below which a batch lies near a line, whose rank is 1."""
RUNAWAY = 1 / verdict.LEAST_RATIO
"""A kappa of more than so many times the best one, as far from it as a dead one."""
LEAST_BEST = 0.05
"""The best kappa/(D - 1) counts as this at least: kappa starts there, before cosines rise."""
EXPLODED = 100.0
"""Two orders of magnitude: within a run the norm of the gradient keeps its order."""
DECAYED = 0.5
"""Share of the peak learning rate that half of the cosine decay leaves."""
MOST_WAITING = 0.5
"""Share of the time: a step then takes twice as long as it needs to."""
LEAST_RISE = 0.01
"""Rise of the kNN accuracy from one half of a run to the other, with errors of about 2 %."""
GOOD_KNN = 0.9
"""An accuracy that need not rise any more."""
LEAST_FALL = 0.05
"""Fall of the loss between the halves, as a share of the first one, that counts as one."""
_FEWEST_KNN = 4
_FEWEST = 10
"""Lines of metrics below which nothing is compared with the run's own past."""
_QUIET_SECONDS = 120.0
_QUIET_LINES = 5
"""A training writes its next line within these: a disk or another program can delay it."""
_LIMITS = {
    "collapsed": f"z-std below {verdict.COLLAPSE_THRESHOLD:g}, or less than "
    f"{verdict.LEAST_SPREAD:.0%} of the projections' spread",
    "dead": f"kappa below {verdict.LEAST_RATIO:g} times the best one, or less than "
    f"{verdict.LEAST_WEIGHT:.0%} of SimSiam's gradient",
    "kappa not fitted yet": f"kappa below {verdict.LEAST_RATIO:g} times the best one",
    "not learning": f"cosine below {verdict.NO_COSINE:g}",
    "barely learned": f"cosine below {verdict.LEAST_COSINE:g}",
}


@dataclass(frozen=True)
class Finding:
    """A problem of a run."""

    name: str
    figure: str
    """What the run shows."""
    limit: str
    """From where on that is a problem."""
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """The state of a run."""

    title: str
    """How far it has come, and how it ended."""
    findings: tuple[Finding, ...]
    figures: str
    """The last figures of the run."""


def diagnose(folder: Path) -> Diagnosis:
    """Describe the state of a run by its files; its images are not opened.

    Args:
        folder: the run folder.

    Raises:
        InputError: no run there, nothing was logged, or a damaged file.
    """
    config, failure = read_config(folder), read_failure(folder)
    lines, _ = read_log(folder)
    if not lines and failure is None:
        raise InputError(f"run: {folder} has nothing in its {METRICS} yet")
    health = Health(config)
    for line in lines:
        health.update(line)
    last: dict[str, Any] = lines[-1] if lines else {"step": 0}
    step, epoch = last["step"], last.get("epoch")
    known = epoch and math.isfinite(step / epoch)
    total = round(step / epoch * config.epochs) if known else None
    try:
        saved, damage = last_step(folder), None
    except InputError as error:
        saved, damage = None, _damage(folder, error)
    ending = _ending(folder, config, lines, failure, health, saved)
    findings = [damage, _stopped(folder, ending, failure, step, total)]
    if lines:
        findings += [
            _verdict(health, ending),
            _rank(config, lines),
            _runaway(config, lines),
            _gradients(config, lines),
            _waiting(lines),
            _features(lines),
        ]
    if ending in ("interrupted", "killed"):
        findings.append(_rate(config, last))
    of_all = "" if total is None else f" of {total}"
    return Diagnosis(
        f"{config.method}, step {step}{of_all}, {_ENDINGS[ending]}",
        tuple(finding for finding in findings if finding is not None),
        _figures(last, lines, kernels_of(folder, config)),
    )


_ENDINGS: dict[Ending, str] = {
    "finished": "finished",
    "going on": "still going on",
    "not finite": "stopped at a loss that is not finite",
    "collapsed": "stopped since it has collapsed",
    "interrupted": "interrupted",
    "killed": "killed",
}


def _ending(
    folder: Path,
    config: TrainConfig,
    lines: Lines,
    failure: Failure | None,
    health: Health,
    saved: int | None,
) -> Ending:
    """The way in which a run ended, by its files; `saved` is the step of its last checkpoint."""
    logged = lines[-1]["step"] if lines else 0
    # A line is written before its checkpoint; a copy without weights has none.
    whole = saved is None or saved >= logged
    if whole and lines and lines[-1].get("epoch", 0) >= config.epochs:
        return "finished"
    if _is_running(folder, lines):
        return "going on"
    if failure is not None and saved in (None, failure["checkpoint_step"]):
        return "not finite"
    if not whole:
        return "killed"
    return "collapsed" if config.stop_on and health.state == "collapsed" else "interrupted"


def _is_running(folder: Path, lines: Lines) -> bool:
    """True if a training holds the folder's lock, or wrote lately where that cannot be tested."""
    lock, log = folder / LOCK, folder / METRICS
    if lock.exists():
        with warnings.catch_warnings(), contextlib.suppress(OSError, RunWarning):
            warnings.simplefilter("error", RunWarning)
            try:
                with locked(lock, busy=""):
                    return False
            except InputError:
                return True
    seconds = _values(lines[-_FEWEST:], "seconds") or [0.0]
    pause = (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1)
    quiet = time.time() - log.stat().st_mtime if log.exists() else math.inf
    return quiet < max(_QUIET_SECONDS, _QUIET_LINES * pause)


def _damage(folder: Path, error: InputError) -> Finding:
    """The finding of a run of version 0.1, whose one checkpoint cannot be read."""
    return Finding(
        "the weights are damaged",
        str(error).removeprefix("run: "),
        "a run has a checkpoint that can be read",
        f"a copy of that file, or vi-simsiam train --out {shlex.quote(str(folder))} --overwrite",
    )


def _stopped(
    folder: Path, ending: Ending, failure: Failure | None, step: int, total: int | None
) -> Finding | None:
    """The finding of a run that ended before its last step."""
    if ending in ("finished", "going on"):
        return None
    named = shlex.quote(str(folder))
    resume = f"vi-simsiam train --out {named} --resume"
    if failure is not None and ending == "not finite":
        return Finding(
            "the loss is not finite",
            f"{failure['loss']} at step {failure['step']} (epoch {failure['epoch']}); the last "
            f"good checkpoint is that of step {failure['checkpoint_step']}",
            "any such loss ends a training",
            f"a smaller --lr or --clip-norm 1; vi-simsiam doctor {named} --replay shows the batch",
        )
    figure = f"it ended at step {step}" + ("" if total is None else f" of {total}")
    if ending == "killed":
        figure += ", and its checkpoint is of an earlier step: no signal let it save"
    if ending == "collapsed":
        resume += " --stop-on None goes on all the same"
    return Finding(
        {"collapsed": "ended early by --stop-on"}.get(ending, ending),
        figure,
        "a run ends at its last step",
        resume,
    )


def _verdict(health: Health, ending: Ending) -> Finding | None:
    """The verdict, unless it is good, or a run is too young for one."""
    name, figure, remedy = health.parts
    if not remedy or (ending != "finished" and not health.short):
        return None
    since = "" if health.since is None else f" since step {health.since}"
    return Finding(f"{name}{since}", figure, _LIMITS[name], remedy)


def _rank(config: TrainConfig, lines: Lines) -> Finding | None:
    found = _mean(lines[-verdict.LINES :], "effective_rank")
    if config.fitted or found is None or found >= LEAST_RANK:
        return None
    return Finding(
        "few directions",
        f"effective rank {found:.2f}: the targets of a batch lie near a line",
        f"a rank below {LEAST_RANK:g}",
        f"a smaller --lr than {config.lr:g} or a longer --warmup-epochs",
    )


def _runaway(config: TrainConfig, lines: Lines) -> Finding | None:
    kappa, best = (_mean(lines[-verdict.LINES :], name) for name in ("kappa", "kappa_best"))
    if kappa is None or best is None or config.loss.concentration == "constant":
        return None
    if kappa <= RUNAWAY * max(best, LEAST_BEST):
        return None
    remedy = f"more --epochs than {config.epochs}"
    if not config.fitted:
        remedy = f"a smaller --lr than {config.lr:g}, --clip-norm 1, or --concentration-max"
    return Finding(
        "kappa runs away",
        f"kappa/(D-1) {kappa:.2g}, where {best:.2g} would fit the cosines",
        f"more than {RUNAWAY:g} times the best one",
        remedy,
    )


def _gradients(config: TrainConfig, lines: Lines) -> Finding | None:
    norms = _values(lines, "grad_norm")
    if len(norms) < _FEWEST:
        return None
    usual, recent = median(norms), min(norms[-verdict.LINES :])
    if recent <= EXPLODED * usual:
        return None
    clip = "" if config.clip_norm else " or --clip-norm 1"
    return Finding(
        "exploding gradients",
        f"gradient norm {recent:.3g} at least in the last {verdict.LINES} lines, "
        f"{usual:.3g} usually",
        f"more than {EXPLODED:g} times the run's median",
        f"a smaller --lr than {config.lr:g}{clip}",
    )


def _rate(config: TrainConfig, last: dict[str, Any]) -> Finding | None:
    """The finding of a run that ended before its learning rate had fallen."""
    rate = last.get("lr")
    if rate is None or rate < DECAYED * config.lr:
        return None
    return Finding(
        "the learning rate never fell",
        f"{rate:.3g} at the end, where the peak is {config.lr:.3g}: features are best after its "
        "decay to 0",
        f"{DECAYED:g} times the peak or more",
        f"go on to epoch {config.epochs}, or a run with fewer --epochs",
    )


def _waiting(lines: Lines) -> Finding | None:
    found = _mean(lines[-_FEWEST:], "data_wait")
    if found is None or found <= MOST_WAITING:
        return None
    return Finding(
        "training waits for data",
        f"{found:.0%} of the time",
        f"more than {MOST_WAITING:.0%}",
        "more --workers where cores are idle, else a smaller --size; with a GPU --data-memory gpu",
    )


def _features(lines: Lines) -> Finding | None:
    """The finding of a loss that falls while the kNN accuracy does not rise."""
    accuracies, losses = _values(lines, "knn"), _values(lines, "loss")
    if len(accuracies) < _FEWEST_KNN or len(losses) < _FEWEST_KNN:
        return None
    (first, second), (before, after) = _halves(accuracies), _halves(losses)
    best, later = max(first), max(second)
    start, end = sum(before) / len(before), sum(after) / len(after)
    if best >= GOOD_KNN or later >= best + LEAST_RISE or start - end <= LEAST_FALL * abs(start):
        return None
    return Finding(
        "features do not improve",
        f"kNN accuracy {later:.1%} at best in the second half, {best:.1%} in the first, while the "
        f"loss fell from {start:.3g} to {end:.3g}",
        f"a rise of less than {LEAST_RISE:.0%}",
        "other views (--crop-scale, --jitter): the loss can fall by what the views leave alike",
    )


def _figures(last: dict[str, Any], lines: Lines, kernels: str) -> str:
    """The last figures in one line."""
    forms = {
        "loss": "loss {:.4g}", "cosine": "cos {:.2f}", "kappa": "kappa/(D-1) {:.2g}",
        "kappa_best": "{:.2g} would fit", "z_std": "z-std {:.2f}", "effective_rank": "rank {:.0f}",
        "grad_norm": "gradient norm {:.2g}", "lr": "lr {:.2g}",
        "data_wait": "waiting for data {:.0%}",
    }  # fmt: skip
    parts = [form.format(last[name]) for name, form in forms.items() if last.get(name) is not None]
    if accuracies := _values(lines, "knn"):
        parts.append(f"kNN {accuracies[-1]:.1%}, {max(accuracies):.1%} at best")
    return ", ".join([*parts, f"kernels {kernels}"])


def _mean(lines: Lines, name: str) -> float | None:
    values = _values(lines, name)
    return sum(values) / len(values) if values else None


def _values(lines: Lines, name: str) -> list[float]:
    values = [line.get(name) for line in lines]
    return [value for value in values if value is not None and math.isfinite(value)]


def _halves(values: list[float]) -> tuple[list[float], list[float]]:
    middle = len(values) // 2
    return values[:middle], values[middle:]
