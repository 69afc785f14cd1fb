"""Top-k and top-p filtering of logits, in Dream's order: temperature, then top-p, then top-k.

Top-p keeps the most probable columns up to and including the one that carries their sum past `top_p`, so at least one;
top-k keeps every column that is not below the k-th largest. Filtered columns become `-inf`. The best column that may be
chosen stays finite, so that a row whose likeliest column is forbidden still has a choice, of probability 0.

The result is already divided by the temperature: give it to `confidence` with temperature 1 (0 where greedy). At
temperature 0 the filters apply all the same; they then change probabilities, not the choice. Requests that filter are few
and sorting dominates, so this is torch on every device.
"""

import torch
from torch import Tensor


def filter_top_k_top_p(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    *,
    no_choice: Tensor | None = None,
) -> Tensor:
    """Filtered fp32 copy of `logits` [rows, vocab].

    `temperature` [rows] (0: greedy), `top_k` [rows] integer (0: off), `top_p` [rows] (1: off), `no_choice` [rows, A] int64
    padded with -1; each may be None.
    """
    x = logits.to(torch.float32, copy=True)
    vocab = x.shape[1]
    if temperature is not None:
        x.div_(torch.where(temperature > 0, temperature, 1.0)[:, None])
    if top_p is None and top_k is None:
        return x
    best = _best_allowed(x, no_choice)

    values, column = x.sort(dim=1, descending=True, stable=True)
    if top_p is not None:
        above = values.softmax(1).cumsum(1).roll(1, 1)  # mass of the columns ranked before this one
        above[:, 0] = 0.0
        # At 1 the filter is off: the sum may round past 1 before the last column.
        limit = torch.where(top_p < 1, top_p, float("inf"))
        values.masked_fill_(above > limit[:, None], float("-inf"))
    if top_k is not None:
        kth = values.gather(1, torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).to(torch.int64)[:, None] - 1)
        values.masked_fill_(values < kth, float("-inf"))
    x.scatter_(1, column, values)
    # finite, so that it can be chosen; where it was filtered its probability is 0
    return x.scatter_(1, best, x.gather(1, best).clamp(min=torch.finfo(torch.float32).min))


def _best_allowed(x: Tensor, no_choice: Tensor | None) -> Tensor:
    """Column of the best logit outside `no_choice`, [rows, 1]."""
    if no_choice is None:
        return x.argmax(1, keepdim=True)
    # Unused entries (-1) fall into a column of their own, past the vocabulary.
    forbidden = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=torch.bool, device=x.device)
    forbidden.scatter_(1, torch.where(no_choice < 0, x.shape[1], no_choice), True)
    eligible = x.clamp(min=torch.finfo(torch.float32).min)
    return eligible.masked_fill_(forbidden[:, :-1], float("-inf")).argmax(1, keepdim=True)
