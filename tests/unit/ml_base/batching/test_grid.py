from __future__ import annotations

from dataclasses import dataclass

from hypothesis import example, given
from hypothesis import strategies as st

from ml_base.batching.batches import BatchLimits, Grid, pick

MAX_TOKENS = st.integers(1, 9000)


@dataclass
class Text:
    length: int
    passed_at: float = float("inf")


@given(MAX_TOKENS, st.data())
def test_a_text_fits_what_it_is_padded_to_and_the_model_reads_that(max_tokens: int, data: st.DataObject) -> None:
    grid = Grid.up_to(max_tokens)
    tokens = data.draw(st.integers(1, max_tokens))
    assert tokens <= grid.length(tokens) <= max_tokens
    assert grid.length(grid.length(tokens)) == grid.length(tokens)


@given(MAX_TOKENS)
def test_the_longest_text_is_padded_to_nothing_longer(max_tokens: int) -> None:
    lengths = Grid.up_to(max_tokens).lengths
    assert lengths[-1] == max_tokens
    assert list(lengths) == sorted(set(lengths))


@given(st.integers(1, 9000))
def test_padding_is_at_most_a_quarter_of_a_text_that_is_not_short(tokens: int) -> None:
    assert Grid.up_to(9000).length(tokens) - tokens <= max(7, tokens / 4)


@given(st.integers(8, 24))
def test_a_question_is_padded_by_three_tokens_at_most(tokens: int) -> None:
    assert Grid.up_to(512).length(tokens) - tokens <= 3


@given(st.integers(1, 5000))
def test_rows_are_padded_by_at_most_a_quarter_and_a_few_not_at_all(rows: int) -> None:
    padded = Grid.up_to(512).rows(rows)
    assert rows <= padded <= (rows if rows <= 8 else rows * 5 / 4)
    assert Grid.up_to(512).rows(padded) == padded


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 512), st.integers(1, 512))
def test_more_is_never_padded_to_less(rows: int, more_rows: int, tokens: int, more_tokens: int) -> None:
    grid = Grid.up_to(512)
    assert grid.rows(rows) <= grid.rows(rows + more_rows)
    assert grid.length(tokens) <= grid.length(min(512, tokens + more_tokens))
    assert grid.tokens(rows, tokens) == grid.rows(rows) * grid.length(tokens) >= rows * tokens


@given(
    st.integers(1, 600),
    st.lists(st.integers(1, 600), min_size=1, max_size=90),
    st.integers(1, 4000),
    st.integers(1, 80),
)
@example(64, [8] * 9, 4000, 9)  # nine texts are computed as ten rows
def test_every_batch_that_is_cut_has_a_shape_that_was_warmed(
    longest: int, lengths: list[int], max_tokens: int, max_texts: int
) -> None:
    grid = Grid.up_to(longest)
    window = [Text(grid.length(min(length, longest))) for length in lengths]
    taken = pick(window, now=0, limits=BatchLimits(max_texts, max_tokens, patience_s=1, grid=grid))
    shape = grid.rows(len(taken)), max(window[position].length for position in taken)
    assert shape in grid.shapes(max_tokens, max_texts)


def test_the_shapes_of_a_model_of_common_length_are_few() -> None:
    assert len(Grid.up_to(512).shapes(256, 64)) < 120


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_without_lengths_nothing_is_padded(rows: int, tokens: int) -> None:
    assert (Grid().rows(rows), Grid().length(tokens), Grid().shapes(256, 64)) == (rows, tokens, [])
