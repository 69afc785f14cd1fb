"""filter_top_k_top_p against Dream's sampling code, restated."""

import pytest
import torch

from dllm_plugin.kernels import filter_top_k_top_p


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
