"""Statistics of vocabulary shards merge to those of the whole row."""

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_plugin.kernels import confidence, merge_statistics, shard_entropy, shard_statistics

MODULE = sys.modules[shard_statistics.__module__]


@pytest.mark.parametrize("bounds", [(0, 500, 1000), (0, 1, 3, 998, 1000), (0, 250, 500, 750, 1000), (0, 1000)], ids=str)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_merge(implementation, bounds, sampled):
    logits = (torch.randn(12, 1000) * 3).to(torch.bfloat16)
    logits[0], logits[1, :500], logits[2, 500:] = 0.0, float("-inf"), float("-inf")
    top = logits.float().topk(2, 1).indices
    row = torch.arange(12)
    mass = {"no_mass": torch.where(row % 3 == 0, top[:, 1], -1)[:, None]}
    options = {"no_choice": torch.stack((top[:, 0], -torch.ones_like(row)), 1)}
    if sampled:
        mass |= {"temperature": torch.where(row % 2 == 0, 0.7, 0.0), "tempered": row % 4 == 0}
        options |= {"seed": row * 10**10, "position": row, "step": row}
    whole = confidence(logits, **mass, **options, log_probability=True, margin=True, entropy=True)

    shards = [(first, logits[:, first:last]) for first, last in pairwise(bounds)]
    statistics = torch.stack(
        [shard_statistics(shard, vocab_start=first, **mass, **options, margin=True) for first, shard in shards]
    )
    assert statistics.shape == (len(shards), 12, 8)
    merged = merge_statistics(statistics, log_probability=True, margin=True)
    entropy = sum(shard_entropy(shard, statistics, vocab_start=first, **mass) for first, shard in shards)
    assert torch.equal(merged.token, whole.token)
    for name, value in (("probability", merged.probability), ("log_probability", merged.log_probability),
                        ("margin", merged.margin), ("entropy", entropy)):  # fmt: skip
        torch.testing.assert_close(value, getattr(whole, name), rtol=1e-5, atol=1e-5, msg=name)


@given(st.data())
def test_kernel_agrees_with_reference_on_any_shards(data):
    rows, vocab = data.draw(st.integers(0, 3)), data.draw(st.integers(4, 60))
    logits = torch.randn(rows, vocab).to(torch.bfloat16) * data.draw(st.sampled_from([1, 8]))  # bf16: ties are common
    bounds = sorted({0, vocab, *data.draw(st.lists(st.integers(1, vocab - 1), max_size=3))})
    banned = st.lists(st.integers(-1, vocab - 1), min_size=2, max_size=2)
    no_choice, no_mass = (
        torch.tensor([data.draw(banned) for _ in range(rows)], dtype=torch.int64).view(rows, 2) for _ in range(2)
    )
    mass, options, row = {"no_mass": no_mass}, {"no_choice": no_choice}, torch.arange(rows)
    if data.draw(st.booleans()):
        temperature = torch.tensor([data.draw(st.sampled_from([0.0, 0.7])) for _ in range(rows)])
        mass |= {"temperature": temperature, "tempered": row % 2 == 0}
        options |= {"seed": row + 10**11, "position": row, "step": row}
    whole = confidence(logits, **mass, **options, log_probability=True, margin=True, entropy=True)
    shards = [(first, logits[:, first:last]) for first, last in pairwise(bounds)]
    for implementation in ("torch", "triton"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MODULE, "use_triton", lambda _, i=implementation: i == "triton")
            statistics = torch.stack(
                [shard_statistics(shard, vocab_start=first, **mass, **options, margin=True) for first, shard in shards]
            )
            entropy = sum(shard_entropy(shard, statistics, vocab_start=first, **mass) for first, shard in shards)
        merged = merge_statistics(statistics, log_probability=True, margin=True)
        assert torch.equal(merged.token, whole.token)
        for name, value in (("probability", merged.probability), ("log_probability", merged.log_probability),
                            ("margin", merged.margin), ("entropy", entropy)):  # fmt: skip
            torch.testing.assert_close(value, getattr(whole, name), rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


@given(data=st.data())
def test_pieces_of_rows_change_nothing(data):
    """Whichever rows ask for something. Every number keeps its bits."""
    rows, vocab, first = data.draw(st.integers(0, 7)), data.draw(st.sampled_from([2, 9, 40, 333])), 5
    logits = (torch.randn(rows, vocab) * 4).to(torch.bfloat16)
    best, row = logits.float().argmax(1), torch.arange(rows)

    def asked():
        return torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), dtype=torch.bool)

    mass = {"no_mass": torch.where(asked(), best + first, -1)[:, None]}
    options = {"no_choice": torch.stack((torch.where(asked(), best + first, 0), row * 0 + 7), 1)}
    if data.draw(st.booleans()):
        mass |= {"temperature": torch.where(asked(), 0.7, 0.0), "tempered": asked()}
        options |= {"seed": row * 10**10, "position": row, "step": row}

    def run():
        statistics = shard_statistics(logits, vocab_start=first, **mass, **options, margin=True)
        return statistics, shard_entropy(logits, statistics[None], vocab_start=first, **mass)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "use_triton", lambda _: False)
        whole = run()
        for size in (1, 2, 3):
            patch.setattr(MODULE, "rows_per_block", lambda _, size=size: size)
            for got, want in zip(run(), whole, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=f"{size} rows")


def test_a_row_has_the_same_bits_in_any_piece(monkeypatch, threads):
    monkeypatch.setattr(MODULE, "use_triton", lambda _: False)
    logits = torch.randn(7, 40_001) * 3
    results = []
    for size in (7, 3, 1):
        monkeypatch.setattr(MODULE, "rows_per_block", lambda _, size=size: size)
        statistics = shard_statistics(logits, vocab_start=0)
        results.append(torch.cat((statistics, shard_entropy(logits, statistics[None], vocab_start=0)[:, None]), 1))
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])


def test_a_tie_across_shards_takes_the_lowest_index(implementation):
    statistics = torch.stack([shard_statistics(torch.zeros(3, 40), vocab_start=40 * n) for n in range(3)])
    assert merge_statistics(statistics).token.tolist() == [0, 0, 0]


def test_empty_batch(implementation):
    statistics = shard_statistics(torch.zeros(0, 40), vocab_start=0)[None]
    assert merge_statistics(statistics).token.shape == (0,)
    assert shard_entropy(torch.zeros(0, 40), statistics, vocab_start=0).shape == (0,)


def test_refuses_columns_that_fp32_cannot_name():
    with pytest.raises(ValueError, match="gather the logits"):
        shard_statistics(torch.zeros(1, 8), vocab_start=2**24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistics": torch.zeros(2, 3, 7)}, r"statistics must be float32 \[shards, 3, 8\]"),
        ({"statistics": torch.zeros(3, 8)}, "those of all ranks stacked"),
        ({"statistics": torch.zeros(2, 3, 8, device="meta")}, "logits on 'cpu' and statistics on 'meta'"),
        ({"no_mass": torch.zeros(3, 1)}, "no_mass must be int64"),
        ({"tempered": torch.ones(3, dtype=torch.bool)}, "pass temperature too"),
    ],
)
def test_shard_entropy_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        shard_entropy(**{"logits": torch.zeros(3, 4), "statistics": torch.zeros(2, 3, 8), "vocab_start": 0, **change})
