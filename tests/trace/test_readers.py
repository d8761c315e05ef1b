"""Others' trace formats, by small samples and by the recorded traces where they are at hand."""

import pytest

from fate.errors import TraceError
from fate.trace import RoutingTrace, TraceMeta, TraceStep, read_trace
from fate.trace.readers import read_warp

BIGMOE = """\
# route_trace v1
# model=/data/Tiny-MoE-Q4.gguf arch=tiny n_layer=2 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=4336640 dense_bytes=44191236
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,5,0.6,0,4336640
0,0,0,0,1,1,0.4,0,4336640
0,0,1,0,0,3,0.7,0,4336640
0,0,1,0,1,5,0.3,1,0
0,0,1,1,0,7,0.9,0,4336640
0,0,1,1,1,0,0.1,0,4336640
0,1,2,0,0,4,0.6,0,4336640
0,1,2,0,1,2,0.4,0,4336640
0,1,2,1,0,7,0.6,1,0
0,1,2,1,1,6,0.4,0,4336640
0,1,3,0,0,1,0.6,1,0
0,1,3,1,0,0,0.6,1,0
1,1,3,0,0,1,0.6,1,0
1,1,3,1,0,2,0.6,1,0
"""
WARP = '{"tok": 1, "layers": [[6, 8], [7, 1]]}\n{"tok": 2, "layers": [[8, 0], [3, 7]]}\n'


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="sample.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return to_file


def test_bigmoe(write):
    assert read_trace(write(BIGMOE)) == RoutingTrace(
        TraceMeta("Tiny-MoE-Q4", (8, 8), 2),
        (
            TraceStep(0, True, 2, ({5: 2, 1: 1, 3: 1}, {0: 1, 7: 1})),
            TraceStep(0, False, 1, ({2: 1, 4: 1}, {6: 1, 7: 1})),
            TraceStep(0, False, 1, ({1: 1}, {0: 1})),
            TraceStep(1, False, 1, ({1: 1}, {2: 1})),
        ),
    )
    first = read_trace(write(BIGMOE)).steps[0].layers
    assert [list(pairs) for pairs in first] == [[5, 1, 3], [0, 7]], "most popular first"


def test_a_prompt_of_several_forwards_is_as_many_steps(write):
    second_forward = "0,0,2,0,0,6,0.6,0,1\n0,0,2,1,0,6,0.6,0,1\n"
    decode_at = BIGMOE.index("0,1,2,")
    steps = read_trace(write(BIGMOE[:decode_at] + second_forward + BIGMOE[decode_at:])).steps
    assert [(step.prefill, step.tokens) for step in steps[:3]] == [(True, 2), (True, 1), (False, 1)]


def test_warp(write):
    path = write(WARP, "tiny_2.jsonl")
    steps = (TraceStep(0, False, 1, ({6: 1, 8: 1}, {1: 1, 7: 1})), TraceStep(0, False, 1, ({0: 1, 8: 1}, {3: 1, 7: 1})))
    assert read_trace(path) == RoutingTrace(TraceMeta("tiny_2", (9, 9), 2), steps)
    assert read_warp(path, num_experts=64).meta.num_experts == (64, 64)


def test_ours_is_known_too(write, tmp_path):
    trace = read_trace(write(BIGMOE))
    trace.write(tmp_path / "ours.jsonl.gz")
    assert read_trace(tmp_path / "ours.jsonl.gz") == trace


@pytest.mark.parametrize(
    "text, complaint",
    [
        (BIGMOE.replace("v1", "v2"), r"line 1: not a route_trace that is known here"),
        (BIGMOE.replace("n_expert=8", "n_expert=x"), r"line 2: n_layer, n_expert, n_expert_used are not sensible"),
        (BIGMOE.replace("n_layer=2", "n_layer=" + "9" * 5000), r"line 2: n_layer, n_expert, n_expert_used are not"),
        (BIGMOE.replace("model=/data/Tiny-MoE-Q4.gguf ", ""), r"line 4: no '# model="),
        (BIGMOE.replace("turn,phase", "phase,turn"), r"line 4: the columns must be turn,phase"),
        (BIGMOE.replace("0,1,2,1,1,6,", "0,1,2,1,1,8,"), r"line 14: layers have experts 0 to 7, and no expert 8"),
        (BIGMOE.replace("0,1,2,1,1,6,", "0,1,2,2,1,6,"), r"line 14: the model has layers 0 to 1, and no layer 2"),
        (BIGMOE.replace("0,1,2,1,1,6,", "0,2,2,1,1,6,"), r"line 14: phase 2 is neither 0"),
        (BIGMOE.replace("0,1,2,1,1,6,", "0,1,2,1,1,-6,"), r"line 14: not a row"),
        (BIGMOE[: BIGMOE.index("0.4,0,4336640\n0,1,3")], r"line 14: not a row of turn,.*: the file is cut short"),
        (BIGMOE[: BIGMOE.index("0,0,0,0,0")], r"csv: the trace holds no step"),
        (WARP.replace("[8, 0]", "[8, -1]"), r"line 2: layers have experts 0 to 65535, and no expert -1"),
        (WARP.replace("[8, 0]", "[8, 1000000000000]"), r"line 2: layers have experts"),
        (WARP.replace("[8, 0]", "8"), r"line 2: a layer is not a list of expert numbers"),
        (WARP.replace(", [3, 7]", ""), r"line 2: 1 layers, where the first line has 2"),
        (WARP[:-9], r"line 2: not a line like"),
        ("", r"line 1: this is not a routing trace"),
    ],
)
def test_hostile_files_are_refused_in_one_line(write, text, complaint):
    with pytest.raises(TraceError, match=complaint) as error:
        read_trace(write(text))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "name, layers, experts, top_k, prompt_tokens, steps",
    [
        ("bigmoeonedge_gemma.route.csv", 30, 128, 6, 29, 129),
        ("bigmoeonedge_gptoss.route.csv", 36, 128, 2, 85, 65),
        ("bigmoeonedge_qwen.route.csv", 48, 128, 6, 28, 129),
        ("warp_kimi_300.jsonl", 26, 256, 8, None, 300),
        ("warp_olmoe_299.jsonl", 16, 64, 8, None, 299),
    ],
)
def test_recorded_traces(shared_data, name, layers, experts, top_k, prompt_tokens, steps):
    trace = read_trace(shared_data / "traces" / name)
    assert trace.meta.num_experts == (experts,) * layers
    assert trace.meta.top_k == top_k
    assert len(trace.steps) == steps
    assert [step.tokens for step in trace.steps if step.prefill] == ([prompt_tokens] if prompt_tokens else [])
    assert all(sum(pairs.values()) == top_k for step in trace.steps[1:] for pairs in step.layers)
