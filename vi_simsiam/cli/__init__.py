"""The command line, `vi-simsiam COMMAND`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from vi_simsiam.errors import InputError, UserError

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the input cannot be used, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else 2
    try:
        if given[0] not in _COMMANDS:
            raise InputError(f"command: {given[0]!r} is none of {', '.join(_COMMANDS)}")
        return _command(given[0])(given[1:])
    except UserError as error:
        if str(error):
            print(f"vi-simsiam: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"vi-simsiam: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vi-simsiam: interrupted", file=sys.stderr)
        return 130


def _command(name: str) -> Callable[[list[str]], int]:
    module = importlib.import_module(f"vi_simsiam.cli.{_COMMANDS[name][0]}")
    function: Callable[[list[str]], int] = getattr(module, name)
    return function


def _usage() -> str:
    commands = "\n".join(f"  {name:12}{about}" for name, (_, about) in _COMMANDS.items())
    return f"usage: vi-simsiam COMMAND [OPTIONS]\n\n{commands}\n\nvi-simsiam COMMAND --help lists a command's options."
