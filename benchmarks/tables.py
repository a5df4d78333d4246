"""Tables for the terminal and for Markdown: common parts, and those of the pipelines."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from vi_simsiam.text import counted, markdown_grid

from . import names
from .ratios import (
    LEGEND,
    NOT_MEASURED,
    TOO_NOISY,
    Case,
    Ratio,
    Times,
    exposed_share,
    floor_of,
    noisy,
    speed_up,
    spread,
    times_of,
)
from .targets import GIGABYTE, Target

NOTHING = f"{NOT_MEASURED.capitalize()}."
_Result = dict[str, Any]
_Row = Sequence[str]


def terminal_table(
    title: str | None,
    head: _Row,
    rows: Iterable[_Row],
    notes: _Row = (),
    right: Collection[str] | None = None,
) -> Table:
    """A table for the terminal; `right` columns are flush right, by default all but the first."""
    table = Table(title=title and escape(title), title_justify="left")
    for i, column in enumerate(head):
        flush_right = i > 0 if right is None else column in right
        table.add_column(escape(column), justify="right" if flush_right else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    if notes:
        table.caption, table.caption_justify = escape("\n".join(notes)), "left"
    return table


def number(value: float) -> str:
    """Format a figure with three significant digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def optional(value: float | None, form: str) -> str:
    """Format a figure, or a dash for None."""
    return "-" if value is None else form.format(value)


def _ms(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds / 1e3:,.2f}"


def _share(value: float | None) -> str:
    return optional(value, "{:.1%}")


def shown_ratio(found: Ratio | None) -> str:
    """Format a ratio, or a dash for None."""
    return "-" if found is None else found.shown()


def brief(reason: str) -> str:
    """The failure's kind, for a cell; the whole reason is given below the table."""
    return reason.split(":")[0]


def where(result: dict[str, Any]) -> str:
    """Device, versions and date of a measurement."""
    device = result["processor"]
    if result["device_type"] != "cpu":
        device = f"{result['device']}, driver {result['driver']}"
    return f"{device}; PyTorch {result['versions']['torch']}; {result['date'][:10]}."


def noise_notes(times: Iterable[tuple[str, Times | None]]) -> list[str]:
    """A note on the noisiest provider, if it is too noisy for a verdict."""
    wide = [(spread(found), name) for name, found in times if found is not None and noisy(found)]
    return [
        f"noisy: the quartiles of {name} lie {apart:.0%} of the median apart; is the machine busy?"
        for apart, name in sorted(wide)[-1:]
    ]


def keys_of(cases: Iterable[Case], key: str = "providers") -> list[str]:
    """The keys of an entry of all cases, such as the names of all providers."""
    return list(dict.fromkeys(name for case in cases for name in case[key]))


_TARGET_HEAD = ("what", "target", "measured", "met")


def _target_rows(targets: Iterable[Target]) -> list[_Row]:
    words = {True: "yes", False: "no", None: "-"}
    return [
        (each.what, each.wanted, each.figure, TOO_NOISY if each.noisy else words[each.met])
        for each in targets
    ]


def targets_table(targets: Sequence[Target]) -> Table:
    """Targets for the terminal."""
    return terminal_table("targets", _TARGET_HEAD, _target_rows(targets), right=())


def targets_markdown(targets: Sequence[Target]) -> str:
    """Targets as a Markdown table."""
    return markdown_grid(_TARGET_HEAD, _target_rows(targets), numbers=False)


def augment_case(case: Case) -> Table:
    """One case of the input pipeline: a row for each provider."""

    def cells(found: _Result) -> _Row:
        return f"{found['views_per_second']:,.0f}", number(found["time"]["median_us"] / 1e3)

    rows = []
    for name, found in case["providers"].items():
        errors = found.get("error")
        rows.append(
            (
                name,
                *_if_timed(case, name, cells),
                shown_ratio(speed_up(case, [name], [names.LIGHTLY])),
                "-" if errors is None else ", ".join(f"{e:.0e}" for e in errors.values()),
                f"{found['mean']:.2f}, {found['std']:.2f}" if "mean" in found else "-",
            )
        )
    head = ("provider", "views/s", "ms a batch", "vs lightly", "error", "mean, std")
    note = "error: largest against torchvision's functions, without and with hue shifts"
    return _terminal(case, head, rows, [note])


def augment_markdown(result: _Result) -> str:
    """Views per second: a row for each case, a column for each provider."""
    columns = keys_of(result["cases"])

    def cells(found: _Result) -> _Row:
        return (f"{found['views_per_second']:,.0f}",)

    rows = [
        (
            case["label"],
            *(_if_timed(case, name, cells)[0] for name in columns),
            shown_ratio(speed_up(case, [names.OURS], [names.LIGHTLY])),
        )
        for case in result["cases"]
    ]
    images = "generated" if result["data"] == "generated" else "files"
    alone = " The augmentation alone has one thread." if result["device_type"] == "cpu" else ""
    note = f"Loaders have {counted(result['workers'], 'worker')}; images are {images}.{alone}"
    return _markdown(result, ("views/s", *columns, "ours / lightly"), rows, note)


def _losses(losses: Sequence[float] | None) -> str:
    return "-" if losses is None else " ".join(f"{loss:.4f}" for loss in losses)


def step_case(case: Case) -> Table:
    """One case of the step: a row for each thing measured, and the phases below."""

    def cells(found: _Result) -> _Row:
        return _ms(found["time"]["median_us"]), _share(found["mfu"])

    rows = [
        (
            name,
            *_if_timed(case, name, cells),
            shown_ratio(speed_up(case, [names.NETWORK], [name])),
            _losses(found["losses"]),
        )
        for name, found in case["providers"].items()
    ]
    parts = ", ".join(f"{name} {_ms(value)}" for name, value in case["phases"].items())
    notes = [f"ms: {parts}", f"losses of the plain loop: {_losses(case['losses'])}"]
    return _terminal(case, ("measured", "ms", "of peak", "of network alone", "losses"), rows, notes)


def _median(case: Case, name: str) -> str:
    """Milliseconds of a provider of the step, or why there are none."""
    return _if_timed(case, name, lambda found: (_ms(found["time"]["median_us"]),))[0]


def step_markdown(result: _Result) -> str:
    """Milliseconds of the step and of the network alone, a row for each case."""
    rows = []
    for case in result["cases"]:
        exposed = exposed_share(case)
        rows.append(
            (
                case["label"],
                *(
                    _median(case, name)
                    for name in (names.STEP, floor_of(case), names.NETWORK_COMPILED)
                ),
                shown_ratio(speed_up(case, [floor_of(case)], [names.STEP])),
                "-" if exposed is None else exposed.shown("{:.1%}"),
                _share(case["providers"][names.STEP].get("mfu")),
            )
        )
    head = ("ms", names.STEP, names.NETWORK, names.NETWORK_COMPILED)
    more = ("step / network", "exposed augmentation", "of peak FLOP/s")
    return _markdown(result, (*head, *more), rows)


def layers_markdown(result: _Result) -> str:
    """Milliseconds of the captured step on views at hand and of the network alone, by layers."""
    kinds = (
        ("PyTorch's, view by view", f"{names.AT_HAND}, torch, view by view", "-"),
        ("PyTorch's, all views in one pass", f"{names.AT_HAND}, torch", names.NETWORK),
        (
            "torch.compile, all views in one pass",
            f"{names.AT_HAND}, torch.compile",
            names.NETWORK_COMPILED,
        ),
        ("our kernels, all views in one pass", names.AT_HAND, names.NETWORK_KERNELS),
    )
    shown = {name for _, *columns in kinds for name in columns}
    cases = [
        {**case, "providers": {n: each for n, each in case["providers"].items() if n in shown}}
        for case in result["cases"]
    ]
    rows = [
        (
            f"{case['label']}: {layers}",
            _median(case, step),
            _median(case, alone),
            shown_ratio(speed_up(case, [step], [kinds[0][1]])),
        )
        for case in cases
        for layers, step, alone in kinds
    ]
    head = ("layers, ms", names.AT_HAND, names.NETWORK, "step against the first row")
    return _markdown({**result, "cases": cases}, head, rows)


def phases_markdown(result: _Result) -> str:
    """Milliseconds of each part of the step, a row for each case."""
    columns = keys_of(result["cases"], "phases")
    rows = [
        (case["label"], *(_ms(case["phases"].get(name)) for name in columns))
        for case in result["cases"]
    ]
    return _markdown(result, ("ms", *columns), rows)


_TRAIN_HEAD = (
    "views/s",
    "vs lightly",
    "training s",
    "cold start s",
    "caching s",
    "evaluation s",
    "kNN top-1",
    "s to target",
    "peak GB",
)


def train_case(case: Case) -> Table:
    """A training for the terminal: a column for each provider."""
    providers, *columns = zip(*_train_rows(case), strict=True)
    rows = [(head, *column) for head, column in zip(_TRAIN_HEAD, columns, strict=True)]
    return _terminal(case, ("", *providers), rows, [_train_note(case)])


def train_markdown(result: _Result) -> str:
    """A table for each training, a row for each provider."""
    return "\n\n".join(
        _markdown(result, (case["label"], *_TRAIN_HEAD), _train_rows(case), _train_note(case))
        for case in result["cases"]
    )


def _train_rows(case: Case) -> list[_Row]:
    def cells(found: _Result) -> _Row:
        parts = ("training", "cold_start", "caching", "evaluation")
        peak = found["peak_bytes"]
        return (
            f"{found['views_per_second']:,.0f}",
            "",
            *(optional(found[f"{part}_seconds"], "{:,.1f}") for part in parts),
            _share(found["knn_top1"]),
            optional(found["seconds_to_target"], "{:,.1f}"),
            optional(peak and peak / GIGABYTE, "{:.2f}"),
        )

    rows: list[_Row] = []
    for name in case["providers"]:
        row = [name, *_if_timed(case, name, cells)]
        row += ["-"] * (1 + len(_TRAIN_HEAD) - len(row))
        row[2] = shown_ratio(speed_up(case, [name], [names.LIGHTLY]))
        rows.append(row)
    return rows


def _train_note(case: Case) -> str:
    note = f"The others' loaders have {counted(case['workers'], 'worker')}."
    target = case["target_accuracy"]
    return note if target is None else f"{note} The target is a kNN accuracy of {target:.1%}."


def _terminal(case: Case, head: _Row, rows: Iterable[_Row], notes: Sequence[str]) -> Table:
    """A table for the terminal, with failures and noise below it."""
    times = ((name, found.get("time")) for name, found in case["providers"].items())
    return terminal_table(
        case["label"], head, rows, [*notes, *_failures(case), *noise_notes(times)]
    )


def _markdown(result: _Result, head: _Row, rows: Iterable[_Row], note: str = "") -> str:
    """A Markdown table, with failures and the device of the measurement below it."""
    failures = dict.fromkeys(line for case in result["cases"] for line in _failures(case))
    grid = markdown_grid(head, rows)
    below = [*([note] if note else []), *(f"No figure for {line}." for line in failures)]
    below += [LEGEND] if TOO_NOISY in grid else []
    return "\n".join([grid, "", *below, f"Medians. {where(result)}"])


def _failures(case: Case) -> list[str]:
    return [
        f"{name} ({found['failure']})"
        for name, found in case["providers"].items()
        if found["failure"]
    ]


def _if_timed(case: Case, name: str, cells: Callable[[_Result], _Row]) -> _Row:
    """Cells of a provider that has a time, or why it has none."""
    if times_of(case, name) is not None:
        return cells(case["providers"][name])
    found = case["providers"].get(name)
    return ("-" if found is None else brief(str(found["failure"] or "-")),)
