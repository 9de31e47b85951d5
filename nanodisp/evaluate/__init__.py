"""Benchmarks of a model."""
