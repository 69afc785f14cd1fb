"""Dream: structure of Dream-org/Dream-v0-Instruct-7B:modeling_dream.py over the shared decoder."""

from dllm_plugin.models.names import LLAMA
from dllm_plugin.models.transformer import DiffusionLM


class DreamForDiffusionLM(DiffusionLM):
    """Dream-v0, DiffuCoder, Dream-Coder: Qwen2.5's layout. Biases on q, k and v, cos and sin rounded before rotating.

    The logits at position i predict token i + 1; the family says so, and the batch is built accordingly.
    """

    names = LLAMA
    qkv_bias = True
