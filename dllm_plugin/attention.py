"""Bidirectional attention over the windows of a step: one layer module, one batch description, our kernels."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from dllm_plugin.kernels.store_kv import split_kv_cache, store_kv
from dllm_plugin.kernels.window_attention import PagedWindows, Windows, full_attention, window_attention
from dllm_plugin.settings import model_config_of, settings_of

COPIED_PAGE = 16  # positions in a page of a copy, as few as kernels take


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """The windows of one step, ragged and end to end: full ones up to token ``num_full_tokens``, then paged ones.

    Tokens from ``first_stored`` on write their keys and values to ``slot_mapping`` ``[tokens - first_stored]`` int64,
    in each layer before its attention, so that a window sees all of its own.
    ``copied`` ``[n]`` int64: nothing is kept. Pages are copies of so many positions of the cache each, numbered through it,
    and it is these that windows and slots are of.
    """

    num_full_tokens: int
    full: Windows | None
    paged: PagedWindows | None = None
    first_stored: int = 0
    slot_mapping: torch.Tensor | None = None
    copied: torch.Tensor | None = None


class DiffusionAttentionBackend(AttentionBackend):
    """What vLLM's memory manager asks of an attention layer; the layer calls its kernels itself."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("DiffusionAttention is not built on vLLM's Attention layer")

    @staticmethod
    def get_builder_cls() -> Any:
        raise NotImplementedError("DiffusionAttention reads WindowBatch, not attention metadata")

    @staticmethod
    def get_supported_kernel_block_sizes(*_: Any) -> list[int | MultipleOf]:
        return [MultipleOf(16)]


class DiffusionAttention(nn.Module, AttentionLayerBase):
    """Attention in which a query sees what its window makes visible, before and behind it.

    It registers itself under ``prefix`` in vLLM's forward context, which gives it pages of the KV cache.
    """

    key_cache: torch.Tensor  # [pages, page_size, num_kv_heads, head_size], and the values', from `bind_kv_cache` on
    value_cache: torch.Tensor

    def __init__(self, num_heads: int, num_kv_heads: int, head_size: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = head_size**-0.5
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two attention layers are named {prefix}")
        layers[prefix] = self

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Output ``[tokens, num_heads, head_size]`` for rotated query, key and value of the same ragged layout."""
        batch = get_forward_context().attn_metadata
        assert isinstance(batch, WindowBatch)
        # a step that profiles memory runs before there are any
        key_cache, value_cache = getattr(self, "key_cache", None), getattr(self, "value_cache", None)
        if batch.copied is not None:
            key_cache, value_cache = copy_pages(key_cache, batch.copied), copy_pages(value_cache, batch.copied)
        if batch.slot_mapping is not None:
            stored = slice(batch.first_stored, None)
            store_kv(key[stored], value[stored], key_cache, value_cache, batch.slot_mapping)
        if batch.paged is None:
            assert batch.full is not None  # a step has windows
            return full_attention(query, key, value, batch.full, self.scale)
        out = torch.empty_like(query)
        num_full = batch.num_full_tokens
        if batch.full is not None:
            full_attention(query[:num_full], key[:num_full], value[:num_full], batch.full, self.scale, out[:num_full])
        window_attention(query[num_full:], key_cache, value_cache, batch.paged, self.scale, out[num_full:])
        return out

    def bind_kv_cache(self, kv_cache: torch.Tensor | None) -> None:
        """Take this layer's pages, logically ``[pages, num_kv_heads, page_size, 2 * head_size]`` in vLLM, or give them up."""
        if kv_cache is None:
            self.key_cache = self.value_cache = None  # type: ignore[assignment]  # no step runs any more
        else:
            self.key_cache, self.value_cache = split_kv_cache(kv_cache, self.head_size)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return DiffusionAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=model_config_of(vllm_config).dtype,
            # tells the engine core that no prefix of a sequence stands for itself
            non_causal=not settings_of(vllm_config).family.prefix_stands_alone,
        )


def copy_pages(cache: torch.Tensor, copied: torch.Tensor) -> torch.Tensor:
    """``[n, COPIED_PAGE, heads, head_size]`` of ``cache [pages, page_size, heads, head_size]``."""
    in_page = cache.shape[1] // COPIED_PAGE
    return cache.unflatten(1, (in_page, COPIED_PAGE))[copied // in_page, copied % in_page]
