"""Hybrid quantization of prompts: the split against every possible split, and who gets which precision."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate.core import Precision, Routing
from fate.precision import PRECISIONS
from fate.precision.popularity import DECODE_LIKE_TOKENS, Popularity, full_reads

# Multiples of 2^-10 s: sums and quotients of them are exact.
SECONDS = st.integers(0, 5000).map(lambda n: n / 1024)
READ_S = st.integers(1, 300).map(lambda n: n / 1024)


class FixedTiming:
    """A layer has a second for each token; an expert takes 4 s whole and 2 s at INT2."""

    def compute_s(self, layer, tokens):
        return float(tokens)

    def transfer_s(self, layer, precision):
        return 4.0 if precision is Precision.FULL else 2.0


def routing(tokens, *experts, prefill=True):
    return Routing(0, {expert: len(experts) - at for at, expert in enumerate(experts)}, tokens, prefill)


@given(st.integers(0, 70), READ_S, READ_S, SECONDS)
def test_the_split_is_the_best_of_all_splits(missing, full_s, int2_s, budget_s):
    def took(whole):
        return whole * full_s + (missing - whole) * int2_s

    whole = full_reads(missing, full_s, int2_s, budget_s)
    if full_s <= int2_s:
        assert whole == missing
    else:
        assert whole == max((n for n in range(missing + 1) if took(n) <= budget_s), default=0)


@given(st.integers(0, 70), READ_S, READ_S, SECONDS, SECONDS)
def test_more_time_never_means_fewer_whole_reads(missing, full_s, int2_s, budget_s, more_s):
    assert full_reads(missing, full_s, int2_s, budget_s) <= full_reads(missing, full_s, int2_s, budget_s + more_s)


def test_the_most_popular_are_read_whole_and_residents_used_as_they_are():
    # 12 s for the 4 missing: 2 whole and 2 at INT2 take just that.
    wanted = Popularity(FixedTiming()).choose(routing(12, 7, 3, 5, 1, 2, 0), [3, 5, 2, 0])
    assert [e for e, precision in wanted.items() if precision is Precision.INT2] == [2, 0]
    assert wanted.keys() == {7, 3, 5, 1, 2, 0}


def test_where_not_even_int2_fits_all_missing_are_int2():
    wanted = Popularity(FixedTiming()).choose(routing(6, 7, 3, 5, 1, 2), [7, 3, 5, 1])
    assert wanted == {7: Precision.INT2, 3: Precision.INT2, 5: Precision.INT2, 1: Precision.INT2, 2: Precision.FULL}


@pytest.mark.parametrize(
    "tokens, prefill, int2", [(5, False, 0), (DECODE_LIKE_TOKENS, True, 0), (DECODE_LIKE_TOKENS + 1, True, 3)]
)
def test_decoding_and_tiny_prompts_read_whole_records(tokens, prefill, int2):
    wanted = Popularity(FixedTiming()).choose(routing(tokens, 4, 2, 6, prefill=prefill), [4, 2, 6])
    assert list(wanted.values()).count(Precision.INT2) == int2


def test_it_is_lossy_and_refuses_to_be_made_without_a_timing():
    policy = PRECISIONS.get("popularity")
    assert policy.needs_timing
    assert not policy.exact
    with pytest.raises(TypeError, match="Timing"):
        policy()
