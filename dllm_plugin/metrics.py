"""What a finished completion says about its decoding. Standard library only.

A diffusion engine is judged by its number of forward evaluations. vLLM has a place for it: every completion carries the
metrics vLLM keeps of speculative decoding, and the scheduler records each denoising step in their histogram, at the
index of the number of tokens that became final in that step. So the sum of the histogram is the number of steps, which
is the number of forward passes this request took part in.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput


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
