"""Sampling controls at positions that are unmasked in any order: each one a plain loop over one row of logits.

Order and meaning are those of vLLM's sampler (vllm/v1/sample/sampler.py:apply_logits_processors). Where vLLM says "the output so
far", what counts here is every token of the answer that stands unmasked, left or right of the position.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .decoding import choose

MASKED = -1  # in an answer: without a token yet


@dataclass(frozen=True)
class Controls:
    allowed: Collection[int] = ()
    phrases: Sequence[Sequence[int]] = ()
    stop_ids: Collection[int] = ()
    min_tokens: int = 0
    bias: dict[int, float] = field(default_factory=dict)
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0


def controlled(
    logits: Tensor,
    controls: Controls,
    prompt: Sequence[int],
    answer: Sequence[int],
    at: int,
    beside: Collection[int] = (),
) -> Tensor:
    """float32 ``[vocabulary]``: one row of logits under the controls, for position ``at`` of the answer.

    ``beside``: positions of the answer that may get any token in the same step.
    """
    x = logits.float().clone()
    others = [MASKED if i == at else token for i, token in enumerate(answer)]
    if controls.allowed:
        x[[i for i in range(len(x)) if i not in controls.allowed]] = -torch.inf
    for token in completing(controls.phrases, others, at, beside):
        x[token] = -torch.inf
    if at < controls.min_tokens:
        x[list(controls.stop_ids)] = -torch.inf
    for token, bias in controls.bias.items():
        x[token] += bias
    standing = [token for token in others if token != MASKED]
    for token in {*prompt, *standing}:
        x[token] = x[token] / controls.repetition if x[token] > 0 else x[token] * controls.repetition
    for token in {*standing}:
        x[token] -= controls.frequency * standing.count(token)
        x[token] -= controls.presence
    return x


def completing(
    phrases: Sequence[Sequence[int]], answer: Sequence[int], at: int, beside: Collection[int] = ()
) -> set[int]:
    """Tokens that at this position complete a phrase with what stands in the answer, or may come to stand ``beside`` it."""
    found = set()
    for phrase in phrases:
        for own, token in enumerate(phrase):
            first = at - own
            if first < 0 or first + len(phrase) > len(answer):
                continue
            if all(i == own or first + i in beside or answer[first + i] == wanted for i, wanted in enumerate(phrase)):
                found.add(token)
    return found


def last_of_a_phrase(phrases: Sequence[Sequence[int]], answer: Sequence[int], new: dict[int, int]) -> set[int]:
    """Positions that are the last of those in ``new`` (position: token) which complete a phrase with what stands."""
    found = set()
    for at, token in new.items():
        if answer[at] == token:
            continue
        for phrase in phrases:
            for first in range(max(0, at - len(phrase) + 1), min(at, len(answer) - len(phrase)) + 1):
                if phrase[at - first] == token and all(
                    place == at or answer[place] == wanted or (place < at and new.get(place) == wanted)
                    for place, wanted in enumerate(phrase, first)
                ):
                    found.add(at)
    return found


def has_phrase(tokens: Sequence[int], phrases: Sequence[Sequence[int]]) -> bool:
    return any(
        list(tokens[i : i + len(phrase)]) == list(phrase)
        for phrase in phrases
        for i in range(len(tokens) - len(phrase) + 1)
    )


@dataclass
class Controlled:
    """A model with the controls in its logits, so that every reference decoder runs under them at temperature 0.

    ``rows(ids, masked)``: positions that get a token in the step, ascending; those still masked where it is not given.
    """

    model: Any
    prompt_length: int
    controls: Controls
    rows: Callable[[Tensor, Tensor], Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def logits_for_positions(self, ids: Tensor) -> Tensor:
        return self._controlled(self.model.logits_for_positions(ids), ids)

    def logits(self, ids: Tensor, visible: Tensor) -> Tensor:
        return self._controlled(self.model.logits(ids, visible), ids)

    def _controlled(self, logits: Tensor, ids: Tensor) -> Tensor:
        logits, start = logits.float().clone(), self.prompt_length
        masked = (ids == self.model.mask_token_id) & (torch.arange(len(ids)) >= start)
        rows = (masked.nonzero()[:, 0] if self.rows is None else self.rows(ids, masked)).tolist()
        prompt = ids[:start].tolist()
        answer = torch.where(masked, MASKED, ids)[start:].tolist()
        plain = logits.clone()
        for row in rows:
            logits[row] = controlled(plain[row], self.controls, prompt, answer, row - start)
        if self.controls.phrases and rows:
            tokens = choose(logits[rows], self.model.mask_token_id).tolist()
            new = {row - start: token for row, token in zip(rows, tokens, strict=True)}
            for at in last_of_a_phrase(self.controls.phrases, answer, new):
                logits[start + at] = controlled(plain[start + at], self.controls, prompt, answer, at, new.keys())
        return logits
