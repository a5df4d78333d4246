"""Tables of result files for the terminal and for Markdown, and the marked sections of documents.

A section of a Markdown file between `<!-- bench: KIND PATH... -->` and `<!-- /bench -->` is written by
`vi-simsiam bench report FILE`, from result files whose paths are relative to that file. Nobody types its figures.
A folder GPU in a path stands for that of every GPU with results, one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.markup import escape
from rich.table import Table

from vi_simsiam.errors import InputError
from vi_simsiam.text import counted

from . import accuracy, pipeline_tables, pipeline_targets
from .cases import cases_for
from .harness import read_result
from .noise import LEGEND, TOO_NOISY, ratio
from .pipeline_plots import plot_path
from .plots import plot_paths
from .providers import COMPILED, FUSED
from .tables import brief, markdown_grid, markdown_targets, noise_notes, number, where
from .targets import NOT_MEASURED, case_label, cpu_targets, fastest, gpu_targets, speed_up, time_of

_SECTION = re.compile(r"(<!-- bench: (.*?) -->\n).*?(<!-- /bench -->)", re.DOTALL)
_ANY_GPU = re.compile(r"(?<![^/])GPU(?=/)")
_NOTHING = f"{NOT_MEASURED.capitalize()}."
_Section = Callable[[list[str], Path], str]
_MODES = {"forward": "loss", "forward_backward": "loss + gradient"}


@dataclass(frozen=True)
class Options:
    """Options of `vi-simsiam bench report`."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILES")]
    """Markdown files whose marked sections to write anew from the result files that they name."""


def run(options: Options) -> None:
    """Rewrite the marked sections of Markdown files."""
    if not options.files:
        raise InputError("files: name at least one Markdown file")
    for path in options.files:
        try:
            text = path.read_text()
        except OSError as error:
            raise InputError(f"files: {path} cannot be read ({error.strerror})") from error
        path.write_text(fill(text, path.parent))
        print(f"written: {counted(len(_SECTION.findall(text)), 'section')} of {path}")


def fill(text: str, folder: Path) -> str:
    """`text` with its marked sections as the result files say now; their paths are relative to `folder`."""

    def section(match: re.Match[str]) -> str:
        kind, *paths = match.group(2).split() or [""]
        if kind not in _KINDS:
            raise InputError(f"bench: section {kind!r} is none of {', '.join(_KINDS)}")
        if not paths:
            raise InputError(
                f"bench: section {kind!r} names no file; write <!-- bench: {kind} PATH -->"
            )
        try:
            content = _every_device(_KINDS[kind], paths, folder)
        except (KeyError, TypeError, IndexError) as error:
            raise InputError(
                f"bench: {' '.join(paths)} lacks what section {kind!r} shows ({error!r}); measure it again"
            ) from error
        return f"{match.group(1)}{content}\n{match.group(3)}"

    return _SECTION.sub(section, text)


def _every_device(kind: _Section, paths: list[str], folder: Path) -> str:
    """The section, once for each GPU that has a result among `paths`; with a heading where there are several."""
    found = sorted({gpu for path in paths for gpu in _gpu_folders(path, folder)})
    contents = {gpu: kind([_ANY_GPU.sub(gpu, path) for path in paths], folder) for gpu in found}
    if len(contents) > 1:
        return "\n\n".join(f"`{gpu}`\n\n{content}" for gpu, content in contents.items())
    return next(iter(contents.values())) if contents else kind(paths, folder)


def _gpu_folders(path: str, folder: Path) -> list[str]:
    if (place := _ANY_GPU.search(path)) is None:
        return []
    before, after = path[: place.start()], path[place.end() :].lstrip("/")
    return [
        each.name
        for each in (folder / before).glob("*")
        if each.name != "cpu" and (each / after).exists()
    ]


def case_table(case: dict[str, Any]) -> Table:
    """One case for the terminal: a row a provider; without times where the result was wrong."""
    table = Table(title=case_label(case), title_justify="left")
    with_host = any(
        (found[mode] or {}).get("host") for found in case["providers"].values() for mode in _MODES
    )
    host = ("host",) if with_host else ()
    table.add_column("provider")
    for mode in _MODES.values():
        for column in (mode, *host):
            table.add_column(column, justify="right")
    for column in ("of copy", "vs compile", "error", "memory"):
        table.add_column(column, justify="right")
    notes = [
        "times in us; share of a copy's speed, speed-up, error and memory are those of loss + gradient"
    ]
    copy, baseline = case["copy"]["forward_backward"], fastest(case, COMPILED, "forward_backward")
    if copy is not None:
        notes.append(f"copy of the bytes that must move: {number(copy['median_us'])} us")
    for name, found in case["providers"].items():
        if not found["correct"]:
            notes.append(f"{name}: {found['failure']}")
            continue
        both = found["forward_backward"] or {}
        own, share, peak = (both.get(key) for key in ("time", "copy_share", "peak_bytes"))
        table.add_row(
            name,
            *(_cell(case, name, mode, metric) for mode in _MODES for metric in ("time", *host)),
            "-" if share is None else f"{share:.0%}",
            ratio(baseline[1], own).shown() if own and baseline else "-",
            f"{found['gradient_error']:.1e}",
            "-" if peak is None else f"{peak / 2**20:,.1f} MiB",
        )
    notes += noise_notes(
        (name, time_of(case, name, mode)) for name in case["providers"] for mode in _MODES
    )
    table.caption, table.caption_justify = escape("\n".join(notes)), "left"
    return table


def markdown_table(
    result: dict[str, Any], *, mode: str = "forward_backward", metric: str = "time"
) -> str:
    """A result file's cases as a Markdown table of medians; of a GPU's many cases the telling ones.

    Args:
        result: what `vi-simsiam bench loss` wrote.
        mode: "forward" or "forward_backward".
        metric: "time", or "host" (GPU only).
    """
    telling = {case.name for case in cases_for("cuda", short=True)}
    cases = [
        case
        for case in result["cases"]
        if result["device_type"] != "cuda" or case["name"] in telling
    ]
    names = list(dict.fromkeys(name for case in cases for name in case["providers"]))
    shown = [name for name in names if any(time_of(case, name, mode, metric) for case in cases)]
    last = ["faster than torch.compile", *(["of a copy's speed"] if metric == "time" else [])]
    rows = []
    for case in cases:
        faster = speed_up(case, COMPILED, mode, metric)
        cells = [_cell(case, name, mode, metric) for name in shown]
        cells.append("-" if faster is None else faster.shown())
        if metric == "time":
            ours = fastest(case, FUSED, mode)
            share = case["providers"][ours[0]][mode]["copy_share"] if ours else None
            cells.append("-" if share is None else f"{share:.0%}")
        rows.append((case_label(case), *cells))
    grid = markdown_grid(("batch x D", *shown, *last), rows)
    lines = [grid, "", *([LEGEND] if TOO_NOISY in grid else [])]
    for name in names:
        if name not in shown:
            reason = next(
                (case["providers"][name]["failure"] for case in cases if name in case["providers"]),
                None,
            )
            lines.append(f"No time for {name} ({reason or NOT_MEASURED}).")
    return "\n".join([*lines, f"Medians in us. {where(result)}"])


def _cell(case: dict[str, Any], name: str, mode: str, metric: str) -> str:
    """A median in microseconds, or why there is none."""
    found = case["providers"].get(name)
    times = time_of(case, name, mode, metric)
    if times is not None:
        return number(times["median_us"])
    if found is None:
        return "-"
    reason = found["failure"] or (found[mode] or {}).get("failure") or NOT_MEASURED
    return brief(str(reason))


def _result(path: Path, benchmark: str = "multiview_loss") -> dict[str, Any] | None:
    return read_result(path, benchmark) if path.exists() else None


def _table(benchmark: str, render: Callable[[dict[str, Any]], str]) -> _Section:
    """A section with the table of one result file."""

    def section(paths: list[str], folder: Path) -> str:
        result = _result(folder / paths[0], benchmark)
        return _NOTHING if result is None else render(result)

    return section


def _pipeline_targets(paths: list[str], folder: Path) -> str:
    """All targets for an H200, from the result files of input pipeline, step and training, in this order."""
    if len(paths) != len(_PIPELINE):
        raise InputError(
            f"bench: section 'pipeline-gpu-targets' needs the result files of {', '.join(_PIPELINE)}"
        )
    found = [_result(folder / path, name) for path, name in zip(paths, _PIPELINE, strict=True)]
    return markdown_targets(pipeline_targets.gpu_targets(*found))


def _plots_section(paths: list[str], folder: Path) -> str:
    """Links to the plots beside a result file, where they were drawn."""
    path = Path(paths[0])
    drawn = (
        [plot_path(path.parent, path.stem)] if path.stem in _PIPELINE else plot_paths(path.parent)
    )
    found = [plot for plot in drawn if (folder / plot).exists()]
    return (
        "\n\n".join(f"![{plot.stem.replace('_', ' ')}]({plot.as_posix()})" for plot in found)
        or _NOTHING
    )


def _experiment(paths: list[str], folder: Path) -> str:
    """Parts of an experiment's summary.md by their headings ("time-to-accuracy"), and its "figures", where they were drawn.

    Raises:
        InputError: no part is named, or the summary is there and has no heading of that name.
    """
    path, parts = Path(paths[0]), paths[1:]
    if not parts:
        raise InputError(
            "bench: section 'experiment' needs a summary.md and the parts of it to show"
        )
    if not (folder / path).exists():
        return _NOTHING
    _, *sections = re.split(r"^## ", (folder / path).read_text(), flags=re.MULTILINE)
    found = {
        title.strip().lower().replace(" ", "-"): body.strip()
        for title, _, body in (section.partition("\n") for section in sections)
    }
    plots = [path.parent / name for name in ("accuracy.png", "stability.png")]
    drawn = [
        f"![{plot.stem} of the runs]({plot.as_posix()})"
        for plot in plots
        if (folder / plot).exists()
    ]
    found["figures"] = "\n\n".join(drawn) or _NOTHING
    for part in parts:
        if part not in found:
            raise InputError(f"bench: {path} has no part {part!r}; it has {', '.join(found)}")
    return "\n\n".join(found[part] for part in parts)


_PIPELINE = ("augment", "step", "train")

_KINDS: dict[str, _Section] = {
    "table": _table("multiview_loss", markdown_table),
    "host": _table("multiview_loss", partial(markdown_table, metric="host")),
    "gpu-targets": lambda paths, folder: markdown_targets(gpu_targets(_result(folder / paths[0]))),
    "cpu-targets": lambda paths, folder: markdown_targets(cpu_targets(_result(folder / paths[0]))),
    "accuracy": _table(accuracy.NAME, accuracy.markdown_table),
    "augment": _table("augment", pipeline_tables.augment_markdown),
    "step": _table("step", pipeline_tables.step_markdown),
    "layers": _table("step", pipeline_tables.layers_markdown),
    "launches": _table("step", pipeline_tables.launches_markdown),
    "phases": _table("step", pipeline_tables.phases_markdown),
    "train": _table("train", pipeline_tables.train_markdown),
    "pipeline-gpu-targets": _pipeline_targets,
    "pipeline-cpu-targets": lambda paths, folder: markdown_targets(
        pipeline_targets.cpu_targets(_result(folder / paths[0], "train"))
    ),
    "plots": _plots_section,
    "experiment": _experiment,
}
