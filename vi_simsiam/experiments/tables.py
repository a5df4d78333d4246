"""The tables of an experiment: OUT/summary.json, its numbers, and OUT/summary.md, the same to read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vi_simsiam.benchmarks.tables import markdown_grid
from vi_simsiam.engine.checkpoint import write_atomically, write_json
from vi_simsiam.engine.verdict import COLLAPSE_THRESHOLD
from vi_simsiam.experiments.records import Experiment, collect
from vi_simsiam.experiments.statistics import DRAWS, estimate
from vi_simsiam.paths import printable
from vi_simsiam.text import counted

SUMMARY, MARKDOWN = "summary.json", "summary.md"
MEASURE_NAMES = {
    "knn20": "kNN, k = 20",
    "knn200": "kNN, k = 200",
    "logistic": "logistic probe",
    "linear": "linear probe",
    "linear_top5": "linear probe, top-5",
}
_METHODS = {"vi-simsiam": "VI-SimSiam", "simsiam": "SimSiam"}
_BASELINE, _BASELINE_NAME = "_baseline", "_baseline_name"
_UNCERTAINTY = {
    "calibration_error": "calibration error",
    "auroc_misclassification": "misclassification AUROC",
    "aurc": "AURC",
    "auroc_retrieval": "retrieval AUROC",
    "auroc_retrieval_unseen": "retrieval AUROC, unseen classes",
    "spearman_corruption": "corruption Spearman",
    "ood_auroc": "out-of-distribution AUROC",
}
_SECOND = "seconds of training, evaluation not counted"


def summarise(out: Path) -> dict[str, Any]:
    """Write OUT/summary.json and OUT/summary.md from OUT/plan.json and OUT/results/*.json, whatever runs are there.

    Returns:
        The content of summary.json.

    Raises:
        InputError: there is no plan, a file is damaged, or runs that are compared were measured on different images.
    """
    summary = collect(Experiment.read(out))
    write_json(out / SUMMARY, summary)
    text = markdown(summary)
    write_atomically(out / MARKDOWN, lambda file: file.write(printable(text).encode()))
    return summary


def markdown(summary: dict[str, Any]) -> str:
    """summary.md: a section for each question, under a heading of second level; parts without content are left out."""
    sections: dict[str, Callable[[dict[str, Any]], str]] = {
        "Result": result_sentence,
        "Accuracy": _accuracy,
        "Uncertainty": _uncertainty,
        "Stability": _stability,
        "Time to accuracy": _time_table,
        "Trials": _trial_table,
        "Settings": _settings,
        "Runs": _runs,
    }
    parts = [f"# Experiment {summary['experiment']}"]
    for title, render in sections.items():
        if text := render(summary):
            parts.append(f"## {title}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def result_sentence(summary: dict[str, Any]) -> str:
    """The primary comparison and what its interval says, in one line."""
    primary = summary["primary"]
    if primary is None:
        return "The arms that were asked for leave no primary comparison."
    arm, against = map(arm_label, primary["short"])
    measure = MEASURE_NAMES.get(primary["measure"], primary["measure"])
    planned = f"{arm} against {against}, {measure} on {primary['data']}"
    found, means = primary["difference"], primary["means"]
    lost = [
        f"{name}: {count} diverged"
        for name, count in zip((arm, against), primary["diverged"], strict=True)
        if count
    ]
    left_out = f" Runs without an accuracy are left out ({'; '.join(lost)})." if lost else ""
    if found is None:
        return f"Primary comparison, named before any run: {planned}. Not measured.{left_out}"
    figures = f"{arm} {_percent(means[0]['mean'])} against {against} {_percent(means[1]['mean'])}: {_points(found['value'])} points"
    counts = " and ".join(dict.fromkeys(counted(n, "seed") for n in found["seeds"]))
    if found["low"] is None:
        return f"Primary comparison, named before any run: {planned}. {figures}, {counts}; no interval.{left_out}"
    if found["over_seeds"]:
        verdict = {
            "shown": f"a difference in favour of {arm} is shown",
            "the other way": f"a difference the other way, in favour of {against}, is shown",
            "not shown": "no difference shown",
        }[found["verdict"]]
    else:  # what differs are these runs: another seed might turn it round
        better = {"shown": arm, "the other way": against}.get(found["verdict"])
        verdict = (
            f"these runs differ in favour of {better}, which does not show that the methods do"
        )
        verdict = "no difference shown" if better is None else verdict
    scope = (
        ""
        if found["over_seeds"]
        else " The interval is over images only: the spread between seeds is not in it."
    )
    return (
        f"Primary comparison, named before any run: {planned}. {figures}, 95 % interval {_points(found['low'])} to "
        f"{_points(found['high'])}, {counts}, {counted(found['images'], 'image')}: {verdict}.{scope}{left_out}"
    )


def arm_label(arm: str) -> str:
    """An arm as tables and figures name it."""
    return _METHODS.get(arm, arm)


def _accuracy(summary: dict[str, Any]) -> str:
    parts = []
    for data, found in summary["data"].items():
        names = found["measures"]
        if not names:
            continue
        heads = [MEASURE_NAMES.get(name, name) for name in names]
        shown = [row for row in found["arms"].values() if row["seeds"]]
        rows = []
        for row in shown:
            count = str(len(row["seeds"]) - len(row["diverged"]))
            rows.append(
                (
                    arm_label(row["short"]),
                    count,
                    *(_mean_sd(row["accuracy"][name], 100) for name in names),
                )
            )
            if row["published"]:
                figures = (row["published"].get(name) for name in names)
                cells = ("-" if figure is None else f"{100 * figure:.1f}" for figure in figures)
                rows.append((f"{arm_label(row['short'])}, published", "-", *cells))
        head = ("%, mean ± sd over seeds", "seeds", *heads)
        parts.append(f"**{data}**, {_images(found)}\n\n{markdown_grid(head, rows)}")
        compared = [row for row in shown if any(row["difference"].values())]
        if compared:
            label = arm_label(found["arms"][found["reference"]]["short"])
            rows = [
                (arm_label(row["short"]), *(_difference(row["difference"][name]) for name in names))
                for row in compared
            ]
            parts.append(markdown_grid((f"points more than {label}, 95 % interval", *heads), rows))
            parts.append(_scope(row["difference"] for row in compared))
    return "\n\n".join(parts)


def _scope(differences: Iterable[dict[str, Any]]) -> str:
    """What the intervals are over; said of all, because a reader sees all of them."""
    found = [
        each
        for row in differences
        for each in row.values()
        if each is not None and each["low"] is not None
    ]
    if not found:
        return "No interval: the results do not say which images were right."
    text = f"Bootstrap intervals of {DRAWS:,} draws, "
    over = {each["over_seeds"] for each in found}
    if over == {True}:
        text += "over seeds and images."
    elif over == {False}:
        text += "over images only: an arm with one seed does not show the spread between seeds."
    else:
        text += "over seeds and images, and over images only where an arm has one seed."
    return f"{text} Comparisons other than the primary one are exploratory; nothing is corrected for their number."


def _uncertainty(summary: dict[str, Any]) -> str:
    parts = []
    for data, found in summary["data"].items():
        rows_of = {
            arm_label(row["short"]): row["uncertainty"]
            for row in found["arms"].values()
            if row["uncertainty"]
        }
        names = [name for name in _UNCERTAINTY if any(name in row for row in rows_of.values())]
        if not names:
            continue
        rows = []
        for label, row in rows_of.items():
            rows.append((label, "κ", *(_mean_sd(row.get(name), 1, 3) for name in names)))
            best = [_with_name(row, name) for name in names]
            if any(cell != "-" for cell in best):
                rows.append((label, "best trivial", *best))
        head = ("mean ± sd over seeds", "score", *(_UNCERTAINTY[name] for name in names))
        parts.append(f"**{data}**\n\n{markdown_grid(head, rows)}")
    if parts:
        parts.append(
            "Lower is better for the calibration error and AURC, higher for the others; an AUROC of 0.5 is chance. The best "
            "trivial score is chosen afterwards for each figure among lengths of features and statistics of the pixels, which favours it."
        )
    return "\n\n".join(parts)


def _stability(summary: dict[str, Any]) -> str:
    heads = (
        "κ/κ*",
        "z-std · √D",
        "effective rank",
        "gradient norm, median",
        "gradient norm, largest",
    )
    keys = ("ratio", "z_std", "effective_rank", "grad_median", "grad_max")
    parts = []
    for data, found in summary["data"].items():
        rows = [
            (
                arm_label(row["short"]),
                *(_mean_sd(row["stability"][key], 1, None) for key in keys),
                f"{row['stability']['collapsed']} of {row['stability']['runs']}",
                f"{row['stability']['diverged']} of {len(row['seeds'])}",
            )
            for row in found["arms"].values()
            if row["stability"]["runs"] or row["diverged"]
        ]
        if rows:
            head = ("mean ± sd over seeds", *heads, "collapsed", "diverged")
            parts.append(f"**{data}**\n\n{markdown_grid(head, rows)}")
    if parts:
        parts.append(
            "κ/κ*, z-std and rank are those of the last epoch, κ* = (D − 1) c / (1 − c) with the mean cosine c; gradient norms "
            "are of the whole training, as far as it was logged and before any clipping. A run counts as collapsed where z-std "
            f"· √D ends below {COLLAPSE_THRESHOLD}, and as diverged where its loss stopped being finite."
        )
    return "\n\n".join(parts)


def _time_table(summary: dict[str, Any]) -> str:
    parts = []
    for data, found in summary["data"].items():
        if found["times"] is None:
            continue
        times = found["times"]
        heads = [f"to {_percent(level)}, {name}" for name, level in times["levels"].items()]
        rows = [
            (arm_label(found["arms"][arm]["short"]), *map(_reached, cells))
            for arm, cells in times["arms"].items()
            if cells and cells[0]
        ]
        parts.append(
            f"**{data}**, {_SECOND}\n\n{markdown_grid(('mean ± sd over seeds', *heads), rows)}"
        )
        parts.append(
            f"All runs reached a kNN accuracy (k = 200) of {_percent(times['common'])} in the end, measured on a part of the images, looked "
            "at every few epochs: a time is that of the first look at which the accuracy was reached."
        )
    return "\n\n".join(parts)


def _trial_table(summary: dict[str, Any]) -> str:
    found = summary["trials"]
    if found is None:
        return ""
    names = list(dict.fromkeys(name for row in found["rows"] for name in row["settings"]))
    rows = []
    for row in found["rows"]:
        missing = "diverged" if row["diverged"] else "-"
        accuracy = missing if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}"
        settings = (_value(row["settings"].get(name)) for name in names)
        rows.append((row["trial"], *settings, accuracy, ", ".join(row["chosen_by"])))
    head = (
        "trial",
        *names,
        f"{MEASURE_NAMES.get(found['measure'], found['measure'])}, %",
        "chosen for",
    )
    text = (
        f"Every method had as many trials, each trained with seed {found['seed']} on {1 - found['held_out']:.0%} of the training "
        f"images and measured on the other {found['held_out']:.0%}; validation images were not used."
    )
    none = "" if summary["chosen"] else "\n\nNothing is chosen yet."
    return f"{text}\n\n{markdown_grid(head, rows)}{none}"


def _settings(summary: dict[str, Any]) -> str:
    parts = []
    for data, found in summary["data"].items():
        shown = {arm: row for arm, row in found["arms"].items() if row["seeds"]}
        if not shown:
            continue
        inferred = {item for row in shown.values() for item in row["inferred"]}
        parts.append(f"**{data}**, {_images(found)}")
        parts.append(
            "\n".join(
                f"- {arm_label(row['short'])}: {row['note']}"
                for row in shown.values()
                if row["note"]
            )
        )
        if found["differing"]:
            rows = [
                (_marked(field, inferred), *(_value(values.get(arm)) for arm in shown))
                for field, values in found["differing"].items()
            ]
            parts.append(
                markdown_grid(
                    ("setting", *(arm_label(row["short"]) for row in shown.values())), rows
                )
            )
        if found["common"]:
            listed = ", ".join(
                f"{_marked(name, inferred)} {_value(value)}"
                for name, value in found["common"].items()
            )
            parts.append(f"All arms: {listed}.")
        if inferred:
            fields = {*found["common"], *found["differing"]}
            others = [item for item in sorted(inferred) if item not in fields]
            also = f" Inferred as well: {', '.join(others)}." if others else ""
            parts.append(f"\\* inferred: the source does not state it.{also}")
    return "\n\n".join(part for part in parts if part)


def _runs(summary: dict[str, Any]) -> str:
    lines = []
    for data, found in summary["data"].items():
        for row in found["arms"].values():
            seeds = ", ".join(map(str, row["seeds"])) or "none"
            seconds = (
                "" if row["seconds"] is None else f", {_span(row['seconds'])} s of training each"
            )
            diverged = (
                f"; diverged: {', '.join(map(str, row['diverged']))}" if row["diverged"] else ""
            )
            lines.append(f"- {arm_label(row['short'])} on {data}: seeds {seeds}{seconds}{diverged}")
    if summary["missing"]:
        lines.append(
            f"- without a result (not run, interrupted or failed): {'; '.join(summary['missing'])}"
        )
    else:
        lines.append("- no planned run is missing")
    for name in ("devices", "versions", "commits"):
        if summary[name]:
            lines.append(f"- {name}: {', '.join(map(str, summary[name]))}")
    if summary["dates"]:
        lines.append(
            f"- measured {' to '.join(dict.fromkeys(summary['dates']))}; planned {str(summary['created'])[:10]}"
        )
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    """A difference in percentage points with its sign; what rounds to nothing has none."""
    text = f"{100 * share:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    interval = (
        "" if found["low"] is None else f" ({_points(found['low'])} to {_points(found['high'])})"
    )
    return _points(found["value"]) + interval


def _mean_sd(found: Any, factor: float, digits: int | None = 1) -> str:
    """ "41.2 ± 0.4", without a deviation for one seed, "-" where nothing was measured; three significant digits for None."""
    if not isinstance(found, dict):
        return "-"

    def shown(value: float) -> str:
        return _significant(value) if digits is None else f"{factor * value:.{digits}f}"

    return shown(found["mean"]) + ("" if found["sd"] is None else f" ± {shown(found['sd'])}")


def _significant(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _with_name(row: dict[str, Any], name: str) -> str:
    value = _mean_sd(row.get(name + _BASELINE), 1, 3)
    which = row.get(name + _BASELINE_NAME)
    return f"{value} ({', '.join(which)})" if which and value != "-" else value


def _reached(seconds: Sequence[float | None]) -> str:
    """Mean and standard deviation of the times of those runs that got there, and how many did not."""
    there = [each for each in seconds if each is not None]
    if not there:
        return "not reached"
    found = _mean_sd(vars(estimate(there)), 1, None)
    return (
        found
        if len(there) == len(seconds)
        else f"{found} ({len(there)} of {counted(len(seconds), 'run')})"
    )


def _images(found: dict[str, Any]) -> str:
    common = found["common"]
    known = [
        ("training image", found["images"]),
        ("validation image", found["val_images"]),
    ]
    parts = [
        " or ".join([*(f"{n:,}" for n in counts[:-1]), counted(counts[-1], what)])
        for what, counts in known
        if counts
    ]
    if "augment.size" in common:
        parts.append(f"{common['augment.size']} x {common['augment.size']} pixels")
    if "epochs" in common:
        parts.append(counted(common["epochs"], "epoch"))
    return ", ".join(parts)


def _marked(field: str, inferred: set[str]) -> str:
    return f"`{field}`" + ("\\*" if field in inferred else "")


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_value, value))
    if value is None:
        return "-"
    return str(value).replace("|", "\\|")


def _span(ends: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{end:,.0f}" for end in ends))
