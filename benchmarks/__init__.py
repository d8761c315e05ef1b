"""Benchmarks for who develops Fate: they measure other programs too, and are no part of the package."""
