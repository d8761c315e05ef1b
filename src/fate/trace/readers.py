"""Routing traces of other engines, and `read_trace`, which knows each by its first line.

BigMoeOnEdge `route_trace v1` (https://github.com/Helldez/BigMoeOnEdge): CSV of one row per routed (token, rank) pair:

    # route_trace v1
    # model=olmoe.gguf arch=olmoe n_layer=16 n_expert=64 n_expert_used=8
    turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
    0,0,0,0,0,49,0.22,0,3059712

phase 0 is prefill, 1 is decode. A prefill comes layer by layer (all its tokens, which are its steps), decode token by
token. In the last layer of a prefill only the last token is routed, because only its logits are wanted.

sqliteai/warp (https://github.com/sqliteai/warp): JSON lines, one per token, that list the experts of every layer:

    {"tok": 1, "layers": [[6, 8], [7, 16]]}
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fate.errors import TraceError
from fate.trace.routing import (
    MAX_EXPERTS,
    MAX_LAYERS,
    RoutingTrace,
    TraceMeta,
    TraceStep,
    by_popularity,
    is_count,
    numbered_lines,
)

_BIGMOE_MAGIC = "# route_trace v1"
_BIGMOE_COUNTS = ("n_layer", "n_expert", "n_expert_used")
_BIGMOE_COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"


def read_trace(path: Path | str) -> RoutingTrace:
    """The trace in `path`, in any format this module or `routing.py` knows; raises TraceError."""
    path = Path(path)
    first = next(numbered_lines(path), (1, ""))[1]
    if first.startswith("# route_trace"):
        return read_bigmoe(path)
    return read_warp(path) if first.startswith('{"tok"') else RoutingTrace.read(path)


def read_bigmoe(path: Path | str) -> RoutingTrace:
    """A BigMoeOnEdge `route_trace v1`; a turn is a request. Raises TraceError."""
    path = Path(path)
    lines = numbered_lines(path)
    number, first = next(lines, (1, ""))
    if first != _BIGMOE_MAGIC:
        raise TraceError(path, number, f"not a route_trace that is known here: the first line must be {_BIGMOE_MAGIC}")
    meta = _bigmoe_meta(path, lines)
    steps: list[TraceStep] = []
    open_forward: _Forward | None = None
    for number, line in lines:
        turn, phase, step, layer, expert = _bigmoe_row(path, number, line, meta)
        if open_forward is None or not open_forward.continues(turn, phase, step, layer):
            if open_forward is not None:
                steps.append(open_forward.close(meta))
            open_forward = _Forward(turn, phase, step)
        open_forward.add(step, layer, expert)
    if open_forward is None:
        raise TraceError(path, None, "the trace holds no step: it is cut short")
    return RoutingTrace(meta, (*steps, open_forward.close(meta)))


def read_warp(path: Path | str, num_experts: int | None = None) -> RoutingTrace:
    """A warp trace: one decode step per line, one request. Raises TraceError.

    num_experts: of each layer, which the format does not tell; None: as many as the highest expert named asks for.
    """
    path = Path(path)
    tokens: list[list[list[int]]] = []
    for number, line in numbered_lines(path):
        layers = _warp_layers(path, number, line, num_experts or MAX_EXPERTS)
        if tokens and len(layers) != len(tokens[0]):
            raise TraceError(path, number, f"{len(layers)} layers, where the first line has {len(tokens[0])}")
        tokens.append(layers)
    if not tokens:
        raise TraceError(path, None, "the file is empty")
    highest = max((expert for layers in tokens for experts in layers for expert in experts), default=0)
    top_k = max(1, max(len(experts) for layers in tokens for experts in layers))
    meta = TraceMeta(path.name.split(".")[0], (num_experts or highest + 1,) * len(tokens[0]), top_k)
    steps = (
        TraceStep(0, False, 1, tuple(by_popularity(dict.fromkeys(experts, 1)) for experts in layers))
        for layers in tokens
    )
    return RoutingTrace(meta, tuple(steps))


class _Forward:
    """The rows of one forward of a BigMoeOnEdge trace."""

    def __init__(self, turn: int, phase: int, step: int) -> None:
        self._turn = turn
        self._phase = phase
        self._last_step = step
        self._layer = 0
        self._tokens: set[int] = set()
        self._pairs: dict[int, Counter[int]] = {}

    def continues(self, turn: int, phase: int, step: int, layer: int) -> bool:
        """Whether such a row still belongs here. A lower layer starts the next forward; in decode each token does."""
        same_token = phase == 0 or step == self._last_step
        return (turn, phase) == (self._turn, self._phase) and layer >= self._layer and same_token

    def add(self, step: int, layer: int, expert: int) -> None:
        self._last_step, self._layer = step, layer
        self._tokens.add(step)
        self._pairs.setdefault(layer, Counter())[expert] += 1

    def close(self, meta: TraceMeta) -> TraceStep:
        layers = tuple(by_popularity(self._pairs.get(layer, {})) for layer in range(meta.num_layers))
        return TraceStep(self._turn, self._phase == 0, len(self._tokens), layers)


def _bigmoe_meta(path: Path, lines: Iterator[tuple[int, str]]) -> TraceMeta:
    """Reads up to and with the line of column names."""
    meta = None
    number = 1
    for number, line in lines:
        if line == _BIGMOE_COLUMNS:
            break
        if line.startswith("# model="):
            meta = _bigmoe_model(path, number, line)
        elif not line.startswith("#"):
            raise TraceError(path, number, f"the columns must be {_BIGMOE_COLUMNS}")
    if meta is None:
        raise TraceError(path, number, "no '# model=… n_layer=… n_expert=… n_expert_used=…' before the columns")
    return meta


def _bigmoe_model(path: Path, number: int, line: str) -> TraceMeta:
    values = dict(re.findall(r"(\w+)=(\S+)", line))
    num_layers, num_experts, top_k = (_number(values.get(name, "")) or 0 for name in _BIGMOE_COUNTS)
    if not (is_count(num_layers, MAX_LAYERS) and is_count(num_experts, MAX_EXPERTS) and is_count(top_k, num_experts)):
        raise TraceError(path, number, f"{', '.join(_BIGMOE_COUNTS)} are not sensible numbers: {line[:200]}")
    return TraceMeta(Path(values.get("model", "")).stem, (num_experts,) * num_layers, top_k)


def _bigmoe_row(path: Path, at: int, line: str, meta: TraceMeta) -> tuple[int, int, int, int, int]:
    """(turn, phase, step, layer, expert) of one row."""
    fields = line.split(",")
    numbers = [value for text in (*fields[:4], *fields[5:6]) if (value := _number(text)) is not None]
    if len(fields) != _BIGMOE_COLUMNS.count(",") + 1 or len(numbers) != 5:
        raise TraceError(path, at, f"not a row of {_BIGMOE_COLUMNS}: the file is cut short or damaged")
    turn, phase, step, layer, expert = numbers
    if phase not in (0, 1):
        raise TraceError(path, at, f"phase {phase} is neither 0 (prefill) nor 1 (decode)")
    if layer >= meta.num_layers:
        raise TraceError(path, at, f"the model has layers 0 to {meta.num_layers - 1}, and no layer {layer}")
    if expert >= meta.num_experts[layer]:
        raise TraceError(path, at, f"layers have experts 0 to {meta.num_experts[layer] - 1}, and no expert {expert}")
    return turn, phase, step, layer, expert


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


def _warp_layers(path: Path, number: int, line: str, num_experts: int) -> list[list[int]]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    layers = record.get("layers") if isinstance(record, dict) else None
    if not isinstance(layers, list) or not 1 <= len(layers) <= MAX_LAYERS:
        raise TraceError(
            path, number, 'not a line like {"tok": 1, "layers": [[6, 8]]}: the file is cut short or damaged'
        )
    for experts in layers:
        if not isinstance(experts, list) or not all(type(expert) is int for expert in experts):
            raise TraceError(path, number, "a layer is not a list of expert numbers")
        for expert in experts:
            if not 0 <= expert < num_experts:
                raise TraceError(path, number, f"layers have experts 0 to {num_experts - 1}, and no expert {expert}")
    return layers
