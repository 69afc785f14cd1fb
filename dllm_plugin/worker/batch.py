"""One step's ragged batch: which tokens are forwarded, and which rows of logits are asked for."""

from dataclasses import dataclass

import numpy as np
import torch

from dllm_plugin.attention import WindowBatch
from dllm_plugin.scheduler.window import Window
from dllm_plugin.worker.canvas import CanvasStore


@dataclass(frozen=True, slots=True)
class Guidance:
    """The unconditional copies of guided requests' windows, which come after all conditional ones."""

    first_token: int
    hidden: torch.Tensor  # [tokens from first_token on] bool: what the copy sees as masks, all before its canvas
    distance: torch.Tensor  # [requests] int64: tokens from a window to its copy; 0 without guidance
    guided: torch.Tensor  # [requests] bool


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of a step lies, windows end to end. It stays the same until a request joins, leaves or moves on.

    Indices are int64 tensors on the device. *Places* are the positions of the active blocks, masked or not, ordered by
    request and position.
    """

    key: tuple[object, ...]
    windows: WindowBatch
    slots: torch.Tensor  # [requests]
    token_index: torch.Tensor  # [tokens], into the flattened store
    positions: torch.Tensor  # [tokens], in the sequence
    place_index: torch.Tensor  # [places], into the flattened store
    place_position: torch.Tensor  # [places], in the sequence
    place_token: torch.Tensor  # [places], the token whose logits predict the place
    place_request: torch.Tensor  # [places]
    guidance: Guidance | None


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A layout with what changes from step to step. Rows are the places still masked; only they get logits."""

    # on the host
    request_ids: list[str]
    max_emitted: int  # no final prefix can have grown by more
    # on the device
    layout: Layout
    input_ids: torch.Tensor  # [tokens] int32
    row_place: torch.Tensor  # [rows] int64
    row_token: torch.Tensor  # [rows] int64
    row_position: torch.Tensor  # [rows] int64
    row_request: torch.Tensor  # [rows] int64
    row_start_loc: torch.Tensor  # [requests + 1] int32
    step: torch.Tensor  # [requests] int64
    final_prefix: torch.Tensor  # [requests] int32
    quota: torch.Tensor  # [requests] int32
    threshold: torch.Tensor | None  # [requests] float32; None where no request has one

    @property
    def slots(self) -> torch.Tensor:
        return self.layout.slots


class BatchBuilder:
    """Builds the batch of each step over a store, keeping the layout of the last one.

    ``shift``: 1 where the logits at i predict token i + 1, else 0.
    """

    def __init__(self, store: CanvasStore, shift: int) -> None:
        self.store = store
        self.shift = shift
        self._layout: Layout | None = None

    def build(self, windows: dict[str, Window]) -> StepBatch:
        store, layout = self.store, self._lay_out(windows)
        num_requests = len(windows)
        numbers = np.zeros((4, num_requests + 1), dtype=np.int64)
        for i, (request_id, window) in enumerate(windows.items()):
            numbers[:, i] = window.num_masked, window.step, store.final_prefix[request_id], window.quota
        num_masked = numbers[0, :num_requests]
        num_rows = int(num_masked.sum())
        numbers[0, 1:] = np.cumsum(num_masked)
        numbers[0, 0] = 0
        row_start_loc, step, final_prefix, quota = to_device(numbers, store.device)

        input_ids = store.tokens.view(-1)[layout.token_index]
        if (guidance := layout.guidance) is not None:
            input_ids[guidance.first_token :].masked_fill_(guidance.hidden, store.mask_token_id)
        masked = store.masked.view(-1)[layout.place_index]
        row_place = torch.nonzero_static(masked, size=num_rows).squeeze(1)
        threshold = None
        if any(window.threshold != np.inf for window in windows.values()):
            threshold = torch.tensor(
                [window.threshold for window in windows.values()], dtype=torch.float32, device=store.device
            )
        return StepBatch(
            request_ids=list(windows),
            max_emitted=max(window.block_end - store.final_prefix[i] for i, window in windows.items()),
            layout=layout,
            input_ids=input_ids,
            row_place=row_place,
            row_token=layout.place_token[row_place],
            row_position=layout.place_position[row_place],
            row_request=layout.place_request[row_place],
            row_start_loc=row_start_loc.int(),
            step=step[:num_requests],
            final_prefix=final_prefix[:num_requests].int(),
            quota=quota[:num_requests].int(),
            threshold=threshold,
        )

    def _lay_out(self, windows: dict[str, Window]) -> Layout:
        store = self.store
        key = (
            store.tokens.shape[1],
            *(
                (store.slot_of[i], store.guided_from.get(i), w.start, w.end, w.block_start, w.block_end)
                for i, w in windows.items()
            ),
        )
        if self._layout is None or self._layout.key != key:
            self._layout = self._new_layout(key, windows)
        return self._layout

    def _new_layout(self, key: tuple[object, ...], windows: dict[str, Window]) -> Layout:
        store, steps, num_requests = self.store, list(windows.values()), len(windows)
        guided = [i for i, request_id in enumerate(windows) if request_id in store.guided_from]
        copies = [*range(num_requests), *guided]
        stride = store.tokens.shape[1]

        slot = np.array([store.slot_of[request_id] for request_id in windows])
        start = np.array([steps[i].start for i in copies])
        length = np.array([steps[i].end for i in copies]) - start
        loc = start_loc(length)
        position = ranges(start, length)
        block_start = np.array([window.block_start for window in steps])
        block_length = np.array([window.block_end for window in steps]) - block_start
        place_position = ranges(block_start, block_length)
        place_request = np.repeat(np.arange(num_requests), block_length)
        first_token = loc[:num_requests] + block_start - start[:num_requests] - self.shift

        guidance = None
        if guided:
            first = int(loc[num_requests])
            canvas_start = [store.guided_from[request_id] for request_id in windows if request_id in store.guided_from]
            distance = np.zeros(num_requests, dtype=np.int64)
            distance[guided] = loc[num_requests:-1] - loc[guided]
            guidance = Guidance(
                first_token=first,
                hidden=to_device(position[first:] < np.repeat(canvas_start, length[num_requests:]), store.device),
                distance=to_device(distance, store.device),
                guided=to_device(distance > 0, store.device),
            )
        return Layout(
            key=key,
            windows=WindowBatch(
                query_start_loc=to_device(loc.astype(np.int32), store.device),
                query_start_loc_cpu=loc.tolist(),
                max_query_len=int(length.max()),
            ),
            slots=to_device(slot, store.device),
            token_index=to_device(np.repeat(slot[copies] * stride, length) + position, store.device),
            positions=to_device(position, store.device),
            place_index=to_device(slot[place_request] * stride + place_position, store.device),
            place_position=to_device(place_position, store.device),
            place_token=to_device(ranges(first_token, block_length), store.device),
            place_request=to_device(place_request, store.device),
            guidance=guidance,
        )


def start_loc(length: np.ndarray) -> np.ndarray:
    """``[0, length[0], length[0] + length[1], ...]``."""
    loc = np.zeros(len(length) + 1, dtype=np.int64)
    np.cumsum(length, out=loc[1:])
    return loc


def ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``start[i], start[i] + 1, ...``, ``length[i]`` of them, for every i in turn."""
    return np.repeat(start - start_loc(length)[:-1], length) + np.arange(length.sum())


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
