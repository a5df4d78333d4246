"""Tables of result files, for the terminal (`..._case`) and for Markdown (`..._markdown`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.markup import escape
from rich.table import Table

from vi_simsiam.text import counted, markdown_grid

from .cases import BOTH, MODES, cases_for
from .results import (
    AT_HAND,
    COMPILED,
    EAGER,
    FUSED,
    LEGEND,
    LIGHTLY,
    NETWORK,
    NETWORK_COMPILED,
    NETWORK_KERNELS,
    NOT_MEASURED,
    OURS,
    STEP,
    TOO_NOISY,
    Case,
    Ratio,
    case_label,
    exposed_share,
    fastest,
    floor_of,
    speed_up,
    step_with,
    times_of,
)

NOTHING = f"{NOT_MEASURED.capitalize()}."
_Result = dict[str, Any]
_Row = Sequence[str]
_Columns = Mapping[str, Callable[[Case, str], str]]
"""By heading, the cell of a provider on a case."""


def terminal_table(
    title: str | None,
    head: _Row,
    rows: Iterable[_Row],
    notes: _Row = (),
    *,
    numbers: bool = True,
) -> Table:
    """A table for the terminal; with `numbers` all columns but the first are flush right."""
    table = Table(title=title and escape(title), title_justify="left")
    for i, column in enumerate(head):
        table.add_column(escape(column), justify="right" if numbers and i > 0 else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    if notes:
        table.caption, table.caption_justify = escape("\n".join(notes)), "left"
    return table


def _rows(case: Case, columns: _Columns) -> list[_Row]:
    """A row for each provider."""
    return [(name, *(cell(case, name) for cell in columns.values())) for name in case["providers"]]


def _terminal(case: Case, first: str, columns: _Columns, *notes: str) -> Table:
    """A table of a case for the terminal: a row for each provider, with failures below it."""
    head, below = (first, *columns), [*notes, *_failures(case)]
    return terminal_table(case_label(case), head, _rows(case, columns), below)


def _failures(case: Case) -> list[str]:
    found = case["providers"].items()
    return [f"{name} ({each['failure']})" for name, each in found if each["failure"]]


def _markdown(result: _Result, head: _Row, rows: Iterable[_Row], note: str = "") -> str:
    """A Markdown table, with failures and the device of the measurement below it."""
    failures = dict.fromkeys(line for case in result["cases"] for line in _failures(case))
    grid = markdown_grid(head, rows)
    below = [*([note] if note else []), *(f"No figure for {line}." for line in failures)]
    below += [LEGEND] if TOO_NOISY in grid else []
    return "\n".join([grid, "", *below, f"Medians. {where(result)}"])


def where(result: _Result) -> str:
    """Device, versions and date of a measurement."""
    device = result["processor"]
    if result["device_type"] != "cpu":
        device = f"{result['device']}, driver {result.get('driver')}"
    return f"{device}; PyTorch {result['versions'].get('torch')}; {result['date'][:10]}."


def _number(value: float) -> str:
    """A figure with three significant digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _ms(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds / 1e3:,.2f}"


def _ratio(found: Ratio | None, form: str = "{:.2f} x") -> str:
    return "-" if found is None else found.shown(form)


def _median(
    case: Case,
    name: str,
    mode: str | None = None,
    metric: str = "time",
    form: Callable[[float], str] = _number,
) -> str:
    """A median, or in a word why there is none; the whole reason stands below the table."""
    times = times_of(case, name, mode, metric)
    if times is not None:
        return form(times["median_us"])
    found = case["providers"].get(name)
    if found is None:
        return "-"
    failure = found["failure"] or ((mode and found[mode]) or {}).get("failure")
    return str(failure or NOT_MEASURED).split(":")[0]


_median_ms = partial(_median, form=_ms)


def _views_a_second(case: Case, name: str) -> str:
    timed = times_of(case, name) is not None
    return _figure("views_per_second", "{:,.0f}")(case, name) if timed else _median(case, name)


def _figure(
    key: str, form: str, unit: float = 1.0, mode: str | None = None
) -> Callable[[Case, str], str]:
    """The cell of a figure of a provider that has a time."""

    def cell(case: Case, name: str) -> str:
        if times_of(case, name, mode) is None:
            return "-"
        found = case["providers"][name]
        value = (found if mode is None else found[mode]).get(key)
        return "-" if value is None else form.format(value / unit)

    return cell


def _against_lightly(case: Case, name: str) -> str:
    return _ratio(speed_up(case, [name], [LIGHTLY]))


_OTHERS = {"vs torch": EAGER, "vs compile": COMPILED}


def _against(case: Case, name: str, others: Sequence[str]) -> str:
    return _ratio(speed_up(case, [name], others, BOTH))


def _keys_of(cases: Iterable[Case], key: str = "providers") -> list[str]:
    """The keys of an entry of all cases, such as the names of all providers."""
    return list(dict.fromkeys(name for case in cases for name in case[key]))


def modes_case(case: Case) -> Table:
    """One case of loss or BatchNorm: a row for each provider; no times where it was wrong."""
    entries = case["providers"].values()
    with_host = any((found[mode] or {}).get("host") for found in entries for mode in MODES)
    columns: dict[str, Callable[[Case, str], str]] = {}
    for mode, title in MODES.items():
        for metric in ("time", "host") if with_host else ("time",):
            heading = title if metric == "time" else f"{title}, host"
            columns[heading] = partial(_median, mode=mode, metric=metric)
    for title, names in _OTHERS.items():
        if not set(names).isdisjoint(case["providers"]):
            columns[title] = partial(_against, others=names)
    columns |= {
        "GB/s": _figure("bytes_per_second", "{:,.1f}", 1e9, BOTH),
        "of copy": _figure("copy_share", "{:.0%}", mode=BOTH),
        "error": lambda _, name: _optional(case["providers"][name].get("gradient_error"), "{:.1e}"),
    }
    if with_host:
        columns["memory"] = _figure("peak_bytes", "{:,.1f} MiB", 2**20, BOTH)
    notes = [f"times in us; what follows them is that of {MODES[BOTH]}"]
    if case["copy"][BOTH] is not None:
        copied = _number(case["copy"][BOTH]["median_us"])
        notes.append(f"copy of the bytes that must move: {copied} us")
    return _terminal(case, "provider", columns, *notes)


def loss_markdown(result: _Result, *, metric: str = "time") -> str:
    """Medians of loss and gradient, a row for each case; of a GPU's many cases the telling ones.

    `metric` is "time", or "host" on a GPU.
    """
    cases = result["cases"]
    if result["device_type"] == "cuda":
        telling = {case.name for case in cases_for("cuda", short=True)}
        cases = [case for case in cases if case["name"] in telling]
    columns = _keys_of(cases)
    shown = [n for n in columns if any(times_of(case, n, BOTH, metric) for case in cases)]
    rows = []
    for case in cases:
        cells = [_median(case, name, BOTH, metric) for name in shown]
        cells.append(_ratio(speed_up(case, FUSED, COMPILED, BOTH, metric)))
        if metric == "time":
            ours = fastest(case, FUSED, BOTH)
            share = case["providers"][ours[0]][BOTH].get("copy_share") if ours else None
            cells.append(_optional(share, "{:.0%}"))
        rows.append((case_label(case), *cells))
    last = ["faster than torch.compile", *(["of a copy's speed"] if metric == "time" else [])]
    grid = markdown_grid(("batch x D", *shown, *last), rows)
    lines = [grid, "", *([LEGEND] if TOO_NOISY in grid else [])]
    for name in columns:
        if name not in shown:
            found = next(case["providers"][name] for case in cases if name in case["providers"])
            lines.append(f"No time for {name} ({found['failure'] or NOT_MEASURED}).")
    return "\n".join([*lines, f"Medians in us. {where(result)}"])


def batch_norm_markdown(result: _Result) -> str:
    """Medians of every provider: a row for each case and mode."""
    columns, rows = _keys_of(result["cases"]), []
    for case, mode in itertools.product(result["cases"], MODES):
        ours, *_ = fastest(case, FUSED, mode) or [""]
        rate = _figure("bytes_per_second", "{:,.1f}", 1e9, mode)
        share = _figure("copy_share", "{:.0%}", mode=mode)
        cells = [_median(case, name, mode) for name in columns]
        cells += [figure(case, ours) for figure in (rate, share)]
        cells += [_ratio(speed_up(case, FUSED, names, mode)) for names in _OTHERS.values()]
        rows.append((f"{case['label']}, {MODES[mode]}", *cells))
    more = ("GB/s", "of a copy's speed", "faster than torch", "faster than torch.compile")
    note = "Ours against the fastest of torch's; GB/s are ours, of the bytes that must move."
    return _markdown(result, ("us", *columns, *more), rows, note)


def _views_error(case: Case, name: str) -> str:
    errors = case["providers"][name].get("error")
    return "-" if errors is None else ", ".join(f"{error:.0e}" for error in errors.values())


def _mean_and_deviation(case: Case, name: str) -> str:
    found = case["providers"][name]
    return f"{found['mean']:.2f}, {found['std']:.2f}" if {"mean", "std"} <= found.keys() else "-"


_AUGMENT: _Columns = {
    "views/s": _views_a_second,
    "ms a batch": partial(_median, form=lambda microseconds: _number(microseconds / 1e3)),
    "vs lightly": _against_lightly,
    "error": _views_error,
    "mean, std": _mean_and_deviation,
}


def augment_case(case: Case) -> Table:
    """One case of the input pipeline: a row for each provider."""
    note = "error: largest against torchvision's functions, without and with hue shifts"
    return _terminal(case, "provider", _AUGMENT, note)


def augment_markdown(result: _Result) -> str:
    """Views per second: a row for each case, a column for each provider."""
    columns = _keys_of(result["cases"])
    rows = [
        (
            case["label"],
            *(_views_a_second(case, name) for name in columns),
            _against_lightly(case, OURS),
        )
        for case in result["cases"]
    ]
    images = "generated" if result["data"] == "generated" else "files"
    alone = " The augmentation alone has one thread." if result["device_type"] == "cpu" else ""
    note = f"Loaders have {counted(result['workers'], 'worker')}; images are {images}.{alone}"
    return _markdown(result, ("views/s", *columns, "ours / lightly"), rows, note)


def _losses(losses: Sequence[float] | None) -> str:
    return "-" if losses is None else " ".join(f"{loss:.4f}" for loss in losses)


_STEP: _Columns = {
    "ms": _median_ms,
    "of peak": _figure("mfu", "{:.1%}"),
    "of network alone": lambda case, name: _ratio(speed_up(case, [NETWORK], [name])),
    "losses": lambda case, name: _losses(case["providers"][name].get("losses")),
}


def step_case(case: Case) -> Table:
    """One case of the step: a row for each thing measured, and the phases below."""
    parts = ", ".join(f"{name} {_ms(value)}" for name, value in case["phases"].items())
    plain = f"losses of the plain loop: {_losses(case['losses'])}"
    return _terminal(case, "measured", _STEP, f"ms: {parts}", plain)


def step_markdown(result: _Result) -> str:
    """Milliseconds of the step and of the network alone, a row for each case."""
    rows = []
    for case in result["cases"]:
        floor = floor_of(case)
        rows.append(
            (
                case["label"],
                *(_median_ms(case, name) for name in (STEP, floor, NETWORK_COMPILED)),
                _ratio(speed_up(case, [floor], [STEP])),
                _ratio(exposed_share(case), "{:.1%}"),
                _optional(case["providers"].get(STEP, {}).get("mfu"), "{:.1%}"),
            )
        )
    head = ("ms", STEP, NETWORK, NETWORK_COMPILED)
    more = ("step / network", "exposed augmentation", "of peak FLOP/s")
    return _markdown(result, (*head, *more), rows)


_BY_LAYERS = (
    ("PyTorch's, view by view", "torch, view by view", "-"),
    ("PyTorch's, all views in one pass", "torch", NETWORK),
    ("torch.compile, all views in one pass", "torch.compile", NETWORK_COMPILED),
    ("our kernels, all views in one pass", "kernels", NETWORK_KERNELS),
)
"""Kinds of layers, and the names of the network alone with them."""


def layers_markdown(result: _Result, label: str = "") -> str:
    """Milliseconds of the step at hand and of the network alone, of cases with such a label."""
    cases, rows = [], []
    for case in (each for each in result["cases"] if each["label"].startswith(label)):
        default = next(layers for _, layers, alone in _BY_LAYERS if alone == floor_of(case))
        names = [(step_with(layers, default), alone) for _, layers, alone in _BY_LAYERS]
        shown = {name for both in names for name in both}
        providers = {n: each for n, each in case["providers"].items() if n in shown}
        cases.append({**case, "providers": providers})
        rows += [
            (
                f"{case['label']}: {layers}",
                *(_median_ms(case, name) for name in (step, alone)),
                _ratio(speed_up(case, [step], [names[0][0]])),
            )
            for (layers, *_), (step, alone) in zip(_BY_LAYERS, names, strict=True)
        ]
    head = ("layers, ms", AT_HAND, NETWORK, "step against the first row")
    return _markdown({**result, "cases": cases}, head, rows)


def phases_markdown(result: _Result) -> str:
    """Milliseconds of each part of the step, a row for each case."""
    columns = _keys_of(result["cases"], "phases")
    rows = [
        (case["label"], *(_ms(case["phases"].get(name)) for name in columns))
        for case in result["cases"]
    ]
    return _markdown(result, ("ms", *columns), rows)


_TRAIN: _Columns = {
    "views/s": _views_a_second,
    "vs lightly": _against_lightly,
    "training s": _figure("training_seconds", "{:,.1f}"),
    "cold start s": _figure("cold_start_seconds", "{:,.1f}"),
    "caching s": _figure("caching_seconds", "{:,.1f}"),
    "evaluation s": _figure("evaluation_seconds", "{:,.1f}"),
    "kNN top-1": _figure("knn_top1", "{:.1%}"),
    "s to target": _figure("seconds_to_target", "{:,.1f}"),
    "peak GB": _figure("peak_bytes", "{:.2f}", 1e9),
}


def _train_note(case: Case) -> str:
    note = f"The others' loaders have {counted(case['workers'], 'worker')}."
    target = case["target_accuracy"]
    return note if target is None else f"{note} The target is a kNN accuracy of {target:.1%}."


def train_case(case: Case) -> Table:
    """A training for the terminal: a column for each provider."""
    head, *rows = zip(("", *_TRAIN), *_rows(case, _TRAIN), strict=True)
    return terminal_table(case["label"], head, rows, [_train_note(case), *_failures(case)])


def train_markdown(result: _Result) -> str:
    """A table for each training, a row for each provider."""
    return "\n\n".join(
        _markdown(result, (case["label"], *_TRAIN), _rows(case, _TRAIN), _train_note(case))
        for case in result["cases"]
    )
