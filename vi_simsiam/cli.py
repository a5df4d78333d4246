"""The command line: `vi-simsiam train|evaluate|knn|linear|figures|info|bench`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar
from unittest import mock

import tyro
from rich.console import Console

from vi_simsiam.config import TrainConfig, preset
from vi_simsiam.errors import InputError, UserError

_Options = TypeVar("_Options")

RunPath = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True)
class _Train:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: str = "default"
    """Starting point of the configuration: default, demo or paper."""
    out: Path | None = None
    """Run folder; None for runs/DATA-METHOD-NNN, the first number that is free."""
    resume: bool = False
    """Go on with the run in --out, whose configuration is then the starting point."""
    overwrite: bool = False
    """Replace the run in --out."""
    evaluate: bool = False
    """Evaluate the run when it is trained, as `vi-simsiam evaluate` does."""


@dataclass(frozen=True)
class _Evaluate:
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


@dataclass(frozen=True)
class _Knn(_Evaluate):
    k: int = 20
    """Number of neighbours."""
    temperature: float = 0.1
    """Neighbours are weighted by exp(cosine / temperature)."""


@dataclass(frozen=True)
class _Linear(_Evaluate):
    preset: str = "default"
    """default, or paper (the paper's protocol with a held-out fifth of the training set)."""


@dataclass(frozen=True)
class _Figures(_Evaluate):
    pass


@dataclass(frozen=True)
class _Info:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the input cannot be used, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else 2
    try:
        if given[0] not in _COMMANDS:
            raise InputError(f"command: {given[0]!r} is none of {', '.join(_COMMANDS)}")
        return _COMMANDS[given[0]][0](given[1:])
    except UserError as error:
        print(f"vi-simsiam: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"vi-simsiam: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vi-simsiam: interrupted", file=sys.stderr)
        return 130


def _train(arguments: list[str]) -> int:
    options = _parse("train", _Train, arguments, default=_Train(_starting_point(arguments)))
    if options.resume and options.out is None:
        raise InputError("resume: say which run with --out")

    from vi_simsiam.engine.trainer import Trainer

    trainer = Trainer(options.config, options.out, resume=options.resume, overwrite=options.overwrite)
    folder = trainer.folder
    print(
        f"{options.config.method} on {options.config.data}: {len(trainer.loader.source):,} images, "
        f"{trainer.total_steps:,} steps, {trainer.device}, loss by {trainer.backend}; run folder {folder}"
    )
    try:
        trainer.fit()
    except KeyboardInterrupt:
        print(
            f"vi-simsiam: interrupted, saved at step {trainer.saved_step}; go on with: vi-simsiam train --out {folder} --resume",
            file=sys.stderr,
        )
        return 130
    if options.evaluate:
        try:
            _evaluate([str(folder), "--device", options.config.device])
        except InputError as error:  # trained all the same: data without labels, say
            print(f"not evaluated: {error}")
    return 0


def _evaluate(arguments: list[str]) -> int:
    options = _parse("evaluate", _Evaluate, arguments)

    from vi_simsiam.evaluation.summary import evaluate_run

    evaluate_run(_open(options))
    return 0


def _knn(arguments: list[str]) -> int:
    options = _parse("knn", _Knn, arguments)

    from vi_simsiam.evaluation.features import collect, labelled_splits
    from vi_simsiam.evaluation.knn import KnnConfig, evaluate_knn
    from vi_simsiam.evaluation.summary import summary_line

    config = KnnConfig(k=options.k, temperature=options.temperature)
    run = _open(options)
    images = len(labelled_splits(run)["train"])
    if config.k > images:  # known now, not after all features are computed
        raise InputError(f"k: {config.k} must be at most {images}, the number of training images")
    print(summary_line("kNN", evaluate_knn(collect(run), config)))
    return 0


def _linear(arguments: list[str]) -> int:
    options = _parse("linear", _Linear, arguments)

    from vi_simsiam.evaluation.features import collect
    from vi_simsiam.evaluation.linear import evaluate_linear, linear_preset
    from vi_simsiam.evaluation.summary import summary_line, summary_table

    config = linear_preset(options.preset)
    result = evaluate_linear(collect(_open(options)), config)
    Console().print(summary_table({"linear": result}))
    print(summary_line("linear", result))
    return 0


def _figures(arguments: list[str]) -> int:
    options = _parse("figures", _Figures, arguments)

    from vi_simsiam.evaluation.figures import draw_curves, draw_kappa

    for path in (draw_curves(options.run), draw_kappa(_open(options))):
        if path is not None:
            print(path)
    return 0


def _info(arguments: list[str]) -> int:
    _parse("info", _Info, arguments)

    from vi_simsiam.info import report

    print(report())
    return 0


def _bench(arguments: list[str]) -> int:
    from vi_simsiam.benchmarks import accuracy, compare, multiview_loss, report

    benchmarks: dict[str, tuple[Any, str]] = {
        "loss": (multiview_loss, "time the loss: eager, torch.compile and the fused backends"),
        "compare": (compare, "two result files case by case; exits 1 if anything became slower"),
        "accuracy": (accuracy, "errors of the loss at large concentrations"),
        "report": (report, "write the tables in Markdown files from the result files they name"),
    }
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: vi-simsiam bench {'|'.join(benchmarks)} [OPTIONS]\n")
        print("\n".join(f"  {name:10}{about}" for name, (_, about) in benchmarks.items()))
        return 0
    if not arguments or arguments[0] not in benchmarks:
        raise InputError(f"bench: {' '.join(arguments[:1]) or 'nothing'!r} is none of {', '.join(benchmarks)}")
    benchmark, _ = benchmarks[arguments[0]]
    outcome = benchmark.run(_parse(f"bench {arguments[0]}", benchmark.Options, arguments[1:]))
    return outcome if isinstance(outcome, int) else 0


def _open(options: _Evaluate) -> Any:
    from vi_simsiam.engine.run import load_run

    return load_run(
        options.run, device=options.device, workers=options.workers, data=options.data, data_root=options.data_root
    )


def _starting_point(arguments: list[str]) -> TrainConfig:
    """The configuration that the other options change: the saved one on --resume, else the preset's."""
    known = {"--preset": "default", "--out": ""}
    for name, value in zip(arguments, [*arguments[1:], ""], strict=True):
        option, _, attached = name.partition("=")
        if option in known:
            known[option] = attached or value
    if "--resume" in arguments and "--preset" not in arguments and known["--out"]:
        from vi_simsiam.engine.run import read_config

        return read_config(Path(known["--out"]))
    return preset(known["--preset"])


def _parse(command: str, kind: type[_Options], arguments: list[str], default: _Options | None = None) -> _Options:
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
        raise InputError(
            f"{message.removeprefix('Error parsing TrainConfig: ')} (see vi-simsiam {command} --help)"
        ) from None


def _usage() -> str:
    commands = "\n".join(f"  {name:10}{about}" for name, (_, about) in _COMMANDS.items())
    return f"usage: vi-simsiam COMMAND [OPTIONS]\n\n{commands}\n\nvi-simsiam COMMAND --help lists a command's options."


_COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train SimSiam or VI-SimSiam into a run folder"),
    "evaluate": (_evaluate, "kNN, linear probe and figures of a run, with a summary"),
    "knn": (_knn, "k-nearest-neighbour accuracy of a run's frozen features"),
    "linear": (_linear, "linear-probe accuracy of a run's frozen features"),
    "figures": (_figures, "curves.png and kappa.png of a run"),
    "info": (_info, "versions, devices, and which backends are available"),
    "bench": (_bench, "benchmarks: bench loss|compare|accuracy|report"),
}
