"""What the positions of a step are ranked by, highest first: one record a ranking of `policies`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dllm_plugin.kernels import philox
from dllm_plugin.kernels.confidence import Confidence


class ChosenRows(NamedTuple):
    """Token of every row ``[rows]``, the confidence its position is ranked by, and what is told of it (`records.score`)."""

    token: torch.Tensor
    ranking: torch.Tensor
    scores: torch.Tensor | None

    @classmethod
    def joined(cls, parts: list["ChosenRows"]) -> "ChosenRows":
        if len(parts) == 1:
            return parts[0]
        scores = None if parts[0].scores is None else torch.cat([given(part.scores) for part in parts])
        return cls(torch.cat([part.token for part in parts]), torch.cat([part.ranking for part in parts]), scores)

    def where(self, rows: torch.Tensor, other: "ChosenRows") -> "ChosenRows":
        """That of the ``other`` in these rows."""
        scores = None if self.scores is None else torch.where(rows[:, None], given(other.scores), self.scores)
        return ChosenRows(
            torch.where(rows, other.token, self.token), torch.where(rows, other.ranking, self.ranking), scores
        )


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
