"""The log of a run, metrics.jsonl: a JSON object for every line of metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, cast

from vi_simsiam.checks import Rule
from vi_simsiam.engine.run import METRICS
from vi_simsiam.files import read_lines

_Figure = float | None


class _Line(TypedDict):
    step: Annotated[float, Rule(lambda x: 0 <= x < 2**53, "at least 0")]
    epoch: NotRequired[Annotated[float, Rule(lambda x: 0 <= x < 2**53, "at least 0")]]
    loss: NotRequired[_Figure]
    cosine: NotRequired[_Figure]
    kappa: NotRequired[_Figure]
    kappa_best: NotRequired[_Figure]
    projection_spread: NotRequired[_Figure]
    z_std: NotRequired[_Figure]
    effective_rank: NotRequired[_Figure]
    grad_norm: NotRequired[_Figure]
    knn: NotRequired[_Figure]
    lr: NotRequired[_Figure]
    views_per_s: NotRequired[_Figure]
    data_wait: NotRequired[_Figure]
    seconds: NotRequired[_Figure]
    state: NotRequired[str]
    since: NotRequired[int]
    captured: NotRequired[bool]
    not_captured: NotRequired[str]


def read_log(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a run's log, and the number of those that are cut off or damaged.

    Damaged lines are left out. A figure is a number, NaN or infinite included, or None; every line
    has its step.

    Args:
        folder: the run folder; there are no lines without a log.

    Raises:
        InputError: the log is no regular file, or cannot be read.
    """
    lines, damaged = read_lines(folder / METRICS, _Line, "run")
    return cast(list[dict[str, Any]], lines), damaged
