"""The planned KV cache holds what transformers' own holds, in memory taken once."""

import ctypes
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import fate
from fate.core import Envelope
from fate.models.kv_cache import PlannedLayer, PlannedSlidingLayer, plan_layers, planned_cache
from fate.plan.needs import kv_bytes
from fate.tools.inspection import meta_model
from tiny import FAMILIES, tiny_checkpoint, tiny_config, tiny_store


def states(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, tokens, 8, generator=generator), torch.randn(2, 3, tokens, 8, generator=generator)


def test_the_same_contents_as_the_growing_cache():
    ours, theirs = PlannedLayer(32), DynamicCache()
    for seed, tokens in enumerate((5, 1, 1, 7)):
        got, expected = ours.update(*states(tokens, seed)), theirs.update(*states(tokens, seed), layer_idx=0)
        assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert ours.get_seq_length() == 14


def test_memory_is_taken_once():
    layer = PlannedLayer(32)
    addresses = {layer.update(*states(1, seed))[0].data_ptr() for seed in range(32)}
    assert len(addresses) == 1


def test_what_others_do_to_it():
    ours, theirs = PlannedLayer(32), DynamicCache()
    theirs.update(*states(4, 0), layer_idx=0)
    ours.update(*states(4, 0))
    order = torch.tensor([1, 1])
    for layer in (ours, theirs.layers[0]):
        layer.reorder_cache(order)
        layer.update(*states(1, 1))
        layer.crop(-2)
        layer.update(*states(3, 2))
    assert torch.equal(ours.keys, theirs.layers[0].keys)
    assert torch.equal(ours.values, theirs.layers[0].values)
    ours.reset()
    assert ours.get_seq_length() == 0
    assert torch.equal(ours.update(*states(2, 5))[0], states(2, 5)[0])


def test_beyond_its_room_it_still_holds_everything():
    layer = PlannedLayer(4)
    for seed in range(6):
        keys, _ = layer.update(*states(1, seed))
    assert torch.equal(keys, torch.cat([states(1, seed)[0] for seed in range(6)], dim=-2))


def test_a_token_written_where_the_cache_says():
    ours, theirs = PlannedLayer(8), PlannedLayer(8)
    assert ours.next_rows(2, torch.float32) is None, "nothing is known of its shape yet"
    for layer in (ours, theirs):
        layer.update(*states(3, 0))
    assert ours.next_rows(1, torch.float32) is None, "another batch"
    assert ours.next_rows(2, torch.bfloat16) is None, "another dtype"
    for seed in range(1, 6):
        place, (key, value) = ours.next_rows(2, torch.float32), states(1, seed)
        assert (place.starts, place.lengths) == ([0, 0], [3 + seed, 3 + seed])
        for held, strides, new in ((place.keys, place.key_strides, key), (place.values, place.value_strides, value)):
            for row, head in itertools.product(range(2), range(3)):
                at = held[row] + 4 * (head * strides[0] + (place.lengths[row] - 1) * strides[1])
                ctypes.memmove(at, new[row, head].contiguous().data_ptr(), 4 * 8)
        assert ours.get_seq_length() == 2 + seed, "until it is said to be written"
        ours.advance()
        theirs.update(key, value)
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    assert ours.next_rows(2, torch.float32) is None, "it is full"
    for layer in (ours, theirs):
        layer.crop(-2)
    assert ours.next_rows(2, torch.float32).lengths == [7, 7], "behind what is left"
    for layer in (ours, theirs):
        layer.reset()
    assert ours.keys is None
    assert ours.get_seq_length() == 0
    assert ours.next_rows(2, torch.float32) is None


def test_one_side_replaced_alone():
    ours, theirs = PlannedLayer(16), DynamicCache()
    theirs.update(*states(4, 0), layer_idx=0)
    ours.update(*states(4, 0))
    for layer in (ours, theirs.layers[0]):
        layer.keys = layer.keys * 2
        layer.update(*states(2, 1))
        layer.values = layer.values * 3
        layer.update(*states(1, 2))
    assert torch.equal(ours.keys, theirs.layers[0].keys)
    assert torch.equal(ours.values, theirs.layers[0].values)


def test_one_side_replaced_beyond_the_plan():
    """The buffers of both sides then have different room."""
    ours, theirs = PlannedLayer(4), DynamicCache()
    theirs.update(*states(6, 0), layer_idx=0)
    ours.update(*states(6, 0))
    for layer in (ours, theirs.layers[0]):
        layer.crop(-4)
        layer.values = layer.values * 3
        for seed in range(1, 5):
            layer.update(*states(1, seed))
    assert torch.equal(ours.keys, theirs.layers[0].keys)
    assert torch.equal(ours.values, theirs.layers[0].values)


def test_begun_in_inference_mode_it_goes_on_outside(prompt):
    with fate.load(tiny_store("qwen2_moe")) as model:
        whole = model(prompt).logits[:, -1]
        cache = model.fate.new_cache(model.config)
        with torch.inference_mode():
            model(prompt[:, :-1], past_key_values=cache)
        torch.testing.assert_close(
            model(prompt[:, -1:], past_key_values=cache).logits[:, -1], whole, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_knows_what_the_cache_takes(family):
    """The row of the plan, from a dry run, against the bytes of a real cache."""
    tokens = 24
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family))
    with torch.inference_mode():
        cache = model(torch.ones(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    real = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes(meta_model(tiny_config(family)), Envelope(max_context=tokens)) == real


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {}])
def test_generation_is_transformers_own(arguments, prompt):
    options = {"max_new_tokens": 8, "do_sample": False, **arguments}
    reference = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen2_moe"))
    torch.manual_seed(0)
    expected = reference.generate(prompt, **options)
    with fate.load(tiny_store("qwen2_moe", 32, 16), max_batch=3) as model:
        torch.manual_seed(0)
        assert torch.equal(model.generate(prompt, **options), expected)
        torch.manual_seed(0)
        cache = planned_cache(model.config, 128)
        assert torch.equal(model.generate(prompt, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("prompt", [1, 3, 9])
def test_a_sliding_window_moves_as_transformers_own_does(prompt):
    window = 5
    ours, theirs = PlannedSlidingLayer(window, 64), DynamicSlidingWindowLayer(window)
    assert ours.next_rows(2, torch.float32) is None, "nothing is known of its shape yet"
    for layer in (ours, theirs):
        layer.update(*states(prompt, 0))
    for seed in range(1, 20):
        key, value = states(1, seed)
        place = ours.next_rows(2, torch.float32)
        assert [n - s for s, n in zip(place.starts, place.lengths)] == [min(prompt + seed, window)] * 2
        for held, strides, new in ((place.keys, place.key_strides, key), (place.values, place.value_strides, value)):
            for row, head in itertools.product(range(2), range(3)):
                at = held[row] + 4 * (head * strides[0] + (place.lengths[row] - 1) * strides[1])
                ctypes.memmove(at, new[row, head].contiguous().data_ptr(), 4 * 8)
        ours.advance()
        if seed % 7:
            theirs.update(key, value)
        else:  # in between somebody appends by `update`
            theirs.update(key, value)
            more = states(2, 100 + seed)
            assert all(map(torch.equal, ours.update(*more), theirs.update(*more)))
            prompt += 2
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_a_cache_that_transformers_made_gets_planned_layers():
    cache = DynamicCache()
    keys, values = states(3, 0)
    cache.update(keys, values, 0)
    plan_layers(cache, 8)
    assert torch.equal(cache.layers[0].keys, keys)
    assert cache.layers[0].next_rows(2, torch.float32).lengths == [4, 4]
    cache.update(*states(1, 1), 0)
    assert cache.get_seq_length() == 4
