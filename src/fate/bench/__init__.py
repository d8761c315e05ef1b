"""Benchmarks a user can run; each prints a table and ends with one JSON object naming commit and hardware."""
