"""Benchmarks: python -m moco.bench data | step."""
