"""The model card of an exported run: README.md, Markdown with the front matter of the Hugging Face Hub."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vi_simsiam.config import flat
from vi_simsiam.engine.run import METRICS, Run
from vi_simsiam.errors import InputError
from vi_simsiam.evaluation.uncertainty import comparisons
from vi_simsiam.export.formats import portable, preprocessing
from vi_simsiam.text import METHODS, counted, data_label

NOT_MEASURED = "not measured"
NOT_DEFINED = "not defined"

# Data sets that lie on the Hugging Face Hub under a name of their own.
_HUB_DATA = {
    "fashion-mini": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "imagenette": "frgfm/imagenette",
    "imagewoof": "frgfm/imagewoof",
}
_LIBRARIES = {"torchvision": "pytorch", "timm": "timm", "safetensors": "vi-simsiam", "onnx": "onnx"}
# Result file, its accuracies, and how the column is headed.
_MEASURES = {
    "knn": (("top1", "kNN"),),
    "linear": (("top1", "linear"), ("top5", "linear top-5"), ("held_out_top1", "linear, held out")),
    "logistic": (("top1", "logistic"),),
}
# Kinds of concentration that are the same for every image, or another image's.
_CONTROLS = ("constant", "global", "shuffled")
_ENCODERS = ("trained", "untrained", "pixels")
# Parts of uncertainty.json, and the measure that is missing without one.
_PARTS = {
    "calibration": "calibration error of E[mu.z] (0 is best)",
    "misclassification": "misclassification, AUROC",
    "retrieval": "retrieval, R-AUROC",
    "ood": "other data sets, AUROC",
    "corruptions": "corruptions, Spearman",
}

_CITATION = """\
@inproceedings{nakamura2023representation,
  title = {Representation Uncertainty in Self-Supervised Learning as Variational Inference},
  author = {Nakamura, Hiroki and Okada, Masashi and Taniguchi, Tadahiro},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year = {2023}
}
@inproceedings{chen2021exploring,
  title = {Exploring Simple Siamese Representation Learning},
  author = {Chen, Xinlei and He, Kaiming},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2021}
}"""

_ABOUT = {
    "torchvision": "`model.pth` is the state dict of torchvision's {architecture} without its classifier `fc`. It needs "
    "torchvision alone:",
    "timm": "The folder is a timm model, `config.json` and `model.safetensors`. It needs timm alone; uploaded to the Hugging "
    "Face Hub it is read as `hf-hub:NAME`, and `model.safetensors` is also what `checkpoint_path` takes:",
    "safetensors": "`model.safetensors` is the whole model: backbone, projector and predictor. It needs vi-simsiam:",
    "onnx": "`model.onnx` maps float32 images (batch, 3, {size}, {size}) to {outputs}. It needs onnxruntime:",
}


@dataclass(frozen=True)
class Check:
    """How far what a written file computes is from what the run computes, in float32 on the CPU."""

    images: int
    source: str
    """Where the images are from."""
    differences: dict[str, float] | None
    """By output: the largest difference over the largest value. None where nothing here can run the file."""

    def line(self, weights: str) -> str:
        """One line for the terminal."""
        if self.differences is None:
            return f"{weights} was not checked: onnxruntime is not installed (pip install 'vi-simsiam[onnx]')"
        said = ", ".join(f"{value:.1e} in {name}" for name, value in self.differences.items())
        return f"{weights} checked on {counted(self.images, 'image')} of {self.source}: differs by {said} of the largest value"


def model_card(run: Run, format: str, *, check: Check, versions: dict[str, str]) -> str:
    """The text of README.md for one exported format.

    Results are those that lie in the run folder (knn.json, linear.json, logistic.json, uncertainty.json); the others are
    given as not measured.

    Raises:
        InputError: a result file cannot be read, or lacks what the card shows.
    """
    import jinja2
    from huggingface_hub import ModelCardData

    config = run.config
    results = {name: _read(run.path / f"{name}.json") for name in (*_MEASURES, "uncertainty")}
    data, vi = config.data.partition(":")[0], config.method == "vi-simsiam"
    data = (
        data
        if data in _HUB_DATA
        else f"images of one's own ({Path(config.data.partition(':')[2]).name})"
    )
    name = f"{config.model.backbone} by {METHODS[config.method]}"
    front_matter = ModelCardData(
        library_name=_LIBRARIES[format],
        pipeline_tag="image-feature-extraction",
        tags=["self-supervised-learning", config.method, *(["uncertainty"] if vi else []), format],
        datasets=[_HUB_DATA[config.data]] if config.data in _HUB_DATA else None,
        model_name=name,
        eval_results=_front_results(config.data, results) or None,
    )
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    template = (
        resources.files("vi_simsiam").joinpath("assets/model_card.md").read_text(encoding="utf-8")
    )
    return environment.from_string(template).render(
        front_matter=front_matter.to_yaml().strip(),
        name=name,
        vi=vi,
        architecture=config.model.backbone,
        data=data,
        dim=config.model.dim,
        about=_about(run, format),
        code=_loading(run, format),
        seen=preprocessing(config),
        preprocess=_preprocess(format, config.augment.size, config.decode.background),
        checked=_checked(check),
        measures=[heading for columns in _MEASURES.values() for _, heading in columns],
        rows=[(encoder, _shares(results, encoder)) for encoder in _ENCODERS],
        uncertainty=_uncertainty(results["uncertainty"], run.path / "uncertainty.json"),
        uncertainty_measured=results["uncertainty"] is not None,
        control=config.loss.concentration if config.loss.concentration in _CONTROLS else None,
        progress=_progress(run),
        settings=[(key, json.dumps(value)) for key, value in flat(portable(config)).items()],
        versions=", ".join(f"{package} {number}" for package, number in versions.items()),
        citation=_CITATION,
    )


def _about(run: Run, format: str) -> str:
    vi = run.config.method == "vi-simsiam"
    outputs = (
        f"`embedding` (batch, {run.model.features}), `loc` (batch, {run.model.dim}), the unit mean direction, and "
        "`concentration` (batch,), kappa"
        if vi
        else f"`embedding` (batch, {run.model.features})"
    )
    config = run.config
    return _ABOUT[format].format(
        architecture=config.model.backbone, size=config.augment.size, outputs=outputs
    )


def _loading(run: Run, format: str) -> str:
    """Code that loads the export from the current folder and embeds a batch of two images."""
    model, size, vi = run.config.model, run.config.augment.size, run.config.method == "vi-simsiam"
    batch = f"images = torch.zeros(2, 3, {size}, {size})  # preprocessed images"
    embed = [
        batch,
        "with torch.inference_mode():",
        f"    features = model(images)  # (2, {run.model.features})",
    ]
    if format == "torchvision":
        stem = [
            f"model.conv1 = torch.nn.Conv2d(3, {_width(run)}, 3, stride=1, padding=1, bias=False)",
            "model.maxpool = torch.nn.Identity()",
        ]
        lines = [
            "import torch",
            "import torchvision",
            "",
            f"model = torchvision.models.{model.backbone}()",
            "model.fc = torch.nn.Identity()  # there is no classifier",
            *(stem if model.stem == "small" else []),
            'model.load_state_dict(torch.load("model.pth", weights_only=True))',
            "model.eval()",
            *embed,
        ]
    elif format == "timm":
        lines = [
            "import timm",
            "import torch",
            "",
            'model = timm.create_model("local-dir:.", pretrained=True, num_classes=0).eval()',
            *embed,
        ]
    elif format == "safetensors":
        kappa = ["    kappa = model.distribution(images).concentration  # (2,)"] if vi else []
        embed[-1] = embed[-1].replace("model(", "model.backbone(")
        lines = [
            "import torch",
            "from vi_simsiam.export import load_safetensors",
            "",
            'model = load_safetensors("model.safetensors")  # in eval mode',
            *embed,
            *kappa,
        ]
    else:
        names = "features, loc, kappa" if vi else "(features,)"
        lines = [
            "import onnxruntime",
            "import torch",
            "",
            'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
            batch,
            f'{names} = session.run(None, {{"images": images.numpy()}})',
        ]
    return "\n".join(lines)


def _width(run: Run) -> int:
    """Channels after the first convolution of a run's backbone."""
    width: int = run.model.state_dict()["backbone.conv1.weight"].shape[0]
    return width


def _preprocess(format: str, size: int, background: str) -> str:
    """Code that makes `images` (1, 3, S, S) of the file image.jpg, with `background` where it is transparent."""
    if format == "timm":
        lines = [
            "from PIL import Image, ImageOps",
            "",
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)",
        ]
    else:
        from vi_simsiam.ops.augment import IMAGENET_MEAN, IMAGENET_STD

        lines = [
            "from PIL import Image, ImageOps",
            "from torchvision.transforms import v2",
            "",
            "transform = v2.Compose(",
            "    [",
            f"        v2.Resize({size}, v2.InterpolationMode.BICUBIC),",
            f"        v2.CenterCrop({size}),",
            "        v2.PILToTensor(),",
            "        v2.ToDtype(torch.float32, scale=True),",
            f"        v2.Normalize({list(IMAGENET_MEAN)}, {list(IMAGENET_STD)}),",
            "    ]",
            ")",
        ]
    lines += [
        'image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGBA")',
        f'image = Image.alpha_composite(Image.new("RGBA", image.size, "{background}"), image).convert("RGB")',
        "images = transform(image).unsqueeze(0)",
    ]
    return "\n".join(lines)


def _checked(check: Check) -> str:
    if check.differences is None:
        return "The written file was not checked against the run: onnxruntime was not installed."
    said = ", ".join(f"{value:.1e} in `{name}`" for name, value in check.differences.items())
    return (
        f"The written file was loaded again and compared with the run on {counted(check.images, 'image')} of {check.source}, in float32 on a CPU. "
        f"Largest difference over the largest value: {said}."
    )


def _read(path: Path) -> dict[str, Any] | None:
    """A result file's content, None if there is no such file. Raises InputError if it is damaged."""
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"run: {path} is damaged ({error}); {_again(path)}") from error
    if not isinstance(content, dict):
        raise InputError(f"run: {path} is damaged (no object); {_again(path)}")
    return content


def _again(path: Path) -> str:
    """How a result file is mended: it has the name of the command that writes it."""
    return (
        f"remove it, or write it again: {shlex.join(['vi-simsiam', path.stem, str(path.parent)])}"
    )


def _shares(results: dict[str, dict[str, Any] | None], encoder: str) -> list[str]:
    """An encoder's accuracies in per cent, one for each column."""
    cells = []
    for name, columns in _MEASURES.items():
        for key, _ in columns:
            share = ((results[name] or {}).get(key) or {}).get(encoder)
            cells.append(NOT_MEASURED if share is None else f"{100 * share:.1f} %")
    return cells


def _front_results(data: str, results: dict[str, dict[str, Any] | None]) -> list[Any]:
    """The trained encoder's accuracies as the Hub's evaluation results."""
    from huggingface_hub import EvalResult

    found = []
    for name, columns in _MEASURES.items():
        for key, heading in columns:
            share = ((results[name] or {}).get(key) or {}).get("trained")
            if share is not None:
                short = data_label(data)
                found.append(
                    EvalResult(
                        task_type="image-classification",
                        dataset_type=_HUB_DATA.get(data, short),
                        dataset_name=short,
                        dataset_split="validation",
                        metric_type="accuracy",
                        metric_name=heading,
                        metric_value=round(share, 5),
                    )
                )
    return found


def _uncertainty(result: dict[str, Any] | None, path: Path) -> list[tuple[str, str, str, str]]:
    """Rows of what kappa was measured to do: the measure, kappa's number, and the best trivial and other score by name.

    Raises:
        InputError: the result lacks a part.
    """
    rows, missing = [], dict(_PARTS)
    if result is not None:
        try:
            if result["calibration"]:
                rows.append(
                    (missing.pop("calibration"), f"{result['calibration']['error']:.4f}", "-", "-")
                )
            for row in comparisons(result):
                beside = (_named(row.baseline, row.value), _named(row.other, row.other_value))
                rows.append(
                    (
                        f"{row.part}, {row.measure}",
                        NOT_DEFINED if row.kappa is None else f"{row.kappa:.3f}",
                        *beside,
                    )
                )
            missing = {part: text for part, text in missing.items() if not result[part]}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"run: {path} lacks what the card shows ({error!r}); {_again(path)}"
            ) from error
    return [*rows, *((text, NOT_MEASURED, "-", "-") for text in missing.values())]


def _named(name: str | None, value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} ({name})"


def _progress(run: Run) -> str:
    """How far the training went, by the last line of the run's log."""
    try:
        line = json.loads((run.path / METRICS).read_text().splitlines()[-1])
        reached, loss = line["epoch"], line["loss"]
    except (OSError, IndexError, KeyError, TypeError, json.JSONDecodeError):
        return f"Set to {counted(run.config.epochs, 'epoch')}; the run has no log that says how far it went."
    return f"Set to {counted(run.config.epochs, 'epoch')}; the log ends at epoch {reached:.2f} with a loss of {loss:.4g}."
