"""What a user does with a transformers model gives the same with ours: ways of generating, caches, pipelines,
streamers, an evaluation harness."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    TextIteratorStreamer,
    pipeline,
)

import fate
from fate.engine.session import FateModel
from fate.errors import EnvelopeError
from sweep.checkpoints import save_checkpoint
from sweep.discovery import find_family
from sweep.tiny_configs import tiny_config
from tiny import tiny_checkpoint, tiny_store

FAMILY = "qwen2_moe"
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint(FAMILY)).eval()


@pytest.fixture(scope="module")
def model() -> Iterator[FateModel]:
    with fate.load(tiny_store(FAMILY, 32, 16), experts=1, max_batch=8, on_plan=lambda plan, system: None) as model:
        yield model
        assert model.fate.stats().total.evictions > 0


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_checkpoint(FAMILY))


OPTIONS: dict[str, dict[str, Any]] = {
    "beam search": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 3, "do_sample": True, "top_k": 20},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "static cache": {"cache_implementation": "static"},
    "quantized cache": {"cache_implementation": "quantized", "cache_config": {"backend": "hqq", "nbits": 4}},
    "no cache": {"use_cache": False},
    "router logits": {"output_router_logits": True},
    "max_length": {"max_new_tokens": None, "max_length": 30},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_generate(name: str, model: FateModel, reference: PreTrainedModel) -> None:
    prompt = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(1))
    texts = []
    for each in (model, reference):
        torch.manual_seed(2)
        texts.append(each.generate(prompt, **{**GREEDY, **OPTIONS[name]}))
    assert torch.equal(*texts)


@pytest.mark.parametrize("ours", ["model", "assistant", "both"])
def test_assisted_generation(ours: str, model: FateModel, reference: PreTrainedModel, prompt: torch.Tensor) -> None:
    """The reference helping itself accepts every candidate; a model of ours in either place changes nothing."""
    main = reference if ours == "assistant" else model
    helper = reference if ours == "model" else model
    expected = reference.generate(prompt, **GREEDY)
    assert torch.equal(main.generate(prompt, assistant_model=helper, **GREEDY), expected)
    assert torch.equal(main.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY), expected)


def test_scores_and_states(model: FateModel, reference: PreTrainedModel, prompt: torch.Tensor) -> None:
    wanted = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    got, expected = (
        each.generate(prompt, return_dict_in_generate=True, **wanted, **GREEDY) for each in (model, reference)
    )
    for one, other in zip(got.scores + got.logits, expected.scores + expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for one, other in zip(got.hidden_states[-1], expected.hidden_states[-1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_inference_mode_and_none(model: FateModel, reference: PreTrainedModel, prompt: torch.Tensor) -> None:
    expected = reference.generate(prompt, **GREEDY)
    for context in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with context:
            assert torch.equal(model.generate(prompt, **GREEDY), expected)


def test_beams_count_as_sequences(model: FateModel, prompt: torch.Tensor) -> None:
    with pytest.raises(EnvelopeError, match="a batch of 9 sequences is beyond the plan's 8"):
        model.generate(prompt, num_beams=9, **GREEDY)


@pytest.mark.parametrize("name", ["switch_transformers", "nllb_moe"])
def test_encoder_decoder_generation(name: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tiny_config(find_family(name)), tmp_path / "checkpoint")
    reference = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    store = fate.convert(checkpoint, tmp_path / "store", expert_bits=32, dense_bits=16)
    prompt = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompt)
    mask[1, 8:] = 0
    with fate.load(store, experts=1, max_batch=6, prefill_chunk=64, on_plan=lambda plan, system: None) as model:
        for options in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}):
            settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, **options}
            assert torch.equal(model.generate(prompt, **settings), reference.generate(prompt, **settings))
        stats = model.fate.stats().total
        assert stats.accesses - stats.hits > stats.first_accesses
        with pytest.raises(EnvelopeError, match="65 tokens is beyond the plan's chunk of 64"):
            model.generate(torch.full((1, 65), 5), max_new_tokens=2)


def test_pipeline(model: FateModel, reference: PreTrainedModel, tokenizer: Any) -> None:
    texts = []
    for each in (model, reference):
        generate = pipeline("text-generation", model=each, tokenizer=tokenizer)
        texts.append(generate(["Once upon", "a time"], batch_size=2, **GREEDY))
    assert texts[0] == texts[1]


def test_streamer(model: FateModel, reference: PreTrainedModel, tokenizer: Any) -> None:
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    texts = []
    for each in (model, reference):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = Thread(target=each.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
        thread.start()
        texts.append(list(streamer))
        thread.join()
    assert texts[0] == texts[1]
    assert len(texts[0]) > 1


def test_stop_strings(model: FateModel, reference: PreTrainedModel, tokenizer: Any) -> None:
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    letters = {**GREEDY, "suppress_tokens": [*range(32), *range(127, 259)]}
    free = tokenizer.decode(reference.generate(**inputs, **letters)[0, inputs.input_ids.shape[1] :])
    settings = {**letters, "stop_strings": [free[3:5]], "tokenizer": tokenizer}
    got, expected = (each.generate(**inputs, **settings) for each in (model, reference))
    assert torch.equal(got, expected)
    assert got.shape[1] < inputs.input_ids.shape[1] + GREEDY["max_new_tokens"]


def test_evaluation_harness(model: FateModel, reference: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    """EleutherAI's harness on a task file of our own: choices by likelihood, and perplexity."""
    pytest.importorskip("lm_eval", reason="pip install fate-moe[eval]")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"question": f"{a} and {a + 1} make", "choices": [" odd", " even"], "answer": a % 2} for a in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: answer\ndoc_to_choice: choices\n"
        "metric_list:\n  - metric: acc\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    scores = []
    for each in (model, reference):
        harness = HFLM(pretrained=each, tokenizer=tokenizer, batch_size=2)
        found = simple_evaluate(harness, tasks=["sums"], task_manager=manager, bootstrap_iters=0, log_samples=True)
        likelihoods = [pair[0] for sample in found["samples"]["sums"] for pair in sample["filtered_resps"]]
        scores.append((found["results"]["sums"]["acc,none"], torch.tensor(likelihoods)))
    assert scores[0][0] == scores[1][0]
    torch.testing.assert_close(scores[0][1], scores[1][1], rtol=1e-4, atol=1e-4)
