"""What a run's concentration is worth as a measure of uncertainty, beside every simpler score: uncertainty.json.

    calibration         whether views come as near to each other as the concentrations claim
    misclassification   whether uncertain images are those that a logistic probe gets wrong
    retrieval           whether uncertain images are those whose nearest neighbour has another class
    ood                 whether images of other data sets are more uncertain than the validation images
    corruptions         whether damage makes images more uncertain

Nothing is fitted to the images that are evaluated, and no score's sign is chosen by how well it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.subsets import subset
from vi_simsiam.engine.checkpoint import write_json
from vi_simsiam.engine.run import Run
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation import metrics
from vi_simsiam.evaluation.calibration import BINS, augmented_views, calibration, pair_cosines
from vi_simsiam.evaluation.corruptions import LEVELS, MAGNITUDES, corrupt
from vi_simsiam.evaluation.foreign import builtin_sets, open_sets, refuse_own_images
from vi_simsiam.evaluation.logistic import LogisticConfig, LogisticProbe, check_classes
from vi_simsiam.evaluation.scores import (
    DESCRIPTIONS,
    JPEG_QUALITY,
    NEIGHBOURS,
    TRIVIAL,
    Network,
    Observed,
    Reference,
    disagreement,
    eval_pixels,
)
from vi_simsiam.info import versions
from vi_simsiam.models import VISimSiam
from vi_simsiam.text import counted

UNCERTAINTY = "uncertainty.json"
VIEWS = 4
"""Augmented views of every image: 12 ordered pairs to calibrate on."""
TRAIN_IMAGES = 4_000
"""Most training images that the probe and the distances are fitted to."""
UNSPLIT_IMAGES = 1_000
"""Most training images evaluated where there are no validation images."""
_PACKAGES = ("torch", "torchvision", "scikit-learn", "scipy", "numpy", "pillow")

_Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Comparison:
    """One figure of the concentration and of the best scores of two kinds, a higher one being better."""

    part: str
    measure: str
    kappa: float | None
    baseline: str | None
    """The score that does best of `TRIVIAL`."""
    value: float | None
    """Its figure."""
    other: str | None = None
    """The score that does best of those that need labels, training images or more passes."""
    other_value: float | None = None
    """Its figure."""

    @property
    def ahead(self) -> bool | None:
        """Whether the concentration does better than the baseline; None if one of them has no figure."""
        return None if self.kappa is None or self.value is None else self.kappa > self.value


@dataclass(frozen=True)
class _Images:
    """The images that are evaluated, and those they are compared with."""

    evaluated: PackedImages
    chosen: NDArray[np.int64]
    train: PackedImages
    reference: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    """Of `chosen`; None without labels of known training classes."""
    reference_labels: NDArray[np.int64] | None
    notes: list[str]


def evaluate_uncertainty(
    run: Run,
    *,
    ood: Sequence[str] = (),
    images: int | None = None,
    seed: int = 0,
    corruption_images: int = 200,
    train_images: int = TRAIN_IMAGES,
    require_kappa: bool = True,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a run's concentration and the scores it competes with; write RUN/uncertainty.json and return its content.

    Without labels "misclassification" is None and "retrieval" lacks the run's own images; "notes" among the settings
    says what is missing and why. Without validation images, training images are evaluated, others than those that
    the distances are measured to. A figure that is not defined is None.

    Args:
        run: the run.
        ood: other data sets, see `foreign`.
        images: most validation images, drawn by `seed`; None for all.
        seed: of every choice of images, of the views and of the damage.
        corruption_images: most images that are damaged, each in 30 ways; 0 for none.
        train_images: most training images that the probe and the distances are fitted to, drawn by `seed`.
        require_kappa: whether a run that predicts no concentration is refused. If it is not, everything but the
            concentration is measured, to compare with.
        report: called with a short phrase at the start of every stage.

    Raises:
        InputError: the run predicts no concentration, numbers out of range, a data set that cannot be opened or is the
            run's own, validation classes that are not the training classes, or damaged weights.
    """
    _check(run, images, seed, corruption_images, train_images, require_kappa)
    config, say = run.config, report or (lambda phrase: None)
    say("opening the data sets")
    found = open_sets(ood, run.splits, config)
    data = _choose(run, images, train_images, seed)
    foreign = [(each, run.readable(each.source)[0]) for each in found]
    notes = [*data.notes]
    for each, packed in foreign:
        if own := refuse_own_images(each, packed, [data.train, data.evaluated]):
            notes.append(
                f"{own:,} of {counted(len(packed), 'image')} of {each.name} are the run's own"
            )

    measured = _Measured(run, data, seed, say)
    for each in builtin_sets(config.augment.size, len(data.chosen), seed):
        foreign.append((each, run.readable(each.source)[0]))
    if data.labels is not None and measured.probe is None:
        notes.append(
            f"one class among {counted(len(data.reference), 'training image')}: misclassification is not measured"
        )
    retrieval: dict[str, Any] = {}
    if data.labels is not None and len(data.labels) > 1:
        retrieval["validation"] = _retrieval(
            measured.embedding, data.labels, measured.scores, seen=True
        )
    detection: dict[str, Any] = {}
    overlapping: dict[str, list[str]] = {}
    for each, packed in foreign:
        say(f"images of {each.name}")
        chosen = _draw(len(packed), len(data.chosen), seed)
        embedding, scores = measured.look(packed, chosen, views=not each.builtin)
        detection[each.name] = {
            "kind": each.kind,
            "images": len(chosen),
            "scores": {
                name: metrics.detection_figures(measured.scores[name], values)
                for name, values in scores.items()
            },
        }
        if packed.labels is not None and len(chosen) > 1:
            shared = sorted(set(packed.classes or ()) & set(data.train.classes or ()))
            retrieval[each.name] = _retrieval(
                embedding, packed.labels[chosen], scores, seen=bool(shared)
            )
            if shared:
                overlapping[each.name] = shared
                notes.append(f"{each.name} shares classes with the run's data: {', '.join(shared)}")

    result = {
        "evaluation": "uncertainty",
        "data": run.splits.name,
        "dim": run.model.dim,
        "images": len(data.chosen),
        "settings": {
            "seed": seed,
            "train_images": len(data.reference),
            "corruption_images": min(corruption_images, len(data.chosen)),
            "views": VIEWS,
            "bins": BINS,
            "neighbours": min(NEIGHBOURS, len(data.reference)),
            "jpeg_quality": JPEG_QUALITY,
            "fpr95": "share of the validation images flagged where 95 % of the other data set's are",
            "overlapping_classes": overlapping,
            "notes": notes,
        },
        "scores": {name: text for name, text in DESCRIPTIONS.items() if name in measured.scores},
        "calibration": measured.calibration,
        "misclassification": _misclassification(measured, data),
        "retrieval": retrieval or None,
        "ood": detection,
        "corruptions": _corruptions(
            run, measured, data, min(corruption_images, len(data.chosen)), seed, say
        ),
        "versions": versions(_PACKAGES),
    }
    write_json(run.path / UNCERTAINTY, result)
    return result


def comparisons(result: dict[str, Any]) -> list[Comparison]:
    """What an uncertainty.json says of the concentration, and of the scores that do best in the same place.

    Trivial scores and those that need more than the concentration does stand apart. The best of several scores on the
    very images that they are compared on has the advantage of the choice. Where none is defined, its name and value are
    None, as is "kappa" for a run without concentrations.
    """
    rows = []
    if result["misclassification"] is not None:
        figures = {
            name: values["auroc"] for name, values in result["misclassification"]["scores"].items()
        }
        rows.append(_comparison("misclassification", "AUROC", figures))
    for name, part in (result["retrieval"] or {}).items():
        rows.append(_comparison(f"retrieval: {name}", "R-AUROC", part["scores"]))
    for name, part in result["ood"].items():
        figures = {score: values["auroc"] for score, values in part["scores"].items()}
        rows.append(_comparison(f"{name} ({part['kind']})", "AUROC", figures))
    for kind, part in result["corruptions"].items():
        figures = {score: values["spearman"] for score, values in part["scores"].items()}
        rows.append(_comparison(f"corruption: {kind}", "Spearman", figures))
    return rows


def _comparison(part: str, measure: str, figures: dict[str, float | None]) -> Comparison:
    def best(names: Iterable[str]) -> tuple[str, float] | tuple[None, None]:
        defined = [(name, value) for name in names if (value := figures.get(name)) is not None]
        return max(defined, key=lambda pair: pair[1]) if defined else (None, None)

    others = [name for name in figures if name != "kappa" and name not in TRIVIAL]
    return Comparison(part, measure, figures.get("kappa"), *best(TRIVIAL), *best(others))


class _Measured:
    """What the network makes of the evaluated images, and of others by the same standard."""

    def __init__(self, run: Run, data: _Images, seed: int, say: Callable[[str], None]) -> None:
        self.run, self.seed = run, seed
        self.network = Network(run.model, run.device)
        say(counted(len(data.reference), "training image"))
        training = self._observe(data.train, data.reference).embedding
        self.probe: LogisticProbe | None = None
        if data.reference_labels is not None and len(np.unique(data.reference_labels)) > 1:
            say("the logistic probe")
            labels = torch.from_numpy(data.reference_labels)
            self.probe = LogisticProbe.fit(
                training, labels, data.train.classes or (), LogisticConfig(seed=seed)
            )
        self.reference = Reference(training, data.reference_labels, self.probe, run.device)
        say(f"{counted(len(data.chosen), 'image')}, and {VIEWS} views of each")
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.embedding, self.scores = self.look(
            data.evaluated, data.chosen, views=True, pairs=self.pairs
        )
        self.calibration: dict[str, Any] | None = None
        if self.pairs:
            expected, observed = (
                torch.cat([pair[side].flatten() for pair in self.pairs]).double().numpy()
                for side in (0, 1)
            )
            self.calibration = calibration(expected, observed)

    def look(
        self,
        images: PackedImages,
        chosen: NDArray[np.int64],
        *,
        views: bool,
        pairs: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, _Scores]:
        """Embeddings and scores of some images; with their views' agreement if `views`, whose cosines go to `pairs`."""
        observed = self._observe(images, chosen)
        scores = {**observed.scores, **self.reference.scores(observed.embedding)}
        if views:
            scores["view_agreement"] = self._views(images, chosen, pairs)
        return observed.embedding, {name: scores[name] for name in DESCRIPTIONS if name in scores}

    def score_pixels(self, batches: Iterable[NDArray[np.uint8]]) -> _Scores:
        """Scores of images as they are, (B, side, side, 3) uint8 a batch."""
        observed = self.network.observe(batches)
        scores = {**observed.scores, **self.reference.scores(observed.embedding)}
        return {name: scores[name] for name in DESCRIPTIONS if name in scores}

    def _observe(self, images: PackedImages, chosen: NDArray[np.int64]) -> Observed:
        source = subset(images, chosen)
        return self.network.observe(
            eval_pixels(source, self.run.config.augment.size, self.run.workers)
        )

    def _views(
        self,
        images: PackedImages,
        chosen: NDArray[np.int64],
        pairs: list[tuple[Tensor, Tensor]] | None,
    ) -> NDArray[np.float64]:
        parts = []
        policy, device = self.run.config.augment, self.run.device
        for views in augmented_views(
            images, chosen, policy, views=VIEWS, seed=self.seed, device=device
        ):
            passed = self.network(views.flatten(0, 1), targets=pairs is not None)
            parts.append(disagreement(passed.embedding.unflatten(0, views.shape[:2])))
            if pairs is not None and passed.concentration is not None:
                shaped = (
                    x.unflatten(0, views.shape[:2])
                    for x in (passed.loc, passed.concentration, passed.target)
                )
                expected, observed = pair_cosines(*shaped)
                pairs.append((expected.cpu(), observed.cpu()))
        return np.concatenate(parts)


def _misclassification(measured: _Measured, data: _Images) -> dict[str, Any] | None:
    if measured.probe is None or data.labels is None:
        return None
    wrong = measured.probe.logits(measured.embedding).argmax(1).numpy() != data.labels
    return {
        "classifier": "logistic",
        "accuracy": 1 - int(wrong.sum()) / len(wrong),
        "scores": {
            name: metrics.failure_figures(values, wrong) for name, values in measured.scores.items()
        },
        "oracle": metrics.oracle(wrong),
        "random": metrics.at_random(wrong),
        "risk_coverage": {
            name: metrics.risk_coverage(values, wrong) for name, values in measured.scores.items()
        },
    }


def _retrieval(
    embedding: Tensor, labels: NDArray[np.int64], scores: _Scores, *, seen: bool
) -> dict[str, Any]:
    same = metrics.retrieved(embedding, labels)
    return {
        "seen_classes": seen,
        "recall_at_1": int(same.sum()) / len(same),
        "scores": {name: metrics.auroc(values, ~same) for name, values in scores.items()},
    }


def _corruptions(
    run: Run, measured: _Measured, data: _Images, count: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    if count == 0:
        return {}
    numbers = data.chosen[_draw(len(data.chosen), count, seed)]
    source = subset(data.evaluated, numbers)
    pixels = np.concatenate(list(eval_pixels(source, run.config.augment.size, run.workers)))
    # Damage takes several float arrays of what is damaged: of a batch, that is little however many images there are.
    batches = [slice(start, start + 128) for start in range(0, count, 128)]
    intact = measured.score_pixels(pixels[batch] for batch in batches)
    result = {}
    for kind in MAGNITUDES:
        say(f"corruption: {kind}")
        levels = [intact]
        for level in LEVELS[1:]:
            damaged = (
                corrupt(pixels[each], kind, level, seed=seed, numbers=numbers[each])
                for each in batches
            )
            levels.append(measured.score_pixels(damaged))
        median = None
        if "kappa" in intact:
            median = [float(np.median(-level["kappa"])) / (run.model.dim - 1) for level in levels]
        result[kind] = {
            "levels": list(LEVELS),
            "median_kappa": median,
            "scores": {
                name: metrics.level_trend(np.stack([level[name] for level in levels]))
                for name in intact
            },
        }
    return result


def _check(
    run: Run,
    images: int | None,
    seed: int,
    corruption_images: int,
    train_images: int,
    require_kappa: bool,
) -> None:
    if require_kappa and not isinstance(run.model, VISimSiam):
        raise InputError(
            "run: SimSiam predicts no concentration, whose worth is to be measured; vi-simsiam does"
        )
    if images is not None and images < 2:
        raise InputError(f"images: {images} must be at least 2")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed: {seed} must be at least 0 and below 2**63")
    if corruption_images < 0:
        raise InputError(f"corruption_images: {corruption_images} must be at least 0")
    if train_images < 2:
        raise InputError(f"train_images: {train_images} must be at least 2")


def _choose(run: Run, images: int | None, train_images: int, seed: int) -> _Images:
    """Which images are evaluated and which they are compared with, and with what labels."""
    train, _ = run.readable(run.splits.train)
    if len(train) == 0:
        raise InputError(
            f"data: {run.splits.name} has no training images, to which distances are measured"
        )
    notes = []
    if run.splits.val is not None and len(run.splits.val):
        evaluated, _ = run.readable(run.splits.val)
        chosen = _draw(len(evaluated), images or len(evaluated), seed)
        reference = _draw(len(train), train_images, seed)
    else:
        evaluated = train
        if len(train) < 4:
            raise InputError(
                f"data: {run.splits.name} has {counted(len(train), 'image')}; at least 4 are needed"
            )
        order = np.random.default_rng((seed, 1)).permutation(len(train))
        count = min(images or UNSPLIT_IMAGES, len(train) // 2)
        chosen, reference = np.sort(order[:count]), np.sort(order[count : count + train_images])
        notes.append(
            "no validation images: training images are evaluated, which the network has seen"
        )
    labelled = train.labels is not None and evaluated.labels is not None
    if labelled:
        check_classes(train.classes or (), evaluated.classes or ())
    else:
        notes.append(
            "no labels: misclassification and the retrieval of the run's own images are not measured"
        )
    if labelled and len(train.classes or ()) < 2:
        labelled = False
        notes.append(
            "one class: misclassification and the retrieval of the run's own images are not measured"
        )
    return _Images(
        evaluated,
        chosen,
        train,
        reference,
        evaluated.labels[chosen] if labelled and evaluated.labels is not None else None,
        train.labels[reference] if labelled and train.labels is not None else None,
        notes,
    )


def _draw(count: int, most: int, seed: int) -> NDArray[np.int64]:
    """At most `most` of range(count), drawn by `seed`, in order."""
    if most >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng((seed, 0)).permutation(count)[:most])
