"""The tiny block-diffusion models tiny-sdar and tiny-llada2: their families, layers, decoding and folder.

`tools/train_tiny_block.py` trains them.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_tiny import (
    DREAM,
    MAX_LENGTH,
    VOCAB_SIZE,
    Family,
    added_tokens_decoder,
    tensor_name,
    write_fast_vocabulary,
    write_json,
    write_qwen_vocabulary,
)

from dllm_plugin.checkpoints.tasks import Question


@dataclass(frozen=True, kw_only=True)
class BlockFamily(Family):
    """`prompt` is the text of one question, `between` what follows an answer's end of turn before the next question."""

    block_length: int
    given_system: str  # what the chat template makes of a system message
    between: str
    rotary_dim: int
    head_dim: int = 64
    experts: int = 0  # of every layer but the first; 0: no such layers
    experts_per_token: int = 0
    groups: int = 1
    groups_kept: int = 1
    expert_width: int = 0
    routed_scale: float = 1.0
    edits: bool = False


SDAR = BlockFamily(
    layers=4, kv_heads=2, qkv_bias=False, rope_theta=1000000.0, rope_in_fp32=False, norm_eps=1e-6, pace=12, shift=0,
    special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"),
    mask="<|MASK|>",
    end_of_turn="<|im_end|>",
    system="",
    given_system="<|im_start|>system\n{}<|im_end|>\n",
    prompt="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    between="\n",
    block_length=4,
    rotary_dim=64,
    tensor_names=DREAM.tensor_names | {
        "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm", "gate": "gate_proj", "up": "up_proj",
        "down": "down_proj",
    },
)  # fmt: skip

LLADA2 = BlockFamily(
    layers=4, kv_heads=2, qkv_bias=False, rope_theta=600000.0, rope_in_fp32=False, norm_eps=1e-6, pace=12, shift=0,
    special_tokens=("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mask|>", "<role>", "</role>",
                    "<|role_end|>"),
    mask="<|mask|>",
    end_of_turn="<|role_end|>",
    system="<role>SYSTEM</role>detailed thinking off<|role_end|>",
    given_system="<role>SYSTEM</role>{}\ndetailed thinking off<|role_end|>",
    prompt="<role>HUMAN</role>{}<|role_end|><role>ASSISTANT</role>",
    between="",
    block_length=8,
    rotary_dim=32,
    experts=16, experts_per_token=4, groups=4, groups_kept=2, expert_width=64, routed_scale=2.5, edits=True,
    tensor_names={
        "embed": "model.word_embeddings", "norm": "model.norm", "head": "lm_head", "layers": "model.layers",
        "attn_norm": "input_layernorm", "qkv": "attention.query_key_value", "q_norm": "attention.query_layernorm",
        "k_norm": "attention.key_layernorm", "o": "attention.dense", "mlp_norm": "post_attention_layernorm",
        "gate": "gate_proj", "up": "up_proj", "down": "down_proj", "shared": "shared_experts",
        "router": "gate.weight", "expert_bias": "gate.expert_bias",
    },
)  # fmt: skip

FAMILIES = {"tiny-sdar": SDAR, "tiny-llada2": LLADA2}


# --- the model -------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def largest(x: Tensor, count: int) -> Tensor:
    """Which entries of the last dimension are among its `count` largest."""
    return (x.unsqueeze(-2) > x.unsqueeze(-1)).sum(-1) < count


class Experts(nn.Module):
    """All experts at all positions, weighed by `share` [rows, length, expert]: at this size quicker than to pick some."""

    def __init__(self, count: int, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.empty(count, inner, width)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(count, width, inner))

    def forward(self, x: Tensor, share: Tensor) -> Tensor:
        y = F.silu(F.linear(x, self.gate.flatten(0, 1))) * F.linear(x, self.up.flatten(0, 1))
        y = (y.unflatten(-1, (share.shape[-1], -1)) * share.unsqueeze(-1)).flatten(-2)
        return y @ self.down.transpose(1, 2).flatten(0, 1)


class MixtureOfExperts(nn.Module):
    """The router of inclusionAI/LLaDA2.0-mini:modeling_llada2_moe.py: by sigmoid, in groups, balanced by a bias."""

    def __init__(self, family: BlockFamily) -> None:
        super().__init__()
        self.family = family
        self.router = nn.Parameter(torch.empty(family.experts, family.width))
        self.register_buffer("expert_bias", torch.zeros(family.experts))
        self.experts = Experts(family.experts, family.width, family.expert_width)
        self.shared = MLP(family.width, family.expert_width)

    def forward(self, x: Tensor) -> Tensor:
        family = self.family
        scores = F.linear(x.float(), self.router.float()).sigmoid()
        with torch.no_grad():
            biased = (scores + self.expert_bias).unflatten(-1, (family.groups, -1))
            best_two = (biased * largest(biased, 2)).sum(-1)
            biased = biased.masked_fill(~largest(best_two, family.groups_kept).unsqueeze(-1), -math.inf).flatten(-2)
            chosen = largest(biased, family.experts_per_token)
            self.load = chosen.float().mean((0, 1))
        scores = scores * chosen
        share = scores / (scores.sum(-1, keepdim=True) + 1e-20) * family.routed_scale
        return self.experts(x, share.to(x.dtype)) + self.shared(x)


class Layer(nn.Module):
    def __init__(self, family: BlockFamily, sparse: bool) -> None:
        super().__init__()
        self.family = family
        inner = family.heads * family.head_dim
        self.attn_norm = nn.RMSNorm(family.width, family.norm_eps)
        self.qkv = nn.Linear(family.width, inner + 2 * family.kv_heads * family.head_dim, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(family.head_dim, family.norm_eps) for _ in range(2))
        self.o = nn.Linear(inner, family.width, bias=False)
        self.mlp_norm = nn.RMSNorm(family.width, family.norm_eps)
        self.mlp = MixtureOfExperts(family) if sparse else MLP(family.width, family.mlp_width)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, kept = x.split([self.family.rotary_dim, self.family.head_dim - self.family.rotary_dim], dim=-1)
        first, second = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, kept], dim=-1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, last: int) -> Tensor:
        heads, kv_heads = self.family.heads, self.family.kv_heads
        qkv = self.qkv(self.attn_norm(x)).unflatten(-1, (-1, self.family.head_dim)).transpose(1, 2)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        q, k = self._rotate(self.q_norm(q), cos, sin), self._rotate(self.k_norm(k), cos, sin)
        k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
        x, q, visible = x[:, -last:], q[:, :, -last:], visible[:, :, -last:]
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    """Token ids [rows, length] at `position` [rows or 1, length] to logits of the last `last` positions of each row.

    A query sees the keys where `visible` [rows or 1, 1, query, key] is true, or, if it is a float, is not -inf.
    """

    def __init__(self, family: BlockFamily) -> None:
        super().__init__()
        self.family = family
        self.embed = nn.Embedding(VOCAB_SIZE, family.width)
        self.layers = nn.ModuleList(Layer(family, bool(family.experts and i)) for i in range(family.layers))
        self.norm = nn.RMSNorm(family.width, family.norm_eps)
        self.head = nn.Linear(family.width, VOCAB_SIZE, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                writes = name.endswith((".o.weight", ".down.weight", ".down"))  # to the residual stream: start small
                nn.init.normal_(parameter, std=0.02 if writes else 0.07)

    def forward(self, ids: Tensor, position: Tensor, visible: Tensor, last: int) -> Tensor:
        dtype, rotary_dim = self.head.weight.dtype, self.family.rotary_dim
        frequency = self.family.rope_theta ** -(torch.arange(0, rotary_dim, 2, device=ids.device) / rotary_dim)
        angle = (position[..., None] * frequency).repeat(1, 1, 2).unsqueeze(1)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        # The embedding as a product: so is its gradient then, which is quick and sums in a fixed order.
        x = (ids.unsqueeze(-1) == torch.arange(VOCAB_SIZE, device=ids.device)).to(dtype) @ self.embed.weight
        for layer in self.layers:
            x = layer(x, cos, sin, visible, last if layer is self.layers[-1] else x.shape[1])
        return self.head(self.norm(x))


# --- decoding, as the reference loops of the two families do it ------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Unmasks what is more probable than `threshold`, or else the most probable; rewrites what is more than `edit`."""

    threshold: float
    edit: float | None = None


RULES = {
    "tiny-sdar": {"dynamic, 0.9": Rule(0.9), "one token a step": Rule(1.0)},
    "tiny-llada2": {
        "quality, 0.7 / 0.5": Rule(0.7, 0.5), "0.7, no editing": Rule(0.7), "speed, 0.5 / 0.0": Rule(0.5, 0.0),
        "0.5, no editing": Rule(0.5), "one token a step": Rule(1.0),
    },
}  # fmt: skip
MAX_POST_STEPS = 16  # forwards of a block without masks, at most


@torch.inference_mode()
def decode(model: Model, family: BlockFamily, prompts: list[list[int]], rule: Rule, canvas: int) -> tuple[Tensor, int]:
    """Ids [prompts, length] after each prompt's own, block after block to its end of turn, and the number of forwards.

    Without a cache: attention is block-causal, so that a row's own block is not changed by what lies after it.
    """
    device, block_length, mask = model.head.weight.device, family.block_length, family.token_id(family.mask)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    length = -(-(int(starts.max()) + canvas) // block_length) * block_length
    ids = torch.full((len(prompts), length), mask, device=device)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    blocks = torch.arange(length, device=device) // block_length
    visible = (blocks[:, None] >= blocks)[None, None]
    running, forwards = torch.arange(len(prompts), device=device), 0
    block, post_steps = starts // block_length, torch.zeros_like(starts)
    while len(running):
        end = (int(block[running].max()) + 1) * block_length
        at = block[running, None] * block_length + torch.arange(block_length, device=device)
        rows, old = running[:, None], ids[running[:, None], at]
        position = torch.arange(end, device=device)[None]
        logits = model(ids[running, :end], position, visible[:, :, :end, :end], end).float()
        logits = logits.gather(1, at[..., None].expand(-1, -1, VOCAB_SIZE))
        logits[..., mask] = -math.inf
        confidence, token = logits.softmax(-1).max(-1)
        forwards += len(running)

        answer, masked = at >= starts[running, None], old == mask
        ranked = confidence.masked_fill(~masked, -1.0)
        best = torch.arange(block_length, device=device) == ranked.argmax(1, keepdim=True)
        new = torch.where(masked & ((ranked > rule.threshold) | best), token, old)
        if rule.edit is None:
            over = ~(new == mask).any(1)
        else:
            new = torch.where(answer & ~masked & (confidence > rule.edit), token, new)
            post_steps[running] += ~masked.any(1)
            over = ~masked.any(1) & ((new == old).all(1) | (post_steps[running] == MAX_POST_STEPS))
        ids[rows, at] = new
        ended = (answer & (new >= 256)).any(1) | (at[:, -1] + 1 >= starts[running] + canvas)
        block[running] += over.long()
        post_steps[running] *= ~over
        running = running[~(over & ended)]
    return ids, forwards


def ask(model: Model, family: BlockFamily, asked: list[Question], rule: Rule, canvas: int = 32) -> dict[str, float]:
    """Share of right answers to single questions and of chats of three with all three right; tokens per forward."""
    shares, tokens, forwards = {}, 0, 0
    for name, turns in ("right", 1), ("three_turns", 3):
        chats = [asked[i : i + turns] for i in range(0, len(asked) - turns + 1, turns)]
        prompts = [family.encode(family.system) for _ in chats]
        right = [True] * len(chats)
        for turn in range(turns):
            for prompt, chat in zip(prompts, chats, strict=True):
                prompt += family.encode((family.between if turn else "") + family.prompt.format(chat[turn].text))
            ids, count = decode(model, family, prompts, rule, canvas)
            for i, (prompt, row) in enumerate(zip(prompts, ids.tolist(), strict=True)):
                answer = family.decode_answer(row[len(prompt) : len(prompt) + canvas])
                right[i] &= answer == chats[i][turn].answer
                prompt += family.encode(answer + family.end_of_turn)
                tokens += len(answer) + 1
            forwards += count
        shares[name] = round(sum(right) / len(right), 4)
    return shares | {"tokens_per_forward": round(tokens / forwards, 2)}


# --- the checkpoint folder -------------------------------------------------------------------------------------------


def published(family: BlockFamily, model: Model) -> dict[str, Tensor]:
    """The tensors of a model by their names in the file: views, so that a file is read into them, too."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        place = tensor_name(family, name)
        if ".experts." in name:
            *path, matrix = place.split(".")
            tensors |= {".".join([*path, str(e), matrix, "weight"]): part for e, part in enumerate(tensor)}
        elif "qkv" in name and family is SDAR:
            parts = tensor.split([n * family.head_dim for n in (family.heads, family.kv_heads, family.kv_heads)])
            tensors |= {place.replace("qkv", f"self_attn.{x}_proj"): part for x, part in zip("qkv", parts, strict=True)}
        else:
            tensors[place] = tensor
    return tensors


def save_weights(folder: Path, family: BlockFamily, model: Model) -> None:
    tensors = {
        name: tensor.to(torch.float32 if name.endswith("expert_bias") else torch.bfloat16).contiguous().cpu()
        for name, tensor in published(family, model).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def load_weights(folder: Path, family: BlockFamily, device: str) -> Model:
    """The model as it is served: bf16, but for the experts' bias."""
    model, tensors = Model(family), load_file(folder / "model.safetensors")
    for name, tensor in published(family, model).items():
        tensor.copy_(tensors.pop(name))
    if tensors:
        raise ValueError(f"{folder} has tensors that {type(model).__name__} has not: {', '.join(tensors)}")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model.to(device).eval()


def write_sdar(folder: Path) -> None:
    eos = SDAR.token_id("<|endoftext|>")
    write_json(folder / "config.json", {
        "architectures": ["SDARForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_implementation": "flex_attention",
        "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel",
                     "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        "block_size": SDAR.block_length, "bos_token_id": eos, "eos_token_id": eos, "fuse_cross_entropy": True,
        "head_dim": SDAR.head_dim, "hidden_act": "silu", "hidden_size": SDAR.width, "initializer_range": 0.02,
        "intermediate_size": SDAR.mlp_width, "mask_token_id": SDAR.token_id(SDAR.mask),
        "max_position_embeddings": MAX_LENGTH, "max_window_layers": SDAR.layers, "model_type": "sdar",
        "num_attention_heads": SDAR.heads, "num_hidden_layers": SDAR.layers, "num_key_value_heads": SDAR.kv_heads,
        "rms_norm_eps": SDAR.norm_eps, "rope_scaling": None, "rope_theta": int(SDAR.rope_theta),
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.52.4", "use_cache": True, "use_sliding_window": False, "vocab_size": VOCAB_SIZE,
    })  # fmt: skip
    write_json(folder / "generation_config.json", {
        "bos_token_id": eos, "do_sample": True, "eos_token_id": [SDAR.token_id(SDAR.end_of_turn), eos],
        "pad_token_id": eos, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.52.4",
    })  # fmt: skip
    named = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|MASK|>"], "eos_token": "<|endoftext|>",
             "mask_token": "<|MASK|>", "pad_token": "<|endoftext|>"}  # fmt: skip
    # Qwen3's template without its parts for tools and thinking.
    template = (
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )
    tokens = added_tokens_decoder(SDAR)
    tokens[str(SDAR.token_id(SDAR.mask))]["special"] = False  # as it is published
    write_qwen_vocabulary(folder, SDAR)
    write_json(folder / "special_tokens_map.json", named)
    write_json(folder / "tokenizer_config.json", {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": tokens,
        "bos_token": None, "chat_template": template, "clean_up_tokenization_spaces": False, "errors": "replace",
        "model_max_length": MAX_LENGTH, "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    } | named)  # fmt: skip


def write_llada2(folder: Path) -> None:
    eos = LLADA2.token_id("<|endoftext|>")
    write_json(folder / "config.json", {
        "architectures": ["LLaDA2MoeModelLM"], "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
                     "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
                     "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM"},
        # of the real models, with a vocabulary of 157,184, these three are in the code only
        "block_size": LLADA2.block_length, "eos_token_id": eos, "mask_token_id": LLADA2.token_id(LLADA2.mask),
        "dtype": "bfloat16", "embedding_dropout": 0.0, "first_k_dense_replace": 1, "head_dim": LLADA2.head_dim,
        "hidden_act": "silu", "hidden_size": LLADA2.width, "initializer_range": 0.02,
        "intermediate_size": LLADA2.mlp_width, "max_position_embeddings": MAX_LENGTH,
        "max_window_layers": LLADA2.layers, "model_type": "llada2_moe", "moe_intermediate_size": LLADA2.expert_width,
        "moe_router_enable_expert_bias": True, "n_group": LLADA2.groups, "norm_head": False, "norm_softmax": False,
        "norm_topk_prob": True, "num_attention_heads": LLADA2.heads, "num_experts": LLADA2.experts,
        "num_experts_per_tok": LLADA2.experts_per_token, "num_hidden_layers": LLADA2.layers,
        "num_key_value_heads": LLADA2.kv_heads, "num_shared_experts": 1, "output_dropout": 0.0, "pad_token_id": eos,
        "partial_rotary_factor": LLADA2.rotary_dim / LLADA2.head_dim, "rms_norm_eps": LLADA2.norm_eps,
        "rope_scaling": None, "rope_theta": int(LLADA2.rope_theta), "rotary_dim": LLADA2.rotary_dim,
        "routed_scaling_factor": LLADA2.routed_scale, "router_dtype": "fp32", "score_function": "sigmoid",
        "sliding_window": 4096, "tie_word_embeddings": False, "topk_group": LLADA2.groups_kept,
        "transformers_version": "4.57.1", "use_bias": False, "use_cache": False, "use_qk_norm": True,
        "use_qkv_bias": False, "use_sliding_window": False, "using_split_qkv_in_self_attention": False,
        "vocab_size": VOCAB_SIZE,
    })  # fmt: skip
    write_json(folder / "generation_config.json", {"pad_token_id": eos, "transformers_version": "4.57.1"})
    named = {"bos_token": "<|startoftext|>", "cls_token": "[CLS]", "eos_token": "<|endoftext|>",
             "gmask_token": "[gMASK]", "mask_token": "<|mask|>", "pad_token": "<|endoftext|>"}  # fmt: skip
    # The real template without its parts for tools and thinking.
    template = (
        "{%- set given = messages[0].role == 'system' %}"
        "{{- '<role>SYSTEM</role>' + (messages[0].content + '\n' if given else '') }}"
        "{{- 'detailed thinking off<|role_end|>' }}"
        "{%- set roles = {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'} %}"
        "{%- for message in messages %}{%- if not (given and loop.first) %}"
        "{{- '<role>' + roles[message.role] + '</role>' + message.content + '<|role_end|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<role>ASSISTANT</role>' }}{%- endif %}"
    )
    write_fast_vocabulary(folder, LLADA2)
    write_json(folder / "special_tokens_map.json", named)
    write_json(folder / "tokenizer_config.json", {
        "add_bos_token": False, "add_eos_token": False, "chat_template": template,
        "clean_up_tokenization_spaces": False, "fast_tokenizer": True, "model_max_length": MAX_LENGTH,
        "tokenizer_class": "PreTrainedTokenizerFast", "trust_remote_code": True,
    } | named)  # fmt: skip
