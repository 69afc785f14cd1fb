"""Fast-dLLM's decoding: prefix and dual cache, and steps that unmask whatever is sure enough; with it, infilling.

For LLaDA the published `generate`, `generate_with_prefix_cache` and `generate_with_dual_cache` in one function, line by
line but for whose turn it is to be forwarded. Deviations beyond those of `decoding`, all deliberate:

- A threshold is passed by what is greater, not by what equals it.
- No pass is run once a block has no mask left; the published loop runs one more over the finished block.
- `factor` accepts a last rank only if it passes; the published loop accepts it whatever it is.
- Confidences are float32, not float64.
- `cache_refresh` n forwards everything every n steps of a block, not at its first step alone; 1 is no cache at all.
- `prompt_refresh` and `refresh_window` have refreshes forward less: the prompt at an interval of its own, as in dLLM-Cache, and
  no more than the block's vicinity, as in dInfer. The published loops forward everything.

Dream's published cache commits the first token of a block from the full forward pass whatever its confidence, because
its row is not in the window afterwards. Here the window begins one position early, so every pass has the right row, and
every step of a block, the first included, follows the request's own algorithm and schedule.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from . import dream, llada
from .block_models import BlockModel, CachedBlockModel
from .cached_model import CachedModel
from .decoding import Block, Canvas, Generation, Uniforms, blocks, choose, most_confident
from .model import ReferenceModel

CACHES = ("none", "prefix", "dual")
HOLE = -1


@dataclass
class Infilling(Canvas):
    """A canvas with something behind it, and with positions that are given; `template` has a HOLE for each mask."""

    suffix_ids: Sequence[int] = ()
    template: Sequence[int] = ()

    def __post_init__(self) -> None:
        given = torch.tensor(self.template or [HOLE] * self.gen_length)
        self.masked = given == HOLE
        canvas = given.masked_fill(self.masked, self.mask_token_id)
        self.ids = torch.cat([torch.tensor(self.prompt_ids), canvas, torch.tensor(self.suffix_ids, dtype=torch.long)])
        self.response = self.ids[len(self.prompt_ids) :][: self.gen_length]  # a view, as in Canvas

    def candidates(self, block: Block) -> Tensor:
        return block.start + self.masked[block.start : block.end].nonzero()[:, 0]


def generate(
    model: ReferenceModel | BlockModel,
    prompt_ids: list[int],
    gen_length: int,
    steps: int,
    block_length: int | None = None,
    *,
    cache: str = "none",
    cache_refresh: int = 0,
    prompt_refresh: int | None = None,
    refresh_window: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    remasking: str = "low_confidence",
    eps: float = 1e-3,
    suffix_ids: Sequence[int] = (),
    template: Sequence[int] = (),
    max_steps: int | None = None,
    uniforms: Uniforms | None = None,
    stop_ids: Collection[int] = (),
) -> Generation:
    """Fills a canvas of gen_length tokens, or the holes of a template, at temperature 0.

    With a `threshold` or a `factor` a pass unmasks as much as that admits, at least one position, and `steps` says
    nothing; otherwise as much as the schedule of `remasking` says: LLaDA's even shares for `llada.REMASKING`, Dream's
    time schedule for `dream.ALGORITHMS`. "random" and "origin" take `uniforms`. The pass number `max_steps` unmasks all
    that is left, and is run over the whole sequence.

    A refresh forwards everything in the blocks 0, n, 2n ... of those with a mask, n = `prompt_refresh`, in the others the
    canvas and what follows. 0: everything once, in the first pass. None: 1, or 0 where there is a `refresh_window`. Of these
    positions a `refresh_window` leaves so many on each side of the block, except in the first pass of blocks 0, n, 2n ...
    """
    if cache not in CACHES:
        raise ValueError(f"cache is one of {', '.join(CACHES)}, not {cache!r}")
    canvas = Infilling(prompt_ids, gen_length, model.mask_token_id, stop_ids, suffix_ids=suffix_ids, template=template)
    before, length = len(prompt_ids), len(canvas.ids)
    cached = (CachedBlockModel if isinstance(model, BlockModel) else CachedModel)(model, length)
    every = prompt_refresh if prompt_refresh is not None else int(refresh_window is None)
    started: list[Block] = []
    for block in blocks(gen_length, block_length, max(steps, -(-gen_length // (block_length or gen_length)))):
        quotas = llada.transfer_counts(len(canvas.candidates(block)), block.steps)
        times, shares = dream.transfer_times(block.steps, eps), dream.transfer_shares(block.steps, eps)
        for step in count():
            candidates = canvas.candidates(block)
            if len(candidates) == 0 or canvas.stopped:
                break
            forward = canvas.num_steps
            if step == 0:
                started.append(block)
            last = max_steps is not None and len(canvas.trace) == max_steps - 1
            if last:
                candidates = canvas.masked.nonzero()[:, 0]

            # what is forwarded; everything else keeps the keys and values of the pass that last forwarded it
            refreshed = step == 0 or (cache_refresh > 0 and step % cache_refresh == 0)
            number = len(started) - 1
            with_prompt = (number % every == 0) if every > 0 else (number == 0 and step == 0)
            whole = with_prompt and (step == 0 or refresh_window is None)
            if cache == "none" or (refreshed and whole) or last:
                first, logits = 0, model.logits_for_positions(canvas.ids)
                if cache != "none":
                    cached.forward(canvas.ids, 0, length, length)
            elif refreshed:
                first, end = (cached.shift if with_prompt else before), length
                if refresh_window is not None:
                    first = max(first, before + block.start - refresh_window)
                    if cache == "dual":
                        end = min(length, before + block.end + refresh_window)
                logits = cached.logits_for_positions(canvas.ids, first, end, length)
            elif cache == "prefix":
                first = before + block.start
                logits = cached.logits_for_positions(canvas.ids, first, length, length)
            else:
                first = before + block.start
                logits = cached.logits_for_positions(canvas.ids, first, before + block.end, length)
            logits = logits[before + candidates - first]

            drawn = (candidates, times[step]) if remasking == "origin" else (candidates,)
            confidence, chosen = rank(logits, drawn, model.mask_token_id, remasking, forward, uniforms)
            if last:
                committed = torch.arange(len(candidates))
            elif threshold is not None:
                committed = most_confident(confidence, max(1, int((confidence > threshold).sum())))
            elif factor is not None:
                committed = most_confident(confidence, admitted(confidence, factor))
            elif remasking == "origin":
                committed = (confidence < shares[step]).nonzero()[:, 0]
            elif remasking in dream.ALGORITHMS:
                committed = most_confident(confidence, int(len(candidates) * shares[step]))
            else:
                committed = most_confident(confidence, quotas[step])
            canvas.commit(candidates[committed], chosen[committed])
    return canvas.result()


def rank(
    logits: Tensor,
    drawn: tuple[Tensor, ...],
    mask_token_id: int,
    remasking: str,
    forward: int,
    uniforms: Uniforms | None,
) -> tuple[Tensor, Tensor]:
    """What the positions are ordered by, and their tokens; ``drawn`` goes to `uniforms`: the positions, for origin a time."""
    if remasking == "origin":
        return uniforms(forward, *drawn), choose(logits, mask_token_id)
    if remasking in dream.ALGORITHMS:
        return dream.sample_tokens(logits, mask_token_id, remasking)
    chosen = choose(logits, mask_token_id)
    return llada.rank(logits, chosen, *drawn, remasking, forward, uniforms), chosen


def admitted(confidence: Tensor, factor: float) -> int:
    """How many of the most confident a factor admits: rank n while c_n >= 1 - factor / (n + 1), rank 1 always.

    >>> admitted(torch.tensor([0.1, 0.9, 0.8]), 0.7)  # 0.9 whatever it is, 0.8 >= 1 - 0.7 / 3, 0.1 < 1 - 0.7 / 4
    2
    """
    ordered = confidence.sort(descending=True).values.tolist()
    number = 1
    while number < len(ordered) and ordered[number] >= 1 - factor / (number + 2):
        number += 1
    return number
