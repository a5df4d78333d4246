"""Benchmarks: every provider is checked against float64, then timed in turn with the others."""
