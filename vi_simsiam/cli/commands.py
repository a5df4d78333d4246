"""The commands and benchmarks; their modules are imported on first use."""

COMMANDS = {
    "train": ("train", "train SimSiam or VI-SimSiam into a run folder"),
    "evaluate": ("evaluate", "kNN, linear probe and figures of a run, with a summary"),
    "knn": ("evaluate", "k-nearest-neighbour accuracy of a run's frozen features"),
    "linear": ("evaluate", "linear-probe accuracy of a run's frozen features"),
    "logistic": ("evaluate", "logistic-regression accuracy of a run's frozen features"),
    "figures": ("evaluate", "curves, kappa gallery, density and uncertainty of a run as pictures"),
    "uncertainty": ("evaluate", "quality of kappa: calibration, errors, foreign or damaged images"),
    "report": ("evaluate", "all results of a run in one HTML file"),
    "embed": ("use", "embeddings, kappa and neighbours of your images as a Parquet file"),
    "rank": ("use", "your most and least certain images"),
    "export": (
        "use",
        "a run's weights for torchvision, timm, safetensors or ONNX, with a model card",
    ),
    "experiment": (
        "experiment",
        "many runs with their statistics: table1, tuned, controls, stability, ...",
    ),
    "pack": ("data", "decode images once into one file to train on"),
    "views": ("data", "a picture of some images and their random views"),
    "info": ("tools", "versions, devices, and which backends are available"),
    "bench": ("tools", "benchmarks: bench loss|augment|step|train|compare|accuracy|report"),
}
"""By name: the module in this package with the function of that name, and a description."""

BENCHMARKS = {
    "loss": ("multiview_loss", "time the loss: eager, torch.compile and the fused backends"),
    "augment": ("augment", "views a second: ours, torchvision, lightly and kornia"),
    "step": ("step", "the training step by phase, against the network alone"),
    "train": ("train", "whole trainings: ours, plain and tuned PyTorch, lightly"),
    "compare": ("compare", "two result files; exits 1 if anything became slower beyond the noise"),
    "accuracy": ("accuracy", "errors of the loss at large concentrations"),
    "report": ("report", "write the tables in Markdown files from the result files they name"),
}
"""By name: the module in `vi_simsiam.benchmarks`, and a description."""
