"""Commands and messages in Markdown, and the messages that the source can print."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vi_simsiam.cli import COMMANDS, main
from vi_simsiam.cli.parsing import parse

ROOT = Path(__file__).parents[1]
# Fewer fixed characters than these would fit nearly any message.
_LEAST_FIXED = 15


class Accepted(Exception):
    """The options of a command were accepted; nothing else of it runs."""


def shell_lines(text: str) -> list[str]:
    """Return the lines of every sh block."""
    return "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()


def without_code(text: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def inline_code(text: str) -> list[str]:
    """Return the code in sentences and tables, each piece on one line."""
    found: list[str] = re.findall(r"`([^`]+)`", without_code(text))
    return [" ".join(code.split()) for code in found]


def commands(lines: list[str]) -> list[str]:
    """Return the lines that call vi-simsiam, without comments."""
    calls = [line.split(" # ")[0].strip() for line in lines]
    return [call for call in calls if re.match(r"vi-simsiam( |$)", call)]


def stop_after_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every command end in `Accepted` once its options are parsed."""

    def accept(*arguments: Any, **named: Any) -> None:
        parse(*arguments, **named)
        raise Accepted

    for module in {module for module, _ in COMMANDS.values()}:
        monkeypatch.setattr(importlib.import_module(f"vi_simsiam.cli.{module}"), "parse", accept)


def is_accepted(command: str) -> bool:
    """Return True if the parser takes the command's options, or the command is a bare name."""
    words = shlex.split(command)[1:]
    if len(words) == 1 and words[0] in COMMANDS:
        return True
    try:
        return main(words) == 0  # help, which parses nothing
    except Accepted:
        return True


def messages() -> Iterator[re.Pattern[str]]:
    """Yield patterns for texts of the package with enough fixed characters, with any values."""
    for path in (ROOT / "vi_simsiam").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if sum(len(text) for text in texts if isinstance(text, str)) >= _LEAST_FIXED:
                pattern = "".join(".*" if text is None else re.escape(str(text)) for text in texts)
                yield re.compile(pattern, re.DOTALL)
