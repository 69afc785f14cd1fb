"""Random-weight checkpoints in exactly the published formats, small enough to write and run in milliseconds.

Plain small weights would make every masked position predict the same token, since all of them carry the same embedding.
Here the mask's embedding is small beside the others and queries, keys and attention outputs are large, so predictions
differ between positions and change as tokens are committed. The head is scaled so that the top probability spreads over
(0, 1). Larger scales would give more variety, but also enlarge float32 rounding (now up to 5e-5 in a logit) until two
correct implementations disagree about near-ties. A folder is a pure function of (family, seed, dimensions).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HEAD_SCALE = 3.0  # standard deviation of a logit
QK_SCALE = 2.5
RESIDUAL_SCALE = 2.0
MASK_SCALE = 0.3


def write_llada(
    folder: str | Path,
    seed: int = 0,
    *,
    d_model: int = 128,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    mlp_hidden_size: int = 200,
    vocab_size: int = 331,
    embedding_size: int | None = None,
    max_sequence_length: int = 512,
    mask_token_id: int = 325,
    eos_token_id: int = 320,
    pad_token_id: int | None = None,
    weight_tying: bool = False,
    loud: dict[int, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a LLaDA checkpoint and returns its folder.

    `loud` maps a token id to a factor on its row of the head: a loud token has extreme logits, so it is often the
    model's first choice. That is how a test makes EOS or the mask token appear.
    """
    embedding_size = embedding_size or vocab_size
    head_dim = d_model // n_heads
    random = Random(seed)
    embedding = random.normal(embedding_size, d_model)
    embedding[mask_token_id] *= MASK_SCALE
    weights = {"model.transformer.wte.weight": embedding}
    for n in range(n_layers):
        block = f"model.transformer.blocks.{n}"
        weights |= {
            f"{block}.attn_norm.weight": random.norm(d_model),
            f"{block}.q_proj.weight": random.linear(n_heads * head_dim, d_model, QK_SCALE),
            f"{block}.k_proj.weight": random.linear(n_kv_heads * head_dim, d_model, QK_SCALE),
            f"{block}.v_proj.weight": random.linear(n_kv_heads * head_dim, d_model),
            f"{block}.attn_out.weight": random.linear(d_model, d_model, RESIDUAL_SCALE),
            f"{block}.ff_norm.weight": random.norm(d_model),
            f"{block}.ff_proj.weight": random.linear(mlp_hidden_size, d_model),
            f"{block}.up_proj.weight": random.linear(mlp_hidden_size, d_model),
            f"{block}.ff_out.weight": random.linear(d_model, mlp_hidden_size, RESIDUAL_SCALE),
        }
    weights["model.transformer.ln_f.weight"] = random.norm(d_model)
    head = random.linear(embedding_size, d_model, HEAD_SCALE)
    if weight_tying:
        embedding *= HEAD_SCALE / d_model**0.5
        head = embedding
    else:
        weights["model.transformer.ff_out.weight"] = head
    amplify(head, loud)

    pad_token_id = eos_token_id if pad_token_id is None else pad_token_id
    config = {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": d_model,
        "embedding_dropout": 0.0,
        "embedding_size": embedding_size,
        "eos_token_id": eos_token_id,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": mask_token_id,
        "max_sequence_length": max_sequence_length,
        "mlp_hidden_size": mlp_hidden_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "n_layers": n_layers,
        "pad_token_id": pad_token_id,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": vocab_size,
        "weight_tying": weight_tying,
    }
    generation_config = {
        "_from_model_config": True,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "transformers_version": "4.46.3",
        "use_cache": False,
    }
    return write(folder, config, generation_config, weights, dtype)


def write_dream(
    folder: str | Path,
    seed: int = 0,
    *,
    hidden_size: int = 128,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    intermediate_size: int = 200,
    vocab_size: int = 331,
    max_position_embeddings: int = 512,
    mask_token_id: int = 325,
    eos_token_id: int = 320,
    tie_word_embeddings: bool = False,
    loud: dict[int, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a Dream checkpoint and returns its folder; `loud` as for LLaDA."""
    head_dim = hidden_size // num_attention_heads
    random = Random(seed)
    embedding = random.normal(vocab_size, hidden_size)
    embedding[mask_token_id] *= MASK_SCALE
    weights = {"model.embed_tokens.weight": embedding}
    for n in range(num_hidden_layers):
        layer = f"model.layers.{n}"
        weights[f"{layer}.input_layernorm.weight"] = random.norm(hidden_size)
        for name, heads, scale in (
            ("q_proj", num_attention_heads, QK_SCALE),
            ("k_proj", num_key_value_heads, QK_SCALE),
            ("v_proj", num_key_value_heads, 1.0),
        ):
            weights[f"{layer}.self_attn.{name}.weight"] = random.linear(heads * head_dim, hidden_size, scale)
            weights[f"{layer}.self_attn.{name}.bias"] = 0.5 * random.normal(heads * head_dim)
        weights |= {
            f"{layer}.self_attn.o_proj.weight": random.linear(hidden_size, hidden_size, RESIDUAL_SCALE),
            f"{layer}.post_attention_layernorm.weight": random.norm(hidden_size),
            f"{layer}.mlp.gate_proj.weight": random.linear(intermediate_size, hidden_size),
            f"{layer}.mlp.up_proj.weight": random.linear(intermediate_size, hidden_size),
            f"{layer}.mlp.down_proj.weight": random.linear(hidden_size, intermediate_size, RESIDUAL_SCALE),
        }
    weights["model.norm.weight"] = random.norm(hidden_size)
    head = random.linear(vocab_size, hidden_size, HEAD_SCALE)
    if tie_word_embeddings:
        embedding *= HEAD_SCALE / hidden_size**0.5
        head = embedding
    else:
        weights["lm_head.weight"] = head
    amplify(head, loud)

    config = {
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "mask_token_id": mask_token_id,
        "max_position_embeddings": max_position_embeddings,
        "max_window_layers": num_hidden_layers,
        "model_type": "Dream",
        "num_attention_heads": num_attention_heads,
        "num_hidden_layers": num_hidden_layers,
        "num_key_value_heads": num_key_value_heads,
        "pad_token_id": eos_token_id,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }
    generation_config = {
        "_from_model_config": True,
        "alg": "origin",
        "alg_temp": None,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "eps": 0.001,
        "mask_token_id": None,
        "output_history": False,
        "pad_token_id": eos_token_id,
        "steps": 512,
        "temperature": 0.0,
        "top_k": None,
        "top_p": None,
        "transformers_version": "4.46.2",
    }
    return write(folder, config, generation_config, weights, dtype)


WRITERS = {"llada": write_llada, "dream": write_dream}


class Random:
    """Draws weights one after another from one seeded stream."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def linear(self, out_features: int, in_features: int, scale: float = 1.0) -> Tensor:
        """A weight whose output has standard deviation `scale` where the input has unit size."""
        return self.normal(out_features, in_features) * scale / in_features**0.5

    def norm(self, size: int) -> Tensor:
        return 1 + 0.2 * self.normal(size)


def amplify(head: Tensor, loud: dict[int, float] | None) -> None:
    for token_id, factor in (loud or {}).items():
        head[token_id] *= factor


def write(
    folder: str | Path,
    config: dict,
    generation_config: dict,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    shards: int = 1,
    dtypes: dict[str, torch.dtype] | None = None,
) -> Path:
    """`dtypes` names the tensors that are not saved in `dtype`; more than one shard spreads every layer over all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
    dtypes = dict.fromkeys(weights, dtype) | (dtypes or {})
    tensors = {name: tensor.to(dtypes[name]).contiguous() for name, tensor in weights.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder
