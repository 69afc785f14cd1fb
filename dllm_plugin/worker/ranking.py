"""What the positions of a step are ranked by, highest first: one record a ranking of `policies`."""

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


@dataclass(frozen=True, slots=True)
class Ranking:
    """One way to rank rows.

    ``value``: fp32 ``[rows]``, highest first. ``statistic``: the field of `Confidence` it reads that is computed only where
    `Choice` asks for it. ``draws``: it draws numbers, and so needs seed and step.
    """

    value: Callable[[RankedRows], torch.Tensor]
    statistic: str | None = None
    draws: bool = False


RANKED_BY = {
    "probability": Ranking(lambda rows: rows.chosen.probability),
    "margin": Ranking(lambda rows: given(rows.chosen.margin), statistic="margin"),
    "negative_entropy": Ranking(lambda rows: -given(rows.chosen.entropy), statistic="entropy"),
    "step_number": Ranking(lambda rows: rows.uniforms(given(rows.timestep)), draws=True),
    # the plan has turned it into quotas
    "own_number": Ranking(lambda rows: rows.uniforms(torch.zeros_like(given(rows.timestep))), draws=True),
    "left_to_right": Ranking(lambda rows: -rows.position.float()),
}
