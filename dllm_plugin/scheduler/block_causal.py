"""Strategy ``block``: one block after the other under block-causal attention, with an exact KV cache (SDAR, LLaDA2 and kin)."""

import copy
import math
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from dllm_plugin.metrics import Extent
from dllm_plugin.params import HOLE
from dllm_plugin.scheduler.plan import Plan
from dllm_plugin.scheduler.schedules import even_quota
from dllm_plugin.scheduler.window import FULL, ActiveBlock, Attention, Window

DEFAULT_BLOCK_LENGTH = 32


class _Stage(NamedTuple):
    """A part of the open block that is unmasked before the next one: a sub-block, all of it, or its first token."""

    start: int
    end: int
    num_masked: int
    is_first_token: bool = False


class BlockCausalPlan(Plan):
    """Blocks of ``block_length`` positions counted from the start of the sequence; the prompt's tail shares the first one.

    - A position sees its own block and all before it, so keys and values of a block are exact once its tokens are final. The
      first window of the next block writes them: it begins with that block, and no pass is spent on them alone. The first
      window of a request holds the whole prompt, or where a step may not forward so much, a chunk that ends with a block.
    - A block is denoised to its end even where the answer ends within it, as the published loops do.
    - A block may be unmasked sub-block by sub-block. With cache ``dual`` a step then forwards its sub-block alone once the
      first position of it has a token (Fast-dLLM v2).
    - Where the logits at i predict token i + 1, the first token of a block is that of the row before it, as left to right,
      in the pass that makes the keys and values before it exact (Efficient-Large-Model/Fast_dLLM_v2_7B:modeling.py).
    - With an ``edit_threshold`` the tokens of the block stay open: a step replaces those that the model would not choose
      again. The block is final when a step changes nothing, or after ``max_post_steps`` steps without a mask
      (inclusionAI/LLaDA2.1-mini:modeling_llada2_moe.py).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # by start and timestep of the open block; passes that are run again are alike, though ``emitted`` is ahead of them
        self._is_alone: dict[tuple[int, int], bool] = {}

    @property
    def block_length(self) -> int:
        return self.params.block_length or DEFAULT_BLOCK_LENGTH

    @property
    def stage_length(self) -> int:
        return self.params.sub_block_length or self.block_length

    def _edge_behind(self, position: int) -> int:
        """The end of the block that holds the position."""
        return min(position // self.block_length * self.block_length + self.block_length, self.longest)

    def extent(self, length: int) -> Extent:
        end = self._edge_behind(length - 1) - self.prompt_length
        return replace(super().extent(length), block_length=self.block_length, end=end, from_start=1)

    @property
    def next_canvas_length(self) -> int:
        return self._edge_behind(self.canvas_end + super().next_canvas_length - 1) - self.canvas_end

    @property
    def most_emitted(self) -> int:
        return min(len(self.params.template) or self.block_length, self.limit - self.prompt_length)

    @property
    def reserved_length(self) -> int:
        template = self.params.template[self.emitted - self.prompt_length :]
        num_pinned = template.index(HOLE) if HOLE in template else 0  # no window ends in a block that is pinned
        return self._edge_behind(self.emitted + num_pinned)

    @property
    def _answer_end(self) -> int:
        """Behind it nothing is emitted, though its block is denoised to the end."""
        return min(self.limit, self.prompt_length + len(self.params.template)) if self.params.template else self.limit

    @property
    def restart_position(self) -> int:
        """What was emitted before a preemption is not denoised again, but for the block that was open."""
        return max(self.canvas_start, self.emitted // self.block_length * self.block_length)

    def _begin_canvas(self) -> None:
        self.canvas_start = self.restart_position
        self._holes = [self.canvas_start + i for i, token in enumerate(self.canvas_ids) if token == HOLE]
        self._begin_block(self.canvas_start)

    def _begin_block(self, position: int) -> None:
        """Open the block of the first mask from ``position`` on; the canvas is full where there is no such mask."""
        self._stages: list[_Stage] = []
        index = bisect_left(self._holes, position)
        if index == len(self._holes) or self.steps_are_spent:
            return
        first = self._holes[index]
        self._start, self._end = first // self.block_length * self.block_length, self._edge_behind(first)
        self._is_alone = {key: value for key, value in self._is_alone.items() if key[0] == self._start}
        self.timestep = self._num_post_steps = 0
        self._counts_at_start = 0, self.num_passes  # a preempted request begins again with this block
        self._is_forwarded = False
        if self.shift and first == self._start > 0:
            self._stages.append(_Stage(first, first + 1, 1, is_first_token=True))
            first += 1
        for start in range(self._start, self._end, self.stage_length):
            end = min(start + self.stage_length, self._end)
            if num_masked := bisect_left(self._holes, end) - bisect_left(self._holes, max(start, first)):
                self._stages.append(_Stage(start, end, num_masked))
        self._stage_timestep = 0

    def _record(self, num_masked: Sequence[int], eos_is_taken: bool, num_passes: int, num_edited: int) -> None:
        window = self.window
        assert window is not None
        if not window.blocks:  # a chunk of the prompt
            self.num_cached = window.end
            return
        self.num_cached = max(self.num_cached, min(window.end, self._start))
        had_masks, stage = window.blocks[0].num_masked > 0, self._stages[0]
        self._is_forwarded |= not stage.is_first_token
        self.timestep += num_passes * (not stage.is_first_token)
        self._stage_timestep += num_passes
        self._stages[0] = stage._replace(num_masked=num_masked[0])
        if self.emitted >= self._answer_end:
            self._stages = []
            return
        if num_masked[0]:
            return
        if self.params.edit_threshold is not None and not stage.is_first_token:
            self._num_post_steps += not had_masks
            is_still = not had_masks and num_edited == 0
            if not (is_still or self._num_post_steps >= self.params.max_post_steps or self.steps_are_spent):
                return
            if is_still:
                self.num_cached = self._end  # those of the very tokens that this step has forwarded
        self._stages.pop(0)
        self._stage_timestep = 0
        if not self._stages or self.steps_are_spent:
            self._begin_block(self._end)

    def _recount(self, position: int, change: int) -> None:
        stage = self._stages[0]
        self._stages[0] = stage._replace(num_masked=stage.num_masked + change)

    def look_ahead(self, most: int, reserved: int = sys.maxsize) -> list[Window]:
        assert self.window is not None
        windows, params = [self.window], self.params
        # which positions a narrow window of the dual cache covers is known when the step before it has been read
        if params.edit_threshold is not None or params.max_steps is not None or params.cache == "dual":
            return windows
        is_by_quota = params.threshold is None and params.factor is None and params.entropy_bound is None
        ahead = copy.copy(self)
        ahead._stages = [*self._stages]
        while len(windows) < most:
            ahead.advance([block.num_masked - block.quota for block in windows[-1].blocks])
            following = ahead.window
            if following is None or following.end > reserved or following.covers_all != self.window.covers_all:
                break
            if not (is_by_quota or _spans(following) == _spans(self.window)):
                break
            windows.append(following)
        return windows

    def advance_through(
        self, num_masked: Sequence[Sequence[int]], eos_is_taken: bool, num_emitted: Sequence[int], num_edited: int
    ) -> None:
        for left, emitted in zip(num_masked, num_emitted, strict=True):  # they may be of several blocks
            if self.window is not None:  # else a pass was launched before the one that ends the answer was read
                self.advance(left, eos_is_taken, 1, emitted, num_edited)

    def _next_window(self) -> Window | None:
        if not self._stages:
            return None
        stage = self._stages[0]
        start, end = self.num_cached, self._end
        if stage.is_first_token:
            start, end = min(start, self._start - 1), self._start  # the row before it is forwarded whatever is cached
        visible = end
        blocks: tuple[ActiveBlock, ...] = ()
        # a block is never cut, since its positions see each other; a window of one runs alone where it is too large
        chunk_end = (start + self.most_tokens) // self.block_length * self.block_length
        chunk_end = max(chunk_end, self._edge_behind(start))
        prompt_first = (
            self.prompt_first and self.num_cached < self.prompt_length // self.block_length * self.block_length
        )
        if prompt_first or (end - start > self.most_tokens and chunk_end < end):
            visible = end = min(chunk_end, self._start)
        else:
            # keys and values of the other sub-blocks are then those of the last pass over all of the block
            if self._goes_alone(stage):
                start, end = stage.start, stage.end
            blocks = (self._active_block(stage, start + self.shift),)
        is_within_block = start // self.block_length == (end - 1) // self.block_length
        return Window(
            start=start,
            end=end,
            visible=visible,
            timestep=self.timestep,
            blocks=blocks,
            settles_below=min(self.canvas_end, self._answer_end),
            attention=FULL if is_within_block else Attention("block_causal", 0, self.block_length),
            caches=True,
            settles=self._when_settled(stage),
        )

    def _active_block(self, stage: _Stage, first: int) -> ActiveBlock:
        """What the next pass unmasks; the window has logits from position ``first`` on, before which nothing is masked."""
        params, left, start = self.params, stage.num_masked, max(stage.start, self.canvas_start, first)
        if stage.is_first_token:
            return ActiveBlock(stage.start, stage.end, 1, quota=1)
        if self._is_last_pass:
            left = sum(each.num_masked for each in self._stages)
            return ActiveBlock(start, self._end, left, quota=left)
        return ActiveBlock(
            start,
            stage.end,
            left,
            min(self._quota(self._stage_timestep), left),
            threshold=math.inf if params.threshold is None else params.threshold,
            factor=params.factor or 0.0,
            entropy_bound=params.entropy_bound or 0.0,
            edit_threshold=math.inf if params.edit_threshold is None else params.edit_threshold,
        )

    def _goes_alone(self, stage: _Stage) -> bool:
        """Whether the next pass forwards the sub-block and not all of the block."""
        if self.params.cache != "dual" or self._is_last_pass:
            return False
        first_has_token = self.emitted > stage.start
        return self._is_alone.setdefault((self._start, self.timestep), self._is_forwarded and first_has_token)

    def _quota(self, timestep: int) -> int:
        """What a timestep of a stage unmasks at least; of a stage that holds some of the prompt as of any other."""
        return max(1, even_quota(self.stage_length, timestep, self.params.block_steps or self.stage_length))

    def _when_settled(self, stage: _Stage) -> Literal["at_once", "when_filled", "when_still"]:
        params = self.params
        if params.edit_threshold is None:
            return "at_once"
        num_post_steps = self._num_post_steps + (stage.num_masked == 0)
        return "when_filled" if self._is_last_pass or num_post_steps >= params.max_post_steps else "when_still"


def _spans(window: Window) -> list[tuple[int, int]]:
    return [(block.start, block.end) for block in window.blocks]
