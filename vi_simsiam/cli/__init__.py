"""The command line, `vi-simsiam COMMAND`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from vi_simsiam.errors import UserError, none_of

# Where each command's function is, and what it does. Modules are imported when they are asked for.
_COMMANDS = {
    "train": ("train", "train SimSiam or VI-SimSiam into a run folder"),
    "evaluate": ("evaluate", "kNN, linear probe and figures of a run, with a summary"),
    "knn": ("evaluate", "k-nearest-neighbour accuracy of a run's frozen features"),
    "linear": ("evaluate", "linear-probe accuracy of a run's frozen features"),
    "logistic": ("evaluate", "logistic-regression accuracy of a run's frozen features"),
    "figures": ("evaluate", "curves, kappa gallery, density and uncertainty of a run as pictures"),
    "uncertainty": ("uncertainty", "what a run's kappa is worth: calibration, errors, foreign and damaged images"),
    "report": ("report", "all there is to know of a run in one HTML file"),
    "embed": ("use", "embeddings, kappa and neighbours of your images as a Parquet file"),
    "rank": ("use", "your most and least certain images"),
    "export": ("export", "a run's weights for torchvision, timm, safetensors or ONNX, with a model card"),
    "experiment": ("experiment", "many runs with their statistics: table1, tuned, controls, stability, ..."),
    "pack": ("data", "decode images once into one file to train on"),
    "views": ("data", "a picture of some images and their random views"),
    "info": ("tools", "versions, devices, and which backends are available"),
    "bench": ("tools", "benchmarks: bench loss|augment|step|train|compare|accuracy|report"),
}
_HELP = ("-h", "--help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the input cannot be used, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except (UserError, OSError) as error:
        if str(error):
            print(f"vi-simsiam: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vi-simsiam: interrupted", file=sys.stderr)
        return 130


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
    if name not in _COMMANDS:
        raise none_of("command", name, _COMMANDS)
    try:
        return _command(name)(rest)
    except SystemExit as stop:  # after a command's help
        if stop.code:
            raise
        return 0


def _command(name: str) -> Callable[[list[str]], int]:
    module = importlib.import_module(f"vi_simsiam.cli.{_COMMANDS[name][0]}")
    function: Callable[[list[str]], int] = getattr(module, name)
    return function


def _usage() -> str:
    commands = "\n".join(f"  {name:12}{about}" for name, (_, about) in _COMMANDS.items())
    return (
        f"usage: vi-simsiam COMMAND [OPTIONS]\n\n{commands}\n\n"
        "vi-simsiam help COMMAND lists a command's options; vi-simsiam --version prints the version.\n"
        "First steps: vi-simsiam train --evaluate trains on embedded images, on a CPU in a few minutes."
    )
