"""Which window of a request comes next: pure planning, no vLLM and no tensors.

A request is one sequence: prompt, then a canvas of masked positions, then a suffix if it asks for one. A plan hands out
one Window a step and is told how many positions of its active blocks are still masked; every strategy is a rule that
picks the next window, and nothing more. Positions count from the start of the sequence.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from typing import Literal, NamedTuple

import numpy as np

from dllm_plugin.params import HOLE, DiffusionParams
from dllm_plugin.policies import POLICIES


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


class Attention(NamedTuple):
    """Which of the keys below ``visible`` the queries of a window see.

    ``full``: all of them. ``block_causal``: ``[0, prefix_length)``, and all up to the end of the query's own block, blocks
    of ``block_length`` counted from there.
    """

    kind: Literal["full", "block_causal"]
    prefix_length: int = 0
    block_length: int = 0


FULL = Attention("full")


class Window(NamedTuple):
    """One denoising step: forward ``[start, end)``, let queries see keys below ``visible``, unmask in ``blocks``.

    A position is *masked* while it has no token, *settled* once its token will not change, and *emitted* once the user has
    its token. ``settles_below``: what is unmasked below it is settled, and is emitted once nothing before it is masked.
    ``caches``: the window's keys and values are kept in pages, and a window that does not begin at 0 reads those of earlier
    steps. ``pipelined``: blocks may be filled before the ones in front of them, and the plan asks whether EOS is taken.
    ``step``: steps of the request's schedule before this one; with the position it keys the noise, so that nothing depends
    on the batch.
    """

    start: int
    end: int
    visible: int
    step: int
    blocks: tuple[ActiveBlock, ...]
    settles_below: int
    attention: Attention = FULL
    caches: bool = False
    pipelined: bool = False

    @property
    def covers_all(self) -> bool:
        """True where every key a query sees is in the window itself, and every query sees all of them."""
        return self.start == 0 and self.end == self.visible and self.attention.kind == "full"


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
def _dream_times(num_steps: int, eps: float) -> np.ndarray:
    """float32 ``[num_steps + 1]``, from 1 down to ``eps``: what Dream's generation_utils.py makes with torch.linspace.

    torch is imported here because no other linspace rounds the same way, and the truncation in `dream_quota` sees it.
    """
    import torch

    return torch.linspace(1, eps, num_steps + 1).numpy()


@lru_cache(maxsize=32)
def _dream_rates(num_steps: int, eps: float) -> np.ndarray:
    """``1 - s / t`` of every step, in float32 as Dream computes it."""
    time = _dream_times(num_steps, eps)
    return np.float32(1) - time[1:] / time[:-1]


def dream_quota(num_masked: int, step: int, num_steps: int, eps: float) -> int:
    """Positions unmasked in a step of Dream's schedule; may be zero, and the last step takes all that is left."""
    if step >= num_steps - 1:
        return num_masked
    return int(np.float32(num_masked) * _dream_rates(num_steps, eps)[step])


def dream_steps(num_masked: int, num_steps: int, eps: float) -> list[int]:
    """The steps of Dream's schedule in which so many masks are unmasked: one entry a mask, ascending."""
    steps: list[int] = []
    step = 0
    while left := num_masked - len(steps):
        some = np.float32(left) * _dream_rates(num_steps, eps)[step : num_steps - 1] >= 1
        step = step + int(some.argmax()) if some.any() else num_steps - 1
        steps += [step] * dream_quota(left, step, num_steps, eps)
        step += 1
    return steps


def origin_steps(draws: np.ndarray, num_steps: int, eps: float) -> list[int]:
    """The steps in which Dream's ``origin`` unmasks positions whose numbers are ``draws``: one entry each, ascending.

    Published, each masked position is unmasked in a step from time t to s with probability 1 - s / t, so that it is still
    masked at time s with probability s. Here every position draws one number in (0, 1) for all steps, and is unmasked in the
    first that ends below it, which is the same distribution (Dream's generation_utils.py, ``alg == 'origin'``); the last
    step takes all that is left.
    """
    times_not_below = np.searchsorted(-_dream_times(num_steps, eps), -draws, side="right")
    return np.sort(np.minimum(times_not_below, num_steps) - 1).tolist()


class Plan(ABC):
    """The windows of one request: what all strategies share, which is the canvas and its end.

    ``limit`` is the length prompt and response may reach, ``num_suffix`` what stands behind the canvas. When a canvas
    is full and the request goes on, `start_canvas` lays out the next one. ``shift``: 1 for a family whose logits at i
    predict token i + 1; a window then begins one position early, so that its first position has its own logits.
    ``seed``: the request's, signed 64 bits.

    ``step`` counts the steps of the schedule, ``num_passes`` the forward passes: a step that unmasks nothing has none.
    """

    def __init__(
        self,
        params: DiffusionParams,
        prompt_length: int,
        limit: int,
        shift: int = 0,
        num_suffix: int = 0,
        seed: int = 0,
    ) -> None:
        self.params = params
        self.limit = limit
        self.shift = shift
        self.num_suffix = num_suffix
        self.seed = seed
        self.prompt_length = prompt_length
        self.canvas_start = self.canvas_end = prompt_length
        self.step = self.num_passes = 0
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
        return self.canvas_is_full and self.num_passes > 0 and ended

    def start_canvas(self) -> None:
        """Lay out a canvas of masks after everything that is final."""
        length = self.next_canvas_length
        self.canvas_start, self.canvas_end = self.canvas_end, self.canvas_end + length
        self._counts_at_start = self.step, self.num_passes
        self._begin_canvas()
        self.window = self._next_window()

    def restart_canvas(self) -> None:
        """Go back to the canvas as it was laid out: the same steps give the same tokens again (after preemption)."""
        self.step, self.num_passes = self._counts_at_start
        self._begin_canvas()
        self.window = self._next_window()

    def look_ahead(self, most: int) -> list[Window]:
        """The present window and, up to so many, those after it that cover the same positions unless a block is filled.

        They presume that each window unmasks its quotas and no more, which is sure without a threshold.
        """
        assert self.window is not None
        return [self.window]

    def advance(self, num_masked: Sequence[int], eos_is_taken: bool = False, num_passes: int = 1) -> None:
        """Record forward passes: positions that the last left masked in each of the active blocks, in their order.

        Several passes are some of what `look_ahead` gave, none but the last of which filled a block.
        """
        self.num_passes += num_passes
        self._record(num_masked, eos_is_taken, num_passes)
        self.window = self._next_window()

    @property
    def steps_are_spent(self) -> bool:
        return self.params.max_steps is not None and self.num_passes >= self.params.max_steps

    def _take_all_if_last(self, window: Window) -> Window:
        """The window itself, or where it is the last step of the request, one that unmasks all that is left."""
        if self.params.max_steps is None or self.num_passes < self.params.max_steps - 1:
            return window
        masked, length = self._num_masked_in_canvas(), self.canvas_end + self.num_suffix
        rest = ActiveBlock(self.canvas_start, self.canvas_end, masked, quota=masked)
        return window._replace(start=0, end=length, visible=length, step=self.step, blocks=(rest,))

    @abstractmethod
    def _begin_canvas(self) -> None: ...

    @abstractmethod
    def _next_window(self) -> Window | None:
        """The next step's window; None when the canvas is full."""

    @abstractmethod
    def _record(self, num_masked: Sequence[int], eos_is_taken: bool, num_passes: int) -> None:
        """What `advance` was told; counts ``step`` on."""

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
        self._unmasked_in = self._schedule() if self._num_masked else []

    def _schedule(self) -> list[int]:
        """The steps that Dream's schedules unmask the active block's masks in, one entry each; empty where none is asked.

        They are found once for the block: there may be a million, and all others wait while they are searched.
        """
        params, num_steps = self.params, self._steps[self._block]
        schedule = POLICIES[params.remasking].schedule
        if schedule == "even" or params.threshold is not None or params.factor is not None:
            return []
        if schedule == "drawn":
            return origin_steps(self._draw_numbers(*self._blocks[self._block]), num_steps, params.eps)
        return dream_steps(self._num_masked, num_steps, params.eps)

    def _draw_numbers(self, start: int, end: int) -> np.ndarray:
        """The numbers of the masked positions of a block: those that the worker ranks them by."""
        import torch

        from dllm_plugin.kernels import philox

        template, begin = self.params.template, self.canvas_start
        position = torch.tensor([i for i in range(start, end) if not template or template[i - begin] == HOLE])
        zero = torch.zeros_like(position)
        return philox.uniform(zero + self.seed, position, zero, stream=philox.UNIFORM).numpy()

    def _record(self, num_masked: Sequence[int], eos_is_taken: bool, num_passes: int) -> None:
        *_, (last, _, _) = islice(self._passes(), num_passes)
        self.step += last + 1 - self._block_step
        self._block_step = last + 1
        self._num_masked = num_masked[0]
        if self.steps_are_spent:
            self._block = len(self._blocks)
        elif self._num_masked == 0:
            self._begin_block(self._block + 1)

    def _passes(self) -> Iterator[tuple[int, int, int]]:
        """The forward passes of the active block from now on: step in the block, masks before it, quota.

        They presume that each unmasks its quota and no more. A step of a schedule that unmasks nothing is passed over: it
        would change nothing, and its noise is its own.
        """
        step, num_masked = self._block_step, self._num_masked
        while num_masked:
            step = self._next_step(step, num_masked)
            quota = self._quota(step, num_masked)
            yield step, num_masked, quota
            step, num_masked = step + 1, num_masked - quota

    def look_ahead(self, most: int) -> list[Window]:
        assert self.window is not None
        if self.params.max_steps is not None:
            return [self.window]
        windows: list[Window] = []
        since = self._block_step
        for step, num_masked, quota in islice(self._passes(), most):
            window = self._window(since, step, num_masked, quota)
            if windows and (window.start, window.end) != (self.window.start, self.window.end):
                break
            windows.append(window)
            since = step + 1
        return windows

    def _next_window(self) -> Window | None:
        if self._block == len(self._blocks):
            return None
        window = self._window(self._block_step, *next(self._passes()))
        return window if self.params.max_steps is None else self._take_all_if_last(window)

    def _window(self, since: int, step: int, num_masked: int, quota: int) -> Window:
        """That of the active block in a step of it; ``since``: the step after the forward pass before."""
        params, (start, end) = self.params, self._blocks[self._block]
        threshold = math.inf if params.threshold is None else params.threshold
        block = ActiveBlock(start, end, num_masked, quota, threshold, params.factor or 0.0)
        length = self.canvas_end + self.num_suffix
        if self._refreshes(since, step):
            first, last = 0, length
        else:
            first, last = start - self.shift, length if params.cache == "prefix" else end
        return Window(
            start=first,
            end=last,
            visible=length,
            step=self.step + step - self._block_step,
            blocks=(block,),
            settles_below=self.canvas_end,
            caches=params.cache != "none",
        )

    def _refreshes(self, since: int, step: int) -> bool:
        """Whether the step, or one from ``since`` on that was passed over, forwards everything.

        The canvas has not changed since a step that was passed over, so refreshing later is the same.
        """
        refresh = self.params.cache_refresh
        return self.params.cache == "none" or (step - step % refresh >= since if refresh else since == 0)

    def _next_step(self, step: int, num_masked: int) -> int:
        """The first step of the active block, from ``step`` on, that unmasks something."""
        return max(step, self._unmasked_in[-num_masked]) if self._unmasked_in else step

    def _quota(self, step: int, num_masked: int) -> int:
        """What a step of the active block unmasks, at least where a threshold or factor may admit more."""
        if self.params.threshold is not None or self.params.factor is not None:
            return 1
        if self._unmasked_in:
            return bisect_right(self._unmasked_in, step) - (len(self._unmasked_in) - num_masked)
        return even_quota(self._masks[self._block], step, self._steps[self._block])

    def _num_masked_in_canvas(self) -> int:
        return self._num_masked + sum(self._masks[self._block + 1 :])
