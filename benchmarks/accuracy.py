"""Error of every way to compute the Power Spherical loss, at large concentrations.

Predictions are integer vectors of squared length 4096^2 and targets the first unit vector, so that
the cosine is a multiple of 1/4096 that float32 arithmetic finds exactly, whatever the order of its
sums; and a raw concentration above 1e4 is its own softplus. What is left is the error of the
function of cosine and concentration. Its reference is the merged form in float64, which the tests
compare with 60-digit values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from vi_simsiam.engine.run import resolve_device
from vi_simsiam.ops.multiview_loss import LossForm, eager_loss
from vi_simsiam.text import markdown_grid, print_line

from .harness import failure_reason
from .multiview_loss import make_providers
from .results import COMPILED, provenance, result_path, write_result
from .tables import terminal_table

NAME = "accuracy"
DIM = 2048
KAPPAS = (1e4, 1e5, 1e6)
_FACTORS = tuple(2 ** (i / 4) for i in range(-8, 9))
"""Concentration over the best one for the cosine: a quarter to four, the range of training."""
_LENGTH = 4096
_FORM = LossForm("power_spherical")


@dataclass(frozen=True)
class Options:
    """Options of `vi-simsiam bench accuracy`."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """Folder for OUT/DEVICE/accuracy.json; None to print only."""


def run(options: Options) -> dict[str, Any]:
    """Measure and print the errors of all providers in float32; write a file if a folder is set."""
    console = Console()
    device = resolve_device(options.device)
    path = None if options.out is None else result_path(options.out, NAME, device)
    rows: dict[str, Any] = {}
    for name, provider in make_providers(_FORM, device).items():
        if name in COMPILED:  # the compiled eager form: the same arithmetic
            continue
        if isinstance(provider, str):
            rows[name] = provider
            continue
        try:
            rows[name] = [errors(provider, kappa, device) for kappa in KAPPAS]
        except Exception as error:
            rows[name] = failure_reason(error)
    result = {
        "benchmark": NAME,
        "device_type": device.type,
        **provenance(device),
        "dim": DIM,
        "kappas": KAPPAS,
        "providers": rows,
    }
    title = f"largest error in float32 at D = {DIM}: value (nats), derivative by kappa"
    console.print(terminal_table(title, *_table("", result)))
    if path is not None:
        write_result(path, result)
        print_line(console, f"written: {path}")
    return result


def errors(provider: Any, kappa: float, device: torch.device) -> dict[str, float]:
    """Largest absolute error of log-density (nats) and of its derivative by kappa.

    Two equal views give twice the negative log-density, and the gradient of one of them its
    negative derivative.
    """
    worst = {"value": 0.0, "derivative": 0.0}
    for cosine in cosines(kappa):
        views, targets = _inputs(cosine, kappa, device)
        exact_views = [view.detach().double().requires_grad_() for view in views]
        exact = eager_loss(exact_views, [target.double() for target in targets], _FORM).mean()
        found = provider(views, targets)
        slope = torch.autograd.grad(found, views)[0][0, DIM]
        exact_slope = torch.autograd.grad(exact, exact_views)[0][0, DIM]
        worst["value"] = max(worst["value"], abs(found.item() - exact.item()) / 2)
        worst["derivative"] = max(worst["derivative"], abs(slope.item() - exact_slope.item()))
    return worst


def cosines(kappa: float) -> list[float]:
    """Multiples of 1/4096 near those whose best concentration is a quarter to four of `kappa`."""
    numerators = {round(_LENGTH * (kappa / f) / (kappa / f + DIM - 1)) for f in _FACTORS}
    return [n / _LENGTH for n in sorted(numerators)]


def markdown_table(result: dict[str, Any]) -> str:
    """The errors as a Markdown table."""
    providers = {
        "textbook (lgamma)" if name == "textbook" else f"`{name}`": row
        for name, row in result["providers"].items()
    }
    title = f"float32, D = {result['dim']}"
    return markdown_grid(*_table(title, {**result, "providers": providers}))


def _table(title: str, result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the errors of each provider, or the reason why there are none."""
    kappas, rows = result["kappas"], []
    for name, row in result["providers"].items():
        cells = [row] * len(kappas)
        if not isinstance(row, str):
            cells = [f"{each['value']:.1e}, {each['derivative']:.1e}" for each in row]
        rows.append([name, *cells])
    return [title, *(f"kappa = {kappa:,.0f}" for kappa in kappas)], rows


def _inputs(cosine: float, kappa: float, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Two equal views of one sample at exactly this cosine to their targets."""
    view = torch.zeros(1, DIM + 1)
    first = round(cosine * _LENGTH)
    view[0, 0] = first
    rest, column = _LENGTH**2 - first**2, 1
    while rest:
        root = math.isqrt(rest)  # the largest square that fits: about eight are needed
        view[0, column] = root
        rest, column = rest - root**2, column + 1
    view[0, DIM] = kappa
    target = torch.zeros(1, DIM)
    target[0, 0] = 1
    views = [view.to(device, copy=True).requires_grad_() for _ in range(2)]
    return views, [target.to(device)] * 2
