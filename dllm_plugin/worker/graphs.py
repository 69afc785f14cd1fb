"""CUDA graphs of whole denoising steps: a step of few tokens is bound by its launches, not by the GPU."""

import copy
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import GraphCaptureContext, get_tp_group

from dllm_plugin.settings import settings_of
from dllm_plugin.worker.batch import Layout, StepBatch
from dllm_plugin.worker.canvas import CanvasStore
from dllm_plugin.worker.ranking import given
from dllm_plugin.worker.summary import StepNumbers

MOST_TOKENS = 8192  # with more the GPU is busy for far longer than the launches take, and shapes seldom come again
MOST_GRAPHS = 64
MOST_SEEN = 4096
MEMORY_VARIABLE, MEMORY_MIB = "DLLM_PLUGIN_GRAPH_MIB", 4096

logger = logging.getLogger("vllm." + __name__)

Step = Callable[[StepBatch], StepNumbers]
Shape = tuple


@dataclass(slots=True)
class Recorded:
    """A graph, the batch whose tensors it reads, and the numbers it writes. ``layout``: whose numbers are in the batch."""

    batch: StepBatch
    layout: Layout
    numbers: StepNumbers
    replay: Callable[[], None]

    def load(self, batch: StepBatch) -> None:
        """Copy a batch's numbers to where the graph reads them."""
        if self.layout is not batch.layout:
            self.layout = batch.layout
            for (_, target), (_, source) in zip(tensors_of(self.batch.layout), tensors_of(batch.layout), strict=True):
                target.copy_(source)
        self.batch.numbers.copy_(batch.numbers)
        self.batch.floats.copy_(batch.floats)
        if batch.grammar is not None:
            given(self.batch.grammar).copy_(batch.grammar)


class StepGraphs:
    """Records the denoising step of a shape of batch when it comes for the second time, and replays it from then on.

    Whatever differs between two batches of one shape is read from tensors on the device, the canvases too, and every
    place gets logits, masked or not. Graphs serve CUDA devices, as ``enforce_eager`` allows, and steps of at most 8,192 tokens.
    The ranks of a group record at the same step, since they are given the same windows, and vLLM's all-reduces become a part of
    the graph.

    All graphs share one pool of memory, at most ``DLLM_PLUGIN_GRAPH_MIB`` MiB of it: where it is full all are dropped.
    """

    def __init__(self, denoise: Step, store: CanvasStore, vllm_config: VllmConfig) -> None:
        self.run = denoise
        self.store = store
        on_gpu = store.device.type == "cuda"
        self.most_bytes = int(os.environ.get(MEMORY_VARIABLE, MEMORY_MIB)) << 20
        self.enabled = on_gpu and settings_of(vllm_config).records_graphs and self.most_bytes > 0
        self.num_ranks = vllm_config.parallel_config.tensor_parallel_size
        if self.enabled:
            logger.info(
                "Denoising steps of at most %d tokens are recorded as CUDA graphs, in at most %d MiB (%s)",
                MOST_TOKENS,
                self.most_bytes >> 20,
                MEMORY_VARIABLE,
            )
        self.stream = torch.cuda.Stream() if on_gpu else None  # one, or graphs would not share memory
        self.layout: Layout | None = None  # asked for last, and its shape
        self.shape: Shape = ()
        self.seen: OrderedDict[Shape, None] = OrderedDict()
        self.recorded: OrderedDict[Shape, Recorded] = OrderedDict()
        self.forget()

    def forget(self) -> None:
        """Drop all graphs, whose canvases have moved, and their memory with them."""
        self.recorded.clear()
        self.num_bytes = 0
        self.generation = self.store.generation
        self.pool = torch.cuda.graph_pool_handle() if self.store.device.type == "cuda" else None

    def take(self, layout: Layout) -> Shape | None:
        """The shape with which `denoise` is to be called for the steps of this layout; None: run them."""
        if not self.enabled or len(layout.token_index) > MOST_TOKENS:
            return None
        if self.generation != self.store.generation:
            self.forget()
        if layout is not self.layout:
            self.layout, self.shape = layout, shape_of(layout)
        if self.shape in self.seen or self.shape in self.recorded:
            return self.shape
        self.seen[self.shape] = None
        if len(self.seen) > MOST_SEEN:
            self.seen.popitem(last=False)
        return None

    def denoise(self, batch: StepBatch, shape: Shape) -> StepNumbers:
        """What the step tells."""
        if shape not in self.recorded:
            return self.record(batch, shape) if self.enabled else self.run(batch)
        recorded = self.recorded[shape]
        self.recorded.move_to_end(shape)
        recorded.load(batch)
        recorded.replay()
        return recorded.numbers.clone()

    @property
    def reserved_bytes(self) -> int:
        return torch.cuda.memory_reserved() if self.stream is not None else 0

    def record(self, batch: StepBatch, shape: Shape) -> StepNumbers:
        """Run the step on tensors of its own, and then record the same for the steps to come."""
        own = copy.deepcopy(replace(batch, layout=without_host_numbers(batch.layout), windows=[]))
        numbers = self.run(own)  # compiles and loads the kernels too, which would break a recording
        if self.num_bytes > self.most_bytes:
            logger.info("CUDA graphs have reached %d MiB (%s): begun anew", self.num_bytes >> 20, MEMORY_VARIABLE)
            self.forget()
        if len(self.recorded) == MOST_GRAPHS:
            self.recorded.popitem(last=False)
        try:
            before = self.reserved_bytes
            self.recorded[shape] = Recorded(own, batch.layout, *self.capture(own))
            self.num_bytes += self.reserved_bytes - before
        except RuntimeError as error:  # no memory left, say; the step itself has run
            logger.warning("No more CUDA graphs, steps are launched kernel by kernel from now on: %s", error)
            self.enabled = False
            self.forget()
        return numbers

    def capture(self, batch: StepBatch) -> tuple[StepNumbers, Callable[[], None]]:
        """The buffers of what the step tells, and a call that runs the step again."""
        assert self.stream is not None  # `enabled` on a GPU alone
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        # in it ranks agree on the buffers that their all-reduces read
        ranks = get_tp_group().graph_capture(GraphCaptureContext(self.stream)) if self.num_ranks > 1 else nullcontext()
        # torch.cuda.graph() would also collect garbage, which takes longer than this
        with torch.cuda.stream(self.stream), ranks:
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                numbers = self.run(batch)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        return numbers, graph.replay


def without_host_numbers(layout: Layout) -> Layout:
    """The layout as a graph sees it: what the host knows of one batch would be wrong for the next."""
    parts = {name: part for name in ("full", "paged") if (part := getattr(layout.windows, name)) is not None}
    for name, part in parts.items():
        parts[name] = replace(part, **{field.name: None for field in fields(part) if field.name.endswith("_cpu")})
    return replace(layout, windows=replace(layout.windows, **parts))


def shape_of(layout: Layout) -> Shape:
    """What two batches must share to be served by one graph."""
    windows = layout.windows
    lengths = [part.max_query_len for part in (windows.full, windows.paged) if part is not None]  # they choose tilings
    shapes = [(name, tensor.shape) for name, tensor in tensors_of(layout)]
    return layout.needs, windows.num_full_tokens, windows.first_stored, *lengths, *shapes


def tensors_of(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested dataclasses by name, in their order."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)
