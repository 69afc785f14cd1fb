"""Requests to the strategy `block` that engine and `reference/block.py` both understand."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from reference import block, decoding
from reference.block import HOLE
from reference.block_models import block_causal
from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from support.cases import Noise, ReferenceCase, expected, random_prompt
from support.checkpoints import TURN_END, block_reference

SEED = 77
PRESETS = {  # the modes of LLaDA2.1
    "quality": {"threshold": 0.7, "edit_threshold": 0.5},
    "speed": {"threshold": 0.5, "edit_threshold": 0.0},
}


@dataclass(frozen=True)
class BlockCase(ReferenceCase):
    """One request to a block-diffusion model.

    ``extras``: its diffusion_* parameters without the prefix. ``sampling``: vLLM's own, such as temperature and top_k.
    ``stops``: token ids that end it. ``cut``: its last block ends with the answer, because the model's length does.
    """

    checkpoint: str
    tokens: int
    prompt: int | tuple[int, ...]
    extras: dict[str, Any] = field(default_factory=dict, hash=False)
    sampling: dict[str, Any] = field(default_factory=dict, hash=False)
    eos: bool = False
    stops: tuple[int, ...] = ()
    cut: bool = False
    seed: int = SEED
    note: str = ""

    @property
    def id(self) -> str:
        prompt = self.prompt if isinstance(self.prompt, int) else f"of{len(self.prompt)}"
        parts = [self.checkpoint, f"{self.tokens}tokens", f"prompt{prompt}"]
        for name, value in (self.extras | self.sampling).items():
            text = "".join("?" if t == HOLE else "x" for t in value) if name == "template" else value
            parts.append(f"{name}={text}")
        parts += [f"stops{len(self.stops)}"] if self.stops else []
        parts += [f"seed{self.seed}"] if self.seed != SEED else []
        return "-".join([*parts, *["until-eos"] * self.eos, *["cut"] * self.cut, *[self.note] * bool(self.note)])

    @property
    def block_length(self) -> int:
        return self.extras.get("block_length", block_reference(self.checkpoint).block_length)

    @property
    def prompt_ids(self) -> list[int]:
        if isinstance(self.prompt, tuple):
            return list(self.prompt)
        return random_prompt(self.prompt, f"{self.checkpoint} {self.prompt} {self.note}")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        # generation_config.json names the end of turn beside EOS
        return (*self.stops, *((block_reference(self.checkpoint).eos_token_id, TURN_END) if self.eos else ()))

    @property
    def sampling_params(self) -> SamplingParams:
        return SamplingParams(
            **{"temperature": 0.0} | self.sampling,
            max_tokens=self.tokens,
            ignore_eos=not self.eos,
            stop_token_ids=list(self.stops),
            seed=self.seed,
            detokenize=False,
            extra_args={f"diffusion_{name}": value for name, value in self.extras.items()},
        )

    @property
    def unwatched(self) -> tuple[list[int], SamplingParams]:
        """The request of somebody who wants no token before the last one."""
        prompt, params = self.request
        params.output_kind = RequestOutputKind.FINAL_ONLY
        return prompt, params

    def expected(self) -> decoding.Generation:
        """What the reference decoder generates."""
        settings = PRESETS.get(self.extras.get("preset", ""), {}) | self.extras
        cap = settings.pop("max_steps", None)
        for ours in ("preset", "canvas_length", "block_length"):
            settings.pop(ours, None)
        if "block_steps" in settings:
            settings["steps_per_block"] = settings.pop("block_steps")
        if "entropy_bound" in settings:
            settings.setdefault("remasking", "entropy")
        model = block_reference(self.checkpoint)
        noise = Noise(self.seed, 0, model.vocab_size)  # the reference has absolute positions
        if model.shift:
            generate = block.generate_fast_dllm_v2
        else:
            generate = block.generate
            settings |= {
                "shorten_last_block": self.cut,
                "position_gumbel": noise.position_gumbel,
                "uniforms": noise.uniforms,
            }
        whole = generate(
            model,
            self.prompt_ids,
            self.tokens,
            block_length=self.block_length,
            stop_ids=self.stop_ids,
            gumbel=noise.gumbel,
            **settings,
            **self.sampling,
        )
        return whole if cap is None or whole.num_forwards < cap else self._capped(whole, cap)

    def _capped(self, whole: decoding.Generation, cap: int) -> decoding.Generation:
        """Its first passes, the last of which takes a token for each mask of its block and replaces none."""
        model, prompt = block_reference(self.checkpoint), self.prompt_ids
        template = self.extras.get("template")
        end = len(prompt) + self.tokens
        end = end if self.cut else -(-end // self.block_length) * self.block_length
        text = block.Text(prompt, self.tokens, end, model.mask_token_id, self.stop_ids, template)
        block_of = [number for number, _ in self._passes(whole)[:cap]]
        for commit in whole.trace[: cap - 1]:
            text.commit(torch.tensor(commit.positions, dtype=torch.long) + len(prompt), torch.tensor(commit.tokens))
        start = block_of[-1] * self.block_length
        end = min(start + self.block_length, end)
        rows = start + text.masked[start:end].nonzero()[:, 0]
        logits = model.logits(text.ids[:end], block_causal(end, self.block_length))[rows]
        noise = Noise(self.seed, 0, model.vocab_size).gumbel(block_of.count(block_of[-1]) - 1, rows)
        *_, chosen = block.sample(logits, model.mask_token_id, noise=noise, **self.sampling)
        text.commit(rows, chosen)
        return text.result()

    def num_chunks(self, budget: int, num_cached: int = 0) -> int:
        """Passes that write what a step of so many tokens cannot hold beside the open block.

        They forward whole blocks, as many as fit and one at least, from the position on whose keys are not cached.
        """
        number, before, length = 0, None, self.block_length
        for open_block, changes in self._passes(expected(self)):
            if open_block != before:
                start, end = open_block * length, open_block * length + length
                while num_cached < start and end - num_cached > budget:
                    first_end = num_cached // length * length + length
                    num_cached = min(start, max((num_cached + budget) // length * length, first_end))
                    number += 1
                num_cached, before = start, open_block
            if not changes:  # the keys of this very pass are final
                num_cached = end
        return number

    def _passes(self, generation: decoding.Generation) -> list[tuple[int, list[int]]]:
        """Of each pass its block and the positions that it changed."""
        passes: list[tuple[int, list[int]]] = []
        for commit in generation.trace:
            if commit.positions:
                number = (len(self.prompt_ids) + commit.positions[0]) // self.block_length
            passes.append((number, commit.positions))  # one that changes nothing is of the block of the one before it
        return passes


def grid(
    checkpoint: str, shapes: Sequence[tuple[int, int, dict[str, Any]]], *kinds: dict[str, Any], **more: Any
) -> list[BlockCase]:
    """Every shape (tokens, prompt length, extras) with every kind of request."""
    return [
        BlockCase(checkpoint, tokens, prompt, kind | extras, **more)
        for kind in kinds
        for tokens, prompt, extras in shapes
    ]


def result(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)
