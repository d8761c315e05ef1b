"""What quantization costs on the embedded model, as perplexity on its three domains.

Word problems and prose come from the data folder beside the checkout (skipped without it), Python from the standard
library's own sources. `make slow` prints the whole table, HQQ's separately optimised INT2 beside ours.
"""

import json
import math
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fate
from fate.tools.evaluate import perplexity

MINI = Path(__file__).resolve().parents[2] / "assets" / "mini-moe"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
DOMAINS = ("word problems", "prose", "python")


def text_of(domain):
    if domain == "python":
        library = Path(sysconfig.get_paths()["stdlib"])
        return "\n".join(
            (library / name).read_text() for name in ("textwrap.py", "heapq.py", "shlex.py", "tempfile.py")
        )
    if not DATA.is_dir():
        pytest.skip(f"no data folder at {DATA}")
    if domain == "prose":
        return (DATA / "corpus" / "les_miserables.txt").read_text()[400_000:460_000]
    rows = map(json.loads, (DATA / "prompts" / "gsm8k_train_400.jsonl").read_text().splitlines())
    return "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n" for row in rows)


@pytest.fixture(scope="module")
def tokens():
    tokenizer = AutoTokenizer.from_pretrained(MINI)

    def encode(domain, count):
        return tokenizer(text_of(domain)[: 8 * count], return_tensors="pt").input_ids[0, :count]

    return encode


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """As `fate convert` makes it by default: INT4 experts, 8-bit dense weights."""
    return fate.convert(MINI, tmp_path_factory.mktemp("quality") / "store")


def nats(model, ids):
    return perplexity(model, ids, window=256, chunk=256).nats_per_token


def change(model, ids, base):
    """Relative change of perplexity."""
    return math.exp(nats(model, ids) - base) - 1


@pytest.mark.parametrize("domain", DOMAINS)
def test_int4_costs_less_than_two_percent(domain, tokens, reference, store):
    ids = tokens(domain, 1024)
    base = nats(reference, ids)
    assert base < 6, "the reference predicts this text at all"
    with fate.load(store) as model:
        assert change(model, ids, base) < 0.02


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_table(tokens, reference, store, capsys):
    """Perplexity change against bf16 on 8,192 tokens a domain, every expert at the precision named."""
    ids = {domain: tokens(domain, 8192) for domain in DOMAINS}
    base = {domain: nats(reference, ids[domain]) for domain in DOMAINS}
    rows = {}
    for name, system in (("INT4", "load-on-demand"), ("nested INT2", "cross-layer-int2")):
        with fate.load(store, system=system) as model:
            rows[name] = [change(model, ids[domain], base[domain]) for domain in DOMAINS]
    hqq_int2(reference)
    rows["HQQ INT2"] = [change(reference, ids[domain], base[domain]) for domain in DOMAINS]
    with capsys.disabled():
        print("\nperplexity change".ljust(20), *(domain.rjust(14) for domain in DOMAINS))
        for name, values in rows.items():
            print(name.ljust(19), *(f"{value:+14.2%}" for value in values))
        print(json.dumps({"domains": DOMAINS, "nats_bf16": list(base.values()), "perplexity_change": rows}))
    assert max(rows["INT4"]) < 0.02
    assert max(rows["nested INT2"]) < 0.05
    for nested, separate in zip(rows["nested INT2"], rows["HQQ INT2"]):
        assert nested < separate + 0.02, "one stored copy costs nothing that matters"


@torch.no_grad()
def hqq_int2(model):
    """Replace every expert's weights by the hqq library's 2-bit version (groups of 64 along the input)."""
    from hqq.core.quantize import Quantizer

    for layer in model.model.layers:
        for weights in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            for matrix in weights:
                packed, meta = Quantizer.quantize(
                    matrix.float(), nbits=2, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32
                )
                matrix.copy_(Quantizer.dequantize(packed, meta).reshape(matrix.shape))
