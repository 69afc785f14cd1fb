"""The random weights of `block_checkpoints`, and what its writers take.

Draws are in one order for all families: a folder is a pure function of (family, seed, options).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checkpoints import HEAD_SCALE, MASK_SCALE, QK_SCALE, RESIDUAL_SCALE, Random, amplify

ROUTER_SCALE = 2.0  # far enough apart that rounding seldom decides between two experts
EXPERT_BIAS_SCALE = 0.1  # often decides which experts are chosen

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """What every writer takes. `loud` as in `checkpoints`; `turn_end_id` is the second EOS of generation_config.json."""

    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int | None = 32
    intermediate_size: int = 200
    vocab_size: int = 331
    max_position_embeddings: int = 512
    mask_token_id: int = 325
    eos_token_id: int = 320
    turn_end_id: int = 321
    block_size: int = 4
    tie_word_embeddings: bool = False
    loud: dict[int, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    shards: int = 1

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def shape(self) -> dict:
        """The keys that nearly all families share."""
        names = (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "vocab_size", "max_position_embeddings", "tie_word_embeddings",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def not_published(self, mask_token_id: int, block_size: int) -> dict:
        """Keys for what differs from the mask and block length that the family's code assumes."""
        keys = {"mask_token_id": self.mask_token_id, "block_size": self.block_size}
        assumed = {"mask_token_id": mask_token_id, "block_size": block_size}
        return {name: value for name, value in keys.items() if value != assumed[name]}


@dataclass(frozen=True)
class MoeOptions(Options):
    """`merged_experts` stacks the experts of a layer in one tensor [experts, out, in] per projection, without ".weight"."""

    moe_intermediate_size: int = 64
    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    merged_experts: bool = False


@dataclass(frozen=True)
class LLaDAMoeOptions(MoeOptions):
    norm_topk_prob: bool = False
    qk_layernorm: bool = True
    partial_rotary_factor: float = 1.0


@dataclass(frozen=True)
class LLaDA2Options(MoeOptions):
    """LLaDA2.1 saves the bias of the experts in float32 whatever the dtype of the rest, LLaDA2.0 in the dtype of the rest."""

    num_hidden_layers: int = 3
    block_size: int = 32
    n_group: int = 4
    topk_group: int = 2
    num_shared_experts: int = 1
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 2.5
    partial_rotary_factor: float = 0.5
    expert_bias_dtype: torch.dtype = torch.float32


# ---- under Llama's names


def decoder(random: Random, o: Options, *, qk_norm: bool, bias: bool = False, mlp=None) -> Weights:
    """Every tensor of a decoder; `mlp` writes those of layer n where they are not a plain gated MLP's."""
    embedding = random.normal(o.vocab_size, o.hidden_size)
    embedding[o.mask_token_id] *= MASK_SCALE
    weights = {"model.embed_tokens.weight": embedding}
    for n in range(o.num_hidden_layers):
        layer = f"model.layers.{n}"
        weights |= attention(random, f"{layer}.self_attn", o, qk_norm, bias)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{norm}.weight"] = random.norm(o.hidden_size)
        if mlp is None:
            weights |= gated(random, f"{layer}.mlp", o.hidden_size, o.intermediate_size)
        else:
            weights |= mlp(random, n, o)
    weights["model.norm.weight"] = random.norm(o.hidden_size)
    head = random.linear(o.vocab_size, o.hidden_size, HEAD_SCALE)
    if o.tie_word_embeddings:
        embedding *= HEAD_SCALE / o.hidden_size**0.5
        head = embedding
    else:
        weights["lm_head.weight"] = head
    amplify(head, o.loud)
    return weights


def attention(random: Random, name: str, o: Options, qk_norm: bool, bias: bool) -> Weights:
    heads, kv_heads = o.num_attention_heads, o.num_key_value_heads
    qk_scale = 1.0 if qk_norm else QK_SCALE
    weights = {}
    for letter, number, scale in (("q", heads, qk_scale), ("k", kv_heads, qk_scale), ("v", kv_heads, 1.0)):
        weights[f"{name}.{letter}_proj.weight"] = random.linear(number * o.head_size, o.hidden_size, scale)
        if bias:
            weights[f"{name}.{letter}_proj.bias"] = 0.5 * random.normal(number * o.head_size)
    if qk_norm:
        weights |= {f"{name}.{letter}_norm.weight": QK_SCALE * random.norm(o.head_size) for letter in "qk"}
    weights[f"{name}.o_proj.weight"] = random.linear(o.hidden_size, heads * o.head_size, RESIDUAL_SCALE)
    return weights


def gated(random: Random, name: str, hidden_size: int, intermediate_size: int) -> Weights:
    return {
        f"{name}.gate_proj.weight": random.linear(intermediate_size, hidden_size),
        f"{name}.up_proj.weight": random.linear(intermediate_size, hidden_size),
        f"{name}.down_proj.weight": random.linear(hidden_size, intermediate_size, RESIDUAL_SCALE),
    }


def mixture(random: Random, n: int, o: MoeOptions) -> Weights:
    name = f"model.layers.{n}.mlp"
    weights = {f"{name}.gate.weight": random.linear(o.num_experts, o.hidden_size, ROUTER_SCALE)}
    experts = [gated(random, "", o.hidden_size, o.moe_intermediate_size) for _ in range(o.num_experts)]
    if o.merged_experts:
        for tensor in experts[0]:
            weights[f"{name}.experts{tensor.removesuffix('.weight')}"] = torch.stack([e[tensor] for e in experts])
    else:
        for number, expert in enumerate(experts):
            weights |= {f"{name}.experts.{number}{tensor}": value for tensor, value in expert.items()}
    return weights


def llada2_mlp(random: Random, n: int, o: LLaDA2Options) -> Weights:
    name = f"model.layers.{n}.mlp"
    if n < o.first_k_dense_replace:
        return gated(random, name, o.hidden_size, o.intermediate_size)
    weights = mixture(random, n, o)
    weights[f"{name}.gate.expert_bias"] = EXPERT_BIAS_SCALE * random.normal(o.num_experts)
    if o.num_shared_experts:
        weights |= gated(
            random, f"{name}.shared_experts", o.hidden_size, o.num_shared_experts * o.moe_intermediate_size
        )
    return weights


def llada2_names(weights: Weights) -> Weights:
    """LLaDA2's names for Llama's, with q, k and v in one tensor, in this order of rows."""
    renamed = {}
    for name, tensor in weights.items():
        if name.endswith("q_proj.weight"):
            parts = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            renamed[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(parts)
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            for llama, llada2 in (
                ("embed_tokens", "word_embeddings"),
                ("self_attn.q_norm", "attention.query_layernorm"),
                ("self_attn.k_norm", "attention.key_layernorm"),
                ("self_attn.o_proj", "attention.dense"),
            ):
                name = name.replace(llama, llada2)
            renamed[name] = tensor
    return renamed
