"""Options from the command line, and the run that most commands begin with."""

from __future__ import annotations

import contextlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar
from unittest import mock

import tyro

from vi_simsiam.errors import InputError

if TYPE_CHECKING:
    from vi_simsiam.engine.run import Run

_Options = TypeVar("_Options")

RunPath = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class RunOptions:
    """Which run, and where it is computed."""

    run: RunPath
    """A run folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int | None = None
    """Processes that read images; None for a number that suits the device."""
    data: str | None = None
    """The data set, where it has moved since training; None for the run's own."""
    data_root: Path | None = None
    """Where downloaded data sets are; None for the run's own."""
    cache_dir: Path | None = None
    """Where decoded images are kept; None for the run's own place."""


def open_run(options: RunOptions, device: str | None = None) -> Run:
    """The run that the options name; `device` goes before theirs."""
    from vi_simsiam.engine.run import load_run

    return load_run(
        options.run,
        device=device or options.device,
        workers=options.workers,
        data=options.data,
        data_root=options.data_root,
        cache_dir=options.cache_dir,
    )


def said(arguments: list[str], option: str) -> str | None:
    """The value that an option is given, if it is: known before tyro reads all the others."""
    value = None
    for name, following in zip(arguments, [*arguments[1:], ""], strict=True):
        given, _, attached = name.partition("=")
        if given == option:
            value = attached or following
    return value


def parse(command: str, kind: type[_Options], arguments: list[str], default: _Options | None = None) -> _Options:
    """`arguments` as an instance of `kind`; what tyro has to say against them becomes one line."""
    said = io.StringIO()
    # One line takes a wide terminal: tyro would break a long path in two.
    wide = {} if {"-h", "--help"} & set(arguments) else {"COLUMNS": "10000"}
    try:
        with contextlib.redirect_stderr(said), mock.patch.dict(os.environ, wide):
            parsed: _Options = tyro.cli(
                kind,
                prog=f"vi-simsiam {command}",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes,),
                default=tyro.MISSING_NONPROP if default is None else default,
            )
            return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
        # A box: title, message, a rule, then advice.
        lines = [line.strip("│ ") for line in said.getvalue().splitlines()[1:]]
        message = " ".join(lines[: next((i for i, line in enumerate(lines) if set(line) <= set("─╰╯")), len(lines))])
        message = re.sub(r"^Error parsing \w+: ", "", message)
        raise InputError(f"{message} (see vi-simsiam {command} --help)") from None
