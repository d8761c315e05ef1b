"""The loaded model is transformers' own in every use, and refuses what its plan does not cover."""

import shutil
import threading

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    TextIteratorStreamer,
    pipeline,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import fate
from fate.errors import (
    BudgetTooLargeError,
    BudgetTooSmallError,
    ClosedError,
    EmptyPromptError,
    EnvelopeError,
    UnknownNameError,
    UsageError,
)
from fate.load import ensure_store
from fate.models.packed import PackedEmbedding, PackedLinear
from tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def model(mini_store):
    with fate.load(mini_store, experts="25%", max_context=128, max_batch=2, prefill_chunk=32) as loaded:
        yield loaded


def transfer_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fate-transfer")]


def test_it_is_a_transformers_model_without_expert_weights(model):
    assert isinstance(model, PreTrainedModel)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    names = [name for name, _ in model.named_parameters()]
    assert not any("experts." in name for name in names)
    assert isinstance(model.lm_head, PackedLinear)
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    assert model.lm_head.packed is model.model.embed_tokens.packed, "tied weights are held once"


def test_stats_account_for_every_access(model, prompt):
    before = model.fate.stats()
    model.generate(prompt, max_new_tokens=8, do_sample=False)
    stats = model.fate.stats() - before
    layers, top_k = 16, 4
    assert stats.decode.forwards == 7
    assert stats.decode.accesses == 7 * layers * top_k
    assert stats.prefill.tokens == prompt.shape[1]
    assert stats.prefill.forwards == 2, "48 tokens in chunks of 32"
    assert 0 < stats.decode.hit_rate < 1
    assert 0 <= stats.decode.stall_share < 1
    assert 0 <= stats.decode.wasted_bytes <= stats.decode.bytes_moved
    assert 0.25 < stats.decode.coverage <= 1, "half of the first steps are tried without prefetches"


def test_streamer_and_pipeline(model, mini_store):
    tokenizer = AutoTokenizer.from_pretrained(mini_store)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0], skip_special_tokens=True)
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    arguments = {"max_new_tokens": 6, "do_sample": False}
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs={"streamer": streamer, **arguments})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("Once upon a time", **arguments)
    assert text[0]["generated_text"] == expected


def test_concurrent_generations_are_serialised(model, prompt):
    prompts = [prompt[:, at : at + 12] for at in range(4)]
    expected = [model.generate(ids, max_new_tokens=6, do_sample=False) for ids in prompts]
    results = {}

    def work(i):
        results[i] = model.generate(prompts[i], max_new_tokens=6, do_sample=False)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(4))


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((1, 130), {"max_new_tokens": 1}, r"131 tokens .* beyond the plan's context of 128: .*max_context=131"),
        ((1, 10), {"max_new_tokens": 119}, r"129 tokens .* beyond the plan's context"),
        ((3, 10), {"max_new_tokens": 2}, r"batch of 3 sequences is beyond the plan's 2: load with max_batch=3"),
        ((1, 10), {"max_new_tokens": 2, "num_beams": 3}, r"batch of 3 sequences is beyond the plan's 2"),
    ],
)
def test_beyond_the_envelope(model, shape, arguments, message):
    with pytest.raises(EnvelopeError, match=message):
        model.generate(torch.ones(shape, dtype=torch.long), do_sample=False, **arguments)


def test_beyond_the_envelope_in_a_plain_forward(model):
    with pytest.raises(EnvelopeError, match="one forward of 40 tokens is beyond the plan's chunk of 32"):
        model(torch.ones(1, 40, dtype=torch.long))


def test_logit_rows_are_part_of_the_plan(mini_store):
    with fate.load(mini_store, experts="25%", logit_rows=4) as model:
        with pytest.raises(EnvelopeError, match=r"10 rows of logits are beyond the plan's 4: pass logits_to_keep"):
            model(torch.ones(1, 10, dtype=torch.long))
        assert model(torch.ones(1, 10, dtype=torch.long), logits_to_keep=4).logits.shape[1] == 4


@pytest.mark.parametrize("arguments", [{"prompt_lookup_num_tokens": 2}, {"use_cache": False}])
def test_a_prompt_that_must_be_split_but_cannot(model, arguments):
    with pytest.raises(EnvelopeError, match="do not allow: load with prefill_chunk=40"):
        model.generate(torch.ones(1, 40, dtype=torch.long), max_new_tokens=2, **arguments)
    assert model.generate(torch.ones(1, 20, dtype=torch.long), max_new_tokens=2, **arguments).shape[1] <= 22


def test_kept_scores_are_part_of_the_plan(mini_store):
    with fate.load(mini_store, experts="25%", logit_rows=4) as model:
        options = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False}
        ids = torch.ones(1, 4, dtype=torch.long)
        assert len(model.generate(ids, max_new_tokens=4, **options).scores) <= 4
        with pytest.raises(EnvelopeError, match="9 rows of logits are beyond the plan's 4"):
            model.generate(ids, max_new_tokens=9, **options)


def test_a_users_generation_config_is_left_alone(model, prompt):
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    by_keyword = model.generate(prompt, generation_config=config)
    assert torch.equal(model.generate(prompt, config, LogitsProcessorList()), by_keyword)
    assert config.prefill_chunk_size is None


def test_token_ids_of_any_integer_type(model, prompt):
    ids = prompt[:, :20]
    assert torch.equal(model(ids.int()).logits, model(ids).logits)


def test_it_stays_where_the_plan_put_it(model):
    assert model.to("cpu") is model
    assert model.to(model.dtype) is model
    for move in (lambda: model.to("meta"), lambda: model.to(torch.float64), model.cuda):
        with pytest.raises(UsageError, match=r"stays on cpu in torch\.bfloat16"):
            move()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_failed_forward_keeps_the_books_straight(mini_store, prompt):
    with fate.load(mini_store, experts="25%") as model:
        handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(prompt)
        handle.remove()
        model(prompt)
        stats = model.fate.stats().total
        assert stats.forwards == 2
        assert stats.wasted_bytes >= 0
        assert stats.first_accesses <= stats.misses


def test_a_budget_beyond_the_machine(mini_store, monkeypatch):
    monkeypatch.setattr("fate.engine.assembly.available_bytes", lambda: 300 << 20)
    with pytest.raises(BudgetTooLargeError, match=r"300\.00 MiB are free: give a budget of at most 300MiB"):
        fate.load(mini_store, memory="2GiB")


def test_a_checkpoint_is_converted_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("FATE_CACHE", str(tmp_path / "cache"))
    source = shutil.copytree(tiny_checkpoint("qwen2_moe"), tmp_path / "model")
    first = ensure_store(source)
    made = (first / "experts.fate").stat().st_mtime_ns
    assert ensure_store(source) == first
    assert (first / "experts.fate").stat().st_mtime_ns == made
    shard = next(source.glob("*.safetensors"))
    with open(shard, "r+b") as file:  # rewritten in place: same size, same header
        file.seek(-100, 2)
        file.write(bytes(8))
    second = ensure_store(source)
    assert second != first
    (source / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text() + "\n")
    third = ensure_store(source)
    assert third not in (first, second)
    monkeypatch.setattr("fate.store.format.FORMAT_VERSION", 1)  # what an older version made is not taken for ours
    assert ensure_store(source) not in (first, second, third)


def test_an_empty_prompt(model):
    with pytest.raises(EmptyPromptError, match="the prompt is empty"):
        model.generate(torch.ones(1, 0, dtype=torch.long), max_new_tokens=2)


def test_close_leaves_nothing_and_says_so(mini_store, prompt):
    before = len(transfer_threads())
    with fate.load(mini_store, experts="25%") as model:
        model.generate(prompt, max_new_tokens=2, do_sample=False)
        assert len(transfer_threads()) > before
    assert len(transfer_threads()) == before
    model.fate.close()
    with pytest.raises(ClosedError, match="was closed"):
        model.generate(prompt, max_new_tokens=2)


def test_a_forgotten_model_closes_itself(mini_store):
    before = len(transfer_threads())
    model = fate.load(mini_store, experts="25%")
    assert len(transfer_threads()) > before
    del model
    import gc

    gc.collect()
    assert len(transfer_threads()) == before


def test_from_pretrained_once_fate_is_imported(mini_store, prompt, model):
    plain = AutoModelForCausalLM.from_pretrained(mini_store)
    try:
        assert plain.fate.system.exact
        assert torch.equal(plain(prompt[:, :20]).logits, model(prompt[:, :20]).logits)
    finally:
        plain.fate.close()


def test_without_fate_transformers_refuses_the_store(mini_store, monkeypatch):
    """A transformers that does not know the format must not fill the experts with random numbers."""
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "fate")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "fate")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(mini_store)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"memory": "100MiB"}, BudgetTooSmallError, r"the smallest that works is \d+MiB"),
        ({"system": "magic"}, UnknownNameError, r"unknown system 'magic': choose one of cross-layer, .*load-on-demand"),
        ({"max_context": 0}, UsageError, "max_context=0 is not valid"),
        ({"max_batch": -1}, UsageError, "max_batch=-1 is not valid"),
    ],
)
def test_bad_arguments(mini_store, arguments, error, message):
    with pytest.raises(error, match=message):
        fate.load(mini_store, **arguments)


def test_the_refusal_names_a_budget_that_works(mini_store, prompt):
    with pytest.raises(BudgetTooSmallError) as refusal:
        fate.load(mini_store, memory=1 << 20)
    with fate.load(mini_store, memory=refusal.value.smallest_bytes) as model:
        assert model.generate(prompt, max_new_tokens=2, do_sample=False).shape[1] == 50
