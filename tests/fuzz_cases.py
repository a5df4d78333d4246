"""Files to damage, and what reads them: add a format as one more line of `readers`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from benchmark_cases import scripted_pipeline, scripted_result
from evaluation_cases import (
    feature_sets,
    make_run,
    skip_rendering,
    uncertainty_result,
)
from experiment_cases import COMMITTED, spec, tiny_config, write_all
from matplotlib.figure import Figure
from PIL import Image

from vi_simsiam.benchmarks import compare, plots, report
from vi_simsiam.benchmarks.results import read_result as read_benchmark
from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.kernels import KernelChoice
from vi_simsiam.engine.log import read_log
from vi_simsiam.engine.run import read_config
from vi_simsiam.engine.verdict import Health, problem
from vi_simsiam.evaluation import report as page
from vi_simsiam.evaluation.comparisons import comparisons
from vi_simsiam.evaluation.figures import draw_curves, read_metrics
from vi_simsiam.evaluation.knn import KnnConfig, evaluate_knn
from vi_simsiam.evaluation.results import accuracies, read_result, summary_table
from vi_simsiam.evaluation.uncertainty_figures import draw_uncertainty
from vi_simsiam.experiments import figures, seeds, tables, worker
from vi_simsiam.experiments.deaths import summarise_deaths
from vi_simsiam.experiments.forms import Spec, Trained
from vi_simsiam.experiments.purposes import purposes
from vi_simsiam.experiments.results import Experiment, collect
from vi_simsiam.export.folder import model_card
from vi_simsiam.files import read_json
from vi_simsiam.settings import read_settings, updated

BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu"
_CONFIG = tiny_config("fashion-mini")
_KERNELS = {"device": "cpu", "kernels": True, "fused_ms": 1.5, "torch_ms": 2.0, "reason": None}
_SECTIONS = {
    "multiview_loss": ("table", "host", "cpu-targets", "gpu-targets"),
    "batch_norm": ("batch-norm", "cpu-targets", "gpu-targets"),
    "augment": ("augment", "pipeline-gpu-targets"),
    "step": ("step", "layers", "launches", "phases", "pipeline-cpu-targets"),
    "train": ("train", "pipeline-gpu-targets", "pipeline-cpu-targets"),
    "accuracy": ("accuracy",),
    "clean": ("clean",),
}
_WITHOUT_TIMES = ("accuracy", "clean")


class Reader(NamedTuple):
    """A format: a name, a valid file's content, and the function that reads the file of a path."""

    name: str
    valid: bytes
    read: Callable[[Path], object]
    file: str
    """The name of the file in a folder that holds what belongs to it."""
    prepare: Callable[[Path], object] = lambda folder: folder.mkdir(parents=True)
    share: float = 1.0
    """Examples compared with a fast reader."""


def plain(patch: pytest.MonkeyPatch) -> None:
    """Figures are made, and not rendered, which takes the most time."""

    def save(figure: Figure, path: Path, colours: int | None = None) -> Path:
        Image.new("RGB", (16, 7)).save(path)
        return path

    skip_rendering(patch)
    patch.setattr(figures, "save", save)


def readers(folder: Path) -> list[Reader]:
    """Every format; `folder` is for files from which they are made."""
    run, experiment = folder / "run", folder / "experiment"
    _run(run)
    kappa = folder / "kappa"
    write_all(experiment, "tuned", seeds=2, trials=2)
    _kappa(kappa)
    deaths = COMMITTED / "deaths" / "fashion-mini"
    log = (run / "metrics.jsonl").read_bytes()
    uncertainty, knn = ((run / name).read_bytes() for name in ("uncertainty.json", "knn.json"))
    result = (experiment / "results" / "vi-simsiam-seed-0.json").read_bytes()
    curve = worker.curve(run)
    lines = [{"knn200": 0.5, "knn200_epoch": 1, "knn200_seconds": 2.5, "step": 10}] * 3
    progress = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    long = json.dumps({**json.loads(result), "curve": curve}).encode()
    started = {"arguments": ["--lr", "0.1"], "runs": [_seed(0), _seed(1)]}
    written = _encoded(spec(_CONFIG, folder / "spec"))
    trained = _encoded({"steps": 3, "images": 8, "seconds": 1.5, "device": "cpu"})
    whole = {
        "multiview_loss": scripted_result(),
        **{name: scripted_pipeline(name) for name in ("augment", "step", "train")},
        "batch_norm": json.loads((BENCHMARKS / "batch_norm.json").read_text()),
        "accuracy": json.loads((BENCHMARKS / "accuracy.json").read_text()),
        "clean": json.loads((BENCHMARKS / "clean.json").read_text()),
    }
    whole["batch_norm"]["cases"] = whole["batch_norm"]["cases"][:1]
    step = json.loads((BENCHMARKS / "step.json").read_text())
    whole["step"]["cases"][0]["launches"] = {
        name: found[:2] for name, found in step["cases"][0]["launches"].items()
    }
    return [
        Reader("config.json", _encoded(_CONFIG.to_dict()), _config, "config.json"),
        Reader("settings in JSON", _encoded(_CONFIG.to_dict()), _settings, "settings.yaml"),
        Reader("settings in YAML", b"lr: 1e-3\ncrop-scale: [0.2, 1]\n", _settings, "settings.yaml"),
        Reader("log", log, _log, "metrics.jsonl", _run),
        Reader("kernels.json", _encoded(_KERNELS), _kernels, "kernels.json"),
        Reader("accuracies", knn, _accuracies, "knn.json", _run),
        Reader("uncertainty", uncertainty, _uncertainty, "uncertainty.json", _run, 0.5),
        Reader("model card", uncertainty, _card, "uncertainty.json", _run, 0.1),
        Reader("log in figures", log, _curves, "metrics.jsonl", _run, 0.05),
        Reader("uncertainty in figures", uncertainty, _figures, "uncertainty.json", _run, 0.05),
        Reader("uncertainty in a report", uncertainty, _report, "uncertainty.json", _run, 0.05),
        Reader("accuracies in a report", knn, _report, "knn.json", _run, 0.05),
        Reader("log in a report", log, _report, "metrics.jsonl", _run, 0.05),
        Reader("configuration in a report", (run / "config.json").read_bytes(), _report,
               "config.json", _run, 0.05),
        Reader("plan.json", (experiment / "plan.json").read_bytes(), _experiment, "plan.json",
               _tuned, 0.3),
        Reader("chosen.json", (experiment / "chosen.json").read_bytes(), _experiment,
               "chosen.json", _tuned, 0.3),
        Reader("result of a run", result, _experiment, "results/vi-simsiam-seed-0.json", _tuned,
               0.3),
        Reader("result with a long curve", long, _experiment, "results/vi-simsiam-seed-0.json",
               _tuned, 0.1),
        Reader("result in figures", result, _drawn, "results/vi-simsiam-seed-0.json", _tuned, 0.05),
        Reader("plan of kappa", (kappa / "plan.json").read_bytes(), _experiment, "plan.json",
               _kappa, 0.2),
        Reader("result of kappa", (kappa / "results" / "fitted-seed-0.json").read_bytes(),
               _experiment, "results/fitted-seed-0.json", _kappa, 0.2),
        Reader("plan of kappa in figures", (kappa / "plan.json").read_bytes(), _purposes,
               "plan.json", _kappa, 0.05),
        Reader("result in deaths", long, _deaths, "results/vi-simsiam-seed-0.json", _dead, 0.3),
        Reader("plan of deaths", (deaths / "plan.json").read_bytes(), _deaths, "plan.json", _dead,
               0.3),
        Reader("seeds.json", _encoded(started), _seeds, "seeds.json"),
        Reader("specification", written, lambda path: read_json(path, Spec, "spec"), "spec.json"),
        Reader("trained.json", trained, lambda path: read_json(path, Trained, "run"), "t.json"),
        Reader("progress.jsonl", progress, lambda path: worker.curve(path.parent), "progress.jsonl",
               _run),
        *(
            Reader(f"benchmark {name}", _encoded(content), _benchmark, f"{name}.json", share=0.3)
            for name, content in whole.items()
        ),
        *(
            Reader(f"plots of {name}", _encoded(content), _plots, f"{name}.json", share=0.03)
            for name, content in whole.items()
            if name not in _WITHOUT_TIMES
        ),
    ]  # fmt: skip


def _encoded(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _seed(number: int) -> dict[str, Any]:
    return {"seed": number, "exit": None, "seconds": 1.5, "process": None}


def _run(folder: Path) -> None:
    make_run(folder, lines=6)
    evaluate_knn(feature_sets(folder), KnnConfig(k=5))
    (folder / "uncertainty.json").write_text(json.dumps(uncertainty_result()))


def _tuned(folder: Path) -> None:
    write_all(folder, "tuned", seeds=2, trials=2)


def _kappa(folder: Path) -> None:
    write_all(folder, "kappa", seeds=1)
    for path in (folder / "results").iterdir():
        found = {"purposes": purposes(uncertainty_result())}
        path.write_text(json.dumps(json.loads(path.read_text()) | found))


def _dead(folder: Path) -> None:
    _tuned(folder)
    for path in (folder / "results").iterdir():
        content = json.loads(path.read_text())
        content["curve"]["kappa_best"] = content["curve"]["cosine"]
        path.write_text(json.dumps(content))


def _config(path: Path) -> None:
    config = read_config(path.parent)
    page.settings(config)
    page.train_arguments(config)
    health = Health(config)
    health.update({"cosine": 0.5, "z_std": 1.0})
    assert health.line


def _settings(path: Path) -> None:
    updated(TrainConfig(), read_settings(path))


def _log(path: Path) -> None:
    lines, _ = read_log(path.parent)
    read_metrics(path.parent)
    worker.curve(path.parent)
    health = Health.of_run(path.parent, read_config(path.parent))
    assert health is None or health.line
    for line in lines:
        problem(line)


def _kernels(path: Path) -> None:
    str(KernelChoice.load(path.parent))


def _accuracies(path: Path) -> None:
    found = read_result(path.parent, "knn")
    assert found is not None
    summary_table({"kNN": found})
    accuracies({"kNN": found})


def _uncertainty(path: Path) -> None:
    found = read_result(path.parent, "uncertainty")
    assert found is not None
    comparisons(found)
    page.compared(found)
    page._results({"uncertainty": found})
    worker.flat_uncertainty(found)


def _card(path: Path) -> None:
    run = make_run(path.parent)
    check = {"images": 8, "source": "fashion-mini/val", "differences": None}
    model_card(run, "safetensors", check=check, versions={"torch": "9.9"})


def _curves(path: Path) -> None:
    draw_curves(path.parent)


def _figures(path: Path) -> None:
    draw_uncertainty(path.parent)


def _report(path: Path) -> None:
    page.write_report(path.parent)


def _experiment(path: Path) -> None:
    folder = path.parent.parent if path.parent.name == "results" else path.parent
    tables._markdown(collect(Experiment.read(folder)))


def _purposes(path: Path) -> None:
    figures.draw(path.parent)


def _drawn(path: Path) -> None:
    figures.draw(path.parent.parent)


def _deaths(path: Path) -> None:
    summarise_deaths(path.parent.parent if path.parent.name == "results" else path.parent)


def _seeds(path: Path) -> None:
    seeds._resumed(path.parent, None, ["--lr", "0.1"])


def _benchmark(path: Path) -> None:
    content = read_benchmark(path, path.stem)
    for kind in _SECTIONS[path.stem]:
        report.fill(f"<!-- bench: {kind} {path.name} -->\n<!-- /bench -->", path.parent)
    if path.stem not in _WITHOUT_TIMES:
        compare.compare(content, content)


def _plots(path: Path) -> None:
    plots.draw(read_benchmark(path, path.stem), path.parent)
