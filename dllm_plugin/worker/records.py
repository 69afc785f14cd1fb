"""What is told of a token beside itself: when it was written, how sure the model was, its log-probability and rank, and others'.

A record is a row of float32, which hold every token id and position exactly.
"""

import numpy as np
import torch
from torch import Tensor

from dllm_plugin.kernels.confidence import Choice
from dllm_plugin.scheduler.output import Record
from dllm_plugin.worker.batch import StepBatch
from dllm_plugin.worker.canvas import CanvasStore
from dllm_plugin.worker.controls import forbid

_SCRATCH_BYTES = 64 << 20


class Rows:
    """The rows of a step as they were before it, to be compared with what it has written."""

    def __init__(self, batch: StepBatch, state: CanvasStore) -> None:
        self.batch, self.state = batch, state
        self.cell = batch.segments.row_cell
        self.tokens, self.masked = self._now()

    def _now(self) -> tuple[Tensor, Tensor]:
        return self.state.tokens.view(-1)[self.cell], self.state.masked.view(-1)[self.cell]

    def records(self, confidence: Tensor, scores: Tensor | None) -> Tensor:
        """float32 ``[rows, 5 + scores]``: request, whether the step has written the row, and what a `Record` holds."""
        tokens, masked = self._now()
        is_written = (self.masked & ~masked) | (tokens != self.tokens)
        columns = (self.batch.row_request, is_written, self.batch.row_position, tokens, confidence)
        records = torch.stack([column.to(torch.float32) for column in columns], dim=1)
        return records if scores is None else torch.cat([records, scores], dim=1)


def read_records(records: np.ndarray) -> list[tuple[int, Record]]:
    """Index of the request and record of every token that was written."""
    written = records[records[:, 1] > 0]
    num_others = (written.shape[1] - 7) // 2
    return [
        (
            int(request),
            Record(
                position=int(position),
                token=int(token),
                confidence=float(confidence),
                rank=int(scores[1]) if len(scores) else 0,
                ids=(int(token), *map(int, scores[2 : 2 + num_others])),
                logprobs=(*scores[:1], *scores[2 + num_others :]),
            ),
        )
        for request, _, position, token, confidence, *scores in written.tolist()
    ]


def score(x: Tensor, token: Tensor, num_others: int, given: Tensor | None, normalize: bool) -> Tensor:
    """float32 ``[rows, 2 + 2 * num_others]``: value and rank of each row's token, then ids and values of others.

    ``x [rows, vocab]``, any float dtype: logits, of which the values are the logarithms of softmax where ``normalize``. Others:
    the largest, ties by the lowest id; or in rows where ``given [rows, n]`` does not begin with -1 those ids, and -inf for -1.
    The rank is the number of values that are not below the token's, as vLLM counts it.
    """
    at_once = max(1, _SCRATCH_BYTES // (16 * x.shape[1]))
    parts = [
        _score(part.to(torch.float32), token[rows], num_others, None if given is None else given[rows], normalize)
        for part, rows in zip(x.split(at_once), torch.arange(len(x), device=x.device).split(at_once), strict=True)
    ]
    return torch.cat(parts)


def _score(x: Tensor, token: Tensor, num_others: int, given: Tensor | None, normalize: bool) -> Tensor:
    values = x.log_softmax(1) if normalize else x
    own = values.gather(1, token[:, None])
    rank = (values >= own).sum(1, keepdim=True)
    ids = largest(values, min(num_others, values.shape[1]))
    ids = torch.nn.functional.pad(ids, (0, num_others - ids.shape[1]), value=-1)
    if given is not None:
        given = torch.nn.functional.pad(given, (0, max(0, num_others - given.shape[1])), value=-1)[:, :num_others]
        ids = torch.where(given[:, :1] >= 0, given, ids)
    others = torch.where(ids >= 0, values.gather(1, ids.clamp(min=0)), -torch.inf)
    return torch.cat([own, rank, ids.clamp(min=0), others], dim=1)


def without_others(scores: np.ndarray, num_others: int, most: int) -> np.ndarray:
    """Rows of `score` with as many others at most."""
    return scores[:, [0, 1, *range(2, 2 + most), *range(2 + num_others, 2 + num_others + most)]]


def processed(logits: Tensor, choice: Choice) -> Tensor:
    """float32 logits that the tokens of a choice are drawn from: at their temperature, without what is never chosen."""
    x = logits.to(torch.float32, copy=True)
    if choice.cut is not None:
        x.masked_fill_(choice.cut.takes_out(x, choice.temperature), -torch.inf)
    if choice.temperature is not None:
        x /= torch.where(choice.temperature > 0, choice.temperature, 1.0)[:, None]
    if choice.no_choice is not None:
        forbid(x, choice.no_choice, choice.no_choice >= 0)
    return x


def largest(x: Tensor, number: int) -> Tensor:
    """Ids of the largest float32 numbers of each row, int64 ``[rows, number]``; ties by the lowest id, whatever the number."""
    bits = x.view(torch.int32).long()
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # as the numbers are, -0.0 as 0.0
    keys = (ordered << 32) - torch.arange(x.shape[1], device=x.device)
    return (-keys.topk(number, dim=1).values) & 0xFFFFFFFF
