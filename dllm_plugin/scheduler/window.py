"""Which window of a request comes next: pure planning, no vLLM and no tensors.

A request is one sequence: prompt, then a canvas of masked positions that is unmasked block after block over denoising
steps. A plan hands out one Window a step and is told how many positions of its active block are still masked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dllm_plugin.params import DREAM_POLICIES, DiffusionParams


@dataclass(frozen=True, slots=True)
class Window:
    """One denoising step of one request. Positions count from the start of the sequence, the prompt's first token.

    The forward pass covers ``[start, end)``, every query sees keys ``[0, visible)``; afterwards
    ``max(quota, number of confidences > threshold)`` positions of the active block ``[block_start, block_end)`` are
    unmasked. ``num_masked``: masked positions of the block before the step. ``step``: denoising steps the request has
    done before this one; with the position it keys the noise, so that nothing depends on the batch.
    """

    start: int
    end: int
    visible: int
    block_start: int
    block_end: int
    num_masked: int
    step: int
    quota: int
    threshold: float = math.inf


def split_blocks(canvas_length: int, block_length: int | None, steps: int | None) -> tuple[list[int], list[int]]:
    """Block lengths of a canvas, and the denoising steps of each; None stands for one block, one step a position.

    As ML-GSAI/LLaDA:generate.py where everything divides evenly; otherwise the last block is shorter, and the first
    ``steps % blocks`` blocks have one step more. A block has at least one step.
    """
    length = min(block_length or canvas_length, canvas_length)
    num_blocks = math.ceil(canvas_length / length)
    lengths = [length] * (num_blocks - 1) + [canvas_length - length * (num_blocks - 1)]
    steps = max(steps or canvas_length, num_blocks)
    return lengths, [steps // num_blocks + (i < steps % num_blocks) for i in range(num_blocks)]


def even_quota(num_masked_at_start: int, step: int, num_steps: int) -> int:
    """Positions unmasked in a step when a block's masks are spread evenly, larger shares first (LLaDA)."""
    share, rest = divmod(num_masked_at_start, num_steps)
    return share + (step < rest)


@lru_cache(maxsize=256)
def _dream_rates(num_steps: int, eps: float) -> Sequence[np.float32]:
    """``1 - s / t`` of every step, as Dream's generation_utils.py computes it: float32 over torch.linspace.

    torch is imported here because no other linspace rounds the same way, and the truncation in `dream_quota` sees it.
    """
    import torch

    time = torch.linspace(1, eps, num_steps + 1).numpy()
    return np.float32(1) - time[1:] / time[:-1]


def dream_quota(num_masked: int, step: int, num_steps: int, eps: float) -> int:
    """Positions unmasked in a step of Dream's schedule; may be zero, and the last step takes all that is left."""
    if step >= num_steps - 1:
        return num_masked
    return int(np.float32(num_masked) * _dream_rates(num_steps, eps)[step])


def dream_transfer_probability(step: int, num_steps: int, eps: float) -> float:
    """Probability that Dream's ``origin`` policy unmasks a position in a step."""
    return 1.0 if step >= num_steps - 1 else float(_dream_rates(num_steps, eps)[step])


class DenoisingPlan:
    """The windows of one request, cache mode ``none``: every step forwards the whole sequence.

    ``limit`` is the length the sequence may reach, prompt included. When a canvas is full and the request goes on,
    `start_canvas` lays out the next one; its steps shrink with its length, so that a shorter last canvas keeps the
    pace of the first.
    """

    def __init__(self, params: DiffusionParams, prompt_length: int, limit: int) -> None:
        self.params = params
        self.limit = limit
        self.canvas_start = self.canvas_end = prompt_length
        self.step = 0
        self._first_canvas_length = min(params.canvas_length, limit - prompt_length)

    @property
    def canvas_length(self) -> int:
        return self.canvas_end - self.canvas_start

    @property
    def canvas_is_full(self) -> bool:
        """True before the first canvas, and when no position of the present one is masked."""
        return self.canvas_end == self.canvas_start or self._block == len(self._lengths)

    @property
    def next_length(self) -> int:
        """Length of the sequence the next window belongs to, canvas included; no later window of it is longer."""
        if not self.canvas_is_full:
            return self.canvas_end
        return min(self.canvas_end + self.params.canvas_length, self.limit)

    def start_canvas(self) -> None:
        """Lay out a canvas of masks after everything that is final."""
        self.canvas_start = self.canvas_end
        self.canvas_end = min(self.canvas_start + self.params.canvas_length, self.limit)
        self._lengths, self._steps = split_blocks(self.canvas_length, self.params.block_length, self._canvas_steps())
        self._first_step = self.step
        self._block_start = self.canvas_start
        self._begin_block(0)

    def restart_canvas(self) -> None:
        """Go back to the fully masked canvas: the same steps give the same tokens again (used after preemption)."""
        self.step = self._first_step
        self._block_start = self.canvas_start
        self._begin_block(0)

    def next_window(self) -> Window:
        """The next step's window; does not change the plan."""
        quota, threshold = self._pace()
        return Window(
            start=0,
            end=self.canvas_end,
            visible=self.canvas_end,
            block_start=self._block_start,
            block_end=self._block_start + self._lengths[self._block],
            num_masked=self._num_masked,
            step=self.step,
            quota=quota,
            threshold=threshold,
        )

    def advance(self, num_masked: int) -> None:
        """Record a step after which ``num_masked`` positions of the active block are still masked."""
        self.step += 1
        self._block_step += 1
        self._num_masked = num_masked
        if num_masked == 0:
            self._block_start += self._lengths[self._block]
            self._begin_block(self._block + 1)

    def _begin_block(self, block: int) -> None:
        self._block = block
        self._block_step = 0
        self._num_masked = self._lengths[block] if block < len(self._lengths) else 0

    def _canvas_steps(self) -> int | None:
        steps = self.params.steps
        return steps and math.ceil(steps * self.canvas_length / self._first_canvas_length)

    def _pace(self) -> tuple[int, float]:
        """Quota and threshold of the present step."""
        params, step, num_steps = self.params, self._block_step, self._steps[self._block]
        if params.remasking not in DREAM_POLICIES:
            return even_quota(self._lengths[self._block], step, num_steps), math.inf
        if params.remasking == "origin":
            # each position independently: a uniform confidence above 1 - p
            return 0, 1.0 - dream_transfer_probability(step, num_steps, params.eps)
        return dream_quota(self._num_masked, step, num_steps, params.eps), math.inf
