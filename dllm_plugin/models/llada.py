"""LLaDA: structure and tensor names of GSAI-ML/LLaDA-8B-Instruct:modeling_llada.py over the shared decoder."""

from dllm_plugin.models.names import WeightNames
from dllm_plugin.models.transformer import DiffusionLM


class LLaDAForDiffusionLM(DiffusionLM):
    """LLaDA-8B Base, Instruct, 1.5 and iLLaDA. No bias anywhere, RoPE in float32, logits predict their own position."""

    names = WeightNames(
        layer="model.transformer.blocks",
        in_layer={
            "attn_norm": ("input_norm", None),
            "q_proj": ("qkv_proj", "q"),
            "k_proj": ("qkv_proj", "k"),
            "v_proj": ("qkv_proj", "v"),
            "attn_out": ("o_proj", None),
            "ff_norm": ("post_attention_norm", None),
            "ff_proj": ("mlp.gate_up_proj", 0),
            "up_proj": ("mlp.gate_up_proj", 1),
            "ff_out": ("mlp.down_proj", None),  # inside a block; outside of one, ff_out is the head
        },
        outside={
            "model.transformer.wte": "embedding",
            "model.transformer.ln_f": "norm",
            "model.transformer.ff_out": "head",
        },
    )
    rope_in_float32 = True
