"""The block-diffusion families from a checkpoint folder, in float32, for any rule of who sees whom.

Like `model`, the forward pass reads like the description of the published models, and weights of any dtype are cast up
to float32 once: every cast that the published code writes down (router in float32, its weights back to the model's
dtype, norm before weight) is exact here and needs no branch. float64, as in `model`, is for judging a mismatch.

Sources: JetAstra/SDAR:generate.py and yjyddq/DARE:models/{SDAR-4B-Chat,SDAR-30B-A3B-Chat,LLaDA2.0-mini} (configs, tensor
names, router), Satgoy152/DualDiffusion:FastDLLM_inferencing/Fast_dLLM_v2_7B/modeling.py,
SJTU-DENG-Lab/Diffulex:diffulex/model (DreamReasoner, Stable-DiffCoder),
ZHZisZZ/dllm:dllm/pipelines/llada/models/modeling_lladamoe.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from .cached_model import CachedModel, attend
from .model import Weights, rms_norm, rotate, rotation, split_heads


def block_causal(length: int, block_length: int) -> Tensor:
    """Who sees whom, [length, length] bool, True where query q sees key k: floor(k / block) <= floor(q / block).

    Blocks are counted from position 0 of the sequence, so a prompt's tail shares its block with the first masks.

    >>> block_causal(3, 2).int().tolist()
    [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """
    block = torch.arange(length) // block_length
    return block[None, :] <= block[:, None]


@dataclass
class Cache:
    """Keys, rotated, and values of a sequence, both [layers, key heads, length, head_dim]; NaN where unwritten."""

    keys: Tensor
    values: Tensor


class BlockModel:
    """A decoder in Llama's tensor names; families say what they add. Reads a folder's config and weights as they are.

    `shift` 1: row i predicts position i + 1. `logits` are always the model's own rows; decoders apply the shift.
    """

    shift = 0
    block: int | None = 4  # where config.json does not say; None: every position sees every other
    mask = 151669  # likewise
    qkv_bias = False
    embedding = "model.embed_tokens"

    def __init__(self, config: dict, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        self.used: set[str] = set()
        self.mask_token_id: int = config.get("mask_token_id", self.mask)
        self.eos_token_id: int = config.get("eos_token_id", config.get("pad_token_id"))
        self.vocab_size: int = config["vocab_size"]
        self.block_length: int | None = config.get("block_size", config.get("bd_size", self.block))
        self.num_heads: int = config["num_attention_heads"]
        self.num_kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.num_heads
        self.rotary_dim = int(self.head_dim * (config.get("partial_rotary_factor") or 1))
        self.eps: float = config["rms_norm_eps"]

    def weight(self, name: str) -> Tensor:
        self.used.add(name)
        return self.weights[name]

    @torch.inference_mode()
    def logits(self, ids: Tensor, visible: Tensor) -> Tensor:
        """Logits [n, vocabulary] of ids [n], row i after token i; visible [n, n] bool, True where a row sees a column."""
        return self.forward(ids, 0, len(ids), visible, self.new_cache(len(ids)))

    def new_cache(self, length: int) -> Cache:
        shape = (self.config["num_hidden_layers"], self.num_kv_heads, length, self.head_dim)
        dtype = self.weights["model.norm.weight"].dtype
        return Cache(torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))

    @torch.inference_mode()
    def forward(self, ids: Tensor, start: int, end: int, visible: Tensor, cache: Cache) -> Tensor:
        """Logits [end - start, vocabulary] of positions [start, end), whose keys and values are overwritten first.

        The others' stay as an earlier pass left them. visible [end - start, positions of the cache] bool.
        """
        cos, sin = (table[start:end] for table in rotation(end, self.rotary_dim, self.config["rope_theta"]))
        h = self.weight(f"{self.embedding}.weight")[ids[start:end]]
        for n in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{n}"
            q, k, v = self.queries_keys_values(layer, self.norm(f"{layer}.input_layernorm", h))
            cache.keys[n, :, start:end] = self.rotate(k, cos, sin)
            cache.values[n, :, start:end] = v
            attended = attend(self.rotate(q, cos, sin), cache.keys[n], cache.values[n], ~visible)
            h = h + self.attention_out(layer, attended)
            h = h + self.mlp(n, self.norm(f"{layer}.post_attention_layernorm", h))
        head = self.embedding if self.config["tie_word_embeddings"] else "lm_head"
        return self.linear(head, self.norm("model.norm", h))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weight(f"{name}.weight").T

    def norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight(f"{name}.weight"), self.eps)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The first rotary_dim elements of each head, in halves of their own; the rest passes."""
        return torch.cat([rotate(x[..., : self.rotary_dim], cos, sin), x[..., self.rotary_dim :]], dim=-1)

    def queries_keys_values(self, layer: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Before rotation, each [heads, rows, head_dim]."""
        q, k, v = (self.linear(f"{layer}.self_attn.{name}_proj", x) for name in "qkv")
        if self.qkv_bias:
            bias = lambda name: self.weight(f"{layer}.self_attn.{name}_proj.bias")  # noqa: E731
            q, k, v = q + bias("q"), k + bias("k"), v + bias("v")
        return split_heads(q, self.num_heads), split_heads(k, self.num_kv_heads), split_heads(v, self.num_kv_heads)

    def attention_out(self, layer: str, x: Tensor) -> Tensor:
        return self.linear(f"{layer}.self_attn.o_proj", x)

    def mlp(self, n: int, x: Tensor) -> Tensor:
        return self.gated(f"model.layers.{n}.mlp", x)

    def gated(self, name: str, x: Tensor) -> Tensor:
        gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", F.silu(gate) * up)

    # ---- mixtures of experts

    def experts(self, name: str, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Expert outputs weighted by weights [rows, k] and added up in expert order; chosen [rows, k] are the experts."""
        out = torch.zeros_like(x)
        for expert in range(self.config["num_experts"]):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            out[rows] += weights[rows, place, None] * self.gated(f"{name}.experts.{expert}", x[rows])
        return out

    def softmax_mixture(self, name: str, x: Tensor) -> Tensor:
        """Softmax over all experts, then the best; norm_topk_prob makes their weights sum to 1."""
        probs = torch.softmax(self.linear(f"{name}.gate", x), dim=-1)
        chosen = top(probs, self.config["num_experts_per_tok"])
        weights = probs.gather(1, chosen)
        if self.config["norm_topk_prob"]:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.experts(name, x, weights, chosen)


class SDAR(BlockModel):
    """Qwen3: queries and keys are normalised in each head before they are rotated."""

    def queries_keys_values(self, layer: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().queries_keys_values(layer, x)
        return self.norm(f"{layer}.self_attn.q_norm", q), self.norm(f"{layer}.self_attn.k_norm", k), v


class SDARMoe(SDAR):
    def mlp(self, n: int, x: Tensor) -> Tensor:
        return self.softmax_mixture(f"model.layers.{n}.mlp", x)


class DreamReasoner(SDAR):
    """Has the model_type of Dream, but neither its shift nor its full attention."""

    block = 32


class StableDiffCoder(BlockModel):
    """Plain Llama."""

    mask = 5


class FastDLLM(BlockModel):
    """Qwen2.5: biases on q, k and v; row i predicts position i + 1."""

    shift = 1
    block = 32
    mask = 151665
    qkv_bias = True


class LLaDAMoE(BlockModel):
    """OLMoE with full attention; queries and keys are normalised in each head where the config says so."""

    block = None
    mask = 156895

    def queries_keys_values(self, layer: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().queries_keys_values(layer, x)
        if self.config["qk_layernorm"]:
            q, k = self.norm(f"{layer}.self_attn.q_norm", q), self.norm(f"{layer}.self_attn.k_norm", k)
        return q, k, v

    def mlp(self, n: int, x: Tensor) -> Tensor:
        return self.softmax_mixture(f"model.layers.{n}.mlp", x)

    def logits_for_positions(self, ids: Tensor) -> Tensor:
        """What the decoders of the full-attention families ask for, see `model.Predictor`."""
        return self.logits(ids, torch.ones(len(ids), len(ids), dtype=torch.bool))


class LLaDA2(BlockModel):
    """Fused and normalised queries, keys and values, half of each head rotated; sigmoid router over groups of experts."""

    block = 32
    mask = 156895
    embedding = "model.word_embeddings"

    def queries_keys_values(self, layer: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = split_heads(
            self.linear(f"{layer}.attention.query_key_value", x), self.num_heads + 2 * self.num_kv_heads
        )
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads])
        attention = f"{layer}.attention"
        return self.norm(f"{attention}.query_layernorm", q), self.norm(f"{attention}.key_layernorm", k), v

    def attention_out(self, layer: str, x: Tensor) -> Tensor:
        return self.linear(f"{layer}.attention.dense", x)

    def mlp(self, n: int, x: Tensor) -> Tensor:
        name = f"model.layers.{n}.mlp"
        if n < self.config["first_k_dense_replace"]:
            return self.gated(name, x)
        out = self.experts(name, x, *self.route(name, x))
        if self.config["num_shared_experts"]:
            out = out + self.gated(f"{name}.shared_experts", x)
        return out

    def route(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts, both [rows, k]; the bias chooses, and has no part in the weights.

        A group of experts is worth the sum of its two best biased scores; outside the topk_group best groups nobody is
        chosen. The published router does not read norm_topk_prob.
        """
        config = self.config
        scores = torch.sigmoid(self.linear(f"{name}.gate", x))
        biased = scores + self.weight(f"{name}.gate.expert_bias")
        groups = biased.unflatten(-1, (config["n_group"], -1))
        worth = groups.topk(2, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter(1, top(worth, config["topk_group"]), True)
        chosen = top(groups.masked_fill(~kept[..., None], -torch.inf).flatten(1), config["num_experts_per_tok"])
        weights = scores.gather(1, chosen)
        if config["num_experts_per_tok"] > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * config["routed_scaling_factor"], chosen


class CachedBlockModel(CachedModel):
    """What the cached decoders of the full-attention families ask for, over a `BlockModel`."""

    def __init__(self, model: BlockModel, length: int) -> None:
        self.model = model
        self.shift = model.shift
        self.positions = torch.arange(length)
        self.cache = model.new_cache(length)

    def forward(self, ids: Tensor, start: int, end: int, allowed: Tensor | int) -> Tensor:
        visible = self.positions[None, :] < allowed if isinstance(allowed, int) else allowed[start:end]
        return self.model.forward(ids, start, end, visible, self.cache)


FAMILIES = {  # by the architecture of config.json: LLaDA-MoE has the model_type of LLaDA, DreamReasoner that of Dream
    "SDARForCausalLM": SDAR,
    "SDARMoeForCausalLM": SDARMoe,
    "DreamForCausalLM": DreamReasoner,
    "StableDiffcoderForCausalLM": StableDiffCoder,
    "Fast_dLLM_QwenForCausalLM": FastDLLM,
    "LLaDA2MoeModelLM": LLaDA2,
    "LLaDAMoEModelLM": LLaDAMoE,
}


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> BlockModel:
    """The model of a checkpoint folder: config.json and every *.safetensors beside it, one file or shards.

    Experts may be tensors of their own or stacked along a first dimension, as inclusionAI/dFactory saves them.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            weights |= separate_experts(name, tensor.to(dtype))
    return FAMILIES[config["architectures"][0]](config, weights)


def separate_experts(name: str, tensor: Tensor) -> Weights:
    before, experts, projection = name.partition(".mlp.experts.")
    if projection not in ("gate_proj", "up_proj", "down_proj"):
        return {name: tensor}
    return {f"{before}{experts}{expert}.{projection}.weight": tensor[expert] for expert in range(len(tensor))}


def top(scores: Tensor, count: int) -> Tensor:
    """Indices [rows, count] of the highest scores [rows, n], ties taking the lowest index: torch.topk follows no rule."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
