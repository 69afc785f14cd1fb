"""LLaDA-MoE: structure of InfiniTensor/InfiniLM:modeling_lladamoe.py, a copy of the published code, over the shared decoder."""

from dataclasses import replace

from dllm_plugin.kernels.route import SoftmaxRouting
from dllm_plugin.models.configs import LLaDAMoEConfig
from dllm_plugin.models.experts import ExpertsShape
from dllm_plugin.models.names import LLAMA
from dllm_plugin.models.transformer import DiffusionLM, Shape


class LLaDAMoEForDiffusionLM(DiffusionLM):
    """LLaDA-MoE-7B-A1B Base and Instruct: OLMoE's layout, with full attention. Whether heads are normed, the config says."""

    names = LLAMA

    @classmethod
    def shape_of(cls, config: LLaDAMoEConfig) -> Shape:  # type: ignore[override]  # the family's own config
        normalized = bool(getattr(config, "norm_topk_prob", False))
        routing = SoftmaxRouting(config.num_experts_per_tok, normalized)
        experts = ExpertsShape(config.num_experts, config.expert_intermediate_size, 0, routing)
        sparse = frozenset(layer for layer, has_experts in enumerate(config.moe_layer_freq) if has_experts)
        shape = super().shape_of(config)
        return replace(shape, qk_norm=config.qk_layernorm, experts=experts, sparse_layers=sparse)
