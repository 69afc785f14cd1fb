"""LLaDA: structure and tensor names of GSAI-ML/LLaDA-8B-Instruct:modeling_llada.py over the shared decoder."""

from dllm_plugin.models.configs import LLaDAConfig
from dllm_plugin.models.transformer import DiffusionLM, Shape, WeightNames


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
            "ff_proj": ("gate_up_proj", 0),
            "up_proj": ("gate_up_proj", 1),
            "ff_out": ("down_proj", None),  # inside a block; outside of one, ff_out is the head
        },
        outside={
            "model.transformer.wte": "embedding",
            "model.transformer.ln_f": "norm",
            "model.transformer.ff_out": "head",
        },
    )

    @staticmethod
    def shape_of(config: LLaDAConfig) -> Shape:
        return Shape(
            hidden_size=config.d_model,
            num_layers=config.n_layers,
            num_heads=config.n_heads,
            num_kv_heads=config.n_kv_heads,
            intermediate_size=config.mlp_hidden_size,
            num_embeddings=config.embedding_size,
            norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            qkv_bias=False,
            tie_embeddings=config.weight_tying,
            rope_in_float32=True,
        )
