"""Attention of ragged windows over a paged KV cache, and of whole sequences over their own keys and values.

A request forwards a window of its sequence, positions `window_start .. window_start + query length`, whose own keys and
values are in the cache already. A query at position i sees every key in `[0, limit(i))`:

* `block_length == 0`: limit = visible;
* i in the prefix, `i < prefix_len`: limit = prefix_len;
* otherwise the end of its own block, blocks of `block_length` counted from `prefix_len`;

never beyond `visible`. A query that sees no key gets zeros. Sums are fp32 (float64 for float64 inputs); the output has the
dtype of the query. A request sees nothing of the others, and nothing is summed atomically; on a GPU the size of a batch
decides over how many programs the keys of a request are split, which may change the last bit. `num_heads` is a multiple of
`num_kv_heads`. Empty batches and empty windows are allowed. Query, keys and values are contiguous in their last
dimension; all other strides are free.

Key j of a request lies in page `block_table[request, j // page_size]` at offset `j % page_size`; a page holds a multiple of
16 keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_plugin.kernels.dispatch import (
    HAS_TRITON,
    contiguous,
    device_generation,
    num_multiprocessors,
    refuse_devices,
    tl,
    triton,
    use_triton,
)
from dllm_plugin.kernels.store_kv import check_cache
from dllm_plugin.kernels.tiles import find_request, key_limit

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor
else:
    TensorDescriptor = None
try:
    from dllm_plugin.kernels import hopper_attention
except ImportError:  # no Triton, or one without Gluon
    hopper_attention = None

HEAD_SIZES = (32, 64, 80, 96, 128, 256)
_GATHER_BYTES = 1 << 20  # keys and values gathered at a time: they stay in the cache until they are used


def window_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    query_start_loc: Tensor,
    window_start: Tensor,
    visible: Tensor,
    prefix_len: Tensor,
    block_length: Tensor,
    block_table: Tensor,
    max_query_len: int,
    max_visible: int,
    scale: float,
    out: Tensor | None = None,
    query_start_loc_cpu: Sequence[int] | None = None,
    window_start_cpu: Sequence[int] | None = None,
    visible_cpu: Sequence[int] | None = None,
    prefix_len_cpu: Sequence[int] | None = None,
    block_length_cpu: Sequence[int] | None = None,
) -> Tensor:
    """Attention output [tokens, num_heads, head_size] of `query` [tokens, num_heads, head_size].

    `key_cache`, `value_cache` [num_pages, page_size, num_kv_heads, head_size], any strides over a contiguous last dimension
    (see `split_kv_cache`); `query_start_loc` [num_reqs + 1] int32; `window_start`, `visible`, `prefix_len`, `block_length`
    [num_reqs] int32; `block_table` [num_reqs, max_pages] int32. `max_query_len` and `max_visible` bound the batch's. The `_cpu`
    sequences are host copies of their namesakes; the torch path reads the tensors where they are missing.
    """
    check_cache(key_cache)
    out = _check_heads(query, key_cache, value_cache, key_cache.shape[2], query_start_loc, out)
    device, num_reqs = query.device, query_start_loc.shape[0] - 1
    if block_table.dim() != 2 or block_table.shape[0] != num_reqs or block_table.dtype != torch.int32:
        raise ValueError(
            f"block_table must be int32 [{num_reqs}, max_pages], got {block_table.dtype} {list(block_table.shape)}"
        )
    if block_table.device != device:
        refuse_devices(query=query, block_table=block_table)
    if max_visible > block_table.shape[1] * key_cache.shape[1]:
        raise ValueError(
            f"max_visible {max_visible} exceeds the {block_table.shape[1]} pages of {key_cache.shape[1]} in block_table; "
            "widen block_table"
        )
    per_request = (window_start, visible, prefix_len, block_length)
    for name, tensor in zip(("window_start", "visible", "prefix_len", "block_length"), per_request, strict=True):
        if tensor.shape != (num_reqs,) or tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 [{num_reqs}], got {tensor.dtype} {list(tensor.shape)}")
        if tensor.device != device:
            refuse_devices(query=query, **{name: tensor})
    if use_triton(device.type):
        return window_attention_triton(
            query, key_cache, value_cache, query_start_loc, *per_request, block_table, max_query_len, max_visible, scale, out
        )  # fmt: skip
    return window_attention_reference(
        query,
        key_cache,
        value_cache,
        query_start_loc.tolist() if query_start_loc_cpu is None else query_start_loc_cpu,
        window_start.tolist() if window_start_cpu is None else window_start_cpu,
        visible.tolist() if visible_cpu is None else visible_cpu,
        prefix_len.tolist() if prefix_len_cpu is None else prefix_len_cpu,
        block_length.tolist() if block_length_cpu is None else block_length_cpu,
        block_table,
        scale,
        out,
    )


def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_start_loc: Tensor,
    max_query_len: int,
    scale: float,
    out: Tensor | None = None,
    query_start_loc_cpu: Sequence[int] | None = None,
) -> Tensor:
    """`window_attention` where every window covers all that it sees: no pages, every query sees its whole request.

    `query` [tokens, num_heads, head_size]; `key`, `value` [tokens, num_kv_heads, head_size], any token and head strides.
    """
    if key.dim() != 3 or key.shape[0] != query.shape[0]:
        raise ValueError(
            f"key and value must be [{query.shape[0]}, num_kv_heads, head_size] like the query, got {list(key.shape)}"
        )
    out = _check_heads(query, key, value, key.shape[1], query_start_loc, out)
    if use_triton(query.device.type):
        return full_attention_triton(query, key, value, query_start_loc, max_query_len, scale, out)
    starts = query_start_loc.tolist() if query_start_loc_cpu is None else query_start_loc_cpu
    return full_attention_reference(query, key, value, starts, scale, out)


def window_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_start_loc: Sequence[int],
    window_start: Sequence[int],
    visible: Sequence[int],
    prefix_len: Sequence[int],
    block_length: Sequence[int],
    block_table: Tensor,
    scale: float,
    out: Tensor,
) -> Tensor:
    """The torch path: gather a few requests' pages at a time, then one unmasked call for each run of equal limits."""
    page_size, num_kv_heads, head_size = key_cache.shape[1:]
    windows = list(zip(pairwise(query_start_loc), window_start, visible, prefix_len, block_length, strict=True))
    row_bytes = 2 * num_kv_heads * head_size * key_cache.element_size()
    first = 0
    while first < len(windows):
        (begin, end), start, seen, prefix, block = windows[first]
        length, last = end - begin, first + 1
        if block == 0:  # neighbours of one shape go together as long as their pages fit the cache
            most = max(_GATHER_BYTES // (row_bytes * max(seen, 1)), 1)
            while last < min(first + most, len(windows)) and _same_shape(windows[last], length, seen):
                last += 1
        count = last - first
        pages = block_table[first:last, : -(-seen // page_size)].reshape(-1)
        key, value = (
            gathered.view(count, -1, num_kv_heads, head_size)[:, :seen]
            for gathered in _gather_pages(key_cache, value_cache, pages)
        )
        queries, outputs = (
            tensor[begin : begin + count * length].unflatten(0, (count, length)) for tensor in (query, out)
        )
        for low, high, limit in _runs_of_equal_limit(start, length, seen, prefix, block):
            outputs[:, low:high] = _attend(queries[:, low:high], key[:, :limit], value[:, :limit], scale)
        first = last
    return out


def _gather_pages(key_cache: Tensor, value_cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the pages; in one piece where they lie beside each other (`split_kv_cache`), which is faster."""
    size = key_cache.shape[-1]
    beside = value_cache.data_ptr() == key_cache.data_ptr() + size * key_cache.element_size()
    if beside and key_cache.stride() == value_cache.stride() and key_cache.stride(2) >= 2 * size:
        both = key_cache.as_strided((*key_cache.shape[:3], 2 * size), key_cache.stride()).index_select(0, pages)
        return both[..., :size], both[..., size:]
    return key_cache.index_select(0, pages), value_cache.index_select(0, pages)


def full_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, query_start_loc: Sequence[int], scale: float, out: Tensor
) -> Tensor:
    """The torch path: one call for each run of neighbours of equal length."""
    first, last = 0, 0
    while first < len(query_start_loc) - 1:
        begin = query_start_loc[first]
        length = query_start_loc[first + 1] - begin
        last = first + 1
        while last < len(query_start_loc) - 1 and query_start_loc[last + 1] - query_start_loc[last] == length:
            last += 1
        run = slice(begin, query_start_loc[last])
        shape = (last - first, length)
        if length:
            out[run].unflatten(0, shape).copy_(
                _attend(*(tensor[run].unflatten(0, shape) for tensor in (query, key, value)), scale)
            )
        first = last
    return out


def _same_shape(window: tuple, length: int, seen: int) -> bool:
    (begin, end), _, visible, _, block = window
    return block == 0 and end - begin == length and visible == seen


def _runs_of_equal_limit(start: int, length: int, visible: int, prefix: int, block: int) -> list[tuple[int, int, int]]:
    """(first query, last query + 1, limit) for each run of queries that see the same keys."""
    if block == 0:
        return [(0, length, visible)]
    runs, low = [], 0
    while low < length:
        position = start + low
        limit = prefix if position < prefix else prefix + ((position - prefix) // block + 1) * block
        high = min(limit - start, length)
        runs.append((low, high, min(limit, visible)))
        low = high
    return runs


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Unmasked attention of [n, tokens, heads, head_size] tensors."""
    if key.shape[1] == 0:
        return torch.zeros_like(query)
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    grouped = key.shape[2] != query.shape[2]
    return F.scaled_dot_product_attention(*heads_first, scale=scale, enable_gqa=grouped).transpose(1, 2)


def _check_heads(
    query: Tensor, key: Tensor, value: Tensor, num_kv_heads: int, query_start_loc: Tensor, out: Tensor | None
) -> Tensor:
    """What both variants ask of their tensors; returns the output buffer."""
    device = query.device
    if not (device == key.device == value.device == query_start_loc.device) or (
        out is not None and out.device != device
    ):
        refuse_devices(query=query, key=key, value=value, query_start_loc=query_start_loc, out=out)
    if query.dim() != 3 or key.shape != value.shape or key.shape[-1] != query.shape[-1]:
        raise ValueError(
            "query must be [tokens, num_heads, head_size], and key and value of one shape with the same head_size, got "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    if query.shape[1] % num_kv_heads or (query.shape[2] not in HEAD_SIZES and use_triton(query.device.type)):
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, and head_size one of {HEAD_SIZES} for the Triton kernels, got "
            f"head_size {query.shape[2]}, num_heads {query.shape[1]}, num_kv_heads {num_kv_heads}"
        )
    if query.stride(2) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        raise ValueError(
            f"query, key and value need a contiguous last dimension, got strides {query.stride()}, {key.stride()} and "
            f"{value.stride()}; pass .contiguous() of the one that has not"
        )
    if query.dtype != key.dtype or query.dtype != value.dtype:
        raise ValueError(f"query, key and value must share a dtype, got {query.dtype}, {key.dtype} and {value.dtype}")
    if query_start_loc.dim() != 1 or query_start_loc.shape[0] == 0 or query_start_loc.dtype != torch.int32:
        raise ValueError(
            f"query_start_loc must be int32 [num_reqs + 1], got {query_start_loc.dtype} {list(query_start_loc.shape)}"
        )
    if out is None:
        return torch.empty(query.shape, dtype=query.dtype, device=device)
    if out.shape != query.shape or out.dtype != query.dtype or out.stride(2) != 1:
        raise ValueError(
            f"out must be like the query, {query.dtype} {list(query.shape)}, got {out.dtype} {list(out.shape)}"
        )
    return out


# --- Triton -----------------------------------------------------------------------------------------------------------
#
# A program computes one tile of queries of one request for the heads that share a key-value head: its rows are
# (token, head of the group), so that a window of a few tokens still fills the matrix unit. Which request a tile belongs
# to is found on the device, so one launch serves any mix and needs no host copy of the lengths. When that leaves the
# device idle, several programs share the keys of a tile and a second kernel combines them, in a fixed order. Many queries
# on compute capability 9 have a kernel of their own, hopper_attention.py.


@dataclass(frozen=True)
class Tiling:
    """Block shapes of a launch. `rows`: (token, head) pairs of a tile; `keys`: keys of one step of the inner loop."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def choose_tiling(head_size: int, dtype: torch.dtype, rows: int, paged: bool, generation: int) -> Tiling:
    """The tiling for requests of up to `rows` (token, head) pairs. Measured on an H200 (generation 9) up to head size 128,
    see docs/kernels.md; elsewhere what fits the registers."""
    wide = head_size > 128
    if dtype.itemsize > 2:  # see PRECISION in the kernel: small tiles, or registers spill
        return Tiling(16, 16 if wide else 32, 4, 2)
    if wide:
        return Tiling(16 if rows <= 16 else 32 if rows <= 32 else 64, 32, 8, 2 if generation >= 9 else 1)
    if generation < 9:
        return Tiling(16 if rows <= 16 else 32, 64, 4, 2) if rows <= 32 else Tiling(64, 32, 4, 2)
    if rows <= 32:
        return Tiling(16 if rows <= 16 else 32, 128, 4, 2)
    if rows <= 64 or not paged:  # two programs of four warps overlap better than one of eight
        return Tiling(64, 64, 4, 3)
    return Tiling(128, 128, 8, 2) if generation == 9 else Tiling(128, 64, 8, 2)


def window_attention_triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_start_loc: Tensor,
    window_start: Tensor,
    visible: Tensor,
    prefix_len: Tensor,
    block_length: Tensor,
    block_table: Tensor,
    max_query_len: int,
    max_visible: int,
    scale: float,
    out: Tensor,
    tiling: Tiling | None = None,
    num_splits: int | None = None,
) -> Tensor:
    query_start_loc, *window = contiguous(query_start_loc, window_start, visible, prefix_len, block_length)
    return _launch(
        query, key_cache, value_cache, key_cache.stride(), value_cache.stride(), query_start_loc,
        (*window, block_table, *block_table.stride()), key_cache.shape[1],
        max_query_len, max_visible, scale, out, tiling, num_splits,
    )  # fmt: skip


def full_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    scale: float,
    out: Tensor,
    tiling: Tiling | None = None,
    num_splits: int | None = None,
) -> Tensor:
    return _launch(
        query, key, value, (0, *key.stride()), (0, *value.stride()), query_start_loc.contiguous(), (None,) * 5 + (0, 0), 0,
        max_query_len, max_query_len, scale, out, tiling, num_splits,
    )  # fmt: skip


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_stride: tuple[int, ...],
    value_stride: tuple[int, ...],
    query_start_loc: Tensor,
    window: tuple,
    page_size: int,
    max_query_len: int,
    max_visible: int,
    scale: float,
    out: Tensor,
    tiling: Tiling | None,
    num_splits: int | None,
) -> Tensor:
    """`page_size` 0: keys and values are contiguous rows [tokens, ...] of the request itself."""
    tokens, num_heads, head_size = query.shape
    num_reqs, num_kv_heads = query_start_loc.shape[0] - 1, key.shape[-2]
    if tokens == 0 or num_reqs == 0:
        return out
    group = num_heads // num_kv_heads
    generation = device_generation(query.device)
    on_hopper = (
        tiling is None
        and hopper_attention is not None
        and hopper_attention.fits(query, key, value, max_query_len * group, generation)
    )
    tiling = tiling or choose_tiling(head_size, query.dtype, max_query_len * group, page_size > 0, generation)
    rows = hopper_attention.ROWS if on_hopper else max(tiling.rows, triton.next_power_of_2(group))
    tokens_per_tile = rows // group
    num_tiles = tokens // tokens_per_tile + num_reqs  # at least as many as there are, whatever the lengths
    if num_splits is None:
        tiles_at_most = min(num_tiles, num_reqs * triton.cdiv(max_query_len, tokens_per_tile))
        slots = num_multiprocessors(query.device) * (1 if on_hopper else 2)
        num_splits = choose_splits(tiles_at_most * num_kv_heads, max_visible, slots)
    partial = lse = None
    if num_splits > 1:
        partial = query.new_empty((num_splits, tokens, num_heads, head_size), dtype=torch.float32)
        lse = query.new_empty((num_splits, tokens, num_heads), dtype=torch.float32)
    if on_hopper:
        hopper_attention.launch(
            query, key, value, out, partial, lse, query_start_loc, window, page_size, num_tiles, num_splits, scale
        )
    else:
        block_d = triton.next_power_of_2(head_size)
        descriptors = generation >= 9 and page_size == 0 and all(_describable(tensor) for tensor in (key, value))
        if descriptors:
            key, value = (_describe(tensor, [tiling.keys, block_d]) for tensor in (key, value))
        _attention_kernel[(num_tiles, num_kv_heads, num_splits)](
            query, key, value, out, partial, lse, query_start_loc, *window[:5],
            scale * 1.4426950408889634, num_reqs, tokens,
            *query.stride()[:2], *key_stride[:3], *value_stride[:3], *out.stride()[:2], *window[5:],
            PAGE_SIZE=page_size, GROUP=group, HEAD_SIZE=head_size, ROWS=rows, KEYS=tiling.keys, BLOCK_D=block_d,
            SPLITS=num_splits, DESCRIPTORS=descriptors, num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        )  # fmt: skip
    if num_splits > 1:
        _combine_kernel[(tokens, num_heads)](
            partial, lse, out, tokens, num_heads, *out.stride()[:2],
            HEAD_SIZE=head_size, BLOCK_D=triton.next_power_of_2(head_size), SPLITS=num_splits,
            BLOCK_S=triton.next_power_of_2(num_splits), num_warps=1 if head_size <= 128 else 2,
        )  # fmt: skip
    return out


def _describable(tensor: Tensor) -> bool:
    """Whether [tokens, heads, head_size] is a 16-bit matrix as the copy engine reads one: contiguous heads, 16-byte rows."""
    contiguous_heads = tensor.element_size() == 2 and tensor.stride(1) == tensor.shape[2]
    return contiguous_heads and tensor.stride(0) % 8 == 0 and tensor.data_ptr() % 16 == 0


def _describe(tensor: Tensor, block: list[int]) -> "TensorDescriptor":
    tokens, heads, head_size = tensor.shape
    return TensorDescriptor(tensor, [tokens, heads * head_size], [tensor.stride(0), 1], block)


def choose_splits(programs: int, max_visible: int, slots: int) -> int:
    """Programs that share the keys of a tile: as few as fill the device, which runs `slots` at a time, each with at least
    256 keys."""
    most = min(triton.cdiv(max_visible, 256), 32)
    best, best_use = 1, 0.0
    for splits in range(1, most + 1):
        waves = -(-programs * splits // slots)
        use = programs * splits / (waves * slots)
        if use > best_use + 0.05:
            best, best_use = splits, use
    return best


@triton.jit
def _attention_kernel(
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
    for index in range(first, whole):
        highest, total, acc = _attend_block(
            q, highest, total, acc, index * KEYS, limit, high, scale_log2e, k_source, v_source, table, begin, kv_head,
            k_stride_page, k_stride_token, v_stride_page, v_stride_token, table_stride_page,
            PAGE_SIZE, HEAD_SIZE, BLOCK_D, KEYS, DESCRIPTORS, MASKED=False,
        )  # fmt: skip
    for index in range(whole, last):
        highest, total, acc = _attend_block(
            q, highest, total, acc, index * KEYS, limit, high, scale_log2e, k_source, v_source, table, begin, kv_head,
            k_stride_page, k_stride_token, v_stride_page, v_stride_token, table_stride_page,
            PAGE_SIZE, HEAD_SIZE, BLOCK_D, KEYS, DESCRIPTORS, MASKED=True,
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
def _combine_kernel(
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
