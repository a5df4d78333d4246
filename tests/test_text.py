"""Wording of messages."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from inference_cases import save_images
from rich.console import Console

from vi_simsiam.benchmarks.ratios import case_label
from vi_simsiam.data.cache import in_memory
from vi_simsiam.data.datasets import Splits
from vi_simsiam.data.sources import FileSource, Unreadable, left_out
from vi_simsiam.data.subsets import select
from vi_simsiam.errors import InputError
from vi_simsiam.experiments.tables import _images
from vi_simsiam.export.card import Check
from vi_simsiam.text import counted


def test_a_count_agrees_with_its_noun() -> None:
    found = [counted(count, "small image") for count in (0, 1, 2, 8000)]
    assert found == ["0 small images", "1 small image", "2 small images", "8,000 small images"]
    assert [counted(count, "class", "classes") for count in (1, 2)] == ["1 class", "2 classes"]


def test_messages_about_one_thing_have_the_singular(tmp_path: Path) -> None:
    printed = io.StringIO()
    one = FileSource(save_images(tmp_path, 1))
    in_memory(one, console=Console(file=printed, width=80))
    assert "decoding files: 1 image, about" in printed.getvalue()
    assert "on 1 image of here" in Check(1, "here", {"embedding": 0.0}).line("model.pth")
    assert left_out([Unreadable("a.png", "empty")]) == "1 unreadable image left out: a.png (empty)"
    with pytest.raises(InputError, match=r"held_out: 0.2 is not accepted; of 1 image that is none"):
        select(Splits("mine", one, None), held_out=0.2)
    case = {"views": 1, "targets": 2, "distribution": "cosine", "batch": 3, "dim": 4}
    assert case_label({**case, "dtype": "float32"}) == "3 x 4, 1 view, float32, cosine"
    assert _images({"images": [9, 1], "val_images": [1], "common": {"epochs": 1}}) == (
        "9 or 1 training image, 1 validation image, 1 epoch"
    )
