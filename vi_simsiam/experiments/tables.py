"""The tables of an experiment: its numbers in OUT/summary.json, and the same as OUT/summary.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vi_simsiam.engine.verdict import COLLAPSE_THRESHOLD
from vi_simsiam.experiments.cells import arm_label, gain, mean_sd, percent, points, setting
from vi_simsiam.experiments.plan import TUNED
from vi_simsiam.experiments.purposes import purposes_markdown
from vi_simsiam.experiments.results import Experiment, collect
from vi_simsiam.experiments.runner import MARKDOWN
from vi_simsiam.experiments.statistics import DRAWS, estimate
from vi_simsiam.files import write_json, write_text
from vi_simsiam.text import counted, each_text, markdown, markdown_grid

MEASURE_NAMES = {
    "knn20": "kNN, k = 20",
    "knn200": "kNN, k = 200",
    "logistic": "logistic probe",
    "linear": "linear probe",
    "linear_top5": "linear probe, top-5",
}
_UNCERTAINTY = {
    "calibration_error": "calibration error",
    "auroc_misclassification": "misclassification AUROC",
    "aurc": "AURC",
    "auroc_retrieval": "retrieval AUROC",
    "auroc_retrieval_unseen": "retrieval AUROC, unseen classes",
    "spearman_corruption": "corruption Spearman",
    "ood_auroc": "out-of-distribution AUROC",
}
_UNCERTAINTY_NOTE = (
    "Lower is better for the calibration error and AURC, higher for the others; an AUROC of 0.5 is "
    "chance. The best trivial score is chosen afterwards for each figure among lengths of features "
    "and statistics of the pixels, which favours it."
)
_STABILITY = {
    "ratio": "κ/κ*",
    "z_std": "z-std · √D",
    "effective_rank": "effective rank",
    "grad_median": "gradient norm, median",
    "grad_max": "gradient norm, largest",
}
_STABILITY_NOTE = (
    "κ/κ*, z-std and rank are those of the last epoch, κ* = (D − 1) c / (1 − c) with the mean "
    "cosine c; gradient norms are of the whole training, as far as it was logged and before any "
    f"clipping. A run counts as collapsed where z-std · √D ends below {COLLAPSE_THRESHOLD}, and as "
    "diverged where its loss stopped being finite."
)
_OVER_SEEDS = "mean ± sd over seeds"
_EDGE = "at the edge of the range"


def summarise(out: Path) -> dict[str, Any]:
    """Write OUT/summary.json and OUT/summary.md from the plan and the results that exist.

    Returns the content of summary.json. Raises InputError if a file is missing or damaged, or runs
    that are compared were measured on different images.
    """
    summary = collect(Experiment.read(out))
    write_json(out / "summary.json", summary)
    write_text(out / MARKDOWN, _markdown(summary))
    return summary


def _markdown(summary: dict[str, Any]) -> str:
    """summary.md: a section for each question; sections without content are left out."""
    summary = each_text(summary, markdown)
    sections = {
        "Result": result_sentence(summary),
        "Accuracy": _each_data(summary, _accuracy),
        "Uncertainty": _each_data(summary, _uncertainty, _UNCERTAINTY_NOTE),
        "Purposes": purposes_markdown(summary.get("purposes", {})),
        "Stability": _each_data(summary, _stability, _STABILITY_NOTE),
        "Time to accuracy": _each_data(summary, _times),
        "Trials": _trials(summary),
        "Settings": _each_data(summary, _settings),
        "Runs": _runs(summary),
    }
    parts = [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n\n".join([f"# Experiment {summary['experiment']}", *parts]) + "\n"


def _each_data(
    summary: dict[str, Any], render: Callable[[str, dict[str, Any]], list[str]], note: str = ""
) -> str:
    """The paragraphs of every data set, with `note` after them if there are any."""
    parts = [part for data, found in summary["data"].items() for part in render(data, found)]
    return "\n\n".join([*parts, note] if parts and note else parts)


def result_sentence(summary: dict[str, Any]) -> str:
    """The primary comparison and the verdict of its interval, in one line."""
    primary = summary["primary"]
    if primary is None:
        return "The arms that were asked for leave no primary comparison."
    arm, against = map(arm_label, primary["short"])
    measure = MEASURE_NAMES[primary["measure"]]
    planned = (
        f"Primary comparison, named before any run: {arm} against {against}, {measure} on "
        f"{primary['data']}."
    )
    counts = zip((arm, against), primary["diverged"], strict=True)
    lost = "; ".join(f"{name}: {count} diverged" for name, count in counts if count)
    left_out = f" Runs without an accuracy are left out ({lost})." if lost else ""
    found = primary["difference"]
    if found is None:
        return f"{planned} Not measured.{left_out}"
    ours, theirs = (percent(each["mean"]) for each in primary["means"])
    seeds = " and ".join(dict.fromkeys(counted(n, "seed") for n in found["seeds"]))
    figures = f"{planned} {arm} {ours} against {against} {theirs}: {points(found['value'])} points"
    if found["low"] is None:
        return f"{figures}, {seeds}; no interval.{left_out}"
    # With one seed only these runs are known to differ: another seed might reverse it.
    alone = "which does not show that the methods do"
    verdict = {
        ("shown", True): f"a difference in favour of {arm} is shown",
        ("the other way", True): f"a difference the other way, in favour of {against}, is shown",
        ("shown", False): f"these runs differ in favour of {arm}, {alone}",
        ("the other way", False): f"these runs differ in favour of {against}, {alone}",
    }.get((found["verdict"], found["over_seeds"]), "no difference shown")
    scope = " The interval is over images only: the spread between seeds is not in it."
    if found["over_seeds"]:
        scope = ""
    interval = f"{points(found['low'])} to {points(found['high'])}"
    images = counted(found["images"], "image")
    return f"{figures}, 95 % interval {interval}, {seeds}, {images}: {verdict}.{scope}{left_out}"


def _accuracy(data: str, found: dict[str, Any]) -> list[str]:
    names = found["measures"]
    if not names:
        return []
    heads = [MEASURE_NAMES[name] for name in names]
    rows, differences = [], []
    for row in found["arms"].values():
        if not row["seeds"]:
            continue
        label, count = arm_label(row["short"]), str(len(row["seeds"]) - len(row["diverged"]))
        rows.append((label, count, *(mean_sd(row["accuracy"][name], 100) for name in names)))
        if row["published"]:
            figures = (row["published"].get(name) for name in names)
            cells = ("-" if figure is None else f"{100 * figure:.1f}" for figure in figures)
            rows.append((f"{label}, published", "-", *cells))
        if any(row["difference"].values()):
            cells = (gain(row["difference"][name]) for name in names)
            differences.append((label, *cells))
    head = (f"%, {_OVER_SEEDS}", "seeds", *heads)
    parts = [f"**{data}**, {_images(found)}", markdown_grid(head, rows)]
    if differences:
        label = arm_label(found["arms"][found["reference"]]["short"])
        head = (f"points more than {label}, 95 % interval", *heads)
        scope = _scope(row["difference"] for row in found["arms"].values())
        parts += [markdown_grid(head, differences), scope]
    return parts


def _scope(differences: Iterable[dict[str, Any]]) -> str:
    """The scope of the intervals, in a sentence."""
    every = [each for row in differences for each in row.values() if each is not None]
    over_seeds = sorted({each["over_seeds"] for each in every if each["low"] is not None})
    if not over_seeds:
        return "No interval: the results do not say which images were right."
    scope = {
        (True,): "seeds and images.",
        (False,): "images only: an arm with one seed does not show the spread between seeds.",
        (False, True): "seeds and images, and over images only where an arm has one seed.",
    }[tuple(over_seeds)]
    return (
        f"Bootstrap intervals of {DRAWS:,} draws, over {scope} Comparisons other than the primary "
        "one are exploratory; nothing is corrected for their number."
    )


def _uncertainty(data: str, found: dict[str, Any]) -> list[str]:
    rows_of = {arm_label(row["short"]): row["uncertainty"] for row in found["arms"].values()}
    names = [name for name in _UNCERTAINTY if any(name in row for row in rows_of.values())]
    rows = []
    for label, row in rows_of.items():
        if row and names:
            rows.append((label, "κ", *(mean_sd(row.get(name), 1, 3) for name in names)))
        best = [_with_name(row, name) for name in names]
        if any(cell != "-" for cell in best):
            rows.append((label, "best trivial", *best))
    head = (_OVER_SEEDS, "score", *(_UNCERTAINTY[name] for name in names))
    return [f"**{data}**", markdown_grid(head, rows)] if rows else []


def _with_name(row: dict[str, Any], name: str) -> str:
    """The best trivial score of a figure, with its name in brackets."""
    value, names = mean_sd(row.get(f"{name}_baseline"), 1, 3), row.get(f"{name}_baseline_name")
    return f"{value} ({', '.join(names)})" if names and value != "-" else value


def _stability(data: str, found: dict[str, Any]) -> list[str]:
    rows = []
    for row in found["arms"].values():
        ending = row["stability"]
        if ending["runs"] or row["diverged"]:
            figures = (mean_sd(ending[key], 1, None) for key in _STABILITY)
            collapsed = f"{ending['collapsed']} of {ending['runs']}"
            diverged = f"{ending['diverged']} of {len(row['seeds'])}"
            rows.append((arm_label(row["short"]), *figures, collapsed, diverged))
    head = (_OVER_SEEDS, *_STABILITY.values(), "collapsed", "diverged")
    return [f"**{data}**", markdown_grid(head, rows)] if rows else []


def _times(data: str, found: dict[str, Any]) -> list[str]:
    if (times := found["times"]) is None:
        return []
    heads = (f"to {percent(level)}, {name}" for name, level in times["levels"].items())
    rows = [
        (arm_label(found["arms"][arm]["short"]), *map(_reached, cells))
        for arm, cells in times["arms"].items()
        if cells and cells[0]
    ]
    return [
        f"**{data}**, seconds of training, evaluation not counted",
        markdown_grid((_OVER_SEEDS, *heads), rows),
        f"All runs reached a kNN accuracy (k = 200) of {percent(times['common'])} in the end, "
        "measured on a part of the images, looked at every few epochs: a time is that of the first "
        "look at which the accuracy was reached.",
    ]


def _reached(seconds: Sequence[float | None]) -> str:
    """Mean and standard deviation of the times to a level, and the number of runs behind it."""
    found, runs = estimate(seconds), counted(len(seconds), "run")
    if found is None:
        return "not reached"
    partly = "" if found["n"] == len(seconds) else f" ({found['n']} of {runs})"
    return mean_sd(found, 1, None) + partly


def _trials(summary: dict[str, Any]) -> str:
    found = summary["trials"]
    if found is None:
        return ""
    every = [row["settings"] for row in found["rows"]]
    names = [
        name
        for name in dict.fromkeys(name for each in every for name in each)
        if name in TUNED or any(each.get(name) != every[0].get(name) for each in every)
    ]
    rows = []
    for row in found["rows"]:
        accuracy = "diverged" if row["diverged"] else "-"
        if row["accuracy"] is not None:
            accuracy = f"{100 * row['accuracy']:.1f}"
        settings = (setting(row["settings"].get(name)) for name in names)
        rows.append((row["trial"], *settings, accuracy, ", ".join(row["chosen_by"])))
    head = ("trial", *names, f"{MEASURE_NAMES[found['measure']]}, %", "chosen for")
    grid = markdown_grid(head, rows)
    chosen = "\n".join(map(_choice, found["choices"])) or "Nothing is chosen yet."
    if _EDGE in chosen:
        chosen += (
            "\n\nWhere the best value lies at the edge of its range, the trials do not show that "
            "the range was wide enough."
        )
    return (
        f"Every method had as many trials, each with seed {found['seed']}. They held out "
        f"{found['held_out']:.0%} of all training images, were trained on the others and measured "
        "on those held out, or on as many of each as the runs have; validation images were not "
        f"used.\n\n{grid}\n\n{chosen}"
    )


def _choice(found: dict[str, Any]) -> str:
    """The settings that an arm's trials chose, and the ranges tried, in one line of a list."""
    parts = []
    for name, tried in found["settings"].items():
        value, low, high = (tried[each] for each in ("value", "low", "high"))
        place = _EDGE if value in (low, high) else "within the range"
        parts.append(f"`{name}` {value}, {place} {low} to {high}")
    return f"- {arm_label(found['short'])}: {'; '.join(parts)}"


def _settings(data: str, found: dict[str, Any]) -> list[str]:
    shown = {arm: row for arm, row in found["arms"].items() if row["seeds"]}
    if not shown:
        return []
    labels = {arm: arm_label(row["short"]) for arm, row in shown.items()}
    inferred = {item for row in shown.values() for item in row["inferred"]}
    marked = {
        name: f"`{name}`" + ("\\*" if name in inferred else "")
        for name in (*found["common"], *found["differing"])
    }
    notes = (f"- {labels[arm]}: {row['note']}" for arm, row in shown.items())
    parts = [f"**{data}**, {_images(found)}", "\n".join(notes)]
    if found["differing"]:
        rows = [
            (marked[name], *(setting(values.get(arm)) for arm in shown))
            for name, values in found["differing"].items()
        ]
        parts.append(markdown_grid(("setting", *labels.values()), rows))
    common = (f"{marked[name]} {setting(value)}" for name, value in found["common"].items())
    parts.append(f"All arms: {', '.join(common)}.")
    if inferred:
        others = ", ".join(sorted(inferred - marked.keys()))
        also = f" Inferred as well: {others}." if others else ""
        parts.append(f"\\* inferred: the source does not state it.{also}")
    return parts


def _images(found: dict[str, Any]) -> str:
    """Numbers of images, pixels and epochs, where all runs share them."""
    common = found["common"]
    parts = []
    for noun, counts in (("training", found["images"]), ("validation", found["val_images"])):
        if counts:
            last = counted(counts[-1], f"{noun} image")
            parts.append(" or ".join([*(f"{count:,}" for count in counts[:-1]), last]))
    if "augment.size" in common:
        parts.append(f"{common['augment.size']} x {common['augment.size']} pixels")
    if "epochs" in common:
        parts.append(counted(common["epochs"], "epoch"))
    return ", ".join(parts)


def _runs(summary: dict[str, Any]) -> str:
    lines = []
    for data, found in summary["data"].items():
        for row in found["arms"].values():
            line = f"- {arm_label(row['short'])} on {data}: seeds {_listed(row['seeds']) or 'none'}"
            if row["seconds"] is not None:
                ends = dict.fromkeys(f"{end:,.0f}" for end in row["seconds"])
                line += f", {' to '.join(ends)} s of training each"
            if row["diverged"]:
                line += f"; diverged: {_listed(row['diverged'])}"
            lines.append(line)
    missing = "; ".join(summary["missing"])
    lines.append(
        f"- without a result (not run, interrupted or failed): {missing}"
        if missing
        else "- no planned run is missing"
    )
    lines += [
        f"- {name}: {_listed(summary[name])}"
        for name in ("devices", "versions", "commits")
        if summary[name]
    ]
    if summary["dates"]:
        days, planned = dict.fromkeys(summary["dates"]), str(summary["created"])[:10]
        lines.append(f"- measured {' to '.join(days)}; planned {planned}")
    return "\n".join(lines)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
