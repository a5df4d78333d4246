"""Representations, distributions, tables and rankings of images by a trained run."""
