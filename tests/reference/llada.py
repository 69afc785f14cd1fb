"""LLaDA's decoding: blocks from left to right, in each a fixed number of most confident tokens a pass.

Follows the published `generate` line by line for one prompt; the deviations are those of `decoding`.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from .decoding import Canvas, Generation, TokenGumbel, Uniforms, blocks, choose, most_confident
from .model import Predictor

REMASKING = ("low_confidence", "random", "sequential")


def generate(
    model: Predictor,
    prompt_ids: list[int],
    gen_length: int,
    steps: int,
    block_length: int | None = None,
    *,
    remasking: str = "low_confidence",
    cfg_scale: float = 0.0,
    temperature: float = 0.0,
    eos_suppression: str = "none",
    eos_id: int | None = None,
    eot_id: int | None = None,
    uniforms: Uniforms | None = None,
    gumbel: TokenGumbel | None = None,
    stop_ids: Collection[int] = (),
) -> Generation:
    """Fills a canvas of gen_length tokens in `steps` forward passes spread over blocks; without a length, one block.

    `remasking` is one of REMASKING, see `rank`; "random" takes `uniforms`. A temperature takes `gumbel`.
    `eos_suppression`: "logits" is the published logits_eos_inf (EOS is never chosen), "confidence" is
    confidence_eos_eot_inf (EOS and EoT may be chosen, but are committed last). The published assignment for the latter
    reaches EOS only at temperature 0, where two names hold one tensor; that is kept.
    A guided pass, which runs two sequences, counts as one forward pass. Decoding stops early only for `stop_ids`.
    """
    canvas = Canvas(prompt_ids, gen_length, model.mask_token_id, stop_ids)
    for block in blocks(gen_length, block_length, steps):
        quotas = transfer_counts(block.end - block.start, block.steps)
        for step, candidates in canvas.passes(block):
            forward = canvas.num_steps
            logits = guided_logits(model, canvas, cfg_scale)[len(prompt_ids) + candidates]

            if eos_suppression == "logits":
                logits[:, eos_id] = -torch.inf
            if temperature > 0:
                chosen = choose(logits.double() + temperature * gumbel(forward, candidates), model.mask_token_id)
            else:
                chosen = choose(logits, model.mask_token_id)
            if eos_suppression == "confidence":
                if temperature == 0:
                    logits[:, eos_id] = -torch.inf
                if eot_id is not None:
                    logits[:, eot_id] = -torch.inf

            confidence = rank(logits, chosen, candidates, remasking, forward, uniforms)
            committed = most_confident(confidence, quotas[step])
            canvas.commit(candidates[committed], chosen[committed])
    return canvas.result()


def rank(
    logits: Tensor, chosen: Tensor, candidates: Tensor, remasking: str, forward: int, uniforms: Uniforms | None
) -> Tensor:
    """What the candidates are ordered by, highest first; "sequential", from left to right, is ours."""
    if remasking == "low_confidence":
        return torch.softmax(logits.float(), dim=-1).gather(1, chosen[:, None])[:, 0]
    if remasking == "random":
        return uniforms(forward, candidates)
    if remasking == "sequential":
        return -candidates.double()
    raise ValueError(f"LLaDA's decoder has no rule for {remasking!r}")


def transfer_counts(num_masked: int, steps: int) -> list[int]:
    """How many tokens each step of a block commits: an even share, the remainder one each to the first steps.

    >>> transfer_counts(32, 5)
    [7, 7, 6, 6, 6]
    """
    share, extra = divmod(num_masked, steps)
    return [share + (step < extra) for step in range(steps)]


def guided_logits(model: Predictor, canvas: Canvas, cfg_scale: float) -> Tensor:
    """Logits of the whole sequence, pushed away by cfg_scale from those the model gives with the prompt masked."""
    logits = model.logits_for_positions(canvas.ids)
    if cfg_scale > 0:
        unprompted = canvas.ids.clone()
        unprompted[: len(canvas.prompt_ids)] = model.mask_token_id
        without = model.logits_for_positions(unprompted)
        logits = without + (cfg_scale + 1) * (logits - without)
    return logits
