"""The command line, `vi-simsiam COMMAND`."""

from __future__ import annotations

import functools
import importlib
import io
import os
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from vi_simsiam.cli.commands import COMMANDS
from vi_simsiam.errors import ImageWarning, UserError, none_of
from vi_simsiam.text import one_line

_HELP = ("-h", "--help")
_BROKEN_PIPE = 141  # as of a program that SIGPIPE ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the input cannot be used, 130 interrupted, 141 output that nobody reads."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.closed and not _takes_all(stream):
            stream.reconfigure(
                errors="backslashreplace"
            )  # what the terminal's encoding cannot print
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", ImageWarning)
            warnings.showwarning = functools.partial(_show_warning, warnings.showwarning, set())
            code = _run(given)
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
        return code
    except UserError as error:
        if str(error):
            print(one_line(f"vi-simsiam: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return _BROKEN_PIPE
        named = (
            f"{error.filename}: {error.strerror}"
            if error.filename and error.strerror
            else str(error)
        )
        print(one_line(f"vi-simsiam: {named or type(error).__name__}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vi-simsiam: interrupted", file=sys.stderr)
        return 130


def _takes_all(stream: io.TextIOWrapper) -> bool:
    """Whether it prints every character, and names that are no text byte by byte, as under the C.UTF-8 locale."""
    return stream.encoding.lower() == "utf-8" and stream.errors == "surrogateescape"


def _show_warning(
    others: Callable[..., None],
    shown: set[str],
    message: Warning | str,
    category: type[Warning],
    *place: Any,
    **more: Any,
) -> None:
    """One line for what concerns a user's images, once for all that reads them; `others` shows other warnings."""
    if issubclass(category, ImageWarning):
        # A run has the absolute paths of what was given relative to this folder.
        if (text := str(message).replace(os.path.join(os.getcwd(), ""), "")) not in shown:
            print(one_line(f"warning: {message}"), file=sys.stderr)
        shown.add(text)
    else:
        others(message, category, *place, **more)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has ended, as `head` does; what is left to print goes nowhere then."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(1)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone


def _run(given: list[str]) -> int:
    if given[:1] == ["help"]:
        given = [*given[1:], "--help"]
    if not given or given[0] in _HELP:
        print(_usage())
        return 0 if given else 2
    if given[0] in ("-V", "--version"):
        import vi_simsiam

        print(f"vi-simsiam {vi_simsiam.__version__}")
        return 0
    name, *rest = given
    if name not in COMMANDS:
        raise none_of("command", name, COMMANDS)
    try:
        return _command(name)(rest)
    except SystemExit as stop:  # after a command's help; Rich ends with 1 where nobody reads
        if stop.code not in (0, None, 1):
            raise
        return _BROKEN_PIPE if stop.code else 0


def _command(name: str) -> Callable[[list[str]], int]:
    module = importlib.import_module(f"vi_simsiam.cli.{COMMANDS[name][0]}")
    function: Callable[[list[str]], int] = getattr(module, name)
    return function


def _usage() -> str:
    commands = "\n".join(f"  {name:12}{about}" for name, (_, about) in COMMANDS.items())
    return (
        f"usage: vi-simsiam COMMAND [OPTIONS]\n\n{commands}\n\n"
        "vi-simsiam help COMMAND lists a command's options; vi-simsiam --version prints the version.\n"
        "First steps: vi-simsiam train --evaluate trains on embedded images, on a CPU in a few minutes."
    )
