"""The log-probabilities of given text: copies of it laid end to end, some positions masked, whose keys and values are not kept.

Under full attention a copy holds all that it sees. Under block-causal attention it is one block, and the text before it stands
in the request's pages: those that a step reads are copied, and each block writes to pages of its own behind them. So all
blocks of a text are forwarded at once, none of which sees what another has masked.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from dllm_plugin.attention import COPIED_PAGE, WindowBatch
from dllm_plugin.kernels.window_attention import Windows
from dllm_plugin.scheduler.likelihood import ScoredWindow
from dllm_plugin.worker.batch import paged_windows, ranges, start_loc, to_device
from dllm_plugin.worker.canvas import CanvasStore


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """Copies of requests' texts. Rows are their scored positions; all tensors are int64 on the device."""

    request_ids: list[str]
    num_rows: list[int]  # of each request
    token_request: np.ndarray  # [tokens] on the host, and so is the next one
    row_request: np.ndarray  # [rows]
    windows: WindowBatch
    input_ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    row_token: torch.Tensor  # [rows]: the token whose logits predict it
    target: torch.Tensor  # [rows]: the text's own token


def lay_out(
    scored: Mapping[str, list[ScoredWindow]],
    store: CanvasStore,
    shift: int,
    pages: Mapping[str, list[int]] | None,
    page_size: int,
) -> ScoredBatch:
    """The batch of these copies. ``pages``: those of each request, where the text before a copy stands in them."""
    device, stride = store.device, store.tokens.shape[1]
    windows = [window for copies in scored.values() for window in copies]
    request = np.repeat(np.arange(len(scored)), [len(copies) for copies in scored.values()])
    base = np.array([store.requests[request_id].slot for request_id in scored])[request] * stride
    start = np.array([window.start for window in windows])
    length = np.array([window.end for window in windows]) - start
    num_masked = np.array([len(window.masked) for window in windows])
    num_scored = np.array([len(window.scored) for window in windows])
    loc, position = start_loc(length), ranges(start, length)
    masked = np.array([at for window in windows for at in window.masked], np.int64)
    at_row = np.array([at for window in windows for at in window.scored], np.int64)
    token_index, positions, masked_token, row_token, target = to_device(
        device,
        np.repeat(base, length) + position,
        position,
        np.repeat(loc[:-1] - start, num_masked) + masked,
        np.repeat(loc[:-1] - start, num_scored) + at_row - shift,
        np.repeat(base, num_scored) + at_row,
    )
    tokens = store.tokens.view(-1)
    row_request = np.repeat(request, num_scored)
    return ScoredBatch(
        request_ids=list(scored),
        num_rows=np.bincount(row_request, minlength=len(scored)).tolist(),
        token_request=np.repeat(request, length),
        row_request=row_request,
        windows=_whole_texts(loc, device) if pages is None else _blocks(scored, pages, page_size, device),
        input_ids=tokens[token_index].index_fill_(0, masked_token, store.mask_token_id),
        positions=positions,
        row_token=row_token,
        target=tokens[target],
    )


def _whole_texts(loc: np.ndarray, device: torch.device) -> WindowBatch:
    (query_start_loc,) = to_device(device, loc, dtype=torch.int32)
    full = Windows(
        query_start_loc=query_start_loc, query_start_loc_cpu=loc.tolist(), max_query_len=int(np.diff(loc).max())
    )
    return WindowBatch(int(loc[-1]), full)


def _blocks(
    scored: Mapping[str, list[ScoredWindow]],
    pages: Mapping[str, list[int]],
    page_size: int,
    device: torch.device,
) -> WindowBatch:
    """Each block over copies of the pages before it, and over pages of its own, of ``COPIED_PAGE`` positions each."""
    parts, tables, slots = [], [], []  # ``parts``: what is copied, numbered through all pages of the cache
    num_copied = 0
    for request_id, windows in scored.items():
        longest = max(window.end for window in windows)
        of_text = np.arange(-(-longest // COPIED_PAGE)) * COPIED_PAGE  # a position in each part
        of_text = (np.array(pages[request_id])[of_text // page_size] * page_size + of_text % page_size) // COPIED_PAGE
        before = num_copied + np.arange(max(window.start for window in windows) // COPIED_PAGE)
        parts.append(of_text[: len(before)])
        num_copied += len(before)
        for window in windows:
            first, last = window.start // COPIED_PAGE, -(-window.end // COPIED_PAGE)
            own = num_copied + np.arange(last - first)
            parts.append(of_text[first:last])
            num_copied += len(own)
            tables.append(np.concatenate([before[:first], own]))
            slots.append(own[0] * COPIED_PAGE + np.arange(window.start, window.end) - first * COPIED_PAGE)
    copies = [window for windows in scored.values() for window in windows]
    slot_mapping, copied = to_device(device, np.concatenate(slots), np.concatenate(parts))
    paged = paged_windows(device, copies, tables, COPIED_PAGE)
    return WindowBatch(0, None, paged, slot_mapping=slot_mapping, copied=copied)
