"""The state of a training, from its metrics: learning, collapsed, dead or not learning, since when, and what to try."""

from __future__ import annotations

import contextlib
import json
import math
from collections import deque
from pathlib import Path
from typing import Any, Literal

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.run import METRICS

State = Literal["learning", "collapsed", "dead", "not learning"]

COLLAPSE_THRESHOLD = 0.3
"""z-std * sqrt(D) is 1 for directions spread evenly over the sphere and 0 when all images map to one point."""
LEAST_SPREAD = 0.01
"""Below this part the projections before the last BatchNorm are nearly the same; z-std after it does not show that."""
LEAST_RATIO = 0.1
"""Below this multiple of the concentration that fits the cosines best a concentration is dead."""
LEAST_COSINE = 0.1
"""Below this predictions and targets are at right angles."""
_LEAST_WEIGHT = 0.02  # gradient of a cosine, as a share of SimSiam's
_LEAST_BEST = 0.02  # a smaller best concentration is that of no cosine at all
_STEPS = 100  # in which a cosine may still be what it was at the start
_LINES = 3
"""Lines of metrics that are averaged: each is of one batch."""


def problem(metrics: dict[str, Any]) -> str:
    """The problem that a line of metrics names, in a few words; nothing while the training learns."""
    state = metrics.get("state", "learning")
    return "" if state == "learning" else f"{state} since step {metrics['since']}"


class Health:
    """The state of a training after the lines of metrics seen so far.

    - collapsed: all images are mapped to nearly one point, seen after the last BatchNorm (z_std) or before it (spread).
    - dead: kappa is far below the one that would fit the cosines best; or it is so small that the loss hardly has a
      gradient, that of -kappa log(1 + c) being kappa / (1 + c).
    - not learning: predictions and targets are still at right angles.
    - learning: none of these. What the features are worth is for `vi-simsiam evaluate` to measure.

    A kappa may be far from its best value, and a cosine low, until the warm-up and another epoch are over.

    Attributes:
        state: the state.
        since: step of the first of the three lines that showed it; None for learning.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.state: State = "learning"
        self.since: int | None = None
        self._recent: deque[dict[str, Any]] = deque(maxlen=_LINES)

    @classmethod
    def of_run(cls, folder: Path, config: TrainConfig) -> Health | None:
        """The state at the end of a run's metrics.jsonl; None where nothing was logged, or what cannot be read."""
        health = cls(config)
        try:
            for line in (folder / METRICS).read_text(errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last one may be cut off
                    health.update(json.loads(line))
            return health if health._recent and health.line else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def update(self, metrics: dict[str, Any]) -> bool:
        """Take one more line of metrics; returns whether another problem begins with it.

        Args:
            metrics: the keys cosine and z_std are read; step, epoch, kappa, kappa_best and projection_spread where they are there.
        """
        self._recent.append(metrics)
        state = self._judged() if len(self._recent) == _LINES else "learning"
        if state == self.state:
            return False
        self.state = state
        self.since = None if state == "learning" else int(self._recent[0].get("step", 0))
        return state != "learning"

    @property
    def short(self) -> str:
        """A problem in a few words, nothing while the training learns."""
        return problem({"state": self.state, "since": self.since})

    @property
    def line(self) -> str:
        """The verdict: the state with the figure that it rests on and what to try."""
        config, state = self.config, self._judged()
        cosine, z_std = round(self._mean("cosine") or 0, 2) + 0.0, self._mean("z_std") or 0  # no -0.00
        clip = "" if config.clip_norm is not None else ", --clip-norm 1"
        since = f" since step {self.since}" if self.since else ""
        kappa, best = self._mean("kappa"), self._mean("kappa_best")
        if state == "collapsed":
            varying = self._mean("projection_spread")
            figure = f"z-std {z_std:.2f}"
            if varying is not None and varying < LEAST_SPREAD:
                figure = f"{varying:.1%} of the projections before the last BatchNorm differs between images"
            return (
                f"collapsed{since}: {figure}, all images are mapped to nearly one point; try a smaller --lr than "
                f"{config.lr:g}, a smaller --weight-decay than {config.weight_decay:g} or a longer --warmup-epochs"
            )
        if state == "dead":
            best = None if best is None else self._reachable(best)
            if best is not None and kappa is not None and kappa < LEAST_RATIO * best:
                figure = f"kappa/(D-1) {kappa:.2g}, where {best:.2g} would fit the cosines"
            else:
                figure = f"kappa/(D-1) {kappa:.2g}, the loss has {self._weight():.1%} of the gradient of SimSiam's"
            safe = config.loss.concentration_link == "quadratic" and config.loss.cosine_weight > 0
            way = f"a smaller --lr than {config.lr:g}" if safe else "--concentration-link quadratic --cosine-weight 1"
            return f"dead{since}: {figure}; try {way}{clip} or another --seed"
        if state == "not learning" or (config.frozen_run is None and cosine < LEAST_COSINE):
            what = state if state == "not learning" else "barely learned"
            milder = "" if config.augment.crop_scale[0] >= 0.5 else ", or --crop-scale 0.5 1 for milder views"
            return (
                f"{what}{since}: cosine {cosine:.2f}, two views of an image are predicted hardly better than by "
                f"chance (0); try more --epochs than {config.epochs}{milder}"
            )
        if config.frozen_run is not None:
            return f"kappa fitted: kappa/(D-1) {kappa:.3g} at a mean cosine of {cosine:.2f}"
        return f"learned: cosine {cosine:.2f} between the views of an image, z-std {z_std:.2f} (1: spread evenly, 0: collapsed)"

    def _mean(self, name: str) -> float | None:
        values = [line[name] for line in self._recent if name in line]
        return sum(values) / len(values) if values else None

    def _weight(self) -> float:
        """Gradient of the loss with respect to a small cosine, as a share of SimSiam's."""
        loss, dim, kappa = self.config.loss, self.config.model.dim, self._mean("kappa")
        if kappa is None or loss.concentration == "detached":
            return 1.0
        scale = 1 / (dim - 1) if loss.loss_scale is None else loss.loss_scale
        return loss.cosine_weight + kappa * (dim - 1) * scale

    def _judged(self) -> State:
        kappa, best, spread = (self._mean(name) for name in ("kappa", "kappa_best", "projection_spread"))
        loss, frozen, last = self.config.loss, self.config.frozen_run is not None, self._recent[-1]
        if not frozen:
            after = self._mean("z_std")
            if (after is not None and after < COLLAPSE_THRESHOLD) or (spread is not None and spread < LEAST_SPREAD):
                return "collapsed"
            if self._weight() < _LEAST_WEIGHT:
                return "dead"
        late = last.get("epoch", math.inf) >= 1 + self.config.warmup_epochs
        # A kappa with another scale than D - 1 is not meant to follow.
        follows = loss.concentration != "constant" and loss.concentration_scale is None
        if late and follows and kappa is not None and best is not None:
            best = self._reachable(best)
            if best > _LEAST_BEST and kappa < LEAST_RATIO * best:
                return "dead"
        late = late and last.get("step", _STEPS) >= _STEPS
        if late and not frozen and (self._mean("cosine") or 0) < LEAST_COSINE:
            return "not learning"
        return "learning"

    def _reachable(self, best: float) -> float:
        """The best kappa/(D - 1) that the bound on kappa allows."""
        maximum = self.config.loss.concentration_max
        return best if maximum is None else min(best, maximum / (self.config.model.dim - 1))
