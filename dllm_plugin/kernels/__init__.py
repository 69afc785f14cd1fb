"""The operations of a denoising step: norms, rotation, activation, attention over windows, confidence of tokens, unmasking.

Each file holds one operation: its contract, a torch reference, a Triton kernel and the wrapper that picks one of the two.
Imports torch and triton only.
"""

from dllm_plugin.kernels.confidence import Confidence, confidence
from dllm_plugin.kernels.filter import filter_top_k_top_p
from dllm_plugin.kernels.gated_silu import gated_silu
from dllm_plugin.kernels.philox import gumbel, random_bits, uniform
from dllm_plugin.kernels.rms_norm import rms_norm
from dllm_plugin.kernels.rotary import rotate
from dllm_plugin.kernels.shard_statistics import merge_statistics, shard_entropy, shard_statistics
from dllm_plugin.kernels.store_kv import split_kv_cache, store_kv
from dllm_plugin.kernels.unmask import Unmasked, unmask
from dllm_plugin.kernels.window_attention import full_attention, window_attention

__all__ = [
    "Confidence",
    "Unmasked",
    "confidence",
    "filter_top_k_top_p",
    "full_attention",
    "gated_silu",
    "gumbel",
    "merge_statistics",
    "random_bits",
    "rms_norm",
    "rotate",
    "shard_entropy",
    "shard_statistics",
    "split_kv_cache",
    "store_kv",
    "uniform",
    "unmask",
    "window_attention",
]
