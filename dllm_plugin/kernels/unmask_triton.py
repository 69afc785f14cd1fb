"""The kernel of `unmask`: one program a request, which ranks every row by counting who comes before it."""

from dllm_plugin.kernels import philox
from dllm_plugin.kernels.dispatch import tl, triton


@triton.jit
def unmask_kernel(
    canvas_tokens_ptr, canvas_masked_ptr, slot_ptr, request_start_loc_ptr, segment_start_loc_ptr, row_cell_ptr,
    token_ptr, confidence_ptr, quota_ptr, threshold_ptr, factor_ptr, entropy_bound_ptr, alg_temp_ptr, seed_ptr, timestep_ptr,
    rank_ptr, remaining_ptr, unmasked_prefix_ptr,
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
        below_bound = 0
        prefix = length
        for first in range(begin, end, BLOCK):
            row = first + tl.arange(0, BLOCK)
            live = _live(row, end, canvas_masked_ptr, row_cell_ptr, SKIP_UNMASKED)
            if SKIP_UNMASKED:
                unmasked += tl.sum(((row < end) ^ live).to(tl.int32), 0)
            score = _score(
                row, live, segment, canvas, row_cell_ptr, confidence_ptr, alg_temp_ptr, seed_ptr, timestep_ptr, ORDER
            )
            rank = tl.zeros([BLOCK], tl.int32)
            entropy_ahead = tl.zeros([BLOCK], tl.float64)
            for other_first in range(begin, end, BLOCK):
                other = other_first + tl.arange(0, BLOCK)
                other_live = _live(other, end, canvas_masked_ptr, row_cell_ptr, SKIP_UNMASKED)
                rival = _score(
                    other, other_live, segment, canvas, row_cell_ptr, confidence_ptr, alg_temp_ptr, seed_ptr, timestep_ptr,
                    ORDER,
                )  # fmt: skip
                ahead = (rival[None, :] > score[:, None]) | (
                    (rival[None, :] == score[:, None]) & (other[None, :] < row[:, None])
                )
                ahead &= other_live[None, :]
                rank += tl.sum(ahead.to(tl.int32), 1)
                if entropy_bound_ptr is not None:
                    its = -tl.load(confidence_ptr + other, mask=other_live, other=0.0).to(tl.float64)
                    entropy_ahead += tl.sum(tl.where(ahead, its[None, :], 0.0), 1)
            rank = tl.where(live, rank, length)  # not below any count
            tl.store(rank_ptr + row, rank, mask=row < end)
            c = tl.load(confidence_ptr + row, mask=live, other=float("-inf"))
            if threshold_ptr is not None:
                above += tl.sum((c > tl.load(threshold_ptr + segment)).to(tl.int32), 0)
            if entropy_bound_ptr is not None:
                below = entropy_ahead - c.to(tl.float64) < tl.load(entropy_bound_ptr + segment)
                below_bound += tl.sum((live & below).to(tl.int32), 0)
            if factor_ptr is not None:
                passes = c >= 1 - tl.load(factor_ptr + segment) / (rank + 2).to(tl.float32)
                failed_rank = tl.where(live & (rank > 0) & (passes == 0), rank, length)
                prefix = tl.minimum(prefix, tl.min(failed_rank, 0))

        count = tl.maximum(tl.load(quota_ptr + segment), above)
        if factor_ptr is not None:
            count = tl.where(tl.load(factor_ptr + segment) > 0, tl.maximum(count, prefix), count)
        if entropy_bound_ptr is not None:
            count = tl.where(tl.load(entropy_bound_ptr + segment) > 0, tl.maximum(count, below_bound), count)
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

    tl.debug_barrier()  # the scan below reads what other threads of this program wrote
    open_column = max_canvas
    first = 0
    while first < max_canvas:
        column = first + tl.arange(0, COLUMNS)
        masked = tl.load(canvas_masked_ptr + canvas + column, mask=column < max_canvas, other=0)
        open_column = tl.min(tl.where(masked != 0, column, max_canvas), 0)
        first = tl.where(open_column < max_canvas, max_canvas, first + COLUMNS)
    tl.store(unmasked_prefix_ptr + request, open_column)


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
    row, live, segment, canvas, row_cell_ptr, confidence_ptr, alg_temp_ptr, seed_ptr, timestep_ptr, ORDER: tl.constexpr
):  # fmt: skip
    """What orders the rows of a segment, highest first: finite, with NaN below the lowest."""
    score = tl.load(confidence_ptr + row, mask=live, other=float("-inf"))
    if alg_temp_ptr is not None:
        temperature = tl.load(alg_temp_ptr + segment)
        if temperature > 0:
            position = tl.load(row_cell_ptr + row, mask=live, other=0) - canvas
            bits, _, _, _ = philox.philox_block(
                tl.load(seed_ptr + segment), position, tl.load(timestep_ptr + segment), position * 0, ORDER
            )
            score = score / temperature + philox.gumbel_from_bits_block(bits)
    score = tl.maximum(score, -3.4028234663852886e38, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(score != score, float("-inf"), score)
