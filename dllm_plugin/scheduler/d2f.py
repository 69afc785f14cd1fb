"""Discrete diffusion forcing: blocks denoised in a pipeline under block-causal attention, with an exact KV cache.

State machine of zhijie-group/Discrete-Diffusion-Forcing:D2F-eval/eval_dream.py (`_generate_block_single`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dllm_plugin.scheduler.plan import Plan
from dllm_plugin.scheduler.window import ActiveBlock, Attention, Window

DEFAULT_BLOCK_LENGTH = 32


@dataclass(slots=True)
class _Block:
    start: int
    end: int
    num_masked: int
    must_progress: bool = False  # the published code calls such a block complete, its paper fully activated

    @property
    def progress(self) -> float:
        # exact where it equals a threshold: 1 - 9 / 10 is less than 0.1
        return (self.end - self.start - self.num_masked) / (self.end - self.start)


class D2FPlan(Plan):
    """Open blocks of a growing canvas, all denoised in the same forward pass.

    - The next block opens when the last one is unmasked to ``d2f_add_threshold``; one a step, none after an EOS.
    - Every open block takes the tokens above ``d2f_accept_threshold``. One that must progress takes its best token
      where there is none; that is the first block, and any whose predecessor has reached ``d2f_complete_threshold``.
    - Attention is block-causal after the prompt, so a block's keys and values are exact once its tokens and all before
      them are final: the forward pass after that writes them, and the window then begins behind the block. No pass is
      spent on it.
    """

    @property
    def block_length(self) -> int:
        return self.params.block_length or DEFAULT_BLOCK_LENGTH

    def _begin_canvas(self) -> None:
        self._open: list[_Block] = []
        self._next_start = self.canvas_start
        self._cached_until = 0  # keys and values below this are final
        self._eos_is_taken = False
        self._open_blocks()

    def _open_blocks(self) -> None:
        """Open the next block if it is due, and mark the blocks that must progress."""
        if self._may_open():
            length = self.block_length
            end = min(self._next_start + length, self.canvas_end)
            self._open.append(_Block(self._next_start, end, end - self._next_start))
            self._next_start = end
        due = True  # what is before the first open block is final
        for block in self._open:
            block.must_progress |= due
            due = block.progress >= self.params.d2f_complete_threshold

    def _may_open(self) -> bool:
        params = self.params
        if self._next_start == self.canvas_end or self._eos_is_taken:
            return False
        if not self._open:
            return True
        first = next((i for i, block in enumerate(self._open) if block.num_masked), len(self._open))
        room = not params.d2f_max_blocks or len(self._open) - first < params.d2f_max_blocks
        return room and self._open[-1].progress >= params.d2f_add_threshold

    def _record(self, num_masked: Sequence[int], eos_is_taken: bool, num_passes: int, num_edited: int) -> None:
        self.timestep += num_passes
        if self.steps_are_spent:
            self._open, self._next_start = [], self.canvas_end
            return
        self._eos_is_taken |= eos_is_taken
        active = [block for block in self._open if block.num_masked]
        self._cached_until = active[0].start  # what had no mask before the pass was written clean by it
        for block, left in zip(active, num_masked, strict=True):
            block.num_masked = left
        self._open = [block for block in self._open if block.end > self._cached_until]
        self._open_blocks()

    def _recount(self, position: int, change: int) -> None:
        next(block for block in self._open if block.start <= position < block.end).num_masked += change

    def _next_window(self) -> Window | None:
        active = [block for block in self._open if block.num_masked]
        if not active:
            return None
        params, end = self.params, self._open[-1].end
        window = Window(
            start=max(0, self._cached_until - self.shift),
            end=end,
            visible=end,
            timestep=self.timestep,
            blocks=tuple(
                ActiveBlock(b.start, b.end, b.num_masked, int(b.must_progress), params.d2f_accept_threshold)
                for b in active
            ),
            settles_below=self.canvas_end,
            attention=Attention("block_causal", self.canvas_start, self.block_length),
            caches=True,
            pipelined=True,
        )
        if self._is_last_pass:
            num_masked = sum(block.num_masked for block in self._open) + self.canvas_end - self._next_start
            return self._take_all(window, num_masked)
        return window
