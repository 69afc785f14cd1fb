"""Trains the two tiny block-diffusion checkpoints tiny-sdar and tiny-llada2 from nothing.

    python tools/train_tiny_block.py --model tiny-sdar --out /tmp/tiny-sdar --device cuda --steps 4000
    python tools/train_tiny_block.py --model tiny-llada2 --out /tmp/tiny-llada2 --device cuda --steps 600

The output folder has the exact format of the real model's Hugging Face repository (without its Python files), and the
model answers the questions of `dllm_plugin.checkpoints.tasks`, in chats of several turns as well. tiny-llada2 has also
learnt to edit: it names the right token at every place of a block, whatever stands there.

A row of training is a clean stream, in which a position sees its block and those before it, and a noised stream of single
blocks, each of which sees itself and the clean blocks before it (the mask of kuleshov-group/bd3lms:models/dit.py). A block
of an answer is noised several times over, so that the clean stream, which has no loss of its own, is not computed for one.

The same command on the same machine with the same torch gives the same weights. Those in the package were made by the commands
above on one H200 (torch 2.11): in 181 s, beside another training, and in 18 s. tiny-llada2 is trained for so short a time
because later it needs no editing: of 1,000 held-out questions speed mode answers 998 without editing, and all with it.
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_block import (
    FAMILIES,
    RULES,
    SDAR,
    BlockFamily,
    MixtureOfExperts,
    Model,
    ask,
    load_weights,
    save_weights,
    write_llada2,
    write_sdar,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from train_tiny import MAX_LENGTH

from dllm_plugin.checkpoints.tasks import LONGEST, draw, questions

# --- what it learns from ---------------------------------------------------------------------------------------------


def conversation(family: BlockFamily, rng: random.Random, longest: int) -> list[tuple[list[int], list[int]]]:
    """Turns of prompt and answer, the latter with its end of turn, as the chat template joins them."""
    system = family.system
    if rng.random() < 0.1:
        words = ("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9))) for _ in range(5))
        system = family.given_system.format(rng.choice(["You are a helpful assistant.", " ".join(words)]))
    turns = []
    for turn in range(rng.choices((1, 2, 3, 8), (50, 20, 25, 5))[0]):
        question = draw(rng, "train", longest)
        start = (family.between if turn else system) + family.prompt.format(question.text)
        turns.append((family.encode(start), family.encode(question.answer + family.end_of_turn)))
    return turns


class Batches(Dataset):
    """One batch a step, each drawn from the seed and its own number, so that any number of workers gives the same.

    A batch holds, for each row, the clean stream, then the noised stream, half of the row each, in int16 unless said:
    `ids`, `position`, `chat` (0: padding), `block`, `group` (0: clean, else the number of the noised block): [rows, 2 *
    MAX_LENGTH]. Of the noised stream alone: `drawn` (bool), masks that the model fills before it learns; `target`;
    `weight` (fp32): [rows, MAX_LENGTH].
    """

    def __init__(self, family: BlockFamily, steps: int, tokens: int, seed: int) -> None:
        self.family, self.steps, self.seed = family, steps, seed
        self.rows = max(1, tokens // (2 * MAX_LENGTH))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        family, block_length, rows = self.family, self.family.block_length, self.rows
        rng, noise = random.Random(f"{self.seed} {step}"), np.random.default_rng((self.seed, step))
        longest = min(LONGEST, 3 + int(family.pace * step / max(self.steps, 1)))  # short words first
        ids = np.full((rows, MAX_LENGTH), family.token_id("<|endoftext|>"), np.int16)
        target, chat, weight = ids.copy(), np.zeros_like(ids), np.zeros(ids.shape, np.float32)
        for row in range(rows):
            self._fill(ids[row], target[row], chat[row], weight[row], rng, longest)
        position = np.broadcast_to(np.arange(MAX_LENGTH, dtype=np.int16), ids.shape)

        answers = (weight > 0).reshape(rows, -1, block_length).any(-1)
        count = MAX_LENGTH // block_length
        blocks = np.stack([np.resize(noise.permutation(np.flatnonzero(row)), count) for row in answers])
        place = (blocks[..., None] * block_length + np.arange(block_length)).reshape(rows, MAX_LENGTH)
        target, chosen_chat, weight = (np.take_along_axis(a, place, 1) for a in (target, chat, weight))
        group = np.broadcast_to(1 + np.arange(MAX_LENGTH) // block_length, ids.shape)
        noised, drawn, weight = self._noise(target, weight, noise)
        whole = {
            "ids": (ids, noised), "position": (position, place), "chat": (chat, chosen_chat),
            "block": (position // block_length, place // block_length), "group": (np.zeros_like(ids), group),
        }  # fmt: skip
        arrays = {name: np.concatenate(pair, axis=1).astype(np.int16) for name, pair in whole.items()}
        arrays |= {"drawn": drawn, "target": target.astype(np.int16), "weight": weight.astype(np.float32)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _fill(self, ids, target, chat, weight, rng: random.Random, longest: int) -> None:
        """Lays chats into a row, each from a block's start on.

        `target` is what the model would say: after an answer, where `ids` goes on with the next question, EOS.
        """
        block_length, at, number = self.family.block_length, 0, 0
        while True:
            turns = conversation(self.family, rng, longest)
            while sum(len(prompt) + len(answer) for prompt, answer in turns) > len(ids) - at:
                turns.pop()
            if not turns:
                return
            begin, number = at, number + 1
            for prompt, answer in turns:
                start, end = at + len(prompt), at + len(prompt) + len(answer)
                ids[at:end], weight[start:end] = prompt + answer, 1.0
                shared = start - start % block_length  # the prompt's tail is in the block of the first masks
                target[shared:end] = ids[shared:end]
                at = end
                weight[end : -(-end // block_length) * block_length] = 0.2
            at = min(len(ids), (-(-at // block_length) + rng.choices((0, 1, 2), (70, 20, 10))[0]) * block_length)
            weight[end:at] = 0.2
            chat[begin:at] = number

    def _noise(self, target, weight, noise: np.random.Generator):
        """Masks of each block a number drawn evenly, and so in proportion to a share t; weighs them by 1/t, capped.

        Where a family edits, some of the masks are to be drawn by the model, and some of the other tokens are wrong.
        """
        edits, block_length = self.family.edits, self.family.block_length
        free = (weight > 0).reshape(len(target), -1, block_length)
        size = free.sum(-1, keepdims=True)
        order = np.where(free, noise.random(free.shape), 2.0).argsort(-1).argsort(-1)
        masks = np.floor(noise.random(size.shape) * (size + edits)) + (not edits)
        if edits:
            left = np.where(noise.random(size.shape) < 0.5, np.floor(noise.random(size.shape) * (masks + 1)), masks)
        else:
            left = masks
        masked, kept = ((order < count).reshape(target.shape) for count in (masks, left))
        noised = np.where(masked, self.family.token_id(self.family.mask), target)
        share = np.minimum(size / np.maximum(left, 1), 4.0).repeat(block_length, -1).reshape(target.shape)
        factor = np.where(kept, share, 0.0)
        if edits:
            rate = (noise.random(size.shape) < 0.5) * noise.random(size.shape) * 0.6
            wrong = (free & (noise.random(free.shape) < rate)).reshape(target.shape) & ~masked
            others = [noise.integers(0, 256, target.shape), noise.permuted(target, axis=1),
                      np.roll(target, 1, axis=1), np.roll(target, -1, axis=1)]  # fmt: skip
            noised = np.where(wrong, np.choose(noise.integers(0, len(others), target.shape), others), noised)
            factor = np.where(kept, factor, np.where(masked | wrong, 1.0, 0.3))
        return noised, masked & ~kept, weight * factor


# --- training --------------------------------------------------------------------------------------------------------


def orthogonal(x: Tensor) -> Tensor:
    """The nearest orthogonal matrices [n, rows, columns], about, by the Newton-Schulz iteration of torch.optim.Muon."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonal(x.mT).mT
    x = x.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon(adjust_lr_fn="match_rms_adamw") for stacks of matrices, all of one shape at once.

    The rate is a tensor, so that a recorded step reads it anew.
    """

    def __init__(self, params: list[nn.Parameter], lr: Tensor, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.stacks: dict[torch.Size, list[nn.Parameter]] = {}
        for p in params:
            self.stacks.setdefault(p.shape[-2:], []).append(p)
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for (rows, columns), params in self.stacks.items():
            updates = []
            for p in params:
                momentum = self.state[p]["momentum_buffer"]
                momentum.lerp_(p.grad, 0.05)
                updates.append(p.grad.lerp(momentum, 0.95).view(-1, rows, columns))
            update = orthogonal(torch.cat(updates)).float() * (0.2 * math.sqrt(max(rows, columns)) * group["lr"])
            for p, u in zip(params, update.split([len(u) for u in updates]), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u.view_as(p))


def visibility(batch: dict[str, Tensor]) -> Tensor:
    """0 where a query sees a key, else -inf: [rows, 1, query, key], bf16."""
    chat, block, group = batch["chat"], batch["block"], batch["group"]
    query, key = (..., None), (slice(None), None)
    before = (block[key] < block[query]) | ((block[key] == block[query]) & (group[query] == 0))
    visible = (chat[query] == chat[key]) & (group[key] == 0) & before
    visible |= (group[query] == group[key]) & (group[key] > 0)
    bias = torch.zeros(visible.shape, dtype=torch.bfloat16, device=chat.device)
    return bias.masked_fill(~visible, -math.inf).unsqueeze(1)


def block_loss(model: Model, family: BlockFamily, batch: dict[str, Tensor]) -> Tensor:
    visible = visibility(batch)
    # fp32 weights, but a forward pass in bf16 throughout: the numerics that the model is served with
    weights = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}

    def logits(ids: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (ids, batch["position"], visible, MAX_LENGTH)).float()

    ids = batch["ids"]
    if family.edits:
        with torch.no_grad():  # its own tokens, as it would draw them, are the errors that it has to mend
            p = logits(ids).softmax(-1)
            own = (p / torch.empty_like(p).exponential_()).argmax(-1)
        clean, noised = ids.chunk(2, dim=1)
        ids = torch.cat([clean, torch.where(batch["drawn"], own.to(noised.dtype), noised)], dim=1)
    loss = F.cross_entropy(logits(ids).flatten(0, 1), batch["target"].flatten().long(), reduction="none")
    return (loss * batch["weight"].flatten()).sum() / batch["weight"].sum()


class Step:
    """A step of training. On CUDA it is recorded once and then replayed: its kernels are shorter than their launches."""

    def __init__(self, family: BlockFamily, args: argparse.Namespace, like: dict[str, Tensor]) -> None:
        torch.manual_seed(args.seed)
        self.family, self.model, self.args = family, Model(family).to(args.device), args
        self.batch = {name: tensor.to(args.device) for name, tensor in like.items()}
        on_cuda = args.device.startswith("cuda")
        self.records = on_cuda and not args.no_graph
        self.rates = [torch.zeros((), device=args.device) for _ in range(2)]
        self.loss = torch.zeros((), device=args.device)
        self.mixtures = [m for m in self.model.modules() if isinstance(m, MixtureOfExperts)]
        matrices = [p for name, p in self.model.layers.named_parameters() if p.dim() >= 2 and "router" not in name]
        others = [p for p in self.model.parameters() if all(p is not m for m in matrices)]
        self.optimizers = [
            Muon(matrices, self.rates[0], weight_decay=0.01),
            torch.optim.AdamW(others, self.rates[1], betas=(0.9, 0.98), weight_decay=0.0, capturable=on_cuda),
        ]
        self.taken, self.graph = 0, None
        self.stream = torch.cuda.Stream() if self.records else None

    def _run(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = block_loss(self.model, self.family, self.batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        for mixture in self.mixtures:  # towards an equal load; slower at the end, with the rate
            surplus = mixture.load - mixture.load.mean()
            mixture.expert_bias -= surplus.sign() * self.rates[0] / self.args.lr * 1e-3
        self.loss += loss.detach()

    def __call__(self, batch: dict[str, Tensor], rate: float) -> None:
        for name, tensor in self.batch.items():
            tensor.copy_(batch[name])
        for tensor, peak in zip(self.rates, (self.args.lr, 2e-3), strict=True):
            tensor.fill_(peak * rate)
        self.taken += 1
        if not self.records:
            self._run()
        elif self.taken <= 3:  # what is allocated once has to be, before the recording
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self._run()
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self._run()
            self.graph.replay()


def steps_within(minutes: float, family: BlockFamily, args: argparse.Namespace) -> int:
    """How many steps take so long, by the time of a few that are then forgotten."""
    batch = Batches(family, 1, args.tokens, args.seed)[0]
    step = Step(family, args, batch)
    for number in range(25):
        if number == 5:
            step.loss.item()  # waits for the device
            started = time.time()
        step(batch, 0.0)
    step.loss.item()
    return int(60 * minutes / ((time.time() - started) / 20))


def train(family: BlockFamily, args: argparse.Namespace) -> Model:
    batches = Batches(family, args.steps, args.tokens, args.seed)
    # Without pinned memory: the thread that pins would disturb the recording of a step.
    ahead = 4 if args.workers else None
    loader = DataLoader(batches, batch_size=None, num_workers=args.workers, prefetch_factor=ahead)
    step = Step(family, args, batches[0])
    started = time.time()
    for number, batch in enumerate(loader, start=1):
        step(batch, min(1.0, number / 100) * 0.5 * (1 + math.cos(math.pi * number / args.steps)))
        if number % 100 == 0:
            loss, seconds = step.loss.item() / 100, time.time() - started
            step.loss.zero_()
            left = seconds / number * (args.steps - number)
            print(f"step {number:5d}  loss {loss:.4f}  {seconds:.0f} s, {left:.0f} s to go", flush=True)
        if number % 500 == 0 and number < args.steps:
            save_weights(args.out, family, step.model)
            if number % 1000 == 0 and args.eval_questions:
                asked = questions("held_out", min(100, args.eval_questions), args.seed)
                name, rule = next(iter(RULES[args.model].items()))
                print(f"held out, {name}:", ask(load_weights(args.out, family, args.device), family, asked, rule))
    return step.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=FAMILIES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; made if missing")
    parser.add_argument("--device", default="cpu", help="cuda is quicker, and gives other weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10000, help="optimizer steps; 0 writes random weights")
    parser.add_argument("--minutes", type=float, help="as many steps as take so long, instead of --steps")
    parser.add_argument("--lr", type=float, default=4e-3, help="learning rate of Muon, at its highest")
    parser.add_argument("--tokens", type=int, default=32768, help="positions of a batch, both streams")
    parser.add_argument("--workers", type=int, default=min(12, max(1, (os.cpu_count() or 1) - 2)),
                        help="processes that draw batches; with any number the same ones")  # fmt: skip
    parser.add_argument("--no-graph", action="store_true", help="launch each kernel of each step, also on CUDA")
    parser.add_argument("--eval-questions", type=int, default=200, help="held-out questions to ask; 0 asks none")
    parser.add_argument("--eval-only", action="store_true", help="only ask the checkpoint that is in --out already")
    args = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, its products are not deterministic
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time; nothing here reads such memory
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_num_threads(1)  # on a CPU another number sums in another order

    family = FAMILIES[args.model]
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    if not args.eval_only:
        args.steps = steps_within(args.minutes, family, args) if args.minutes else args.steps
        write_sdar(args.out) if family is SDAR else write_llada2(args.out)
        save_weights(args.out, family, train(family, args))
    training_s, results = round(time.time() - started), {}
    if args.eval_questions:
        model, asked = load_weights(args.out, family, args.device), questions("held_out", args.eval_questions, seed=1)
        results = {name: ask(model, family, asked, rule) for name, rule in RULES[args.model].items()}
    print(json.dumps({"model": args.model, "seed": args.seed, "steps": args.steps, "device": args.device,
                      "training_s": training_s, "torch": torch.__version__, "exact_match": results}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
