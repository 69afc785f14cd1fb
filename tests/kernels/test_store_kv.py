"""store_kv writes exactly the given slots."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_plugin.kernels.store_kv import split_kv_cache, store_kv, store_kv_rule, store_kv_triton


@pytest.mark.parametrize("tokens_outside", [True, False])
@pytest.mark.parametrize("head_size", [32, 80, 128])
@pytest.mark.parametrize("tokens", [1, 7, 63, 1000])
def test_writes_the_slots_and_nothing_else(implementation, tokens, head_size, tokens_outside):
    cache = torch.randn(63, 16, 3, 2 * head_size).transpose(1, 2)
    if not tokens_outside:
        cache = cache.contiguous()
    before = cache.clone()
    key, value = torch.randn(tokens, 8, head_size)[:, 2:8].split(3, 1)  # slices of one projection
    slots = torch.randperm(63 * 16)[:tokens]
    store_kv(key, value, *split_kv_cache(cache, head_size), slots)
    for token, slot in enumerate(slots.tolist()):
        before[slot // 16, :, slot % 16] = torch.cat((key[token], value[token]), 1)
    assert torch.equal(cache, before)


def test_casts_to_the_dtype_of_the_cache(implementation):
    cache = torch.zeros(2, 1, 16, 64, dtype=torch.float16)
    key = torch.randn(3, 1, 32)
    store_kv(key, -key, *split_kv_cache(cache, 32), torch.tensor([0, 17, 31]))
    assert torch.equal(cache[1, 0, 15, :32], key[2, 0].half()) and torch.equal(cache[0, 0, 0, 32:], -key[0, 0].half())


def test_strided_slots(implementation):
    cache, key = torch.zeros(2, 1, 16, 64), torch.randn(3, 1, 32)
    store_kv(key, -key, *split_kv_cache(cache, 32), torch.tensor([[5, 0], [31, 1], [20, 2]])[:, 0])
    want = torch.zeros_like(cache)
    want[0, 0, 5], want[1, 0, 15], want[1, 0, 4] = torch.cat((key, -key), 2)[:, 0]
    assert torch.equal(cache, want)


@given(st.data())
def test_kernel_agrees_with_the_rule(data):
    pages, page_size, heads = (
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([16, 48])),
        data.draw(st.integers(1, 3)),
    )
    head_size, dtype = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([torch.float32, torch.float16]))
    slots = data.draw(st.lists(st.integers(0, pages * page_size - 1), max_size=20, unique=True))
    slots = torch.tensor(slots, dtype=torch.int64)
    key, value = torch.randn(2, len(slots), heads + 1, head_size)[:, :, 1:]
    before = torch.randn(pages, page_size, heads, 2 * head_size).to(dtype).transpose(1, 2)
    caches = [before.clone(), before.clone()]
    for run, cache in zip((store_kv_rule, store_kv_triton), caches, strict=True):
        run(key, value, *split_kv_cache(cache, head_size), slots)
    assert torch.equal(*caches)
    rows = caches[0].transpose(1, 2).flatten(0, 1)
    assert torch.equal(rows[slots], torch.cat((key, value), 2).to(dtype))
    rows[slots] = before.transpose(1, 2).flatten(0, 1)[slots]
    assert torch.equal(rows, before.transpose(1, 2).flatten(0, 1))


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
        ({"key_cache": torch.zeros(32, 1, 32)}, r"key_cache must be \[num_pages, page_size, .* got \[32, 1, 32\]"),
        ({"key_cache": torch.zeros(2)}, "take it from split_kv_cache"),
        ({"key_cache": torch.zeros(2, 24, 1, 32)}, "page_size must be a multiple of 16, got 24"),
        ({"key_cache": torch.zeros(2, 0, 1, 32)}, "page_size must be a multiple of 16, got 0"),
        ({"key": torch.zeros(3, 1, 64)[..., ::2]}, r"key and value need .* got strides \(64, 64, 2\)"),
        ({"value": torch.zeros(3, 1, 64)[..., ::2]}, "pass .contiguous"),
        ({"value": torch.zeros(3, 1, 32, device="meta")}, r"key on 'cpu' and value on 'meta'; pass value.to\('cpu'\)"),
        ({"slot_mapping": torch.zeros(3, dtype=torch.int64, device="meta")}, "slot_mapping on 'meta'"),
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
