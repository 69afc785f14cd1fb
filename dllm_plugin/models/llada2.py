"""LLaDA2: structure and tensor names of yjyddq/DARE:models/LLaDA2.0-mini/modeling_llada2_moe.py over the shared decoder."""

from dataclasses import replace
from typing import ClassVar

from dllm_plugin.kernels.route import GroupedSigmoidRouting
from dllm_plugin.models.configs import LLaDA2Config
from dllm_plugin.models.experts import ExpertsShape
from dllm_plugin.models.names import DENSE_MLP, EXPERTS, WeightNames
from dllm_plugin.models.transformer import DiffusionLM, Shape


class LLaDA2ForDiffusionLM(DiffusionLM):
    """LLaDA2.0 and 2.1, mini and flash: queries, keys and values are one tensor, half of each head is rotated.

    Layers from first_k_dense_replace on have experts, of which the shared ones see every token.
    """

    names = WeightNames(
        layer="model.layers",
        in_layer=DENSE_MLP
        | EXPERTS
        | {
            "input_layernorm": ("input_norm", None),
            "attention.query_key_value": ("qkv_proj", None),
            "attention.query_layernorm": ("q_norm", None),
            "attention.key_layernorm": ("k_norm", None),
            "attention.dense": ("o_proj", None),
            "post_attention_layernorm": ("post_attention_norm", None),
            "mlp.shared_experts.gate_proj": ("mlp.shared.gate_up_proj", 0),
            "mlp.shared_experts.up_proj": ("mlp.shared.gate_up_proj", 1),
            "mlp.shared_experts.down_proj": ("mlp.shared.down_proj", None),
        },
        outside={"model.word_embeddings": "embedding", "model.norm": "norm", "lm_head": "head"},
    )
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {  # type: ignore[misc]  # as in DiffusionLM
        "qkv_proj": ["qkv_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    qk_norm = True

    @classmethod
    def shape_of(cls, config: LLaDA2Config) -> Shape:  # type: ignore[override]  # the family's own config
        routing = GroupedSigmoidRouting(
            config.num_experts_per_tok, config.n_group, config.topk_group, config.routed_scaling_factor
        )
        size = config.moe_intermediate_size
        experts = ExpertsShape(config.num_experts, size, size * (config.num_shared_experts or 0), routing)
        sparse = frozenset(range(config.first_k_dense_replace, config.num_hidden_layers))
        return replace(super().shape_of(config), experts=experts, sparse_layers=sparse)
