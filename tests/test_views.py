"""Random views as a table: generator, keys, distributions, and the view for evaluation."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from test_augment import BATCH_ROUNDING
from torch import Tensor
from torchvision.transforms import v2

from vi_simsiam.cli import main
from vi_simsiam.config import IMAGENET_MEAN, IMAGENET_STD, POLICIES, AugmentConfig
from vi_simsiam.config import policy as named_policy
from vi_simsiam.data.contact_sheet import contact_sheet
from vi_simsiam.data.sources import ArraySource, FileSource
from vi_simsiam.data.views import add_offsets, draw_table, eval_view, philox
from vi_simsiam.errors import ImageWarning, InputError
from vi_simsiam.ops.augment import Column, eager_augment

CROP = [Column.TOP, Column.LEFT, Column.HEIGHT, Column.WIDTH]
COUNT = 4000
RARE = 1e-3
"""The seeds are fixed, so a correct sampler never comes out rarer than this."""


def picture(height: int = 40, width: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def pixels(view: Tensor) -> Tensor:
    """The view before normalisation, in [0, 1]."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return view * std + mean


def draw(
    policy: AugmentConfig, samples: Any = COUNT, height: int = 60, width: int = 80, **key: int
) -> NDArray[np.int32]:
    numbers = np.arange(samples) if isinstance(samples, int) else np.asarray(samples)
    heights, widths = np.full(len(numbers), height), np.full(len(numbers), width)
    key = {"seed": 0, "epoch": 0} | key
    return draw_table(policy, samples=numbers, heights=heights, widths=widths, **key)


def strengths(table: NDArray[np.int32], column: Column) -> NDArray[np.float32]:
    return table.view(np.float32)[..., column]


def starts(table: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.ascontiguousarray(table[..., :2]).view(np.int64)[..., 0]


def test_philox_gives_the_known_answers() -> None:
    """The vectors published with Random123 for philox4x32 with 10 rounds."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    for counter, key, words in (
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi[:4], pi[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        counters = np.array([(1, 2, 3, 4), counter], dtype=np.uint32).T
        assert tuple(philox(counters, key)[:, 1].tolist()) == words


PINNED = {
    (0, 0): [2427, 0, 240, 49, 58, 1, 4675, 1,
             1060873055, 1058807006, 1063993339, 1034640398, 1059609728, 0, 10, 9],
    (1, 1): [807, 0, 240, 36, 31, 1, 5170, 0,
             1060298368, 1066271129, 1066699907, -1112957018, 0, 1, 3, 29],
    (2, 2): [5145, 0, 240, 19, 25, 0, 8515, 0,
             1068077216, 1062100862, 1068501215, -1114343605, 0, 9468, 21, 35],
}  # fmt: skip
"""Rows of the table by view and place in the batch."""


def test_rows_are_pinned() -> None:
    """Another generator, or another use of its numbers, would change every run that is resumed."""
    policy = AugmentConfig(local_views=1)
    table = draw(policy, [0, 1, 9468], seed=3, epoch=2)
    for (view, sample), values in PINNED.items():
        assert table[view, sample].tolist() == values


def test_a_row_depends_on_its_sample_alone() -> None:
    """Extreme ratios make crops be drawn up to ten times, each row another number of times."""
    policy = AugmentConfig(local_views=2, crop_ratio=(0.2, 5.0), crop_scale=(0.5, 1.0))
    whole = draw(policy, 200)
    chosen = np.array([199, 3, 70, 71])
    assert np.array_equal(draw(policy, chosen), whole[:, chosen])
    assert np.array_equal(draw(dataclasses.replace(policy, local_views=0), 200), whole[:2])


def test_seed_epoch_sample_and_view_are_all_of_the_key() -> None:
    rows = [
        draw(AugmentConfig(local_views=1, local_scale=(0.2, 1.0)), 50, seed=seed, epoch=epoch)
        for seed in (0, 1, 2**32, 2**63 - 1)
        for epoch in (0, 1, 2)
    ]
    crops = np.stack(rows)[..., Column.FLIP : Column.SAMPLE].reshape(-1, 8)
    jittered = crops[crops[:, 1] != 0]
    assert len(np.unique(jittered, axis=0)) == len(jittered) > 1000


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(60, 80, (0.05, 0.14)), (300, 90, (0.2, 1.0))]
)
def test_crops_are_distributed_as_torchvisions(
    height: int, width: int, scale: tuple[float, float]
) -> None:
    ours = draw(AugmentConfig(crop_scale=scale), height=height, width=width)[0][:, CROP]
    torch.manual_seed(1)
    transform = v2.RandomResizedCrop(8, scale)
    image = torch.empty(3, height, width)
    given = [transform.make_params([image]) for _ in range(COUNT)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in given])
    ours, theirs = (np.column_stack([crops, crops[:, 2] * crops[:, 3]]) for crops in (ours, theirs))
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert stats.ks_2samp(a, b).pvalue > RARE


def test_colours_are_distributed_as_torchvisions() -> None:
    policy = AugmentConfig(jitter=(0.4, 1.5, 0.2, 0.1), jitter_prob=1.0)
    table = draw(policy)[1]
    torch.manual_seed(2)
    transform = v2.ColorJitter(*policy.jitter)
    given = [transform.make_params([torch.empty(3, 8, 8)]) for _ in range(COUNT)]
    for name in ("brightness", "contrast", "saturation", "hue"):
        theirs = [p[f"{name}_factor"] for p in given]
        assert stats.ks_2samp(strengths(table, Column[name.upper()]), theirs).pvalue > RARE
    counts = Counter(table[:, Column.ORDER].tolist())
    orders = {int("".join(order), 16) for order in itertools.permutations("1234")}
    assert counts.keys() == orders
    assert stats.chisquare(list(counts.values())).pvalue > RARE


def test_switches_have_their_probabilities_and_are_independent() -> None:
    policy = AugmentConfig(
        jitter_prob=0.7, grayscale_prob=0.3, blur_prob=0.4, flip_prob=0.6, blur_sigma=(0.5, 1.5)
    )
    first, second = draw(policy)
    blurred = strengths(first, Column.SIGMA)
    switches = {
        "jitter": (first[:, Column.ORDER] != 0, 0.7),
        "gray": (first[:, Column.GRAY] != 0, 0.3),
        "blur": (blurred > 0, 0.4),
        "flip": (first[:, Column.FLIP] != 0, 0.6),
        "other view": (second[:, Column.FLIP] != 0, 0.6),
    }
    for on, probability in switches.values():
        assert stats.binomtest(int(on.sum()), COUNT, probability).pvalue > RARE
    for (a, _), (b, _) in itertools.combinations(switches.values(), 2):
        counts = stats.contingency.crosstab(a, b).count
        assert stats.chi2_contingency(counts).pvalue > RARE
    assert stats.kstest(blurred[blurred > 0], stats.uniform(0.5, 1.0).cdf).pvalue > RARE


def test_certain_and_impossible_steps() -> None:
    never = draw(AugmentConfig(jitter_prob=0, grayscale_prob=0, blur_prob=0, flip_prob=0), 500)
    assert not never[..., [Column.ORDER, Column.GRAY, Column.FLIP, Column.SIGMA, Column.HUE]].any()
    assert (never.view(np.float32)[..., Column.BRIGHTNESS : Column.HUE] == 1).all()
    always = draw(AugmentConfig(jitter_prob=1, grayscale_prob=1, blur_prob=1, flip_prob=1), 500)
    assert (always[..., [Column.ORDER, Column.GRAY, Column.FLIP, Column.SIGMA]] != 0).all()
    # Operations without strength take no place.
    table = draw(AugmentConfig(jitter=(0.0, 0.4, 0.0, 0.1), jitter_prob=1.0), 200)
    assert set(table[..., Column.ORDER].ravel().tolist()) == {0x42, 0x24}
    assert (strengths(table, Column.BRIGHTNESS) == 1).all()
    none = draw(AugmentConfig(jitter=(0.0, 0.0, 0.0, 0.0), jitter_prob=1.0), 50)
    assert not none[..., Column.ORDER].any()


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_on_any_image(name: str) -> None:
    policy = POLICIES[name]
    for height, width in ((1, 1), (300, 7), (7, 300), (32, 32)):
        table = draw(policy, 100, height, width)
        assert table.shape == (2 + policy.local_views, 100, 16)
        top, left, tall, wide = table[..., CROP].transpose(2, 0, 1)
        assert ((top >= 0) & (top + tall <= height)).all()
        assert ((left >= 0) & (left + wide <= width)).all()
        assert np.array_equal(starts(table), (top * width + left) * 3)
        assert (table[..., Column.STRIDE] == 3 * width).all()
        assert (table[..., Column.SAMPLE] == np.arange(100)).all()


def test_images_that_no_crop_fits_are_cropped_in_the_middle() -> None:
    """Crops of nearly all of a strip do not fit in ten draws; torchvision then takes its centre."""
    for height, width, crop in ((300, 7, [145, 0, 9, 7]), (7, 300, [0, 145, 7, 9])):
        table = draw(AugmentConfig(crop_scale=(0.9, 1.0)), 20, height, width)
        params = v2.RandomResizedCrop(8, (0.9, 1.0)).make_params([torch.empty(3, height, width)])
        assert [params[key] for key in ("top", "left", "height", "width")] == crop
        assert (table[..., CROP] == crop).all()
    # The central crop of that ratio would be 0.3 pixels wide, or 0.25 high.
    for ratio, height, width in (((0.1, 0.3), 1, 9), ((4.0, 5.0), 9, 1)):
        table = draw(AugmentConfig(crop_ratio=ratio), 2, height, width)
        assert (table[..., CROP] == [(height - 1) // 2, (width - 1) // 2, 1, 1]).all()
    assert (draw(POLICIES["none"], 5, 40, 30)[..., CROP] == [5, 0, 30, 30]).all()


def test_offsets_are_added_beyond_32_bits() -> None:
    table = draw(AugmentConfig(), 3)
    before, rest = starts(table).copy(), table[..., 2:].copy()
    offsets = np.array([0, 5, 2**40 + 2**32 - 1])
    add_offsets(table, offsets)
    assert np.array_equal(starts(table), before + offsets)
    assert np.array_equal(table[..., 2:], rest)
    empty = draw(AugmentConfig(local_views=1), 0)
    assert empty.shape == (3, 0, 16)
    add_offsets(empty, offsets[:0])


@pytest.mark.parametrize(("name", "value"), [("seed", -1), ("epoch", 2**32)])
def test_numbers_out_of_range(name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"{name}: {value} .* at least 0 and below"):
        draw(AugmentConfig(), 2, **{name: value})


def test_contact_sheet_shows_images_and_the_views_of_training() -> None:
    images = np.stack([np.asarray(picture(20, 20, seed)) for seed in range(4)])
    policy = AugmentConfig(size=16, local_views=1, local_size=8)
    sheet = contact_sheet(ArraySource(images), policy, images=2, seed=5)
    assert sheet.size == (3 * 16 + 8 + 3 * 4, 2 * 16 + 4)
    table = draw(policy, [2], 20, 20, seed=5)
    content, rows = torch.from_numpy(images[2].reshape(-1)), torch.from_numpy(table[:1])
    view = eager_augment(content, rows, 16)[0, 0]
    levels = pixels(view).mul(255).clamp(0, 255).permute(1, 2, 0).numpy()
    # Rounded to whole levels; the sheet's views are made as a batch, this one alone.
    assert np.abs(np.asarray(sheet)[20:36, 20:36] - levels).max() <= 0.5 + 255 * BATCH_ROUNDING
    assert (np.asarray(sheet)[16:20] == 255).all()
    assert contact_sheet(ArraySource(images), policy, images=9).size[1] == 4 * 16 + 3 * 4
    with pytest.raises(InputError, match="images: 0"):
        contact_sheet(ArraySource(images), policy, images=0)
    with pytest.raises(InputError, match="has 0 images, but none that can be read$"):
        contact_sheet(ArraySource(images[:0]), policy)


def test_contact_sheet_shows_the_next_image_for_a_broken_one(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        Image.new("RGB", (16, 16), (30 * number, 0, 0)).save(path)
    policy = dataclasses.replace(named_policy("none"), size=16)

    def shown(images: int) -> list[int]:
        sheet = contact_sheet(FileSource(paths), policy, images=images)
        levels: list[int] = (np.asarray(sheet)[8::20, 8, 0] // 30).tolist()
        return levels

    assert shown(4) == [0, 2, 4, 6]
    for number in (2, 6, 7):
        paths[number].write_bytes(b"")
    for images, expected in ((4, [0, 1, 3, 4]), (8, [0, 1, 3, 4, 5])):
        message = r"3 unreadable images left out: .*2\.png .*6\.png .*7\.png"
        with pytest.warns(ImageWarning, match=message):
            assert shown(images) == expected
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"8 images, but none .*0\.png \(an empty file\)"):
        shown(2)


def test_views_leaves_out_what_train_leaves_out(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "images [1]"
    shutil.copytree(image_folder, source)
    broken = min((source / "train").rglob("*.png"))
    broken.write_bytes(b"")
    out = tmp_path / "views.png"
    given = f"views --size 16 --images 2 --out {out} --data"
    assert main([*given.split(), f"folder:{source}"]) == 0
    assert capsys.readouterr() == (
        f"{out}\n",
        f"warning: 1 unreadable image left out: {broken} (an empty file)\n",
    )
    with Image.open(out) as picture:
        assert picture.height == 7 * (2 * 16 + 4)  # small views are enlarged, to at most 112 pixels


def test_eval_view_is_the_centre_of_the_resized_image() -> None:
    image = picture(40, 30)
    view = pixels(eval_view(15)(image))
    resized = np.asarray(image.resize((15, 20), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    np.testing.assert_allclose(view.permute(1, 2, 0).numpy(), resized[2:17], atol=1e-6)
