"""Chooses which masked positions get their token, writes them into the canvas, and says what is final.

The rows are the still-masked positions of the active blocks, ordered by request, segment (an active block) and position.
With `skip_unmasked` there may be rows for the other positions too, so that their number need not change from step to step
(a CUDA graph's shapes are static): a row whose cell of `canvas_masked` is False is as if it were not listed, and every "row"
below is one of those that are left.

One rule serves every policy. Order the rows of a segment by confidence, highest first, ties by position; then take the
first n, where n is the largest of, and at most the number of rows,

* `quota`;
* the number of rows whose confidence is greater than `threshold` (strictly; +inf is off);
* with `factor` f > 0, the longest prefix of the order with `c_k >= 1 - f / (k + 1)` for its ranks k >= 2; rank 1 always counts.

So a quota is (q, inf, 0), Fast-dLLM's threshold (1, t, 0), a semi-activated D2F block (0, t, 0). Public factor code also
accepts a last rank that fails alone, an off-by-one of its loop; here it does not.

With `alg_temp` t > 0 the order is by `confidence / t + gumbel` instead, with Philox noise of (seed, position, step): drawing
n positions without replacement from softmax(confidence / t). Confidences may be negative or `-inf`; NaN ranks last and
passes no threshold. Everything stays on the device: the host reads one small tensor for the whole batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dllm_plugin.kernels import philox
from dllm_plugin.kernels.dispatch import contiguous, refuse_devices, tl, triton, use_triton


@dataclass(frozen=True, slots=True)
class Unmasked:
    """What is left, as int32 in one buffer, so that the host copies once: the properties are its parts, in their order."""

    summary: Tensor
    num_segments: int
    num_requests: int

    @property
    def remaining(self) -> Tensor:
        """[num_segments] rows of the segment left masked."""
        return self.summary[: self.num_segments]

    @property
    def final_prefix(self) -> Tensor:
        """[num_requests] length of the contiguous prefix of the canvas without a mask."""
        return self.summary[self.num_segments : self.num_segments + self.num_requests]

    @property
    def first_eos(self) -> Tensor:
        """[num_requests] first column inside that prefix that holds the request's EOS, or -1; [0] if none was asked for."""
        return self.summary[self.num_segments + self.num_requests :]


def unmask(
    canvas_tokens: Tensor,
    canvas_masked: Tensor,
    *,
    slot: Tensor,
    segment_start_loc: Tensor,
    row_cell: Tensor,
    token: Tensor,
    confidence: Tensor,
    quota: Tensor,
    eos_token_id: Tensor | None = None,
    request_start_loc: Tensor | None = None,
    threshold: Tensor | None = None,
    factor: Tensor | None = None,
    alg_temp: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    skip_unmasked: bool = False,
) -> Unmasked:
    """Writes tokens into `canvas_tokens` and clears `canvas_masked`, both [max_slots, max_canvas], in place.

    A request is [num_requests]: `slot` (its row of the canvas) and `eos_token_id` (-1, or None for all: none). Its
    segments are `request_start_loc` [num_requests + 1]; None: one each.
    A segment is [num_segments]: `quota`, `threshold`, `factor`, `alg_temp`, `seed`, `step`; its rows are
    `segment_start_loc` [num_segments + 1]. A row is [rows]: `row_cell` (slot * max_canvas + column, int64), `token`, fp32
    `confidence`. Slots are distinct, and so are cells.

    Without `skip_unmasked` every row must be masked, which is not checked. With it, a row whose cell is not masked
    on entry is never taken and counts nowhere: not in `remaining`, above `threshold`, among the ranks that the order and
    `factor` see, nor in the cap on n. Its `token` and `confidence` may be anything, NaN and infinities included; its cell
    must still be one of the request's canvas. The noise of `alg_temp` goes by position, so those rows do not shift it.

    Columns past the end of a shorter canvas are not special: the caller keeps them masked or cuts the final prefix itself.
    """
    num_requests, num_segments, rows = slot.shape[0], quota.shape[0], token.shape[0]
    if request_start_loc is None and num_segments != num_requests:
        raise ValueError(
            f"{num_segments} segments of {num_requests} requests need request_start_loc; pass it, or one segment each"
        )
    if alg_temp is not None and (seed is None or step is None):
        raise ValueError("alg_temp draws the order of positions from seed and step; pass them, or alg_temp=None")
    _check(
        canvas_tokens,
        canvas_masked,
        (
            ("slot", slot, num_requests, None),
            ("request_start_loc", request_start_loc, num_requests + 1, None),
            ("eos_token_id", eos_token_id, num_requests, torch.int32),
            ("segment_start_loc", segment_start_loc, num_segments + 1, None),
            ("quota", quota, num_segments, torch.int32),
            ("threshold", threshold, num_segments, torch.float32),
            ("factor", factor, num_segments, torch.float32),
            ("alg_temp", alg_temp, num_segments, torch.float32),
            ("seed", seed, num_segments, torch.int64),
            ("step", step, num_segments, torch.int64),
            ("row_cell", row_cell, rows, torch.int64),
            ("token", token, rows, None),
            ("confidence", confidence, rows, torch.float32),
        ),
    )
    run = unmask_triton if use_triton(canvas_tokens.device.type) else unmask_numpy
    summary = run(
        canvas_tokens, canvas_masked, slot, request_start_loc, segment_start_loc, row_cell, token, confidence,
        quota, threshold, factor, alg_temp, seed, step, eos_token_id, skip_unmasked,
    )  # fmt: skip
    return Unmasked(summary, num_segments, num_requests)


def unmask_numpy(
    canvas_tokens: Tensor,
    canvas_masked: Tensor,
    slot: Tensor,
    request_start_loc: Tensor | None,
    segment_start_loc: Tensor,
    row_cell: Tensor,
    token: Tensor,
    confidence: Tensor,
    quota: Tensor,
    threshold: Tensor | None,
    factor: Tensor | None,
    alg_temp: Tensor | None,
    seed: Tensor | None,
    step: Tensor | None,
    eos_token_id: Tensor | None,
    skip_unmasked: bool,
) -> Tensor:
    """The path of a CPU, in NumPy: for the few rows of a step its calls take half as long as torch's."""
    max_canvas = canvas_masked.shape[1]
    host_tokens, host_masked = canvas_tokens.cpu(), canvas_masked.cpu()  # themselves on a CPU
    tokens, masked = host_tokens.numpy(), host_masked.numpy()
    loc, cell, token, confidence = (_host(t) for t in (segment_start_loc, row_cell, token, confidence))
    if skip_unmasked:
        live = masked.ravel()[cell]
        loc = np.concatenate([[0], live.cumsum()])[loc]
        cell, token, confidence = cell[live], token[live], confidence[live]
    begin, end = loc[:-1], loc[1:]
    length = end - begin
    segment = np.arange(len(length)).repeat(length)
    row = np.arange(len(segment))

    # ascending order of the negated score puts NaN last, where a descending sort would put it first
    score = -confidence
    if alg_temp is not None:
        temperature, row_seed, row_step = (_host(t)[segment] for t in (alg_temp, seed, step))
        keys = map(torch.from_numpy, (row_seed, cell % max_canvas, row_step))
        noise = philox.gumbel(*keys, stream=philox.ORDER).numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            score = np.where(temperature > 0, score / temperature - noise, score)
    order = np.lexsort((score, segment))  # stable, as ties by position ask

    count = _host(quota)
    if threshold is not None:
        above = confidence > _host(threshold)[segment]
        count = np.maximum(count, np.bincount(segment[above], minlength=len(length)))
    if factor is not None:
        rank = row - begin[segment]
        limit = 1 - _host(factor)[segment] / (rank + 2).astype(np.float32)
        fails = (rank > 0) & ~(confidence[order] >= limit)
        prefix = length.copy()
        np.minimum.at(prefix, segment[fails], rank[fails])
        count = np.maximum(count, np.where(_host(factor) > 0, prefix, 0))
    count = np.minimum(np.maximum(count, 0), length)

    taken = order[row < (begin + count)[segment]]
    tokens.ravel()[cell[taken]] = token[taken]
    masked.ravel()[cell[taken]] = False
    if canvas_tokens.device.type != "cpu":
        canvas_tokens.copy_(host_tokens)
        canvas_masked.copy_(host_masked)

    slot = _host(slot)
    is_open = masked[slot]
    first_mask = np.where(is_open.any(1), is_open.argmax(1), max_canvas)
    parts = [length - count, first_mask]
    if eos_token_id is not None:
        is_eos = tokens[slot] == _host(eos_token_id)[:, None]
        is_eos &= np.arange(max_canvas) < first_mask[:, None]
        parts.append(np.where(is_eos.any(1), is_eos.argmax(1), -1))
    return torch.from_numpy(np.concatenate(parts, dtype=np.int32, casting="unsafe")).to(canvas_tokens.device)


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _check(
    canvas_tokens: Tensor,
    canvas_masked: Tensor,
    tensors: tuple[tuple[str, Tensor | None, int, torch.dtype | None], ...],
) -> None:
    """Shapes, dtypes and devices only: the values are on the device. A dtype of None is any integer."""
    if (
        canvas_tokens.dim() != 2
        or canvas_masked.shape != canvas_tokens.shape
        or canvas_masked.dtype != torch.bool
        or not (canvas_tokens.is_contiguous() and canvas_masked.is_contiguous())
    ):
        raise ValueError(
            "canvas_tokens and canvas_masked must both be contiguous [max_slots, max_canvas], the latter bool, got "
            f"{list(canvas_tokens.shape)} and {canvas_masked.dtype} {list(canvas_masked.shape)}"
        )
    device = canvas_tokens.device
    if canvas_masked.device != device:
        refuse_devices(canvas_tokens=canvas_tokens, canvas_masked=canvas_masked)
    for name, tensor, size, dtype in tensors:
        if tensor is None:
            continue
        if tensor.device != device:
            refuse_devices(canvas_tokens=canvas_tokens, **{name: tensor})
        if tensor.shape == (size,) and tensor.dtype == dtype:
            continue
        if tensor.shape != (size,) or dtype is not None or tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be {dtype or 'integer'} [{size}], got {tensor.dtype} {list(tensor.shape)}")


def unmask_triton(
    canvas_tokens: Tensor,
    canvas_masked: Tensor,
    slot: Tensor,
    request_start_loc: Tensor | None,
    segment_start_loc: Tensor,
    row_cell: Tensor,
    token: Tensor,
    confidence: Tensor,
    quota: Tensor,
    threshold: Tensor | None,
    factor: Tensor | None,
    alg_temp: Tensor | None,
    seed: Tensor | None,
    step: Tensor | None,
    eos_token_id: Tensor | None,
    skip_unmasked: bool,
) -> Tensor:
    """One launch, one program a request."""
    inputs = contiguous(
        slot, request_start_loc, segment_start_loc, row_cell, token, confidence,
        quota, threshold, factor, alg_temp, seed, step, eos_token_id,
    )  # fmt: skip
    rank, summary = (
        torch.empty(size, dtype=torch.int32, device=slot.device)
        for size in (len(confidence), len(quota) + len(slot) * (1 if eos_token_id is None else 2))
    )
    parts = Unmasked(summary, len(quota), len(slot))
    if len(slot):
        _unmask_kernel[slot.shape](
            canvas_tokens, canvas_masked, *inputs,
            rank, parts.remaining, parts.final_prefix, parts.first_eos,
            canvas_masked.shape[1], BLOCK=64, COLUMNS=1024, ORDER=philox.ORDER, SKIP_UNMASKED=skip_unmasked,
        )  # fmt: skip
    return summary


@triton.jit
def _unmask_kernel(
    canvas_tokens_ptr, canvas_masked_ptr, slot_ptr, request_start_loc_ptr, segment_start_loc_ptr, row_cell_ptr,
    token_ptr, confidence_ptr, quota_ptr, threshold_ptr, factor_ptr, alg_temp_ptr, seed_ptr, step_ptr,
    eos_token_id_ptr, rank_ptr, remaining_ptr, final_prefix_ptr, first_eos_ptr,
    max_canvas,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ORDER: tl.constexpr, SKIP_UNMASKED: tl.constexpr,
):  # fmt: skip
    """Ranks by counting who comes before, tile against tile: no sort, no limit on the rows of a segment."""
    request = tl.program_id(0)
    canvas = tl.load(slot_ptr + request).to(tl.int64) * max_canvas
    if request_start_loc_ptr is None:
        first_segment, last_segment = request, request + 1
    else:
        first_segment = tl.load(request_start_loc_ptr + request).to(tl.int32)
        last_segment = tl.load(request_start_loc_ptr + request + 1).to(tl.int32)

    for segment in range(first_segment, last_segment):
        begin = tl.load(segment_start_loc_ptr + segment).to(tl.int32)
        end = tl.load(segment_start_loc_ptr + segment + 1).to(tl.int32)
        length = end - begin
        unmasked = 0
        above = 0
        prefix = length
        for first in range(begin, end, BLOCK):
            row = first + tl.arange(0, BLOCK)
            live = _live(row, end, canvas_masked_ptr, row_cell_ptr, SKIP_UNMASKED)
            if SKIP_UNMASKED:
                unmasked += tl.sum(((row < end) ^ live).to(tl.int32), 0)
            score = _score(
                row, live, segment, canvas, row_cell_ptr, confidence_ptr, alg_temp_ptr, seed_ptr, step_ptr, ORDER
            )
            rank = tl.zeros([BLOCK], tl.int32)
            for other_first in range(begin, end, BLOCK):
                other = other_first + tl.arange(0, BLOCK)
                other_live = _live(other, end, canvas_masked_ptr, row_cell_ptr, SKIP_UNMASKED)
                rival = _score(
                    other, other_live, segment, canvas, row_cell_ptr, confidence_ptr, alg_temp_ptr, seed_ptr, step_ptr,
                    ORDER,
                )  # fmt: skip
                ahead = (rival[None, :] > score[:, None]) | (
                    (rival[None, :] == score[:, None]) & (other[None, :] < row[:, None])
                )
                rank += tl.sum((ahead & other_live[None, :]).to(tl.int32), 1)
            rank = tl.where(live, rank, length)  # not below any count
            tl.store(rank_ptr + row, rank, mask=row < end)
            c = tl.load(confidence_ptr + row, mask=live, other=float("-inf"))
            if threshold_ptr is not None:
                above += tl.sum((c > tl.load(threshold_ptr + segment)).to(tl.int32), 0)
            if factor_ptr is not None:
                passes = c >= 1 - tl.load(factor_ptr + segment) / (rank + 2).to(tl.float32)
                failed_rank = tl.where(live & (rank > 0) & (passes == 0), rank, length)
                prefix = tl.minimum(prefix, tl.min(failed_rank, 0))

        count = tl.maximum(tl.load(quota_ptr + segment), above)
        if factor_ptr is not None:
            count = tl.where(tl.load(factor_ptr + segment) > 0, tl.maximum(count, prefix), count)
        count = tl.minimum(tl.maximum(count, 0), length - unmasked)
        tl.store(remaining_ptr + segment, length - unmasked - count)

        if SKIP_UNMASKED:
            tl.debug_barrier()  # other threads of this program may still read the masks that this one clears below

        for first in range(begin, end, BLOCK):  # each thread reads the ranks that it wrote
            row = first + tl.arange(0, BLOCK)
            rank = tl.load(rank_ptr + row, mask=row < end, other=count)
            cell = tl.load(row_cell_ptr + row, mask=row < end, other=0)
            token = tl.load(token_ptr + row, mask=row < end, other=0)
            tl.store(canvas_tokens_ptr + cell, token.to(canvas_tokens_ptr.dtype.element_ty), mask=rank < count)
            tl.store(canvas_masked_ptr + cell, tl.zeros([BLOCK], tl.int1), mask=rank < count)

    tl.debug_barrier()  # the scans below read what other threads of this program wrote
    open_column = max_canvas
    first = 0
    while first < max_canvas:
        column = first + tl.arange(0, COLUMNS)
        masked = tl.load(canvas_masked_ptr + canvas + column, mask=column < max_canvas, other=0)
        open_column = tl.min(tl.where(masked != 0, column, max_canvas), 0)
        first = tl.where(open_column < max_canvas, max_canvas, first + COLUMNS)
    tl.store(final_prefix_ptr + request, open_column)

    if eos_token_id_ptr is not None:
        eos = tl.load(eos_token_id_ptr + request)
        eos_column = open_column
        first = 0
        while first < open_column:
            column = first + tl.arange(0, COLUMNS)
            token = tl.load(canvas_tokens_ptr + canvas + column, mask=column < open_column, other=-1)
            eos_column = tl.min(tl.where((token == eos) & (column < open_column), column, open_column), 0)
            first = tl.where(eos_column < open_column, open_column, first + COLUMNS)
        tl.store(first_eos_ptr + request, tl.where(eos_column < open_column, eos_column, -1))


@triton.jit
def _live(row, end, canvas_masked_ptr, row_cell_ptr, SKIP_UNMASKED: tl.constexpr):
    """Which rows take part: false past the end of the segment and where there is a row to skip."""
    live = row < end
    if SKIP_UNMASKED:
        cell = tl.load(row_cell_ptr + row, mask=live, other=0)
        live &= tl.load(canvas_masked_ptr + cell, mask=live, other=0) != 0
    return live


@triton.jit
def _score(
    row, live, segment, canvas, row_cell_ptr, confidence_ptr, alg_temp_ptr, seed_ptr, step_ptr, ORDER: tl.constexpr
):  # fmt: skip
    """What orders the rows of a segment, highest first: finite, with NaN below the lowest."""
    score = tl.load(confidence_ptr + row, mask=live, other=float("-inf"))
    if alg_temp_ptr is not None:
        temperature = tl.load(alg_temp_ptr + segment)
        if temperature > 0:
            position = tl.load(row_cell_ptr + row, mask=live, other=0) - canvas
            bits, _, _, _ = philox.philox_block(
                tl.load(seed_ptr + segment), position, tl.load(step_ptr + segment), position * 0, ORDER
            )
            score = score / temperature + philox.gumbel_from_bits_block(bits)
    score = tl.maximum(score, -3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(score != score, float("-inf"), score)
