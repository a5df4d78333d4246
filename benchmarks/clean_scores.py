"""Scores of an image's problems: those of `clean`, and simpler ones to compare them with."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vi_simsiam.cleaning.find import Findings
from vi_simsiam.data.sources import ImageSource
from vi_simsiam.engine.forward import nearest
from vi_simsiam.inference.label_free import measured

from .contamination import BLANK, COPIES, FOREIGN, LABEL
from .harness import failure_reason
from .peers import installed

CLEAN = "clean"
_Scores = NDArray[np.float64]
_NEIGHBOURS = 10
_SMALL = 64  # JPEG files are those of images of at most this side
_CPU = torch.device("cpu")


def scores_by_kind(
    findings: Findings,
    source: ImageSource,
    embedding: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> dict[str, dict[str, _Scores | str]]:
    """Scores (N,) by kind and name, each rising with the problem; a reason where one failed."""
    images = [source.image(index) for index in range(len(source))]
    pixels = np.stack([np.asarray(image.resize((12, 12)), np.float32).ravel() for image in images])
    colours = np.stack([np.asarray(image, np.float64).mean((0, 1)) for image in images])
    found = findings.scores
    copies: Mapping[str, Callable[[], _Scores]] = {
        CLEAN: lambda: found["near_duplicate"],
        "perceptual hash": lambda: _closest_hash(images),
        "cosine of embeddings": lambda: _nearest_cosine(embedding),
        "mean colour and size": lambda: _closest_colour(images, colours),
    }
    every: dict[str, Mapping[str, Callable[[], _Scores]]] = {kind: copies for kind in COPIES}
    every[BLANK] = {
        CLEAN: lambda: found["blank"],
        "low contrast": lambda: (
            -np.array([np.asarray(image.convert("L")).std() for image in images])
        ),
        "size as JPEG": lambda: _unusual(np.log([_jpeg_bytes(image) for image in images])),
    }
    every[FOREIGN] = {
        CLEAN: lambda: found["off_topic"],
        "distance to nearest embeddings": lambda: measured("knn_distance", embedding, _CPU),
        "Mahalanobis distance": lambda: measured("mahalanobis", embedding, _CPU),
        "unusual mean colour": lambda: np.linalg.norm(colours - np.median(colours, 0), axis=1),
    }
    every[LABEL] = {
        CLEAN: lambda: found["label_error"],
        "labels of nearest embeddings": lambda: _disagreement(embedding, labels),
        "labels of nearest pixels": lambda: _disagreement(pixels, labels),
    }
    measured_ones: dict[Callable[[], _Scores], _Scores | str] = {}
    for scores in every.values():
        for score in scores.values():
            if score not in measured_ones:
                measured_ones[score] = _or_reason(score)
    return {
        kind: {name: measured_ones[score] for name, score in scores.items()}
        for kind, scores in every.items()
    }


def _or_reason(score: Callable[[], _Scores]) -> _Scores | str:
    try:
        return score()
    except ImportError as error:
        return failure_reason(error)


def _closest_hash(images: list[Image.Image]) -> _Scores:
    """Bits in common with the closest of all other images, of 64, by `imagehash.phash`."""
    imagehash = installed("imagehash")
    bits = np.stack([imagehash.phash(image).hash.ravel() for image in images]).astype(np.float64)
    equal = bits @ bits.T + (1 - bits) @ (1 - bits).T
    np.fill_diagonal(equal, -1)
    closest: _Scores = equal.max(1)
    return closest


def _nearest_cosine(embedding: NDArray[np.float32]) -> _Scores:
    found = nearest(embedding, None, 1, device=_CPU)
    return np.concatenate([cosine[:, 0].double().numpy() for _, cosine in found])


def _closest_colour(images: list[Image.Image], colours: _Scores) -> _Scores:
    """Negative distance to the closest mean colour and size in pixels, of all other images."""
    facts = np.concatenate([colours, [image.size for image in images]], 1)
    squares = np.square(facts).sum(1)
    distances = squares[:, None] + squares - 2 * facts @ facts.T
    np.fill_diagonal(distances, np.inf)
    closest: _Scores = -distances.min(1)
    return closest


def _jpeg_bytes(image: Image.Image) -> int:
    file, small = io.BytesIO(), image.copy()
    small.thumbnail((_SMALL, _SMALL))
    small.save(file, "JPEG", quality=75)
    return file.tell()


def _unusual(values: _Scores) -> _Scores:
    distance: _Scores = np.abs(values - np.median(values))
    return distance


def _disagreement(rows: NDArray[np.float32], labels: NDArray[np.int64]) -> _Scores:
    """Share of the ten nearest by cosine, about the mean of all, with another label."""
    centred = rows - rows.mean(0)
    which = torch.cat([near for near, _ in nearest(centred, None, _NEIGHBOURS, device=_CPU)])
    share: _Scores = (labels[which.numpy()] != labels[:, None]).mean(1)
    return share
