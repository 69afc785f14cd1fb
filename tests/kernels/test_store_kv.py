"""store_kv writes exactly the given slots."""

import pytest
import torch

from dllm_plugin.kernels import split_kv_cache, store_kv


@pytest.mark.parametrize("tokens_outside", [True, False])
@pytest.mark.parametrize("head_size", [32, 80, 128])
@pytest.mark.parametrize("tokens", [1, 7, 63])
def test_writes_the_slots_and_nothing_else(implementation, tokens, head_size, tokens_outside):
    cache = torch.randn(6, 16, 3, 2 * head_size).transpose(1, 2)
    if not tokens_outside:
        cache = cache.contiguous()
    before = cache.clone()
    key, value = torch.randn(tokens, 8, head_size)[:, 2:8].split(3, 1)  # slices of one projection
    slots = torch.randperm(96)[:tokens]
    slots[::5] = -1
    store_kv(key, value, *split_kv_cache(cache, head_size), slots)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            before[slot // 16, :, slot % 16] = torch.cat((key[token], value[token]), 1)
    assert torch.equal(cache, before)


def test_casts_to_the_dtype_of_the_cache(implementation):
    cache = torch.zeros(2, 1, 16, 64, dtype=torch.float16)
    key = torch.randn(3, 1, 32)
    store_kv(key, -key, *split_kv_cache(cache, 32), torch.tensor([0, 17, 31]))
    assert torch.equal(cache[1, 0, 15, :32], key[2, 0].half()) and torch.equal(cache[0, 0, 0, 32:], -key[0, 0].half())


def test_empty(implementation):
    cache = torch.zeros(2, 1, 16, 64)
    store_kv(
        torch.zeros(0, 1, 32), torch.zeros(0, 1, 32), *split_kv_cache(cache, 32), torch.zeros(0, dtype=torch.int64)
    )
    assert not cache.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(3, 2, 32)}, "key and value must both be"),
        ({"slot_mapping": torch.zeros(4, dtype=torch.int64)}, r"slot_mapping must be int64 \[3\]"),
        ({"slot_mapping": torch.zeros(3, dtype=torch.int32)}, "slot_mapping must be int64"),
        ({"key_cache": torch.zeros(2, 16, 1, 64)[..., ::2]}, "contiguous last dimension"),
    ],
)
def test_refusals(change, message):
    keys, values = split_kv_cache(torch.zeros(2, 1, 16, 64), 32)
    arguments = {
        "key": torch.zeros(3, 1, 32), "value": torch.zeros(3, 1, 32), "key_cache": keys, "value_cache": values,
        "slot_mapping": torch.zeros(3, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        store_kv(**arguments | change)


def test_split_kv_cache_refuses_another_head_size():
    with pytest.raises(ValueError, match="for head_size 48"):
        split_kv_cache(torch.zeros(2, 1, 16, 64), 48)
