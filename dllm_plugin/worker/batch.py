"""One step's ragged batch: which tokens are forwarded, and which rows of logits are asked for."""

from dataclasses import dataclass

import numpy as np
import torch

from dllm_plugin.attention import WindowBatch
from dllm_plugin.scheduler.window import Window
from dllm_plugin.worker.canvas import CanvasStore


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Windows of a step laid end to end, guided requests' unconditional copies after all others.

    Rows are the masked positions of the active blocks, ordered by request and position; only they get logits.
    """

    # on the host
    request_ids: list[str]
    windows: list[Window]
    window_batch: WindowBatch
    # tokens, on the device
    input_ids: torch.Tensor  # [tokens] int32
    positions: torch.Tensor  # [tokens] int64
    # rows, on the device
    row_request: torch.Tensor  # [rows] int64, index into the requests
    row_position: torch.Tensor  # [rows] int64, in the sequence
    row_token: torch.Tensor  # [rows] int64, where the row's logits are in the tokens
    guided_rows: torch.Tensor | None  # rows that also need unconditional logits
    guided_token: torch.Tensor | None  # where those are
    row_start_loc: torch.Tensor  # [requests + 1] int32
    # requests, on the device
    slots: torch.Tensor  # [requests] int64
    step: torch.Tensor  # [requests] int64
    final_prefix: torch.Tensor  # [requests] int32
    quota: torch.Tensor  # [requests] int32
    threshold: torch.Tensor | None  # [requests] float32; None where no request has one
    # on the host: how far a final prefix can have grown after the step
    max_emitted: int


def build_batch(windows: dict[str, Window], store: CanvasStore, shift: int) -> StepBatch:
    """The batch of a step's windows. ``shift``: 1 where the logits at i predict token i + 1, else 0."""
    request_ids, steps = list(windows), list(windows.values())
    num_requests = len(steps)
    guided = [i for i, request_id in enumerate(request_ids) if store.canvases[request_id].params.cfg_scale > 0]
    copies = [*range(num_requests), *guided]

    slot = np.array([store.slot_of[request_id] for request_id in request_ids])
    final_prefix = np.array([store.final_prefix[request_id] for request_id in request_ids])
    start = np.array([steps[i].start for i in copies])
    length = np.array([steps[i].end for i in copies]) - start
    query_start_loc = _start_loc(length)
    token_position = _ranges(start, length, query_start_loc)
    token_slot = np.repeat(slot[copies], length)

    block_start = np.array([window.block_start for window in steps])
    block_length = np.array([window.block_end for window in steps]) - block_start
    block_loc = _start_loc(block_length)
    # a window that begins after position 0 begins one position early for a shifted family
    first_token = query_start_loc[:num_requests] + block_start - start[:num_requests] - shift
    block_token = _ranges(first_token, block_length, block_loc)
    block_position = _ranges(block_start, block_length, block_loc)
    num_rows = np.array([window.num_masked for window in steps])
    row_loc = _start_loc(num_rows)

    stride = store.tokens.shape[1]
    (
        token_index,
        positions,
        block_index,
        block_token,
        block_position,
        block_request,
        slots,
        step,
        final_prefix_t,
        quota,
        row_start_loc,
        qsl,
    ) = _to_device(
        store.device,
        token_slot * stride + token_position,
        token_position,
        np.repeat(slot, block_length) * stride + block_position,
        block_token,
        block_position,
        np.repeat(np.arange(num_requests), block_length),
        slot,
        np.array([window.step for window in steps]),
        final_prefix,
        np.array([window.quota for window in steps]),
        row_loc,
        query_start_loc,
    )
    input_ids = store.tokens.view(-1)[token_index]
    row = torch.nonzero_static(store.masked.view(-1)[block_index], size=int(row_loc[-1])).squeeze(1)
    row_token = block_token[row]

    guided_rows = guided_token = None
    if guided:
        # the unconditional copy sees masks where the conditional one sees what came before the canvas
        canvas_start = [len(store.canvases[request_ids[i]].token_ids) for i in guided]
        first = int(query_start_loc[num_requests])
        hidden = token_position[first:] < np.repeat(canvas_start, length[num_requests:])
        rows = np.concatenate([np.arange(row_loc[i], row_loc[i + 1]) for i in guided])
        distance = np.repeat(query_start_loc[num_requests:-1] - query_start_loc[guided], num_rows[guided])
        hidden_t, guided_rows, distance_t = _to_device(store.device, hidden, rows, distance)
        input_ids[first:].masked_fill_(hidden_t.bool(), store.mask_token_id)
        guided_token = row_token[guided_rows] + distance_t

    threshold = None
    if any(window.threshold != np.inf for window in steps):
        threshold = torch.tensor([window.threshold for window in steps], dtype=torch.float32, device=store.device)
    return StepBatch(
        request_ids=request_ids,
        windows=steps,
        window_batch=WindowBatch(
            query_start_loc=qsl.int(),
            query_start_loc_cpu=query_start_loc.tolist(),
            max_query_len=int(length.max()),
        ),
        input_ids=input_ids,
        positions=positions,
        row_request=block_request[row],
        row_position=block_position[row],
        row_token=row_token,
        guided_rows=guided_rows,
        guided_token=guided_token,
        row_start_loc=row_start_loc.int(),
        slots=slots,
        step=step,
        final_prefix=final_prefix_t.int(),
        quota=quota.int(),
        threshold=threshold,
        max_emitted=int((block_start + block_length - final_prefix).max()),
    )


def _start_loc(length: np.ndarray) -> np.ndarray:
    loc = np.zeros(len(length) + 1, dtype=np.int64)
    np.cumsum(length, out=loc[1:])
    return loc


def _ranges(start: np.ndarray, length: np.ndarray, loc: np.ndarray) -> np.ndarray:
    """``start[i], start[i] + 1, ...``, ``length[i]`` of them, for every i in turn; ``loc`` is `_start_loc` of length."""
    return np.repeat(start - loc[:-1], length) + np.arange(loc[-1])


def _to_device(device: torch.device, *arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
    """All arrays as int64 tensors on the device, in one copy."""
    packed = torch.from_numpy(np.concatenate(arrays, dtype=np.int64, casting="unsafe"))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return packed.split([len(array) for array in arrays])
