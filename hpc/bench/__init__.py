"""Benchmarks, run by hand; results are kept in docs/benchmarks."""
