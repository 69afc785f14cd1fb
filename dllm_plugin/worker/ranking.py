"""What the positions of a step are ranked by, highest first: one function a ranking of `policies`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dllm_plugin.kernels import philox
from dllm_plugin.kernels.confidence import Confidence


@dataclass(frozen=True, slots=True)
class RankedRows:
    """The rows of a choice: what the model said of each, and what its noise is keyed by, ``[rows]`` int64."""

    chosen: Confidence
    position: torch.Tensor
    seed: torch.Tensor | None  # None where nobody draws numbers
    timestep: torch.Tensor | None

    def uniforms(self, timestep: torch.Tensor) -> torch.Tensor:
        return philox.uniform(given(self.seed), self.position, timestep, stream=philox.UNIFORM)


def given(tensor: torch.Tensor | None) -> torch.Tensor:
    """What is there because a ranking that reads it was asked for."""
    assert tensor is not None
    return tensor


# fp32 [rows] each
RANKING_VALUES: dict[str, Callable[[RankedRows], torch.Tensor]] = {
    "probability": lambda rows: rows.chosen.probability,
    "margin": lambda rows: given(rows.chosen.margin),
    "negative_entropy": lambda rows: -given(rows.chosen.entropy),
    "step_number": lambda rows: rows.uniforms(given(rows.timestep)),
    "own_number": lambda rows: rows.uniforms(
        torch.zeros_like(given(rows.timestep))
    ),  # the plan has turned it into quotas
    "left_to_right": lambda rows: -rows.position.float(),
}

# rankings that draw a number, and so need seed and step
DRAWN = frozenset({"step_number", "own_number"})
