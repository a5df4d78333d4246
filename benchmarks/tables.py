"""Tables of result files, for the terminal (`..._case`) and for Markdown (`..._markdown`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from vi_simsiam.text import counted, markdown_grid

from . import names
from .cases import MODES, cases_for
from .ratios import (
    GIGABYTE,
    LEGEND,
    NOT_MEASURED,
    TOO_NOISY,
    Case,
    Ratio,
    Times,
    case_label,
    exposed_share,
    fastest,
    floor_of,
    noisy,
    speed_up,
    spread,
    times_of,
)

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


def _terminal(case: Case, head: _Row, rows: Iterable[_Row], notes: _Row) -> Table:
    """A table of a case for the terminal, with failures and noise below it."""
    times = ((name, found.get("time")) for name, found in case["providers"].items())
    below = [*notes, *_failures(case), *_noise_notes(times)]
    return terminal_table(case["label"], head, rows, below)


def _markdown(result: _Result, head: _Row, rows: Iterable[_Row], note: str = "") -> str:
    """A Markdown table, with failures and the device of the measurement below it."""
    failures = dict.fromkeys(line for case in result["cases"] for line in _failures(case))
    grid = markdown_grid(head, rows)
    below = [*([note] if note else []), *(f"No figure for {line}." for line in failures)]
    below += [LEGEND] if TOO_NOISY in grid else []
    return "\n".join([grid, "", *below, f"Medians. {where(result)}"])


def _number(value: float) -> str:
    """A figure with three significant digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _ms(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds / 1e3:,.2f}"


def _share(value: float | None) -> str:
    return _optional(value, "{:.1%}")


def _ratio(found: Ratio | None) -> str:
    return "-" if found is None else found.shown()


def _reason(case: Case, name: str, mode: str | None = None) -> str:
    """The reason for a missing time, in a word; the whole one is given below the table."""
    found = case["providers"].get(name)
    if found is None:
        return "-"
    if mode is None:
        return str(found["failure"] or "-").split(":")[0]
    failure = found["failure"] or (found[mode] or {}).get("failure")
    return str(failure or NOT_MEASURED).split(":")[0]


def _figures(case: Case, name: str, *forms: Callable[[_Result], str]) -> list[str]:
    """Cells of a provider that has a time; of another, the reason and dashes."""
    if times_of(case, name) is None:
        return [_reason(case, name), *["-"] * (len(forms) - 1)]
    return [form(case["providers"][name]) for form in forms]


def _views_a_second(found: _Result) -> str:
    return f"{found['views_per_second']:,.0f}"


def _median_ms(found: _Result) -> str:
    return _ms(found["time"]["median_us"])


def where(result: _Result) -> str:
    """Device, versions and date of a measurement."""
    device = result["processor"]
    if result["device_type"] != "cpu":
        device = f"{result['device']}, driver {result['driver']}"
    return f"{device}; PyTorch {result['versions']['torch']}; {result['date'][:10]}."


def _failures(case: Case) -> list[str]:
    found = case["providers"].items()
    return [f"{name} ({each['failure']})" for name, each in found if each["failure"]]


def _noise_notes(times: Iterable[tuple[str, Times | None]]) -> list[str]:
    """A note on the noisiest provider, if it is too noisy for a verdict."""
    wide = [(spread(found), name) for name, found in times if found is not None and noisy(found)]
    return [
        f"noisy: the quartiles of {name} lie {apart:.0%} of the median apart; is the machine busy?"
        for apart, name in sorted(wide)[-1:]
    ]


def _keys_of(cases: Iterable[Case], key: str = "providers") -> list[str]:
    """The keys of an entry of all cases, such as the names of all providers."""
    return list(dict.fromkeys(name for case in cases for name in case[key]))


def _loss_cell(case: Case, name: str, mode: str, metric: str) -> str:
    """A median in microseconds, or why there is none."""
    times = times_of(case, name, mode, metric)
    return _reason(case, name, mode) if times is None else _number(times["median_us"])


def loss_case(case: Case) -> Table:
    """One case of the loss: a row for each provider; no times where the result was wrong."""
    modes = dict(zip(MODES, ("loss", "loss + gradient"), strict=True))
    both = MODES[1]
    providers = case["providers"]
    with_host = any(
        (found[mode] or {}).get("host") for found in providers.values() for mode in modes
    )
    metrics = ("time", "host") if with_host else ("time",)
    timings = [(mode, metric) for mode in modes for metric in metrics]
    notes = [
        "times in us; "
        "share of a copy's speed, speed-up, error and memory are those of loss + gradient"
    ]
    if case["copy"][both] is not None:
        copied = _number(case["copy"][both]["median_us"])
        notes.append(f"copy of the bytes that must move: {copied} us")
    rows = []
    for name, found in providers.items():
        if not found["correct"]:
            notes.append(f"{name}: {found['failure']}")
            continue
        figures = found[both] or {}
        peak = figures.get("peak_bytes")
        rows.append(
            (
                name,
                *(_loss_cell(case, name, *timing) for timing in timings),
                _optional(figures.get("copy_share"), "{:.0%}"),
                _ratio(speed_up(case, [name], names.COMPILED, both)),
                f"{found['gradient_error']:.1e}",
                _optional(peak and peak / 2**20, "{:,.1f} MiB"),
            )
        )
    notes += _noise_notes(
        (name, times_of(case, name, mode)) for name in providers for mode in modes
    )
    head = ["provider", *(modes[mode] if metric == "time" else metric for mode, metric in timings)]
    head += ["of copy", "vs compile", "error", "memory"]
    return terminal_table(case_label(case), head, rows, notes)


def loss_markdown(result: _Result, *, metric: str = "time") -> str:
    """Medians of loss and gradient, a row for each case; of a GPU's many cases the telling ones.

    `metric` is "time", or "host" on a GPU.
    """
    mode, cases = MODES[1], result["cases"]
    if result["device_type"] == "cuda":
        telling = {case.name for case in cases_for("cuda", short=True)}
        cases = [case for case in cases if case["name"] in telling]
    columns = _keys_of(cases)
    shown = [name for name in columns if any(times_of(case, name, mode, metric) for case in cases)]
    rows = []
    for case in cases:
        cells = [_loss_cell(case, name, mode, metric) for name in shown]
        cells.append(_ratio(speed_up(case, names.FUSED, names.COMPILED, mode, metric)))
        if metric == "time":
            ours = fastest(case, names.FUSED, mode)
            share = case["providers"][ours[0]][mode]["copy_share"] if ours else None
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


def augment_case(case: Case) -> Table:
    """One case of the input pipeline: a row for each provider."""
    rows = []
    for name, found in case["providers"].items():
        errors = found.get("error")
        rows.append(
            (
                name,
                *_figures(
                    case,
                    name,
                    _views_a_second,
                    lambda timed: _number(timed["time"]["median_us"] / 1e3),
                ),
                _ratio(speed_up(case, [name], [names.LIGHTLY])),
                "-" if errors is None else ", ".join(f"{e:.0e}" for e in errors.values()),
                f"{found['mean']:.2f}, {found['std']:.2f}" if "mean" in found else "-",
            )
        )
    head = ("provider", "views/s", "ms a batch", "vs lightly", "error", "mean, std")
    note = "error: largest against torchvision's functions, without and with hue shifts"
    return _terminal(case, head, rows, [note])


def augment_markdown(result: _Result) -> str:
    """Views per second: a row for each case, a column for each provider."""
    columns = _keys_of(result["cases"])
    rows = [
        (
            case["label"],
            *(_figures(case, name, _views_a_second)[0] for name in columns),
            _ratio(speed_up(case, [names.OURS], [names.LIGHTLY])),
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
    rows = [
        (
            name,
            *_figures(case, name, _median_ms, lambda timed: _share(timed["mfu"])),
            _ratio(speed_up(case, [names.NETWORK], [name])),
            _losses(found["losses"]),
        )
        for name, found in case["providers"].items()
    ]
    parts = ", ".join(f"{name} {_ms(value)}" for name, value in case["phases"].items())
    notes = [f"ms: {parts}", f"losses of the plain loop: {_losses(case['losses'])}"]
    return _terminal(case, ("measured", "ms", "of peak", "of network alone", "losses"), rows, notes)


def step_markdown(result: _Result) -> str:
    """Milliseconds of the step and of the network alone, a row for each case."""
    rows = []
    for case in result["cases"]:
        floor, exposed = floor_of(case), exposed_share(case)
        timed = (names.STEP, floor, names.NETWORK_COMPILED)
        rows.append(
            (
                case["label"],
                *(_figures(case, name, _median_ms)[0] for name in timed),
                _ratio(speed_up(case, [floor], [names.STEP])),
                "-" if exposed is None else exposed.shown("{:.1%}"),
                _share(case["providers"][names.STEP].get("mfu")),
            )
        )
    head = ("ms", names.STEP, names.NETWORK, names.NETWORK_COMPILED)
    more = ("step / network", "exposed augmentation", "of peak FLOP/s")
    return _markdown(result, (*head, *more), rows)


_BY_LAYERS = (
    ("PyTorch's, view by view", f"{names.AT_HAND}, torch, view by view", "-"),
    ("PyTorch's, all views in one pass", f"{names.AT_HAND}, torch", names.NETWORK),
    (
        "torch.compile, all views in one pass",
        f"{names.AT_HAND}, torch.compile",
        names.NETWORK_COMPILED,
    ),
    ("our kernels, all views in one pass", names.AT_HAND, names.NETWORK_KERNELS),
)
"""Kinds of layers; the names of the step on views at hand and of the network alone with them."""


def layers_markdown(result: _Result) -> str:
    """Milliseconds of the captured step on views at hand and of the network alone, by layers."""
    shown = {name for _, *columns in _BY_LAYERS for name in columns}
    cases = []
    for case in result["cases"]:
        providers = {n: each for n, each in case["providers"].items() if n in shown}
        cases.append({**case, "providers": providers})
    rows = [
        (
            f"{case['label']}: {layers}",
            *(_figures(case, name, _median_ms)[0] for name in (step, alone)),
            _ratio(speed_up(case, [step], [_BY_LAYERS[0][1]])),
        )
        for case in cases
        for layers, step, alone in _BY_LAYERS
    ]
    head = ("layers, ms", names.AT_HAND, names.NETWORK, "step against the first row")
    return _markdown({**result, "cases": cases}, head, rows)


def phases_markdown(result: _Result) -> str:
    """Milliseconds of each part of the step, a row for each case."""
    columns = _keys_of(result["cases"], "phases")
    rows = [
        (case["label"], *(_ms(case["phases"].get(name)) for name in columns))
        for case in result["cases"]
    ]
    return _markdown(result, ("ms", *columns), rows)


def _seconds(part: str) -> Callable[[_Result], str]:
    return lambda found: _optional(found[part], "{:,.1f}")


_TRAINING: Mapping[str, Callable[[_Result], str]] = {
    "training s": _seconds("training_seconds"),
    "cold start s": _seconds("cold_start_seconds"),
    "caching s": _seconds("caching_seconds"),
    "evaluation s": _seconds("evaluation_seconds"),
    "kNN top-1": lambda found: _share(found["knn_top1"]),
    "s to target": _seconds("seconds_to_target"),
    "peak GB": lambda found: _optional(
        found["peak_bytes"] and found["peak_bytes"] / GIGABYTE, "{:.2f}"
    ),
}
"""Columns of a training after its speed, with the cell of a provider."""
_TRAIN_HEAD = ("views/s", "vs lightly", *_TRAINING)


def _train_rows(case: Case) -> list[_Row]:
    rows: list[_Row] = []
    for name in case["providers"]:
        speed, *more = _figures(case, name, _views_a_second, *_TRAINING.values())
        rows.append((name, speed, _ratio(speed_up(case, [name], [names.LIGHTLY])), *more))
    return rows


def _train_note(case: Case) -> str:
    note = f"The others' loaders have {counted(case['workers'], 'worker')}."
    target = case["target_accuracy"]
    return note if target is None else f"{note} The target is a kNN accuracy of {target:.1%}."


def train_case(case: Case) -> Table:
    """A training for the terminal: a column for each provider."""
    head, *rows = zip(("", *_TRAIN_HEAD), *_train_rows(case), strict=True)
    return _terminal(case, head, rows, [_train_note(case)])


def train_markdown(result: _Result) -> str:
    """A table for each training, a row for each provider."""
    return "\n\n".join(
        _markdown(result, (case["label"], *_TRAIN_HEAD), _train_rows(case), _train_note(case))
        for case in result["cases"]
    )
