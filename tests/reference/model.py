"""LLaDA and Dream from a checkpoint folder, in float32, a whole sequence at a time, every position seeing every other.

The forward pass reads like the description of the published models: no cache, no fused layers, no attention library.
Weights of any dtype are cast up to float32 once, so every rounding rule of the bfloat16 models (norm before weight,
rotation in float32 or not) is exact here and needs no branch.
"""

import json
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

Weights = dict[str, Tensor]


class Predictor(Protocol):
    """What the decoders need of a model; tests of decoding rules pass tables of logits instead of a checkpoint."""

    mask_token_id: int

    def logits_for_positions(self, ids: Tensor) -> Tensor:
        """Float32 logits [length, vocabulary]; row i is the one that predicts position i of `ids` [length]."""
        ...


class ReferenceModel:
    """The part that both families share: reading a folder, running the forward pass, applying the shift."""

    shift = False  # True where the model's row i predicts position i + 1

    def __init__(self, config: dict, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        self.used: set[str] = set()
        self.mask_token_id: int = config["mask_token_id"]
        self.eos_token_id: int = config["eos_token_id"]
        # columns of the logits: the published code cuts off none, and so may choose what pads the vocabulary
        self.vocab_size: int = config.get("embedding_size") or config["vocab_size"]

    def weight(self, name: str) -> Tensor:
        self.used.add(name)
        return self.weights[name]

    def forward(self, ids: Tensor) -> Tensor:
        """The model's own logits [length, vocabulary] for token ids [length], before any shift."""
        raise NotImplementedError

    @torch.inference_mode()
    def logits_for_positions(self, ids: Tensor) -> Tensor:
        logits = self.forward(ids)
        if self.shift:  # position 0 has no row before it and keeps its own, as in the published code
            logits = torch.cat([logits[:1], logits[:-1]])
        return logits


class LLaDA(ReferenceModel):
    """A1 in the published names: OLMo-style tensors around a Llama block, no biases, no shift."""

    def forward(self, ids: Tensor) -> Tensor:
        config = self.config
        num_heads = config["n_heads"]
        num_kv_heads = config["n_kv_heads"]
        head_dim = config["d_model"] // num_heads
        eps = config["rms_norm_eps"]
        cos, sin = rotation(len(ids), head_dim, config["rope_theta"])

        h = self.weight("model.transformer.wte.weight")[ids]
        for n in range(config["n_layers"]):
            block = f"model.transformer.blocks.{n}"
            x = rms_norm(h, self.weight(f"{block}.attn_norm.weight"), eps)
            q = rotate(split_heads(x @ self.weight(f"{block}.q_proj.weight").T, num_heads), cos, sin)
            k = rotate(split_heads(x @ self.weight(f"{block}.k_proj.weight").T, num_kv_heads), cos, sin)
            v = split_heads(x @ self.weight(f"{block}.v_proj.weight").T, num_kv_heads)
            h = h + attention(q, k, v) @ self.weight(f"{block}.attn_out.weight").T

            x = rms_norm(h, self.weight(f"{block}.ff_norm.weight"), eps)
            gate = F.silu(x @ self.weight(f"{block}.ff_proj.weight").T)
            up = x @ self.weight(f"{block}.up_proj.weight").T
            h = h + (gate * up) @ self.weight(f"{block}.ff_out.weight").T

        h = rms_norm(h, self.weight("model.transformer.ln_f.weight"), eps)
        head = "wte" if config["weight_tying"] else "ff_out"
        return h @ self.weight(f"model.transformer.{head}.weight").T


class Dream(ReferenceModel):
    """A2 in the published names: Qwen2 with biases on q, k and v, bidirectional; row i predicts position i + 1."""

    shift = True

    def forward(self, ids: Tensor) -> Tensor:
        config = self.config
        num_heads = config["num_attention_heads"]
        num_kv_heads = config["num_key_value_heads"]
        head_dim = config["hidden_size"] // num_heads
        eps = config["rms_norm_eps"]
        cos, sin = rotation(len(ids), head_dim, config["rope_theta"])

        h = self.weight("model.embed_tokens.weight")[ids]
        for n in range(config["num_hidden_layers"]):
            layer = f"model.layers.{n}"
            x = rms_norm(h, self.weight(f"{layer}.input_layernorm.weight"), eps)
            q = rotate(split_heads(self.biased(f"{layer}.self_attn.q_proj", x), num_heads), cos, sin)
            k = rotate(split_heads(self.biased(f"{layer}.self_attn.k_proj", x), num_kv_heads), cos, sin)
            v = split_heads(self.biased(f"{layer}.self_attn.v_proj", x), num_kv_heads)
            h = h + attention(q, k, v) @ self.weight(f"{layer}.self_attn.o_proj.weight").T

            x = rms_norm(h, self.weight(f"{layer}.post_attention_layernorm.weight"), eps)
            gate = F.silu(x @ self.weight(f"{layer}.mlp.gate_proj.weight").T)
            up = x @ self.weight(f"{layer}.mlp.up_proj.weight").T
            h = h + (gate * up) @ self.weight(f"{layer}.mlp.down_proj.weight").T

        h = rms_norm(h, self.weight("model.norm.weight"), eps)
        head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
        return h @ self.weight(f"{head}.weight").T

    def biased(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weight(f"{name}.weight").T + self.weight(f"{name}.bias")


FAMILIES = {"llada": LLaDA, "Dream": Dream}  # by the model_type of config.json


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> ReferenceModel:
    """The model of a checkpoint folder: config.json and every *.safetensors beside it.

    float64 is for judging a mismatch: where float32 and float64 decode to different tokens, the case hangs on a
    near-tie that rounding decides, and no implementation is wrong.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return FAMILIES[config["model_type"]](config, {name: tensor.to(dtype) for name, tensor in weights.items()})


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotation(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, head_dim] of the rotary angles of positions 0..length-1, the two halves alike."""
    inverse_frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * inverse_frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [heads, length, head_dim]; element i is paired with element i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(0, 1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [heads, length, head_dim] to every position; returns [length, heads * head_dim].

    Query head j reads key and value head j // (heads / key heads).
    """
    k = k.repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    v = v.repeat_interleave(q.shape[0] // v.shape[0], dim=0)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (torch.softmax(scores, dim=-1) @ v).transpose(0, 1).flatten(-2)
