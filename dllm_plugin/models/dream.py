"""Dream and Fast-dLLM v2: structure of Qwen2.5 over the shared decoder.

Sources: Dream-org/Dream-v0-Instruct-7B:modeling_dream.py, Efficient-Large-Model/Fast_dLLM_v2_7B:modeling.py.
"""

from dllm_plugin.models.names import LLAMA
from dllm_plugin.models.transformer import DiffusionLM


class DreamForDiffusionLM(DiffusionLM):
    """Dream-v0, DiffuCoder, Dream-Coder, Fast-dLLM v2: Qwen2.5's layout.

    Biases on q, k and v, cos and sin rounded before rotating. The logits at position i predict token i + 1; the
    family says so, and the batch is built accordingly.
    """

    names = LLAMA
    qkv_bias = True
