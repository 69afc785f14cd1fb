"""The kernel of `window_attention` and `full_attention` for many queries on compute capability 9.

Written in Gluon, where a program says itself when it waits for a matrix product: one warp copies blocks of keys and values
into shared memory, and two groups of four warps, 64 rows each, multiply and weigh them. While a group computes the softmax
of a block, the matrix unit works on the products of the other group (FlashAttention-3, arXiv 2407.08608). Importing
this module raises ImportError where Triton has no Gluon; `window_attention` then does without.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

try:
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_load
except ImportError:  # its name in Triton 3.6
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_global_to_shared as async_load

from dllm_plugin.kernels.dispatch import INTERPRETED
from dllm_plugin.kernels.tiles import find_request, key_limit

ROWS, KEYS, STAGES = 128, 128, 2  # (token, head) pairs of a tile, keys of a step, steps whose keys are under way
HALF = ROWS // 2


def fits(query: Tensor, key: Tensor, value: Tensor, rows: int, generation: int) -> bool:
    """Whether this kernel serves requests of up to `rows` (token, head) pairs: only tiles that fill are worth it."""
    return (
        generation == 9
        and not INTERPRETED
        and rows > HALF
        and query.element_size() == 2
        and query.shape[2] in (64, 128)
        and query.shape[1] // key.shape[-2] <= ROWS
        and (matrix := _as_matrix(key)) is not None
        and (other := _as_matrix(value)) is not None
        and matrix[2:] == other[2:]
    )


def _as_matrix(tensor: Tensor) -> tuple[int, int, int, int, int] | None:
    """`[pages, page_size, num_kv_heads, head_size]`, or without pages, as the copy engine reads it: rows equally far apart.

    Returns rows and columns of the matrix, rows from page to page, and rows and columns from head to head; None where
    the strides make no such matrix of 16-byte aligned rows.
    """
    *pages, tokens, heads, head_size = tensor.shape
    *page, token, head, _ = tensor.stride()
    if token <= 0 or head < 0 or token % 8 or tensor.data_ptr() % 16:
        return None
    page_rows = 0
    if pages and pages[0] > 1:
        page_rows, uneven = divmod(page[0], token)
        if uneven:
            return None
    head_rows, head_columns = (0, 0) if heads == 1 else (0, head) if head % token else (head // token, 0)
    if head_columns % 8:
        return None
    rows = ((pages or [1])[0] - 1) * page_rows + (heads - 1) * head_rows + tokens
    return rows, (heads - 1) * head_columns + head_size, page_rows, head_rows, head_columns


def launch(
    grid: tuple[int, int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start_loc: Tensor,
    window: tuple[Tensor | int | None, ...],
    scale: float,
    out: Tensor,
    partials: tuple[Tensor | None, Tensor | None],
) -> None:
    """As `window_attention.attention_triton`. `window`: the kernel's arguments from window_start to table_stride_page;
    `partials`: where the splits' results and their logarithms go if there are several."""
    tokens, num_heads, head_size = query.shape
    page_size = key.shape[1] if key.dim() == 4 else 0
    box = min(page_size & -page_size, KEYS) if page_size else KEYS
    dtype = gl.bfloat16 if query.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([KEYS, head_size], dtype)
    matrices = []
    for tensor in (key, value):
        matrix = _as_matrix(tensor)
        assert matrix is not None  # `fits` has asked, and whether the steps of both are alike
        rows, columns, *steps = matrix
        matrices.append(TensorDescriptor(tensor, [rows, columns], [tensor.stride(-3), 1], [box, head_size], layout))
    # query_start_loc stands for what a launch without pages or splits does not read
    _hopper_kernel[grid](
        query, *matrices, out,
        *(query_start_loc if argument is None else argument for argument in (*partials, query_start_loc, *window)),
        scale * 1.4426950408889634, query_start_loc.shape[0] - 1, tokens,
        *query.stride()[:2], *steps, *out.stride()[:2],
        PAGE_SIZE=page_size, GROUP=num_heads // key.shape[-2], HEAD_SIZE=head_size, SPLITS=grid[2], BOX=box,
        ROWS=ROWS, KEYS=KEYS, STAGES=STAGES, num_warps=4,
    )  # fmt: skip


@gluon.jit
def _hopper_kernel(
    q_ptr, k_matrix, v_matrix, out_ptr, partial_ptr, lse_ptr, query_start_loc_ptr,
    window_start_ptr, visible_ptr, prefix_len_ptr, block_length_ptr, block_table_ptr, table_stride, table_stride_page,
    scale_log2e, num_reqs, tokens,
    q_stride_token, q_stride_head, page_rows, head_rows, head_columns, out_stride_token, out_stride_head,
    PAGE_SIZE: gl.constexpr, GROUP: gl.constexpr, HEAD_SIZE: gl.constexpr, SPLITS: gl.constexpr, BOX: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = ROWS // GROUP
    tile, kv_head, split = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    request, begin, end, first_token = find_request(tile, query_start_loc_ptr, num_reqs, TOKENS)
    if first_token >= end:
        return

    if PAGE_SIZE > 0:
        visible = gl.load(visible_ptr + request)
        prefix = gl.load(prefix_len_ptr + request)
        block = gl.load(block_length_ptr + request)
        to_position = gl.load(window_start_ptr + request) - begin
        first_row = 0
        table = block_table_ptr + request.to(gl.int64) * table_stride
    else:
        visible, prefix, block, to_position = end - begin, 0, 0, 0
        first_row = begin
        table = block_table_ptr
    low = key_limit(first_token + to_position, visible, prefix, block)
    high = key_limit(gl.minimum(first_token + TOKENS, end) - 1 + to_position, visible, prefix, block)

    # Key blocks [first, last) are this split's, those below `whole` seen entirely by every row. A split without any takes
    # one of which it sees nothing, since its partitions wait for each other.
    blocks = gl.cdiv(high, KEYS)
    share = gl.cdiv(blocks, SPLITS)
    first = split * share
    last = gl.minimum(first + share, blocks)
    if first >= last:
        first, last, high, visible = 0, 1, 0, 0
    whole = gl.maximum(gl.minimum(low // KEYS, last), first)

    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS // 2, HEAD_SIZE], k_matrix.dtype)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q = gl.allocate_shared_memory(k_matrix.dtype, [2, ROWS // 2, HEAD_SIZE], q_layout)
    k = gl.allocate_shared_memory(k_matrix.dtype, [STAGES, KEYS, HEAD_SIZE], k_matrix.layout)
    v = gl.allocate_shared_memory(v_matrix.dtype, [STAGES, KEYS, HEAD_SIZE], v_matrix.layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)

    keys = (k, v, k_ready, v_ready, k_free, v_free)
    queries = (q_ptr, out_ptr, partial_ptr, lse_ptr, q_stride_token, q_stride_head, out_stride_token, out_stride_head)
    place = (first_token, end, tokens, kv_head, split, gl.num_programs(1))
    sight = (visible, prefix, block, to_position, high, first, last, whole)
    gl.warp_specialize(
        [
            (_weigh, (0, q.index(0), keys, queries, place, sight, scale_log2e, GROUP, SPLITS)),
            (_weigh, (1, q.index(1), keys, queries, place, sight, scale_log2e, GROUP, SPLITS)),
            (
                _copy,
                (k_matrix, v_matrix, keys, table, table_stride_page, page_rows, first_row + kv_head * head_rows,
                 kv_head * head_columns, high, first, last, PAGE_SIZE, BOX),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@gluon.jit
def _copy(
    k_matrix, v_matrix, keys, table, table_stride_page, page_rows, first_row, column, high, first, last,
    PAGE_SIZE: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Copies the blocks of keys and values, last block first, each as soon as both groups are done with its place."""
    k, v, k_ready, v_ready, k_free, v_free = keys
    STAGES: gl.constexpr = k.shape[0]
    KEYS: gl.constexpr = k.shape[1]
    NBYTES: gl.constexpr = KEYS * k.shape[2] * 2
    for step in range(last - first):
        stage = step % STAGES
        fresh = (step // STAGES & 1) ^ 1
        key = (last - 1 - step) * KEYS
        rows = ()
        for part in gl.static_range(KEYS // BOX):
            row = key + part * BOX
            if PAGE_SIZE > 0:  # past the last key, where the table may hold anything, page 0
                page = gl.load(table + row // PAGE_SIZE * table_stride_page, mask=row < high, other=0)
                row = page * page_rows + row % PAGE_SIZE
            # Gluon unpacks no tuple into another, and knows no annotation
            rows = rows + (first_row + row,)  # type: ignore[assignment]  # noqa: RUF005
        mbarrier.wait(k_free.index(stage), fresh)
        mbarrier.expect(k_ready.index(stage), NBYTES)
        for part in gl.static_range(KEYS // BOX):
            async_load(k_matrix, [rows[part], column], k_ready.index(stage), k.index(stage).slice(part * BOX, BOX))
        mbarrier.wait(v_free.index(stage), fresh)
        mbarrier.expect(v_ready.index(stage), NBYTES)
        for part in gl.static_range(KEYS // BOX):
            async_load(v_matrix, [rows[part], column], v_ready.index(stage), v.index(stage).slice(part * BOX, BOX))


@gluon.jit
def _weigh(half, q, keys, queries, place, sight, scale_log2e, GROUP: gl.constexpr, SPLITS: gl.constexpr):
    """Attention of one half of the tile's rows."""
    k, v, k_ready, v_ready, k_free, _ = keys
    q_ptr, out_ptr, partial_ptr, lse_ptr, q_stride_token, q_stride_head, out_stride_token, out_stride_head = queries
    first_token, end, tokens, kv_head, split, num_kv_heads = place
    visible, prefix, block, to_position, high, first, last, whole = sight
    STAGES: gl.constexpr = k.shape[0]
    KEYS: gl.constexpr = k.shape[1]
    ROWS: gl.constexpr = q.shape[0]
    HEAD_SIZE: gl.constexpr = q.shape[1]
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    memory: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_SIZE, HEAD_SIZE // 8], [4, 1], [1, 0])

    dim = gl.expand_dims(gl.arange(0, HEAD_SIZE, gl.SliceLayout(0, memory)), 0)
    token, head, valid = _rows(half, first_token, end, kv_head, GROUP, ROWS, gl.SliceLayout(1, memory))
    q_cell = gl.expand_dims(token.to(gl.int64) * q_stride_token + head * q_stride_head, 1)
    q.store(gl.load(q_ptr + q_cell + dim, mask=gl.expand_dims(valid, 1), other=0.0))
    fence_async_shared()
    token, head, valid = _rows(half, first_token, end, kv_head, GROUP, ROWS, gl.SliceLayout(1, output))
    limit = gl.where(valid, key_limit(token + to_position, visible, prefix, block), 0)
    limit = gl.convert_layout(limit, gl.SliceLayout(1, scores))
    key = (last - 1) * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, scores))

    # The last block comes first, and alone: it may reach past the keys.
    mbarrier.wait(k_ready.index(0), 0)
    zeros = gl.zeros([ROWS, KEYS], gl.float32, scores)
    s = warpgroup_mma(q, k.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_free.index(0), count=1)
    highest = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, scores))
    weights, _, highest, total = _soften(s, highest, total, key, limit, scale_log2e, True)
    p = gl.convert_layout(weights.to(q.dtype), operand)
    acc = gl.zeros([ROWS, HEAD_SIZE], gl.float32, output)
    mbarrier.wait(v_ready.index(0), 0)
    left = high - (last - 1) * KEYS
    if left < KEYS:  # what lies past the last key may be NaN, which no weight of zero would cancel
        there = gl.arange(0, KEYS, gl.SliceLayout(1, memory)) < left
        v.index(0).store(gl.where(gl.expand_dims(there, 1), v.index(0).load(memory), 0.0))
        fence_async_shared()

    for unmasked in gl.static_range(2):
        for step in range(gl.maximum(last - whole, 1) if unmasked else 1, last - (first if unmasked else whole)):
            acc, p, highest, total = _take_block(
                step, q, keys, acc, p, zeros, highest, total, key - step * KEYS, limit, scale_log2e, not unmasked
            )
    step = last - first - 1
    mbarrier.wait(v_ready.index(step % STAGES), step // STAGES & 1)
    acc = warpgroup_mma(p, v.index(step % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    total = gl.convert_layout(total, gl.SliceLayout(1, output))
    norm = gl.where(total > 0, total, 1.0)  # a row that saw no key is all zeros
    acc = acc / gl.expand_dims(norm, 1)
    dim = gl.expand_dims(gl.arange(0, HEAD_SIZE, gl.SliceLayout(0, output)), 0)
    if SPLITS == 1:
        cell = gl.expand_dims(token.to(gl.int64) * out_stride_token + head * out_stride_head, 1)
        gl.store(out_ptr + cell + dim, acc.to(q.dtype), mask=gl.expand_dims(valid, 1))
    else:
        cell = (split.to(gl.int64) * tokens + token) * (GROUP * num_kv_heads) + head
        gl.store(partial_ptr + gl.expand_dims(cell * HEAD_SIZE, 1) + dim, acc, mask=gl.expand_dims(valid, 1))
        highest = gl.convert_layout(highest, gl.SliceLayout(1, output))
        gl.store(lse_ptr + cell, gl.where(total > 0, highest + gl.log2(norm), float("-inf")), mask=valid)


@gluon.jit
def _rows(half, first_token, end, kv_head, GROUP: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Token and head of every row, and whether there is such a row."""
    row = half * ROWS + gl.arange(0, ROWS, LAYOUT)
    token = first_token + row // GROUP
    return token, kv_head * GROUP + row % GROUP, (token < end) & (row < 2 * ROWS // GROUP * GROUP)


@gluon.jit
def _take_block(
    step, q, keys, acc, p, zeros, highest, total, key, limit, scale_log2e, MASKED: gl.constexpr
):  # fmt: skip
    """The scores of one block, while the values of the one before it are added up by its weights `p`."""
    k, v, k_ready, v_ready, k_free, v_free = keys
    STAGES: gl.constexpr = k.shape[0]
    stage, before = step % STAGES, (step - 1) % STAGES
    mbarrier.wait(k_ready.index(stage), step // STAGES & 1)
    s = warpgroup_mma(q, k.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(before), (step - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_free.index(stage), count=1)
    weights, shrink, highest, total = _soften(s, highest, total, key, limit, scale_log2e, MASKED)
    # the weights pass through the wait, which keeps them packed in registers from one step to the next
    acc, weights = warpgroup_mma_wait(0, deps=(acc, weights.to(p.dtype)))
    mbarrier.arrive(v_free.index(before), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout)), 1)
    return acc, gl.convert_layout(weights, p.type.layout), highest, total


@gluon.jit
def _soften(s, highest, total, key, limit, scale_log2e, MASKED: gl.constexpr):
    """One step of the online softmax: weights, the factor of all earlier ones, and the new maximum and sum of every row."""
    if MASKED:
        s = gl.where(gl.expand_dims(key, 0) < gl.expand_dims(limit, 1), s, float("-inf"))
    new_highest = gl.maximum(highest, gl.max(s, 1) * scale_log2e)
    base = new_highest
    if MASKED:  # a row that has seen no key yet would subtract -inf from -inf
        base = gl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = gl.exp2(s * scale_log2e - gl.expand_dims(base, 1))
    shrink = gl.exp2(highest - base)
    return weights, shrink, new_highest, total * shrink + gl.sum(weights, 1)
