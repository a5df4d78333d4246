"""The fused loss against eager PyTorch and torch.compile: loss alone, and loss with its gradient.

Every provider computes the Power Spherical loss of two views on the same random inputs. Before it is timed its loss
and gradient are held to float64 by the rule of the tests (error at most twice that of eager in the same dtype); a provider
that fails is reported without a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vi_simsiam.engine.run import resolve_device
from vi_simsiam.errors import InputError
from vi_simsiam.ops.backends import BACKENDS, why_unavailable
from vi_simsiam.ops.multiview_loss import LossForm, eager_loss, multiview_loss

from .harness import provenance, time_interleaved, write_result

_CASES = [(64, 512), (64, 2048), (256, 2048), (1024, 2048), (4096, 2048), (32768, 2048)]
_SHORT_CASES = [(64, 2048), (256, 2048), (1024, 2048)]
_MOST_ELEMENTS_ON_CPU = 2**22


@dataclass(frozen=True)
class Options:
    """Options of `vi-simsiam bench loss`."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    short: bool = False
    """Only the telling cases."""
    rounds: int = 15
    """Measurements of every provider, at least 3; the median is reported."""
    out: Path | None = None
    """Folder for the result file; None to print only."""

    def __post_init__(self) -> None:
        if self.rounds < 3:
            raise InputError(f"rounds: {self.rounds} must be at least 3")


def run(options: Options, console: Console | None = None) -> dict[str, Any]:
    """Measure all cases, print a table, and write the result file if a folder is given."""
    console = console or Console()
    device = resolve_device(options.device)
    dtypes = [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]
    cases = []
    for batch, dim in _SHORT_CASES if options.short else _CASES:
        if device.type == "cpu" and batch * dim > _MOST_ELEMENTS_ON_CPU:
            continue
        for dtype in dtypes:
            cases.append(_case(batch, dim, dtype, device, options.rounds))
            _print(cases[-1], console)
    result = {"benchmark": "multiview_loss", **provenance(device), "views": 2, "targets": 2, "cases": cases}
    if options.out is not None:
        console.print(f"written: {write_result(options.out, 'multiview_loss', device, result)}")
    return result


def _case(batch: int, dim: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    form = LossForm("power_spherical", float(dim - 1))
    generator = torch.Generator(device).manual_seed(0)
    common = torch.randn(batch, dim, device=device, generator=generator)
    z = (common + 0.5 * torch.randn(2, batch, dim, device=device, generator=generator)).to(dtype)
    p = torch.randn(2, batch, dim + 1, device=device, generator=generator)
    p[..., :dim] = common + 0.5 * p[..., :dim]
    p = p.to(dtype)

    providers: dict[str, Callable[[Tensor], Tensor]] = {
        "torch.compile": torch.compile(lambda x: eager_loss(x, z, form).mean(), fullgraph=True, dynamic=False)
    }
    for name in BACKENDS:
        if why_unavailable(name, device.type) is None:
            providers[name] = functools.partial(multiview_loss, targets=z, form=form, backend=name)

    exact = _loss_and_gradient(lambda x: eager_loss(x, z.double(), form).mean(), p.double())
    errors: dict[str, tuple[float, float]] = {}
    failures: dict[str, str] = {}
    for name, provider in providers.items():
        try:
            errors[name] = _errors(_loss_and_gradient(provider, p), exact)
        except Exception as error:  # no compiler for torch.compile, no memory: a result like any other
            failures[name] = (str(error).splitlines() or [type(error).__name__])[0]
    allowed = [2 * error + 4 * torch.finfo(dtype).eps for error in errors["eager"]]
    correct = {
        name: name in errors and all(e <= a for e, a in zip(errors[name], allowed, strict=True)) for name in providers
    }
    timed = [name for name in providers if correct[name]]
    leaf = p.clone().requires_grad_()
    repeats = max(1, min(20, 2**22 // (batch * dim)))
    forward = time_interleaved(
        {name: functools.partial(_forward, providers[name], p) for name in timed},
        device,
        rounds=rounds,
        repeats=repeats,
    )
    both = time_interleaved(
        {name: functools.partial(_forward_backward, providers[name], leaf) for name in timed},
        device,
        rounds=rounds,
        repeats=repeats,
    )
    return {
        "batch": batch,
        "dim": dim,
        "dtype": str(dtype).removeprefix("torch."),
        "providers": {
            name: {
                "correct": correct[name],
                "failure": failures.get(name),
                "loss_error": errors[name][0] if name in errors else None,
                "gradient_error": errors[name][1] if name in errors else None,
                "forward": forward.get(name),
                "forward_backward": both.get(name),
            }
            for name in providers
        },
    }


def _forward(provider: Callable[[Tensor], Tensor], p: Tensor) -> None:
    with torch.no_grad():
        provider(p)


def _forward_backward(provider: Callable[[Tensor], Tensor], leaf: Tensor) -> None:
    leaf.grad = None
    provider(leaf).backward()


def _loss_and_gradient(provider: Callable[[Tensor], Tensor], p: Tensor) -> tuple[Tensor, Tensor]:
    leaf = p.detach().clone().requires_grad_()
    loss = provider(leaf)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def _errors(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Largest absolute error, relative to the largest exact value."""
    loss, gradient = ((f.double() - e).abs().max() / e.abs().max() for f, e in zip(found, exact, strict=True))
    return loss.item(), gradient.item()


def _print(case: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{case['batch']} x {case['dim']}, {case['dtype']}, 2 views")
    for column in ("provider", "loss (us)", "loss + gradient (us)", "gradient error", "against torch.compile"):
        table.add_column(column, justify="left" if column == "provider" else "right")
    baseline = case["providers"]["torch.compile"]
    for name, found in case["providers"].items():
        if not found["correct"]:
            table.add_row(name, "-", "-", "-", found["failure"] or f"wrong result ({found['gradient_error']:.1e})")
            continue
        both = found["forward_backward"]["median_us"]
        ratio = f"{baseline['forward_backward']['median_us'] / both:.2f}x" if baseline["correct"] else "-"
        forward = found["forward"]["median_us"]
        table.add_row(name, f"{forward:,.0f}", f"{both:,.0f}", f"{found['gradient_error']:.1e}", ratio)
    console.print(table)


def markdown_table(result: dict[str, Any]) -> str:
    """A result file's cases as a Markdown table of medians in microseconds, for loss and gradient."""
    names = list(result["cases"][0]["providers"])
    lines = [
        f"| batch x D | {' | '.join(names)} |",
        "|---|" + "---:|" * len(names),
    ]
    for case in result["cases"]:
        cells = []
        for name in names:
            found = case["providers"][name]
            cells.append(f"{found['forward_backward']['median_us']:,.0f} us" if found["correct"] else "no result")
        lines.append(f"| {case['batch']} x {case['dim']}, {case['dtype']} | {' | '.join(cells)} |")
    version = result["versions"]["torch"]
    where = result["processor"] if result["driver"] is None else result["device"]
    return "\n".join([*lines, "", f"{where}; PyTorch {version}; {result['date'][:10]}."])
