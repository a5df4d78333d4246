"""Evaluation of a trained run: frozen features, k nearest neighbours, linear probe, figures."""
