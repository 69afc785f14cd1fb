"""Trains the two tiny checkpoints tiny-llada and tiny-dream from nothing.

    python tools/train_tiny.py --model tiny-llada --out /tmp/tiny-llada
    python tools/train_tiny.py --model tiny-dream --out /tmp/tiny-dream

The output folder has the exact format of the real model's Hugging Face repository (without its Python files): the same
config keys, tensor names, special tokens, chat template and tokenizer files, so whatever serves it serves the real one.
The model answers the questions of `dllm_plugin.checkpoints.tasks`; the exact match printed at the end is over held-out
questions, decoded by the plain loops of this file from the weights as saved (bf16).

The same command on the same machine with the same torch gives the same weights. Another number of threads, processor,
device or torch version sums in another order, and so gives other weights of about the same quality. The weights in the
package were made by the commands above, both at once on a machine with two cores: 2,939 s and 2,690 s (torch 2.13, CPU).
"""

import argparse
import json
import math
import random
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dllm_plugin.checkpoints.tasks import LONGEST, Question, draw, questions

# The first 256 ids are the single bytes, written and ordered as in every byte-level BPE vocabulary.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = _PRINTABLE + [b for b in range(256) if b not in _PRINTABLE]
BYTE_TEXT = [chr(b) if b in _PRINTABLE else chr(256 + i - len(_PRINTABLE)) for i, b in enumerate(BYTE_ORDER)]
BYTE_ID = {b: i for i, b in enumerate(BYTE_ORDER)}
VOCAB_SIZE = 320  # 256 bytes and the special tokens, padded as the real vocabularies are
MAX_LENGTH = 512


@dataclass(frozen=True)
class Family:
    """What sets one model family apart: shape, numerics, tokens and the names of its tensors."""

    layers: int
    kv_heads: int
    qkv_bias: bool
    rope_theta: float
    rope_in_fp32: bool  # LLaDA rotates in fp32; Dream rounds sin and cos to the activations' dtype first
    norm_eps: float
    pace: int  # letters by which the longest word would grow over the whole training, if it had no limit
    shift: int  # the logits of position i - shift predict token i
    special_tokens: tuple[str, ...]
    mask: str
    end_of_turn: str
    system: str  # what the chat template puts first when no system message is given
    prompt: str  # the chat template's text for one user message
    tensor_names: dict[str, str]
    width: int = 192
    heads: int = 6
    mlp_width: int = 384

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def token_id(self, token: str) -> int:
        return 256 + self.special_tokens.index(token)

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in re.split(f"({'|'.join(map(re.escape, self.special_tokens))})", text):
            ids += [self.token_id(piece)] if piece in self.special_tokens else map(BYTE_ID.get, piece.encode())
        return ids

    def decode_answer(self, ids: list[int]) -> str:
        """The text before the first special token."""
        end = next((i for i, token in enumerate(ids) if token >= 256), len(ids))
        return bytes(BYTE_ORDER[i] for i in ids[:end]).decode(errors="replace")


LLADA = Family(
    layers=4, kv_heads=6, qkv_bias=False, rope_theta=500000.0, rope_in_fp32=True, norm_eps=1e-5, pace=12, shift=0,
    special_tokens=("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mdm_mask|>", "<role>", "</role>",
                    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    mask="<|mdm_mask|>",
    end_of_turn="<|eot_id|>",
    system="",
    prompt="<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
           "<|start_header_id|>assistant<|end_header_id|>\n\n",
    tensor_names={
        "embed": "model.transformer.wte", "norm": "model.transformer.ln_f", "head": "model.transformer.ff_out",
        "layers": "model.transformer.blocks", "attn_norm": "attn_norm", "q": "q_proj", "k": "k_proj", "v": "v_proj",
        "o": "attn_out", "mlp_norm": "ff_norm", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
    },
)  # fmt: skip

DREAM = Family(
    layers=4, kv_heads=2, qkv_bias=True, rope_theta=1000000.0, rope_in_fp32=False, norm_eps=1e-6, pace=6, shift=1,
    special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"),
    mask="<|mask|>",
    end_of_turn="<|im_end|>",
    system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    prompt="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
           "<|im_start|>assistant\n",
    tensor_names={
        "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "layers": "model.layers",
        "attn_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
        "o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
)  # fmt: skip

FAMILIES = {"tiny-llada": LLADA, "tiny-dream": DREAM}


# --- the model -------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Layer(nn.Module):
    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family
        width, kv_width = family.width, family.kv_heads * family.head_dim
        self.attn_norm = RMSNorm(width, family.norm_eps)
        self.q = nn.Linear(width, width, bias=family.qkv_bias)
        self.k = nn.Linear(width, kv_width, bias=family.qkv_bias)
        self.v = nn.Linear(width, kv_width, bias=family.qkv_bias)
        self.o = nn.Linear(width, width, bias=False)
        self.mlp_norm = RMSNorm(width, family.norm_eps)
        self.gate = nn.Linear(width, family.mlp_width, bias=False)
        self.up = nn.Linear(width, family.mlp_width, bias=False)
        self.down = nn.Linear(family.mlp_width, width, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.family.head_dim)).transpose(1, 2)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        dtype = x.dtype
        if self.family.rope_in_fp32:
            x = x.float()
        else:
            cos, sin = cos.to(dtype), sin.to(dtype)
        first, second = x.chunk(2, dim=-1)
        return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, wanted: Tensor | None, visible: Tensor | None) -> Tensor:
        y = self.attn_norm(x)
        q, k, v = self._heads(self.q(y)), self._heads(self.k(y)), self._heads(self.v(y))
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        groups = self.family.heads // self.family.kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.family.head_dim)
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None], -math.inf)
        y = scores.float().softmax(-1).to(v.dtype) @ v
        y = y.transpose(1, 2).flatten(-2)
        if wanted is not None:
            x, y = x[wanted], y[wanted]
        x = x + self.o(y)
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """Token ids [rows, length] to logits, of all positions or of those where `wanted` [rows, length] is true.

    All see all, or a query the keys where `visible` [rows, query, key] is true.
    """

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, family.width)
        self.layers = nn.ModuleList(Layer(family) for _ in range(family.layers))
        self.norm = RMSNorm(family.width, family.norm_eps)
        self.head = nn.Linear(family.width, VOCAB_SIZE, bias=False)
        frequency = family.rope_theta ** -(torch.arange(0, family.head_dim, 2) / family.head_dim)
        angle = torch.outer(torch.arange(MAX_LENGTH), frequency).repeat(1, 2)
        self.rope = angle.cos(), angle.sin()  # no buffers: they stay fp32 when the model becomes bf16
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith((".o.weight", ".down.weight"))  # to the residual stream: start small
                nn.init.normal_(parameter, std=0.02 if writes else 0.07)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, wanted: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        cos, sin = (table[: ids.shape[1]].to(ids.device) for table in self.rope)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, cos, sin, wanted if layer is self.layers[-1] else None, visible)
        return self.head(self.norm(x))


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Rows of one length: a prompt, then a canvas that holds the answer, the end of turn and padding."""

    ids: Tensor  # [rows, length]
    is_canvas: Tensor  # [rows, length]
    weight: Tensor  # [rows, length]; sums to 1 over an answer and its end of turn, to 0.2 over the padding


def batches(family: Family, steps: int, tokens: int, seed: int) -> Iterator[Batch]:
    """Yields `steps` batches of about `tokens` tokens; each row's canvas is what its prompt leaves free.

    Most batches of the first three quarters leave the system message out, where there is one: it costs time and teaches
    nothing but to be ignored, which the last quarter does.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    canvases = [16, 16, 20, 24, 24, 28, 32, 32, 48, 64]
    pad = family.token_id("<|endoftext|>")
    for step in range(steps):
        with_system = torch.rand((), generator=generator) < (0.1 if step < 0.75 * steps else 0.9)
        longest = min(LONGEST, 3 + int(family.pace * step / steps))  # short words first
        prompt = family.prompt if with_system else family.prompt.removeprefix(family.system)
        length = len(family.encode(prompt.format("What is 12 plus 34?")))
        length += canvases[torch.randint(len(canvases), (), generator=generator)]
        rows = max(8, tokens // length)
        ids = torch.full((rows, length), pad)
        is_canvas = torch.zeros(rows, length, dtype=torch.bool)
        weight = torch.zeros(rows, length)
        row = 0
        while row < rows:
            question = draw(rng, "train", longest)
            start = family.encode(prompt.format(question.text))
            answer = family.encode(question.answer + family.end_of_turn)
            end = len(start) + len(answer)
            if end > length:
                continue
            ids[row, :end] = torch.tensor(start + answer)
            is_canvas[row, len(start) :] = True
            weight[row, len(start) : end] = 1 / len(answer)
            weight[row, end:] = 0.2 / max(length - end, 1)
            row += 1
        yield Batch(ids, is_canvas, weight)


def diffusion_loss(model: Model, family: Family, batch: Batch, generator: torch.Generator) -> Tensor:
    """Masks a share t of the canvas and weighs the cross entropy there by 1/t, capped."""
    rows, length = batch.ids.shape
    t = (torch.arange(rows) + torch.rand(rows, generator=generator)) / rows  # stratified draws of U(0, 1)
    t = t[torch.randperm(rows, generator=generator), None]
    masked = batch.is_canvas & (torch.rand(rows, length, generator=generator) < t)
    ids = batch.ids.masked_fill(masked, family.token_id(family.mask))
    # fp32 weights, but a forward pass in bf16 throughout: the numerics that the model is served with
    device = model.embed.weight.device
    weights = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
    logits = torch.func.functional_call(model, weights, (ids.to(device), masked.roll(-family.shift, dims=1).to(device)))
    loss = F.cross_entropy(logits.float(), batch.ids[masked].to(device), reduction="none")
    weight = (batch.weight / t.clamp(min=0.25))[masked]
    return (loss * weight.to(device)).sum() / rows


def train(family: Family, args: argparse.Namespace) -> Model:
    torch.manual_seed(args.seed)
    model = Model(family).to(args.device)
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    # On these tasks Muon needs half the steps that AdamW needs.
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / max(args.steps, 1)))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(args.seed + 1)
    started, losses = time.time(), []
    for step, batch in enumerate(batches(family, args.steps, args.tokens, args.seed), start=1):
        loss = diffusion_loss(model, family, batch, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step:5d}  loss {sum(losses[-100:]) / 100:.4f}  {time.time() - started:.0f} s", flush=True)
        if step % 500 == 0:
            save_weights(args.out, family, model)
            saved = load_weights(args.out, family).to(args.device, torch.bfloat16)
            rule = 32 if family is LLADA else "entropy"
            match = exact_match(saved, family, questions("held_out", 100, args.seed), canvas=32, rule=rule, steps=8)
            print("held out, 4 tokens a step:", "  ".join(f"{task} {share:.0%}" for task, share in match.items()))
    return model


# --- decoding, as the reference loops of the two families do it ------------------------------------------------------


def llada_decode(model: Model, family: Family, prompts: Tensor, canvas: int, block: int, steps: int) -> Tensor:
    """Fills block after block, each step the positions whose best token is the most probable; returns the canvas."""
    mask, start = family.token_id(family.mask), prompts.shape[1]
    ids = F.pad(prompts, (0, canvas), value=mask)
    steps_per_block = steps * block // canvas
    for block_end in range(start + block, start + canvas + 1, block):
        for step in range(steps_per_block):
            masked = ids == mask
            confidence, token = model(ids).softmax(-1).max(-1)
            confidence = confidence.masked_fill(~masked, -math.inf)
            confidence[:, block_end:] = -math.inf
            quota = block // steps_per_block + (step < block % steps_per_block)
            chosen = confidence.topk(quota).indices
            ids.scatter_(1, chosen, token.gather(1, chosen))
    return ids[:, start:]


def dream_decode(model: Model, family: Family, prompts: Tensor, canvas: int, alg: str, steps: int) -> Tensor:
    """Fills the canvas in any order, the most certain positions first; returns the canvas."""
    mask, start = family.token_id(family.mask), prompts.shape[1]
    ids = F.pad(prompts, (0, canvas), value=mask)
    times = torch.linspace(1, 1e-3, steps + 1)
    for step in range(steps):
        masked = ids == mask
        p = model(ids).roll(1, dims=1).softmax(-1)  # row i - 1 predicts token i; position 0 is never masked
        confidence, token = p.max(-1)
        if alg == "entropy":
            confidence = (p * torch.log(p + 1e-10)).sum(-1)
        count = int(masked[0].sum())
        if step < steps - 1:
            count = int(count * (1 - times[step + 1] / times[step]))
        chosen = confidence.masked_fill(~masked, -math.inf).topk(count).indices
        ids.scatter_(1, chosen, token.gather(1, chosen))
    return ids[:, start:]


@torch.inference_mode()
def exact_match(model: Model, family: Family, asked: list[Question], canvas: int, rule: int | str, steps: int) -> dict:
    """Share of right answers, over all questions and for each task; questions that do not fit the canvas are left out.

    `rule` is the block length (LLaDA) or the confidence (Dream).
    """
    decode = llada_decode if family is LLADA else dream_decode
    same_length = defaultdict(list)
    for question in asked:
        if len(question.answer) < canvas:
            ids = family.encode(family.prompt.format(question.text))
            same_length[len(ids)].append((ids, question))
    right = defaultdict(list)
    for group in same_length.values():
        prompts = torch.tensor([ids for ids, _ in group], device=model.embed.weight.device)
        canvases = decode(model, family, prompts, canvas, rule, steps)
        for (_, question), ids in zip(group, canvases.tolist(), strict=True):
            right[question.task].append(family.decode_answer(ids) == question.answer)
    everything = [r for rs in right.values() for r in rs]
    return {"all": sum(everything) / len(everything)} | {task: sum(r) / len(r) for task, r in sorted(right.items())}


def evaluate(folder: Path, family: Family, count: int, device: str) -> dict[str, float]:
    """Exact match of a saved checkpoint in several settings, by the name of the setting."""
    model = load_weights(folder, family).to(device, torch.bfloat16)
    asked = questions("held_out", count, seed=1)
    results = {}
    for canvas, steps in [(16, 16), (32, 32), (32, 16), (64, 64)]:
        for rule in (8, canvas) if family is LLADA else ("entropy", "maskgit_plus"):
            name = f"canvas {canvas}, {'block ' if family is LLADA else ''}{rule}, {steps} steps"
            match = exact_match(model, family, asked, canvas, rule, steps)
            print(f"{name:36}", "  ".join(f"{task} {share:.1%}" for task, share in match.items()), flush=True)
            results[name] = match["all"]
    return results


# --- the checkpoint folder -------------------------------------------------------------------------------------------


def tensor_name(family: Family, name: str) -> str:
    return ".".join(family.tensor_names.get(part, part) for part in name.split("."))


def save_weights(folder: Path, family: Family, model: Model) -> None:
    tensors = {tensor_name(family, n): p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def load_weights(folder: Path, family: Family) -> Model:
    model, tensors = Model(family), load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensors[tensor_name(family, name)] for name in model.state_dict()})
    return model.eval()


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def added_token(family: Family, token: str) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": family.token_id(token), "content": token} | flags | {"special": True}


def added_tokens_decoder(family: Family) -> dict:
    tokens = [added_token(family, token) for token in family.special_tokens]
    return {str(token.pop("id")): token for token in tokens}


def write_fast_vocabulary(folder: Path, family: Family) -> None:
    """One file, as PreTrainedTokenizerFast loads it."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added_token(family, token) for token in family.special_tokens],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {text: i for i, text in enumerate(BYTE_TEXT)}, "merges": []},
    })  # fmt: skip


def write_qwen_vocabulary(folder: Path, family: Family) -> None:
    """Three files, as Qwen2Tokenizer loads them."""
    write_json(folder / "vocab.json", {text: i for i, text in enumerate(BYTE_TEXT)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    write_json(folder / "added_tokens.json", {token: family.token_id(token) for token in family.special_tokens})


def write_llada(folder: Path) -> None:
    eos, mask = LLADA.token_id("<|endoftext|>"), LLADA.token_id(LLADA.mask)
    config = {
        "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig",
                     "AutoModel": "modeling_llada.LLaDAModelLM",
                     "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
        "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": LLADA.width,
        "embedding_dropout": 0.0, "embedding_size": VOCAB_SIZE, "eos_token_id": eos, "flash_attention": False,
        "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
        "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
        "layer_norm_with_affine": True, "mask_token_id": mask, "max_sequence_length": MAX_LENGTH,
        "mlp_hidden_size": LLADA.mlp_width, "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None,
        "n_heads": LLADA.heads, "n_kv_heads": LLADA.kv_heads, "n_layers": LLADA.layers, "pad_token_id": eos,
        "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": LLADA.norm_eps, "rope": True,
        "rope_full_precision": True, "rope_theta": LLADA.rope_theta, "scale_logits": False,
        "transformers_version": "4.46.3", "use_cache": False, "vocab_size": VOCAB_SIZE, "weight_tying": False,
    }  # fmt: skip
    generation = {"eos_token_id": eos, "pad_token_id": eos, "transformers_version": "4.46.3"}
    named = {"bos_token": "<|startoftext|>", "cls_token": "[CLS]", "eos_token": "<|endoftext|>",
             "gmask_token": "[gMASK]", "pad_token": "<|endoftext|>"}  # fmt: skip
    # Like the real template, it always ends with the assistant's header.
    template = (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    )
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    write_fast_vocabulary(folder, LLADA)
    write_json(folder / "special_tokens_map.json", named)
    write_json(folder / "tokenizer_config.json", {
        "add_bos_token": False, "add_eos_token": False, "chat_template": template,
        "clean_up_tokenization_spaces": False, "fast_tokenizer": True, "merges_file": None,
        "model_max_length": int(1e30), "tokenizer_class": "PreTrainedTokenizerFast", "trust_remote_code": True,
    } | named)  # fmt: skip


def write_dream(folder: Path) -> None:
    eos, mask = DREAM.token_id("<|endoftext|>"), DREAM.token_id(DREAM.mask)
    ends = {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
    config = {
        "architectures": ["DreamModel"], "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "hidden_act": "silu", "hidden_size": DREAM.width, "initializer_range": 0.02,
        "intermediate_size": DREAM.mlp_width, "mask_token_id": mask, "max_position_embeddings": MAX_LENGTH,
        "max_window_layers": DREAM.layers, "model_type": "Dream", "num_attention_heads": DREAM.heads,
        "num_hidden_layers": DREAM.layers, "num_key_value_heads": DREAM.kv_heads, "rms_norm_eps": DREAM.norm_eps,
        "rope_scaling": None, "rope_theta": DREAM.rope_theta, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.46.2", "use_cache": True, "use_mrope": False,
        "use_sliding_window": False, "vocab_size": VOCAB_SIZE,
    }  # fmt: skip
    generation = {
        "_from_model_config": True, "alg": "origin", "alg_temp": None, "eps": 0.001, "mask_token_id": None,
        "output_history": False, "return_dict_in_generate": False, "steps": 512, "temperature": 0.0, "top_k": None,
        "top_p": None, "transformers_version": "4.46.2",
    }  # fmt: skip
    named = {"bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>",
             "pad_token": "<|endoftext|>"}  # fmt: skip
    also_special = ["<|im_start|>", "<|im_end|>"]
    # The real template without its part for tools.
    template = (
        "{%- if messages[0]['role'] == 'system' %}"
        "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
        "{%- else %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
        "{%- for message in messages %}{%- if not (message.role == 'system' and loop.first) %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )
    write_json(folder / "config.json", config | ends)
    write_json(folder / "generation_config.json", generation | ends)
    write_qwen_vocabulary(folder, DREAM)
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": also_special} | named)
    write_json(folder / "tokenizer_config.json", {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added_tokens_decoder(DREAM),
        "additional_special_tokens": also_special,
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}, "chat_template": template,
        "clean_up_tokenization_spaces": False, "errors": "replace", "model_max_length": MAX_LENGTH,
        "split_special_tokens": False, "tokenizer_class": "DreamTokenizer", "unk_token": None,
    } | named)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=FAMILIES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; made if missing")
    parser.add_argument("--device", default="cpu", help="cuda is quicker, and gives other weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="another number gives slightly different weights")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps; 0 writes random weights")
    parser.add_argument("--lr", type=float, default=4e-3, help="learning rate of Muon, at its highest")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a batch, about")
    parser.add_argument("--eval-questions", type=int, default=200, help="held-out questions to ask; 0 asks none")
    parser.add_argument("--eval-only", action="store_true", help="only ask the checkpoint that is in --out already")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time; nothing here reads such memory

    family = FAMILIES[args.model]
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    if not args.eval_only:
        write_llada(args.out) if family is LLADA else write_dream(args.out)
        save_weights(args.out, family, train(family, args))
    training_s = round(time.time() - started)
    results = evaluate(args.out, family, args.eval_questions, args.device) if args.eval_questions else {}
    print(json.dumps({"model": args.model, "seed": args.seed, "steps": args.steps, "threads": args.threads,
                      "training_s": training_s, "torch": torch.__version__, "exact_match": results}))  # fmt: skip


if __name__ == "__main__":
    main()
