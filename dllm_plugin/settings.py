"""What the engine-config hook has resolved: one frozen record, on the model config that every process of an engine has."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from dllm_plugin.extras import parse_request
from dllm_plugin.families import Family, family_of
from dllm_plugin.params import DiffusionParams

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from dllm_plugin.engine_config import DiffusionModelConfig


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of one engine.

    ``architecture``: that of config.json. ``defaults``: decoding parameters of a request that gives none. ``profiles``: those
    of a request that gives no more than a profile. ``most_tokens``: what a step forwards at most. ``turn_end_token_id``: of the
    family's end of turn, -1 if there is none. ``records_graphs``: steps may be recorded as CUDA graphs.
    """

    architecture: str
    defaults: DiffusionParams
    vocab_size: int
    max_model_len: int
    most_tokens: int
    turn_end_token_id: int
    records_graphs: bool
    profiles: tuple[DiffusionParams, ...] = ()

    @property
    def family(self) -> Family:
        return family_of(self.architecture)

    def params_of(self, extra_args: Mapping[str, Any] | None) -> DiffusionParams:
        """The parameters of a request by its extras. Raises ValueError for a wrong one, or two that exclude each other."""
        return parse_request(extra_args, self.defaults, self.profiles)

    @property
    def shift(self) -> int:
        """1 where the logits at i predict token i + 1."""
        return int(self.family.shifted)

    def answer_limit(
        self, params: DiffusionParams, num_prompt: int, max_tokens: int, max_model_len: int, num_suffix: int
    ) -> int:
        """The length that prompt and answer may reach. Raises ValueError where no place is left for an answer."""
        longest = max_model_len
        if params.cfg_scale > 0:
            longest = min(longest, self.most_tokens // 2)
        limit = min(num_prompt + max_tokens, longest - num_suffix)
        if limit - num_prompt < max(1, len(params.template)):
            raise ValueError(
                f"prompt, canvas and suffix must fit {longest} tokens (max_model_len; with guidance half of "
                f"max_num_batched_tokens where that is less), and a template max_tokens {max_tokens}: {num_prompt} tokens of "
                f"prompt, {num_suffix} of diffusion_suffix and {len(params.template)} of diffusion_template leave no room; "
                "shorten one of them"
            )
        return limit


def settings_of(vllm_config: "VllmConfig") -> EngineSettings:
    """The record of an engine that the hook has seen. Raises ValueError where the model is not a diffusion model."""
    family_of(vllm_config.model_config.architecture)
    return model_config_of(vllm_config).diffusion


def model_config_of(vllm_config: "VllmConfig") -> "DiffusionModelConfig":
    """The model config of an engine of ours, whose class the hook has changed."""
    return cast("DiffusionModelConfig", vllm_config.model_config)
