"""Which window of a request comes next: pure planning, no vLLM and no tensors.

A request is one sequence: prompt, then a canvas of masked positions, then a suffix if it asks for one. A plan hands out
one Window a step and is told how many positions of its active blocks are still masked; every strategy is a rule that
picks the next window, and nothing more. Positions count from the start of the sequence.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dllm_plugin.params import DREAM_POLICIES, HOLE, DiffusionParams


class ActiveBlock(NamedTuple):
    """Positions ``[start, end)`` of which some are unmasked after the forward pass.

    These are the ``n`` most confident, ``n`` the largest of ``quota``, the number of confidences above ``threshold``,
    and what ``factor`` admits (kernels/unmask.py); inf and 0 switch the latter two off. ``num_masked``: how many of the
    positions are masked before the step; of steps that are looked ahead under a threshold, at most so many.
    """

    start: int
    end: int
    num_masked: int
    quota: int
    threshold: float = math.inf
    factor: float = 0.0


class Window(NamedTuple):
    """One denoising step: forward ``[start, end)``, let queries see keys below ``visible``, unmask in ``blocks``.

    With ``block_length`` > 0 attention is block-causal: a query sees ``[0, prefix_length)`` and everything up to the
    end of its own block, blocks counted from there. ``caches``: the window's keys and values are kept in pages, and a
    window that does not begin at 0 reads those of earlier steps. ``step``: denoising steps the request has done before
    this one; with the position it keys the noise, so that nothing depends on the batch.
    """

    start: int
    end: int
    visible: int
    step: int
    blocks: tuple[ActiveBlock, ...]
    caches: bool = False
    prefix_length: int = 0
    block_length: int = 0

    @property
    def covers_all(self) -> bool:
        """True where every key a query sees is in the window itself, and every query sees all of them."""
        return self.start == 0 and self.end == self.visible and self.block_length == 0


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


@lru_cache(maxsize=32)
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


class Plan(ABC):
    """The windows of one request: what all strategies share, which is the canvas and its end.

    ``limit`` is the length prompt and response may reach, ``num_suffix`` what stands behind the canvas. When a canvas
    is full and the request goes on, `start_canvas` lays out the next one. ``shift``: 1 for a family whose logits at i
    predict token i + 1; a window then begins one position early, so that its first position has its own logits.
    """

    def __init__(
        self, params: DiffusionParams, prompt_length: int, limit: int, shift: int = 0, num_suffix: int = 0
    ) -> None:
        self.params = params
        self.limit = limit
        self.shift = shift
        self.num_suffix = num_suffix
        self.prompt_length = prompt_length
        self.canvas_start = self.canvas_end = prompt_length
        self.step = 0
        self.window: Window | None = None

    @property
    def canvas_length(self) -> int:
        return self.canvas_end - self.canvas_start

    @property
    def canvas_is_full(self) -> bool:
        """True before the first canvas, and when no position of the present one is masked."""
        return self.window is None

    @property
    def next_canvas_length(self) -> int:
        return min(len(self.params.template) or self.params.canvas_length, self.limit - self.canvas_end)

    @property
    def next_length(self) -> int:
        """Length of the sequence the next window belongs to, suffix included."""
        return self.num_suffix + self.canvas_end + (self.next_canvas_length if self.canvas_is_full else 0)

    @property
    def is_over(self) -> bool:
        """True where no further canvas may begin: no room is left, a template is filled, the steps are spent."""
        ended = self.canvas_end == self.limit or bool(self.params.template) or self.steps_are_spent
        return self.canvas_is_full and self.step > 0 and ended

    def start_canvas(self) -> None:
        """Lay out a canvas of masks after everything that is final."""
        length = self.next_canvas_length
        self.canvas_start, self.canvas_end = self.canvas_end, self.canvas_end + length
        self._first_step = self.step
        self._begin_canvas()
        self.window = self._next_window()

    def restart_canvas(self) -> None:
        """Go back to the canvas as it was laid out: the same steps give the same tokens again (after preemption)."""
        self.step = self._first_step
        self._begin_canvas()
        self.window = self._next_window()

    def look_ahead(self, most: int) -> list[Window]:
        """The present window and, up to so many, those after it that cover the same positions unless a block is filled.

        They presume that each window unmasks its quotas and no more, which is sure without a threshold.
        """
        return [self.window]

    def advance(self, num_masked: Sequence[int], eos_is_taken: bool = False, num_steps: int = 1) -> None:
        """Record steps: positions that the last left masked in each of the active blocks, in their order.

        Several steps are some of what `look_ahead` gave, none but the last of which filled a block.
        """
        self.step += num_steps
        self._record(num_masked, eos_is_taken, num_steps)
        self.window = self._next_window()

    @property
    def steps_are_spent(self) -> bool:
        return self.params.max_steps is not None and self.step >= self.params.max_steps

    def _take_all_if_last(self, window: Window) -> Window:
        """The window itself, or where it is the last step of the request, one that unmasks all that is left."""
        if self.params.max_steps is None or self.step < self.params.max_steps - 1:
            return window
        masked = self._num_masked_in_canvas()
        start = self.canvas_start
        rest = ActiveBlock(start, self.canvas_end, masked, quota=masked)
        return Window(
            start=0,
            end=self.canvas_end + self.num_suffix,
            visible=self.canvas_end + self.num_suffix,
            step=self.step,
            blocks=(rest,),
            caches=window.caches,
            prefix_length=window.prefix_length,
            block_length=window.block_length,
        )

    @abstractmethod
    def _begin_canvas(self) -> None: ...

    @abstractmethod
    def _next_window(self) -> Window | None:
        """The next step's window; None when the canvas is full."""

    @abstractmethod
    def _record(self, num_masked: Sequence[int], eos_is_taken: bool, num_steps: int) -> None: ...

    @abstractmethod
    def _num_masked_in_canvas(self) -> int: ...


class BlockwisePlan(Plan):
    """One active block after the other under full attention, with Fast-dLLM's caches or none.

    Without a cache every step forwards the whole sequence. With ``prefix`` or ``dual`` the first step of a block does,
    and every ``cache_refresh``-th; the steps between forward the block and all behind it, or the block alone.
    """

    def _begin_canvas(self) -> None:
        first_length = min(self.params.canvas_length, self.limit - self.prompt_length)
        steps = self.params.steps
        if steps is not None and not self.params.template:
            steps = math.ceil(steps * self.canvas_length / first_length)  # a shorter last canvas keeps the pace
        lengths, self._steps = split_blocks(self.canvas_length, self.params.block_length, steps)
        edges = np.cumsum([self.canvas_start, *lengths]).tolist()
        self._blocks = list(pairwise(edges))
        holes = self.params.template or (HOLE,) * self.canvas_length
        begin = self.canvas_start
        self._masks = [sum(token == HOLE for token in holes[a - begin : b - begin]) for a, b in self._blocks]
        self._begin_block(0)

    def _begin_block(self, block: int) -> None:
        while block < len(self._blocks) and self._masks[block] == 0:
            block += 1  # a template pins all of it
        self._block = block
        self._block_step = 0
        self._num_masked = self._masks[block] if block < len(self._blocks) else 0

    def _record(self, num_masked: Sequence[int], eos_is_taken: bool, num_steps: int) -> None:
        self._block_step += num_steps
        self._num_masked = num_masked[0]
        if self.steps_are_spent:
            self._block = len(self._blocks)
        elif self._num_masked == 0:
            self._begin_block(self._block + 1)

    def look_ahead(self, most: int) -> list[Window]:
        windows = [self.window]
        if self.params.max_steps is not None:
            return windows
        while len(windows) < most and self._covers_all(len(windows)) == self._covers_all(0):
            (block,) = windows[-1].blocks
            if block.quota >= block.num_masked:
                break
            windows.append(self._window(len(windows), block.num_masked - block.quota))
        return windows

    def _next_window(self) -> Window | None:
        if self._block == len(self._blocks):
            return None
        window = self._window(0, self._num_masked)
        return window if self.params.max_steps is None else self._take_all_if_last(window)

    def _window(self, steps_ahead: int, num_masked: int) -> Window:
        """The active block's, so many steps from now, with so many masks before it."""
        params, (start, end) = self.params, self._blocks[self._block]
        block = ActiveBlock(start, end, num_masked, *self._pace(self._block_step + steps_ahead, num_masked))
        length = self.canvas_end + self.num_suffix
        if self._covers_all(steps_ahead):
            first, last = 0, length
        else:
            first, last = start - self.shift, length if params.cache == "prefix" else end
        return Window(first, last, length, self.step + steps_ahead, (block,), params.cache != "none")

    def _covers_all(self, steps_ahead: int) -> bool:
        """Whether the window forwards everything, so many steps from now in the active block."""
        step, refresh = self._block_step + steps_ahead, self.params.cache_refresh
        return self.params.cache == "none" or (step % refresh == 0 if refresh else step == 0)

    def _pace(self, step: int, num_masked: int) -> tuple[int, float, float]:
        """Quota, threshold and factor of a step of the active block."""
        params, num_steps = self.params, self._steps[self._block]
        if params.threshold is not None:
            return 1, params.threshold, 0.0
        if params.factor is not None:
            return 1, math.inf, params.factor
        if params.remasking == "origin":
            # each position by itself: a uniform confidence above 1 - p
            return 0, 1.0 - dream_transfer_probability(step, num_steps, params.eps), 0.0
        if params.remasking in DREAM_POLICIES:
            return dream_quota(num_masked, step, num_steps, params.eps), math.inf, 0.0
        return even_quota(self._masks[self._block], step, num_steps), math.inf, 0.0

    def _num_masked_in_canvas(self) -> int:
        return self._num_masked + sum(self._masks[self._block + 1 :])


def make_plan(params: DiffusionParams, prompt_length: int, limit: int, shift: int = 0, num_suffix: int = 0) -> Plan:
    """The plan of a request's strategy."""
    from dllm_plugin.scheduler.d2f import D2FPlan

    plan = D2FPlan if params.strategy == "d2f" else BlockwisePlan
    return plan(params, prompt_length, limit, shift, num_suffix)
