"""What a routing trace would do to a cache, without a model: `replay.py`, its bound `belady.py`, `curves.py`."""
