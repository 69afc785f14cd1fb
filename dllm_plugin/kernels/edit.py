"""Replaces tokens that are unmasked already where the model now prefers another one (LLaDA2.1's token-to-token editing).

A row's token is replaced where its probability is greater than the threshold of its segment (strictly) and it is another one.
Rows are the positions of blocks, masked or not; those that are not open are passed over. The rule needs no order and no sum
of floats, so it is torch on every device, and nothing waits for the host.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Positions, what segment each is of, and what the model prefers there. Cells are distinct."""

    cell: Tensor  # [rows] int64, slot * max_canvas + column
    is_open: Tensor  # [rows] bool: unmasked, and not given
    segment: Tensor  # [rows] int64
    token: Tensor  # [rows] any integer
    probability: Tensor  # [rows] fp32; NaN passes no threshold


def edit(canvas_tokens: Tensor, rows: Rows, threshold: Tensor) -> Tensor:
    """Number of tokens replaced in each segment, int32 [segments]; writes into `canvas_tokens` [max_slots, max_canvas].

    `threshold` [segments] fp32, +inf is off. (inclusionAI/LLaDA2.1-mini:modeling_llada2_moe.py, `generate`.)
    """
    tokens, old = canvas_tokens.view(-1), canvas_tokens.view(-1)[rows.cell]
    new = rows.token.to(tokens.dtype)
    is_edited = (rows.probability > threshold[rows.segment]) & (new != old) & rows.is_open
    tokens[rows.cell] = torch.where(is_edited, new, old)
    return torch.zeros_like(threshold, dtype=torch.int32).index_add_(0, rows.segment, is_edited.int())
