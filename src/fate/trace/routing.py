"""Routing traces: the experts that every layer's router chose in every forward of a run, and the file they live in.

The file is JSON lines, gzipped where its name ends in `.gz`:

    {"format": "fate-routing-trace", "version": 1, "model": "olmoe", "num_experts": [64, 64], "top_k": 8}
    {"request": 0, "phase": "prefill", "tokens": 36, "layers": [[[5, 20], [63, 1]], [[0, 36]]]}
    {"request": 0, "phase": "decode", "tokens": 1, "layers": [[[5, 1], [17, 1]], [[0, 1]]]}
    {"steps": 2}

The first line names the model, the experts of each MoE layer and the experts one token uses. Each further line is one
forward: for each layer `[expert, pairs]` lists, most popular first, where `pairs` is the number of (token, rank) pairs
routed to the expert. The last line counts the forwards; a file without it was cut short.

>>> meta = TraceMeta("tiny", num_experts=(4, 4), top_k=1)
>>> recorder = Recorder(meta)
>>> recorder.begin_request()
>>> for layer in (0, 1):
...     recorder.record(Routing(layer, {2: 1}))
>>> recorder.trace().steps
(TraceStep(request=0, prefill=False, tokens=1, layers=({2: 1}, {2: 1})),)
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

from fate.core import Routing
from fate.errors import TraceError
from fate.trace.observer import LayerEvent, Observer

FORMAT = "fate-routing-trace"
VERSION = 1

# Far beyond any model, and small enough that a hostile file cannot make a reader (or a replay) allocate without end.
MAX_LAYERS = 4096
MAX_EXPERTS = 65536
MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class TraceMeta:
    """model: any name. num_experts: of each MoE layer. top_k: experts one token uses."""

    model: str
    num_experts: tuple[int, ...]
    top_k: int

    @property
    def num_layers(self) -> int:
        return len(self.num_experts)


@dataclass(frozen=True)
class TraceStep:
    """One forward. request: counts sequences from 0. layers: for each layer, what `Routing.pairs_per_expert` holds."""

    request: int
    prefill: bool
    tokens: int
    layers: tuple[dict[int, int], ...]

    def routing(self, layer: int) -> Routing:
        return Routing(layer, self.layers[layer], tokens=self.tokens, prefill=self.prefill)


@dataclass(frozen=True)
class RoutingTrace:
    meta: TraceMeta
    steps: tuple[TraceStep, ...] = field(repr=False)

    @property
    def num_requests(self) -> int:
        return len({step.request for step in self.steps})

    def write(self, path: Path | str) -> None:
        """Write the file; gzipped where `path` ends in `.gz`. Raises OSError."""
        with _open(Path(path), "wt") as file:
            meta = self.meta
            header = {"format": FORMAT, "version": VERSION, "model": meta.model, "num_experts": meta.num_experts}
            file.write(_line({**header, "top_k": meta.top_k}))
            for step in self.steps:
                file.write(
                    _line(
                        {
                            "request": step.request,
                            "phase": "prefill" if step.prefill else "decode",
                            "tokens": step.tokens,
                            "layers": [list(pairs.items()) for pairs in step.layers],
                        }
                    )
                )
            file.write(_line({"steps": len(self.steps)}))

    @classmethod
    def read(cls, path: Path | str) -> RoutingTrace:
        """The trace in `path`; raises TraceError naming the file and line of what is wrong with it."""
        return _Reader(Path(path)).read()


class Recorder(Observer):
    """Gathers routings, in the order in which layers report them, into the steps of a trace.

    A forward that did not reach its last layer (an interrupt, a failed read) leaves no step.
    """

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self._steps: list[TraceStep] = []
        self._open: list[Routing] = []
        self._request = -1

    def begin_request(self) -> None:
        """A new sequence starts with the next routing."""
        self._request += 1
        self._open.clear()

    on_request = begin_request

    def on_layer(self, event: LayerEvent) -> None:
        self.record(event.routing)

    def record(self, routing: Routing) -> None:
        if routing.layer == 0:
            self._open.clear()
        if routing.layer != len(self._open):
            return  # the rest of a forward whose beginning was not seen
        self._open.append(routing)
        if len(self._open) == self.meta.num_layers:
            layers = tuple(dict(r.pairs_per_expert) for r in self._open)
            self._steps.append(TraceStep(max(self._request, 0), routing.prefill, routing.tokens, layers))
            self._open.clear()

    def trace(self) -> RoutingTrace:
        """What was recorded so far."""
        return RoutingTrace(self.meta, tuple(self._steps))


class _Reader:
    """One pass over a file; knows the line it is at, for errors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number = 0

    def read(self) -> RoutingTrace:
        steps: list[TraceStep] = []
        lines = numbered_lines(self._path)
        meta = self._meta(next(lines, (1, ""))[1])
        for self._number, line in lines:
            record = self._object(line)
            if "layers" not in record:
                self._check_end(record, len(steps), lines)
                return RoutingTrace(meta, tuple(steps))
            steps.append(self._step(record, meta))
        self._fail("the file is cut short: record it again, or take it from where it is whole")

    def _meta(self, line: str) -> TraceMeta:
        self._number = 1
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            self._fail(f"this is not a routing trace: its first line must be a JSON object with format {FORMAT!r}")
        if record.get("version") != VERSION:
            self._fail(f"version {record.get('version')!r} is not known: this fate reads version {VERSION}")
        model, experts, top_k = (record.get(name) for name in ("model", "num_experts", "top_k"))
        if not isinstance(model, str):
            self._fail(f"model {model!r} is not a name")
        if not isinstance(experts, list) or not 1 <= len(experts) <= MAX_LAYERS:
            self._fail(f"num_experts must list the experts of 1 to {MAX_LAYERS} layers")
        for count in experts:
            if not is_count(count, MAX_EXPERTS):
                self._fail(f"num_experts {count!r} is not a number from 1 to {MAX_EXPERTS}")
        if not is_count(top_k, max(experts)):
            self._fail(f"top_k {top_k!r} is not a number from 1 to {max(experts)}")
        assert isinstance(top_k, int)
        return TraceMeta(model, tuple(experts), top_k)

    def _step(self, record: dict[str, Any], meta: TraceMeta) -> TraceStep:
        request, phase, tokens, layers = (record.get(name) for name in ("request", "phase", "tokens", "layers"))
        if not (type(request) is int and request >= 0):
            self._fail(f"request {request!r} is not a number from 0")
        if phase not in ("prefill", "decode"):
            self._fail(f"phase {phase!r} is neither 'prefill' nor 'decode'")
        if not (type(tokens) is int and tokens >= 1):
            self._fail(f"tokens {tokens!r} is not a positive number")
        if not isinstance(layers, list) or len(layers) != meta.num_layers:
            self._fail(f"layers must list {meta.num_layers} layers, as the first line has it")
        routed = tuple(self._pairs(at, pairs, meta.num_experts[at]) for at, pairs in enumerate(layers))
        return TraceStep(request, phase == "prefill", tokens, routed)

    def _pairs(self, layer: int, pairs: object, num_experts: int) -> dict[int, int]:
        routed: dict[int, int] = {}
        if not isinstance(pairs, list):
            self._fail(f"layer {layer} is not a list of [expert, pairs]")
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and all(type(value) is int for value in pair)):
                self._fail(f"layer {layer} holds {pair!r}, which is not [expert, pairs]")
            expert, count = pair
            if not 0 <= expert < num_experts:
                self._fail(f"layer {layer} has experts 0 to {num_experts - 1}, and no expert {expert}")
            if count < 1 or expert in routed:
                self._fail(f"layer {layer} expert {expert} must be listed once, with at least 1 pair")
            routed[expert] = count
        return routed

    def _check_end(self, record: dict[str, Any], steps: int, lines: Iterator[tuple[int, str]]) -> None:
        if record.get("steps") != steps:
            self._fail(f"neither a step nor the end of a trace of {steps} steps")
        for self._number, _line_after in lines:
            self._fail("nothing may follow the line that counts the steps")

    def _object(self, line: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            self._fail("not a JSON object: the file is cut short or damaged")
        return record

    def _fail(self, problem: str) -> NoReturn:
        raise TraceError(self._path, self._number, problem)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text file, unpacked where it ends in `.gz`, counted from 1; raises TraceError where one cannot be had.

    A blank line is one line like any other.
    """
    number = 0
    try:
        with _open(path, "rt") as file:
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if len(line) == MAX_LINE_BYTES:
                    raise TraceError(path, number, f"longer than {MAX_LINE_BYTES} characters: not a trace")
                yield number, line.rstrip("\r\n")
    except FileNotFoundError:
        raise TraceError(path, None, "there is no such file: check the name") from None
    except UnicodeDecodeError:
        raise TraceError(path, number + 1, "not text: is this a trace?") from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise TraceError(path, number + 1, "the gzip data is cut short or damaged: copy the file again") from None
    except OSError as error:
        raise TraceError(path, None, f"cannot be read ({error.strerror or error})") from error


def is_count(value: object, most: int) -> bool:
    """Whether `value` is an int (and no bool) from 1 to `most`."""
    return type(value) is int and 1 <= value <= most


def by_popularity(pairs: dict[int, int]) -> dict[int, int]:
    """`pairs` as the runtime orders them: most popular first, and by expert where equal."""
    return dict(sorted(pairs.items(), key=lambda item: (-item[1], item[0])))


def _open(path: Path, mode: str) -> IO[str]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    file: IO[str] = opener(os.fspath(path), mode, encoding="utf-8")
    return file


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"
