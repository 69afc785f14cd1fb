"""The plan of a request: what all strategies share. Standard library only."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence

from dllm_plugin.metrics import Extent
from dllm_plugin.params import HOLE, DiffusionParams
from dllm_plugin.scheduler.window import ActiveBlock, Window


class Plan(ABC):
    """The windows of one request: what all strategies share, which is the canvas and its end.

    ``limit``: the length prompt and response may reach. ``longest``: the length that the sequence may reach with what is
    denoised and cut off again; ``limit`` where nothing is said. ``shift``: 1 for a family whose logits at i predict token
    i + 1. ``num_suffix``: tokens behind the canvas. ``seed``: the request's, signed 64 bits. ``most_tokens``: what a step
    may forward. ``prompt_first``: where pages hold exact keys and values, those of the prompt are written by windows of their
    own.

    When a canvas is full and the request goes on, `start_canvas` lays out the next one. ``timestep`` counts the steps of
    the schedule, ``num_passes`` the forward passes: a timestep that unmasks nothing has none. Every position below
    ``emitted`` is emitted. ``num_cached``: positions whose keys and values are in pages and will not change.
    """

    def __init__(
        self,
        params: DiffusionParams,
        prompt_length: int,
        limit: int,
        shift: int = 0,
        num_suffix: int = 0,
        seed: int = 0,
        longest: int | None = None,
        most_tokens: int = sys.maxsize,
        prompt_first: bool = False,
    ) -> None:
        self.params = params
        self.limit = limit
        self.longest = limit if longest is None else longest
        self.shift = shift
        self.num_suffix = num_suffix
        self.seed = seed
        self.most_tokens = most_tokens
        self.prompt_first = prompt_first
        self.prompt_length = self.emitted = prompt_length
        self.canvas_start = self.canvas_end = prompt_length
        self.timestep = self.num_passes = self.num_cached = 0
        self.window: Window | None = None
        self.known: list[int] = []  # tokens that the canvas begins with where it is laid out again

    @property
    def block_length(self) -> int | None:
        """Positions of a block; None: all of the canvas."""
        return self.params.block_length

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
    def most_emitted(self) -> int:
        """Tokens that a step can bring, before the first one."""
        return self.next_canvas_length

    @property
    def canvas_ids(self) -> list[int]:
        """The canvas as it is laid out: a pinned token or a hole for each position."""
        pinned = self.known or list(self.params.template[self.canvas_start - self.prompt_length :])
        return pinned + [HOLE] * (self.canvas_length - len(pinned))

    @property
    def reserved_length(self) -> int:
        """How far pages must reach before the next window runs."""
        return self.num_suffix + self.canvas_end + (self.next_canvas_length if self.canvas_is_full else 0)

    @property
    def is_over(self) -> bool:
        """True where no further canvas may begin: no room is left, a template is filled, the steps are spent."""
        ended = self.canvas_end >= self.limit or bool(self.params.template) or self.steps_are_spent
        return self.canvas_is_full and self.num_passes > 0 and ended

    def extent(self, length: int) -> Extent:
        """What was denoised for prompt and answer of this length."""
        canvas_length = min(len(self.params.template) or self.params.canvas_length, self.limit - self.prompt_length)
        block_length = min(self.block_length or canvas_length, canvas_length)
        return Extent(block_length, canvas_length, self.canvas_end - self.prompt_length, from_start=0)

    def start_canvas(self) -> None:
        """Lay out a canvas of masks after everything that is final."""
        length, self.known = self.next_canvas_length, []
        self.canvas_start, self.canvas_end = self.canvas_end, self.canvas_end + length
        self._counts_at_start = self.timestep, self.num_passes
        self._begin_canvas()
        self.window = self._next_window()

    @property
    def restart_position(self) -> int:
        """Where the canvas begins that `restart_canvas` lays out."""
        return self.canvas_start

    def restart_canvas(self) -> None:
        """Go back to the canvas as it was laid out: the same steps give the same tokens again (after preemption)."""
        self.timestep, self.num_passes = self._counts_at_start
        self._begin_canvas()
        self.window = self._next_window()

    def recount(self, position: int, change: int) -> None:
        """Record that the block of a position has so many masks more, without a forward pass; it is not filled by that."""
        self._recount(position, change)
        self.window = self._next_window()

    def look_ahead(self, most: int, reserved: int = sys.maxsize) -> list[Window]:
        """The present window and, up to so many, those that follow, none of which reaches beyond the ``reserved`` pages.

        They presume that each window unmasks its quotas and no more, which is sure without a threshold. With one they are
        those of the same block.
        """
        assert self.window is not None
        return [self.window]

    def advance_through(
        self, num_masked: Sequence[Sequence[int]], eos_is_taken: bool, num_emitted: Sequence[int], num_edited: int
    ) -> None:
        """`advance` by all the passes of what `look_ahead` gave that were run, with the numbers of each."""
        self.advance(num_masked[-1], eos_is_taken, len(num_masked), sum(num_emitted), num_edited)

    def advance(
        self,
        num_masked: Sequence[int],
        eos_is_taken: bool = False,
        num_passes: int = 1,
        num_emitted: int = 0,
        num_edited: int = 0,
    ) -> None:
        """Record forward passes: positions that the last left masked in each of the active blocks, in their order.

        Several passes are some of what `look_ahead` gave, none but the last of which filled a block. ``num_edited``: tokens
        that the last one replaced. A window without active blocks, a chunk of a prompt, is not counted.
        """
        if self.window is not None and self.window.blocks:
            self.num_passes += num_passes
        self.emitted += num_emitted
        self._record(num_masked, eos_is_taken, num_passes, num_edited)
        self.window = self._next_window()

    @property
    def steps_are_spent(self) -> bool:
        return self.params.max_steps is not None and self.num_passes >= self.params.max_steps

    @property
    def _is_last_pass(self) -> bool:
        return self.params.max_steps is not None and self.num_passes >= self.params.max_steps - 1

    def _take_all(self, window: Window, num_masked: int) -> Window:
        """That of the last pass of a request, which unmasks all that is left of the canvas."""
        length = self.canvas_end + self.num_suffix
        rest = ActiveBlock(self.canvas_start, self.canvas_end, num_masked, quota=num_masked)
        return window._replace(start=0, end=length, visible=length, timestep=self.timestep, blocks=(rest,))

    @abstractmethod
    def _begin_canvas(self) -> None: ...

    @abstractmethod
    def _recount(self, position: int, change: int) -> None: ...

    @abstractmethod
    def _next_window(self) -> Window | None:
        """The next step's window; None when the canvas is full."""

    @abstractmethod
    def _record(self, num_masked: Sequence[int], eos_is_taken: bool, num_passes: int, num_edited: int) -> None:
        """What `advance` was told; counts ``timestep`` on."""
