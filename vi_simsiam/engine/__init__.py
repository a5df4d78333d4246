"""Training: the run folder, checkpoints, monitoring and the loop."""
