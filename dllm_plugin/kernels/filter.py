"""Top-k and top-p filtering of logits: temperature, then top-p, then top-k, as Dream has it; or top-k first, as SDAR has it.

Top-p keeps the most probable columns up to and including the one that carries their sum past `top_p`, so at least one;
top-k keeps every column that is not below the k-th largest. Filtered columns become `-inf`. The best column that may be
chosen stays finite, so that a row whose likeliest column is forbidden still has a choice, of probability 0.

The result is already divided by the temperature: give it to `confidence` with temperature 1 (0 where greedy). At
temperature 0 the filters apply all the same; they then change probabilities, not the choice. Requests that filter are few
and sorting dominates, so this is torch on every device. Scratch beside the result stays below 8 MB, or what one row takes,
whatever the rows.
"""

import torch
from torch import Tensor

from dllm_plugin.kernels.confidence import check_ids
from dllm_plugin.kernels.dispatch import refuse

_SCRATCH_BYTES = 8_000_000
_BYTES_PER_COLUMN = 24  # of a row that is sorted: values, columns, sums of probabilities, and what sorting takes itself


def filter_top_k_top_p(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    *,
    k_first: Tensor | None = None,
    no_choice: Tensor | None = None,
) -> Tensor:
    """Filtered fp32 copy of `logits` [rows, vocab], any float dtype.

    `temperature` [rows] floating (0: greedy), `top_k` [rows] integer (0: off), `top_p` [rows] floating (1: off), `k_first`
    [rows] bool: top-k comes before top-p, `no_choice` [rows, A] int64 padded with -1, where ids past the vocabulary are ignored
    too; each may be None.
    """
    if logits.dim() != 2 or not logits.dtype.is_floating_point or logits.shape[1] == 0:
        refuse("logits must be floating [rows, vocab] with at least one column", {"logits": logits})
    rows = logits.shape[0]
    for name, tensor in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p)):
        if tensor is None:
            continue
        kind, dtype = "integer" if name == "top_k" else "floating", tensor.dtype
        right = dtype.is_floating_point == (kind == "floating") and dtype != torch.bool
        if not right or tensor.shape != (rows,) or tensor.device != logits.device:
            refuse(f"{name} must be {kind} [{rows}]", {name: tensor}, {"logits": logits})
    check_ids("no_choice", no_choice, logits)
    x = logits.to(torch.float32, copy=True)
    if temperature is not None:
        x.div_(torch.where(temperature > 0, temperature, 1.0)[:, None])
    if top_p is None and top_k is None:
        return x
    vocab = x.shape[1]
    at_once = max(_SCRATCH_BYTES // (_BYTES_PER_COLUMN * vocab), 1)
    for first in range(0, rows, at_once):
        block = slice(first, first + at_once)
        _filter(x[block], *(None if tensor is None else tensor[block] for tensor in (top_k, top_p, k_first, no_choice)))
    return x


def _filter(
    x: Tensor, top_k: Tensor | None, top_p: Tensor | None, k_first: Tensor | None, no_choice: Tensor | None
) -> None:
    """Filters a block of rows in place."""
    vocab = x.shape[1]
    best = _best_allowed(x, no_choice)
    values, column = x.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        kth = values.gather(1, torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).to(torch.int64)[:, None] - 1)
        is_below = values < kth
        if k_first is not None:
            values.masked_fill_(is_below & k_first[:, None], float("-inf"))
    if top_p is not None:
        mass = values.softmax(1)
        torch.cumsum(mass, 1, out=mass)
        # At 1 the filter is off: the sum may round past 1 before the last column.
        limit = torch.where(top_p < 1, top_p, float("inf"))
        # A column goes by the mass of those ranked before it, so the first one stays.
        values[:, 1:].masked_fill_(mass[:, :-1] > limit[:, None], float("-inf"))
    if top_k is not None:
        values.masked_fill_(is_below, float("-inf"))
    x.scatter_(1, column, values)
    # finite, so that it can be chosen; where it was filtered its probability is 0
    x.scatter_(1, best, x.gather(1, best).clamp(min=torch.finfo(torch.float32).min))


def _best_allowed(x: Tensor, no_choice: Tensor | None) -> Tensor:
    """Column of the best logit outside `no_choice`, [rows, 1]."""
    if no_choice is None:
        return x.argmax(1, keepdim=True)
    # Ids that are no column (-1, or past the last) fall into a column of their own, past the vocabulary.
    vocab = x.shape[1]
    forbidden = torch.zeros(x.shape[0], vocab + 1, dtype=torch.bool, device=x.device)
    forbidden.scatter_(1, torch.where(no_choice < 0, vocab, no_choice).clamp_(max=vocab), True)
    eligible = x.clamp(min=torch.finfo(torch.float32).min)
    return eligible.masked_fill_(forbidden[:, :-1], float("-inf")).argmax(1, keepdim=True)
