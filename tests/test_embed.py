"""`vi-simsiam embed`: the file's rows, neighbours against brute force, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_cases import DIM, save_images, save_run
from pyarrow import parquet

import vi_simsiam
from vi_simsiam.cli import main
from vi_simsiam.data.files import find_images
from vi_simsiam.inference import embed
from vi_simsiam.inference.embed import nearest

CPU = torch.device("cpu")
ON_CPU = ["--device", "cpu", "--workers", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("embed") / "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine images, one of them in a folder below, and two that cannot be read."""
    save_images(tmp_path / "images", 8)
    save_images(tmp_path / "images" / "more", 1, seed=3)
    (tmp_path / "images" / "004 broken.png").write_bytes(b"\x89PNG and then nothing")
    (tmp_path / "images" / "empty.jpg").touch()
    return tmp_path / "images"


def cosines(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(keys, axis=1)
    return np.divide(queries @ keys.T, lengths, out=np.zeros_like(lengths), where=lengths > 0)


@pytest.mark.parametrize("own", [True, False])
def test_neighbours_are_those_of_brute_force(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several blocks of queries and keys, with a row of zeros."""
    monkeypatch.setattr(embed, "_ROWS", 7)
    monkeypatch.setattr(embed, "_KEYS", 5)
    generator = np.random.default_rng(0)
    queries = generator.normal(size=(23, 6)).astype(np.float32)
    queries[4] = 0
    keys = queries if own else generator.normal(size=(12, 6)).astype(np.float32)
    blocks = list(nearest(queries, None if own else keys, 6, device=CPU))
    assert [len(which) for which, _ in blocks] == [7, 7, 7, 2]
    which, values = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    expected = cosines(queries.astype(np.float64), keys.astype(np.float64))
    if own:
        np.fill_diagonal(expected, -np.inf)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :6]
    rows = np.arange(23) != 4
    # In float32 a cosine is off by (F + 4) eps, 1.2e-6, at most: none can change places with the next.
    assert np.diff(np.sort(expected[rows], axis=1)[:, 1:]).min() > 1e-5
    np.testing.assert_array_equal(which[rows], order[rows])
    np.testing.assert_allclose(values, np.take_along_axis(expected, which, axis=1), atol=1e-6)
    assert all(len(set(row)) == 6 for row in which.tolist())


def test_there_are_no_more_neighbours_than_others() -> None:
    ((which, values),) = nearest(np.eye(3, dtype=np.float32), None, 5, device=CPU)
    assert which.tolist() == [[1, 2], [0, 2], [0, 1]]
    assert values.shape == (3, 2)
    ((which, _),) = nearest(np.ones((1, 3), np.float32), None, 5, device=CPU)
    assert which.shape == (1, 0)


def test_the_file_holds_what_the_encoder_says(
    run: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embed, "_ROWS", 4)
    out = tmp_path / "features.parquet"
    command = [
        "embed",
        str(run),
        str(folder),
        "--out",
        str(out),
        "--neighbours",
        "3",
        "--batch-size",
        "4",
        *ON_CPU,
    ]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out == f"written: {out} (9 images, 2 skipped)\n"
    assert [line.split(" (")[0] for line in said.err.splitlines()] == [
        f"skipped: {folder / '004 broken.png'}",
        f"skipped: {folder / 'empty.jpg'}",
    ]
    assert "an empty file" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.parquet", "images"]

    paths = [
        path for path in find_images(folder).paths if "broken" not in path and "empty" not in path
    ]
    expected = vi_simsiam.load(run, "cpu").encode(paths)
    file = parquet.ParquetFile(out)
    assert file.metadata.num_row_groups == 3
    table = file.read()
    columns = table.to_pydict()
    assert columns["path"] == paths
    assert str(table.schema.field("embedding").type) == "list<element: float>"
    embedding = np.array(columns["embedding"], np.float32)
    np.testing.assert_allclose(embedding, expected.embedding.numpy(), atol=1e-5)
    np.testing.assert_allclose(columns["concentration"], expected.concentration.numpy(), rtol=1e-4)  # type: ignore[union-attr]
    np.testing.assert_allclose(columns["uncertainty"], expected.uncertainty.numpy(), rtol=1e-4)
    similar = cosines(embedding.astype(np.float64), embedding.astype(np.float64))
    np.fill_diagonal(similar, -np.inf)
    for row, (near, values) in enumerate(
        zip(columns["neighbours"], columns["similarities"], strict=True)
    ):
        best = -np.sort(-similar[row])[:3]
        assert len({paths[row], *near}) == 4
        # Which of two that are as near comes first may be a matter of rounding; that they are the nearest is not.
        np.testing.assert_allclose(
            similar[row][[paths.index(path) for path in near]], best, atol=1e-5
        )
        np.testing.assert_allclose(values, best, atol=1e-5)

    about = json.loads(table.schema.metadata[b"vi_simsiam"])
    assert (about["run"], about["method"], about["dim"], about["features"]) == (
        str(run),
        "vi-simsiam",
        DIM,
        512,
    )
    assert about["view"] == "shorter side resized to 16 pixels (bicubic), centre crop"
    assert about["versions"]["vi-simsiam"] == vi_simsiam.__version__

    before = out.read_bytes()
    assert main(command) == 2
    assert f"out: {out} exists; say --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main([*command, "--overwrite", "--views", "2", "--neighbours", "0"]) == 0
    again = parquet.read_table(out)
    assert again["neighbours"].null_count == again["similarities"].null_count == 9
    joined = vi_simsiam.load(run, "cpu").encode(paths, views=2)
    assert "2 random global views" in json.loads(again.schema.metadata[b"vi_simsiam"])["view"]
    # Views are keyed by the image's number in the folder, which counts those that cannot be read: the first four agree.
    given = again["concentration"].to_numpy()[:4]
    np.testing.assert_allclose(given, joined.concentration[:4].numpy(), rtol=1e-4)  # type: ignore[index]


def test_neighbours_in_a_reference(run: Path, folder: Path, tmp_path: Path) -> None:
    """An image that is in the reference, too, finds itself there."""
    out = tmp_path / "features.parquet"
    one = folder / "005.png"
    reference = ["--reference", str(folder), "--neighbours", "2"]
    assert main(["embed", str(run), str(one), "--out", str(out), *reference, *ON_CPU]) == 0
    (row,) = parquet.read_table(out).to_pylist()
    assert row["neighbours"][0] == row["path"] == str(one)
    assert row["similarities"][0] == pytest.approx(1, abs=1e-6)
    assert row["similarities"][1] < row["similarities"][0]


def test_simsiam_is_embedded_without_uncertainty(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "simsiam", "simsiam")
    out = tmp_path / "features.parquet"
    assert main(["embed", str(run), str(folder), "--out", str(out), *ON_CPU]) == 0
    assert (
        "concentration and uncertainty are empty: a SimSiam run predicts none"
        in capsys.readouterr().out
    )
    table = parquet.read_table(out)
    assert (
        table["concentration"].null_count == table["uncertainty"].null_count == table.num_rows == 9
    )
    assert table["embedding"].null_count == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("RUN IMAGES --out OUT.csv", "OUT.csv must end in .parquet"),
        ("RUN IMAGES --out OUT/x.parquet", "OUT is no folder; make it first"),
        ("RUN IMAGES --out OUT.parquet --neighbours -1", "neighbours: -1"),
        ("RUN IMAGES --out OUT.parquet --views 0", "views: 0 must be an integer of at least 1"),
        ("RUN IMAGES --out OUT.parquet --batch-size 0", "batch_size: 0"),
        (
            "RUN IMAGES/nothing --out OUT.parquet",
            "images: IMAGES/nothing is not there; give an image, a folder of images, a pack file, or one of fashion",
        ),
        (
            "RUN BAD --out OUT.parquet",
            "images: BAD has 2 images, but none that can be read: BAD/broken.png",
        ),
        ("RUN EMPTY --out OUT.parquet", "images: EMPTY holds no image"),
        ("RUN IMAGES --out OUT.parquet --reference EMPTY", "EMPTY holds no image"),
        ("IMAGES IMAGES --out OUT.parquet", "run: IMAGES holds no run"),
        ("RUN --out OUT.parquet", "(a folder (all images in it"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: str, message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_images(tmp_path / "IMAGES", 2)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BAD").mkdir()
    for name in ("broken.png", "other.gif"):
        (tmp_path / "BAD" / name).write_bytes(b"nothing")
    for name in ("IMAGES", "EMPTY", "BAD", "OUT"):
        arguments, message = (
            text.replace(name, str(tmp_path / name)) for text in (arguments, message)
        )
    before = sorted(tmp_path.rglob("*"))
    assert main(["embed", *arguments.replace("RUN", str(run)).split(), *ON_CPU]) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("skipped: ")
    ]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before
