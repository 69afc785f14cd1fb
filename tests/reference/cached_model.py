"""The reference models a window at a time, keys and values of every layer kept in plain tensors.

Same weights and same arithmetic as `model`, but a forward pass runs over positions [start, end) of a sequence and
overwrites the keys and values of these positions alone; the others stay as an earlier pass left them. Rotated keys are
kept, each at its absolute position, which is the published caches' un-rotated keys rotated anew in every pass.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Dream, ReferenceModel, rms_norm, rotate, rotation, split_heads


@dataclass(frozen=True)
class Shape:
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Layer:
    """A layer's tensors under one set of names; `bias` holds those of q, k and v, or nothing."""

    norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    bias: dict[str, Tensor]
    out: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class CachedModel:
    """A model with a cache for one sequence of at most `length` positions, at first unwritten (NaN)."""

    def __init__(self, model: ReferenceModel, length: int) -> None:
        self.model = model
        self.mask_token_id = model.mask_token_id
        self.shift = int(model.shift)
        self.shape = shape_of(model)
        self.layers = [layer_of(model, n) for n in range(self.shape.num_layers)]
        self.cos, self.sin = rotation(length, self.shape.head_dim, model.config["rope_theta"])
        kept = (self.shape.num_layers, self.shape.num_kv_heads, length, self.shape.head_dim)
        dtype = self.layers[0].q.dtype
        self.keys = torch.full(kept, torch.nan, dtype=dtype)
        self.values = torch.full(kept, torch.nan, dtype=dtype)

    @torch.inference_mode()
    def logits_for_positions(self, ids: Tensor, start: int, end: int, allowed: Tensor | int) -> Tensor:
        """Float32 logits [end - start, vocabulary] that predict positions [start, end) of ids.

        A shifted model is run from one position earlier, whose row predicts `start`. `allowed`: the number of keys
        every query sees, or [ids, ids] bool, True where a query sees a key.
        """
        begin = start - self.shift
        assert begin >= 0, "a shifted model has no row that predicts position 0"
        return self.forward(ids, begin, end, allowed)[: end - start]

    @torch.inference_mode()
    def forward(self, ids: Tensor, start: int, end: int, allowed: Tensor | int) -> Tensor:
        """The model's own logits [end - start, vocabulary]; keys and values of [start, end) are overwritten first."""
        if isinstance(allowed, int):
            visible, hidden = allowed, None
        else:
            visible, hidden = allowed.shape[1], ~allowed[start:end]
        model, shape, eps = self.model, self.shape, self.model.config["rms_norm_eps"]
        cos, sin = self.cos[start:end], self.sin[start:end]
        h = embedding_of(model)[ids[start:end]]
        for n, layer in enumerate(self.layers):
            x = rms_norm(h, layer.norm, eps)
            q, k, v = (x @ weight.T for weight in (layer.q, layer.k, layer.v))
            if layer.bias:
                q, k, v = q + layer.bias["q"], k + layer.bias["k"], v + layer.bias["v"]
            self.keys[n, :, start:end] = rotate(split_heads(k, shape.num_kv_heads), cos, sin)
            self.values[n, :, start:end] = split_heads(v, shape.num_kv_heads)
            q = rotate(split_heads(q, shape.num_heads), cos, sin)
            h = h + attend(q, self.keys[n, :, :visible], self.values[n, :, :visible], hidden) @ layer.out.T
            x = rms_norm(h, layer.mlp_norm, eps)
            h = h + (F.silu(x @ layer.gate.T) * (x @ layer.up.T)) @ layer.down.T
        return rms_norm(h, final_norm_of(model), eps) @ head_of(model).T


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """[rows, heads * head_dim] of queries [heads, rows, head_dim]; `hidden` [rows, keys]: True where a key is not seen.

    A key nobody has written yet is NaN, and so is all that sees it; what is hidden is cut out instead of added up.
    """
    k = k.repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    v = v.repeat_interleave(q.shape[0] // v.shape[0], dim=0)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
        v = v.masked_fill(hidden.all(dim=0)[:, None], 0.0)
    return (torch.softmax(scores, dim=-1) @ v).transpose(0, 1).flatten(-2)


# ---- the two families' names


def shape_of(model: ReferenceModel) -> Shape:
    config = model.config
    if isinstance(model, Dream):
        heads, size = config["num_attention_heads"], config["hidden_size"]
        return Shape(config["num_hidden_layers"], heads, config["num_key_value_heads"], size // heads)
    return Shape(config["n_layers"], config["n_heads"], config["n_kv_heads"], config["d_model"] // config["n_heads"])


TENSORS = {  # of a layer: LLaDA's name, Dream's name
    "norm": ("attn_norm", "input_layernorm"),
    "q": ("q_proj", "self_attn.q_proj"),
    "k": ("k_proj", "self_attn.k_proj"),
    "v": ("v_proj", "self_attn.v_proj"),
    "out": ("attn_out", "self_attn.o_proj"),
    "mlp_norm": ("ff_norm", "post_attention_layernorm"),
    "gate": ("ff_proj", "mlp.gate_proj"),
    "up": ("up_proj", "mlp.up_proj"),
    "down": ("ff_out", "mlp.down_proj"),
}


def layer_of(model: ReferenceModel, n: int) -> Layer:
    is_dream = isinstance(model, Dream)
    layer = f"model.layers.{n}" if is_dream else f"model.transformer.blocks.{n}"
    weights = {field: model.weight(f"{layer}.{names[is_dream]}.weight") for field, names in TENSORS.items()}
    bias = {name: model.weight(f"{layer}.self_attn.{name}_proj.bias") for name in "qkv"} if is_dream else {}
    return Layer(**weights, bias=bias)


def embedding_of(model: ReferenceModel) -> Tensor:
    return model.weight("model.embed_tokens.weight" if isinstance(model, Dream) else "model.transformer.wte.weight")


def final_norm_of(model: ReferenceModel) -> Tensor:
    return model.weight("model.norm.weight" if isinstance(model, Dream) else "model.transformer.ln_f.weight")


def head_of(model: ReferenceModel) -> Tensor:
    if isinstance(model, Dream):
        return embedding_of(model) if model.config["tie_word_embeddings"] else model.weight("lm_head.weight")
    return embedding_of(model) if model.config["weight_tying"] else model.weight("model.transformer.ff_out.weight")
