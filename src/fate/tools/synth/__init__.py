"""Models with random weights that route as trained ones do, for speed work without a download."""
