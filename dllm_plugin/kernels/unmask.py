"""Chooses which masked positions get their token, writes them into the canvas, and says what is final.

The rows are the still-masked positions of the active blocks, ordered by request, segment (an active block) and position.
With `skip_unmasked` there may be rows for the other positions too, so that their number need not change from step to step
(a CUDA graph's shapes are static): a row whose cell of `canvas_masked` is False is as if it were not listed, and every "row"
below is one of those that are left.

One rule serves every policy. Order the rows of a segment by confidence, highest first, ties by position; then take the
first n, where n is the largest of, and at most the number of rows,

* `quota`;
* the number of rows whose confidence is greater than `threshold` (strictly; +inf is off);
* with `factor` f > 0, the longest prefix of the order with `c_k >= 1 - f / (k + 1)` for its ranks k >= 2; rank 1 always counts;
* with `entropy_bound` g > 0, where confidences are negated entropies, the longest prefix whose entropies, added up in float64,
  stay below g.

So a quota is (q, inf, 0), Fast-dLLM's threshold (1, t, 0), a semi-activated D2F block (0, t, 0). Public factor code also
accepts a last rank that fails alone, an off-by-one of its loop; here it does not.

With `alg_temp` t > 0 the order is by `confidence / t + gumbel` instead, with Philox noise of (seed, position, timestep): drawing
n positions without replacement from softmax(confidence / t). Confidences may be negative or `-inf`; NaN ranks last and
passes no threshold. Everything stays on the device: the host reads one small tensor for the whole batch.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dllm_plugin.kernels import philox
from dllm_plugin.kernels.dispatch import contiguous, refuse, use_triton
from dllm_plugin.kernels.unmask_triton import unmask_kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Where the rows of a step are, and how many of them each segment takes. Slots are distinct, and so are cells."""

    slot: Tensor  # [num_requests] any integer: its row of the canvas
    request_start_loc: Tensor | None = None  # [num_requests + 1] any integer, its segments; None: one each
    segment_start_loc: Tensor  # [num_segments + 1] any integer, its rows
    row_cell: Tensor  # [rows] int64, slot * max_canvas + column
    quota: Tensor  # [num_segments] int32, and the rest has an entry a segment too
    threshold: Tensor | None = None  # fp32
    factor: Tensor | None = None  # fp32
    entropy_bound: Tensor | None = None  # fp32
    alg_temp: Tensor | None = None  # fp32
    seed: Tensor | None = None  # int64, needed with `alg_temp` as the next is
    timestep: Tensor | None = None  # int64
    skip_unmasked: bool = False

    @property
    def noise_keys(self) -> tuple[Tensor, Tensor]:
        """Seed and timestep, where there is an `alg_temp`."""
        assert self.seed is not None and self.timestep is not None
        return self.seed, self.timestep


@dataclass(frozen=True, slots=True)
class Unmasked:
    """What is left, as int32 in one buffer, so that the host copies once: the properties are its parts, in their order."""

    summary: Tensor
    num_segments: int

    @property
    def remaining(self) -> Tensor:
        """[num_segments] rows of the segment left masked."""
        return self.summary[: self.num_segments]

    @property
    def unmasked_prefix(self) -> Tensor:
        """[num_requests] length of the contiguous prefix of the canvas without a mask."""
        return self.summary[self.num_segments :]


def unmask(
    canvas_tokens: Tensor, canvas_masked: Tensor, segments: Segments, token: Tensor, confidence: Tensor
) -> Unmasked:
    """Writes tokens into `canvas_tokens` and clears `canvas_masked`, both [max_slots, max_canvas], in place.

    A row has its `token` [rows], any integer, and its `confidence` [rows], fp32. Without `skip_unmasked` every row must be
    masked, which is not checked. With it, those of a row that is not masked may be anything, NaN and infinities included, and
    its cell must still be one of the request's canvas. The noise of `alg_temp` goes by position: such rows do not shift it.

    Columns past the end of a shorter canvas are not special: the caller keeps them masked or cuts the unmasked prefix itself.
    """
    _check(canvas_tokens, canvas_masked, segments, token, confidence)
    run = unmask_triton if use_triton(canvas_tokens.device.type) else unmask_cpu
    return Unmasked(run(canvas_tokens, canvas_masked, segments, token, confidence), len(segments.quota))


def unmask_rule(
    canvas_tokens: Tensor, canvas_masked: Tensor, segments: Segments, token: Tensor, confidence: Tensor
) -> Tensor:
    """The contract, a segment at a time; returns the summary."""
    tokens, masked, remaining = canvas_tokens.view(-1), canvas_masked.view(-1), []
    for segment, (first, last) in enumerate(pairwise(segments.segment_start_loc.tolist())):
        live = masked[segments.row_cell[first:last]] | (not segments.skip_unmasked)
        cell, value, new = (rows[first:last][live] for rows in (segments.row_cell, confidence, token))
        score = value
        if segments.alg_temp is not None and segments.alg_temp[segment] > 0:
            seed, timestep = (numbers[segment].expand(len(cell)) for numbers in segments.noise_keys)
            noise = philox.gumbel(seed, cell % canvas_masked.shape[1], timestep, stream=philox.ORDER)
            score = value / segments.alg_temp[segment] + noise
        order = (-score).argsort(stable=True)  # NaN last
        count = max(int(segments.quota[segment]), 0)
        if segments.threshold is not None:
            count = max(count, int((value > segments.threshold[segment]).sum()))
        if segments.factor is not None and segments.factor[segment] > 0:
            rank = torch.arange(1, len(cell) + 1, device=cell.device)
            passes = (rank == 1) | (value[order] >= 1 - segments.factor[segment] / (rank + 1))
            count = max(count, int(passes.cumprod(0).sum()))
        if segments.entropy_bound is not None and segments.entropy_bound[segment] > 0:
            count = max(count, int(((-value[order].double()).cumsum(0) < segments.entropy_bound[segment]).sum()))
        taken = order[:count]
        tokens[cell[taken]], masked[cell[taken]] = new[taken].to(tokens.dtype), False
        remaining.append(len(cell) - len(taken))
    unmasked_prefix = (~canvas_masked[segments.slot.long()]).cumprod(1).sum(1).tolist()
    return torch.tensor(remaining + unmasked_prefix, dtype=torch.int32, device=tokens.device)


def unmask_cpu(
    canvas_tokens: Tensor, canvas_masked: Tensor, segments: Segments, token: Tensor, confidence: Tensor
) -> Tensor:
    """The path of a CPU, in NumPy: for the few rows of a step its calls take half as long as torch's."""
    max_canvas = canvas_masked.shape[1]
    host_tokens, host_masked = canvas_tokens.cpu(), canvas_masked.cpu()  # themselves on a CPU
    tokens, masked = host_tokens.numpy(), host_masked.numpy()
    loc, cell, new, value, slot, count = (
        tensor.cpu().numpy()
        for tensor in (segments.segment_start_loc, segments.row_cell, token, confidence, segments.slot, segments.quota)
    )
    if segments.skip_unmasked:
        live = masked.ravel()[cell]
        loc = np.concatenate([[0], live.cumsum()])[loc]
        cell, new, value = cell[live], new[live], value[live]
    begin, length = loc[:-1], np.diff(loc)
    segment = np.arange(len(length)).repeat(length)
    row = np.arange(len(segment))

    # ascending order of the negated score puts NaN last, where a descending sort would put it first
    score = -value
    if segments.alg_temp is not None:
        per_segment = (segments.alg_temp, *segments.noise_keys)
        temperature, seed, timestep = (tensor.cpu().numpy()[segment] for tensor in per_segment)
        keys = map(torch.from_numpy, (seed, cell % max_canvas, timestep))
        noise = philox.gumbel(*keys, stream=philox.ORDER).numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            score = np.where(temperature > 0, score / temperature - noise, score)
    order = np.lexsort((score, segment))  # stable, as ties by position ask

    if segments.threshold is not None:
        above = value > segments.threshold.cpu().numpy()[segment]
        count = np.maximum(count, np.bincount(segment[above], minlength=len(length)))
    if segments.factor is not None:
        factor = segments.factor.cpu().numpy()
        rank = row - begin[segment]
        limit = 1 - factor[segment] / (rank + 2).astype(np.float32)
        fails = (rank > 0) & ~(value[order] >= limit)
        prefix = length.copy()
        np.minimum.at(prefix, segment[fails], rank[fails])
        count = np.maximum(count, np.where(factor > 0, prefix, 0))
    if segments.entropy_bound is not None:
        bound = segments.entropy_bound.cpu().numpy()
        entropies = -value[order].astype(np.float64)
        for number in np.flatnonzero(bound > 0):
            total = entropies[loc[number] : loc[number + 1]].cumsum()
            count[number] = max(count[number], (total < bound[number]).sum())
    count = np.minimum(np.maximum(count, 0), length)

    taken = order[row < (begin + count)[segment]]
    tokens.ravel()[cell[taken]] = new[taken]
    masked.ravel()[cell[taken]] = False
    if canvas_tokens.device.type != "cpu":
        canvas_tokens.copy_(host_tokens)
        canvas_masked.copy_(host_masked)

    is_open = masked[slot]
    first_mask = np.where(is_open.any(1), is_open.argmax(1), max_canvas)
    summary = np.concatenate([length - count, first_mask], dtype=np.int32, casting="unsafe")
    return torch.from_numpy(summary).to(canvas_tokens.device)


def _check(canvas_tokens: Tensor, canvas_masked: Tensor, segments: Segments, token: Tensor, confidence: Tensor) -> None:
    """Shapes, dtypes and devices only: the values are on the device."""
    num_requests, num_segments, rows = segments.slot.shape[0], segments.quota.shape[0], token.shape[0]
    if segments.request_start_loc is None and num_segments != num_requests:
        raise ValueError(
            f"{num_segments} segments of {num_requests} requests need request_start_loc; pass it, or one segment each"
        )
    if segments.alg_temp is not None and (segments.seed is None or segments.timestep is None):
        raise ValueError("alg_temp draws the order of positions from seed and timestep; pass them, or alg_temp=None")
    if (
        canvas_tokens.dim() != 2
        or canvas_masked.shape != canvas_tokens.shape
        or canvas_masked.dtype != torch.bool
        or not (canvas_tokens.is_contiguous() and canvas_masked.is_contiguous())
        or canvas_masked.device != canvas_tokens.device
    ):
        must = "canvas_tokens and canvas_masked must both be contiguous [max_slots, max_canvas], the latter bool"
        refuse(must, {"canvas_tokens": canvas_tokens, "canvas_masked": canvas_masked})
    device = canvas_tokens.device
    for name, tensor, size, dtype in (  # a dtype of None is any integer
        ("slot", segments.slot, num_requests, None),
        ("request_start_loc", segments.request_start_loc, num_requests + 1, None),
        ("segment_start_loc", segments.segment_start_loc, num_segments + 1, None),
        ("quota", segments.quota, num_segments, torch.int32),
        ("threshold", segments.threshold, num_segments, torch.float32),
        ("factor", segments.factor, num_segments, torch.float32),
        ("entropy_bound", segments.entropy_bound, num_segments, torch.float32),
        ("alg_temp", segments.alg_temp, num_segments, torch.float32),
        ("seed", segments.seed, num_segments, torch.int64),
        ("timestep", segments.timestep, num_segments, torch.int64),
        ("row_cell", segments.row_cell, rows, torch.int64),
        ("token", token, rows, None),
        ("confidence", confidence, rows, torch.float32),
    ):
        if tensor is None:
            continue
        right = tensor.dtype == dtype or (dtype is None and not tensor.dtype.is_floating_point)
        if not right or tensor.shape != (size,) or tensor.device != device:
            refuse(f"{name} must be {dtype or 'integer'} [{size}]", {name: tensor}, {"canvas_tokens": canvas_tokens})


def unmask_triton(
    canvas_tokens: Tensor, canvas_masked: Tensor, segments: Segments, token: Tensor, confidence: Tensor
) -> Tensor:
    slot = segments.slot.contiguous()
    request_start_loc, *inputs = contiguous(
        segments.request_start_loc, segments.segment_start_loc, segments.row_cell, token, confidence,
        segments.quota, segments.threshold, segments.factor, segments.entropy_bound, segments.alg_temp, segments.seed,
        segments.timestep,
    )  # fmt: skip
    num_segments = len(segments.quota)
    sizes = (len(token), num_segments + len(slot))
    rank, summary = (torch.empty(size, dtype=torch.int32, device=slot.device) for size in sizes)
    if len(slot):
        unmask_kernel[slot.shape](
            canvas_tokens, canvas_masked, slot, request_start_loc, *inputs,
            rank, summary, summary[num_segments:],
            canvas_masked.shape[1], BLOCK=64, COLUMNS=1024, ORDER=philox.ORDER, SKIP_UNMASKED=segments.skip_unmasked,
        )  # fmt: skip
    return summary
