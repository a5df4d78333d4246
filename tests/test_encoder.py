"""The encoder: its outputs from every kind of input, and images that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import gray_source, make_run
from inference_cases import DIM, SIZE, save_images, save_run
from PIL import Image
from torch import Tensor

import vi_simsiam
from vi_simsiam.data.files import find_images
from vi_simsiam.data.sources import FileSource, Unreadable
from vi_simsiam.data.views import GLOBAL_VIEWS, draw_table, eval_view
from vi_simsiam.engine.checkpoint import checkpoints
from vi_simsiam.errors import InputError
from vi_simsiam.inference.encoder import Encoder, Encoding
from vi_simsiam.inference.product import product_of_experts
from vi_simsiam.models import VISimSiam
from vi_simsiam.ops.augment import eager_augment
from vi_simsiam.stages import RESNET


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return vi_simsiam.load(save_run(tmp_path_factory.mktemp("encoder") / "run"), device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder")
    save_images(path, 7)
    return path


def assert_same(given: Encoding, expected: Encoding, atol: float = 1e-5) -> None:
    torch.testing.assert_close(vars(given), vars(expected), atol=atol, rtol=1e-5)


def viewed(folder: Path) -> Tensor:
    """The evaluation's view of all images of a folder, one by one."""
    source = FileSource(find_images(folder).paths)
    return torch.stack([eval_view(SIZE)(source.image(i)) for i in range(len(source))])


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu")


def test_encoding_is_that_of_the_models_modules(encoder: Encoder, folder: Path) -> None:
    model = encoder.model
    assert isinstance(model, VISimSiam)
    views = viewed(folder)
    encoding = encoder.encode(folder)
    with torch.no_grad():
        embedding = model.backbone(views)
        projection = model.projector(embedding)
        prediction = model.predictor(projection)
        kappa = model.concentration(prediction)
        distribution = model.distribution(views)
        norms, maps = {}, views
        for name, layer in model.backbone.named_children():
            maps = layer(maps) if name not in ("avgpool", "fc") else maps
            norms |= {name: maps.mean((2, 3)).norm(dim=1)} if name in RESNET else {}
    mean = prediction[:, :DIM]
    expected = Encoding(
        embedding, projection, mean / mean.norm(dim=1)[:, None], mean.norm(dim=1), kappa, norms
    )
    assert_same(encoding, expected)
    torch.testing.assert_close(encoding.layer_norms["layer4"], embedding.norm(dim=1))
    # 1 - E[mu.z]: E[z] is the distribution's mean.
    uncertainty = 1 - (distribution.mean * distribution.loc).sum(1)
    torch.testing.assert_close(encoding.uncertainty, uncertainty)
    assert kappa.max() > 1.2 * kappa.min(), "the test's images must differ"
    *columns, norms = vars(encoding).values()
    assert not any(column.requires_grad for column in (*columns, *norms.values()))


@pytest.mark.parametrize(("batch_size", "views"), [(1, None), (4, None), (4, 3)])
def test_the_batch_size_changes_nothing(
    encoder: Encoder, folder: Path, batch_size: int, views: int | None
) -> None:
    whole = encoder.encode(folder, views=views)
    assert len(whole) == 7
    assert_same(encoder.encode(folder, views=views, batch_size=batch_size), whole)


def test_every_kind_of_image_gives_the_same(encoder: Encoder, folder: Path) -> None:
    paths = find_images(folder).paths
    expected = encoder.encode(folder)
    opened = [Image.open(path) for path in paths]
    for images in (
        str(folder),
        paths,
        (*map(Path, paths[:5]), *opened[5:]),
        FileSource(paths),
        viewed(folder).double(),
    ):
        assert_same(encoder.encode(images), expected)
    *columns, norms = vars(expected).values()
    norms = {name: norm[:1] for name, norm in norms.items()}
    first = Encoding(*(column[:1] for column in columns), layer_norms=norms)
    for image in (paths[0], opened[0]):
        assert_same(encoder.encode(image), first)


def test_bytes_go_through_the_view_and_floats_do_not(encoder: Encoder) -> None:
    pixels = torch.randint(0, 256, (3, 3, 24, 20), dtype=torch.uint8, device="cpu")
    arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    views = torch.stack([eval_view(SIZE)(Image.fromarray(array)) for array in arrays])
    assert_same(encoder.encode(pixels), encoder.encode(views))
    assert_same(encoder.encode(arrays), encoder.encode(views))
    larger = torch.randn(2, 3, 24, 24, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(larger).embedding, encoder.model.backbone(larger))


def test_several_views_are_joined(encoder: Encoder) -> None:
    """A product of experts, and means for the rest; concentrations of copies of a view add up."""
    views = torch.randn(3, 4, 3, SIZE, SIZE, device="cpu")
    each = [encoder.encode(views[:, v]) for v in range(4)]
    loc, concentration = (
        torch.stack([getattr(e, name) for e in each], 1) for name in ("loc", "concentration")
    )
    joined = encoder.encode(views, batch_size=5)
    expected_loc, expected_concentration = product_of_experts(loc, concentration)
    torch.testing.assert_close(joined.loc, expected_loc)
    torch.testing.assert_close(joined.concentration, expected_concentration)
    torch.testing.assert_close(joined.embedding, sum(e.embedding for e in each) / 4)
    torch.testing.assert_close(joined.loc_norm, sum(e.loc_norm for e in each) / 4)
    norms = sum(e.layer_norms["layer2"] for e in each) / 4
    torch.testing.assert_close(joined.layer_norms["layer2"], norms)
    copies = encoder.encode(views[:, :1].expand(-1, 4, -1, -1, -1))
    # From a batch of twelve, whose convolutions may be summed in another order than those of three.
    torch.testing.assert_close(copies.concentration, 4 * each[0].concentration, rtol=1e-5, atol=0)
    assert_same(encoder.encode(views[:, :1]), each[0])


def test_random_views_are_those_of_the_policy(encoder: Encoder, folder: Path) -> None:
    """View v of image i is global view v mod 2 of epoch v // 2 in training with that seed."""
    source = FileSource(find_images(folder).paths)
    drawn = []
    for index in range(len(source)):
        image = np.asarray(source.image(index))
        samples, heights, widths = (np.array([x]) for x in (index, *image.shape[:2]))
        sizes = {"samples": samples, "heights": heights, "widths": widths}
        tables = [
            draw_table(encoder.config.augment, seed=7, epoch=epoch, **sizes)[:GLOBAL_VIEWS]
            for epoch in (0, 1)
        ]
        table = torch.from_numpy(np.concatenate(tables)[:3])
        drawn.append(eager_augment(torch.from_numpy(image.reshape(-1).copy()), table, SIZE)[:, 0])
    given = encoder.encode(folder, views=3, seed=7)
    assert_same(given, encoder.encode(torch.stack(drawn)))
    other = encoder.encode(folder, views=3, seed=8)
    assert (other.loc - given.loc).abs().max() > 1e-3


def test_streaming_skips_unreadable_files(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    """Damaged, empty and missing files are reported; the others keep their order and numbers."""
    paths = find_images(folder).paths
    (tmp_path / "broken.png").write_bytes(Path(paths[0]).read_bytes()[:60])
    (tmp_path / "empty.jpg").touch()
    bad = [str(tmp_path / name) for name in ("broken.png", "empty.jpg", "missing.png")]
    mixed = [bad[0], *paths[:3], bad[1], bad[2], *paths[3:]]
    good = [i for i, path in enumerate(mixed) if path not in bad]
    skipped: list[Unreadable] = []
    parts = list(encoder.stream(mixed, batch_size=4, skipped=skipped.append))
    assert torch.cat([indices for indices, _ in parts]).tolist() == good
    assert [entry.path for entry in skipped] == bad
    assert skipped[1].reason == "an empty file"
    assert len(parts) > 2
    assert_same(Encoding.joined([part for _, part in parts]), encoder.encode(folder))
    with pytest.warns(UserWarning, match=r"skipped: .*empty\.jpg \(an empty file\)") as caught:
        list(encoder.stream(mixed))
    assert all(warning.filename == __file__ for warning in caught)
    with pytest.raises(InputError, match=r"broken\.png: cannot be read"):
        encoder.encode(mixed)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ("/nowhere", {}, "images: /nowhere is not there"),
        (zeros(3, 8, 8), {}, r"images: shape \(3, 8, 8\) given"),
        (zeros(2, 3, 8, 8, dtype=torch.int32), {}, "int32"),
        (np.zeros((2, 8, 8, 3)), {}, "float64"),
        (np.zeros((8, 8, 3), np.uint8), {}, r"\(8, 8, 3\) given, one RGB image or 8 gray ones"),
        (None, {}, "images: NoneType given; accepted are an ImageSource"),
        ((path for path in ["a.png"]), {}, "images: generator given"),
        ([3], {}, "item 0 is a int"),
        (zeros(2, 3, 8, 8), {"views": 2}, "views: random views are drawn of images"),
        ([], {"batch_size": 0}, "batch_size: 0 must be an integer of at least 1"),
        ([], {"views": 2.5}, "views: 2.5 must be an integer of at least 1"),
        (zeros(2, 3, 8, 8) / 0, {}, "outputs for image 0 are not finite"),
    ],
)
def test_bad_input_is_named(
    encoder: Encoder, images: object, options: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        encoder.encode(images, **options)  # type: ignore[arg-type]


def test_training_mode_does_not_matter_and_is_kept(tmp_path: Path) -> None:
    """The tiny model has dropout and BatchNorm; damaged weights are named."""
    run = make_run(tmp_path)
    expected = Encoder(run).encode(gray_source(6))
    run.model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(Encoder(run).encode(gray_source(6)), expected, atol=0)
    assert run.model.training
    with torch.no_grad():
        run.model.backbone.linear.weight[0, 0] = torch.inf
    with pytest.raises(InputError, match="outputs for gray/0 are not finite"):
        Encoder(run).encode(gray_source(3))


def test_simsiam_has_directions_but_no_uncertainty(tmp_path: Path, folder: Path) -> None:
    encoder = vi_simsiam.load(save_run(tmp_path / "run", "simsiam"), "cpu")
    encoding = encoder.encode(folder)
    assert encoding.concentration is None
    with pytest.raises(InputError, match="uncertainty: a SimSiam run predicts none"):
        _ = encoding.uncertainty
    torch.testing.assert_close(encoding.loc.norm(dim=1), torch.ones(7, device="cpu"))
    views = torch.randn(2, 3, 3, SIZE, SIZE, device="cpu")
    total = sum(encoder.encode(views[:, v]).loc for v in range(3))
    joined = encoder.encode(views)
    torch.testing.assert_close(joined.loc, total / total.norm(dim=1, keepdim=True))
    assert joined.concentration is None


def test_nothing_gives_nothing_but_a_run_must_be_there(encoder: Encoder, tmp_path: Path) -> None:
    for nothing in ([], zeros(0, 3, 8, 8), zeros(0, 2, 3, 8, 8)):
        encoding = encoder.encode(nothing)
        columns = (encoding.embedding, encoding.loc, encoding.uncertainty)
        assert [tuple(x.shape) for x in columns] == [(0, 512), (0, DIM), (0,)]
    with pytest.raises(InputError, match="holds no image"):
        encoder.encode(tmp_path)
    with pytest.raises(InputError, match="holds no run"):
        vi_simsiam.load(tmp_path)
    with pytest.raises(InputError, match="device: 'tpu'"):
        vi_simsiam.load(save_run(tmp_path / "run"), "tpu")
    with pytest.raises(InputError, match="workers: -1 must be at least 0"):
        vi_simsiam.load(tmp_path / "run", "cpu", workers=-1)
    checkpoints(tmp_path / "run")[0].write_bytes(b"PK and then nothing")
    with pytest.raises(InputError, match="it is damaged or no checkpoint"):
        vi_simsiam.load(tmp_path / "run", "cpu")
