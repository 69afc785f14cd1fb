"""`confidence` of logits whose vocabulary is split over ranks, without gathering them.

Each rank reduces its columns `[vocab_start, vocab_start + width)` to eight numbers a row; merging the numbers of all
ranks gives the token, probability, log-probability and margin of the whole row. Noise is indexed by the column of the
whole vocabulary, so the token is exactly the same; sums differ in the order of their terms. The entropy needs the merged
normaliser, so it costs a second exchange, of one number a row:

    statistics = all_gather(shard_statistics(logits, vocab_start=start, no_choice=mask_id))  # [shards, rows, 8]
    result = merge_statistics(statistics)
    entropy = all_reduce(shard_entropy(logits, statistics, vocab_start=start))

Shards are stacked in the order of their columns. Ids are those of the whole vocabulary.
"""

import torch
from torch import Tensor

from dllm_plugin.kernels.confidence import (
    BEST,
    BEST_LOGIT,
    ENTROPY_EPSILON,
    MAXIMUM,
    NUM_STATISTICS,
    OTHER,
    SCORE,
    SUM,
    TOKEN,
    TOKEN_LOGIT,
    Confidence,
    add_noise,
    allow,
    check_arguments,
    drop,
    first_argmax,
    launch_entropy,
    launch_statistics,
    rows_per_block,
    sum_of_rows,
    temper,
)
from dllm_plugin.kernels.dispatch import refuse_devices, use_triton


def shard_statistics(
    logits: Tensor,
    *,
    vocab_start: int,
    no_choice: Tensor | None = None,
    no_mass: Tensor | None = None,
    temperature: Tensor | None = None,
    tempered: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
    step: Tensor | None = None,
    margin: bool = False,
) -> Tensor:
    """fp32 [rows, 8] of this rank's `logits` [rows, width]; the other arguments are those of `confidence`."""
    check_arguments(logits, no_choice, no_mass, temperature, tempered, seed, position, step)
    if vocab_start < 0 or vocab_start + logits.shape[1] > 2**24:
        raise ValueError(
            f"columns {vocab_start} to {vocab_start + logits.shape[1]} do not fit 2**24, up to which fp32 holds column ids "
            "exactly; gather the logits instead"
        )
    if use_triton(logits.device.type):
        noise = (seed, position, step)
        return launch_statistics(
            logits, vocab_start, no_choice, no_mass, temperature, tempered, noise, margin, None, keep=True
        )
    per_row = (no_choice, no_mass, temperature, tempered, seed, position, step)
    pieces = [
        _statistics_reference(logits[piece], vocab_start, *(None if t is None else t[piece] for t in per_row))
        for piece in _pieces(logits)
    ]
    return torch.cat(pieces) if pieces else logits.new_empty((0, 8), dtype=torch.float32)


def merge_statistics(statistics: Tensor, *, log_probability: bool = False, margin: bool = False) -> Confidence:
    """The result for the whole rows from the `statistics` [shards, rows, 8] of all ranks; no entropy."""
    merged = _reduce(statistics)
    maximum, total = merged[:, MAXIMUM], merged[:, SUM]
    below = merged[:, TOKEN_LOGIT] - maximum
    margins = (merged[:, BEST_LOGIT] - maximum).exp() - (merged[:, OTHER] - maximum).exp() if margin else None
    return Confidence(
        merged[:, TOKEN].to(torch.int64),
        below.exp() / total,
        below - total.log() if log_probability else None,
        margins / total if margin else None,
    )


def shard_entropy(
    logits: Tensor,
    statistics: Tensor,
    *,
    vocab_start: int,
    no_mass: Tensor | None = None,
    temperature: Tensor | None = None,
    tempered: Tensor | None = None,
) -> Tensor:
    """This rank's share [rows] of the entropy; the sum over the ranks is the entropy of the whole rows."""
    check_arguments(logits, None, no_mass, temperature, tempered)
    if statistics.shape[1:] != (logits.shape[0], NUM_STATISTICS) or statistics.dtype != torch.float32:
        raise ValueError(
            f"statistics must be float32 [shards, {logits.shape[0]}, {NUM_STATISTICS}], those of all ranks stacked, got "
            f"{statistics.dtype} {list(statistics.shape)}"
        )
    if statistics.device != logits.device:
        refuse_devices(logits=logits, statistics=statistics)
    merged = _reduce(statistics)
    if use_triton(logits.device.type):
        entropy = logits.new_empty(logits.shape[0], dtype=torch.float32)
        launch_entropy(logits, vocab_start, no_mass, temperature, tempered, merged, entropy)
        return entropy
    entropies = []
    for piece in _pieces(logits):
        x = logits[piece].to(torch.float32, copy=True)
        _keep_mass(x, vocab_start, *(None if t is None else t[piece] for t in (no_mass, temperature, tempered)))
        p = x.sub_(merged[piece, MAXIMUM, None]).exp_().div_(merged[piece, SUM, None])
        entropies.append(-sum_of_rows(p * (p + ENTROPY_EPSILON).log_()))
    return torch.cat(entropies) if entropies else logits.new_empty(0, dtype=torch.float32)


def _statistics_reference(
    logits: Tensor,
    vocab_start: int,
    no_choice: Tensor | None,
    no_mass: Tensor | None,
    temperature: Tensor | None,
    tempered: Tensor | None,
    seed: Tensor | None,
    position: Tensor | None,
    step: Tensor | None,
) -> Tensor:
    x = logits.to(torch.float32, copy=True)
    scores = allow(x.clone(), None if no_choice is None else _local(no_choice, vocab_start, x))
    best = first_argmax(scores)[:, None]
    best_score = scores.gather(1, best)
    if temperature is not None:
        add_noise(scores, temperature, seed, position, step, vocab_start)
    token = first_argmax(scores)[:, None]
    score = scores.gather(1, token)
    _keep_mass(x, vocab_start, no_mass, temperature, tempered)
    token_logit, best_logit = x.gather(1, token), x.gather(1, best)
    maximum = x.amax(1, keepdim=True)
    total = sum_of_rows((x - torch.where(maximum.isneginf(), 0.0, maximum)).exp_())[:, None]
    other = x.scatter_(1, best, float("-inf")).amax(1, keepdim=True)
    return torch.cat(
        (score, (token + vocab_start).float(), token_logit, maximum, total, best_score, best_logit, other), 1
    )


def _reduce(statistics: Tensor) -> Tensor:
    """The statistics [rows, 8] of all shards together."""
    shards = statistics.unbind()
    merged = shards[0]
    for shard in shards[1:]:  # in the order of the columns: an earlier shard wins a tie
        wins = (shard[:, SCORE] > merged[:, SCORE])[:, None]
        leads = shard[:, BEST] > merged[:, BEST]
        maximum = merged[:, MAXIMUM].maximum(shard[:, MAXIMUM])
        base = torch.where(maximum.isneginf(), 0.0, maximum)
        total = sum(part[:, SUM] * (part[:, MAXIMUM] - base).exp() for part in (merged, shard))
        other = torch.where(
            leads, merged[:, MAXIMUM].maximum(shard[:, OTHER]), merged[:, OTHER].maximum(shard[:, MAXIMUM])
        )
        chosen = torch.where(wins, shard[:, SCORE : TOKEN_LOGIT + 1], merged[:, SCORE : TOKEN_LOGIT + 1])
        best = torch.where(leads[:, None], shard[:, BEST : BEST_LOGIT + 1], merged[:, BEST : BEST_LOGIT + 1])
        merged = torch.cat((chosen, maximum[:, None], total[:, None], best, other[:, None]), 1)
    return merged


def _keep_mass(
    x: Tensor, vocab_start: int, no_mass: Tensor | None, temperature: Tensor | None, tempered: Tensor | None
) -> None:
    temper(x, temperature, tempered)
    if no_mass is not None:
        drop(x, _local(no_mass, vocab_start, x))


def _local(ids: Tensor, vocab_start: int, x: Tensor) -> Tensor:
    """Ids as columns of this shard, -1 where they lie outside it."""
    inside = (ids >= vocab_start) & (ids < vocab_start + x.shape[1])
    return torch.where(inside, ids - vocab_start, -1)


def _pieces(logits: Tensor) -> list[slice]:
    rows, size = logits.shape[0], rows_per_block(logits.shape[1])
    return [slice(first, first + size) for first in range(0, rows, size)]
