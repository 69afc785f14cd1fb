"""Requests that engine and reference decoders both understand.

`sampling_params` of a case is what the engine gets, `expected` what a reference decoder of `reference/` makes of it, given
the noise that the engine draws for the case's seed.
"""

import functools
import random
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from reference import decoding, dream, llada
from reference import model as reference_model
from torch import Tensor
from vllm import SamplingParams
from vllm.outputs import RequestOutput

from dllm_plugin.kernels import philox
from support.checkpoints import BLOCK_WEIGHTS, RANDOM_WEIGHTS, TURN_END, reference
from support.engines import engine, num_forwards

LLADA_POLICIES = llada.REMASKING
DREAM_POLICIES = dream.ALGORITHMS
POLICIES = LLADA_POLICIES + DREAM_POLICIES

_DEFAULT_SEED = 1234


@dataclass(frozen=True)
class Noise:
    """The numbers the engine draws for a seed, as the reference asks for them: by response position and step."""

    seed: int
    prompt_length: int
    vocabulary: int

    def uniforms(self, forward: int, at: Tensor) -> Tensor:
        return philox.uniform(*self._key(forward, at), stream=philox.UNIFORM)

    def gumbel(self, forward: int, at: Tensor) -> Tensor:
        return philox.gumbel(*self._key(forward, at), stream=philox.TOKEN, num_columns=self.vocabulary).double()

    def position_gumbel(self, forward: int, at: Tensor) -> Tensor:
        return philox.gumbel(*self._key(forward, at), stream=philox.ORDER).double()

    def origin_uniforms(self, forward: int, at: Tensor, time: Tensor) -> Tensor:
        """The engine draws one number u for all steps, and unmasks in the step whose time passes it.

        Of a position that is still masked at time t, u is uniform below t, so that 1 - u / t is the step's own number.
        """
        return 1 - self.uniforms(0, at).double() / time.double()

    def _key(self, forward: int, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.full_like(at, self.seed), at + self.prompt_length, torch.full_like(at, forward)


@dataclass(frozen=True)
class Shaped:
    """A model with LLaDA's guidance and EOS ban in its logits, so that Dream's decoder can be run with them."""

    model: reference_model.Predictor
    prompt_length: int
    cfg_scale: float
    banned: int | None

    @property
    def mask_token_id(self) -> int:
        return self.model.mask_token_id

    def logits_for_positions(self, ids: Tensor) -> Tensor:
        logits = self.model.logits_for_positions(ids).clone()
        if self.cfg_scale > 0:
            unprompted = ids.clone()
            unprompted[: self.prompt_length] = self.mask_token_id
            without = self.model.logits_for_positions(unprompted)
            logits = without + (self.cfg_scale + 1) * (logits - without)
        if self.banned is not None:
            logits[:, self.banned] = -torch.inf
        return logits


class ReferenceCase(ABC):
    """One request, and what a reference decoder makes of it. ``eos`` lets EOS end it."""

    checkpoint: str
    eos: bool

    @property
    @abstractmethod
    def id(self) -> str: ...

    @property
    @abstractmethod
    def prompt_ids(self) -> list[int]: ...

    @property
    @abstractmethod
    def sampling_params(self) -> SamplingParams: ...

    @abstractmethod
    def expected(self) -> decoding.Generation: ...

    @property
    def request(self) -> tuple[list[int], SamplingParams]:
        return self.prompt_ids, self.sampling_params

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (reference(self.checkpoint).eos_token_id,) if self.eos else ()


@dataclass(frozen=True)
class PolicyCase(ReferenceCase):
    """A remasking policy as its family decodes. ``None`` and neutral values are left to the engine's defaults."""

    checkpoint: str
    policy: str
    max_tokens: int
    block: int | None = None
    steps: int | None = None
    prompt: int | tuple[int, ...] | str = 9  # a length, token ids, or a question for a checkpoint with a tokenizer
    canvas: int | None = None
    cfg: float = 0.0
    suppression: str = "none"
    eos: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    alg_temp: float = 0.0
    eps: float = 1e-3
    seed: int = _DEFAULT_SEED
    note: str = ""

    @property
    def id(self) -> str:
        prompt = self.prompt if isinstance(self.prompt, int) else f"given{zlib.crc32(repr(self.prompt).encode()):08x}"
        parts = [self.checkpoint, self.policy, f"{self.max_tokens}tokens", f"prompt{prompt}"]
        parts += [f"block{self.block}"] if self.block else ["one-block"]
        parts += [f"{self.steps}steps"] if self.steps else []
        parts += [f"canvas{self.canvas}"] if self.canvas else []
        parts += [f"cfg{self.cfg:g}"] if self.cfg else []
        parts += [f"no-eos-{self.suppression}"] if self.suppression != "none" else []
        parts += ["until-eos"] if self.eos else []
        parts += [f"temperature{self.temperature:g}"] if self.temperature else []
        parts += [f"top-p{self.top_p:g}"] if self.top_p < 1 else []
        parts += [f"top-k{self.top_k}"] if self.top_k else []
        parts += [f"min-p{self.min_p:g}"] if self.min_p else []
        parts += [f"alg-temp{self.alg_temp:g}"] if self.alg_temp else []
        parts += [f"eps{self.eps:g}"] if self.eps != 1e-3 else []
        parts += [f"seed{self.seed}"] if self.seed != _DEFAULT_SEED else []
        return "-".join(parts + ([self.note] if self.note else []))

    @property
    def prompt_ids(self) -> list[int]:
        if isinstance(self.prompt, tuple):
            return list(self.prompt)
        if isinstance(self.prompt, str):
            chat = [{"role": "user", "content": self.prompt}]
            tokenizer = engine(self.checkpoint).get_tokenizer()
            return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        return random_prompt(self.prompt, self.id)

    @property
    def sampling_params(self) -> SamplingParams:
        extras = {
            "diffusion_remasking": self.policy,
            "diffusion_steps": self.steps,
            "diffusion_block_length": self.block,
            "diffusion_canvas_length": self.canvas,
            "diffusion_cfg_scale": self.cfg or None,
            "diffusion_eos_suppression": self.suppression if self.suppression != "none" else None,
            "diffusion_alg_temp": self.alg_temp or None,
            "diffusion_eps": self.eps if self.eps != 1e-3 else None,
        }
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_tokens=self.max_tokens,
            seed=self.seed,
            ignore_eos=not self.eos,
            detokenize=False,
            extra_args={key: value for key, value in extras.items() if value is not None},
        )

    def expected(self) -> decoding.Generation:
        """What the reference decoder generates."""
        model, prompt = reference(self.checkpoint), self.prompt_ids
        noise = Noise(self.seed, len(prompt), model.vocab_size)
        canvas = self.canvas or 1024
        sampled: dict[str, Any] = {"temperature": self.temperature}
        if self.temperature > 0:
            sampled["gumbel"] = noise.gumbel
        if self.policy in LLADA_POLICIES:
            assert (self.top_p, self.top_k, self.min_p) == (1, 0, 0), "LLaDA's reference has no filters"
            generate, settings = llada.generate, {
                "remasking": self.policy,
                "cfg_scale": self.cfg,
                "eos_suppression": self.suppression,
                "eos_id": model.eos_token_id,
                "eot_id": turn_end(self.checkpoint),
                "uniforms": noise.uniforms,
            }  # fmt: skip
        else:
            assert self.suppression in ("none", "logits"), "Dream's reference has no confidence suppression"

            def generate(model: Any, prompt_ids: list[int], *args: Any, **kwargs: Any) -> decoding.Generation:
                banned = model.eos_token_id if self.suppression == "logits" else None
                return dream.generate(Shaped(model, len(prompt_ids), self.cfg, banned), prompt_ids, *args, **kwargs)

            settings = {
                "alg": self.policy,
                "eps": self.eps,
                "alg_temp": self.alg_temp,
                "top_p": self.top_p if self.top_p < 1 else None,
                "top_k": self.top_k or None,
                "min_p": self.min_p,
                "uniforms": noise.origin_uniforms,
                "position_gumbel": noise.position_gumbel,
            }
        return decoding.generate_canvases(
            generate,
            model,
            prompt,
            self.max_tokens,
            canvas,
            self.steps or min(self.max_tokens, canvas),
            stop_ids=self.stop_ids,
            block_length=self.block,
            **settings,
            **sampled,
        )


@functools.cache
def expected(case: ReferenceCase) -> decoding.Generation:
    return case.expected()


def random_prompt(length: int, name: str) -> list[int]:
    """Token ids that depend on the name alone, special ones left out."""
    draw = random.Random(zlib.crc32(name.encode()))
    return [draw.randrange(10, 310) for _ in range(length)]


def turn_end(checkpoint: str) -> int | None:
    if checkpoint in RANDOM_WEIGHTS | BLOCK_WEIGHTS:
        return TURN_END
    names = {"llada": "<|eot_id|>", "Dream": "<|im_end|>"}
    vocabulary = engine(checkpoint).get_tokenizer().get_vocab()
    return vocabulary.get(names[reference(checkpoint).config["model_type"]])


def difference(case: ReferenceCase, output: RequestOutput, more: int = 0) -> str:
    """Empty where the engine's output is the reference's: tokens and number of forward passes; otherwise both.

    ``more``: passes that the engine runs and the reference does not.
    """
    want, got = expected(case), list(output.outputs[0].token_ids)
    if got == want.tokens and num_forwards(output) == want.num_forwards + more:
        return ""
    first = next((i for i, pair in enumerate(zip(got, want.tokens, strict=False)) if pair[0] != pair[1]), None)
    return (
        f"{case.id}: first difference at position {first}\nengine    {got} in {num_forwards(output)} forward passes\n"
        f"reference {want.tokens} in {want.num_forwards}"
    )
