"""Trains tiny-d2f, a Dream-format checkpoint for discrete diffusion forcing, as its training does it.

    python tools/train_tiny_d2f.py --init FOLDER_OF_TINY_DREAM --out /tmp/tiny-d2f

It goes on from tiny-dream, whose format, tokenizer and questions it keeps (tools/train_tiny.py). What differs is what
the model sees and what it learns from: attention is block-causal after the prompt, and a block is masked at least as
much as the one before it, so that the model completes a block while the blocks before it are still open. The weights are
complete: there is no adapter to merge.

The same command on the same machine with the same torch gives the same weights. Those in the package were made from the
package's tiny-dream by the command above on one core in 743 s (torch 2.13, CPU).
"""

import argparse
import json
import math
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_tiny import DREAM, Batch, Model, batches, load_weights, save_weights, write_dream

from dllm_plugin.checkpoints.tasks import Question, questions

BLOCK_LENGTHS = (8, 16, 32)


def block_numbers(is_canvas: Tensor, block_length: int) -> Tensor:
    """0 in the prompt, then 1 for the first block of the canvas, and so on: [rows, length]."""
    return (is_canvas.cumsum(1) + block_length - 1) // block_length


def block_causal(blocks: Tensor) -> Tensor:
    """A position sees its own block and all before it: [rows, query, key]."""
    return blocks[:, :, None] >= blocks[:, None, :]


def forcing_loss(model: Model, batch: Batch, generator: torch.Generator) -> Tensor:
    """Cross entropy of the masked canvas, weighed by 1 / t as in diffusion_loss; t grows from block to block."""
    rows, _ = batch.ids.shape
    block_length = BLOCK_LENGTHS[int(torch.randint(len(BLOCK_LENGTHS), (), generator=generator))]
    blocks = block_numbers(batch.is_canvas, block_length)
    shares = torch.rand(rows, int(blocks.max()) + 1, generator=generator)
    shares[:, 0] = 0.0
    t = shares.sort(dim=1).values.gather(1, blocks)
    masked = batch.is_canvas & (torch.rand(blocks.shape, generator=generator) < t)
    ids = batch.ids.masked_fill(masked, DREAM.token_id(DREAM.mask))
    device = model.embed.weight.device
    weights = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
    inputs = ids.to(device), masked.roll(-DREAM.shift, dims=1).to(device), block_causal(blocks).to(device)
    logits = torch.func.functional_call(model, weights, inputs)
    loss = F.cross_entropy(logits.float(), batch.ids[masked].to(device), reduction="none")
    weight = (batch.weight / t.clamp(min=0.25))[masked]
    return (loss * weight.to(device)).sum() / rows


def train(args: argparse.Namespace) -> Model:
    torch.manual_seed(args.seed)
    model = load_weights(args.init, DREAM).to(args.device).float().train()
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    generator = torch.Generator().manual_seed(args.seed + 1)
    started, losses = time.time(), []
    for step, batch in enumerate(batches(replace(DREAM, pace=10**9), args.steps, args.tokens, args.seed)):
        rate = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for optimizer, peak in zip(optimizers, (args.lr, 1e-3), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        loss = forcing_loss(model, batch, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % 100 == 0:
            mean = torch.stack(losses[-100:]).mean().item()
            print(f"step {step + 1:5d}  loss {mean:.4f}  {time.time() - started:.0f} s", flush=True)
    return model


@torch.inference_mode()
def exact_match(model: Model, asked: list[Question], canvas: int, block: int) -> float:
    """Share of right answers, one token a step, block after block, each seeing only what is before its end."""
    same_length = defaultdict(list)
    for question in asked:
        if len(question.answer) < canvas:
            same_length[len(DREAM.encode(DREAM.prompt.format(question.text)))].append(question)
    mask, device, right = DREAM.token_id(DREAM.mask), model.embed.weight.device, []
    for group in same_length.values():
        prompts = torch.tensor([DREAM.encode(DREAM.prompt.format(q.text)) for q in group], device=device)
        start = prompts.shape[1]
        ids = F.pad(prompts, (0, canvas), value=mask)
        is_canvas = torch.arange(ids.shape[1], device=device).expand(ids.shape) >= start
        visible = block_causal(block_numbers(is_canvas, block))
        for end in range(start + block, start + canvas + 1, block):
            for _ in range(block):
                confidence, token = model(ids, None, visible).roll(1, dims=1).softmax(-1).max(-1)
                confidence = confidence.masked_fill(ids != mask, -1.0)
                confidence[:, end:] = -1.0
                chosen = confidence.argmax(1, keepdim=True)
                ids.scatter_(1, chosen, token.gather(1, chosen))
        answers = [DREAM.decode_answer(row) for row in ids[:, start:].tolist()]
        right += [answer == question.answer for answer, question in zip(answers, group, strict=True)]
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, required=True, help="folder of the tiny-dream to go on from")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; made if missing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of Muon, at its highest")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a batch, about")
    parser.add_argument("--eval-questions", type=int, default=200, help="held-out questions to ask")
    args = parser.parse_args()
    torch.set_num_threads(1)  # another number sums in another order
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    write_dream(args.out)
    save_weights(args.out, DREAM, train(args))
    training_s = round(time.time() - started)
    model = load_weights(args.out, DREAM).to(args.device, torch.bfloat16)
    asked = questions("held_out", args.eval_questions, seed=1)
    match = {f"canvas 32, block {block}": exact_match(model, asked, 32, block) for block in BLOCK_LENGTHS}
    print(json.dumps({"model": "tiny-d2f", "steps": args.steps, "seed": args.seed, "device": args.device,
                      "training_s": training_s, "torch": torch.__version__, "exact_match": match}))  # fmt: skip


if __name__ == "__main__":
    main()
