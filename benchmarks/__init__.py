"""Benchmarks: every provider is checked against float64 before it is timed, and timed in turn with the others."""
