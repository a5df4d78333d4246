"""Training: the run folder, checkpoints, monitoring, the step and its CUDA graph, and the loop."""

from vi_simsiam.engine.graph import capture

__all__ = ["capture"]
