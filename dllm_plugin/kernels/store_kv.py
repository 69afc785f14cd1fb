"""Writes the keys and values of a step into their pages of the KV cache.

`slot_mapping[token]` is `page * page_size + offset`. Values are stored in the dtype of the cache. Two tokens must not
share a slot. A page holds a multiple of 16 tokens, as vLLM's do. Rule and kernel agree exactly.
"""

import torch
from torch import Tensor

from dllm_plugin.kernels.dispatch import refuse, refuse_devices, tl, triton, use_triton


def split_kv_cache(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """Key and value views [num_pages, page_size, num_kv_heads, head_size] of one layer's cache as vLLM shapes it.

    `kv_cache` is [num_pages, num_kv_heads, page_size, 2 * head_size] with any strides over a contiguous last dimension.
    """
    if kv_cache.dim() != 4 or kv_cache.shape[-1] != 2 * head_size:
        must = f"kv_cache must be [num_pages, num_kv_heads, page_size, {2 * head_size}] for head_size {head_size}"
        refuse(must, {"kv_cache": kv_cache})
    paged = kv_cache.transpose(1, 2)
    return paged[..., :head_size], paged[..., head_size:]


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Stores `key` and `value` [tokens, num_kv_heads, head_size] at `slot_mapping` [tokens] int64, in place.

    `key`, `value`, and `key_cache` and `value_cache` [num_pages, page_size, num_kv_heads, head_size] may have any strides over
    a contiguous last dimension.
    """
    device = key.device
    if not (device == value.device == key_cache.device == value_cache.device == slot_mapping.device):
        refuse_devices(key=key, value=value, key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping)
    check_cache(key_cache)
    if key.shape != value.shape or key.dim() != 3 or key.shape[1:] != key_cache.shape[2:]:
        must = f"key and value must both be [tokens, {key_cache.shape[2]}, {key_cache.shape[3]}] to fit the cache"
        refuse(must, {"key": key, "value": value})
    if key.stride(-1) != 1 or value.stride(-1) != 1:
        raise ValueError(
            f"key and value need a contiguous last dimension, got strides {key.stride()} and {value.stride()}; "
            "pass .contiguous() of the one that has not"
        )
    if key_cache.shape != value_cache.shape or key_cache.stride(-1) != 1 or value_cache.stride(-1) != 1:
        must = "key_cache and value_cache must have one shape and a contiguous last dimension"
        refuse(must, {"key_cache": key_cache, "value_cache": value_cache}, remedy="take both from split_kv_cache")
    if slot_mapping.shape != key.shape[:1] or slot_mapping.dtype != torch.int64:
        refuse(f"slot_mapping must be int64 [{key.shape[0]}]", {"slot_mapping": slot_mapping})
    run = store_kv_triton if use_triton(device.type) else store_kv_rule
    run(key, value, key_cache, value_cache, slot_mapping)


def check_cache(key_cache: Tensor) -> None:
    if key_cache.dim() != 4:
        raise ValueError(
            f"key_cache must be [num_pages, page_size, num_kv_heads, head_size], got {list(key_cache.shape)}; take it from "
            "split_kv_cache"
        )
    page_size = key_cache.shape[1]
    if page_size % 16 or not page_size:
        raise ValueError(f"page_size must be a multiple of 16, got {page_size}; set vLLM's block_size to 16 or 32")


def store_kv_rule(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    page_size = key_cache.shape[1]
    page, offset = slot_mapping // page_size, slot_mapping % page_size
    key_cache[page, offset] = key.to(key_cache.dtype)
    value_cache[page, offset] = value.to(value_cache.dtype)


def store_kv_triton(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    tokens, num_kv_heads, head_size = key.shape
    if tokens:
        _store_kv_kernel[(tokens,)](
            key, value, key_cache, value_cache, slot_mapping,
            *key.stride()[:2], *value.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3],
            slot_mapping.stride(0), key_cache.shape[1], num_kv_heads, head_size, triton.next_power_of_2(num_kv_heads * head_size),
        )  # fmt: skip


@triton.jit
def _store_kv_kernel(
    key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, slot_mapping_ptr,
    key_stride_token, key_stride_head, value_stride_token, value_stride_head,
    key_cache_stride_page, key_cache_stride_token, key_cache_stride_head,
    value_cache_stride_page, value_cache_stride_token, value_cache_stride_head,
    slot_stride, page_size,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a program."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token * slot_stride)
    page, offset = slot // page_size, slot % page_size
    item = tl.arange(0, BLOCK)
    head, dim = item // HEAD_SIZE, item % HEAD_SIZE
    inside = head < NUM_KV_HEADS
    k = tl.load(key_ptr + token * key_stride_token + head * key_stride_head + dim, mask=inside)
    v = tl.load(value_ptr + token * value_stride_token + head * value_stride_head + dim, mask=inside)
    k_cell = page * key_cache_stride_page + offset * key_cache_stride_token + head * key_cache_stride_head + dim
    v_cell = page * value_cache_stride_page + offset * value_cache_stride_token + head * value_cache_stride_head + dim
    tl.store(key_cache_ptr + k_cell, k.to(key_cache_ptr.dtype.element_ty), mask=inside)
    tl.store(value_cache_ptr + v_cell, v.to(value_cache_ptr.dtype.element_ty), mask=inside)
