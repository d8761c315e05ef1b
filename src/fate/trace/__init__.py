"""What a run did: which experts its routers chose (`routing.py`, others' files: `readers.py`), when (`timeline.py`)."""

from fate.trace.readers import read_trace
from fate.trace.routing import Recorder, RoutingTrace, TraceMeta, TraceStep
from fate.trace.timeline import Event, Timeline

__all__ = ["Event", "Recorder", "RoutingTrace", "Timeline", "TraceMeta", "TraceStep", "read_trace"]
