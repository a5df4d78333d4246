"""`vi-simsiam embed` and `rank`: rows, neighbours against brute force, order, refused input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_cases import DIM, ON_CPU, save_images, save_run
from PIL import Image
from pyarrow import parquet
from sklearn.covariance import LedoitWolf

import vi_simsiam
from vi_simsiam.cli import main
from vi_simsiam.data.contact_sheet import thumbnails
from vi_simsiam.data.files import find_images
from vi_simsiam.data.sources import ArraySource
from vi_simsiam.engine import forward
from vi_simsiam.engine.forward import nearest
from vi_simsiam.inference import embed, label_free, ranking
from vi_simsiam.inference.embed import Table
from vi_simsiam.inference.ranking import draw_ranking, write_ranking

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("embed") / "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine images, one of them in a folder below, and two that cannot be read."""
    folder = tmp_path / "images"
    save_images(folder, 8)
    save_images(folder / "more", 1, seed=3)
    (folder / "004 broken.png").write_bytes(b"\x89PNG and then nothing")
    (folder / "empty.jpg").touch()
    return folder


def embedded(run: Path, images: Path, *options: object, out: Path) -> int:
    command = ["embed", run, images, "--out", out, *options]
    return main([*map(str, command), *ON_CPU])


def cosines(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    queries, keys = queries.astype(np.float64), keys.astype(np.float64)
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(keys, axis=1)
    return np.divide(queries @ keys.T, lengths, out=np.zeros_like(lengths), where=lengths > 0)


@pytest.mark.parametrize("own", [True, False])
def test_neighbours_are_those_of_brute_force(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several blocks of queries and keys, with a row of zeros."""
    monkeypatch.setattr(forward, "_KEYS", 5)
    generator = np.random.default_rng(0)
    queries = generator.normal(size=(23, 6)).astype(np.float32)
    queries[4] = 0
    keys = queries if own else generator.normal(size=(12, 6)).astype(np.float32)
    blocks = list(nearest(queries, None if own else keys, 6, device=CPU, block=7))
    assert [len(which) for which, _ in blocks] == [7, 7, 7, 2]
    which, values = (torch.cat(parts).numpy() for parts in zip(*blocks, strict=True))
    expected = cosines(queries, keys)
    if own:
        np.fill_diagonal(expected, -np.inf)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :6]
    rows = np.arange(23) != 4
    # In float32 a cosine is off by (F + 4) eps, 1.2e-6, at most: none can replace the next.
    assert np.diff(np.sort(expected[rows], axis=1)[:, 1:]).min() > 1e-5
    np.testing.assert_array_equal(which[rows], order[rows])
    np.testing.assert_allclose(values, np.take_along_axis(expected, which, axis=1), atol=1e-6)
    assert all(len(set(row)) == 6 for row in which.tolist())
    # There are no more neighbours than others.
    ((which, values),) = nearest(np.eye(3, dtype=np.float32), None, 5, device=CPU)
    assert which.tolist() == [[1, 2], [0, 2], [0, 1]]
    assert values.shape == (3, 2)


def test_the_file_holds_encodings_and_neighbours(
    run: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embed, "_ROWS", 4)
    out = tmp_path / "features.parquet"
    options = ["--neighbours", 3, "--batch-size", 4]
    assert embedded(run, folder, *options, out=out) == 0
    said = capsys.readouterr()
    assert said.out == f"written: {out} (9 images, 2 skipped)\n"
    skipped = [line.split(" (")[0] for line in said.err.splitlines()]
    assert skipped == [f"skipped: {folder / name}" for name in ("004 broken.png", "empty.jpg")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.parquet", "images"]

    found = find_images(folder).paths
    paths = [path for path in found if "broken" not in path and "empty" not in path]
    expected = vi_simsiam.load(run, "cpu").encode(paths)
    file = parquet.ParquetFile(out)
    assert file.metadata.num_row_groups == 3
    table = file.read()
    columns = table.to_pydict()
    assert columns["path"] == paths
    assert str(table.schema.field("embedding").type) == "list<element: float>"
    embedding = np.array(columns["embedding"], np.float32)
    np.testing.assert_allclose(embedding, expected.embedding.numpy(), atol=1e-5)
    for name in ("concentration", "uncertainty"):
        np.testing.assert_allclose(columns[name], getattr(expected, name).numpy(), rtol=1e-4)
    similar, values = cosines(embedding, embedding), np.array(columns["similarities"])
    places = np.array([[paths.index(path) for path in near] for near in columns["neighbours"]])
    # Rounding may exchange two that are as near; both are nearest all the same.
    np.testing.assert_allclose(np.take_along_axis(similar, places, 1), values, atol=1e-5)
    np.fill_diagonal(similar, -np.inf)
    np.testing.assert_allclose(values, -np.sort(-similar)[:, :3], atol=1e-5)
    assert all(len({row, *near}) == 4 for row, near in enumerate(places.tolist()))

    about = json.loads(table.schema.metadata[b"vi_simsiam"])
    expected_facts = {"run": str(run), "method": "vi-simsiam", "dim": DIM, "features": 512}
    assert about | expected_facts == about
    assert "resized to 16 pixels" in about["view"]
    assert about["versions"]["vi-simsiam"] == vi_simsiam.__version__

    before = out.read_bytes()
    assert embedded(run, folder, *options, out=out) == 2
    assert f"out: {out} exists; say --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    options = ["--overwrite", "--views", 2, "--neighbours", 0]
    assert embedded(run, folder, *options, out=out) == 0
    again = parquet.read_table(out)
    assert again["neighbours"].null_count == again["similarities"].null_count == 9
    joined = vi_simsiam.load(run, "cpu").encode(paths, views=2).concentration
    assert joined is not None
    assert "2 random global views" in json.loads(again.schema.metadata[b"vi_simsiam"])["view"]
    # Views are keyed by the image's number in the folder, which counts unreadable ones: the first
    # four agree.
    given = again["concentration"].to_numpy()[:4]
    np.testing.assert_allclose(given, joined[:4].numpy(), rtol=1e-4)


def test_neighbours_in_a_reference_and_simsiam(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image that is in the reference, too, finds itself there; SimSiam has no uncertainty."""
    out, one = tmp_path / "features.parquet", folder / "005.png"
    assert embedded(run, one, "--reference", folder, "--neighbours", 2, out=out) == 0
    (row,) = parquet.read_table(out).to_pylist()
    assert row["neighbours"][0] == row["path"] == str(one)
    assert row["similarities"][0] == pytest.approx(1, abs=1e-6)
    assert row["similarities"][1] < row["similarities"][0]

    simsiam = save_run(tmp_path / "simsiam", "simsiam")
    assert embedded(simsiam, one, "--overwrite", out=out) == 0
    assert "a SimSiam run predicts none" in capsys.readouterr().out
    table = parquet.read_table(out)
    nulls = [table[name].null_count for name in ("concentration", "uncertainty", "embedding")]
    assert (table.num_rows, nulls) == (1, [1, 1, 0])


def test_rank_writes_all_images_and_a_picture(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "v1.2"
    out.parent.mkdir()
    command = [*map(str, ("rank", run, folder, "-k", 2, "--out", out)), *ON_CPU]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out == f"written: {out}.csv (9 images, 2 skipped)\nwritten: {out}.png\n"
    assert said.err.count("skipped: ") == 2
    assert sorted(path.name for path in out.parent.iterdir()) == ["v1.2.csv", "v1.2.png"]
    rows = list(csv.DictReader((out.parent / "v1.2.csv").open()))
    found = find_images(folder).paths
    paths = [path for path in found if "broken" not in path and "empty" not in path]
    encoding = vi_simsiam.load(run, "cpu").encode(paths)
    assert encoding.concentration is not None
    order = [paths.index(row["path"]) for row in rows]
    assert sorted(order) == list(range(9))
    # By the concentrations in the file, which are those of the encoder but for rounding.
    kappas = np.array([float(row["kappa"]) for row in rows])
    assert (np.diff(kappas) >= 0).all()
    np.testing.assert_allclose(kappas, encoding.concentration[order], rtol=1e-4)
    uncertainties = [float(row["uncertainty"]) for row in rows]
    np.testing.assert_allclose(uncertainties, (DIM - 1) / (kappas + DIM - 1), rtol=1e-5)
    with Image.open(f"{out}.png") as picture:
        assert picture.format == "PNG"
    assert main(command) == 2
    assert "v1.2.csv exists; say --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def table(concentration: list[float]) -> Table:
    """Images 0, 2, 4, ... of a source whose image i is gray of value 10 i."""
    count, kappa = len(concentration), np.array(concentration, np.float32)
    levels = (10 * np.arange(2 * count, dtype=np.uint8))[:, None, None]
    images = ArraySource(np.broadcast_to(levels, (2 * count, 8, 8)).copy(), name="gray")
    nothing = np.empty((count, 0), np.float32)
    return Table(images, 2 * np.arange(count), nothing, kappa, 10 / (kappa + 10))


def test_the_least_certain_comes_first(tmp_path: Path) -> None:
    """Equal ones keep their order."""
    kappa = np.array([5, 0, 7.25, 5])
    write_ranking(table([5, 0, 7.25, 5]), "kappa", kappa, tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text().splitlines() == [
        "rank,path,kappa,uncertainty",
        "1,gray/2,0,1",
        f"2,gray/0,5,{np.float32(10 / 15):.9g}",
        f"3,gray/6,5,{np.float32(10 / 15):.9g}",
        f"4,gray/4,7.25,{np.float32(10 / 17.25):.9g}",
    ]


@pytest.mark.parametrize("by", ["embedding_norm", "layer2_norm", "knn_distance", "mahalanobis"])
def test_simsiam_is_ranked_by_label_free_scores(
    by: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short embeddings and large distances come first, in the file and in the picture."""
    drawn: list[tuple[str, list[tuple[Image.Image, str]]]] = []
    monkeypatch.setattr(
        ranking, "thumbnails", lambda groups: drawn.extend(groups) or Image.new("L", (1, 1))
    )
    simsiam, out = save_run(tmp_path / "simsiam", "simsiam"), tmp_path / "ranking"
    command = ["rank", str(simsiam), str(folder), "--by", by, "-k", "1", "--out", str(out)]
    assert main([*command, *ON_CPU]) == 0
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert len(rows) == 9
    assert list(rows[0]) == ["rank", "path", by]
    rises = not by.endswith("_norm")
    values = [float(row[by]) for row in rows]
    assert values == sorted(values, reverse=rises)
    assert values[0] != values[-1]
    assert ("highest" if rises else "lowest") in drawn[0][0]
    shown = [float(caption.replace(",", "")) for _, ((_, caption),) in drawn]
    assert shown == pytest.approx([values[0], values[-1]], rel=0.006)

    embedded(simsiam, folder, out=tmp_path / "features.parquet")
    columns = parquet.read_table(tmp_path / "features.parquet").to_pydict()
    saved = dict(zip(columns["path"], columns[by], strict=True))
    assert values == pytest.approx([saved[row["path"]] for row in rows], rel=1e-4)


def test_label_free_columns_by_their_definitions(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among the images themselves, and among a reference, whose neighbours they may be."""
    monkeypatch.setattr(label_free, "_BLOCK", 4)  # several blocks
    out, others = tmp_path / "features.parquet", tmp_path / "others"
    save_images(others, 30, seed=5)
    encoder = vi_simsiam.load(run, "cpu")
    keys = encoder.encode(others).embedding.numpy().astype(np.float64)
    for options, own in (([], True), (["--reference", others, "--overwrite"], False)):
        assert embedded(run, folder, *options, out=out) == 0
        columns = parquet.read_table(out).to_pydict()
        rows = np.array(columns["embedding"])
        among = rows if own else keys
        np.testing.assert_allclose(columns["layer4_norm"], columns["embedding_norm"], rtol=1e-5)
        found = [columns[name] for name in ("embedding_norm", "knn_distance", "mahalanobis")]
        similar = cosines(rows, among)
        if own:
            np.fill_diagonal(similar, -np.inf)
        nearest_ones = -np.sort(-similar, axis=1)[:, : 8 if own else 20]
        covariance = LedoitWolf().fit(among)
        expected = [
            np.linalg.norm(rows, axis=1), 1 - nearest_ones.mean(1), covariance.mahalanobis(rows)
        ]  # fmt: skip
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
        np.testing.assert_allclose(found[2], expected[2], rtol=1e-3)
    assert embedded(run, folder, "--neighbours", 0, "--overwrite", out=out) == 0
    table = parquet.read_table(out)
    counts = [table[name].null_count for name in ("embedding_norm", "knn_distance", "mahalanobis")]
    assert counts == [0, 9, 0]


def test_a_set_of_equal_images_has_no_distances(run: Path, tmp_path: Path) -> None:
    """A single image has no neighbour either."""
    out, (image,) = tmp_path / "features.parquet", save_images(tmp_path / "one", 1)
    assert embedded(run, image, out=out) == 0
    (row,) = parquet.read_table(out).to_pylist()
    assert (row["knn_distance"], row["mahalanobis"], row["neighbours"]) == (None, 0, [])
    same = label_free.Gaussian(np.full((5, 3), 0.1, np.float32))
    assert np.isfinite(same.distances(np.eye(3, dtype=np.float32))).all()


def test_the_picture_shows_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extreme one first, the images' own pixels, and kappa/(D - 1) in the captions."""
    drawn: list[tuple[str, list[tuple[Image.Image, str]]]] = []
    monkeypatch.setattr(ranking, "thumbnails", drawn.extend)
    kappa = [50, 0, 123456, 4.849, 0.0312]
    draw_ranking(table(kappa), "kappa", np.array(kappa), 11, 9)
    assert [title.split(":")[0] for title, _ in drawn] == ["Least certain", "Most certain"]
    shown = [[(image.getpixel((0, 0)), text) for image, text in images] for _, images in drawn]
    low = [((20,) * 3, "0"), ((80,) * 3, "0.00312"), ((60,) * 3, "0.485")]
    assert shown == [low, [((40,) * 3, "12,346"), ((0,) * 3, "5")]]


def test_thumbnails_take_rows_of_eight() -> None:
    image = Image.new("RGB", (300, 200), (255, 0, 0))
    sheet = np.asarray(thumbnails([("nine", [(image, "1")] * 9), ("one", [(image, "κ")])]))
    red = (sheet == (255, 0, 0)).all(-1)
    assert red.sum() == 10 * 112 * 112
    assert red.any(1).sum() == 3 * 112
    assert red.any(0).sum() == 8 * 112


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("embed RUN IMAGES --out OUT.csv", "OUT.csv must end in .parquet"),
        ("embed RUN IMAGES --out OUT/x.parquet", "OUT is no folder; make it first"),
        ("embed RUN IMAGES --out OUT.parquet --neighbours -1", "neighbours: -1"),
        ("embed RUN IMAGES --out OUT.parquet --views 0", "views: 0 must be an integer of at least"),
        ("embed RUN IMAGES/nothing --out OUT.parquet", "images: IMAGES/nothing is not there; give"),
        ("rank RUN LIST.csv --out OUT", "images: LIST.csv has no column path"),
        ("embed RUN BAD --out OUT.parquet", "BAD has 2 images, but none that can be read: BAD/bro"),
        ("embed RUN IMAGES --out OUT.parquet --reference EMPTY", "EMPTY holds no image"),
        ("embed IMAGES IMAGES --out OUT.parquet", "run: IMAGES holds no run"),
        ("embed RUN --out OUT.parquet", "(a folder (at any depth)"),
        ("rank RUN IMAGES --out OUT -k 0", "k: 0 must be at least 1"),
        ("rank RUN IMAGES --out OUT/x", "OUT is no folder; make it first"),
        ("rank RUN IMAGES/000.png --out OUT --by knn_distance", "needs at least 2 images"),
        ("rank SIMSIAM IMAGES --out OUT", "is SimSiam, which predicts no concentration"),
        (
            "rank SIMSIAM IMAGES --out OUT --by norm",
            "by: 'norm' is none of embedding_norm, layer1",
        ),
        ("rank RUN IMAGES --out OUT --by stage1_norm", "by: 'stage1_norm' is none of kappa"),
        ("rank RUN IMAGES --out OUT --by neighbour_agreement", "is one run, and not a folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: str, message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_images(tmp_path / "IMAGES", 2)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BAD").mkdir()
    (tmp_path / "LIST.csv").write_text("a,b\n1,2\n")
    for name in ("broken.png", "other.gif"):
        (tmp_path / "BAD" / name).write_bytes(b"nothing")
    for name in ("IMAGES", "EMPTY", "BAD", "LIST", "OUT"):
        place = str(tmp_path / name)
        arguments, message = arguments.replace(name, place), message.replace(name, place)
    if "SIMSIAM" in arguments:
        save_run(tmp_path / "SIMSIAM", "simsiam")
        arguments = arguments.replace("SIMSIAM", str(tmp_path / "SIMSIAM"))
    before = sorted(tmp_path.rglob("*"))
    assert main([*arguments.replace("RUN", str(run)).split(), *ON_CPU]) == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if not line.startswith("skipped: ")]
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before
