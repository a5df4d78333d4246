"""Images of one to sixteen channels and 16 bits, from their files to a trained run."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_backbone
from PIL import Image
from rich.console import Console

import vi_simsiam
from vi_simsiam.backbones import build_backbone, plain_resnet
from vi_simsiam.cli import main
from vi_simsiam.config import AugmentConfig, DecodeConfig, ModelConfig, TrainConfig
from vi_simsiam.data.cache import in_memory, pack
from vi_simsiam.data.channels import picture, read_file
from vi_simsiam.data.contact_sheet import contact_sheet
from vi_simsiam.data.datasets import open_dataset
from vi_simsiam.data.items import DatasetSource
from vi_simsiam.data.loader import MultiViewLoader, eval_loader
from vi_simsiam.data.packed import open_pack
from vi_simsiam.data.sources import ArraySource, FileSource
from vi_simsiam.data.statistics import measured, with_statistics
from vi_simsiam.engine.run import load_run
from vi_simsiam.engine.train import Trainer
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.features import collect
from vi_simsiam.export.folder import export_run
from vi_simsiam.export.formats import write_safetensors, write_timm, write_torchvision
from vi_simsiam.models import build_model
from vi_simsiam.ops.augment import Layout, eager_augment

FIVE = DecodeConfig(channels=5, bits=16)
GRAY = DecodeConfig(channels=1, bits=16)
SIZE = 16


def deep(count: int, channels: int, seed: int = 0) -> np.ndarray:
    """Images (count, 20, 24, channels) uint16 of 12 bits."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, 4096, (count, 20, 24, channels), dtype=np.uint16)


def folder(place: Path, channels: int) -> Path:
    """Two classes of .npy files, in a training and a validation part."""
    for part, count in (("train", 8), ("val", 3)):
        for number, name in enumerate("ab"):
            (place / part / name).mkdir(parents=True)
            for index, image in enumerate(deep(count, channels, seed=number)):
                np.save(place / part / name / f"{index}.npy", image)
    return place


def config(data: Path, decode: DecodeConfig, **changes: Any) -> TrainConfig:
    return TrainConfig(
        data=str(data),
        epochs=2,
        batch_size=8,
        device="cpu",
        workers=0,
        decode=decode,
        augment=AugmentConfig(size=SIZE),
        model=ModelConfig(stem="small", dim=16, projector_hidden=16, predictor_hidden=16),
        **changes,
    )


def test_files_are_read_as_their_libraries_wrote_them(tmp_path: Path) -> None:
    image = deep(1, 5)[0]
    np.save(tmp_path / "c.npy", image)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(image))
    np.save(tmp_path / "big.npy", image.astype(">u2"))
    for path in tmp_path.iterdir():
        assert np.array_equal(read_file(str(path), FIVE), image)
    Image.fromarray(image[..., 0]).save(tmp_path / "gray.png")
    assert np.array_equal(read_file(str(tmp_path / "gray.png"), GRAY), image[..., :1])
    upper = read_file(str(tmp_path / "c.npy"), DecodeConfig(channels=5, bits=8))
    assert upper.dtype == np.uint8
    assert np.array_equal(upper, image >> 8)
    colours = np.random.default_rng(1).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "four.png")
    four = read_file(str(tmp_path / "four.png"), DecodeConfig(channels=4))
    assert np.array_equal(four, colours)
    wide = read_file(str(tmp_path / "four.png"), DecodeConfig(channels=4, bits=16))
    assert np.array_equal(wide, colours.astype(np.uint16) * 257)


@pytest.mark.parametrize("planes", [False, True])
def test_tiff_files_of_tifffile(tmp_path: Path, planes: bool) -> None:
    tifffile = pytest.importorskip("tifffile")
    image, path = deep(1, 5)[0], tmp_path / "a.tif"
    stored, order = (image.transpose(2, 0, 1), "separate") if planes else (image, "contig")
    tifffile.imwrite(path, stored, planarconfig=order, photometric="minisblack", compression="zlib")
    assert np.array_equal(read_file(str(path), FIVE), image)
    source = FileSource([path], decode=FIVE)
    assert source.dimensions(0) == (20, 24)
    tifffile.imwrite(path, image[..., 0], photometric="miniswhite")
    assert np.array_equal(read_file(str(path), GRAY)[..., 0], 65535 - image[..., 0])
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="cannot be read as an image"):
        source.array(0)


def test_files_that_declare_what_they_do_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    source = FileSource([path], decode=FIVE)
    header = io.BytesIO()
    shape = {"shape": (40_000, 40_000, 5), "fortran_order": False, "descr": "<u2"}
    np.lib.format.write_array_header_1_0(header, shape)
    path.write_bytes(header.getvalue() + bytes(100))
    with pytest.raises(InputError, match=r"shape \(40000, 40000, 5\) in 100 bytes"):
        source.array(0)
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(InputError, match="object of shape"):
        source.array(0)
    np.save(path, np.zeros((4, 4, 5), np.float32))
    with pytest.raises(InputError, match="float32 of shape"):
        source.dimensions(0)


def test_mixed_numbers_of_channels_are_counted_and_named(tmp_path: Path) -> None:
    data = folder(tmp_path / "mixed", 5)
    for name, channels in (("x.npy", 3), ("y.npy", 3), ("z.npy", 1)):
        np.save(data / "train" / "a" / name, deep(1, channels)[0])
    source = open_dataset(str(data), decode=FIVE).train
    with pytest.raises(InputError) as caught:
        in_memory(source, workers=0)
    message = str(caught.value)
    assert "1 image of 1 channel (" in message
    assert "2 images of 3 channels (" in message
    assert "x.npy" in message
    assert "all images must have 5" in message
    assert "\n" not in message


def test_a_pack_keeps_channels_bits_and_values(tmp_path: Path) -> None:
    images = deep(6, 5)
    for source in (
        ArraySource(images),
        DatasetSource(list(images), decode=FIVE),  # type: ignore[arg-type]
        DatasetSource([torch.from_numpy(x).permute(2, 0, 1) for x in images], decode=FIVE),  # type: ignore[arg-type]
    ):
        pack(source, tmp_path / "a.pack", workers=0)
        packed = open_pack(tmp_path / "a.pack")
        assert packed.decode == FIVE
        assert all(np.array_equal(packed.array(i), images[i]) for i in range(6))
        part = packed.take(np.array([4, 1]), "part")
        assert np.array_equal(part.array(1), images[1])
        assert part.image(0).mode == "RGB"
    assert open_dataset(str(tmp_path / "a.pack")).train.decode == FIVE
    with pytest.raises(InputError, match="channels, bits"):
        open_dataset(str(tmp_path / "a.pack"), decode=GRAY)
    pack(ArraySource(images), tmp_path / "half.pack", workers=0, shorter_side=10)
    half = open_pack(tmp_path / "half.pack")
    assert half.array(0).shape == (10, 12, 5)
    assert abs(half.array(0).mean() - images[0].mean()) < 40


def test_keys_of_rgb_caches_have_no_channels(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    prints = {
        FileSource([tmp_path / "a.png"], decode=each).fingerprint()
        for each in (DecodeConfig(), DecodeConfig(channels=3, bits=8), FIVE, GRAY)
    }
    assert len(prints) == 3
    assert DecodeConfig.from_dict({"background": "gray", "frames": "first"}) == DecodeConfig()


def test_statistics_are_those_of_numpy() -> None:
    images = deep(5, 4)
    images[..., 3] = 7
    mean, std = measured(in_memory(ArraySource(images)))
    values = images.reshape(-1, 4) / 65535
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std[:3], values[:, :3].std(0), rtol=1e-4)
    assert std[3] == 1
    policy = with_statistics(AugmentConfig(), in_memory(ArraySource(images)))
    assert (policy.jitter[2:], policy.grayscale_prob) == ((0.0, 0.0), 0.0)
    assert policy.jitter[:2] == AugmentConfig().jitter[:2]
    rgb = in_memory(ArraySource(np.zeros((2, 4, 4, 3), np.uint8)))
    assert with_statistics(AugmentConfig(), rgb) == AugmentConfig()
    three = AugmentConfig(mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(InputError, match="3 numbers given"):
        with_statistics(three, in_memory(ArraySource(images)))


def test_sixteen_bits_give_the_views_of_eight() -> None:
    """Values times 257 are the same colours: every operation must give the same view."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 24, 20, 3), dtype=np.uint8)
    policy = AugmentConfig(size=SIZE, jitter_prob=1.0, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    wide = pixels.astype(np.uint16) * np.uint16(257)
    found = [
        next(iter(MultiViewLoader(ArraySource(each), policy, 6, "cpu", workers=0))).views
        for each in (pixels, wide)
    ]
    for narrow, deeper in zip(*found, strict=True):
        torch.testing.assert_close(narrow, deeper, rtol=1e-4, atol=1e-4)


def test_channels_are_resized_and_blurred_alone() -> None:
    """A view of five channels holds in each what a view of that channel alone holds."""
    images = deep(4, 5)
    policy = AugmentConfig(size=SIZE, jitter=(0.4, 0.0, 0.0, 0.0), blur_prob=1.0)
    whole = with_statistics(policy, in_memory(ArraySource(images)))
    views = next(iter(MultiViewLoader(ArraySource(images), whole, 4, "cpu", workers=0))).views
    assert views[0].shape == (4, 5, SIZE, SIZE)
    for channel in range(5):
        assert whole.mean is not None
        assert whole.std is not None
        own = dataclasses.replace(
            whole, mean=whole.mean[channel : channel + 1], std=whole.std[channel : channel + 1]
        )
        one = ArraySource(images[..., channel : channel + 1])
        alone = next(iter(MultiViewLoader(one, own, 4, "cpu", workers=0))).views
        torch.testing.assert_close(views[0][:, channel], alone[0][:, 0], rtol=1e-4, atol=1e-4)


def test_contrast_moves_about_the_mean_of_all_channels() -> None:
    table = torch.zeros(1, 1, 16, dtype=torch.int32)
    table[..., 2], table[..., 3], table[..., 4], table[..., 6] = 2 * 8, 8, 8, 2
    table.view(torch.float32)[..., 9] = 0.5
    pixels = torch.tensor([50, 150], dtype=torch.uint8).repeat(64)
    view = eager_augment(pixels, table, 8, layout=Layout(8, (0.0, 0.0), (1.0, 1.0)))
    torch.testing.assert_close(view[0, 0, :, 0, 0] * 255, torch.tensor([75.0, 125.0]))


def test_the_view_for_evaluation_is_that_of_pillow_on_eight_bits() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 3), dtype=np.uint8)
    (expected, _), *_ = eval_loader(ArraySource(rgb), SIZE, 2, 0)
    wide = ArraySource(rgb.astype(np.uint16) * np.uint16(257))
    (found, _), *_ = eval_loader(wide, SIZE, 2, 0)
    levels = (found - expected).abs() * 0.225 * 255
    assert levels.max() < 1.5  # Pillow rounds after each direction
    with pytest.raises(InputError, match="channels: 1"):
        eval_loader(ArraySource(deep(2, 1)), SIZE, 2, 0)


def test_pretrained_weights_keep_the_size_of_gray_images(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    whole, _ = plain_resnet("resnet18", "imagenet")
    state = {
        **whole.state_dict(),
        "fc.weight": torch.zeros(1000, 512),
        "fc.bias": torch.zeros(1000),
    }
    monkeypatch.setattr("vi_simsiam.backbones._load_weights", lambda name: state)
    gray = torch.randn(2, 1, 16, 16)
    expected = whole.conv1(gray.expand(-1, 3, -1, -1))
    for channels in (6, 9):
        network, _ = build_backbone("resnet18", pretrained=True, channels=channels)
        found = network.conv1(gray.expand(-1, channels, -1, -1))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        network, _ = build_backbone("resnet18", stem="small", channels=1)
        assert network(gray).shape == (2, 512)


def test_a_run_of_five_channels_is_trained_resumed_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vi_simsiam.models.build_backbone", small_backbone)
    monkeypatch.setattr("vi_simsiam.evaluation.features.build_backbone", small_backbone)
    data = folder(tmp_path / "five", 5)
    settings = config(data, FIVE, save_every=0.0, cache_dir=tmp_path / "cache")
    said = io.StringIO()
    whole = Trainer(settings, tmp_path / "whole", console=Console(file=said, width=200))
    whole.fit()
    assert said.getvalue().count("saturation, hue and grayscale are off") == 1
    assert whole.config.augment.mean is not None
    assert len(whole.config.augment.mean) == 5

    part = Trainer(settings, tmp_path / "part", quiet=True)
    with pytest.raises(InterruptedError):
        part.fit(epoch_done=_interrupt)
    again = Trainer(settings, tmp_path / "part", resume=True, quiet=True)
    again.fit()
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)

    run = load_run(tmp_path / "whole", device="cpu", workers=0)
    features = collect(run)
    assert features.val["pixels"].shape == (6, 5 * SIZE * SIZE)
    encoder = vi_simsiam.load(tmp_path / "whole", "cpu", workers=1)
    images = deep(4, 5)
    by_array = encoder.encode(images).embedding
    np.save(tmp_path / "one.npy", images[1])
    by_file = encoder.encode(tmp_path / "one.npy").embedding
    torch.testing.assert_close(by_file[0], by_array[1], rtol=1e-4, atol=1e-5)
    assert encoder.encode(images, views=3).loc.shape == (4, 16)
    with pytest.raises(InputError, match="1 channel, not 5"):
        encoder.encode(deep(2, 1))
    sheet = contact_sheet(run.splits.train, run.config.augment, images=2)
    assert sheet.mode == "RGB"
    data.rename(tmp_path / "moved")  # the embedded images cannot stand in for them
    assert main(["export", str(tmp_path / "whole"), "--format", "safetensors"]) == 2


def test_the_card_of_an_export_reads_the_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code, executed as it is printed, gives the run's features."""
    settings = config(folder(tmp_path / "five", 5), FIVE, cache_dir=tmp_path / "cache")
    settings = dataclasses.replace(settings, epochs=1)
    Trainer(settings, tmp_path / "run", quiet=True).fit()
    run, image = load_run(tmp_path / "run", device="cpu", workers=0), deep(1, 5)
    expected = vi_simsiam.load(tmp_path / "run", "cpu", workers=1).encode(image).embedding
    card = (export_run(run, "torchvision", tmp_path / "exported") / "README.md").read_text()
    code = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    np.save(tmp_path / "exported" / "image.npy", image[0])
    monkeypatch.chdir(tmp_path / "exported")
    names: dict[str, Any] = {}
    exec("\n".join([code[0], code[1], "found = model(images)"]), names)
    torch.testing.assert_close(names["found"].detach()[0], expected[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("form", ["torchvision", "timm", "safetensors"])
def test_exported_weights_take_the_channels(tmp_path: Path, form: str) -> None:
    settings = config(tmp_path, FIVE, method="simsiam")
    parts = dataclasses.replace(settings.model, stem="imagenet")
    augment = settings.augment.normalised_by(((0.1,) * 5, (0.2,) * 5))
    settings = dataclasses.replace(settings, model=parts, augment=augment)
    model, images = build_model(settings).eval(), torch.randn(2, 5, SIZE, SIZE)
    write = {"torchvision": write_torchvision, "timm": write_timm, "safetensors": write_safetensors}
    with torch.no_grad():
        expected = model.backbone(images)
    found = write[form](
        model, settings, tmp_path / ("model.pth" if form == "torchvision" else "model.safetensors")
    )(images)["embedding"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def _interrupt() -> None:
    raise InterruptedError


def test_the_picture_of_channels() -> None:
    image = deep(1, 5)[0]
    shown = np.asarray(picture(image))
    low, high = int(image[..., :3].min()), int(image[..., :3].max())
    np.testing.assert_array_equal(
        shown, np.rint((image[..., :3] - float(low)) * 255 / (high - low))
    )
    gray = np.asarray(picture(image[..., :2].astype(np.uint8)))
    assert np.array_equal(gray[..., 0], gray[..., 2])


def test_options_that_contradict(tmp_path: Path) -> None:
    for options in (
        {"channels": 0},
        {"channels": 17},
        {"bits": 12},
        {"channels": 5, "frames": "all"},
        {"bits": 16, "value_range": "file"},
    ):
        with pytest.raises(InputError, match="is not accepted"):
            DecodeConfig(**options)
    with pytest.raises(InputError, match="std"):
        AugmentConfig(mean=(0.5, 0.5), std=(0.5,))
    with pytest.raises(InputError, match="mean"):
        AugmentConfig(mean=(0.5,))
    with pytest.raises(InputError, match="fashion-mini is RGB with 8 bits"):
        open_dataset("fashion-mini", decode=GRAY)
