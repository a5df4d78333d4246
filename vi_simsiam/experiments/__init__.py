"""Experiments: many runs of several methods over several seeds, trained and measured alike."""
