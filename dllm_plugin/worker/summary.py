"""What a step tells the host: written on the device and read on the host by the same sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch

from dllm_plugin.kernels.unmask import Unmasked
from dllm_plugin.scheduler.output import Record
from dllm_plugin.worker.batch import StepBatch
from dllm_plugin.worker.canvas import CanvasStore
from dllm_plugin.worker.records import read_records


@dataclass(frozen=True, slots=True)
class StepReport:
    """What the host learns of a step."""

    masks_left: list[int]  # of each block
    unmasked_prefix: list[int]  # of each request: where its first masked position is
    tokens: list[list[int]]  # of each request: those from the first position that was not emitted, masks among them
    eos_is_taken: list[int]  # of each request: whether an active block holds EOS; empty where nobody asks
    num_edited: list[int]  # of each block: tokens that were replaced; empty where nobody asks
    records: Sequence[tuple[int, Record]] = ()  # index of the request, and what is told of a token that was written


@dataclass(frozen=True, slots=True)
class SummarySizes:
    """How the numbers of a `StepReport` lie in the one int64 tensor that they travel in, part after part."""

    num_blocks: int
    num_requests: int
    max_emitted: int
    pipelined: bool
    edits: bool

    @classmethod
    def of(cls, batch: StepBatch) -> "SummarySizes":
        needs = batch.layout.needs
        num_requests = len(batch.layout.request_ids)
        return cls(len(batch.segments.quota), num_requests, batch.max_emitted, needs.pipelined, needs.edits)

    @property
    def parts(self) -> tuple[int, ...]:
        """Numbers of each field of a report, in their order."""
        tokens = self.num_requests * self.max_emitted
        return (
            self.num_blocks,
            self.num_requests,
            tokens,
            self.num_requests * self.pipelined,
            self.num_blocks * self.edits,
        )

    def read(self, numbers: list[int]) -> StepReport:
        ends = list(accumulate(self.parts))
        masks_left, prefix, tokens, eos_is_taken, num_edited = (
            numbers[end - size : end] for end, size in zip(ends, self.parts, strict=True)
        )
        rows = [tokens[i * self.max_emitted : (i + 1) * self.max_emitted] for i in range(self.num_requests)]
        return StepReport(masks_left, prefix, rows, eos_is_taken, num_edited)


def summarize(
    batch: StepBatch, unmasked: Unmasked, num_edited: torch.Tensor | None, store: CanvasStore
) -> torch.Tensor:
    """The numbers of a step, on the device; `SummarySizes.read` takes them apart."""
    tokens = store.tokens.view(-1)
    behind_emitted = batch.first_open[:, None] + batch.layout.offsets[: batch.max_emitted]
    # the last request may end with the store, and another be given more
    parts = [unmasked.summary, tokens.index_select(0, behind_emitted.clamp_(max=len(tokens) - 1).view(-1))]
    if batch.layout.needs.pipelined:
        parts.append(_eos_is_taken(batch, store))
    if num_edited is not None:
        parts.append(num_edited)
    return torch.cat(parts)


def _eos_is_taken(batch: StepBatch, store: CanvasStore) -> torch.Tensor:
    """``[requests]`` int32: 1 where an active block holds the request's EOS, masks before it or not."""
    layout = batch.layout
    tokens, masked = store.tokens.view(-1)[layout.place_index], store.masked.view(-1)[layout.place_index]
    ends = (tokens == store.stop_at[layout.slots[layout.place_request]]) & ~masked
    return torch.zeros_like(batch.timestep).index_add_(0, layout.place_request, ends.int())


class StepNumbers(NamedTuple):
    """What a step tells, on the device: its summary, and float32 records of its rows (worker/records.py) where they are asked
    for."""

    summary: torch.Tensor
    records: torch.Tensor | None

    def clone(self) -> "StepNumbers":
        return StepNumbers(self.summary.clone(), None if self.records is None else self.records.clone())


class Summary:
    """The numbers of one step on their way to the host; `wait` has them, whatever was launched after the step."""

    def __init__(self, batch: StepBatch, numbers: StepNumbers) -> None:
        self.batch = batch
        self.summary = numbers.summary.to("cpu", non_blocking=True)
        self.records = None if numbers.records is None else numbers.records.to("cpu", non_blocking=True)
        self.copied = None
        if numbers.summary.device.type == "cuda":
            self.copied = torch.cuda.Event()
            self.copied.record()

    def wait(self) -> StepReport:
        if self.copied is not None:
            self.copied.synchronize()
        report = SummarySizes.of(self.batch).read(self.summary.tolist())
        return report if self.records is None else replace(report, records=read_records(self.records.numpy()))
