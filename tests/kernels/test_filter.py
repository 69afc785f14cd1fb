"""filter_top_k_top_p against Dream's sampling code, restated."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_plugin.kernels import filter as module
from dllm_plugin.kernels.filter import filter_top_k_top_p


def dream(logits, temperature, top_p, top_k):
    """sample_tokens of the public code for one row, up to the fill value."""
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None and top_p < 1:
        values, order = torch.sort(logits, descending=True)
        remove = torch.cumsum(values.softmax(-1), -1) > top_p
        remove[1:] = remove[:-1].clone()
        remove[0] = False
        logits = logits.masked_fill(torch.zeros_like(remove).scatter(0, order, remove), float("-inf"))
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], float("-inf"))
    return logits


@pytest.mark.parametrize("top_k", [None, 0, 1, 5, 500])
@pytest.mark.parametrize("top_p", [None, 0.0, 0.1, 0.7, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.0])
def test_like_dream(temperature, top_p, top_k):
    logits = torch.randn(6, 200) * 3
    row = torch.ones(6)
    got = filter_top_k_top_p(
        logits,
        row * temperature,
        None if top_k is None else torch.full((6,), top_k),
        None if top_p is None else row * top_p,
    )
    for r in range(6):
        assert torch.equal(got[r], dream(logits[r], temperature, top_p, top_k))


def sdar(logits, temperature, top_k, top_p):
    """sample_with_temperature_topk_topp of JetAstra/SDAR:generate.py for one row: top-k, then top-p of what it leaves."""
    if temperature > 0:
        logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], float("-inf"))
    if top_p < 1:
        values, order = torch.sort(logits, descending=True)
        remove = torch.cumsum(values.softmax(-1), -1) > top_p
        remove[1:] = remove[:-1].clone()
        remove[0] = False
        logits = logits.masked_fill(torch.zeros_like(remove).scatter(0, order, remove), float("-inf"))
    return logits


@pytest.mark.parametrize("top_k", [0, 1, 5, 500])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.7, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.0])
def test_top_k_first_like_sdar_beside_rows_like_dream(temperature, top_p, top_k):
    logits, row = torch.randn(6, 200) * 3, torch.ones(6)
    k_first = torch.tensor([True, False] * 3)
    got = filter_top_k_top_p(logits, row * temperature, torch.full((6,), top_k), row * top_p, k_first=k_first)
    for r in range(6):
        want = sdar(logits[r], temperature, top_k, top_p) if k_first[r] else dream(logits[r], temperature, top_p, top_k)
        assert torch.equal(got[r], want)


def test_top_k_first_leaves_less_mass_for_top_p():
    """0.4, 0.3, 0.2, 0.1: of the best two, 0.57 and 0.43, the first one has more than half; of all it has less."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(2, 4)
    two, half = torch.tensor([2, 2]), torch.tensor([0.5, 0.5])
    got = filter_top_k_top_p(logits, None, two, half, k_first=torch.tensor([True, False]))
    assert got.isfinite().sum(1).tolist() == [1, 2]


def test_rows_differ_and_input_stays():
    logits = torch.randn(3, 50)
    before = logits.clone()
    got = filter_top_k_top_p(
        logits, torch.tensor([0.0, 1.0, 0.5]), torch.tensor([2, 0, 50]), torch.tensor([1.0, 0.2, 1.0])
    )
    assert torch.equal(logits, before)
    assert got[0].isfinite().sum() == 2 and got[1].isfinite().sum() < 50
    assert torch.equal(got[2], logits[2] / 0.5)


def test_the_best_allowed_column_survives():
    logits = torch.tensor([[9.0, 1.0, 3.0, 2.0], [9.0, 8.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    no_choice = torch.tensor([[0, -1], [0, 1], [-1, -1]])
    got = filter_top_k_top_p(logits, None, torch.tensor([1, 1, 1]), torch.tensor([0.5, 1.0, 1.0]), no_choice=no_choice)
    kept = [row.isfinite().nonzero().squeeze(1).tolist() for row in got]
    assert kept == [[0, 2], [0, 2], [3]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_fp32(dtype):
    got = filter_top_k_top_p(torch.randn(2, 30).to(dtype), None, torch.tensor([3, 4]), None)
    assert got.dtype == torch.float32 and got.isfinite().sum(1).tolist() >= [3, 4]


def test_blocks_of_rows_change_nothing(monkeypatch, threads):
    logits = (torch.randn(7, 5000) * 3).to(torch.bfloat16)  # with ties
    no_choice = torch.stack((logits.float().argmax(1), torch.tensor([-1, 3, -1, 5000, 2**40, 7, -1])), 1)
    top_k, top_p = torch.tensor([0, 1, 5, 5000, 9000, 100, 0]), torch.tensor([0.5, 1.0, 0.9, 0.0, 0.99, 1.0, 1.0])
    arguments = logits, torch.linspace(0, 2, 7), top_k, top_p
    whole = filter_top_k_top_p(*arguments, no_choice=no_choice)
    k_first = torch.arange(7) % 2 == 0
    mixed = filter_top_k_top_p(*arguments, k_first=k_first, no_choice=no_choice)
    assert torch.equal(mixed[~k_first], whole[~k_first])
    for rows in (1, 3):
        monkeypatch.setattr(module, "_SCRATCH_BYTES", rows * 24 * 5000)
        assert torch.equal(filter_top_k_top_p(*arguments, no_choice=no_choice), whole)
        assert torch.equal(filter_top_k_top_p(*arguments, k_first=k_first, no_choice=no_choice), mixed)


@settings(max_examples=100)
@given(data=st.data())
def test_rows_that_ask_for_nothing_beside_those_that_do(data):
    """In blocks where none, one or all ask for a filter, and in no rows at all. Every number keeps its bits."""
    rows, vocab = data.draw(st.integers(0, 7)), data.draw(st.sampled_from([1, 2, 9, 331]))
    logits = (torch.randn(rows, vocab) * 4).to(torch.bfloat16)  # with ties

    def drawn(name, *values, dtype):
        column = torch.tensor(
            data.draw(st.lists(st.sampled_from(values), min_size=rows, max_size=rows), name), dtype=dtype
        )
        return column if data.draw(st.booleans(), name) else None

    temperature = drawn("temperature", 0.0, 0.3, 2.0, dtype=torch.float32)
    top_k = drawn("top_k", 0, 1, 5, 400, dtype=torch.int64)
    top_p = drawn("top_p", 1.0, 0.9, 0.3, 0.0, dtype=torch.float32)
    no_choice = drawn("no_choice", -1, 0, 400, dtype=torch.int64)
    if no_choice is not None:
        no_choice = torch.stack((no_choice, logits.float().argmax(1)), 1)
    arguments = (logits, temperature, top_k, top_p)
    whole = filter_top_k_top_p(*arguments, no_choice=no_choice)
    for size in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_SCRATCH_BYTES", size * 24 * vocab)
            assert torch.equal(filter_top_k_top_p(*arguments, no_choice=no_choice), whole)
    asked = torch.zeros(rows, dtype=torch.bool)
    asked |= False if top_k is None else top_k > 0
    asked |= False if top_p is None else top_p < 1
    scale = 1.0 if temperature is None else torch.where(temperature > 0, temperature, 1.0)[:, None]
    assert torch.equal(whole[~asked], (logits.float() / scale)[~asked])


@pytest.mark.parametrize(("rows", "vocab"), [(20, 126_464), (40_000, 50)])
def test_scratch_does_not_grow_with_the_rows(rows, vocab):
    logits, row = torch.randn(rows, vocab), torch.ones(rows)
    no_choice = torch.zeros(rows, 1, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True) as profile:
        filter_top_k_top_p(logits, row, row.long() * 5, row * 0.9, no_choice=no_choice)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    assert logits.nbytes < peak < logits.nbytes + 8_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4)}, r"logits must be floating \[rows, vocab\]"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, "logits must be floating .* got torch.int64"),
        ({"logits": torch.zeros(3, 0)}, "at least one column"),
        ({"temperature": torch.ones(1)}, r"temperature must be floating \[3\], got torch.float32 \[1\]"),
        ({"temperature": torch.ones(3, dtype=torch.int64)}, "temperature must be floating"),
        ({"top_k": torch.ones(3)}, "top_k must be integer"),
        ({"top_k": torch.ones(3, dtype=torch.bool)}, "top_k must be integer"),
        ({"top_p": torch.ones(3, 1)}, "top_p must be floating"),
        ({"no_choice": torch.zeros(2, 1, dtype=torch.int64)}, r"no_choice must be int64 \[3, n\]"),
        ({"top_p": torch.ones(3, device="meta")}, r"logits on 'cpu' and top_p on 'meta'; pass top_p.to\('cpu'\)"),
        ({"no_choice": torch.zeros(3, 1, dtype=torch.int64, device="meta")}, "no_choice on 'meta'"),
    ],
)
def test_refusals(change, message):
    arguments = {"logits": torch.zeros(3, 4), "temperature": None, "top_k": None, "top_p": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        filter_top_k_top_p(**arguments | change)
