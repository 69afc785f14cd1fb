"""Stable-DiffCoder: structure of ByteDance-Seed/Stable-DiffCoder-8B-Instruct:modeling_stable_diffcoder.py."""

from dllm_plugin.models.names import LLAMA
from dllm_plugin.models.transformer import DiffusionLM


class StableDiffCoderForDiffusionLM(DiffusionLM):
    """Stable-DiffCoder-8B: Llama's layout as it is."""

    names = LLAMA
