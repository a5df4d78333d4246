"""Options from the command line, and the run that most commands begin with."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from unittest import mock

import tyro

from vi_simsiam.cli import BENCHMARKS, COMMANDS
from vi_simsiam.data_names import joined_spec
from vi_simsiam.errors import InputError, none_of
from vi_simsiam.paths import user_path

if TYPE_CHECKING:
    from vi_simsiam.config import DecodeConfig
    from vi_simsiam.data.datasets import Splits
    from vi_simsiam.engine.run import Run

_Options = TypeVar("_Options")

# Messages of Python and tyro, and their plain forms.
_REFUSED = "is not accepted; it must be"
_PLAIN = {
    r"invalid literal for int\(\) with base 10: ('.*')": rf"\1 {_REFUSED} an integer",
    r"could not convert string to float: ('.*')": rf"\1 {_REFUSED} a number",
    r"no type matching (.*) could be instantiated from \[(.*)\]\.": rf"\2 {_REFUSED} \1",
    r"Missing value for argument '([^']*)'\. Expected 1 values?\.": r"\1: a value is missing",
    r"Missing value for argument '([^']*)'\. Expected (\d+) values\.": r"\1: it takes \2 values",
}

RunPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Places of data sets."""

    data_root: Path = Path("data")
    """Where downloaded data sets are kept or looked for."""
    offline: bool = False
    """Never download."""

    def open(self, data: str, decode: DecodeConfig) -> Splits:
        """Open a data set by its path or name; download it unless `offline` is set."""
        from vi_simsiam.data.datasets import open_dataset

        return open_dataset(data, root=self.data_root, download=not self.offline, decode=decode)


@dataclass(frozen=True)
class RunOptions:
    """A run, its images and its device."""

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
    """Open the run of the options, on `device` if it is given."""
    from vi_simsiam.engine.run import load_run

    named = {field.name: getattr(options, field.name) for field in dataclasses.fields(RunOptions)}
    return load_run(named.pop("run"), **named | ({"device": device} if device else {}))


def of_images(error: InputError, images: str, accepted: str) -> InputError:
    """The error of opening a data set that was given as IMAGES; `accepted` completes "give"."""
    text = str(error)
    if text.startswith(f"data: {images!r} is not there"):
        return InputError(f"images: {images} is not there; give {accepted}")
    return InputError(f"images:{text[5:]}") if text.startswith("data:") else error


def given(arguments: list[str], option: str) -> str | None:
    """Return the last value of an option, or None, before all options are parsed."""
    value = None
    for word, following in itertools.zip_longest(arguments, arguments[1:]):
        name, _, attached = word.partition("=")
        if name.replace("_", "-") == option:
            value = attached or following
    return value


def with_folders(arguments: list[str]) -> list[str]:
    """Join the words after --data, which may come several times, to one name of a data set."""
    kept: list[str] = []
    folders: list[str] = []
    first, taken = None, False
    for word in arguments:
        option, equals, attached = word.partition("=")
        if word.startswith("-"):
            taken = option == "--data"
        if not taken:
            kept.append(word)
        elif not word.startswith("-"):
            folders.append(word)
        else:
            first = len(kept) if first is None else first
            folders += [attached] if equals else []
    if first is None or not folders:
        return arguments
    return [*kept[:first], "--data", joined_spec(folders), *kept[first:]]


def parse(
    command: str, kind: type[_Options], arguments: list[str], default: _Options | None = None
) -> _Options:
    """Parse `arguments` as an instance of `kind`.

    Raises:
        InputError: the arguments are not accepted; tyro's box around the message becomes one line.
    """
    box = io.StringIO()
    # tyro breaks long lines at the width of the terminal, paths included.
    wide = {} if {"-h", "--help"} & set(arguments) else {"COLUMNS": "10000"}
    try:
        with contextlib.redirect_stderr(box), mock.patch.dict(os.environ, wide):
            parsed = tyro.cli(
                kind,
                prog=f"vi-simsiam {command}",
                description=_about(command),
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes,),
                default=tyro.MISSING_NONPROP if default is None else default,
            )
            expanded: _Options = _expand_home(parsed)
            return expanded
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _message(command, box.getvalue())
        raise InputError(f"{message} (see vi-simsiam {command} --help)") from None


def _expand_home(value: Any, name: str = "") -> Any:
    """Replace ~ by the home folder in every path of an instance of a dataclass."""
    if isinstance(value, Path):
        return user_path(name, value)
    if isinstance(value, tuple):
        return tuple(_expand_home(each, name) for each in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    names = (field.name for field in dataclasses.fields(value))
    return dataclasses.replace(value, **{n: _expand_home(getattr(value, n), n) for n in names})


def _about(command: str) -> str:
    _, _, benchmark = command.partition(" ")
    about = BENCHMARKS[benchmark][1] if benchmark else COMMANDS[command][1]
    first = about if about.startswith(("kNN", "k-")) else about[:1].upper() + about[1:]
    return f"{first.removesuffix('.')}."


def _message(command: str, box: str) -> str:
    """Return the message in tyro's box of title, message, a rule, and advice."""
    # If standard output cannot print lines, the box has only rules of hyphens, one below the title.
    lines = [line[2:].rstrip(" │") for line in box.splitlines()[1:]]
    lines = lines[1:] if lines and set(lines[0]) == {"-"} else lines
    rule = next((i for i, line in enumerate(lines) if set(line) <= set("─╰╯- ")), len(lines))
    text, advice = "\n".join(lines[:rule]), "\n".join(lines[rule:])
    message = " ".join(line.strip() for line in lines[:rule])
    message = re.sub(r"^Error parsing (\w+: )?", "", message)
    if message.startswith("Missing from"):  # names are indented by four spaces, their help by eight
        missing = re.findall(r"^ {4}(\S.*)\n {8}(.*)$", text, re.MULTILINE)
        return f"missing: {', '.join(f'{name} ({_phrase(about)})' for name, about in missing)}"
    if choice := re.fullmatch(
        r"invalid choice '(.*)' for argument '([^']*)'\. Expected one of \((.*)\)\.?", message
    ):
        value, option, accepted = choice.groups()
        return str(none_of(option, value, re.findall(r"'([^']*)'", accepted)))
    near = re.findall(
        r"^ *(--[a-z][\w-]*)", advice.partition("Perhaps you meant:")[2], re.MULTILINE
    )
    stray = re.match(r"Unrecognized options: ([^-,\s][^,]*)", message)
    if near:
        message += f"; did you mean {' or '.join(near[:2])}?"
    elif command in ("train", "views") and stray and user_path("data", stray[1]).exists():
        message += f"; did you mean --data {stray[1]}?"
    for pattern, plain in _PLAIN.items():
        message = re.sub(pattern, plain, message)
    return message


def _phrase(sentence: str) -> str:
    """Return a help text as the inside of brackets."""
    text = sentence.removesuffix("(required)").strip().rstrip(".")
    return text[:1].lower() + text[1:]
