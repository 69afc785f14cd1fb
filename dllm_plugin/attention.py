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

from dllm_plugin.kernels.window_attention import full_attention


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """The windows of one step, ragged: tokens of window i are ``query_start_loc[i]`` to ``query_start_loc[i + 1]``.

    Every window covers all it can see (cache mode ``none``), so keys and values are the step's own and no page of the
    KV cache is read or written. ``query_start_loc``: int32 ``[windows + 1]`` on the device; ``_cpu`` the same on the
    host.
    """

    query_start_loc: torch.Tensor
    query_start_loc_cpu: list[int]
    max_query_len: int


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

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True


class DiffusionAttention(nn.Module, AttentionLayerBase):
    """Attention in which every query of a window sees every key the window's request makes visible.

    It registers itself under ``prefix`` in vLLM's forward context, which gives it pages of the KV cache.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_size: int, vllm_config: VllmConfig, prefix: str
    ) -> None:
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
        return full_attention(
            query,
            key,
            value,
            query_start_loc=batch.query_start_loc,
            query_start_loc_cpu=batch.query_start_loc_cpu,
            max_query_len=batch.max_query_len,
            scale=self.scale,
        )

    def get_attn_backend(self) -> type[AttentionBackend]:
        return DiffusionAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=vllm_config.model_config.dtype,
            # tells the engine core that no prefix of a sequence stands for itself
            non_causal=True,
        )
