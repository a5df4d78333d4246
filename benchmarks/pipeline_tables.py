"""Tables of the benchmarks of input pipeline, step and training, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from vi_simsiam.text import counted

from .launches import KINDS, OTHER, by_kind
from .noise import LEGEND, TOO_NOISY, Ratio
from .pipeline_targets import (
    AT_HAND,
    COMPILED,
    GIGABYTE,
    KERNELS,
    LIGHTLY,
    NETWORK,
    OURS,
    STEP,
    exposed_share,
    floor_of,
    median_of,
    speed_up,
)
from .tables import brief, markdown_grid, noise_notes, number, where
from .targets import NOT_MEASURED

_Results = dict[str, Any]
_Row = tuple[str, ...]


def augment_case(case: _Results) -> Table:
    """A case of the input pipeline for the terminal: a row a provider."""
    rows = [
        (name, *_if_timed(case, name, lambda f: (f"{f['views_per_second']:,.0f}", number(f["time"]["median_us"] / 1e3))),
         _times(speed_up(case, name, LIGHTLY)), _errors(found.get("error")), _statistics(found))
        for name, found in case["providers"].items()
    ]  # fmt: skip
    head = ("provider", "views/s", "ms a batch", "vs lightly", "error", "mean, std")
    return _terminal(
        case,
        head,
        rows,
        ["error: largest against torchvision's functions, without and with hue shifts"],
    )


def step_case(case: _Results) -> Table:
    """A case of the step for the terminal: a row for each thing measured, and the phases below."""
    rows = [
        (name, *_if_timed(case, name, lambda f: (_ms(f["time"]["median_us"]), _share(f["mfu"]))),
         _times(speed_up(case, NETWORK, name)), _losses(found["losses"]))
        for name, found in case["providers"].items()
    ]  # fmt: skip
    parts = ", ".join(f"{name} {_ms(value)}" for name, value in case["phases"].items())
    notes = [f"ms: {parts}", f"losses of the plain loop: {_losses(case['losses'])}"]
    return _terminal(case, ("measured", "ms", "of peak", "of network alone", "losses"), rows, notes)


def launches_case(case: _Results) -> Table:
    """Launches of a step for the terminal."""
    table = Table(title=escape(f"{case['label']}: {_COUNTED}"), title_justify="left")
    head, *counts = _launch_rows(case)
    for i, column in enumerate(head):
        table.add_column(escape(column), justify="right" if i else "left")
    for row in counts:
        table.add_row(*row)
    return table


def train_case(case: _Results) -> Table:
    """A training for the terminal: a column a provider."""
    names, *columns = zip(*_train_rows(case), strict=True)
    rows = [(head, *column) for head, column in zip(_TRAIN_HEAD, columns, strict=True)]
    return _terminal(case, ("", *names), rows, _train_notes(case))


def augment_markdown(result: _Results) -> str:
    """Views a second: a row a case, a column a provider."""
    names = _names(result)
    rows = []
    for case in result["cases"]:
        cells = (
            _if_timed(case, name, lambda f: (f"{f['views_per_second']:,.0f}",))[0] for name in names
        )
        rows.append((case["label"], *cells, _times(speed_up(case, OURS, LIGHTLY))))
    return _markdown(result, ("views/s", *names, "ours / lightly"), rows, _loaders(result))


def step_markdown(result: _Results) -> str:
    """Milliseconds of the step and of the network alone with the layers that training uses, a row a case."""
    rows = [
        (
            case["label"],
            *(
                _if_timed(case, name, lambda f: (_ms(f["time"]["median_us"]),))[0]
                for name in (STEP, floor_of(case), COMPILED)
            ),
            _times(speed_up(case, floor_of(case), STEP)),
            "-" if (exposed := exposed_share(case)) is None else exposed.shown("{:.1%}"),
            _share(case["providers"][STEP].get("mfu")),
        )
        for case in result["cases"]
    ]
    head = (
        "ms",
        STEP,
        NETWORK,
        COMPILED,
        "step / network",
        "exposed augmentation",
        "of peak FLOP/s",
    )
    return _markdown(result, head, rows)


def layers_markdown(result: _Results) -> str:
    """Milliseconds of the captured step on views at hand and of the network alone, a row for each kind of layers."""
    kinds = (
        ("PyTorch's, view by view", f"{AT_HAND}, torch, view by view", "-"),
        ("PyTorch's, all views in one pass", f"{AT_HAND}, torch", NETWORK),
        ("torch.compile, all views in one pass", f"{AT_HAND}, torch.compile", COMPILED),
        ("our kernels, all views in one pass", AT_HAND, KERNELS),
    )
    shown = {name for _, *names in kinds for name in names}
    cases = [
        {
            **case,
            "providers": {
                name: found for name, found in case["providers"].items() if name in shown
            },
        }
        for case in result["cases"]
    ]
    rows = [
        (
            f"{case['label']}: {layers}",
            *(
                _if_timed(case, name, lambda f: (_ms(f["time"]["median_us"]),))[0]
                for name in (step, alone)
            ),
            _times(speed_up(case, step, kinds[0][1])),
        )
        for case in cases
        for layers, step, alone in kinds
    ]
    return _markdown(
        {**result, "cases": cases},
        ("layers, ms", AT_HAND, NETWORK, "step against the first row"),
        rows,
    )


def phases_markdown(result: _Results) -> str:
    """Milliseconds of each part of the step, a row a case."""
    names = list(dict.fromkeys(name for case in result["cases"] for name in case["phases"]))
    rows = [
        (case["label"], *(_ms(case["phases"].get(name)) for name in names))
        for case in result["cases"]
    ]
    return _markdown(result, ("ms", *names), rows)


def launches_markdown(result: _Results) -> str:
    """Launches of a step on views at hand, by their purpose: a table for each case that was counted."""
    counted_cases = [case for case in result["cases"] if case.get("launches")]
    if not counted_cases:
        return f"{NOT_MEASURED.capitalize()}."
    tables = []
    for case in counted_cases:
        (_, *layers), *rows = _launch_rows(case)
        tables.append(markdown_grid((f"{case['label']}: {_COUNTED}", *layers), rows))
    return "\n\n".join([*tables, where(result)])


_COUNTED = "microseconds (launches)"


def _launch_rows(case: _Results) -> list[_Row]:
    """The head, a row for each kind of launches, and their sum; a column for each kind of layers."""
    kinds = {layers: by_kind(found) for layers, found in case["launches"].items()}
    rows = [
        (kind, *(_launches(*found[kind]) if kind in found else "-" for found in kinds.values()))
        for kind in (*KINDS, OTHER)
        if any(kind in found for found in kinds.values())
    ]
    sums = (
        (sum(count for count, _ in found.values()), sum(us for _, us in found.values()))
        for found in kinds.values()
    )
    return [("", *kinds), *rows, ("all", *(_launches(*total) for total in sums))]


def _launches(count: int, microseconds: float) -> str:
    return f"{microseconds:,.0f} ({count})"


def train_markdown(result: _Results) -> str:
    """A table for each training, a row a provider."""
    return "\n\n".join(
        _markdown(
            result, (case["label"], *_TRAIN_HEAD), _train_rows(case), "\n".join(_train_notes(case))
        )
        for case in result["cases"]
    )


_TRAIN_HEAD = (
    "views/s", "vs lightly", "training s", "cold start s", "caching s", "evaluation s", "kNN top-1", "s to target", "peak GB",
)  # fmt: skip


def _train_rows(case: _Results) -> list[_Row]:
    rows = []
    for name in case["providers"]:
        cells = _if_timed(
            case,
            name,
            lambda f: (
                f"{f['views_per_second']:,.0f}",
                "",
                *(
                    _seconds(f[f"{what}_seconds"])
                    for what in ("training", "cold_start", "caching", "evaluation")
                ),
                _share(f["knn_top1"]),
                _seconds(f["seconds_to_target"]),
                "-" if f["peak_bytes"] is None else f"{f['peak_bytes'] / GIGABYTE:.2f}",
            ),
        )
        row = [name, *cells, *("-" for _ in range(len(_TRAIN_HEAD) - len(cells)))]
        row[2] = _times(speed_up(case, name, LIGHTLY))
        rows.append(tuple(row))
    return rows


def _train_notes(case: _Results) -> list[str]:
    loaders = f"The others' loaders have {counted(case['workers'], 'worker')}."
    target = case["target_accuracy"]
    return [
        loaders if target is None else f"{loaders} The target is a kNN accuracy of {target:.1%}."
    ]


def _loaders(result: _Results) -> str:
    images = "generated" if result["data"] == "generated" else "files"
    alone = " The augmentation alone has one thread." if result["device_type"] == "cpu" else ""
    return f"Loaders have {counted(result['workers'], 'worker')}; images are {images}.{alone}"


def _names(result: _Results) -> list[str]:
    return list(dict.fromkeys(name for case in result["cases"] for name in case["providers"]))


def _terminal(
    case: _Results, head: Sequence[str], rows: Iterable[_Row], notes: Sequence[str]
) -> Table:
    """A table for the terminal, with reasons of failures and noise below it."""
    table = Table(title=escape(case["label"]), title_justify="left")
    for i, column in enumerate(head):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    times = [(name, found.get("time")) for name, found in case["providers"].items()]
    caption = [*notes, *_failures(case), *noise_notes(times)]
    table.caption, table.caption_justify = escape("\n".join(caption)), "left"
    return table


def _markdown(result: _Results, head: Sequence[str], rows: Iterable[_Row], note: str = "") -> str:
    """A Markdown table with the reasons of failures and the place of the measurement below it."""
    failures = list(dict.fromkeys(line for case in result["cases"] for line in _failures(case)))
    grid = markdown_grid(head, rows)
    below = [*([note] if note else []), *(f"No figure for {line}." for line in failures)]
    below += [LEGEND] if TOO_NOISY in grid else []
    return "\n".join([grid, "", *below, f"Medians. {where(result)}"])


def _failures(case: _Results) -> list[str]:
    return [
        f"{name} ({found['failure']})"
        for name, found in case["providers"].items()
        if found["failure"]
    ]


def _if_timed(case: _Results, name: str, cells: Callable[[_Results], _Row]) -> _Row:
    """Cells of a provider that has a time, or why it has none."""
    found = case["providers"].get(name)
    if found is None or median_of(case, name) is None:
        return ("-" if found is None else brief(str(found["failure"] or "-")),)
    return cells(found)


def _ms(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds / 1e3:,.2f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _times(ratio: Ratio | None) -> str:
    return "-" if ratio is None else ratio.shown()


def _losses(losses: Sequence[float] | None) -> str:
    return "-" if losses is None else " ".join(f"{loss:.4f}" for loss in losses)


def _errors(errors: dict[str, float] | None) -> str:
    return "-" if errors is None else ", ".join(f"{error:.0e}" for error in errors.values())


def _statistics(found: _Results) -> str:
    return f"{found['mean']:.2f}, {found['std']:.2f}" if "mean" in found else "-"
