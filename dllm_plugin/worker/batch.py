"""One step's ragged batch: which tokens are forwarded, and which rows of logits are asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from dllm_plugin.attention import WindowBatch
from dllm_plugin.kernels.unmask import Segments
from dllm_plugin.kernels.window_attention import PagedWindows, Windows
from dllm_plugin.policies import POLICIES
from dllm_plugin.scheduler.likelihood import ScoredWindow
from dllm_plugin.scheduler.output import NewCanvas
from dllm_plugin.scheduler.window import Window
from dllm_plugin.worker.canvas import CanvasStore, Request, power_of_two
from dllm_plugin.worker.ranking import RANKED_BY

_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}


# what of a block goes to the device as float32, and its value where it is off
BLOCK_FLOATS = {"threshold": np.inf, "factor": 0.0, "entropy_bound": 0.0, "edit_threshold": np.inf}


@dataclass(frozen=True, slots=True)
class Needs:
    """What the requests of a step ask of the choice between them; what none asks for is not computed."""

    rankings: tuple[str, ...]
    sampling: bool
    filters: bool
    suppression: bool
    random_order: bool
    block_floats: tuple[str, ...]  # fields of `ActiveBlock` that some block has set
    pipelined: bool
    controls: frozenset[str]  # `Controls.kinds` of some request
    num_logprobs: int  # the most that a request asks to be told with a token; -1: nothing is told of tokens
    logprob_ids: bool
    trajectories: bool
    adapters: bool
    grammar: bool

    @classmethod
    def of(cls, canvases: list[NewCanvas], windows: list[Window]) -> "Needs":
        return cls(
            rankings=tuple({POLICIES[canvas.params.remasking].ranking: None for canvas in canvases}),
            sampling=any(canvas.temperature > 0 for canvas in canvases),
            filters=any(canvas.top_k > 0 or canvas.top_p < 1 or canvas.min_p > 0 for canvas in canvases),
            suppression=any(canvas.params.eos_suppression != "none" for canvas in canvases),
            random_order=any(canvas.params.alg_temp > 0 for canvas in canvases),
            block_floats=tuple(
                name
                for name, default in BLOCK_FLOATS.items()
                if any(getattr(block, name) != default for window in windows for block in window.blocks)
            ),
            pipelined=any(window.pipelined for window in windows),
            controls=frozenset().union(*(canvas.controls.kinds for canvas in canvases)),
            num_logprobs=max((canvas.num_logprobs for canvas in canvases), default=-1),
            logprob_ids=any(canvas.logprob_ids for canvas in canvases),
            trajectories=any(canvas.params.trajectory for canvas in canvases),
            adapters=any(canvas.lora_request for canvas in canvases),
            grammar=any(canvas.has_grammar for canvas in canvases),
        )

    @property
    def noise(self) -> bool:
        return self.sampling or any(RANKED_BY[name].draws for name in self.rankings)

    @property
    def statistics(self) -> set[str]:
        """Fields of `Confidence` that a ranking reads."""
        return {statistic for name in self.rankings if (statistic := RANKED_BY[name].statistic) is not None}

    @property
    def records(self) -> bool:
        """Whether something is told of each token that is written (worker/records.py)."""
        return self.num_logprobs >= 0 or self.trajectories or self.grammar

    @property
    def edits(self) -> bool:
        return "edit_threshold" in self.block_floats

    @property
    def per_row(self) -> bool:
        """False where all rows are chosen and ranked alike."""
        return (
            self.noise or self.filters or self.suppression or self.logprob_ids or self.grammar or len(self.rankings) > 1
        )


@dataclass(frozen=True, slots=True)
class Guidance:
    """The unconditional copies of guided requests' windows, which come before all other tokens."""

    num_tokens: int
    hidden: torch.Tensor  # [num_tokens] bool: what a copy sees as masks, all before its canvas
    distance: torch.Tensor  # [requests] int64: tokens from a window back to its copy
    guided: torch.Tensor  # [requests] bool


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of a step lies, windows end to end. It stays the same until a request joins, leaves or moves on.

    Requests are ordered so that full windows come before paged ones, and windows that keep nothing before those whose
    keys and values are stored. Indices are int64 tensors on the device. *Places* are the positions of the active
    blocks, masked or not, ordered by request, block and position.
    """

    key: tuple[object, ...]
    request_ids: list[str]
    window_request: np.ndarray  # [windows] on the host, index into the requests; copies first
    window_length: np.ndarray  # [windows] on the host
    windows: WindowBatch
    slots: torch.Tensor  # [requests]
    offsets: torch.Tensor  # [n] 0, 1, ...: no step brings a request more than n tokens
    token_index: torch.Tensor  # [tokens], into the flattened store
    positions: torch.Tensor  # [tokens], in the sequence
    # [5, places]: index in the flattened store, the token whose logits predict it, position in the sequence, request, block
    places: torch.Tensor
    block_request: torch.Tensor  # [blocks]
    place_start_loc: torch.Tensor  # [blocks + 1] int32, places of a block
    request_start_loc: torch.Tensor | None  # [requests + 1] int32, blocks of a request; None: one each
    reach: torch.Tensor  # 0, 1, ... over all positions of the canvases and before them, where penalties count tokens
    guidance: Guidance | None
    needs: Needs

    @property
    def place_index(self) -> torch.Tensor:
        return self.places[0]

    @property
    def place_request(self) -> torch.Tensor:
        return self.places[3]

    @property
    def place_block(self) -> torch.Tensor:
        return self.places[4]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A layout with what changes from step to step. Rows are the places that get logits: those still masked, or all."""

    layout: Layout
    windows: list[Window]  # of each request
    emitted_before: list[int]  # of each request, as the host knew it
    max_emitted: int  # more tokens of a request cannot have come since
    # on the device
    row_token: torch.Tensor  # [rows] int64
    row_position: torch.Tensor  # [rows] int64
    row_request: torch.Tensor  # [rows] int64
    # int32, the next two end to end, the segments' quotas, the holes, and the row starts where they change
    numbers: torch.Tensor
    timestep: torch.Tensor  # [requests]
    first_open: torch.Tensor  # [requests], index in the flattened store of the first position that is not emitted
    floats: torch.Tensor  # float32 [needs.block_floats, blocks]
    segments: Segments  # the blocks and their rows, without what orders them at random
    edit_threshold: torch.Tensor | None  # [blocks] float32
    hole: torch.Tensor  # [requests], index in the flattened store of the position that `grammar` is about, -1 for none
    grammar: torch.Tensor | None  # [requests, words] int32, a bit for each token that may stand there

    def split(self, most: int) -> Iterator["StepBatch"]:
        """Batches of at most so many of the rows each; this one where it has no more."""
        if len(self.row_token) <= most:
            yield self
            return
        names = ("row_token", "row_position", "row_request")
        for rows in zip(*(getattr(self, name).split(most) for name in names), strict=True):
            yield replace(self, **dict(zip(names, rows, strict=True)))

    @property
    def request_ids(self) -> list[str]:
        return self.layout.request_ids

    @property
    def slots(self) -> torch.Tensor:
        return self.layout.slots


class BatchBuilder:
    """Builds the batch of each step over a store, keeping the layout of the last one.

    ``shift``: 1 where the logits at i predict token i + 1, else 0. ``pages``: request id to the pages that hold its
    keys and values, of ``page_size`` positions each.
    """

    def __init__(self, store: CanvasStore, shift: int) -> None:
        self.store = store
        self.shift = shift
        self.pages: dict[str, list[int]] = {}
        self.page_size = 0
        self.num_words = 0  # int32 with a bit for each column of the logits
        self._layout: Layout | None = None

    def lay_out(self, windows: dict[str, Window]) -> Layout:
        """The layout of the windows, which is the last one where nothing but numbers of masks has changed."""
        store = self.store
        key = (
            store.tokens.shape[1],
            *(
                (store.requests[i].serial, w.start, w.end, w.visible, *[b[:2] for b in w.blocks])
                for i, w in windows.items()
            ),
        )
        if self._layout is None or self._layout.key != key:
            self._layout = self._new_layout(key, windows)
        return self._layout

    def build(self, windows: dict[str, Window], layout: Layout, every_place: bool = False) -> StepBatch:
        """The batch of a step. Rows are the masked places, or every place where a graph or an edit asks for them."""
        store, every_place = self.store, every_place or layout.needs.edits
        requests = [store.requests[request_id] for request_id in layout.request_ids]
        steps = [windows[request_id] for request_id in layout.request_ids]
        blocks = [block for window in steps for block in window.blocks]
        row_loc = [] if every_place else [*accumulate([block.num_masked for block in blocks], initial=0)]
        stride = store.tokens.shape[1]
        lists = (
            [window.timestep for window in steps],
            [request.slot * stride + request.emitted for request in requests],
            [block.quota for block in blocks],
            [request.slot * stride + request.hole if request.grammar is not None else -1 for request in requests],
            row_loc,
        )
        numbers = pack(store.device, *lists, dtype=torch.int32)
        timestep, first_open, quota, hole, row_start_loc = numbers.split_with_sizes([len(part) for part in lists])
        if every_place:
            rows, row_start_loc = layout.places, layout.place_start_loc
        else:
            # index_select: indexing with a tensor costs three times as much for the few numbers of a small step
            masked = store.masked.view(-1).index_select(0, layout.place_index)
            row_place = torch.nonzero_static(masked, size=row_loc[-1]).view(-1)
            rows = layout.places.index_select(1, row_place)
        row_cell, row_token, row_position, row_request, _ = rows.unbind()
        names = layout.needs.block_floats
        floats = pack(store.device, [getattr(block, name) for name in names for block in blocks], dtype=torch.float32)
        of_block = dict(zip(names, floats.view(len(names), len(blocks)), strict=True))
        return StepBatch(
            layout=layout,
            windows=steps,
            emitted_before=[request.emitted for request in requests],
            max_emitted=len(layout.offsets) if every_place else max_growth(requests, steps),
            row_token=row_token,
            row_position=row_position,
            row_request=row_request,
            numbers=numbers,
            timestep=timestep,
            first_open=first_open,
            floats=floats,
            segments=Segments(
                slot=layout.slots,
                request_start_loc=layout.request_start_loc,
                segment_start_loc=row_start_loc,
                row_cell=row_cell,
                quota=quota,
                threshold=of_block.get("threshold"),
                factor=of_block.get("factor"),
                entropy_bound=of_block.get("entropy_bound"),
                skip_unmasked=every_place,
            ),
            edit_threshold=of_block.get("edit_threshold"),
            hole=hole,
            grammar=self._grammar_words(requests) if layout.needs.grammar else None,
        )

    def _grammar_words(self, requests: list[Request]) -> torch.Tensor:
        words = np.full((len(requests), self.num_words), -1, np.int32)
        for row, request in zip(words, requests, strict=True):
            if request.grammar is not None:
                row[:] = 0
                row[: len(request.grammar)] = request.grammar[: self.num_words]
        return pack(self.store.device, words.ravel(), dtype=torch.int32).view(words.shape)

    def input_ids(self, layout: Layout) -> torch.Tensor:
        """``[tokens]`` int64, as the canvases are now."""
        input_ids = self.store.tokens.view(-1).index_select(0, layout.token_index)
        if (guidance := layout.guidance) is not None:
            input_ids[: guidance.num_tokens].masked_fill_(guidance.hidden, self.store.mask_token_id)
        return input_ids

    def _new_layout(self, key: tuple[object, ...], windows: dict[str, Window]) -> Layout:
        store, device, stride = self.store, self.store.device, self.store.tokens.shape[1]
        # full before paged, and within the full ones what is stored last
        request_ids = sorted(windows, key=lambda i: (not windows[i].covers_all, windows[i].caches))
        requests = [store.requests[request_id] for request_id in request_ids]
        steps = [windows[request_id] for request_id in request_ids]
        num_requests = len(requests)
        guided = [i for i, request in enumerate(requests) if request.canvas.params.cfg_scale > 0]

        # tokens: unconditional copies, then every request's window
        of = np.array([*guided, *range(num_requests)])
        slot = np.array([request.slot for request in requests])
        start = np.array([window.start for window in steps])[of]
        length = np.array([window.end for window in steps])[of] - start
        loc = start_loc(length)
        position = ranges(start, length)
        window_loc = loc[len(guided) :]

        # places: positions of active blocks
        blocks = [(i, block) for i, window in enumerate(steps) for block in window.blocks]
        block_request = np.array([i for i, _ in blocks], dtype=np.int64)
        block_start = np.array([block.start for _, block in blocks], dtype=np.int64)
        block_length = np.array([block.end for _, block in blocks], dtype=np.int64) - block_start
        place_block = np.repeat(np.arange(len(blocks)), block_length)
        place_request = block_request[place_block]
        place_position = ranges(block_start, block_length)
        first_token = window_loc[block_request] + block_start - start[len(guided) :][block_request] - self.shift

        guidance = None
        if guided:
            num_copied = int(loc[len(guided)])
            canvas_start = [len(requests[i].canvas.token_ids) for i in guided]
            distance = np.zeros(num_requests, dtype=np.int64)
            distance[guided] = window_loc[guided] - loc[: len(guided)]
            hidden, distances = to_device(
                device, position[:num_copied] < np.repeat(canvas_start, length[: len(guided)]), distance
            )
            guidance = Guidance(
                num_tokens=num_copied,
                hidden=hidden.bool(),
                distance=distances,
                guided=distances > 0,
            )
        one_block_each = all(len(window.blocks) == 1 for window in steps)
        place_index = slot[place_request] * stride + place_position
        needs = Needs.of([request.canvas for request in requests], steps)
        reach = max(request.canvas_end for request in requests) if "penalties" in needs.controls else 0
        token_index, positions, places, slots, block_requests, offsets, reaches = to_device(
            device,
            np.repeat(slot[of] * stride, length) + position,
            position,
            np.concatenate(
                [place_index, ranges(first_token, block_length), place_position, place_request, place_block]
            ),
            slot,
            block_request,
            np.arange(power_of_two(max_growth(requests, steps))),
            np.arange(power_of_two(reach)),
        )
        request_loc, place_loc = to_device(
            device, start_loc([len(window.blocks) for window in steps]), start_loc(block_length), dtype=torch.int32
        )
        return Layout(
            key=key,
            request_ids=request_ids,
            window_request=of,
            window_length=length,
            windows=self._window_batch(request_ids, steps, loc, len(guided)),
            slots=slots,
            offsets=offsets,
            token_index=token_index,
            positions=positions,
            places=places.view(5, -1),
            block_request=block_requests,
            place_start_loc=place_loc,
            request_start_loc=None if one_block_each else request_loc,
            reach=reaches,
            guidance=guidance,
            needs=needs,
        )

    def _window_batch(
        self, request_ids: list[str], steps: list[Window], loc: np.ndarray, num_copies: int
    ) -> WindowBatch:
        """Attention's view of the windows; ``loc`` are their token offsets, ``num_copies`` unconditional ones first."""
        device = self.store.device
        num_full = num_copies + sum(window.covers_all for window in steps)
        num_unstored = num_copies + sum(not window.caches for window in steps)
        full = paged = slot_mapping = None
        if num_full:
            (full_loc,) = to_device(device, loc[: num_full + 1], dtype=torch.int32)
            full = Windows(
                query_start_loc=full_loc,
                query_start_loc_cpu=loc[: num_full + 1].tolist(),
                max_query_len=int(np.diff(loc[: num_full + 1]).max()),
            )
        if num_unstored < num_copies + len(steps):
            tables = [np.array(self.pages[request_id]) for request_id in request_ids[num_unstored - num_copies :]]
            spans = [(window.start, window.end) for window in steps[num_unstored - num_copies :]]
            page_slots = [self._page_slots(table, *span) for table, span in zip(tables, spans, strict=True)]
            (slot_mapping,) = to_device(device, np.concatenate(page_slots))
        if num_full < num_copies + len(steps):
            paged = self._paged_windows(request_ids[num_full - num_copies :], steps[num_full - num_copies :])
        return WindowBatch(int(loc[num_full]), full, paged, int(loc[num_unstored]), slot_mapping)

    def _page_slots(self, table: np.ndarray, start: int, end: int) -> np.ndarray:
        position = np.arange(start, end)
        return table[position // self.page_size] * self.page_size + position % self.page_size

    def _paged_windows(self, request_ids: list[str], steps: list[Window]) -> PagedWindows:
        tables = [
            self.pages[request_id][: -(-window.visible // self.page_size)]
            for request_id, window in zip(request_ids, steps, strict=True)
        ]
        return paged_windows(self.store.device, steps, tables, self.page_size)


def paged_windows(
    device: torch.device,
    windows: Sequence[Window | ScoredWindow],
    tables: Sequence[Sequence[int] | np.ndarray],
    page_size: int,
) -> PagedWindows:
    """Attention's view of windows, of which ``tables`` are the pages."""
    length = [window.end - window.start for window in windows]
    block_table = np.zeros((len(windows), power_of_two(max(map(len, tables)))), dtype=np.int64)
    for row, pages in zip(block_table, tables, strict=True):
        row[: len(pages)] = pages
    host = {
        "query_start_loc": start_loc(length).tolist(),
        "window_start": [window.start for window in windows],
        "visible": [window.visible for window in windows],
        "prefix_len": [window.attention.prefix_length for window in windows],
        "block_length": [window.attention.block_length for window in windows],
    }
    *tensors, table = to_device(device, *map(np.array, host.values()), block_table.ravel(), dtype=torch.int32)
    both: dict[str, Any] = dict(zip(host, tensors, strict=True))
    both |= {f"{name}_cpu": values for name, values in host.items()}
    return PagedWindows(
        **both,
        block_table=table.view(block_table.shape),
        max_query_len=max(length),
        max_visible=block_table.shape[1] * page_size,  # the same for a step that is recorded
    )


def max_growth(requests: list[Request], steps: list[Window]) -> int:
    """How many tokens of a request a step can bring at most.

    Pinned positions, and blocks filled before the one in front of them, are emitted together with it.
    """
    most = 0  # a canvas begun again has emitted more than its first block holds
    for request, window in zip(requests, steps, strict=True):
        beyond_block = request.has_pinned or window.pipelined
        end = request.canvas_end if beyond_block else max((block.end for block in window.blocks), default=0)
        most = max(most, min(end, window.settles_below) - request.emitted)
    return most


def start_loc(length: list[int] | np.ndarray) -> np.ndarray:
    """``[0, length[0], length[0] + length[1], ...]``."""
    loc = np.zeros(len(length) + 1, dtype=np.int64)
    np.cumsum(length, out=loc[1:])
    return loc


def ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """``start[i], start[i] + 1, ...``, ``length[i]`` of them, for every i in turn."""
    return np.repeat(start - start_loc(length)[:-1], length) + np.arange(length.sum())


def to_device(device: torch.device, *arrays: np.ndarray, dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, ...]:
    """The arrays as integer tensors on the device, in one copy."""
    return pack(device, *arrays, dtype=dtype).split_with_sizes([len(array) for array in arrays])


def pack(device: torch.device, *arrays: Sequence[float] | np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The arrays end to end as one tensor on the device."""
    if isinstance(arrays[0], list):
        packed = np.array([number for array in arrays for number in array], _NUMPY[dtype])
    else:
        packed = np.concatenate(arrays, dtype=_NUMPY[dtype], casting="unsafe")
    tensor = torch.from_numpy(packed)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
