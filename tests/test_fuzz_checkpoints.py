"""Whatever the bytes of a checkpoint are, it is loaded whole or refused in one line."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import FIXTURES
from test_fuzz_packs import change_bytes, change_header

from vi_simsiam.engine.checkpoint import FORMER, Checkpoint
from vi_simsiam.engine.run import read_config
from vi_simsiam.errors import InputError
from vi_simsiam.models import build_model

EVERY_DAY, SOAK = 300, 50_000
NAME = "checkpoint-00000003.safetensors"
_MARK, _ZEROS = b'"crc32":"', b"00000000"


def sealed(content: bytes) -> bytes:
    """The content with the checksum that fits, if there is a place for one."""
    place = content.find(_MARK) + len(_MARK)
    if place < len(_MARK) or len(content) < place + 8:
        return content
    whole = content[:place] + _ZEROS + content[place + 8 :]
    return whole[:place] + b"%08x" % zlib.crc32(whole) + whole[place + 8 :]


def joined(header: dict[str, object], tensors: bytes) -> bytes:
    """A safetensors file of these parts."""
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return len(encoded).to_bytes(8, "little") + encoded + tensors


@pytest.fixture
def load(small_network: None, tmp_path: Path) -> Callable[[str, bytes], bool]:
    """Loads a checkpoint with some bytes into a model; True if it was accepted."""
    model = build_model(read_config(FIXTURES / "run-2"))
    kept = Checkpoint.load(FIXTURES / "run-2" / NAME)
    momentum = {name: torch.zeros_like(kept.momentum[name]) for name, _ in model.named_parameters()}
    shapes = {name: (x.shape, x.dtype) for name, x in model.state_dict().items()}

    def use(name: str, content: bytes) -> bool:
        path = tmp_path / name
        path.write_bytes(content)
        message = ""
        try:
            found = Checkpoint.load(path)
            assert isinstance(found.step, int)
            assert 0 <= len(found.losses) <= found.step
            found.restore(model, momentum)
        except InputError as error:
            message = str(error)
        assert "\n" not in message
        assert {key: (x.shape, x.dtype) for key, x in model.state_dict().items()} == shapes
        return not message

    return use


def fuzz(examples: int, load: Callable[[str, bytes], bool], *, derandomize: bool) -> None:
    """Load so many changed checkpoints of both formats, most of them with the right checksum."""
    whole, former = ((FIXTURES / run / name).read_bytes() for run, name in (
        ("run-2", NAME), ("run-1", FORMER)))  # fmt: skip
    end = 8 + int.from_bytes(whole[:8], "little")
    header, tensors = json.loads(whole[8:end]), whole[end:]
    state = json.loads(header["__metadata__"]["vi_simsiam"])
    assert load(NAME, sealed(joined(header, tensors)))
    assert load(FORMER, former)

    @settings(max_examples=examples, deadline=None, database=None, derandomize=derandomize)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        kind = data.draw(st.integers(0, 5))
        if kind == 0:
            changed = change_bytes(data, whole)
            assert changed == whole or not load(NAME, changed)
        elif kind == 1:
            load(NAME, sealed(change_bytes(data, whole)))
        elif kind == 2:
            load(FORMER, change_bytes(data, former))
        elif kind == 3:
            load(NAME, sealed(joined(change_header(data, header), tensors)))
        else:
            inside = {"vi_simsiam": json.dumps(change_header(data, state)), "crc32": "00000000"}
            load(NAME, sealed(joined({**header, "__metadata__": inside}, tensors)))

    check()


def test_checkpoints_of_any_content(load: Callable[[str, bytes], bool]) -> None:
    """Models keep their shapes and types, and no damage passes without the right checksum."""
    fuzz(EVERY_DAY, load, derandomize=True)


@pytest.mark.soak
def test_checkpoints_of_any_content_for_minutes(load: Callable[[str, bytes], bool]) -> None:
    fuzz(SOAK, load, derandomize=False)
