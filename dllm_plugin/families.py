"""What is known of a model family beyond its config.json, one record each. Standard library only."""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dllm_plugin.params import DiffusionParams, resolve

# What a profile lays over the parameters of the reference decoder, which are the profile "exact".
Profiles = Mapping[str, Mapping[str, Any]]


# The canvas and the blocks of ML-GSAI/LLaDA:chat.py, unmasked by the threshold of Fast-dLLM; fast: with its dual cache, too
# (NVlabs/Fast-dLLM:v1/llada/eval_humaneval.sh).
_CHAT = {"canvas_length": 128, "block_length": 32, "threshold": 0.9}
_FULL: Profiles = {"balanced": _CHAT, "fast": _CHAT | {"cache": "dual"}}

# low_confidence_dynamic of JetAstra/SDAR:generate.py (0.85) and of its engine (0.9)
_BLOCK: Profiles = {"balanced": {"threshold": 0.9}, "fast": {"threshold": 0.85}}
D2F: Profiles = {"balanced": {}, "fast": {"d2f_accept_threshold": 0.8}}  # of the strategy, whatever the family


@dataclass(frozen=True, slots=True)
class Family:
    """One diffusion language model family.

    ``architectures``: what config.json calls it, which is what a family is known by; never by ``model_type`` alone, which
    families share. ``adapter`` and ``config``: classes as module:name; vLLM imports the first where the model runs.
    ``defaults``: decoding parameters of a request that gives none. ``shifted``: the logits at position i predict token i + 1,
    as in an autoregressive model (Dream); otherwise they predict token i (LLaDA). ``turn_end``: the special token that ends
    an answer before the padding of EOS begins; LLaDA's ``confidence`` suppression holds it back with EOS.
    ``attention``: under "full" every position sees every other, under "block_causal" those up to the end of its own block,
    in blocks counted from the beginning of the sequence. ``profiles``: what they change of ``defaults``, which are those of
    the reference decoder. ``mask_token_id``, ``eos_token_id``, ``block_length`` (tokens of a block the model was trained
    with): where config.json, whose values come first, has none.
    """

    name: str
    architectures: tuple[str, ...]
    adapter: str
    config: str
    turn_end: str
    shifted: bool = False
    defaults: DiffusionParams = field(default_factory=DiffusionParams)
    profiles: Profiles = field(default_factory=dict, hash=False)
    attention: Literal["full", "block_causal"] = "full"
    mask_token_id: int | None = None
    eos_token_id: int | None = None
    block_length: int | None = None

    @property
    def config_class(self) -> Any:
        return pkgutil.resolve_name(self.config)

    def profile(self, name: str, exact: DiffusionParams) -> DiffusionParams:
        """The parameters of a profile. ``exact``: `defaults`, with what is known of the checkpoint."""
        profiles = D2F if exact.strategy == "d2f" else self.profiles
        return resolve(exact, {**profiles.get(name, {}), "profile": name}, label=f"{self.name}'s profile ")

    @property
    def prefix_stands_alone(self) -> bool:
        """Keys and values of whole blocks do not depend on what follows, so that requests may share them."""
        return self.attention == "block_causal"


# The architectures are the names published checkpoints carry (LLaDAModelLM, DreamModel), and ours where it differs.
FAMILIES = (
    Family(
        "LLaDA",
        architectures=("LLaDAModelLM", "LLaDAForDiffusionLM"),
        adapter="dllm_plugin.models.llada:LLaDAForDiffusionLM",
        config="dllm_plugin.models.configs:LLaDAConfig",
        turn_end="<|eot_id|>",
        profiles=_FULL,
    ),
    Family(
        "Dream",
        architectures=("DreamModel", "DreamForDiffusionLM"),
        adapter="dllm_plugin.models.dream:DreamForDiffusionLM",
        config="dllm_plugin.models.configs:DreamConfig",
        turn_end="<|im_end|>",
        shifted=True,
        defaults=DiffusionParams(remasking="origin"),
        profiles=_FULL,
    ),
    Family(
        "SDAR",
        architectures=("SDARForCausalLM",),
        adapter="dllm_plugin.models.sdar:SDARForDiffusionLM",
        config="dllm_plugin.models.configs:SDARConfig",
        turn_end="<|im_end|>",
        profiles=_BLOCK,
        attention="block_causal",
        mask_token_id=151669,
        block_length=4,
    ),
    Family(
        "SDAR-MoE",
        architectures=("SDARMoeForCausalLM",),
        adapter="dllm_plugin.models.sdar:SDARMoeForDiffusionLM",
        config="dllm_plugin.models.configs:SDARMoeConfig",
        turn_end="<|im_end|>",
        profiles=_BLOCK,
        attention="block_causal",
        mask_token_id=151669,
        block_length=4,
    ),
    Family(
        "LLaDA2",
        architectures=("LLaDA2MoeModelLM",),
        adapter="dllm_plugin.models.llada2:LLaDA2ForDiffusionLM",
        config="dllm_plugin.models.configs:LLaDA2Config",
        turn_end="<|role_end|>",
        defaults=DiffusionParams(threshold=0.95),
        profiles={"fast": {"threshold": 0.9}},  # as dInfer's examples; 0.95 is that of the model's own decoder
        attention="block_causal",
        mask_token_id=156895,
        eos_token_id=156892,
        block_length=32,
    ),
    Family(
        "Fast-dLLM v2",
        architectures=("Fast_dLLM_QwenForCausalLM",),
        adapter="dllm_plugin.models.dream:DreamForDiffusionLM",
        config="dllm_plugin.models.configs:FastDLLMConfig",
        turn_end="<|im_end|>",
        shifted=True,
        defaults=DiffusionParams(sub_block_length=8),
        profiles={"balanced": {"threshold": 0.9}, "fast": {"threshold": 0.9, "cache": "dual"}},
        attention="block_causal",
        mask_token_id=151665,
        block_length=32,
    ),
    Family(
        "Stable-DiffCoder",
        architectures=("StableDiffcoderForCausalLM", "SeedDiffcoderForCausalLM"),
        adapter="dllm_plugin.models.stable_diffcoder:StableDiffCoderForDiffusionLM",
        config="dllm_plugin.models.configs:StableDiffCoderConfig",
        turn_end="<[end▁of▁sentence]>",
        defaults=DiffusionParams(confidence="plain"),
        profiles=_BLOCK,
        attention="block_causal",
        mask_token_id=5,
        block_length=4,
    ),
    Family(
        "DreamReasoner",
        architectures=("DreamForCausalLM",),
        adapter="dllm_plugin.models.sdar:SDARForDiffusionLM",
        config="dllm_plugin.models.configs:DreamReasonerConfig",
        turn_end="<|im_end|>",
        profiles=_BLOCK,
        attention="block_causal",
        mask_token_id=151669,
        block_length=32,
    ),
    Family(
        "LLaDA-MoE",
        architectures=("LLaDAMoEModelLM",),
        adapter="dllm_plugin.models.llada_moe:LLaDAMoEForDiffusionLM",
        config="dllm_plugin.models.configs:LLaDAMoEConfig",
        turn_end="<|role_end|>",
        profiles=_FULL,
        mask_token_id=156895,
        eos_token_id=156892,
    ),
)
ARCHITECTURES: dict[str, Family] = {name: family for family in FAMILIES for name in family.architectures}


def family_of(architecture: str) -> Family:
    """The family of a HF architecture name. Raises ValueError for one that is not a diffusion language model."""
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{architecture} is not a diffusion language model known to dllm_plugin (known: {', '.join(ARCHITECTURES)}); "
            "serve it without --worker-cls dllm_plugin.worker.DiffusionWorker"
        )
    return ARCHITECTURES[architecture]
