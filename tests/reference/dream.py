"""Dream's decoding: a time schedule says how many positions a pass commits, an algorithm says which.

Follows the published `diffusion_generate` line by line for one prompt; the deviations are those of `decoding`, and:

- With a block length, each block runs the published loop over its own steps, with its own time schedule, and only its
  own positions are candidates. Without one there is one block, which is the published algorithm.
- Token and position draws are Gumbel-max (log probability plus noise, take the highest), which has the distribution of
  the published multinomial calls but lets a test inject the noise.
- Where top_p and top_k leave nothing but the mask token, the token is the most likely other one, with probability 0.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from .decoding import Canvas, Generation, OriginUniforms, PositionGumbel, TokenGumbel, blocks, choose, most_confident
from .model import Predictor

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")


def generate(
    model: Predictor,
    prompt_ids: list[int],
    gen_length: int,
    steps: int,
    block_length: int | None = None,
    *,
    alg: str = "origin",
    eps: float = 1e-3,
    alg_temp: float | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    uniforms: OriginUniforms | None = None,
    position_gumbel: PositionGumbel | None = None,
    gumbel: TokenGumbel | None = None,
    stop_ids: Collection[int] = (),
) -> Generation:
    """Fills a canvas of gen_length tokens in `steps` forward passes spread over blocks; without a length, one block.

    Noise: `origin` takes `uniforms` (a position is committed where its number is below the step's share), an
    alg_temp takes `position_gumbel`, a temperature takes `gumbel`. top_p and top_k shape the confidences at temperature
    0 too; None switches them off. `min_p`, vLLM's, comes before them. Decoding stops early only for `stop_ids`.
    """
    if alg not in ALGORITHMS:
        raise ValueError(f"alg is one of {', '.join(ALGORITHMS)}, not {alg!r}")
    canvas = Canvas(prompt_ids, gen_length, model.mask_token_id, stop_ids)
    for block in blocks(gen_length, block_length, steps):
        times, shares = transfer_times(block.steps, eps), transfer_shares(block.steps, eps)
        for step, candidates in canvas.passes(block):
            forward = canvas.num_steps
            logits = model.logits_for_positions(canvas.ids)[len(prompt_ids) + candidates]
            noise = gumbel(forward, candidates) if temperature > 0 else None
            confidence, chosen = sample_tokens(
                logits,
                model.mask_token_id,
                alg,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                noise=noise,
            )

            if alg == "origin":
                committed = (uniforms(forward, candidates, times[step]) < shares[step]).nonzero()[:, 0]
            else:
                count = int(len(candidates) * shares[step])
                if alg_temp:
                    confidence = confidence.double() / alg_temp + position_gumbel(forward, candidates)
                committed = most_confident(confidence, count)
            canvas.commit(candidates[committed], chosen[committed])
    return canvas.result()


def transfer_times(steps: int, eps: float) -> Tensor:
    """The time at which each step begins, float32 [steps + 1]: from 1 down to eps, where the last one ends."""
    return torch.linspace(1, eps, steps + 1)


def transfer_shares(steps: int, eps: float) -> Tensor:
    """The share of the masked positions that each step commits, float32 [steps]; the last step's is 1.

    The arithmetic is the published one to the last bit, because a share times a count is truncated to an integer: with
    as many steps as positions the counts are 0, 1, 1, ..., 1, 2.
    """
    timesteps = transfer_times(steps, eps)
    shares = 1 - timesteps[1:] / timesteps[:-1]
    shares[-1] = 1
    return shares


def sample_tokens(
    logits: Tensor,
    mask_token_id: int,
    alg: str = "maskgit_plus",
    *,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Confidence and token [rows] of logits [rows, vocabulary].

    Confidence is the token's probability; for topk_margin the lead of the best token over the best other one, which may
    be the mask, and the lead is then negative; for entropy the sum of p ln p, which is higher where the model is surer.
    """
    logits = logits.float()
    if temperature > 0:
        logits = logits / temperature
    unfiltered = logits
    if min_p:
        logits = min_p_filter(logits, min_p)
    if top_p is not None and top_p < 1:
        logits = top_p_filter(logits, top_p)
    if top_k is not None:
        logits = top_k_filter(logits, top_k)
    probs = torch.softmax(logits, dim=-1)

    best = choose(unfiltered, mask_token_id)
    chosen = best
    if temperature > 0:
        kept = torch.where(probs > 0, logits.double() + noise, -torch.inf)
        kept[:, mask_token_id] = -torch.inf
        chosen = torch.where(kept.isinf().all(dim=-1), best, kept.argmax(dim=-1))

    if alg == "topk_margin":
        others = probs.scatter(1, best[:, None], -torch.inf)
        confidence = probs.gather(1, best[:, None])[:, 0] - others.amax(dim=-1)
    elif alg == "entropy":
        confidence = (probs * torch.log(probs + 1e-10)).sum(dim=-1)
    elif alg in ("origin", "maskgit_plus"):
        confidence = probs.gather(1, chosen[:, None])[:, 0]
    else:
        raise ValueError(f"Dream's decoder has no rule for {alg!r}")
    return confidence, chosen


def min_p_filter(logits: Tensor, min_p: float) -> Tensor:
    """Drops the tokens less probable than min_p times the likeliest (vllm/v1/sample/logits_processor/builtin.py)."""
    probs = torch.softmax(logits, dim=-1)
    return logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), torch.finfo(logits.dtype).min)


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """Drops the tokens behind the one at which the cumulated probability passes top_p; the first is always kept."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    passed = torch.cumsum(torch.softmax(ordered, dim=-1), dim=-1) > top_p
    drop = torch.zeros_like(passed)
    drop[:, 1:] = passed[:, :-1]
    drop = torch.zeros_like(drop).scatter(1, order, drop)
    return logits.masked_fill(drop, torch.finfo(logits.dtype).min)


def top_k_filter(logits: Tensor, top_k: int) -> Tensor:
    """Drops what is below the top_k-th highest logit; what equals it stays."""
    threshold = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < threshold, torch.finfo(logits.dtype).min)
