from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_common.contract import Lane
from ml_base.batching.batches import BatchLimits, choose_lane, pick


@dataclass
class Text:
    length: int
    passed_at: float = math.inf


def limits(*, texts: int = 64, tokens: int = 256, patience_s: float = 0.05) -> BatchLimits:
    return BatchLimits(max_texts=texts, max_tokens=tokens, patience_s=patience_s)


def window(*lengths: int) -> list[Text]:
    return [Text(length) for length in lengths]


def test_whatever_waits_goes_together_if_it_fits() -> None:
    assert sorted(pick(window(5, 6, 7), now=0, limits=limits())) == [0, 1, 2]


def test_the_oldest_text_chooses_and_the_closest_in_length_join() -> None:
    assert pick(window(10, 90, 11, 100, 9), now=0, limits=limits(tokens=40)) == [0, 2, 4]


def test_padding_counts_towards_the_token_limit() -> None:
    assert pick(window(10, 20, 20), now=0, limits=limits(tokens=59)) == [0, 1]


def test_a_text_that_would_widen_the_batch_too_much_makes_room_for_one_that_does_not() -> None:
    assert pick(window(10, 12, 8), now=0, limits=limits(tokens=22)) == [0, 2]


def test_a_text_over_the_limit_runs_alone() -> None:
    assert pick(window(500, 500, 3), now=0, limits=limits(tokens=256)) == [0]


def test_the_number_of_texts_is_limited_too() -> None:
    assert len(pick(window(*[1] * 100), now=0, limits=limits(texts=7))) == 7


def test_a_text_passed_over_for_too_long_comes_first_even_if_it_fits_badly() -> None:
    waiting = [Text(10), Text(10), Text(100, passed_at=1.0), Text(10)]
    assert pick(waiting, now=1.06, limits=limits(tokens=100)) == [2]
    assert pick(waiting, now=1.04, limits=limits(tokens=100)) == [0, 1, 3]


def test_of_several_passed_over_the_longest_waiting_leads() -> None:
    waiting = [Text(10), Text(50, passed_at=2.0), Text(60, passed_at=1.0)]
    assert pick(waiting, now=9, limits=limits(tokens=120)) == [2, 1]


@given(
    st.lists(st.tuples(st.integers(1, 600), st.sampled_from([math.inf, 0.0, 0.5, 0.99])), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(1, 600),
)
def test_a_batch_is_never_empty_never_repeats_and_keeps_both_limits(
    texts: list[tuple[int, float]], max_texts: int, max_tokens: int
) -> None:
    waiting = [Text(length, passed_at) for length, passed_at in texts]
    taken = pick(waiting, now=1.0, limits=limits(texts=max_texts, tokens=max_tokens))
    assert len(set(taken)) == len(taken) >= 1
    assert len(taken) <= max_texts
    assert len(taken) == 1 or max(waiting[i].length for i in taken) * len(taken) <= max_tokens


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_a_window_in_which_no_text_was_passed_over_always_serves_its_oldest_text(lengths: list[int]) -> None:
    assert 0 in pick(window(*lengths), now=0, limits=limits())


@pytest.mark.parametrize(("share", "expected"), [(0.2, 20), (0.5, 50), (0.0, 0), (1.0, 100), (0.1, 10)])
def test_bulk_keeps_its_share_of_batches_while_both_lanes_wait(share: float, expected: int) -> None:
    credit = 0.0
    bulk = 0
    for _ in range(100):
        lane, credit = choose_lane(interactive=True, bulk=True, credit=credit, bulk_share=share)
        bulk += lane is Lane.BULK
    assert bulk == expected


def test_a_lane_that_waits_alone_is_served_and_saves_up_nothing() -> None:
    assert choose_lane(interactive=False, bulk=True, credit=0.6, bulk_share=0.2) == (Lane.BULK, 0.0)
    assert choose_lane(interactive=True, bulk=False, credit=0.6, bulk_share=0.2) == (Lane.INTERACTIVE, 0.0)
