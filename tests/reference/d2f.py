"""Discrete diffusion forcing: blocks denoised in a pipeline, none of which sees what comes after it.

The prompt is one block, seen by all; every later block sees the prompt, itself and what is before it. `generate`
follows the published `_generate_block_single` state by state, once over a plain recomputation of everything with the
attention written out as a matrix, once with the published key-value cache. Its two evaluators, eval_dream.py and
eval_llada.py, differ in the shift alone: both draw, filter and rank with Dream's `sample_tokens`, so that a temperature
and filters shape the probabilities that are compared with `accept_threshold`. Deviations beyond those of `decoding`:

- The last block is shorter where the blocks do not divide the canvas; the published code drops the remainder.
- `max_blocks` bounds the blocks that are not final yet, as the buffer of Diffulex does.
- Decoding stops as soon as a stop id stands with everything before it decided; the published code finishes the blocks
  that are open, and opens no further ones, which is all it does about a stop id that has masks before it.
- The pass number `max_steps` lays out all the blocks that are left and unmasks everything.
"""

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from .cached_model import CachedModel
from .decoding import Canvas, Generation, TokenGumbel
from .dream import sample_tokens
from .model import ReferenceModel


@dataclass
class Block:
    start: int  # in the response
    end: int
    state: str = "active"  # then to_cache, in_cache
    complete: bool = False  # the paper's fully activated

    def progress(self, canvas: Canvas) -> Fraction:
        return Fraction(int((~canvas.masked[self.start : self.end]).sum()), self.end - self.start)


def generate(
    model: ReferenceModel,
    prompt_ids: list[int],
    gen_length: int,
    steps: int = 0,  # unused: how many passes it takes is what the thresholds decide
    block_length: int = 32,
    *,
    add_threshold: float = 0.1,
    complete_threshold: float = 0.95,
    accept_threshold: float = 0.9,
    max_blocks: int = 0,
    max_steps: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    gumbel: TokenGumbel | None = None,
    with_cache: bool = False,
    stop_ids: Collection[int] = (),
) -> Generation:
    """Fills a canvas of gen_length tokens. A temperature takes `gumbel`; None switches top_p, top_k and min_p off."""
    canvas = Canvas(prompt_ids, gen_length, model.mask_token_id, stop_ids)
    before, length = len(prompt_ids), len(prompt_ids) + gen_length
    allowed = block_causal(before, gen_length, block_length)
    cached, num_cached, last_logits = CachedModel(model, length), 0, None
    pipeline = [Block(0, 0, "to_cache", complete=True)]  # the prompt
    eos_is_taken = False

    while canvas.masked.any() and not canvas.stopped:
        # add a block, at most one a pass
        last = pipeline[-1]
        num_active = sum(block.state == "active" for block in pipeline)
        progress = 1 if last is pipeline[0] else last.progress(canvas)
        due = progress >= Fraction(str(add_threshold)) and not (max_blocks and num_active >= max_blocks)
        if last.end < gen_length and due and not eos_is_taken:
            pipeline.append(Block(last.end, min(last.end + block_length, gen_length)))
        final_pass = max_steps is not None and len(canvas.trace) == max_steps - 1
        while final_pass and pipeline[-1].end < gen_length:
            pipeline.append(Block(pipeline[-1].end, min(pipeline[-1].end + block_length, gen_length)))
        # complete the successors of those that are far enough
        for block, successor in pairwise(pipeline):
            reached = block is pipeline[0] or block.progress(canvas) >= Fraction(str(complete_threshold))
            successor.complete |= reached
        active = [block for block in pipeline if block.state == "active"]
        if not active:
            break

        # forward, and keep what is final
        end = before + pipeline[-1].end
        if with_cache:
            rows, num_cached, last_logits = forward_with_cache(
                cached, canvas, pipeline, allowed[:end, :end], num_cached, last_logits
            )
        else:
            rows = shifted(model, recompute(model, canvas.ids[:end], allowed[:end, :end]))

        # unmask
        forward, taken_positions, taken_tokens = len(canvas.trace), [], []
        for block in active:
            candidates = block.start + canvas.masked[block.start : block.end].nonzero()[:, 0]
            if len(candidates) == 0:
                continue
            confidence, chosen = sample_tokens(
                rows[before + candidates],
                model.mask_token_id,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                noise=gumbel(forward, candidates) if temperature > 0 else None,
            )
            taken = confidence > accept_threshold
            if block.complete and not taken.any():
                taken[confidence.argmax()] = True  # the first of equals
            if final_pass:
                taken[:] = True
            taken_positions.append(candidates[taken])
            taken_tokens.append(chosen[taken])
        canvas.commit(torch.cat(taken_positions), torch.cat(taken_tokens))
        eos_is_taken |= any(token in stop_ids for token in canvas.trace[-1].tokens)

        # deactivate, in order
        for block in pipeline:
            if block.state == "active":
                if canvas.masked[block.start : block.end].any():
                    break
                block.state = "to_cache"
    return canvas.result()


def block_causal(prompt_length: int, gen_length: int, block_length: int) -> Tensor:
    """[positions, positions] bool: True where the query of a row sees the key of a column."""
    number = torch.cat([torch.zeros(prompt_length, dtype=torch.long), 1 + torch.arange(gen_length) // block_length])
    return number[:, None] >= number


def recompute(model: ReferenceModel, ids: Tensor, allowed: Tensor) -> Tensor:
    """The model's own logits with nothing remembered."""
    return CachedModel(model, len(ids)).forward(ids, 0, len(ids), allowed)


def shifted(model: ReferenceModel, logits: Tensor) -> Tensor:
    return torch.cat([logits[:1], logits[:-1]]) if model.shift else logits


def forward_with_cache(
    cached: CachedModel,
    canvas: Canvas,
    pipeline: list[Block],
    allowed: Tensor,
    num_cached: int,
    last_logits: Tensor | None,
) -> tuple[Tensor, int, Tensor | None]:
    """Logits by the position they predict, NaN where nothing was forwarded; the new length of the cache; its last row.

    What is to be cached is forwarded a last time, now without masks in it, together with the active blocks.
    """
    before, end = len(canvas.prompt_ids), allowed.shape[0]
    to_cache = [block for block in pipeline if block.state == "to_cache"]
    start = num_cached
    logits = cached.forward(canvas.ids[:end], start, end, allowed)
    # whatever is not to be kept is forgotten at once
    kept = max([before + block.end for block in to_cache], default=num_cached)
    cached.keys[:, :, kept:] = cached.values[:, :, kept:] = torch.nan
    previous_row = last_logits
    if to_cache:
        last_logits = logits[kept - start - 1]
        for block in to_cache:
            block.state = "in_cache"
    rows = torch.full((end, logits.shape[1]), torch.nan)
    if cached.shift:
        rows[start + 1 :] = logits[:-1]
        if previous_row is not None:
            rows[start] = previous_row
    else:
        rows[start:] = logits
    return rows, kept, last_logits
