"""What a finished completion says about its decoding. Standard library only.

A diffusion engine is judged by its number of forward evaluations. vLLM has a place for it: every completion carries the
metrics vLLM keeps of speculative decoding, and the scheduler records each denoising step in their histogram, at the
index of the number of tokens that became final in that step. So the sum of the histogram is the number of steps, which
is the number of forward passes this request took part in.
"""

from collections.abc import Sequence
from struct import pack, unpack
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics


class Event(NamedTuple):
    """One token written into the canvas: unmasked, or put in the place of another one.

    ``forward_pass``: passes of the request before that one. ``position``: from the start of the answer. ``confidence``: what
    the position was ranked by, in most policies the probability of its token (policies.py).
    """

    forward_pass: int
    position: int
    token_id: int
    confidence: float


def num_forward_passes(completion: "CompletionOutput") -> int:
    """Denoising steps of a finished completion. Guidance forwards a second copy of the window in the same step."""
    if completion.spec_decode_metrics is None:
        raise ValueError(
            "the completion carries no metrics: they come with the last output of a request served by dllm_plugin; "
            "wait until finish_reason is set"
        )
    return sum(completion.spec_decode_metrics.histogram)


def tokens_per_forward(completion: "CompletionOutput") -> float:
    """Tokens of the completion, those after its end not counted, for each forward pass."""
    passes = num_forward_passes(completion)
    return len(completion.token_ids) / passes if passes else 0.0


def trajectory(completion: "CompletionOutput") -> list[Event]:
    """Every token that was written for a finished completion, in the order of forward passes, and of positions in each.

    The request must have asked for it with ``diffusion_trajectory=1``. What was written behind the end of the answer is there
    too, so that the last block can be replayed. A position that comes again had its token replaced.
    """
    metrics = completion.spec_decode_metrics
    if metrics is None or (completion.token_ids and not metrics.per_step_accepted):
        raise ValueError(
            "the completion carries no trajectory; ask for it with diffusion_trajectory=1, and wait for its end"
        )
    numbers, bits = metrics.per_step_accepted, metrics.per_step_drafted
    confidences = unpack(f"{len(bits)}f", pack(f"{len(bits)}I", *bits))
    return [Event(*event) for event in zip(numbers[0::3], numbers[1::3], numbers[2::3], confidences, strict=True)]


def write_trajectory(metrics: "RequestSpecDecodeMetrics", events: Sequence[Event]) -> None:
    """Put the events where `trajectory` finds them: two lists of integers that vLLM has for what each step brought."""
    metrics.per_step_accepted = [number for event in events for number in event[:3]]
    confidences = [event.confidence for event in events]
    metrics.per_step_drafted = list(unpack(f"{len(events)}I", pack(f"{len(events)}f", *confidences)))
