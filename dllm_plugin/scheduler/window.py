"""Which window of a request comes next: pure planning, no vLLM and no tensors.

A request is one sequence: prompt, then a canvas of masked positions, then a suffix if it asks for one. A plan hands out
one Window a step and is told how many positions of its active blocks are still masked; every strategy is a rule that
picks the next window, and nothing more. Positions count from the start of the sequence.
"""

import math
from typing import Literal, NamedTuple


class ActiveBlock(NamedTuple):
    """Positions ``[start, end)`` of which some are unmasked after the forward pass.

    These are the ``n`` most confident, ``n`` the largest of ``quota``, the number of confidences above ``threshold``, and
    what ``factor`` and ``entropy_bound`` admit (kernels/unmask.py); inf, 0 and 0 switch these off. ``num_masked``: how many
    of the positions are masked before the step; of steps that are looked ahead under a threshold, at most so many.
    ``edit_threshold``: tokens of the block that were unmasked before are replaced where the model prefers another one with
    a probability above it; inf: never.
    """

    start: int
    end: int
    num_masked: int
    quota: int
    threshold: float = math.inf
    factor: float = 0.0
    entropy_bound: float = 0.0
    edit_threshold: float = math.inf


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
    its token. ``settles_below``: what is unmasked below it is emitted once nothing before it is masked and it is settled,
    which ``settles`` says: ``at_once``; or the active block as a whole, ``when_filled`` or ``when_still``, which is when a
    step has neither unmasked nor replaced anything in it.
    ``caches``: the window's keys and values are kept in pages, and a window that does not begin at 0 reads those of earlier
    steps. ``pipelined``: blocks may be filled before the ones in front of them, and the plan asks whether EOS is taken.
    ``timestep``: steps of the request's schedule before this one; with the position it keys the noise, so that nothing
    depends on the batch.
    """

    start: int
    end: int
    visible: int
    timestep: int
    blocks: tuple[ActiveBlock, ...]
    settles_below: int
    attention: Attention = FULL
    caches: bool = False
    pipelined: bool = False
    settles: Literal["at_once", "when_filled", "when_still"] = "at_once"

    @property
    def covers_all(self) -> bool:
        """True where the window holds every key that each of its queries sees."""
        return self.start == 0 and self.end == self.visible and self.attention == FULL
