"""CUDA graphs of the forward pass: a step of small windows is bound by its launches, not by the GPU."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context

from dllm_plugin.attention import PagedWindows, WindowBatch
from dllm_plugin.worker.batch import Layout

ENVIRONMENT = "DLLM_PLUGIN_CUDA_GRAPHS"
MOST_TOKENS = 1024  # with more the GPU is busy for longer than the launches take
MOST_GRAPHS = 64

logger = logging.getLogger("vllm." + __name__)


@dataclass(slots=True)
class Captured:
    """A graph and what it reads and writes. ``layout``: the one whose numbers are in `windows` and `positions` now."""

    windows: WindowBatch
    input_ids: torch.Tensor
    positions: torch.Tensor
    replay: Callable[[], None] | None = None
    hidden_states: torch.Tensor | None = None
    layout: Layout | None = None

    def load(self, layout: Layout) -> None:
        """Copy a layout's numbers to where the graph reads them."""
        self.layout = layout
        self.positions.copy_(layout.positions)
        if self.windows.slot_mapping is not None:
            self.windows.slot_mapping.copy_(layout.windows.slot_mapping)
        source, target = layout.windows.paged, self.windows.paged
        target.block_table[:, : source.block_table.shape[1]].copy_(source.block_table)
        for name in PER_REQUEST:
            getattr(target, name).copy_(getattr(source, name))


class ForwardGraphs:
    """Captures the forward pass of a shape of batch when it comes for the second time, and replays it from then on.

    Only for steps whose windows all read pages, on one CUDA device without adapters. Whatever differs between two batches
    of one shape is read from tensors on the device. ``DLLM_PLUGIN_CUDA_GRAPHS=1`` switches it on: its tokens were compared
    on a GPU, its speed was not measured yet.
    """

    def __init__(self, model: Callable, vllm_config: VllmConfig, device: torch.device, page_size: int) -> None:
        self.model = model
        self.vllm_config = vllm_config
        self.page_size = page_size
        self.enabled = (
            device.type == "cuda"
            and os.environ.get(ENVIRONMENT, "0") == "1"
            and vllm_config.parallel_config.world_size == 1
            and vllm_config.lora_config is None
        )
        self.pool = torch.cuda.graph_pool_handle() if self.enabled else None
        self.seen: set[tuple] = set()
        self.captured: dict[tuple, Captured] = {}

    def forward(self, input_ids: torch.Tensor, layout: Layout) -> torch.Tensor | None:
        """Hidden states ``[tokens, hidden_size]``, valid until the next step; None where no graph serves the batch."""
        if not self.enabled or (key := shape_of(layout)) is None:
            return None
        if key not in self.captured:
            if key not in self.seen or len(self.captured) == MOST_GRAPHS:
                self.seen.add(key)
                return None
            self.captured[key] = self.capture(input_ids, layout)
        captured = self.captured[key]
        if captured.layout is not layout:
            captured.load(layout)
        captured.input_ids.copy_(input_ids)
        captured.replay()
        return captured.hidden_states

    def capture(self, input_ids: torch.Tensor, layout: Layout) -> Captured:
        windows, paged = layout.windows, layout.windows.paged
        width = pages_of(paged)
        own = {name: getattr(paged, name).clone() for name in PER_REQUEST}
        host = {f"{name}_cpu": None for name in PER_REQUEST}  # what is on the host does not change with the tensors
        table = paged.block_table.new_zeros((len(paged.block_table), width))
        captured = Captured(
            windows=replace(
                windows,
                paged=replace(paged, **own, **host, block_table=table, max_visible=width * self.page_size),
                slot_mapping=None if windows.slot_mapping is None else windows.slot_mapping.clone(),
            ),
            input_ids=input_ids.clone(),
            positions=layout.positions.clone(),
        )
        captured.load(layout)
        with set_forward_context(captured.windows, self.vllm_config, num_tokens=len(input_ids)):
            captured.replay, captured.hidden_states = self.record(
                lambda: self.model(captured.input_ids, captured.positions)
            )
        logger.info("Captured a CUDA graph for %d tokens of %d requests.", len(input_ids), len(table))
        return captured

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """A call that runs again, and the buffer that it fills."""
        run()  # kernels that have yet to be compiled and loaded would break the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            hidden_states = run()
        return graph.replay, hidden_states


PER_REQUEST = [
    field.name for field in fields(PagedWindows) if field.type is torch.Tensor and field.name != "block_table"
]


def shape_of(layout: Layout) -> tuple[int, ...] | None:
    """What two batches must share to be served by one graph; None for a batch that none should serve."""
    windows, num_tokens = layout.windows, len(layout.token_index)
    if windows.full is not None or num_tokens > MOST_TOKENS:
        return None
    num_stored = -1 if windows.slot_mapping is None else len(windows.slot_mapping)
    return num_tokens, num_stored, len(windows.paged.visible), windows.paged.max_query_len, pages_of(windows.paged)


def pages_of(paged: PagedWindows) -> int:
    """Columns of a graph's block table: a power of two, so that sequences may grow."""
    return 1 << (paged.block_table.shape[1] - 1).bit_length()
