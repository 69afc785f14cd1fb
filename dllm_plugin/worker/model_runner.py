"""One denoising step for a batch of windows: forward, choose tokens, rank positions, unmask."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.utils.mem_utils import DeviceMemoryProfiler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.utils import allocate_kv_cache

from dllm_plugin.attention import DiffusionAttention, WindowBatch
from dllm_plugin.finite import in_place_of_no_choice
from dllm_plugin.kernels.confidence import STATISTICS, Choice, confidence
from dllm_plugin.kernels.edit import Rows as OpenRows
from dllm_plugin.kernels.edit import edit
from dllm_plugin.kernels.filter import Cut, Filters, find_cut
from dllm_plugin.kernels.unmask import Unmasked, unmask
from dllm_plugin.kernels.window_attention import Windows
from dllm_plugin.params import BLOCK
from dllm_plugin.policies import RANKINGS
from dllm_plugin.scheduler.likelihood import ScoredWindow
from dllm_plugin.scheduler.output import DiffusionModelRunnerOutput, DiffusionSchedulerOutput
from dllm_plugin.scheduler.window import Window
from dllm_plugin.settings import model_config_of, settings_of
from dllm_plugin.worker.adapters import AdapterMixin
from dllm_plugin.worker.batch import BatchBuilder, Needs, StepBatch
from dllm_plugin.worker.canvas import CanvasStore
from dllm_plugin.worker.controls import Surroundings, control, is_hole
from dllm_plugin.worker.graphs import StepGraphs
from dllm_plugin.worker.progress import Progress
from dllm_plugin.worker.ranking import RANKED_BY, ChosenRows, RankedRows, given
from dllm_plugin.worker.records import Rows, processed, score, without_others
from dllm_plugin.worker.scoring import lay_out
from dllm_plugin.worker.summary import StepNumbers, Summary, summarize

# Rows of logits are computed in chunks of about this size, whatever the batch asks for.
LOGITS_CHUNK_BYTES = 256 * 2**20

logger = init_logger("vllm." + __name__)


class DiffusionModelRunner(AdapterMixin):
    """Runs the model on the scheduler's windows and keeps the canvases. The same code on CPU and CUDA."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.vllm_config = vllm_config
        self.model_config = model_config_of(vllm_config)
        self.load_config = vllm_config.load_config
        self.lora_config = vllm_config.lora_config
        self.device = device
        self.model: Any  # an adapter of `models`, which vLLM finds by its name
        self.graphs: StepGraphs | None = None  # there from the KV cache on
        self.model_memory_usage = 0
        self.kv_caches: list[torch.Tensor] = []
        self.rows_at_once = 0  # rows whose logits are in memory together
        self.watches_logits = False  # whether they are looked at for what is no number
        self.overlaps = device.type == "cuda"
        config, self.settings = self.model_config.hf_config, settings_of(vllm_config)
        self.state = CanvasStore(
            mask_token_id=config.mask_token_id,
            eos_token_id=config.eos_token_id,
            turn_end_token_id=self.settings.turn_end_token_id,
            device=device,
        )
        self.batches = BatchBuilder(self.state, shift=self.settings.shift)

    # ---- one denoising step

    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None) -> ModelRunnerOutput:
        """Run the scheduler's windows; returns the tokens that became final and how much is left masked."""
        assert isinstance(scheduler_output, DiffusionSchedulerOutput)
        self.update_canvases(scheduler_output)
        scores = self.score_texts(scheduler_output.scored)
        if not scheduler_output.steps:
            return DiffusionModelRunnerOutput([], {}, scores=scores) if scores else EMPTY_MODEL_RUNNER_OUTPUT
        layout = self.batches.lay_out(scheduler_output.steps[0])  # its requests, in their order, are those of all steps
        progress = Progress(layout, self.state)
        # a threshold tells how many masks are left, and with it what the next step is, only when a step has been read
        by_quota = not layout.needs.block_floats
        run = self.run_overlapped if self.overlaps and by_quota else self.run_one_by_one
        run(scheduler_output.steps, progress)
        return replace(progress.output(), scores=scores)

    def run_one_by_one(self, steps: list[dict[str, Window]], progress: Progress) -> None:
        """Run the steps until one ends a request, or fills a block that the next one was to go on with."""
        for windows, following in pairwise([*steps, {}]):
            summary = self.launch(progress.with_masks_left(windows))
            if progress.read(summary, following):
                return

    def run_overlapped(self, steps: list[dict[str, Window]], progress: Progress) -> None:
        """The same on a GPU, which is never idle: the next step is launched before the last one is read."""
        unread = self.launch(steps[0])
        for windows in steps[1:]:
            launched = self.launch(windows)
            ended = progress.read(unread)
            unread = launched
            if ended:
                break
        progress.read(unread)

    def launch(self, windows: dict[str, Window]) -> Summary:
        """Begin one denoising step, from a recorded graph where its shape has come before."""
        assert self.graphs is not None
        layout = self.batches.lay_out(windows)
        shape = self.graphs.take(layout)
        batch = self.batches.build(windows, layout, every_place=shape is not None)
        if self.lora_config:
            self.activate_adapters(batch)
        return Summary(batch, self.graphs.denoise(batch, shape) if shape else self.denoise(batch))

    def denoise(self, batch: StepBatch) -> StepNumbers:
        """One step on the device, without a word from the host: forward, choose, edit, unmask, tell."""
        hidden_states = self.forward(batch)
        choice = self.choose(hidden_states, batch)
        rows = Rows(batch, self.state) if batch.layout.needs.records else None
        num_edited = self.edit(batch, choice)
        unmasked = self.unmask(batch, choice)
        summary = summarize(batch, unmasked, num_edited, self.state)
        return StepNumbers(summary, None if rows is None else rows.records(choice.ranking, choice.scores))

    def score_texts(self, scored: dict[str, list[ScoredWindow]]) -> dict[str, np.ndarray]:
        """What is told of each scored token (`records.score`), float32 rows by request."""
        if not scored:
            return {}
        pages = self.batches.pages if self.settings.defaults.strategy == BLOCK else None
        batch = lay_out(scored, self.state, self.settings.shift, pages, self.batches.page_size)
        canvases = [self.state.requests[request_id].canvas for request_id in batch.request_ids]
        num_others = max(canvas.num_prompt_logprobs for canvas in canvases)
        normalize = self.model_config.logprobs_mode.endswith("logprobs")
        if self.lora_config:
            self.tell_adapters(canvases, batch.token_request, batch.row_request)
        with self.attending(batch.windows):
            hidden_states = self.model(batch.input_ids, batch.positions)
        rows = zip(batch.row_token.split(self.rows_at_once), batch.target.split(self.rows_at_once), strict=True)
        logits = ((self.model.compute_logits(hidden_states[at]), target) for at, target in rows)
        scores = torch.cat([score(x, target, num_others, None, normalize) for x, target in logits])
        parts = scores.cpu().split(batch.num_rows)
        return {
            request_id: without_others(part.numpy(), num_others, canvas.num_prompt_logprobs)
            for request_id, part, canvas in zip(batch.request_ids, parts, canvases, strict=True)
        }

    def update_canvases(self, scheduler_output: DiffusionSchedulerOutput) -> None:
        pages = self.batches.pages
        for request_id in scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set()):
            self.state.free(request_id)
            pages.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            pages[new.req_id] = list(new.block_ids[0])
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in cached.resumed_req_ids:
                pages[request_id] = []
            if block_ids is not None:
                pages[request_id] += block_ids[0]
        for request_id, canvas in scheduler_output.new_canvases.items():
            self.state.begin(request_id, canvas)
        for request_id, step in scheduler_output.grammar.items():
            self.state.obey(request_id, step)

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Hidden states ``[tokens, hidden_size]``."""
        layout = batch.layout
        input_ids = self.batches.input_ids(layout)
        with self.attending(layout.windows):
            return self.model(input_ids, layout.positions)

    def attending(self, windows: WindowBatch) -> AbstractContextManager[None]:
        """In it, attention layers find the windows."""
        self.forward_context.attn_metadata = windows
        return override_forward_context(self.forward_context)

    def choose(self, hidden_states: torch.Tensor, batch: StepBatch) -> ChosenRows:
        """Token of every row, and the confidence its position is ranked by."""
        chosen = self.choose_beside(hidden_states, batch)
        if "phrases" not in batch.layout.needs.controls:
            return chosen
        # of the rows that together complete a phrase the last one chooses again, and fits whatever the others hold
        beside = self.written_by(batch, chosen.token)
        again = Surroundings(batch, self.state, batch.slots[batch.row_request]).completed_by(beside)
        if again.device.type == "cpu" and not again.any():
            return chosen
        return chosen.where(again, self.choose_beside(hidden_states, batch, beside))

    def choose_beside(
        self, hidden_states: torch.Tensor, batch: StepBatch, beside: torch.Tensor | None = None
    ) -> ChosenRows:
        chunks = batch.split(self.rows_at_once)
        return ChosenRows.joined([self.rank(self.logits_of(hidden_states, rows), rows, beside) for rows in chunks])

    def written_by(self, batch: StepBatch, token: torch.Tensor) -> torch.Tensor:
        """``[slots * length]``: the tokens of rows that the step may write, -1 elsewhere."""
        state, cell = self.state, batch.segments.row_cell
        may_write = state.masked.view(-1)[cell]
        if batch.edit_threshold is not None:
            edits = batch.edit_threshold[batch.layout.place_block] < torch.inf
            may_write |= edits & ~state.pinned.view(-1)[cell]
        beside = torch.full_like(state.tokens.view(-1), -1)
        beside[cell] = torch.where(may_write, token, -1)
        return beside

    def logits_of(self, hidden_states: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """Logits of every row; guided ones are moved away from the logits that do not see the prompt.

        ``u + (scale + 1)(c - u)``, in the model's dtype (ML-GSAI/LLaDA:generate.py).
        """
        source = batch.row_token
        logits = self.model.compute_logits(hidden_states.index_select(0, source))
        if (guidance := batch.layout.guidance) is not None:
            request = batch.row_request
            unconditional = self.model.compute_logits(hidden_states[source - guidance.distance[request]])
            scale = self.state.guidance[batch.slots[request]][:, None].to(logits.dtype)
            guided = unconditional + (scale + 1) * (logits - unconditional)
            logits = torch.where(guidance.guided[request][:, None], guided, logits)
        return logits

    def rank(self, logits: torch.Tensor, batch: StepBatch, beside: torch.Tensor | None = None) -> ChosenRows:
        """Token and ranking confidence of every row, each by its own request's parameters."""
        state, needs, position = self.state, batch.layout.needs, batch.row_position
        scored = logits
        if needs.controls or needs.grammar:
            logits = control(logits, batch, state, beside)
        slot = batch.slots[batch.row_request] if needs.per_row else None
        no_choice = state.no_choice[slot] if needs.suppression else state.forbidden_mask.expand(len(position), 1)
        temperature = state.temperature[slot] if needs.sampling else None
        seed, timestep = (state.seed[slot], batch.timestep[batch.row_request].long()) if needs.noise else (None, None)
        choice = Choice(
            no_choice=no_choice,
            no_mass=state.no_mass[slot] if needs.suppression else None,
            temperature=temperature,
            tempered=state.tempered[slot] if needs.sampling else None,
            cut=self.filter(logits, given(slot), temperature, needs.suppression) if needs.filters else None,
            unfiltered=state.unfiltered[slot] if needs.filters else None,
            seed=seed if needs.sampling else None,
            position=position if needs.sampling else None,
            timestep=timestep if needs.sampling else None,
            **dict.fromkeys(needs.statistics, True),
        )
        chosen = confidence(logits, choice)
        rows = RankedRows(chosen, position, seed, timestep)
        first, *others = needs.rankings
        ranking = RANKED_BY[first].value(rows)
        for name in others:
            ranking = torch.where(state.ranking[slot] == RANKINGS.index(name), RANKED_BY[name].value(rows), ranking)
        if needs.grammar:
            # it is unmasked in every step; its entropy must not count, and no other one is below 0
            by_entropy = state.ranking[given(slot)] == RANKINGS.index("negative_entropy")
            ranking = torch.where(is_hole(batch, state), torch.where(by_entropy, 1e-6, torch.inf), ranking)
        scores = None
        if needs.num_logprobs >= 0:
            scores = self.score(
                scored if self.scores_raw_logits else processed(logits, choice), chosen.token, slot, needs
            )
        token = chosen.token
        if self.watches_logits:
            token = in_place_of_no_choice(token, scored, state.mask_token_id)
        return ChosenRows(token, ranking, scores)

    @property
    def scores_raw_logits(self) -> bool:
        return self.model_config.logprobs_mode.startswith("raw")

    def score(self, x: torch.Tensor, token: torch.Tensor, slot: torch.Tensor | None, needs: Needs) -> torch.Tensor:
        """What is told of each row's token (`records.score`), by vLLM's ``logprobs_mode``."""
        given_ids = self.state.logprob_ids[given(slot)] if needs.logprob_ids else None
        return score(x, token, needs.num_logprobs, given_ids, self.model_config.logprobs_mode.endswith("logprobs"))

    def filter(
        self, logits: torch.Tensor, slot: torch.Tensor, temperature: torch.Tensor | None, suppression: bool
    ) -> Cut:
        """Where min-p, top-k and top-p cut every row."""
        state = self.state
        filters = Filters(
            temperature=temperature,
            top_k=state.top_k[slot],
            top_p=state.top_p[slot],
            min_p=state.min_p[slot],
            k_first=state.top_k_first[slot],
            gone=state.gone[slot] if suppression else None,
        )
        return find_cut(logits, filters)

    def edit(self, batch: StepBatch, chosen: ChosenRows) -> torch.Tensor | None:
        """Replace tokens of open blocks that the model would not choose again; how many, ``[blocks]``, where any may be.

        The policies of the blocks that edit rank by probability.
        """
        if batch.edit_threshold is None:
            return None
        state, cell = self.state, batch.segments.row_cell
        is_open = ~(state.masked.view(-1)[cell] | state.pinned.view(-1)[cell])
        rows = OpenRows(cell, is_open, batch.layout.place_block, chosen.token, chosen.ranking)
        return edit(state.tokens, rows, batch.edit_threshold)

    def unmask(self, batch: StepBatch, chosen: ChosenRows) -> Unmasked:
        """Write the tokens of the best-ranked rows into their canvases."""
        state, segments = self.state, batch.segments
        if batch.layout.needs.random_order:
            block_request = batch.layout.block_request
            slot, timestep = batch.slots[block_request], batch.timestep[block_request].long()
            segments = replace(segments, alg_temp=state.alg_temp[slot], seed=state.seed[slot], timestep=timestep)
        return unmask(state.tokens, state.masked, segments, chosen.token, chosen.ranking)

    # ---- what vLLM's workers ask of a model runner

    def load_model(self, load_dummy_weights: bool = False) -> None:
        if load_dummy_weights:
            self.load_config.load_format = "dummy"
        with DeviceMemoryProfiler(self.device) as memory:
            loader = get_model_loader(self.load_config)
            self.model = loader.load_model(vllm_config=self.vllm_config, model_config=self.model_config)
            if self.lora_config:
                self.model = self.load_lora_model(self.model, self.vllm_config, self.device)
        self.model_memory_usage = memory.consumed_memory
        self.watch_logits()
        # one for all steps: making it takes as long as choosing tokens does
        self.forward_context = create_forward_context(None, self.vllm_config)
        self.batches.num_words = -(-self.model.num_embeddings // 32)
        self.rows_at_once = max(1, LOGITS_CHUNK_BYTES // (self.model.num_embeddings * self.model_config.dtype.itemsize))

    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, torch.Tensor]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        reload_weights(self.vllm_config, self.model, weights_iterator, weights_path, is_checkpoint_format)
        self.reset_lora_state()
        self.watch_logits()

    def watch_logits(self) -> None:
        """Look at logits in every step only where they can be no numbers: from such weights, adapters, or in float16."""
        watched = self.watches_logits
        wrong, can_overflow = self.model.not_finite, self.model_config.dtype == torch.float16
        if wrong and get_tensor_model_parallel_rank() == 0:  # every rank reads whole tensors
            logger.error(
                "The weights hold NaN or infinity, first in %s, in %d tensors. Requests that they reach end with an error; "
                "take the checkpoint anew",
                wrong[0],
                len(wrong),
            )
        self.watches_logits = bool(wrong) or can_overflow or self.lora_config is not None
        if self.graphs is not None and self.watches_logits != watched:
            self.graphs.forget()

    def get_model(self) -> nn.Module:
        return self.model

    @property
    def attention_layers(self) -> dict[str, DiffusionAttention]:
        layers = self.vllm_config.compilation_config.static_forward_context
        return {name: layer for name, layer in layers.items() if isinstance(layer, DiffusionAttention)}

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        return {name: layer.get_kv_cache_spec(self.vllm_config) for name, layer in self.attention_layers.items()}

    def initialize_kv_cache(
        self,
        kv_cache_config: KVCacheConfig,
        kv_cache_allocation_context: AbstractContextManager[Any] | None = None,
    ) -> None:
        layout = self.vllm_config.cache_config.get_resolved_kv_cache_layout()
        with kv_cache_allocation_context or nullcontext():
            caches = allocate_kv_cache(kv_cache_config, self.device, layout)
        for name, layer in self.attention_layers.items():
            layer.bind_kv_cache(caches[name])
        self.batches.page_size = next(iter(self.attention_layers.values())).key_cache.shape[1]
        self.kv_caches = list(caches.values())
        self.graphs = StepGraphs(self.denoise, self.state, self.vllm_config)

    @torch.inference_mode()
    def profile_run(self, randomize_inputs: bool = False) -> None:
        """The largest step there is, and one chunk of logits with guidance."""
        num_tokens = self.settings.most_tokens
        length = self.model_config.max_model_len
        query_start_loc = [*range(0, num_tokens, length), num_tokens]
        full = Windows(
            query_start_loc=torch.tensor(query_start_loc, dtype=torch.int32, device=self.device),
            query_start_loc_cpu=query_start_loc,
            max_query_len=length,
        )
        input_ids = torch.full((num_tokens,), self.state.mask_token_id, device=self.device)
        positions = torch.arange(num_tokens, device=self.device) % length
        with self.attending(WindowBatch(num_tokens, full)):
            hidden_states = self.model(input_ids, positions)
        most = self.rows_at_once
        logits, unconditional = (self.model.compute_logits(hidden_states[:most]) for _ in range(2))
        every_statistic: dict[str, Any] = dict.fromkeys(STATISTICS, True)
        guided = unconditional + (logits - unconditional)
        cut = find_cut(guided, Filters(top_k=guided.new_zeros(len(guided), dtype=torch.int64)))
        confidence(guided, Choice(cut=cut, **every_statistic))

    def sample_tokens(self, grammar_output: Any) -> None:
        raise RuntimeError("execute_model of a diffusion model returns its output itself")

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    def take_draft_token_ids(self) -> None:
        return None

    def get_draft_model(self) -> None:
        return None

    def get_encoder_timing_stats(self) -> dict[str, Any]:
        return {}

    def reset_mm_cache(self) -> None: ...

    def reset_encoder_cache(self) -> None: ...

    def shutdown(self) -> None:
        self.kv_caches, self.graphs = [], None
        for layer in self.attention_layers.values():
            layer.bind_kv_cache(None)
