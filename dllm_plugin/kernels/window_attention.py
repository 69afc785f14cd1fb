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
dimension; all other strides are free. `head_size` is one of HEAD_SIZES for the Triton kernels.

Key j of a request lies in page `block_table[request, j // page_size]` at offset `j % page_size`; a page holds a multiple of
16 keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_plugin.kernels import dispatch
from dllm_plugin.kernels.dispatch import TensorDescriptor, contiguous, refuse, refuse_devices, triton, use_triton
from dllm_plugin.kernels.store_kv import check_cache
from dllm_plugin.kernels.window_attention_triton import attention_kernel, combine_kernel

try:
    from dllm_plugin.kernels import hopper_attention
except ImportError:  # no Triton, or one without Gluon
    hopper_attention = None  # type: ignore[assignment]  # mypy has no type for a module that may be missing

HEAD_SIZES = (32, 64, 80, 96, 128, 256)
_PER_REQUEST = ("window_start", "visible", "prefix_len", "block_length")
_TILE = 64  # queries of blocks that are computed together
_GATHER_BYTES = 1 << 20  # keys and values gathered at a time: they stay in the cache until they are used


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Windows end to end, which hold every key that their queries see. `_cpu`: the same on the host, for the torch path,
    which reads the tensors where it is missing."""

    query_start_loc: Tensor  # [num_reqs + 1] int32
    max_query_len: int
    query_start_loc_cpu: Sequence[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedWindows(Windows):
    """Windows whose keys are in pages."""

    window_start: Tensor  # [num_reqs] int32, and so are the next three
    visible: Tensor
    prefix_len: Tensor
    block_length: Tensor
    block_table: Tensor  # [num_reqs, max_pages] int32
    max_visible: int
    window_start_cpu: Sequence[int] | None = None
    visible_cpu: Sequence[int] | None = None
    prefix_len_cpu: Sequence[int] | None = None
    block_length_cpu: Sequence[int] | None = None


def window_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    windows: PagedWindows,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Attention output [tokens, num_heads, head_size] of `query` [tokens, num_heads, head_size].

    `key_cache`, `value_cache` [num_pages, page_size, num_kv_heads, head_size], any strides over a contiguous last dimension
    (see `split_kv_cache`).
    """
    check_cache(key_cache)
    out = _check_heads(query, key_cache, value_cache, windows.query_start_loc, out)
    device, num_reqs, table = query.device, windows.query_start_loc.shape[0] - 1, windows.block_table
    if table.dim() != 2 or table.shape[0] != num_reqs or table.dtype != torch.int32 or table.device != device:
        refuse(f"block_table must be int32 [{num_reqs}, max_pages]", {"block_table": table}, {"query": query})
    if windows.max_visible > table.shape[1] * key_cache.shape[1]:
        raise ValueError(
            f"max_visible {windows.max_visible} exceeds the {table.shape[1]} pages of {key_cache.shape[1]} in block_table; "
            "widen block_table"
        )
    for name in _PER_REQUEST:
        tensor = getattr(windows, name)
        if tensor.shape != (num_reqs,) or tensor.dtype != torch.int32 or tensor.device != device:
            refuse(f"{name} must be int32 [{num_reqs}]", {name: tensor}, {"query": query})
    run = attention_triton if use_triton(device.type) else window_attention_cpu
    return run(query, key_cache, value_cache, windows, scale, out)


def full_attention(
    query: Tensor, key: Tensor, value: Tensor, windows: Windows, scale: float, out: Tensor | None = None
) -> Tensor:
    """`window_attention` where every window covers all that it sees: no pages, every query sees its whole request.

    `query` [tokens, num_heads, head_size]; `key`, `value` [tokens, num_kv_heads, head_size], any token and head strides.
    """
    if key.dim() != 3 or key.shape[0] != query.shape[0]:
        refuse(f"key and value must be [{query.shape[0]}, num_kv_heads, head_size] like the query", {"key": key})
    out = _check_heads(query, key, value, windows.query_start_loc, out)
    run = attention_triton if use_triton(query.device.type) else full_attention_cpu
    return run(query, key, value, windows, scale, out)


def window_attention_rule(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, windows: PagedWindows, scale: float
) -> Tensor:
    """The contract of `window_attention` in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for request, (first, last) in enumerate(pairwise(windows.query_start_loc.tolist())):
        visible = int(windows.visible[request])
        pages = windows.block_table[request, : -(-visible // key_cache.shape[1])]
        key, value = (cache[pages].flatten(0, 1)[:visible] for cache in (key_cache, value_cache))
        out[first:last] = _attend_rule(query[first:last], key, value, limits_rule(windows, request), scale)
    return out


def full_attention_rule(query: Tensor, key: Tensor, value: Tensor, windows: Windows, scale: float) -> Tensor:
    """The contract of `full_attention` in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for first, last in pairwise(windows.query_start_loc.tolist()):
        own = slice(first, last)
        limit = torch.full((last - first,), last - first, device=query.device)
        out[own] = _attend_rule(query[own], key[own], value[own], limit, scale)
    return out


def limits_rule(windows: PagedWindows, request: int) -> Tensor:
    """How many keys each query of a window sees."""
    length = int(windows.query_start_loc[request + 1] - windows.query_start_loc[request])
    position = windows.window_start[request] + torch.arange(length, device=windows.visible.device)
    visible, prefix, block = windows.visible[request], windows.prefix_len[request], windows.block_length[request]
    if block == 0:
        return visible.expand(length)
    own_block = prefix + ((position - prefix) // block + 1) * block
    return torch.where(position < prefix, prefix, own_block).clamp(max=visible)


def _attend_rule(query: Tensor, key: Tensor, value: Tensor, limit: Tensor, scale: float) -> Tensor:
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    hidden = torch.arange(key.shape[0], device=query.device) >= limit[:, None]
    for head in range(query.shape[1]):
        k, v = (tensor[:, head * tensor.shape[1] // query.shape[1]].double() for tensor in (key, value))
        scores = (query[:, head].double() @ k.T * scale).masked_fill_(hidden, float("-inf"))
        out[:, head] = scores.softmax(1).masked_fill_(limit[:, None] == 0, 0.0) @ v
    return out


def window_attention_cpu(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, windows: PagedWindows, scale: float, out: Tensor
) -> Tensor:
    """The torch path: gather a few requests' pages at a time, then one unmasked call for each run of equal limits."""
    page_size, num_kv_heads, head_size = key_cache.shape[1:]
    starts, *per_request = (_on_host(windows, name) for name in ("query_start_loc", *_PER_REQUEST))
    ragged = list(zip(pairwise(starts), *per_request, strict=True))
    shapes = [(end - begin, seen, block) for (begin, end), _, seen, _, block in ragged]
    row_bytes = 2 * num_kv_heads * head_size * key_cache.element_size()
    first = 0
    while first < len(ragged):
        (begin, end), start, seen, prefix, block = ragged[first]
        length, last = end - begin, first + 1
        if block == 0:  # neighbours of one shape go together as long as their pages fit the cache
            most = max(_GATHER_BYTES // (row_bytes * max(seen, 1)), 1)
            while last < min(first + most, len(ragged)) and shapes[last] == shapes[first]:
                last += 1
        count = last - first
        pages = windows.block_table[first:last, : -(-seen // page_size)].reshape(-1)
        key, value = (
            gathered.view(count, -1, num_kv_heads, head_size)[:, :seen]
            for gathered in _gather_pages(key_cache, value_cache, pages)
        )
        own = slice(begin, begin + count * length)
        queries, outputs = (tensor[own].unflatten(0, (count, length)) for tensor in (query, out))
        for low, high, limit, hidden in _tiles(start, length, seen, prefix, block, query.dtype):
            outputs[:, low:high] = _attend(queries[:, low:high], key[:, :limit], value[:, :limit], scale, hidden)
        first = last
    return out


def _on_host(windows: Windows, name: str) -> Sequence[int]:
    """Numbers of the windows: the host's own, else read from the device."""
    numbers = getattr(windows, f"{name}_cpu")
    return getattr(windows, name).tolist() if numbers is None else numbers


def _gather_pages(key_cache: Tensor, value_cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the pages; in one piece where they lie beside each other (`split_kv_cache`), which is faster."""
    size = key_cache.shape[-1]
    beside = value_cache.data_ptr() == key_cache.data_ptr() + size * key_cache.element_size()
    if beside and key_cache.stride() == value_cache.stride() and key_cache.stride(2) >= 2 * size:
        both = key_cache.as_strided((*key_cache.shape[:3], 2 * size), key_cache.stride()).index_select(0, pages)
        return both[..., :size], both[..., size:]
    return key_cache.index_select(0, pages), value_cache.index_select(0, pages)


def full_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, windows: Windows, scale: float, out: Tensor
) -> Tensor:
    """The torch path: one call for each run of neighbours of equal length."""
    starts = _on_host(windows, "query_start_loc")
    for length, neighbours in groupby(pairwise(starts), key=lambda window: window[1] - window[0]):
        run = list(neighbours)
        shape, own = (len(run), length), slice(run[0][0], run[-1][1])
        if length:
            queries, keys, values = (tensor[own].unflatten(0, shape) for tensor in (query, key, value))
            out[own].unflatten(0, shape).copy_(_attend(queries, keys, values, scale))
    return out


@lru_cache(maxsize=256)
def _tiles(
    start: int, length: int, visible: int, prefix: int, block: int, dtype: torch.dtype
) -> list[tuple[int, int, int, Tensor | None]]:
    """(first query, last query + 1, keys, what is added to the scores) of queries that are computed by one call.

    Queries of one limit need no mask. Short blocks go together, up to _TILE queries: a call costs as much as their scores.
    It is the same in every layer, and so kept.
    """
    if length == 0:
        return []
    position = torch.arange(start, start + length)
    limit = torch.full_like(position, visible)
    if block:
        limit = prefix + ((position - prefix).div(block, rounding_mode="floor") + 1) * block
        limit = torch.where(position < prefix, prefix, limit).clamp_(max=visible)
    ends = [*((limit.diff() != 0).nonzero().view(-1) + 1).tolist(), length]
    tiles: list[tuple[int, int, int, Tensor | None]] = []
    low = 0
    for end, following in pairwise([*ends, 0]):
        if 0 < following - low <= _TILE:
            continue  # the next block has room in this tile
        keys = int(limit[end - 1])
        mask = None
        if int(limit[low]) < keys:
            hidden = torch.arange(keys) >= limit[low:end, None]
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        tiles.append((low, end, keys, mask))
        low = end
    return tiles


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention of [n, tokens, heads, head_size] tensors; ``mask`` [tokens, keys] is added to the scores."""
    if key.shape[1] == 0:
        return torch.zeros_like(query)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    grouped = key.shape[2] != query.shape[2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


def _check_heads(query: Tensor, key: Tensor, value: Tensor, query_start_loc: Tensor, out: Tensor | None) -> Tensor:
    """What both variants ask of their tensors; returns the output buffer."""
    device, num_kv_heads = query.device, key.shape[-2]
    if not (device == key.device == value.device == query_start_loc.device):
        refuse_devices(query=query, key=key, value=value, query_start_loc=query_start_loc)
    if (
        query.dim() != 3
        or key.shape != value.shape
        or key.shape[-1] != query.shape[-1]
        or not (query.dtype == key.dtype == value.dtype)
        or not (query.stride(2) == key.stride(-1) == value.stride(-1) == 1)
    ):
        must = "query must be [tokens, num_heads, head_size], and key and value of one shape with the same head_size; "
        must += "all must share a dtype and have a contiguous last dimension"
        refuse(must, {"query": query, "key": key, "value": value}, remedy="pass .contiguous() of one that has not")
    if query.shape[1] % num_kv_heads or (query.shape[2] not in HEAD_SIZES and use_triton(query.device.type)):
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, and head_size one of {HEAD_SIZES} for the Triton kernels, got "
            f"head_size {query.shape[2]}, num_heads {query.shape[1]}, num_kv_heads {num_kv_heads}"
        )
    if query_start_loc.dim() != 1 or query_start_loc.shape[0] == 0 or query_start_loc.dtype != torch.int32:
        refuse("query_start_loc must be int32 [num_reqs + 1]", {"query_start_loc": query_start_loc})
    if out is None:
        return torch.empty(query.shape, dtype=query.dtype, device=device)
    if out.shape != query.shape or out.dtype != query.dtype or out.stride(2) != 1 or out.device != device:
        refuse(f"out must be like the query, {query.dtype} {list(query.shape)}", {"out": out}, {"query": query})
    return out


@dataclass(frozen=True, slots=True)
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


def attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: Windows,
    scale: float,
    out: Tensor,
    tiling: Tiling | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Of paged windows over caches, or of others over the keys and values [tokens, ...] of the requests themselves."""
    tokens, num_heads, head_size = query.shape
    num_reqs, num_kv_heads = windows.query_start_loc.shape[0] - 1, key.shape[-2]
    if tokens == 0 or num_reqs == 0:
        return out
    page_size, max_query_len, max_visible = 0, windows.max_query_len, windows.max_query_len
    query_start_loc, table_strides = windows.query_start_loc.contiguous(), (0, 0)
    paged: tuple[Tensor | None, ...] = (None,) * 5
    if isinstance(windows, PagedWindows):
        page_size, max_visible, table = key.shape[1], windows.max_visible, windows.block_table
        paged = (*contiguous(*(getattr(windows, name) for name in _PER_REQUEST)), table)
        table_strides = (table.stride(0), table.stride(1))
    key_stride, value_stride = ((0, *tensor.stride())[-4:-1] for tensor in (key, value))
    group = num_heads // num_kv_heads
    generation = dispatch.device_generation(query.device)
    on_hopper = tiling is None and hopper_attention is not None
    on_hopper = on_hopper and hopper_attention.fits(query, key, value, max_query_len * group, generation)
    tiling = tiling or choose_tiling(head_size, query.dtype, max_query_len * group, page_size > 0, generation)
    rows = hopper_attention.ROWS if on_hopper else max(tiling.rows, triton.next_power_of_2(group))
    tokens_per_tile = rows // group
    num_tiles = tokens // tokens_per_tile + num_reqs  # at least as many as there are, whatever the lengths
    if num_splits is None:
        tiles_at_most = min(num_tiles, num_reqs * triton.cdiv(max_query_len, tokens_per_tile))
        slots = dispatch.num_multiprocessors(query.device) * (1 if on_hopper else 2)
        num_splits = choose_splits(tiles_at_most * num_kv_heads, max_visible, slots)
    partial = lse = None
    if num_splits > 1:
        partial = query.new_empty((num_splits, tokens, num_heads, head_size), dtype=torch.float32)
        lse = query.new_empty((num_splits, tokens, num_heads), dtype=torch.float32)
    grid = (num_tiles, num_kv_heads, num_splits)
    if on_hopper:
        hopper_attention.launch(
            grid, query, key, value, query_start_loc, (*paged, *table_strides), scale, out, (partial, lse)
        )
    else:
        block_d = triton.next_power_of_2(head_size)
        descriptors = generation >= 9 and page_size == 0 and all(_describable(tensor) for tensor in (key, value))
        if descriptors:
            key, value = (_describe(tensor, [tiling.keys, block_d]) for tensor in (key, value))
        attention_kernel[grid](
            query, key, value, out, partial, lse, query_start_loc, *paged,
            scale * 1.4426950408889634, num_reqs, tokens,
            *query.stride()[:2], *key_stride, *value_stride, *out.stride()[:2], *table_strides,
            PAGE_SIZE=page_size, GROUP=group, HEAD_SIZE=head_size, ROWS=rows, KEYS=tiling.keys, BLOCK_D=block_d,
            SPLITS=num_splits, DESCRIPTORS=descriptors, num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        )  # fmt: skip
    if num_splits > 1:
        combine_kernel[(tokens, num_heads)](
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
