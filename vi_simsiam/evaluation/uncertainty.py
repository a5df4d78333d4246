"""Evaluate a run's concentration as a measure of uncertainty, beside every simpler score.

The result is uncertainty.json, with these parts:

    calibration         cosines of views against those that the concentrations predict
    misclassification   detection of the images that a logistic probe gets wrong
    retrieval           detection of the images whose nearest neighbour has another class
    ood                 detection of images of other data sets
    corruptions         change of the scores with the level of damage

Nothing is fitted to the images that are evaluated, and no score's sign is chosen by its results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vi_simsiam.checks import require
from vi_simsiam.data.channels import Pixels
from vi_simsiam.data.loader import eval_pixels
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.subsets import check_classes, subset
from vi_simsiam.engine.run import Run, load_model
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation import metrics
from vi_simsiam.evaluation.corruptions import LEVELS, Tones, corrupt, kinds
from vi_simsiam.evaluation.foreign import Foreign, builtin_sets, open_sets, refuse_own_images
from vi_simsiam.evaluation.logistic import LogisticConfig, LogisticProbe
from vi_simsiam.evaluation.scores import (
    DESCRIPTIONS,
    JPEG_QUALITY,
    VIEWS,
    Network,
    Reference,
    Seeds,
    agreement,
)
from vi_simsiam.files import write_json
from vi_simsiam.inference.label_free import NEIGHBOURS
from vi_simsiam.info import versions
from vi_simsiam.models import SimSiam, VISimSiam
from vi_simsiam.text import counted

UNCERTAINTY = "uncertainty.json"
TRAIN_IMAGES = 4_000
"""Most training images that the probe and the distances are fitted to."""
UNSPLIT_IMAGES = 1_000
"""Most training images evaluated where there are no validation images."""
_BATCH = 128
"""Images passed through the network, or corrupted, at a time."""
_PACKAGES = ("torch", "torchvision", "scikit-learn", "scipy", "numpy", "pillow")

_Numbers = NDArray[np.int64]
_Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class _Images:
    """The images that are evaluated, and the training images they are compared with."""

    evaluated: PackedImages
    chosen: _Numbers
    train: PackedImages
    reference: _Numbers
    labels: _Numbers | None
    """Labels of `chosen`; None without labels of known training classes."""
    reference_labels: _Numbers | None
    notes: list[str]


def evaluate_uncertainty(
    run: Run,
    *,
    seeds: Sequence[Path] = (),
    ood: Sequence[str] = (),
    images: int | None = None,
    seed: int = 0,
    corruption_images: int = 200,
    report: Callable[[str], None] = lambda phrase: None,
) -> dict[str, Any]:
    """Measure a run's concentration and its rivals; write RUN/uncertainty.json, return its content.

    Without labels "misclassification" is None and "retrieval" lacks the run's own images; "notes"
    among the settings lists what is missing and why. Without validation images, training images
    are evaluated, others than those that the distances are measured to. A measure that is not
    defined is None.

    Args:
        run: the run.
        seeds: runs that differ from it in their seed alone, for the score "neighbour_agreement".
        ood: other data sets, see `foreign`.
        images: most validation images, drawn by `seed`; None for all.
        seed: of every choice of images, of the views and of the damage.
        corruption_images: most images that are damaged, each in 30 ways; 0 for none.
        report: called with a short phrase at the start of every stage.

    Raises:
        InputError: the run predicts no concentration, numbers out of range, a data set that cannot
            be opened or is the run's own, validation classes that are not the training classes, or
            damaged weights.
    """
    if not isinstance(run.model, VISimSiam):
        raise InputError("run: SimSiam predicts no concentration to measure; vi-simsiam does")
    require("seed", seed, 0 <= seed < 2**63, "at least 0 and below 2**63")
    require("images", images, images is None or images >= 2, "at least 2")
    require("corruption_images", corruption_images, corruption_images >= 0, "at least 0")

    report("opening the data sets")
    sets = open_sets(ood, run.splits, run.config)
    data = _choose(run, images, seed)
    foreign = [(each, run.readable(each.source)[0]) for each in sets]
    for each, packed in foreign:
        if own := refuse_own_images(each, packed, [data.train, data.evaluated]):
            total = counted(len(packed), "image")
            data.notes.append(f"{own:,} of {total} of {each.name} are the run's own")
    others = Seeds([_network(run, load_model(path, run.device)[1]) for path in seeds])
    decode = run.config.decode
    if not decode.is_rgb:
        data.notes.append(
            f"{counted(decode.channels, 'channel')} of {decode.bits} bits: jpeg_size and the "
            "corruption jpeg need 8-bit RGB, and damage fades to each channel's mean"
        )
    measured = _Measured(run, others, data, seed, report)
    builtin = builtin_sets(run.config, len(data.chosen), seed)
    foreign += [(each, run.readable(each.source)[0]) for each in builtin]
    detection, retrieval, overlapping = _foreign(measured, data, foreign)
    count = min(corruption_images, len(data.chosen))
    result = {
        "evaluation": "uncertainty",
        "step": run.step,
        "data": run.splits.name,
        "dim": run.model.dim,
        "images": len(data.chosen),
        "settings": {
            "seed": seed,
            "train_images": len(data.reference),
            "corruption_images": count,
            "views": VIEWS,
            "bins": metrics.BINS,
            "neighbours": min(NEIGHBOURS, len(data.reference)),
            "jpeg_quality": JPEG_QUALITY,
            "fpr95": "share of the validation images flagged where 95 % of the other data set's "
            "are",
            "overlapping_classes": overlapping,
            "notes": data.notes,
        },
        "scores": {name: measured.network.descriptions[name] for name in measured.scores},
        "calibration": measured.calibration,
        "misclassification": _misclassification(measured, data),
        "retrieval": retrieval or None,
        "ood": detection,
        "corruptions": _corruptions(measured, data, count),
        "versions": versions(_PACKAGES),
    }
    write_json(run.path / UNCERTAINTY, result)
    return result


class _Measured:
    """Scores of the evaluated images, and of others by the same standard."""

    def __init__(
        self, run: Run, others: Seeds, data: _Images, seed: int, report: Callable[[str], None]
    ) -> None:
        self.run, self.others, self.seed, self.report = run, others, seed, report
        self.network = _network(run, run.model)
        report(counted(len(data.reference), "training image"))
        pixels = self.pixels(data.train, data.reference)
        training, _ = self.network.observe(others.watch(pixels))
        others.refer(training)
        self.probe: LogisticProbe | None = None
        if data.reference_labels is not None and len(np.unique(data.reference_labels)) > 1:
            report("the logistic probe")
            labels = torch.from_numpy(data.reference_labels)
            config, classes = LogisticConfig(seed=seed), len(data.train.classes or ())
            self.probe = LogisticProbe.fit(training, labels, classes, config)
        self.reference = Reference(training, data.reference_labels, self.probe, run.device)
        report(f"{counted(len(data.chosen), 'image')}, and {VIEWS} views of each")
        given = (self.network, data.evaluated, data.chosen, run.config.augment)
        agreeing, self.calibration = agreement(*given, seed=seed, calibrate=True)
        pixels = self.pixels(data.evaluated, data.chosen)
        self.embedding, self.scores = self.score(pixels, view_agreement=agreeing)

    def score(
        self, batches: Iterable[Pixels], **more: NDArray[np.float64]
    ) -> tuple[Tensor, _Scores]:
        """Embeddings and scores of batches of pixels, (B, side, side, C), with `more`."""
        embedding, scores = self.network.observe(self.others.watch(batches))
        scores |= self.reference.scores(embedding) | self.others.scores(embedding) | more
        return embedding, {name: scores[name] for name in DESCRIPTIONS if name in scores}

    def pixels(self, images: PackedImages, chosen: _Numbers) -> Iterator[Any]:
        """Un-augmented views of images as pixels, (B, side, side, C)."""
        size, workers = self.run.config.augment.size, self.run.workers
        return (pixels for pixels, _ in eval_pixels(subset(images, chosen), size, _BATCH, workers))


def _network(run: Run, model: SimSiam) -> Network:
    return Network(model, run.device, run.config.augment.constants)


def _foreign(
    measured: _Measured, data: _Images, sets: list[tuple[Foreign, PackedImages]]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, list[str]]]:
    """Detection of foreign images, retrieval in every labelled set, and classes that sets share.

    Adds to the notes of `data`.
    """
    detection, retrieval, overlapping = {}, {}, {}
    if data.labels is not None and measured.probe is None:
        data.notes.append(
            f"one class among {counted(len(data.reference), 'training image')}: "
            "misclassification is not measured"
        )
    embedding, labels, scores = measured.embedding, data.labels, measured.scores
    if labels is not None and len(labels) > 1:
        found = metrics.retrieval_figures(embedding, labels, scores)
        retrieval["validation"] = {"seen_classes": True, **found}
    for each, packed in sets:
        measured.report(f"images of {each.name}")
        chosen = _draw(len(packed), len(data.chosen), measured.seed)
        more = {}
        if not each.builtin:
            given = (measured.network, packed, chosen, measured.run.config.augment)
            more["view_agreement"], _ = agreement(*given, seed=measured.seed)
        embedding, scores = measured.score(measured.pixels(packed, chosen), **more)
        figures = {
            name: metrics.detection_figures(measured.scores[name], values)
            for name, values in scores.items()
        }
        detection[each.name] = {"kind": each.kind, "images": len(chosen), "scores": figures}
        if packed.labels is not None and len(chosen) > 1:
            shared = sorted(set(packed.classes or ()) & set(data.train.classes or ()))
            found = metrics.retrieval_figures(embedding, packed.labels[chosen], scores)
            retrieval[each.name] = {"seen_classes": bool(shared), **found}
            if shared:
                overlapping[each.name] = shared
                data.notes.append(
                    f"{each.name} shares classes with the run's data: {', '.join(shared)}"
                )
    return detection, retrieval, overlapping


def _misclassification(measured: _Measured, data: _Images) -> dict[str, Any] | None:
    if measured.probe is None or data.labels is None:
        return None
    wrong = measured.probe.logits(measured.embedding).argmax(1).numpy() != data.labels
    scores, share = measured.scores.items(), float(np.mean(wrong))
    measures = (metrics.auroc, metrics.aurc, metrics.augrc)
    return {
        "classifier": "logistic",
        "accuracy": 1 - int(wrong.sum()) / len(wrong),
        "scores": {
            name: {each.__name__: each(values, wrong) for each in measures}
            for name, values in scores
        },
        "oracle": metrics.oracle(wrong),
        "random": {"aurc": share, "augrc": share / 2},  # the means of all orders
        "risk_coverage": {name: metrics.risk_coverage(values, wrong) for name, values in scores},
    }


def _corruptions(measured: _Measured, data: _Images, count: int) -> dict[str, Any]:
    if count == 0:
        return {}
    seed, scale = measured.seed, measured.run.model.dim - 1
    numbers = data.chosen[_draw(len(data.chosen), count, seed)]
    pixels = np.concatenate(list(measured.pixels(data.evaluated, numbers)))
    batches = [slice(start, start + _BATCH) for start in range(0, count, _BATCH)]
    _, intact = measured.score(pixels[batch] for batch in batches)
    result = {}
    config, tones = measured.run.config, Tones.of(measured.run.config)
    for kind in kinds(config.decode):
        measured.report(f"corruption: {kind}")
        levels = [intact]
        for level in LEVELS[1:]:
            damaged = (
                corrupt(pixels[each], kind, level, seed=seed, numbers=numbers[each], tones=tones)
                for each in batches
            )
            levels.append(measured.score(damaged)[1])
        median = [float(np.median(-level["kappa"])) / scale for level in levels]
        trends = {
            name: metrics.level_trend(np.stack([level[name] for level in levels]))
            for name in intact
        }
        result[kind] = {"levels": list(LEVELS), "median_kappa": median, "scores": trends}
    return result


def _choose(run: Run, images: int | None, seed: int) -> _Images:
    """Choose the images that are evaluated and those they are compared with."""
    train, _ = run.readable(run.splits.train)
    if len(train) == 0:
        raise InputError(
            f"data: {run.splits.name} has no training images, to which distances are measured"
        )
    notes = []
    if run.splits.val is not None and len(run.splits.val):
        evaluated, _ = run.readable(run.splits.val)
        chosen = _draw(len(evaluated), images or len(evaluated), seed)
        reference = _draw(len(train), TRAIN_IMAGES, seed)
    else:
        evaluated = train
        if len(train) < 4:
            raise InputError(
                f"data: {run.splits.name} has {counted(len(train), 'image')}; at least 4 are needed"
            )
        order = np.random.default_rng((seed, 1)).permutation(len(train))
        count = min(images or UNSPLIT_IMAGES, len(train) // 2)
        chosen, reference = np.sort(order[:count]), np.sort(order[count : count + TRAIN_IMAGES])
        notes.append(
            "no validation images: training images are evaluated, which the network has seen"
        )
    labels = reference_labels = None
    unmeasured = "misclassification and the retrieval of the run's own images are not measured"
    if train.labels is None or evaluated.labels is None:
        notes.append(f"no labels: {unmeasured}")
    else:
        check_classes(run.splits.name, train, evaluated)
        if len(train.classes or ()) < 2:
            notes.append(f"one class: {unmeasured}")
        else:
            labels, reference_labels = evaluated.labels[chosen], train.labels[reference]
    return _Images(evaluated, chosen, train, reference, labels, reference_labels, notes)


def _draw(count: int, most: int, seed: int) -> _Numbers:
    """At most `most` of range(count), drawn by `seed`, in order."""
    if most >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng((seed, 0)).permutation(count)[:most])
