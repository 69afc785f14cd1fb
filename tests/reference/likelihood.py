"""How likely a model finds given text, a token and a whole sequence at a time.

Under block-causal attention the decoder's own chain: each token given all before it, the rest of its block masked. Under full
attention the chain from left to right with masks to the end of the text, or the Monte Carlo of the LLaDA paper
(ML-GSAI/LLaDA:get_log_likelihood.py), whose masks are given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .block_models import BlockModel, block_causal
from .model import Predictor


def full_chain(model: Predictor, ids: Sequence[int], start: int) -> Tensor:
    """Log-probabilities [length - start, vocabulary]: row i of position start + i, given the text before it."""
    rows = []
    for position in range(start, len(ids)):
        text = torch.tensor(ids)
        text[position:] = model.mask_token_id
        rows.append(model.logits_for_positions(text)[position])
    return torch.stack(rows).log_softmax(1)


def block_chain(model: BlockModel, ids: Sequence[int], start: int, block_length: int, longest: int) -> Tensor:
    """The same in blocks. A model with a shift has the first token of a block from the row before it, no mask in sight.

    longest: no block reaches beyond it.
    """
    rows = []
    for position in range(start, len(ids)):
        first = position // block_length * block_length
        if model.shift and position == first:
            text = torch.tensor(ids[:position])
        else:
            end = min(first + block_length, longest)
            text = torch.tensor([*ids[:position], *[model.mask_token_id] * (end - position)])
        rows.append(model.logits(text, block_causal(len(text), block_length))[position - model.shift])
    return torch.stack(rows).log_softmax(1)


def monte_carlo(model: Predictor, ids: Sequence[int], start: int, masks: Sequence[Sequence[int]]) -> Tensor:
    """Float64 [length]: of each token its share of the estimate, their sum. masks: the masked positions of each sample.

    With k of the n tokens behind the context masked, a sample is n / k times the sum of their log-probabilities.
    """
    shares = torch.zeros(len(ids), dtype=torch.float64)
    for masked in masks:
        text = torch.tensor(ids)
        text[list(masked)] = model.mask_token_id
        logprobs = model.logits_for_positions(text).log_softmax(1).double()
        for position in masked:
            shares[position] += logprobs[position, ids[position]] * (len(ids) - start) / len(masked)
    return shares / len(masks)
