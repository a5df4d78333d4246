"""`vi-simsiam doctor`: the state of a run in words."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vi_simsiam.cli.parsing import RunOptions, open_run, parse
from vi_simsiam.text import counted, one_line

if TYPE_CHECKING:
    from vi_simsiam.engine.doctor import Diagnosis
    from vi_simsiam.engine.replay import Replay

_COLUMNS = 80
_SHOWN = 20


@dataclass(frozen=True)
class _Doctor(RunOptions):
    replay: bool = False
    """Make the batch whose loss was not finite again: its figures, and its views as
    RUN/failure.png."""


def doctor(arguments: list[str]) -> int:
    """Print the state of a run, its problems and their remedies.

    Returns:
        The exit code: 0 for a healthy run, 1 if a problem was found.
    """
    options = parse("doctor", _Doctor, arguments)

    from vi_simsiam.engine.doctor import diagnose

    found = diagnose(options.run)
    _print_diagnosis(f"{options.run}: {found.title}", found)
    if options.replay:
        from vi_simsiam.engine.replay import replay

        _print_replay(replay(options.run, lambda: open_run(options)))
    return 1 if found.findings else 0


def _print_diagnosis(title: str, found: Diagnosis) -> None:
    _print("", title)
    for finding in found.findings:
        _print("", finding.name)
        _print("  seen    ", finding.figure)
        _print("  limit   ", finding.limit)
        _print("  remedy  ", finding.remedy)
    _print("", f"{'figures' if found.findings else 'healthy'}: {found.figures}")


def _print_replay(found: Replay) -> None:
    figures = {"cosine": "cosine", "kappa": "kappa/(D-1)", "z_std": "z-std"}
    parts = [f"loss {found.loss:.4g}", f"gradient norm {found.grad_norm:.3g}"]
    parts += [f"{figures[x]} {found.statistics[x]:.3g}" for x in figures if x in found.statistics]
    _print("", f"the batch with the weights of the last good checkpoint: {', '.join(parts)}")
    for suspect in found.suspects[:_SHOWN]:
        _print("  ", suspect)
    if len(found.suspects) > _SHOWN:
        _print("  ", f"and {counted(len(found.suspects) - _SHOWN, 'image')} more")
    if not found.suspects:
        _print("  ", "no image is extreme by itself, and all are finite")
    _print("", f"its views: {found.picture}")


def _print(label: str, text: str) -> None:
    """Print text with a label, in lines that a narrow terminal holds; paths stay whole."""
    print(
        textwrap.fill(
            one_line(text),
            _COLUMNS,
            initial_indent=label,
            subsequent_indent=" " * len(label),
            break_long_words=False,
            break_on_hyphens=False,
        )
    )
