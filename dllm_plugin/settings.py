"""What the engine-config hook has resolved: one frozen record, on the model config that every process of an engine has."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dllm_plugin.families import Family, family_of
from dllm_plugin.params import DiffusionParams

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from dllm_plugin.engine_config import DiffusionModelConfig


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of one engine.

    ``architecture``: that of config.json. ``defaults``: decoding parameters of a request that gives none.
    ``most_tokens``: what a step forwards at most. ``turn_end_token_id``: of the family's end of turn, -1 if there is none.
    ``records_graphs``: steps may be recorded as CUDA graphs.
    """

    architecture: str
    defaults: DiffusionParams
    vocab_size: int
    max_model_len: int
    most_tokens: int
    turn_end_token_id: int
    records_graphs: bool

    @property
    def family(self) -> Family:
        return family_of(self.architecture)

    @property
    def shift(self) -> int:
        """1 where the logits at i predict token i + 1."""
        return int(self.family.shifted)


def settings_of(vllm_config: "VllmConfig") -> EngineSettings:
    """The record of an engine that the hook has seen. Raises ValueError where the model is not a diffusion model."""
    family_of(vllm_config.model_config.architecture)
    return model_config_of(vllm_config).diffusion


def model_config_of(vllm_config: "VllmConfig") -> "DiffusionModelConfig":
    """The model config of an engine of ours, whose class the hook has changed."""
    return cast("DiffusionModelConfig", vllm_config.model_config)
