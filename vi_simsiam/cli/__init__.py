"""The command line, `vi-simsiam COMMAND`; the modules of commands are imported on first use."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from vi_simsiam.errors import LineWarning, UserError, cut, is_out_of_memory, none_of
from vi_simsiam.text import one_line

COMMANDS = {
    "train": ("train", "train SimSiam or VI-SimSiam into a run folder"),
    "fit-kappa": ("fit", "kappa for any finished encoder: a run, or a network with weights"),
    "evaluate": ("evaluate", "kNN, linear probe and figures of a run, with a summary"),
    "knn": ("evaluate", "k-nearest-neighbour accuracy of a run's frozen features"),
    "linear": ("evaluate", "linear-probe accuracy of a run's frozen features"),
    "logistic": ("evaluate", "logistic-regression accuracy of a run's frozen features"),
    "figures": ("evaluate", "curves, kappa gallery, density and uncertainty of a run as pictures"),
    "uncertainty": ("evaluate", "quality of kappa: calibration, errors, foreign or damaged images"),
    "report": ("evaluate", "all results of a run in one HTML file"),
    "doctor": ("doctor", "the state of a run in words: its problems, and what to do"),
    "embed": ("use", "embeddings, kappa and neighbours of your images as a Parquet file"),
    "rank": ("use", "your most and least certain images"),
    "clean": ("clean", "copies, blank or unrelated images and doubtful labels of a folder"),
    "export": (
        "export",
        "a run's weights for torchvision, timm, safetensors or ONNX, with a model card",
    ),
    "push-to-hub": ("export", "a run's weights and model card as a repository on Hugging Face"),
    "experiment": (
        "experiment",
        "many runs with their statistics: table1, tuned, controls, stability, ...",
    ),
    "pack": ("data", "decode images once into one file to train on"),
    "views": ("data", "a picture of some images and their random views"),
    "info": ("use", "versions, devices, and which backends are available"),
    "bench": (
        "use",
        "benchmarks: bench loss|batch_norm|augment|step|train|record|compare|accuracy|clean|report",
    ),
}
"""By name: the module in this package with the function of that name, and a description."""

BENCHMARKS = {
    "loss": ("multiview_loss", "time the loss: eager, torch.compile and the fused backends"),
    "batch_norm": ("batch_norm", "BatchNorm, addition and ReLU: torch, torch.compile and ours"),
    "augment": ("augment", "views a second: ours, torchvision, lightly and kornia"),
    "step": ("step", "the training step by phase, against the network alone"),
    "train": ("train", "whole trainings: ours, plain and tuned PyTorch, lightly"),
    "record": ("record", "seconds from a cold start to a kNN accuracy, change by change"),
    "compare": ("compare", "two result files; exits 1 if anything became slower beyond the noise"),
    "accuracy": ("accuracy", "errors of the loss at large concentrations"),
    "clean": ("clean", "problems put into a set of images, and how many `clean` finds"),
    "report": ("report", "write the tables in Markdown files from the result files they name"),
}
"""By name: the module in `vi_simsiam.benchmarks`, and a description."""
_BROKEN_PIPE = 141  # the exit code of a program that SIGPIPE ends
_INTERRUPTED = "vi-simsiam: interrupted\n"
_USUAL = (signal.SIG_DFL, signal.default_int_handler)
_IMPORTS = "<frozen importlib._bootstrap>"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 done, 1 a problem was found (doctor, info --check), anything became slower
            (bench compare) or one of several runs failed, 2 unusable input, 3 a training has
            collapsed (--stop-on), 130 interrupted by SIGINT, SIGTERM, SIGHUP or SIGUSR1 (a training
            is saved), 141 output without a reader.
    """
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper) or stream.closed:
            continue
        # Under the C.UTF-8 locale everything can be printed, names that are not UTF-8 included.
        if (stream.encoding.lower(), stream.errors) != ("utf-8", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _interruptions(), warnings.catch_warnings():
            warnings.simplefilter("always", LineWarning)
            warnings.showwarning = functools.partial(_show_warning, warnings.showwarning, set())
            code = _run(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
        return code
    except UserError as error:
        if str(error):
            print(one_line(f"vi-simsiam: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return _BROKEN_PIPE
        reason = str(error) or type(error).__name__
        if error.filename and error.strerror:
            reason = f"{error.filename}: {error.strerror}"
        print(one_line(f"vi-simsiam: {reason}"), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).rpartition("DefaultCPUAllocator: ")[2] or "none is left"
        print(one_line(f"vi-simsiam: not enough memory ({cut(reason)})"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(_INTERRUPTED, end="", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _interruptions() -> Iterator[None]:
    """End on other signals as on Ctrl-C: what is half written is removed, and the code is 130."""
    previous = {}
    with contextlib.suppress(ValueError):  # signals reach the main thread only
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in _USUAL:
                previous[number] = signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; within an import end the process, as code there swallows that.

    NumPy and torch then go on without a part of themselves, and fail much later.
    """
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTS:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os.write(2, _INTERRUPTED.encode())
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _show_warning(
    others: Callable[..., None],
    shown: set[str],
    message: Warning | str,
    category: type[Warning],
    *place: Any,
    **more: Any,
) -> None:
    """Print a LineWarning as one line, once per text; `others` shows all other warnings."""
    if not issubclass(category, LineWarning):
        others(message, category, *place, **more)
        return
    # A run has absolute paths where the command was given relative ones.
    text = str(message).replace(os.path.join(os.getcwd(), ""), "")
    if text not in shown:
        print(one_line(f"warning: {message}"), file=sys.stderr)
    shown.add(text)


def _reader_is_gone() -> bool:
    """Return True if standard output is a pipe without a reader, and discard further output."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(1)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name in ("-V", "--version"):
        import vi_simsiam

        print(f"vi-simsiam {vi_simsiam.__version__}")
        return 0
    if name not in COMMANDS:
        raise none_of("command", name, COMMANDS)
    module = importlib.import_module(f"vi_simsiam.cli.{COMMANDS[name][0]}")
    command = getattr(module, name.replace("-", "_"))
    try:
        return int(command(rest))
    except SystemExit as stop:  # after a command's help; Rich ends with 1 if nobody reads
        if stop.code not in (0, None, 1):
            raise
        return _BROKEN_PIPE if stop.code else 0


def _usage() -> str:
    commands = "\n".join(f"  {name:12}{about}" for name, (_, about) in COMMANDS.items())
    return f"""usage: vi-simsiam COMMAND [OPTIONS]

{commands}

vi-simsiam help COMMAND lists a command's options; vi-simsiam --version prints the version.
First steps: vi-simsiam train --evaluate trains on embedded images, on a CPU in a few minutes."""
