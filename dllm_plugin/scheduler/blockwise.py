"""Strategy ``full``: one block after the other under full attention, with Fast-dLLM's caches or none."""

import math
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

import numpy as np

from dllm_plugin.params import HOLE
from dllm_plugin.policies import POLICIES
from dllm_plugin.scheduler.plan import Plan
from dllm_plugin.scheduler.schedules import dream_timesteps, even_quota, origin_timesteps, split_blocks
from dllm_plugin.scheduler.window import ActiveBlock, Window


class BlockwisePlan(Plan):
    """One active block after the other under full attention, with Fast-dLLM's caches or none.

    Without a cache every step forwards the whole sequence. With ``prefix`` or ``dual`` the first step of a block is a refresh,
    and so is every ``cache_refresh``-th; the steps between forward the block and all behind it, or the block alone. The first
    refresh of a canvas forwards the whole sequence, since preemption may have taken every page; the others what
    ``prompt_refresh`` and ``refresh_window`` leave of it.
    """

    def _begin_canvas(self) -> None:
        first_length = min(self.params.canvas_length, self.limit - self.prompt_length)
        steps = self.params.steps
        if steps is not None and not self.params.template:
            steps = math.ceil(steps * self.canvas_length / first_length)  # a shorter last canvas keeps the pace
        lengths, self._steps = split_blocks(self.canvas_length, self.params.block_length, steps)
        edges = np.cumsum([self.canvas_start, *lengths]).tolist()
        self._blocks = list(pairwise(edges))
        holes = self.canvas_ids
        begin = self.canvas_start
        self._masks = [sum(token == HOLE for token in holes[a - begin : b - begin]) for a, b in self._blocks]
        self._begin_block(0)

    def _begin_block(self, block: int) -> None:
        while block < len(self._blocks) and self._masks[block] == 0:
            block += 1  # a template pins all of it
        self._block = block
        self._block_timestep = 0
        self._num_masked = self._masks[block] if block < len(self._blocks) else 0
        self._unmasked_in = self._schedule() if self._num_masked else []

    def _schedule(self) -> list[int]:
        """The timesteps that Dream's schedules unmask the active block's masks in, one entry each; empty where none is asked.

        They are found once for the block: there may be a million, and all others wait while they are searched.
        """
        params, num_steps = self.params, self._steps[self._block]
        schedule = POLICIES[params.remasking].schedule
        if schedule == "even" or params.threshold is not None or params.factor is not None:
            return []
        if schedule == "drawn":
            return origin_timesteps(self._draw_numbers(*self._blocks[self._block]), num_steps, params.eps)
        if schedule == "time":
            return dream_timesteps(self._num_masked, num_steps, params.eps)
        raise ValueError(
            f"nothing says when schedule {schedule!r} unmasks; give its timesteps in BlockwisePlan._schedule"
        )

    def _draw_numbers(self, start: int, end: int) -> np.ndarray:
        """The numbers of the masked positions of a block: those that the worker ranks them by."""
        import torch

        from dllm_plugin.kernels import philox

        template, begin = self.params.template, self.canvas_start
        position = torch.tensor([i for i in range(start, end) if not template or template[i - begin] == HOLE])
        zero = torch.zeros_like(position)
        return philox.uniform(zero + self.seed, position, zero, stream=philox.UNIFORM).numpy()

    def _record(self, num_masked: Sequence[int], eos_is_taken: bool, num_passes: int, num_edited: int) -> None:
        *_, (last, _, _) = islice(self._passes(), num_passes)
        self.timestep += last + 1 - self._block_timestep
        self._block_timestep = last + 1
        self._num_masked = num_masked[0]
        if self.steps_are_spent:
            self._block = len(self._blocks)
        elif self._num_masked == 0:
            self._begin_block(self._block + 1)

    def _recount(self, position: int, change: int) -> None:
        self._num_masked += change

    def _passes(self) -> Iterator[tuple[int, int, int]]:
        """The forward passes of the active block from now on: timestep in the block, masks before it, quota.

        They presume that each unmasks its quota and no more. A timestep that unmasks nothing is passed over: it would
        change nothing, and its noise is its own.
        """
        timestep, num_masked = self._block_timestep, self._num_masked
        while num_masked:
            timestep = self._next_timestep(timestep, num_masked)
            quota = self._quota(timestep, num_masked)
            yield timestep, num_masked, quota
            timestep, num_masked = timestep + 1, num_masked - quota

    def look_ahead(self, most: int, reserved: int = sys.maxsize) -> list[Window]:
        assert self.window is not None
        if self.params.max_steps is not None:
            return [self.window]
        windows: list[Window] = []
        since = self._block_timestep
        for timestep, num_masked, quota in islice(self._passes(), most):
            window = self._window(since, timestep, num_masked, quota)
            if windows and (window.start, window.end) != (self.window.start, self.window.end):
                break
            windows.append(window)
            since = timestep + 1
        return windows

    def _next_window(self) -> Window | None:
        if self._block == len(self._blocks):
            return None
        window = self._window(self._block_timestep, *next(self._passes()))
        if self._is_last_pass:
            return self._take_all(window, self._num_masked + sum(self._masks[self._block + 1 :]))
        return window

    def _window(self, since: int, timestep: int, num_masked: int, quota: int) -> Window:
        """That of the active block in a timestep of it; ``since``: the timestep after the forward pass before."""
        params, (start, end) = self.params, self._blocks[self._block]
        threshold = math.inf if params.threshold is None else params.threshold
        block = ActiveBlock(start, end, num_masked, quota, threshold, params.factor or 0.0)
        length = self.canvas_end + self.num_suffix
        if self._refreshes(since, timestep):
            first, last = self._refreshed(is_first=since == 0)
        else:
            first, last = start - self.shift, self._last(end)
        return Window(
            start=first,
            end=last,
            visible=length,
            timestep=self.timestep + timestep - self._block_timestep,
            blocks=(block,),
            settles_below=self.canvas_end,
            caches=params.cache != "none",
        )

    def _refreshes(self, since: int, timestep: int) -> bool:
        """Whether the timestep, or one from ``since`` on that was passed over, is a refresh.

        The canvas has not changed since a timestep that was passed over, so refreshing later is the same.
        """
        refresh = self.params.cache_refresh
        return self.params.cache == "none" or (timestep - timestep % refresh >= since if refresh else since == 0)

    def _refreshed(self, is_first: bool) -> tuple[int, int]:
        """What a refresh of the active block forwards; ``is_first``: it is the first one."""
        params, (start, end) = self.params, self._blocks[self._block]
        length, before = self.canvas_end + self.num_suffix, sum(masks > 0 for masks in self._masks[: self._block])
        every, reach = params.prompt_refresh, params.refresh_window
        if every is None:
            every = 1 if reach is None else 0
        has_come_round = before % every == 0 if every else before == 0 and is_first
        if params.cache == "none" or (is_first and has_come_round):
            return 0, length
        first = 0 if has_come_round else self.canvas_start - self.shift
        if reach is None:
            return first, length
        return max(first, start - self.shift - reach), self._last(end + reach)

    def _last(self, end: int) -> int:
        """Where a window ends that need not go beyond ``end``."""
        length = self.canvas_end + self.num_suffix
        return length if self.params.cache == "prefix" else min(end, length)

    def _next_timestep(self, timestep: int, num_masked: int) -> int:
        """The first timestep of the active block, from ``timestep`` on, that unmasks something."""
        return max(timestep, self._unmasked_in[-num_masked]) if self._unmasked_in else timestep

    def _quota(self, timestep: int, num_masked: int) -> int:
        """What a timestep of the active block unmasks, at least where a threshold or factor may admit more."""
        if self.params.threshold is not None or self.params.factor is not None:
            return 1
        if self._unmasked_in:
            return bisect_right(self._unmasked_in, timestep) - (len(self._unmasked_in) - num_masked)
        # beyond the schedule is where a grammar has refused what was unmasked
        return max(1, even_quota(self._masks[self._block], timestep, self._steps[self._block]))
