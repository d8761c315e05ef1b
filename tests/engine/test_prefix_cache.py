"""A conversation's KV cache: what it reuses, and that answers are those of a prefill from nothing."""

import pytest
import torch

import fate
from fate.engine.prefix_cache import PrefixCache
from fate.models.adapter import find_moe_layers
from tiny import tiny_store

NEW = 6
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def tokens(count, seed):
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def answer(model, prompt, cache=None):
    """(new tokens, logits [new, vocabulary], prompt tokens that went through the model)"""
    ids, before = torch.tensor([prompt]), model.fate.stats()
    mask = torch.ones_like(ids)
    result = model.generate(ids, attention_mask=mask, past_key_values=cache, pad_token_id=0, **OPTIONS)
    forwarded = (model.fate.stats() - before).total.tokens - (NEW - 1)
    return result.sequences[0, len(prompt) :].tolist(), torch.cat(result.logits), forwarded


def check(model, prefix, prompt, forwarded):
    """Answer with the conversation's cache as without; returns the conversation's tokens."""
    expected, logits, _ = answer(model, prompt)
    new, same_logits, used = answer(model, prompt, prefix.cache_for(prompt))
    prefix.keep([*prompt, *new])
    assert new == expected
    torch.testing.assert_close(same_logits, logits, rtol=1e-3, atol=1e-3)
    assert used == forwarded
    return [*prompt, *new]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_answers_are_those_of_a_whole_prefill(family):
    with fate.load(tiny_store(family, 32, 16, eos_token_id=None), prefill_chunk=16) as model:
        prefix = PrefixCache(model)
        first = check(model, prefix, tokens(40, 0), forwarded=40)
        second = check(model, prefix, [*first, *tokens(20, 1)], forwarded=20 + 1)  # the last token was never fed
        rewritten = [*second[:50], 7, 7, *tokens(9, 2)]
        check(model, prefix, rewritten, forwarded=11)
        check(model, prefix, rewritten[:30], forwarded=1)
        check(model, prefix, tokens(12, 3), forwarded=12)


def test_after_an_interrupted_forward():
    with fate.load(tiny_store("qwen2_moe", 32, 16, eos_token_id=None)) as model:
        prefix, prompt, calls = PrefixCache(model), tokens(20, 0), []

        def interrupt(module, args):
            calls.append(None)
            if len(calls) == 4:
                raise KeyboardInterrupt

        hook = find_moe_layers(model)[1].experts.register_forward_pre_hook(interrupt)
        cache = prefix.cache_for(prompt)
        with pytest.raises(KeyboardInterrupt):
            answer(model, prompt, cache)
        hook.remove()
        assert {layer.get_seq_length() for layer in cache.layers} == {22, 23}, "two layers got the third token"
        heard = answer(model, prompt)[0][:3]
        prefix.keep([*prompt, *heard])
        check(model, prefix, [*prompt, *heard, *tokens(5, 1)], forwarded=1 + 5)


def test_a_sliding_window_is_gone_on_from_but_never_cut():
    store = tiny_store("gpt_oss", 32, 16, sliding_window=8, eos_token_id=None, num_local_experts=8)
    with fate.load(store) as model:
        prefix = PrefixCache(model)
        first = check(model, prefix, tokens(20, 0), forwarded=20)
        second = check(model, prefix, [*first, *tokens(4, 1)], forwarded=4 + 1)
        check(model, prefix, second[:22], forwarded=22)


def test_states_that_are_no_list_of_tokens_are_never_reused(monkeypatch):
    with fate.load(tiny_store("qwen2_moe", eos_token_id=None)) as model:
        prefix, prompt = PrefixCache(model), tokens(20, 0)
        new = answer(model, prompt, prefix.cache_for(prompt))[0]
        monkeypatch.setattr("fate.engine.prefix_cache.GO_ON", ())
        prefix.keep([*prompt, *new])
        assert prefix.cache_for([*prompt, *new, 1]).get_seq_length() == 0
