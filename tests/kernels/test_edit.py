"""`edit` against its contract, cell by cell."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_plugin.kernels.edit import Rows, edit

INFINITY, NAN = float("inf"), float("nan")


def rule(tokens, rows, threshold):
    """The contract, a row at a time; the canvas afterwards and the number of replaced tokens in each segment."""
    tokens, counts = tokens.clone(), [0] * len(threshold)
    for cell, is_open, segment, token, probability in zip(
        rows.cell.tolist(),
        rows.is_open.tolist(),
        rows.segment.tolist(),
        rows.token.tolist(),
        rows.probability,
        strict=True,
    ):
        if is_open and probability > threshold[segment] and token != tokens.view(-1)[cell]:
            tokens.view(-1)[cell] = token
            counts[segment] += 1
    return tokens, counts


def rows_of(cell, is_open, segment, token, probability, integer=torch.int64):
    return Rows(
        torch.tensor(cell, dtype=torch.int64),
        torch.tensor(is_open, dtype=torch.bool),
        torch.tensor(segment, dtype=torch.int64),
        torch.tensor(token, dtype=integer),
        torch.tensor(probability, dtype=torch.float32),
    )


@pytest.mark.parametrize(
    ("is_open", "token", "probability", "threshold", "edited"),
    [
        pytest.param(True, 8, 0.9, 0.5, True, id="another token"),
        pytest.param(True, 7, 0.9, 0.5, False, id="the same token"),
        pytest.param(False, 8, 0.9, 0.5, False, id="masked or given"),
        pytest.param(True, 8, 0.5, 0.5, False, id="a threshold is passed by what is greater"),
        pytest.param(True, 8, 0.0, 0.0, False, id="zero by zero"),
        pytest.param(True, 8, 1e-30, 0.0, True, id="anything by zero"),
        pytest.param(True, 8, 1.0, INFINITY, False, id="off"),
        pytest.param(True, 8, 1.0, 1.0, False, id="never above one"),
        pytest.param(True, 8, NAN, 0.0, False, id="no probability"),
    ],
)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_one_row(is_open, token, probability, threshold, edited, integer):
    tokens = torch.full((2, 4), 7, dtype=integer)
    count = edit(tokens, rows_of([6], [is_open], [0], [token], [probability]), torch.tensor([threshold]))
    assert count.tolist() == [edited] and count.dtype == torch.int32
    assert tokens.tolist() == [[7] * 4, [7, 7, token if edited else 7, 7]] and tokens.dtype == integer


def test_segments_have_thresholds_and_counts_of_their_own():
    tokens = torch.arange(12).view(2, 6)
    rows = rows_of([0, 1, 4, 7, 8], [True] * 5, [0, 0, 2, 3, 3], [50, 51, 52, 53, 54], [0.6] * 5)
    count = edit(tokens, rows, torch.tensor([0.5, 0.1, 0.7, 0.0]))
    assert count.tolist() == [2, 0, 0, 2]
    assert tokens.tolist() == [[50, 51, 2, 3, 4, 5], [6, 53, 54, 9, 10, 11]]


@pytest.mark.parametrize("segments", [0, 3])
def test_no_rows(segments):
    tokens = torch.arange(4).view(1, 4)
    assert edit(tokens, rows_of([], [], [], [], []), torch.zeros(segments)).tolist() == [0] * segments
    assert tokens.tolist() == [[0, 1, 2, 3]]


@given(data=st.data())
def test_like_the_rule(data):
    segments, canvas = data.draw(st.integers(1, 4)), 24
    cells = data.draw(st.lists(st.integers(0, 2 * canvas - 1), unique=True, max_size=20).map(sorted))

    def column(values):
        return data.draw(st.lists(values, min_size=len(cells), max_size=len(cells)))

    probability = st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0, NAN])
    rows = rows_of(
        cells, column(st.booleans()), sorted(column(st.integers(0, segments - 1))), column(st.integers(0, 3)),
        column(probability),
    )  # fmt: skip
    threshold = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.6, INFINITY]), min_size=segments, max_size=segments))
    )
    tokens = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=2 * canvas, max_size=2 * canvas))).view(
        2, canvas
    )
    want, counts = rule(tokens, rows, threshold)
    assert edit(tokens, rows, threshold).tolist() == counts
    assert torch.equal(tokens, want)
