"""Marked sections of documents, written from result files.

A section of a Markdown file between `<!-- bench: KIND PATH... -->` and `<!-- /bench -->` is written
by `vi-simsiam bench report FILE`, from result files whose paths are relative to that file. A folder
GPU in which such a file lies stands for that of every GPU with results, one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from vi_simsiam.errors import InputError
from vi_simsiam.text import counted, markdown_grid

from . import accuracy, clean, matrix, record, tables
from .launches import launches_markdown
from .plots import plot_paths
from .results import read_result
from .targets import HEAD, targets_for

_SECTION = re.compile(r"(<!-- bench: (.*?) -->\n).*?(<!-- /bench -->)", re.DOTALL)
_Section = Callable[[list[str], Path], str]


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
        text = path.read_text()
        path.write_text(fill(text, path.parent))
        print(f"written: {counted(len(_SECTION.findall(text)), 'section')} of {path}")


def fill(text: str, folder: Path) -> str:
    """Return `text` with its marked sections from the result files, with paths below `folder`.

    Raises:
        InputError: a section of an unknown kind, without its paths, or of a file that lacks what
            the section shows.
    """

    def section(match: re.Match[str]) -> str:
        kind, *paths = match.group(2).split() or [""]
        if kind not in _KINDS:
            raise InputError(f"bench: section {kind!r} is none of {', '.join(_KINDS)}")
        if not paths:
            raise InputError(
                f"bench: section {kind!r} names no file; write <!-- bench: {kind} PATH -->"
            )
        content = _for_every_gpu(_KINDS[kind], paths, folder)
        return f"{match.group(1)}{content}\n{match.group(3)}"

    return _SECTION.sub(section, text)


def _for_every_gpu(kind: _Section, paths: list[str], folder: Path) -> str:
    """The section, once for each GPU that has a result; with headings where there are several."""
    general = [Path(path) for path in paths if Path(path).parent.name == "GPU"]
    found = {
        file.parent.name
        for path in general
        for file in (folder / path).parents[1].glob(f"*/{path.name}")
    }
    contents = {}
    for gpu in sorted(found - {"cpu"}):
        own = [str(path.parents[1] / gpu / path.name) for path in general]
        contents[gpu] = kind(own, folder)
    if len(contents) > 1:
        return "\n\n".join(f"`{gpu}`\n\n{content}" for gpu, content in contents.items())
    return next(iter(contents.values()), None) or kind(paths, folder)


def _table(benchmark: str, render: Callable[[dict[str, Any]], str]) -> _Section:
    """A section with the table of one result file."""

    def section(paths: list[str], folder: Path) -> str:
        path = folder / paths[0]
        return render(read_result(path, benchmark)) if path.exists() else tables.NOTHING

    return section


def _targets(paths: list[str], folder: Path, device_type: str) -> str:
    """The targets of the benchmarks with these result files."""
    targets = []
    for path in map(folder.joinpath, paths):
        cases = read_result(path, path.stem)["cases"] if path.exists() else []
        found = targets_for(path.stem, device_type, cases)
        if not found:
            raise InputError(f"bench: {path} is of no benchmark with targets")
        targets += found
    return markdown_grid(HEAD, targets, numbers=False)


def _plots(paths: list[str], folder: Path) -> str:
    """Links to the plots beside a result file, where they were drawn."""
    path = Path(paths[0])
    return _pictures(plot_paths(path.stem, path.parent), "", folder)


def _pictures(paths: list[Path], suffix: str, folder: Path) -> str:
    links = [
        f"![{path.stem.replace('_', ' ')}{suffix}]({path.as_posix()})"
        for path in paths
        if (folder / path).exists()
    ]
    return "\n\n".join(links) or tables.NOTHING


def _experiment(paths: list[str], folder: Path) -> str:
    """Parts of an experiment's summary.md by their headings, such as "time-to-accuracy".

    The part "figures" holds links to its plots, where they were drawn.

    Raises:
        InputError: no part is named, or the summary exists and has no heading of that name.
    """
    path, parts = Path(paths[0]), paths[1:]
    if not parts:
        raise InputError(
            "bench: section 'experiment' needs a summary.md and the parts of it to show"
        )
    if not (folder / path).exists():
        return tables.NOTHING
    _, *sections = re.split(r"^## ", (folder / path).read_text(), flags=re.MULTILINE)
    found = {}
    for section in sections:
        title, _, body = section.partition("\n")
        found[title.strip().lower().replace(" ", "-")] = body.strip()
    plots = [path.parent / f"{name}.png" for name in ("accuracy", "stability", "purposes")]
    found["figures"] = _pictures(plots, " of the runs", folder)
    for part in parts:
        if part not in found:
            raise InputError(f"bench: {path} has no part {part!r}; it has {', '.join(found)}")
    return "\n\n".join(found[part] for part in parts)


_gpu_targets = partial(_targets, device_type="cuda")
_cpu_targets = partial(_targets, device_type="cpu")
_KINDS: dict[str, _Section] = {
    "table": _table("multiview_loss", tables.loss_markdown),
    "host": _table("multiview_loss", partial(tables.loss_markdown, metric="host")),
    "gpu-targets": _gpu_targets,
    "cpu-targets": _cpu_targets,
    "accuracy": _table(accuracy.NAME, accuracy.markdown_table),
    "clean": _table(clean.NAME, clean.markdown_table),
    "record": _table(record.NAME, record.markdown_tables),
    "matrix": _table(matrix.NAME, matrix.markdown_table),
    "batch-norm": _table("batch_norm", tables.batch_norm_markdown),
    "augment": _table("augment", tables.augment_markdown),
    "step": _table("step", tables.step_markdown),
    "layers": _table("step", tables.layers_markdown),
    "vi-simsiam-layers": _table("step", partial(tables.layers_markdown, label="vi-simsiam")),
    "launches": _table("step", launches_markdown),
    "phases": _table("step", tables.phases_markdown),
    "train": _table("train", tables.train_markdown),
    "pipeline-gpu-targets": _gpu_targets,
    "pipeline-cpu-targets": _cpu_targets,
    "plots": _plots,
    "experiment": _experiment,
}
