"""What a request asks of its logits beyond filters, as plain data: from vLLM's SamplingParams to the worker."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Controls:
    """Changes to the logits of a masked position, in this order, which is that of vLLM's sampler.

    ``allowed``: no other token; empty: all. ``phrases``: none of them stands in the answer. ``stop_ids``: not in the first
    ``min_tokens`` positions. ``bias``: pairs of a token and what is added to its logit. ``repetition``: divides a positive logit
    of what stands in prompt or answer, and multiplies a negative one. ``frequency`` is subtracted for each time that a token
    stands in the answer, ``presence`` once. What stands in the answer is what was unmasked before the step, left or right of
    the position; a token that may be replaced does not count for its own position.
    """

    allowed: tuple[int, ...] = ()
    phrases: tuple[tuple[int, ...], ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    bias: tuple[tuple[int, float], ...] = ()
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0

    @classmethod
    def of(cls, sampling: "SamplingParams") -> "Controls":
        min_tokens = sampling.min_tokens if sampling.all_stop_token_ids else 0
        return cls(
            allowed=tuple(sampling.allowed_token_ids or ()),
            phrases=tuple(map(tuple, sampling.bad_words_token_ids or ())),
            stop_ids=tuple(sorted(sampling.all_stop_token_ids)) if min_tokens else (),
            min_tokens=min_tokens,
            bias=tuple((sampling.logit_bias or {}).items()),
            repetition=sampling.repetition_penalty,
            frequency=sampling.frequency_penalty,
            presence=sampling.presence_penalty,
        )

    @property
    def kinds(self) -> frozenset[str]:
        """What of it changes anything."""
        asked = {
            "allowed": self.allowed,
            "phrases": self.phrases,
            "stops": self.stop_ids,
            "bias": self.bias,
            "penalties": (self.repetition, self.frequency, self.presence) != (1.0, 0.0, 0.0),
        }
        return frozenset(kind for kind, value in asked.items() if value)
