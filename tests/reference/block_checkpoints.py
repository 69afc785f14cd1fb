"""Random-weight checkpoints of the block-diffusion families, in exactly the published formats.

The principles are those of `checkpoints`: a small embedding of the mask, large queries and keys (in their norms, where a
family normalises them), a scaled head. Two keys are added where a published config.json leaves them to the code, because
a vocabulary of 331 has no published mask: `mask_token_id`, and a block length that is not the family's own. The keys of
LLaDA-MoE, DreamReasoner and Stable-DiffCoder are those that their code reads; their config.json files were not at hand.
Float32 rounding is up to 1e-4 in a logit of the mixtures of experts.

Sources of keys and tensor names: yjyddq/DARE:models/{SDAR-4B-Chat,SDAR-30B-A3B-Chat,LLaDA2.0-mini} (config.json,
generation_config.json, model.safetensors.index.json), Satgoy152/DualDiffusion:FastDLLM_inferencing/Fast_dLLM_v2_7B,
ByteDance-Seed/Stable-DiffCoder-8B-Instruct:modeling_stable_diffcoder.py, SJTU-DENG-Lab/Diffulex (a test's
DreamReasoner), inclusionAI/LLaDA-MoE-7B-A1B-Base:configuration_lladamoe.py, inclusionAI/dFactory (merged experts).
"""

from pathlib import Path

import torch

from .block_weights import (
    LLaDA2Options,
    LLaDAMoeOptions,
    MoeOptions,
    Options,
    Weights,
    decoder,
    llada2_mlp,
    llada2_names,
    mixture,
)
from .checkpoints import Random, write


def write_sdar(folder: str | Path, seed: int = 0, **options) -> Path:
    """Writes an SDAR checkpoint and returns its folder; `options` are those of `Options`."""
    o = Options(**options)
    config = {
        "architectures": ["SDARForCausalLM"],
        "auto_map": auto_map("sdar", "SDARConfig", "SDARModel", "SDARForCausalLM"),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_implementation": "flex_attention",
        "bos_token_id": o.eos_token_id,
        "debug": False,
        "eos_token_id": o.eos_token_id,
        "block_size": o.block_size,
        "mask_token_id": o.mask_token_id,
        "ep_size": 1,
        "fuse_cross_entropy": True,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": o.num_hidden_layers,
        "micro_forward": False,
        "model_type": "sdar",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "skip_checkpoint": False,
        "sliding_window": None,
        "torch_dtype": name_of(o.dtype),
        "transformers_version": "4.52.4",
        "use_cache": False,
        "use_deepep": False,
        "use_sliding_window": False,
        **o.shape(),
    }
    return save(folder, o, config, sdar_generation_config(o), decoder(Random(seed), o, qk_norm=True))


def write_sdar_moe(folder: str | Path, seed: int = 0, **options) -> Path:
    """Writes an SDAR mixture of experts and returns its folder; `options` are those of `MoeOptions`."""
    o = MoeOptions(**options)
    config = {
        "architectures": ["SDARMoeForCausalLM"],
        "auto_map": auto_map("sdar_moe", "SDARMoeConfig", "SDARMoeModel", "SDARMoeForCausalLM"),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": o.eos_token_id,
        "decoder_sparse_step": 1,
        "eos_token_id": o.eos_token_id,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": o.num_hidden_layers,
        "mlp_only_layers": [],
        "model_type": "sdar_moe",
        "moe_intermediate_size": o.moe_intermediate_size,
        "norm_topk_prob": o.norm_topk_prob,
        "num_experts": o.num_experts,
        "num_experts_per_tok": o.num_experts_per_tok,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "torch_dtype": name_of(o.dtype),
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        **o.shape(),
        **o.not_published(mask_token_id=151669, block_size=4),
    }
    weights = decoder(Random(seed), o, qk_norm=True, mlp=mixture)
    return save(folder, o, config, sdar_generation_config(o), weights)


def write_dream_reasoner(folder: str | Path, seed: int = 0, **options) -> Path:
    """Writes a DreamReasoner checkpoint, whose head_dim is null, and returns its folder; `options`: `Options`."""
    o = Options(**({"block_size": 32, "head_dim": None} | options))
    config = {
        "architectures": ["DreamForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": auto_map("dream", "DreamConfig", "DreamModel", "DreamForCausalLM"),
        "block_size": o.block_size,
        "bos_token_id": o.eos_token_id,
        "eos_token_id": o.eos_token_id,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mask_token_id": o.mask_token_id,
        "model_type": "Dream",
        "pad_token_id": o.eos_token_id,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": name_of(o.dtype),
        "use_cache": True,
        "use_sliding_window": False,
        **o.shape(),
    }
    generation_config = {"eos_token_id": [o.turn_end_id, o.eos_token_id], "pad_token_id": o.eos_token_id}
    return save(folder, o, config, generation_config, decoder(Random(seed), o, qk_norm=True))


def write_stable_diffcoder(folder: str | Path, seed: int = 0, **options) -> Path:
    """Writes a Stable-DiffCoder checkpoint, whose mask is 5, and returns its folder; `options`: `Options`."""
    o = Options(**({"mask_token_id": 5} | options))
    config = {
        "architectures": ["StableDiffcoderForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
        "bos_token_id": 0,
        "eos_token_id": o.eos_token_id,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "model_type": "llama",
        "pad_token_id": 1,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "torch_dtype": name_of(o.dtype),
        "use_cache": True,
        **o.shape(),
        **o.not_published(mask_token_id=5, block_size=4),
    }
    generation_config = {"bos_token_id": 0, "eos_token_id": o.eos_token_id, "pad_token_id": 1}
    return save(folder, o, config, generation_config, decoder(Random(seed), o, qk_norm=False))


def write_fast_dllm_v2(folder: str | Path, seed: int = 0, **options) -> Path:
    """Writes a Fast-dLLM v2 checkpoint and returns its folder; `options` are those of `Options`."""
    o = Options(**({"block_size": 32} | options))
    if o.head_dim != o.hidden_size // o.num_attention_heads:
        raise ValueError(
            f"Fast-dLLM v2 has no head_dim of its own; {o.head_dim} is not hidden_size / heads: leave it out"
        )
    config = {
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
            "AutoModel": "modeling.Fast_dLLM_QwenModel",
            "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
        },
        "bd_size": o.block_size,
        "bos_token_id": o.turn_end_id,
        "conplemenrary_mask": True,
        "eos_token_id": o.eos_token_id,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "layer_types": ["full_attention"] * o.num_hidden_layers,
        "max_window_layers": o.num_hidden_layers,
        "model_type": "Fast_dLLM_Qwen",
        "pad_token_id": o.eos_token_id,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": name_of(o.dtype),
        "transformers_version": "4.53.1",
        "use_cache": True,
        "use_sliding_window": False,
        **{name: value for name, value in o.shape().items() if name != "head_dim"},
        **o.not_published(mask_token_id=151665, block_size=o.block_size),
    }
    generation_config = {
        "bos_token_id": o.turn_end_id,
        "do_sample": True,
        "eos_token_id": [o.eos_token_id, o.turn_end_id],
        "pad_token_id": o.turn_end_id,
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "transformers_version": "4.53.1",
    }
    return save(folder, o, config, generation_config, decoder(Random(seed), o, qk_norm=False, bias=True))


def write_llada_moe(folder: str | Path, seed: int = 0, **options) -> Path:
    """Writes a LLaDA-MoE checkpoint and returns its folder; `options` are those of `LLaDAMoeOptions`."""
    o = LLaDAMoeOptions(**options)
    if o.head_dim != o.hidden_size // o.num_attention_heads:
        raise ValueError(f"LLaDA-MoE has no head_dim of its own; {o.head_dim} is not hidden_size / heads: leave it out")
    shape = o.shape()
    config = {
        "architectures": ["LLaDAMoEModelLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_lladamoe.LLaDAConfig",
            "AutoModel": "modeling_lladamoe.LLaDAMoEModel",
            "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
        },
        "clip_qkv": None,
        "dense_intermediate_size": shape.pop("intermediate_size"),
        "eos_token_id": o.eos_token_id,
        "expert_intermediate_size": o.moe_intermediate_size,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "llada",
        "moe_layer_freq": [1] * o.num_hidden_layers,
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": o.norm_topk_prob,
        "num_experts": o.num_experts,
        "num_experts_per_tok": o.num_experts_per_tok,
        "output_router_logits": False,
        "pad_token_id": o.eos_token_id,
        "partial_rotary_factor": o.partial_rotary_factor,
        "qk_layernorm": o.qk_layernorm,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 1.0,
        "router_aux_loss_coef": 0.01,
        "router_num_group": None,
        "router_topk_group": None,
        "shared_expert_intermediate_size": None,
        "torch_dtype": name_of(o.dtype),
        "use_cache": False,
        **{name: value for name, value in shape.items() if name != "head_dim"},
        **o.not_published(mask_token_id=156895, block_size=o.block_size),
    }
    generation_config = {"eos_token_id": o.eos_token_id, "pad_token_id": o.eos_token_id}
    weights = decoder(Random(seed), o, qk_norm=o.qk_layernorm, mlp=mixture)
    return save(folder, o, config, generation_config, weights)


def write_llada2(folder: str | Path, seed: int = 0, **options) -> Path:
    """Writes a LLaDA2 checkpoint, of 2.0 and 2.1 alike, and returns its folder; `options`: `LLaDA2Options`.

    Neither config.json nor generation_config.json names an EOS: eos_token_id is written as pad_token_id.
    """
    o = LLaDA2Options(**options)
    config = {
        "architectures": ["LLaDA2MoeModelLM"],
        "attention_dropout": 0.0,
        "auto_map": auto_map("llada2_moe", "LLaDA2MoeConfig", "LLaDA2MoeModel", "LLaDA2MoeModelLM"),
        "dtype": name_of(o.dtype),
        "embedding_dropout": 0.0,
        "first_k_dense_replace": o.first_k_dense_replace,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": 28,
        "model_type": "llada2_moe",
        "moe_intermediate_size": o.moe_intermediate_size,
        "moe_router_enable_expert_bias": True,
        "n_group": o.n_group,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": o.norm_topk_prob,
        "num_experts": o.num_experts,
        "num_experts_per_tok": o.num_experts_per_tok,
        "num_shared_experts": o.num_shared_experts,
        "output_dropout": 0.0,
        "output_router_logits": False,
        "pad_token_id": o.eos_token_id,
        "partial_rotary_factor": o.partial_rotary_factor,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 600000,
        "rotary_dim": int(o.head_size * o.partial_rotary_factor),
        "routed_scaling_factor": o.routed_scaling_factor,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "sliding_window": 4096,
        "topk_group": o.topk_group,
        "transformers_version": "4.57.1",
        "use_bias": False,
        "use_cache": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "use_sliding_window": False,
        "using_split_qkv_in_self_attention": False,
        **o.shape(),
        **o.not_published(mask_token_id=156895, block_size=32),
    }
    weights = llada2_names(decoder(Random(seed), o, qk_norm=True, mlp=llada2_mlp))
    biases = dict.fromkeys((name for name in weights if name.endswith("expert_bias")), o.expert_bias_dtype)
    return save(folder, o, config, {"pad_token_id": o.eos_token_id}, weights, biases)


WRITERS = {
    "sdar": write_sdar,
    "sdar-moe": write_sdar_moe,
    "llada2": write_llada2,
    "fast-dllm-v2": write_fast_dllm_v2,
    "stable-diffcoder": write_stable_diffcoder,
    "dream-reasoner": write_dream_reasoner,
    "llada-moe": write_llada_moe,
}


# ---- files


def auto_map(file: str, config: str, model: str, causal: str) -> dict[str, str]:
    return {
        "AutoConfig": f"configuration_{file}.{config}",
        "AutoModel": f"modeling_{file}.{model}",
        "AutoModelForCausalLM": f"modeling_{file}.{causal}",
    }


def sdar_generation_config(o: Options) -> dict:
    return {
        "bos_token_id": o.eos_token_id,
        "do_sample": True,
        "eos_token_id": [o.turn_end_id, o.eos_token_id],
        "pad_token_id": o.eos_token_id,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "4.51.0",
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save(
    folder: str | Path,
    o: Options,
    config: dict,
    generation_config: dict,
    weights: Weights,
    dtypes: dict[str, torch.dtype] | None = None,
) -> Path:
    return write(folder, config, generation_config, weights, o.dtype, shards=o.shards, dtypes=dtypes)
