"""SDAR: structure of yjyddq/DARE:models/SDAR-4B-Chat/modeling_sdar.py over the shared decoder."""

from dllm_plugin.models.names import LLAMA
from dllm_plugin.models.transformer import DiffusionLM


class SDARForDiffusionLM(DiffusionLM):
    """SDAR-Chat and TraDo: Qwen3's layout. Norms of heads, no bias, logits predict their own position."""

    names = LLAMA
    qk_norm = True
