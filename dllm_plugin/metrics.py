"""What a finished completion says about its decoding. Standard library only.

A diffusion engine is judged by its number of forward evaluations. vLLM has a place for it: every completion carries the
metrics vLLM keeps of speculative decoding, and the scheduler records each denoising step in their histogram, at the
index of the number of tokens that became final in that step. So the sum of the histogram is the number of steps, which
is the number of forward passes this request took part in.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from struct import pack, unpack
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics


class Event(NamedTuple):
    """One token written into the canvas: unmasked, or put in the place of another one.

    ``forward_pass``: passes of the request before that one. ``position``: from the start of the answer. ``confidence``: what
    the position was ranked by, in most policies the probability of its token (policies.py). ``logprob``: of the token, by vLLM's
    ``logprobs_mode``.
    """

    forward_pass: int
    position: int
    token_id: int
    confidence: float
    logprob: float


@dataclass(frozen=True, slots=True)
class Extent:
    """What a trajectory was written into, in positions. ``end``: of the last canvas, or under strategy ``block`` of the block
    that holds the last token of the answer, from the start of the answer. ``from_start``: 1 where blocks are counted from the
    beginning of the sequence, 0 where from that of the canvas. The last block and canvas may be shorter.
    """

    block_length: int
    canvas_length: int
    end: int
    from_start: int


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
    return read_trajectory(completion)[1]


def read_trajectory(completion: "CompletionOutput") -> tuple[Extent, list[Event]]:
    """The trajectory of a completion, and what it was written into. Raises ValueError where it carries none."""
    metrics = completion.spec_decode_metrics
    if metrics is None or not metrics.per_step_accepted:
        raise ValueError(
            "the completion carries no trajectory; ask for it with diffusion_trajectory=1, and wait for its end"
        )
    size = len(fields(Extent))
    extent, numbers = Extent(*metrics.per_step_accepted[:size]), metrics.per_step_accepted[size:]
    bits = metrics.per_step_drafted
    floats = unpack(f"{len(bits)}f", pack(f"{len(bits)}I", *bits))
    columns = (numbers[0::3], numbers[1::3], numbers[2::3], floats[0::2], floats[1::2])
    return extent, [Event(*event) for event in zip(*columns, strict=True)]


def write_trajectory(metrics: "RequestSpecDecodeMetrics", extent: Extent, events: Sequence[Event]) -> None:
    """Put them where `read_trajectory` finds them: two lists of integers that vLLM has for what each step brought."""
    metrics.per_step_accepted = [*astuple(extent), *(number for event in events for number in event[:3])]
    floats = [number for event in events for number in event[3:]]
    metrics.per_step_drafted = list(unpack(f"{len(floats)}I", pack(f"{len(floats)}f", *floats)))
