"""Representations of public objects: a line or two in a notebook, whatever they hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from evaluation_cases import feature_sets, gray_source, make_run
from inference_cases import save_run

import vi_simsiam
from vi_simsiam.config import AugmentConfig
from vi_simsiam.data import MultiViewLoader
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.packed import Contents
from vi_simsiam.evaluation.figures import certainty
from vi_simsiam.evaluation.logistic import LogisticProbe
from vi_simsiam.inference.encoder import Encoding
from vi_simsiam.text import brief


def test_what_has_a_name_gives_it_and_its_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", val=gray_source(4))
    assert repr(run) == f"Run('{tmp_path}/run': vi-simsiam on fashion-mini, resnet18, D = 8, cpu)"
    encoder = vi_simsiam.load(save_run(tmp_path / "other"), device="cpu")
    assert repr(encoder).startswith(f"Encoder(Run('{tmp_path}/other': vi-simsiam on ")
    splits = repr(open_dataset("fashion-mini"))
    assert "train=ArraySource('fashion-mini/train', 8,000 images, 10 classes), val=" in splits
    packed = in_memory(gray_source(6, labelled=False))
    loader = MultiViewLoader(packed, AugmentConfig(size=8), 6, workers=0)
    name = "PackedImages('gray', 6 images)"
    assert repr(loader) == f"MultiViewLoader({name}, batch_size=6, 1 batch an epoch)"
    assert "float32 (6, 3, 8, 8)], index=int64 (6,)" in repr(next(iter(loader)))


def test_what_holds_arrays_prints_their_shapes(tmp_path: Path) -> None:
    features = feature_sets(tmp_path, train=6000)
    assert "train={'trained': float32 (6000, 8)," in repr(features)
    probe = LogisticProbe.fit(features.val["trained"], features.val_labels, 3)
    found = certainty(make_run(tmp_path / "run", val=gray_source(40)))
    encoding = Encoding(torch.zeros(5000, 512), *[torch.zeros(5000, 3)] * 3, concentration=None)
    assert repr(encoding).startswith("Encoding(embedding=float32 (5000, 512), projection=float32 ")
    sizes = np.full(5000, 8, np.int32)
    contents = Contents("mine", sizes, sizes, places=[f"a/{number}.png" for number in range(5000)])
    for thing in (features, probe, found, encoding, contents):
        assert len(repr(thing)) < 600, repr(thing)
        assert "\n" not in repr(thing)
        assert "tensor(" not in repr(thing)
    assert "heights=int32 (5000,)" in repr(contents)
    assert "places=5,000 items" in repr(contents)
    assert brief({"a": [1, "b"], "c": None}) == "{'a': [1, 'b'], 'c': None}"
