"""Options from the command line, and the run that most commands begin with."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from unittest import mock

import tyro

from vi_simsiam.cli.commands import BENCHMARKS, COMMANDS
from vi_simsiam.errors import InputError, none_of
from vi_simsiam.paths import user_path

if TYPE_CHECKING:
    from vi_simsiam.engine.run import Run

_Options = TypeVar("_Options")

# Messages of Python and tyro in the words of our own.
_PLAIN = {
    r"invalid literal for int\(\) with base 10: ('.*')": r"\1 is not accepted; it must be an integer",
    r"could not convert string to float: ('.*')": r"\1 is not accepted; it must be a number",
    r"no type matching (.*) could be instantiated from \[(.*)\]\.": r"\2 is not accepted; it must be \1",
    r"Missing value for argument '([^']*)'\. Expected 1 values?\.": r"\1: a value is missing",
    r"Missing value for argument '([^']*)'\. Expected (\d+) values\.": r"\1: it takes \2 values",
}

RunPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


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
    for place, word in enumerate(arguments):
        given, _, attached = word.partition("=")
        if given.replace("_", "-") == option:
            value = attached or (arguments[place + 1] if place + 1 < len(arguments) else None)
    return value


def parse(
    command: str, kind: type[_Options], arguments: list[str], default: _Options | None = None
) -> _Options:
    """`arguments` as an instance of `kind`; tyro's box around an error becomes one line."""
    box = io.StringIO()
    # One line takes a wide terminal: tyro would break a long path in two.
    wide = {} if {"-h", "--help"} & set(arguments) else {"COLUMNS": "10000"}
    try:
        with contextlib.redirect_stderr(box), mock.patch.dict(os.environ, wide):
            parsed: _Options = tyro.cli(
                kind,
                prog=f"vi-simsiam {command}",
                description=_about(command),
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes,),
                default=tyro.MISSING_NONPROP if default is None else default,
            )
            return _with_homes(parsed)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(
            f"{_message(command, box.getvalue())} (see vi-simsiam {command} --help)"
        ) from None


def _with_homes(options: _Options) -> _Options:
    """Options with the home folder in the place of ~ in every path."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = _with_homes(value)
        elif isinstance(value, Path):
            changed[field.name] = user_path(field.name, value)
        elif isinstance(value, tuple):
            changed[field.name] = tuple(
                user_path(field.name, v) if isinstance(v, Path) else v for v in value
            )
    return dataclasses.replace(options, **changed)  # type: ignore[type-var]


def _about(command: str) -> str:
    name, _, benchmark = command.partition(" ")
    about = BENCHMARKS[benchmark][1] if benchmark else COMMANDS[name][1]
    first = about if about.startswith(("kNN", "k-")) else about[:1].upper() + about[1:]
    return first if first.endswith(".") else f"{first}."


def _message(command: str, box: str) -> str:
    """The message in tyro's box of title, message, a rule, and advice, with the options that the advice names.

    Where standard output cannot print lines the box has none, but for rules of hyphens, one of them below the title.
    """
    lines = [line[2:].rstrip(" │") for line in box.splitlines()[1:]]
    lines = lines[1:] if lines and set(lines[0]) == {"-"} else lines
    rule = next((i for i, line in enumerate(lines) if set(line) <= set("─╰╯- ")), len(lines))
    message = re.sub(
        r"^Error parsing (\w+: )?", "", " ".join(line.strip() for line in lines[:rule])
    )
    if message.startswith("Missing from"):  # names are indented by four spaces, their help by eight
        found = re.findall(r"^ {4}(\S.*)\n {8}(.*)$", "\n".join(lines[:rule]), re.MULTILINE)
        return f"missing: {', '.join(f'{name} ({_phrase(text)})' for name, text in found)}"
    if choice := re.fullmatch(
        r"invalid choice '(.*)' for argument '([^']*)'\. Expected one of \((.*)\)\.?", message
    ):
        given, option, accepted = choice.groups()
        return str(none_of(option, given, re.findall(r"'([^']*)'", accepted)))
    advice = "\n".join(lines[rule:]).partition("Perhaps you meant:")[2]
    if near := re.findall(r"^ *(--[a-z][\w-]*)", advice, re.MULTILINE):
        message += f"; did you mean {' or '.join(near[:2])}?"
    elif command in ("train", "views") and (
        stray := re.match(r"Unrecognized options: ([^-,\s][^,]*)", message)
    ):
        message += (
            f"; did you mean --data {stray[1]}?" if user_path("data", stray[1]).exists() else ""
        )
    for pattern, plain in _PLAIN.items():
        message = re.sub(pattern, plain, message)
    return message


def _phrase(sentence: str) -> str:
    """A help text as the inside of brackets."""
    text = sentence.removesuffix("(required)").strip().rstrip(".")
    return text[:1].lower() + text[1:]
