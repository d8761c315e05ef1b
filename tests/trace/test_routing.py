"""The routing trace's file: what is written is read, and nothing else is."""

import gzip
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fate.core import Routing
from fate.errors import TraceError
from fate.trace import Recorder, RoutingTrace, TraceMeta, TraceStep

META = TraceMeta("tiny", (4, 6), 2)
TRACE = RoutingTrace(
    META,
    (
        TraceStep(0, True, 5, ({2: 7, 0: 3}, {5: 9, 1: 1})),
        TraceStep(0, False, 1, ({1: 1, 3: 1}, {0: 1, 4: 1})),
        TraceStep(1, False, 1, ({0: 1, 3: 1}, {})),
    ),
)

layers = st.tuples(
    st.dictionaries(st.integers(0, 3), st.integers(1, 99)), st.dictionaries(st.integers(0, 5), st.integers(1, 99))
)
steps = st.builds(TraceStep, st.integers(0, 9), st.booleans(), st.integers(1, 99), layers)


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
@settings(max_examples=30, deadline=None)
@given(steps=st.lists(steps, max_size=5), model=st.text(max_size=8))
def test_what_is_written_is_read(tmp_path_factory, name, steps, model):
    path = tmp_path_factory.mktemp("trace") / name
    trace = RoutingTrace(TraceMeta(model, (4, 6), 2), tuple(steps))
    trace.write(path)
    read = RoutingTrace.read(path)
    assert read == trace
    popularity = [list(pairs) for step in trace.steps for pairs in step.layers]
    assert [list(pairs) for step in read.steps for pairs in step.layers] == popularity


def test_the_file_is_what_the_documentation_shows(tmp_path):
    TRACE.write(tmp_path / "t.jsonl")
    assert (tmp_path / "t.jsonl").read_text().splitlines() == [
        '{"format":"fate-routing-trace","version":1,"model":"tiny","num_experts":[4,6],"top_k":2}',
        '{"request":0,"phase":"prefill","tokens":5,"layers":[[[2,7],[0,3]],[[5,9],[1,1]]]}',
        '{"request":0,"phase":"decode","tokens":1,"layers":[[[1,1],[3,1]],[[0,1],[4,1]]]}',
        '{"request":1,"phase":"decode","tokens":1,"layers":[[[0,1],[3,1]],[]]}',
        '{"steps":3}',
    ]
    TRACE.write(tmp_path / "t.jsonl.gz")
    assert gzip.decompress((tmp_path / "t.jsonl.gz").read_bytes()) == (tmp_path / "t.jsonl").read_bytes()


def change(line, **values):
    """The file's lines with keys of one line replaced."""

    def edit(lines):
        lines[line] = json.dumps({**json.loads(lines[line]), **values})

    return edit


def replace(line, text):
    def edit(lines):
        lines[line : line + 1] = [text]

    return edit


HOSTILE = {
    "empty": (lambda lines: lines.clear(), r"line 1: this is not a routing trace"),
    "another format": (change(0, format="gguf"), r"line 1: this is not a routing trace"),
    "not an object": (replace(0, "[1]"), r"line 1: this is not a routing trace"),
    "text": (replace(0, "once upon a time"), r"line 1: this is not a routing trace"),
    "another version": (change(0, version=2), r"line 1: version 2 is not known: this fate reads version 1"),
    "no layers": (change(0, num_experts=[]), r"line 1: num_experts must list the experts of 1 to 4096 layers"),
    "layers without end": (change(0, num_experts=[1] * 5000), r"line 1: num_experts must list"),
    "no experts": (change(0, num_experts=[4, 0]), r"line 1: num_experts 0 is not a number from 1 to 65536"),
    "experts without end": (change(0, num_experts=[10**12, 6]), r"line 1: num_experts 1000000000000 is not"),
    "top_k of a float": (change(0, top_k=1.5), r"line 1: top_k 1\.5 is not a number from 1 to 6"),
    "nameless": (change(0, model=None), r"line 1: model None is not a name"),
    "cut short": (lambda lines: lines.pop(), r"line 4: the file is cut short"),
    "cut short in a line": (replace(3, '{"request": 0, "pha'), r"line 4: not a JSON object: the file is cut short"),
    "steps missing": (lambda lines: lines.pop(2), r"line 4: neither a step nor the end of a trace of 2 steps"),
    "more after the end": (lambda lines: lines.append(lines[1]), r"line 6: nothing may follow"),
    "expert too high": (change(2, layers=[[[4, 1]], []]), r"line 3: layer 0 has experts 0 to 3, and no expert 4"),
    "expert below zero": (change(2, layers=[[[-1, 1]], []]), r"line 3: layer 0 .* no expert -1"),
    "expert twice": (change(2, layers=[[], [[1, 1], [1, 1]]]), r"line 3: layer 1 expert 1 must be listed once"),
    "no pairs": (change(2, layers=[[[1, 0]], []]), r"line 3: layer 0 expert 1 .* at least 1 pair"),
    "pair of three": (change(2, layers=[[[1, 1, 1]], []]), r"line 3: layer 0 holds \[1, 1, 1\]"),
    "expert true": (change(2, layers=[[[True, 1]], []]), r"line 3: layer 0 holds \[True, 1\]"),
    "layer of null": (change(2, layers=[None, []]), r"line 3: layer 0 is not a list"),
    "layer missing": (change(2, layers=[[]]), r"line 3: layers must list 2 layers"),
    "another phase": (change(2, phase="train"), r"line 3: phase 'train' is neither 'prefill' nor 'decode'"),
    "no tokens": (change(2, tokens=0), r"line 3: tokens 0 is not a positive number"),
    "request of text": (change(2, request="a"), r"line 3: request 'a' is not a number from 0"),
    "nested without end": (replace(2, "[" * 100_000), r"line 3: not a JSON object"),
}


@pytest.mark.parametrize("edit, complaint", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path, edit, complaint):
    path = tmp_path / "t.jsonl"
    TRACE.write(path)
    lines = path.read_text().splitlines()
    edit(lines)
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(TraceError, match=complaint) as error:
        RoutingTrace.read(path)
    assert str(error.value).startswith(f"{path}, line ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"\x1f\x8b rubbish", "the gzip data is cut short or damaged"),
        (b"no gzip", "the gzip data is cut short or damaged"),
        (gzip.compress(b'{"format"' * 1000, mtime=0)[:-12], "the gzip data is cut short or damaged"),
        (gzip.compress(b"\xff\xfe\xff", mtime=0), "not text"),
    ],
)
def test_damaged_gzip_is_refused(tmp_path, content, complaint):
    (tmp_path / "t.jsonl.gz").write_bytes(content)
    with pytest.raises(TraceError, match=complaint):
        RoutingTrace.read(tmp_path / "t.jsonl.gz")


def test_what_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(TraceError, match="there is no such file"):
        RoutingTrace.read(tmp_path / "none.jsonl")
    with pytest.raises(TraceError, match="cannot be read"):
        RoutingTrace.read(tmp_path)


def test_the_recorder_keeps_whole_forwards_in_order():
    recorder = Recorder(META)
    recorder.begin_request()
    recorder.record(Routing(1, {0: 1}))  # of a forward whose first layer was not seen
    recorder.record(Routing(0, {2: 7, 0: 3}, tokens=5, prefill=True))
    recorder.record(Routing(1, {5: 9, 1: 1}, tokens=5, prefill=True))
    recorder.record(Routing(0, {3: 1}))  # interrupted
    recorder.record(Routing(0, {1: 1, 3: 1}))
    recorder.record(Routing(1, {0: 1, 4: 1}))
    recorder.record(Routing(0, {2: 1}))
    recorder.begin_request()
    recorder.record(Routing(0, {0: 1, 3: 1}))
    recorder.record(Routing(1, {}))
    assert recorder.trace() == TRACE
    assert recorder.trace().num_requests == 2
    assert TRACE.steps[0].routing(1) == Routing(1, {5: 9, 1: 1}, tokens=5, prefill=True)
