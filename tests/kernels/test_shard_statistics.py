"""Statistics of vocabulary shards merge to those of the whole row."""

from itertools import pairwise

import pytest
import torch

from dllm_plugin.kernels import confidence, merge_statistics, shard_entropy, shard_statistics


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
