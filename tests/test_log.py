"""The log of a run: its lines, and what becomes of damaged ones."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from evaluation_cases import make_run, skip_rendering
from rich.console import Console
from test_resume import damaged

from vi_simsiam import files
from vi_simsiam.engine.log import read_log
from vi_simsiam.engine.monitor import Monitor
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.report import write_report
from vi_simsiam.files import json_lines

DAMAGED = (
    b"[1]", b'{"step": "one"}', b'{"loss": 1}', b'{"step": -1}', b'{"step": 1, "kappa": "x"}',
    b'{"step": 1e400}', b'{"step": 2, "lo', b'{"step": 1, "\xee": 2}', b'{"step": 1, "step": 2}',
)  # fmt: skip


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    good = (b'{"step": 1, "loss": NaN, "later": "new"}', b'{"step": 2.0, "kappa": null}')
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], *DAMAGED, good[1], b""]))
    (first, second), damaged = read_log(tmp_path)
    assert damaged == len(DAMAGED)
    assert math.isnan(first["loss"])
    assert first["later"] == "new"
    assert second == {"step": 2.0, "kappa": None}


def test_no_damaged_bit_becomes_another_figure(tmp_path: Path) -> None:
    first, second = ({"step": step, "loss": -0.25, "state": "dead"} for step in (10, 20))
    encoded = json_lines([first, second]).encode()
    (tmp_path / "metrics.jsonl").write_bytes(encoded)
    assert read_log(tmp_path) == ([first, second], 0)
    for bit in range(8 * encoded.index(b"\n")):
        (tmp_path / "metrics.jsonl").write_bytes(damaged(encoded, *divmod(bit, 8)))
        found, count = read_log(tmp_path)
        assert found == [second], bit
        assert count > 0, bit


def test_a_log_may_be_larger_than_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a line for each of millions of steps; the ends of lines may be Windows'."""
    monkeypatch.setattr(files, "_MOST_BYTES", 100)
    lines = [{"step": step, "loss": -0.25} for step in range(100)]
    encoded = json_lines(lines).encode()
    for content in (encoded, encoded.replace(b"\n", b"\r\n")):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        assert read_log(tmp_path) == (lines, 0)
    monkeypatch.setattr(files, "_LONGEST_LINE", 20)
    assert read_log(tmp_path) == ([], 100)


def test_a_line_that_is_too_long_counts_once_and_its_end_is_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LONGEST_LINE", 50)
    long, whole = " " * 100 + '{"step": 7}\n', '{"step": 8}\n'
    (tmp_path / "metrics.jsonl").write_text(long + whole)
    assert read_log(tmp_path) == ([{"step": 8}], 1)


def test_without_a_log_there_are_no_lines(tmp_path: Path) -> None:
    assert read_log(tmp_path) == ([], 0)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"run: .*metrics.jsonl cannot be read"):
        read_log(tmp_path)


def test_damaged_lines_are_mentioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_rendering(monkeypatch)
    run, printed = make_run(tmp_path), io.StringIO()
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + b"\n".join(DAMAGED[:2]))
    assert "2 damaged lines of metrics.jsonl left out" in write_report(tmp_path).read_text()
    console = Console(file=printed)
    with Monitor(tmp_path, run.config, step=20, steps_per_epoch=20, console=console) as monitor:
        assert monitor.last is not None
        assert monitor.last["step"] == 20
    assert printed.getvalue() == "warning: 2 damaged lines of metrics.jsonl left out\n"
    assert read_log(tmp_path)[1] == 0
