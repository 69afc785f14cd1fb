"""Which request a tile is of and which keys a query sees, as both attention kernels ask."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from dllm_plugin.kernels.tiles import find_request, key_limit


@triton.jit
def _tiles_kernel(query_start_loc_ptr, out_ptr, num_reqs, TOKENS: tl.constexpr):
    tile = tl.program_id(0)
    request, begin, end, first_token = find_request(tile, query_start_loc_ptr, num_reqs, TOKENS)
    tl.store(out_ptr + tile * 4, request)
    tl.store(out_ptr + tile * 4 + 1, begin)
    tl.store(out_ptr + tile * 4 + 2, end)
    tl.store(out_ptr + tile * 4 + 3, first_token)


@triton.jit
def _limits_kernel(position_ptr, out_ptr, visible, prefix, block, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out_ptr + index, key_limit(tl.load(position_ptr + index), visible, prefix, block))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.sampled_from([1, 9, 16, 128]))
def test_the_tiles_cover_every_token_once(lengths, tokens_per_tile):
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)
    num_tiles = int(starts[-1]) // tokens_per_tile + len(lengths)
    out = torch.zeros(num_tiles, 4, dtype=torch.int32)
    _tiles_kernel[(num_tiles,)](starts, out, len(lengths), tokens_per_tile)
    covered = []
    for request, begin, end, first in out.tolist():
        assert (begin, end) == (starts[request], starts[request + 1])
        covered += [(request, token) for token in range(first, min(first + tokens_per_tile, end))]
    assert covered == [(r, t) for r in range(len(lengths)) for t in range(int(starts[r]), int(starts[r + 1]))]


@pytest.mark.parametrize(("visible", "prefix", "block", "limits"), [
    (6, 0, 0, [6] * 8),
    (8, 2, 3, [2, 2, 5, 5, 5, 8, 8, 8]),
    (7, 2, 3, [2, 2, 5, 5, 5, 7, 7, 7]),  # the last block ends beyond what there is
    (8, 0, 1, [1, 2, 3, 4, 5, 6, 7, 8]),
    (0, 2, 3, [0] * 8),
])  # fmt: skip
def test_limits(visible, prefix, block, limits):
    out = torch.zeros(8, dtype=torch.int32)
    _limits_kernel[(1,)](torch.arange(8, dtype=torch.int32), out, visible, prefix, block, 8)
    assert out.tolist() == limits == sorted(limits)
