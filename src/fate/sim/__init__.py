"""What a routing trace would do to a cache, without a model: `belady.py`, the fewest misses; `curves.py`, LRU's."""
