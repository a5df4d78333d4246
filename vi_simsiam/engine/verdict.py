"""The state of a training: learning, collapsed, dead or not learning, since when, and a remedy."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any, Literal

from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.log import read_log

State = Literal["learning", "collapsed", "dead", "not learning"]

COLLAPSE_THRESHOLD = 0.3
"""Lower bound of z-std, which is 1 for directions spread evenly over the sphere and 0 if all images
map to one point."""
LEAST_SPREAD = 0.01
"""Below it the projections before the last BatchNorm are nearly equal; z-std does not show that."""
LEAST_RATIO = 0.1
"""A concentration below this multiple of the one that fits the cosines best is dead."""
LEAST_COSINE = 0.1
"""Below it predictions and targets are nearly at right angles."""
NO_COSINE = 0.05
"""Below it they are at right angles: nothing has been learned yet."""
LEAST_WEIGHT = 0.02
"""Gradient of a cosine, as a share of SimSiam's, below which the loss hardly has one."""
_LEAST_BEST = 0.02  # a smaller best concentration is that of no cosine at all
LARGEST_BEST = 10.0
"""Bound of the best kappa/(D - 1), which grows without limit as cosines approach 1."""
STEPS = 100
"""In the first steps cosine and concentration can still have their initial values."""
LINES = 3
"""Number of lines of metrics that are averaged: each describes one batch."""


def problem(metrics: dict[str, Any]) -> str:
    """The problem in a line of metrics, in a few words; empty while the training learns."""
    state = metrics.get("state", "learning")
    return "" if state == "learning" else f"{state} since step {metrics.get('since', '?')}"


class Health:
    """The state of a training after the lines of metrics seen so far.

    - collapsed: all images map to nearly one point, after the last BatchNorm (z_std) or before it
      (spread).
    - dead: kappa is far below the value that fits the cosines best, or so small that the loss
      hardly has a gradient; that of -kappa log(1 + c) is kappa / (1 + c).
    - not learning: predictions and targets are still at right angles.
    - learning: none of these. `vi-simsiam evaluate` measures the quality of the features.

    Until 100 steps, and the warm-up and one more epoch (or the whole training), are over, kappa may
    be far from its best value, and the cosine low. The encoder of a run of fit-kappa is given, and
    only cosine and kappa are judged.

    Attributes:
        state: the state.
        since: step at which the problem began, that of the first averaged line; None for learning.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.state: State = "learning"
        self.since: int | None = None
        self._recent: deque[dict[str, Any]] = deque(maxlen=LINES)
        self._seen: State = "learning"  # the state by the metrics alone, however early
        self._began = 0

    @classmethod
    def of_run(cls, folder: Path, config: TrainConfig) -> Health | None:
        """The state at the end of a run's metrics.jsonl; None if there is no line in it."""
        health, (lines, _) = cls(config), read_log(folder)
        for line in lines:
            health.update(line)
        return health if health._recent else None

    def update(self, metrics: dict[str, Any]) -> bool:
        """Add one line of metrics.

        Args:
            metrics: with the keys cosine and z_std; step, epoch, kappa, kappa_best and
                projection_spread are optional.

        Returns:
            True if another problem begins with this line.
        """
        self._recent.append(metrics)
        seen, at_once = self._score()
        if seen != self._seen:
            self._seen, self._began = seen, int(self._recent[0].get("step", 0))
        before, self.state = self.state, seen if at_once or self._late() else "learning"
        self.since = None if self.state == "learning" else self._began
        return self.state not in ("learning", before)

    @property
    def short(self) -> str:
        """A problem in a few words, empty while the training learns."""
        return problem({"state": self.state, "since": self.since})

    @property
    def line(self) -> str:
        """The verdict: the state, the number behind it, and a remedy if it needs one."""
        name, figure, remedy = self.parts
        since = "" if self.since is None else f" since step {self.since}"
        return f"{name}{since}: {figure}; try {remedy}" if remedy else f"{name}: {figure}"

    @property
    def parts(self) -> tuple[str, str, str]:
        """The state in words, the number behind it, and a remedy; empty for a good state."""
        config, name, kappa = self.config, str(self.state), self._mean("kappa") or 0
        cosine = round(self._mean("cosine") or 0, 2) + 0.0  # no -0.00
        z_std, spread = self._mean("z_std") or 0, self._mean("projection_spread")
        fitting = f"kappa/(D-1) {kappa:.2g}, where {self._best() or 0:.2g} would fit the cosines"
        remedy = f"more --epochs than {config.epochs}"
        if self.state == "collapsed":
            figure = f"z-std {z_std:.2f}"
            if spread is not None and spread < LEAST_SPREAD:
                differs = "of the projections before the last BatchNorm differs between images"
                figure = f"{spread:.1%} {differs}"
            figure += ", all images are mapped to nearly one point"
            remedy = (
                f"a smaller --lr than {config.lr:g}, a smaller --weight-decay than "
                f"{config.weight_decay:g} or a longer --warmup-epochs"
            )
        elif self.state == "dead":
            share = f"{self._weight():.1%} of the gradient of SimSiam's"
            weak = f"kappa/(D-1) {kappa:.2g}, the loss has {share}"
            figure, remedy = fitting if self._behind() else weak, self._remedy()
        elif name == "not learning" or cosine < LEAST_COSINE:
            name = name if name == "not learning" else "barely learned"
            hardly = "two views of an image are predicted hardly better than by chance (0)"
            figure = f"cosine {cosine:.2f}, {hardly}"
            if config.augment.crop_scale[0] < 0.5 and not config.fitted:
                remedy += ", or --crop-scale 0.5 1 for milder views"
        elif self._behind():
            name, figure = "kappa not fitted yet", fitting
        else:
            figure = (
                f"cosine {cosine:.2f} between the views of an image, z-std {z_std:.2f} "
                "(1: spread evenly, 0: collapsed)"
            )
            return "learned", figure, ""
        return name, figure, remedy

    def _mean(self, name: str, most: float = math.inf) -> float | None:
        values = [min(line[name], most) for line in self._recent if line.get(name) is not None]
        return sum(values) / len(values) if values else None

    def _weight(self) -> float:
        """Gradient of the loss with respect to a small cosine, as a share of SimSiam's."""
        loss, kappa = self.config.loss, self._mean("kappa")
        if kappa is None or loss.concentration == "detached":
            return 1.0
        return loss.cosine_weight + kappa * (self.config.model.dim - 1) * self.config.loss_scale

    def _score(self) -> tuple[State, bool]:
        """The state by the recent lines, and True if it is a problem at any time of a training."""
        z_std, spread = self._mean("z_std"), self._mean("projection_spread")
        if not self.config.fitted:
            if z_std is not None and z_std < COLLAPSE_THRESHOLD:
                return "collapsed", True
            if spread is not None and spread < LEAST_SPREAD:
                return "collapsed", True
            if self._weight() < LEAST_WEIGHT:
                return "dead", True
        if self._behind():
            return "dead", False
        if (self._mean("cosine") or 0) < NO_COSINE:
            return "not learning", False
        return "learning", False

    def _late(self) -> bool:
        last, config = self._recent[-1], self.config
        warm: bool = last.get("epoch", math.inf) >= min(1 + config.warmup_epochs, config.epochs)
        return warm and last.get("step", STEPS) >= STEPS

    def _best(self) -> float | None:
        """The best kappa/(D - 1) that can be reached."""
        maximum = self.config.loss.concentration_max
        reachable = math.inf if maximum is None else maximum / (self.config.model.dim - 1)
        return self._mean("kappa_best", most=min(LARGEST_BEST, reachable))

    def _behind(self) -> bool:
        """True if kappa is far below the best one, and should follow it: with the scale D - 1."""
        loss, kappa, best = self.config.loss, self._mean("kappa"), self._best()
        if kappa is None or best is None or loss.concentration == "constant":
            return False
        if loss.concentration_scale not in (None, self.config.model.dim - 1):
            return False
        return best > _LEAST_BEST and kappa < LEAST_RATIO * best

    def _remedy(self) -> str:
        config, loss = self.config, self.config.loss
        slower = f"a smaller --lr than {config.lr:g}"
        if config.fitted:
            return f"more --epochs than {config.epochs}"
        if loss.concentration == "constant":
            return f"a larger --concentration-value than {loss.concentration_value}"
        with_cosine = loss.cosine_weight > 0 or loss.concentration == "detached"
        safe = loss.concentration_link == "quadratic" and with_cosine
        remedy = slower if safe else "--concentration-link quadratic --cosine-weight 1"
        clip = "" if config.clip_norm is not None else ", --clip-norm 1"
        return f"{remedy}{clip} or another --seed"
