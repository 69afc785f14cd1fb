"""Requests of every strategy under full attention: parameters, what the reference decoders make of them, and how they are run."""

import copy
import random
from dataclasses import dataclass, field
from typing import Any

from reference import d2f, decoding, fast_dllm
from reference.model import ReferenceModel
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

from support.cases import Noise, ReferenceCase, random_prompt
from support.checkpoints import reference
from support.engines import engine, num_forwards

FAMILIES = ("llada", "dream")
CACHED = ("prefix", "dual")
HOLE = -1
SEED = 77


@dataclass(frozen=True)
class StrategyCase(ReferenceCase):
    """Any strategy; `extras` are the request's diffusion_* parameters without the prefix."""

    checkpoint: str
    tokens: int
    prompt: int
    extras: dict[str, Any] = field(hash=False)
    eos: bool = False
    sampling: dict[str, Any] = field(default_factory=dict, hash=False)  # vLLM's own: temperature, top_p, top_k, min_p

    @property
    def id(self) -> str:
        extras = "-".join(f"{name}={value}".replace(" ", "") for name, value in (self.extras | self.sampling).items())
        return f"{self.checkpoint}-{self.tokens}tokens-prompt{self.prompt}-{extras}{'-until-eos' if self.eos else ''}"

    @property
    def prompt_ids(self) -> list[int]:
        return random_prompt(self.prompt, f"{self.checkpoint} {self.prompt}")

    @property
    def sampling_params(self) -> SamplingParams:
        return SamplingParams(
            **{"temperature": 0.0} | self.sampling,
            max_tokens=self.tokens,
            ignore_eos=not self.eos,
            seed=SEED,
            detokenize=False,
            extra_args={f"diffusion_{name}": value for name, value in self.extras.items()},
        )

    @property
    def admits(self) -> bool:
        """Whether the confidences of a step say how many it unmasks."""
        return "threshold" in self.extras or "factor" in self.extras

    def expected(self, **more: Any) -> decoding.Generation:
        """What the reference decoder generates."""
        model, prompt, settings = reference(self.checkpoint), self.prompt_ids, self.extras | self.sampling | more
        length = min(self.tokens, settings.pop("canvas_length", self.tokens))
        noise = Noise(SEED, len(prompt), model.vocab_size)
        if settings.pop("strategy", "full") == "d2f":
            generate, steps = d2f.generate, 0
            settings = {name.removeprefix("d2f_"): value for name, value in settings.items() if name != "remasking"}
            settings["gumbel"] = noise.gumbel
        else:
            generate, steps = fast_dllm.generate, settings.pop("steps", length)
            settings["uniforms"] = noise.origin_uniforms if settings["remasking"] == "origin" else noise.uniforms
            settings["suffix_ids"] = settings.pop("suffix", ())
            if scale := settings.pop("cfg_scale", 0.0):
                model = guided(model, scale, hidden=slice(len(prompt)))
        return decoding.generate_canvases(
            generate, model, prompt, self.tokens, length, steps, stop_ids=self.stop_ids, **settings
        )


def guided(model: ReferenceModel, scale: float, hidden: slice | list[int]) -> ReferenceModel:
    """The model with its logits pushed away from those that it gives with the hidden positions masked."""

    def logits_for_positions(ids: Tensor) -> Tensor:
        copied = ids.clone()
        copied[hidden] = model.mask_token_id
        logits, without = model.logits_for_positions(ids), model.logits_for_positions(copied)
        return without + (scale + 1) * (logits - without)

    twin = copy.copy(model)
    twin.logits_for_positions = logits_for_positions
    return twin


def by_probability(checkpoint: str) -> str:
    return "low_confidence" if checkpoint.startswith("llada") else "maskgit_plus"


def run(llm: LLM, cases: list[StrategyCase], alone: bool = False) -> list[RequestOutput]:
    prompts = [{"prompt_token_ids": case.prompt_ids} for case in cases]
    params = [case.sampling_params for case in cases]
    if alone:
        return [llm.generate([p], [s], use_tqdm=False)[0] for p, s in zip(prompts, params, strict=True)]
    return llm.generate(prompts, params, use_tqdm=False)


def run_mixed(cases: list[StrategyCase]) -> dict[str, RequestOutput]:
    """Outputs by id of all cases of a checkpoint in one call, in an order that mixes their kinds."""
    (checkpoint,) = {case.checkpoint for case in cases}
    mixed = random.Random(0).sample(cases, len(cases))
    return {case.id: output for case, output in zip(mixed, run(engine(checkpoint), mixed), strict=True)}


def result(output: RequestOutput) -> tuple[list[int], int]:
    return list(output.outputs[0].token_ids), num_forwards(output)


# (tokens, prompt, extras)
SHAPES = (
    (16, 9, {"block_length": 8}),  # everything divides
    (13, 3, {"block_length": 5, "steps": 7}),  # nothing does
    (20, 150, {"block_length": 6, "steps": 9}),  # the prompt lies on two pages of 128
    (9, 1, {"steps": 5}),  # one block
    (36, 110, {"block_length": 16, "steps": 11}),  # and here a block does
)
CACHES = (
    {"cache": "prefix"},
    {"cache": "dual"},
    {"cache": "prefix", "cache_refresh": 3},
    {"cache": "dual", "cache_refresh": 2},
)
SUFFIX = (30, 31, 32, 33, 34)
TEMPLATE = (5, HOLE, HOLE, 7, HOLE, 9, 9, 9, 9, HOLE, HOLE, HOLE, 6, HOLE)
PARALLEL = ({"threshold": 0.5}, {"threshold": 0.2}, {"threshold": 0.05}, {"factor": 1.5}, {"factor": 3.0},
            {"threshold": 1}, {"factor": 2})  # fmt: skip  # whole numbers are numbers


def grid(
    checkpoint: str, shapes: tuple, *strategies: dict[str, Any], eos: bool = False, **sampling: Any
) -> list[StrategyCase]:
    return [
        StrategyCase(checkpoint, tokens, prompt, strategy | extras, eos, sampling)
        for strategy in strategies
        for tokens, prompt, extras in shapes
    ]


def without_steps(shapes: tuple) -> tuple:
    return tuple(
        (tokens, prompt, {k: v for k, v in extras.items() if k != "steps"}) for tokens, prompt, extras in shapes
    )
