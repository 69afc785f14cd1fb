"""Dream: structure and tensor names of Dream-org/Dream-v0-Instruct-7B:modeling_dream.py over the shared decoder."""

from dllm_plugin.models.configs import DreamConfig
from dllm_plugin.models.transformer import DiffusionLM, Shape, WeightNames


class DreamForDiffusionLM(DiffusionLM):
    """Dream-v0, DiffuCoder, Dream-Coder: Qwen2.5's layout. Biases on q, k and v, cos and sin rounded before rotating.

    The logits at position i predict token i + 1; the family says so, and the batch is built accordingly.
    """

    names = WeightNames(
        layer="model.layers",
        in_layer={
            "input_layernorm": ("input_norm", None),
            "self_attn.q_proj": ("qkv_proj", "q"),
            "self_attn.k_proj": ("qkv_proj", "k"),
            "self_attn.v_proj": ("qkv_proj", "v"),
            "self_attn.o_proj": ("o_proj", None),
            "post_attention_layernorm": ("post_attention_norm", None),
            "mlp.gate_proj": ("gate_up_proj", 0),
            "mlp.up_proj": ("gate_up_proj", 1),
            "mlp.down_proj": ("down_proj", None),
        },
        outside={"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"},
    )

    @staticmethod
    def shape_of(config: DreamConfig) -> Shape:
        return Shape(
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            intermediate_size=config.intermediate_size,
            num_embeddings=config.vocab_size,
            norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            qkv_bias=True,
            tie_embeddings=config.tie_word_embeddings,
            rope_in_float32=False,
        )
