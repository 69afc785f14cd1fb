"""SDAR: structure of yjyddq/DARE:models/{SDAR-4B-Chat,SDAR-30B-A3B-Chat} over the shared decoder."""

from dataclasses import replace

from dllm_plugin.kernels.route import SoftmaxRouting
from dllm_plugin.models.configs import SDARMoeConfig
from dllm_plugin.models.experts import ExpertsShape
from dllm_plugin.models.names import LLAMA
from dllm_plugin.models.transformer import DiffusionLM, Shape


class SDARForDiffusionLM(DiffusionLM):
    """SDAR-Chat, TraDo, DreamReasoner: Qwen3's layout. Norms of heads, no bias, logits predict their own position."""

    names = LLAMA
    qk_norm = True


class SDARMoeForDiffusionLM(SDARForDiffusionLM):
    """SDAR-30B-A3B: Qwen3-MoE's layout. Experts in every layer, none shared."""

    @classmethod
    def shape_of(cls, config: SDARMoeConfig) -> Shape:  # type: ignore[override]  # the family's own config
        routing = SoftmaxRouting(config.num_experts_per_tok, config.norm_topk_prob)
        experts = ExpertsShape(config.num_experts, config.moe_intermediate_size, 0, routing)
        return replace(
            super().shape_of(config), experts=experts, sparse_layers=frozenset(range(config.num_hidden_layers))
        )
