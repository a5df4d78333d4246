"""Features of augmented training images, and the linear probe that is trained on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import CPU, SIZE, TinyBackbone, feature_sets, gray_source, make_run
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from vi_simsiam.data.cache import cached
from vi_simsiam.data.packed import PackedImages
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.data.views import draw_table
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation import augmented as augmented_module
from vi_simsiam.evaluation.augmented import AugmentedFeatures, default_passes, linear_policy
from vi_simsiam.evaluation.features import collect
from vi_simsiam.evaluation.linear import LinearConfig, evaluate_linear, linear_preset
from vi_simsiam.ops.augment import IMAGENET_MEAN, IMAGENET_STD, Column


def coloured(count: int, side: int = 20) -> PackedImages:
    """Random images."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return cached(ArraySource(images, np.arange(count) % 2, ["a", "b"], "coloured"))[0]


def augmented(
    images: PackedImages, backbone: nn.Module | None = None, **options: object
) -> AugmentedFeatures:
    backbone = backbone or TinyBackbone()
    return AugmentedFeatures(backbone, images, size=SIZE, device=CPU, workers=0, **options)  # type: ignore[arg-type]


def cropped_and_flipped(images: PackedImages, row: np.ndarray) -> Tensor:
    """The view of a table row by torchvision alone."""
    image = np.asarray(images.image(int(row[Column.SAMPLE])))
    pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
    top, left = int(row[Column.TOP]), int(row[Column.LEFT])
    height, width = int(row[Column.HEIGHT]), int(row[Column.WIDTH])
    view = tv.resized_crop(pixels, top, left, height, width, [SIZE, SIZE], antialias=True)
    view = tv.horizontal_flip(view) if row[Column.FLIP] else view
    return tv.normalize(view, list(IMAGENET_MEAN), list(IMAGENET_STD))


@pytest.mark.parametrize("number", [0, 5])
def test_features_are_those_of_random_crops_and_flips_in_eval_mode(number: int) -> None:
    images, backbone = coloured(12), TinyBackbone().train()
    found, index = augmented(images, backbone, seed=5).views(number)
    sizes = {"heights": images.heights, "widths": images.widths}
    policy, samples = linear_policy(SIZE), np.arange(12)
    tables = draw_table(policy, seed=5, epoch=number // 2, samples=samples, **sizes)
    table = tables[number % 2]
    assert backbone.training
    assert 0 < table[:, Column.FLIP].sum() < 12
    with torch.no_grad():
        expected = backbone.eval()(torch.stack([cropped_and_flipped(images, row) for row in table]))
    assert index.tolist() == list(range(12))
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_policy_is_that_of_simsiams_linear_evaluation() -> None:
    """Crops of 8 to 100 % of the area and flips alone; on a CPU in few passes."""
    policy = linear_policy(32)
    assert (policy.size, policy.crop_scale, policy.flip_prob) == (32, (0.08, 1.0), 0.5)
    assert (policy.jitter_prob, policy.grayscale_prob, policy.blur_prob) == (0, 0, 0)
    assert default_passes(90, torch.device("cuda")) == 90
    assert [default_passes(epochs, CPU) for epochs in (90, 2)] == [4, 2]


def test_every_pass_has_views_of_its_own() -> None:
    source = augmented(coloured(12))
    passes = [source.views(number)[0] for number in range(4)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(passes) for b in passes[:i])
    again = augmented(coloured(12))
    assert torch.equal(again.views(3)[0], passes[3])
    assert not torch.allclose(augmented(coloured(12), seed=1).views(0)[0], passes[0])


def test_few_images_are_left_over_and_others_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmented_module, "_BATCH", 4)
    source = augmented(coloured(11))  # three batches of three
    indices = [source.views(number)[1] for number in range(6)]
    assert [len(index.unique()) for index in indices] == [9] * 6
    assert set(torch.cat(indices).tolist()) == set(range(11))


@pytest.mark.parametrize("limit", [0, 2**20])
def test_passes_that_are_not_kept_are_computed_again(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(augmented_module, "_KEPT_BYTES", limit)
    said: list[str] = []
    source = augmented(coloured(6), report=said.append)
    first, again = ([source.views(number)[0] for number in range(4)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(said) == (4 if limit == 0 else 2)
    source.close()
    assert torch.equal(source.views(0)[0], first[0])


def test_damaged_weights_and_no_images_are_refused(tmp_path: Path) -> None:
    backbone = TinyBackbone()
    with torch.no_grad():
        backbone.linear.bias[0] = torch.nan
    with pytest.raises(InputError, match="features: those of coloured are not finite"):
        augmented(coloured(4), backbone).views(0)
    with pytest.raises(InputError, match="coloured holds no images"):
        augmented(coloured(0)).views(0)
    with pytest.raises(InputError, match="augmented: 2 .* features that come without their images"):
        evaluate_linear(feature_sets(tmp_path), LinearConfig(augmented=2))
    assert not (tmp_path / "linear.json").exists()


class Recorded(AugmentedFeatures):
    """Features that hold the number of their image and pass."""

    def __init__(self, count: int, width: int) -> None:
        self.count, self.width, self.asked, self.closed = count, width, [], False

    def views(self, number: int) -> tuple[Tensor, Tensor]:
        self.asked.append(number)
        index = torch.arange(self.count)[number % 2 :]
        return index[:, None].float().expand(-1, self.width) + number / 100, index

    def close(self) -> None:
        self.closed = True


def test_epochs_take_turns_with_the_passes_and_leave_the_held_out_images_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = feature_sets(tmp_path, train=60)
    recorded, seen = Recorded(60, 8), []
    forward = nn.Linear.forward

    def record(layer: nn.Linear, inputs: Tensor) -> Tensor:
        if layer.training and inputs.requires_grad is False and torch.is_grad_enabled():
            seen.append(inputs[:, 0])
        return forward(layer, inputs)

    monkeypatch.setattr(nn.Linear, "forward", record)
    config = LinearConfig(
        epochs=6, min_steps=0, batch_size=100, held_out=0.2, standardize=False, augmented=4
    )
    one = {"train": {"trained": sets.train["trained"]}, "val": {"trained": sets.val["trained"]}}
    result = evaluate_linear(replace(sets, **one, augmented=recorded), config)
    assert recorded.asked == [0, 1, 2, 3, 0, 1]
    assert recorded.closed
    assert [{round(100 * float(x % 1)) for x in batch} for batch in seen] == [
        {0}, {1}, {2}, {3}, {0}, {1}
    ]  # fmt: skip
    images = [{int(x) for x in batch} for batch in seen]
    assert len(images[0]) == 48
    assert images[0] == images[2] >= images[1] == images[3]
    facts = {"augmented": 4, "augmented_encoders": ["trained"], "steps": 6}
    assert result["settings"] | facts == result["settings"]


def test_views_carry_the_labels_of_their_images(tmp_path: Path) -> None:
    """Features in another order than the labels would teach nothing."""
    sets = feature_sets(tmp_path, train=300, val=90)

    class Shuffled(Recorded):
        def views(self, number: int) -> tuple[Tensor, Tensor]:
            order = torch.randperm(300, generator=torch.Generator().manual_seed(number))
            return sets.train["trained"][order], order

    one = {"train": {"trained": sets.train["trained"]}, "val": {"trained": sets.val["trained"]}}
    shuffled = replace(sets, **one, augmented=Shuffled(300, 8))
    found = evaluate_linear(shuffled, LinearConfig(augmented=3))
    assert found["top1"]["trained"] == found["train_top1"]["trained"] == 1.0


def test_paper_preset_trains_on_the_runs_augmented_images(tmp_path: Path) -> None:
    run = make_run(tmp_path, train=gray_source(24), val=gray_source(10))
    config = replace(linear_preset("paper"), epochs=3)
    result = evaluate_linear(collect(run), config)
    assert result["settings"]["augmented"] == 3
    assert "augmented" in result["settings"]["inferred"]
    plain = evaluate_linear(collect(run), replace(config, augmented=0))
    assert plain["settings"]["augmented_encoders"] == []
    assert plain["top1"]["pixels"] == result["top1"]["pixels"]


@pytest.mark.gpu
def test_cuda_gives_the_features_of_the_cpu() -> None:
    images, cuda = coloured(12), torch.device("cuda")
    expected, index = augmented(images).views(1)
    source = AugmentedFeatures(TinyBackbone().to(cuda), images, size=SIZE, device=cuda, workers=0)
    found, found_index = source.views(1)
    source.close()
    assert torch.equal(found_index, index)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
