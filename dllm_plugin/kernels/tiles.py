"""Device functions that both attention kernels are made of: which request a tile belongs to, and which keys a query sees."""

from dllm_plugin.kernels.dispatch import tl, triton


@triton.jit
def find_request(tile, query_start_loc_ptr, num_reqs, TOKENS: tl.constexpr):
    """The request of a tile of TOKENS tokens, the bounds of its tokens, and the tile's first.

    Request r owns tiles from query_start_loc[r] // TOKENS + r: the last request that starts at or before this one. That
    bounds their number without reading the lengths; a tile whose first token is not below the end is of no request.
    """
    request = tile * 0
    beyond = request + num_reqs
    while beyond - request > 1:
        middle = (request + beyond) // 2
        if tl.load(query_start_loc_ptr + middle) // TOKENS + middle <= tile:
            request = middle
        else:
            beyond = middle
    begin = tl.load(query_start_loc_ptr + request)
    end = tl.load(query_start_loc_ptr + request + 1)
    return request, begin, end, begin + (tile - (begin // TOKENS + request)) * TOKENS


@triton.jit
def key_limit(position, visible, prefix, block):
    """The end of the keys that a query at `position` sees; it never falls with the position."""
    size = tl.maximum(block, 1)
    limit = tl.where(position < prefix, prefix, prefix + ((position - prefix) // size + 1) * size)
    return tl.where(block == 0, visible, tl.minimum(limit, visible))
