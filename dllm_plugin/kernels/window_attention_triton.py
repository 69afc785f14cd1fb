"""The kernels of `window_attention` and `full_attention`: one that attends, and one that combines what it has split.

A program computes one tile of queries of one request for the heads that share a key-value head: its rows are
(token, head of the group), so that a window of a few tokens still fills the matrix unit. Which request a tile belongs
to is found on the device, so one launch serves any mix and needs no host copy of the lengths. When that leaves the
device idle, several programs share the keys of a tile and a second kernel combines them, in a fixed order.
"""

from dllm_plugin.kernels.dispatch import tl, triton
from dllm_plugin.kernels.tiles import find_request, key_limit


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, partial_ptr, lse_ptr, query_start_loc_ptr,
    window_start_ptr, visible_ptr, prefix_len_ptr, block_length_ptr, block_table_ptr,
    scale_log2e, num_reqs, tokens,
    q_stride_token, q_stride_head, k_stride_page, k_stride_token, k_stride_head,
    v_stride_page, v_stride_token, v_stride_head, out_stride_token, out_stride_head, table_stride, table_stride_page,
    PAGE_SIZE: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GROUP
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)

    request, begin, end, first_token = find_request(tile, query_start_loc_ptr, num_reqs, TOKENS)
    if first_token >= end:
        return

    row = tl.arange(0, ROWS)
    token = first_token + row // GROUP
    head = kv_head * GROUP + row % GROUP
    valid = (token < end) & (row < TOKENS * GROUP)
    dim = tl.arange(0, BLOCK_D)
    in_head = dim < HEAD_SIZE

    if PAGE_SIZE > 0:
        visible = tl.load(visible_ptr + request)
        prefix = tl.load(prefix_len_ptr + request)
        block = tl.load(block_length_ptr + request)
        position = tl.load(window_start_ptr + request) + token - begin
        limit = key_limit(position, visible, prefix, block)
        table = block_table_ptr + request.to(tl.int64) * table_stride
    else:
        limit = tl.zeros([ROWS], tl.int32) + (end - begin)
        table = query_start_loc_ptr  # not read
    if DESCRIPTORS:
        k_source, v_source = k_ptr, v_ptr
    else:
        k_source = k_ptr + kv_head.to(tl.int64) * k_stride_head
        v_source = v_ptr + kv_head.to(tl.int64) * v_stride_head
    high = tl.max(tl.where(valid, limit, 0), 0)
    low = tl.min(tl.where(valid, limit, 2147483647), 0)
    limit = tl.where(valid, limit, 0)

    # Key blocks [first, last) are this split's; those below `whole` are seen entirely by every row.
    blocks = tl.cdiv(high, KEYS)
    share = tl.cdiv(blocks, SPLITS)
    first = split * share
    last = tl.minimum(first + share, blocks)
    whole = tl.maximum(tl.minimum(low // KEYS, last), first)

    q_cell = token.to(tl.int64) * q_stride_token + head * q_stride_head
    q = tl.load(q_ptr + q_cell[:, None] + dim[None, :], mask=valid[:, None] & in_head[None, :], other=0.0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for masked in tl.static_range(2):
        for index in range(whole if masked else first, last if masked else whole):
            highest, total, acc = _attend_block(
                q, highest, total, acc, index * KEYS, limit, high, scale_log2e, k_source, v_source, table, begin,
                kv_head, k_stride_page, k_stride_token, v_stride_page, v_stride_token, table_stride_page,
                PAGE_SIZE, HEAD_SIZE, BLOCK_D, KEYS, DESCRIPTORS, MASKED=masked,
            )  # fmt: skip

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]  # a row that saw no key is all zeros
    if SPLITS == 1:
        out_cell = token.to(tl.int64) * out_stride_token + head * out_stride_head
        tl.store(
            out_ptr + out_cell[:, None] + dim[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=valid[:, None] & in_head[None, :],
        )
    else:
        cell = (split.to(tl.int64) * tokens + token) * (GROUP * tl.num_programs(1)) + head
        tl.store(partial_ptr + cell[:, None] * HEAD_SIZE + dim[None, :], acc, mask=valid[:, None] & in_head[None, :])
        tl.store(lse_ptr + cell, tl.where(total > 0, highest + tl.log2(total), float("-inf")), mask=valid)


@triton.jit
def _attend_block(
    q, highest, total, acc, key_start, limit, high, scale_log2e, k_source, v_source, table, begin, kv_head,
    k_stride_page, k_stride_token, v_stride_page, v_stride_token, table_stride_page,
    PAGE_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax. MASKED: some rows do not see all of these keys, and some keys may not exist."""
    # For fp32 inputs only. Three tf32 products keep nearly all digits; at head size 256 they spill, multiply-adds do not.
    PRECISION: tl.constexpr = "tf32x3" if BLOCK_D <= 128 else "ieee"
    key = key_start + tl.arange(0, KEYS)
    if PAGE_SIZE > 0:
        entry = table + key // PAGE_SIZE * table_stride_page
        page = tl.load(entry, mask=(key < high) if MASKED else None, other=0 if MASKED else None)
        place, within = page.to(tl.int64), key % PAGE_SIZE
    else:
        place, within = 0, begin.to(tl.int64) + key
    k = _load_keys(
        k_source, place, within, key < high, begin + key_start, kv_head, k_stride_page, k_stride_token,
        HEAD_SIZE, BLOCK_D, DESCRIPTORS, MASKED,
    )  # fmt: skip
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(key[None, :] < limit[:, None], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale_log2e)
    base = new_highest
    if MASKED:  # a row that has seen no key yet would subtract -inf from -inf
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores * scale_log2e - base[:, None])
    shrink = tl.exp2(highest - base)
    total = total * shrink + tl.sum(weights, 1)
    v = _load_keys(
        v_source, place, within, key < high, begin + key_start, kv_head, v_stride_page, v_stride_token,
        HEAD_SIZE, BLOCK_D, DESCRIPTORS, MASKED,
    )  # fmt: skip
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_highest, total, acc


@triton.jit
def _load_keys(
    source, page, within, exists, first_row, kv_head, stride_page, stride_token,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTOR: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A block [KEYS, BLOCK_D] of keys or values. What lies past the last visible key may be NaN, which no weight of zero
    would cancel: a MASKED block holds zeros there."""
    if DESCRIPTOR:
        block = source.load([first_row, kv_head * HEAD_SIZE])
        if MASKED:
            block = tl.where(exists[:, None], block, 0.0)
    else:
        dim = tl.arange(0, BLOCK_D)
        pointers = source + (page * stride_page + within * stride_token)[:, None] + dim[None, :]
        if MASKED:
            block = tl.load(pointers, mask=exists[:, None] & (dim < HEAD_SIZE)[None, :], other=0.0)
        elif HEAD_SIZE < BLOCK_D:
            block = tl.load(pointers, mask=(dim < HEAD_SIZE)[None, :], other=0.0)
        else:
            block = tl.load(pointers)
    return block


@triton.jit
def combine_kernel(
    partial_ptr, lse_ptr, out_ptr, tokens, num_heads, out_stride_token, out_stride_head,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Weighs the splits of one token and head by their sums of exponentials."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, dim = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    cell = (split.to(tl.int64) * tokens + token) * num_heads + head
    lse = tl.load(lse_ptr + cell, mask=split < SPLITS, other=float("-inf"))
    highest = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weight, 0)
    # A split without keys wrote no numbers worth reading.
    partial = tl.load(
        partial_ptr + cell[:, None] * HEAD_SIZE + dim[None, :],
        mask=(weight > 0)[:, None] & (dim < HEAD_SIZE)[None, :],
        other=0.0,
    )
    result = tl.sum(partial * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    out_cell = token * out_stride_token + head * out_stride_head
    tl.store(out_ptr + out_cell + dim, result.to(out_ptr.dtype.element_ty), mask=dim < HEAD_SIZE)
