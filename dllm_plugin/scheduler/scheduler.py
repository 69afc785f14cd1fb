"""The vLLM scheduler, with denoising windows instead of tokens to compute."""

import copy
import math
import random
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from dllm_plugin.compat import end_with_error
from dllm_plugin.controls import Controls
from dllm_plugin.extras import check_token_ids
from dllm_plugin.kernels import philox
from dllm_plugin.messages import shown
from dllm_plugin.metrics import Event, write_trajectory
from dllm_plugin.params import PREFIX, DiffusionParams
from dllm_plugin.scheduler.grammar import Constraint
from dllm_plugin.scheduler.likelihood import Likelihood, ScoredWindow, make_likelihood
from dllm_plugin.scheduler.output import (
    DiffusionModelRunnerOutput,
    DiffusionSchedulerOutput,
    GrammarStep,
    NewCanvas,
    Record,
)
from dllm_plugin.scheduler.plan import Plan
from dllm_plugin.scheduler.strategies import make_plan
from dllm_plugin.scheduler.turns import Turns
from dllm_plugin.scheduler.window import Window
from dllm_plugin.settings import settings_of

# Steps that run between two calls of the scheduler, and how long a request that arrives may have to wait for them.
MOST_STEPS, MOST_SECONDS = 8, 0.05
LONGEST_STRIDE = 16  # rounds in which the least urgent request takes part at least once
NO_NUMBERS = (
    "the model's logits are NaN or infinite, and no token can be chosen; the server's log names weights that are not finite, and "
    "a float16 model may overflow: serve it with --dtype bfloat16"
)

logger = init_logger("vllm." + __name__)


@dataclass(slots=True)
class Denoising:
    """What the scheduler keeps of a request beside vLLM's own record."""

    plan: Plan
    suffix_ids: list[int]
    seed: int
    unwatched: bool  # nobody sees its tokens, nor can end it, before a token does
    shares_pages: bool  # other requests may read the keys and values of its prefix, and it theirs
    reserved: int = 0  # positions that have pages
    shared: int = 0  # positions whose full pages others can find
    constraint: Constraint | None = None
    likelihood: Likelihood | None = None  # until the prompt's log-probabilities are told
    trajectory: list[Event] = field(default_factory=list)  # kept where the request asks for it

    @property
    def scored(self) -> list[ScoredWindow]:
        """The copies of its prompt that the next step forwards in place of the plan's window; none where that is next."""
        if self.likelihood is None or self.plan.num_cached < self.likelihood.num_cached:
            return []
        return self.likelihood.windows

    def record(self, num_prompt: int, written: Sequence[Sequence[Record]]) -> None:
        """Add what the next forward passes wrote."""
        if not self.plan.params.trajectory:
            return
        for number, records in enumerate(written, self.plan.num_passes):
            self.trajectory += [
                Event(number, each.position - num_prompt, each.token, each.confidence, each.logprobs[0])
                for each in records
            ]

    def forget_from(self, forward_pass: int) -> None:
        """Drop what will be written again."""
        self.trajectory = [event for event in self.trajectory if event.forward_pass < forward_pass]


class DiffusionScheduler(Scheduler):
    """Drives every request's plan; queues, memory, stops, preemption and LoRA accounting stay vLLM's.

    - A request is admitted when its whole canvas fits the KV cache, first come, first served.
    - Where the budget of a step cannot hold the windows of all running requests, they take turns (`Turns`). vLLM schedules
      all of them in every step, one token each in its own count; who has no turn has no window and no token.
    - A window is never chunked, since its queries see each other; one larger than the budget runs alone.
    - Where nobody watches, up to eight steps over the same positions run one after the other before the next call.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings_of(self.vllm_config)
        self.denoising: dict[str, Denoising] = {}
        self._draw_seed = random.Random(self.vllm_config.model_config.seed).getrandbits
        self._turns = Turns(self.max_num_scheduled_tokens)
        # windows are counted by us; vLLM's count of prompts would keep a long one from being admitted beside others
        self.max_num_scheduled_tokens = sys.maxsize
        self.scheduler_config = copy.copy(self.scheduler_config)
        self.scheduler_config.max_num_batched_tokens = sys.maxsize
        self._scheduled_at, self._step_seconds, self._step_tokens = 0.0, math.inf, 1  # of the last steps
        # of each request, steps to be recorded: masks before, tokens emitted
        self._steps_run: dict[str, list[tuple[int, int]]] = {}
        if self.kv_cache_manager.enable_caching:
            # a page ends within a block where the block is no part of it, and its keys depend on what follows
            coordinator: Any = self.kv_cache_manager.coordinator
            coordinator.block_size = math.lcm(coordinator.block_size, self.settings.defaults.block_length or 1)
        self._allocate_slots = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_canvas  # type: ignore[method-assign]  # that is the seam

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            try:
                params = self.settings.params_of(sampling_of(request).extra_args)
                denoising = self._begin_denoising(request, params)
            except Exception as error:
                # the front end refuses such a request, but for one that was made elsewhere. An exception here would end the
                # engine for everyone: it runs a step without what is wrong, and vLLM then ends it with finish_reason "error"
                unforeseen = not isinstance(error, ValueError)  # its traceback is wanted
                logger.warning("Request %s cannot be served: %s", request.request_id, error, exc_info=unforeseen)
                end_with_error(self, request.request_id, str(error), unforeseen)
                # what follows the first prompt of a session is kept there and never read
                request.resumable, request.streaming_queue = False, deque()
                request.priority = 0
                denoising = self._begin_denoising(
                    request, replace(self.settings.defaults, suffix=(), template=(), cfg_scale=0.0)
                )
            self.denoising[request.request_id] = denoising
            request.skip_reading_prefix_cache |= not denoising.shares_pages
            request.spec_decode_metrics = RequestSpecDecodeMetrics.new(denoising.plan.most_emitted)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        for request in self.running:
            request.num_computed_tokens = request.num_tokens - 1  # one token in vLLM's count
        output = super().schedule(throttle_prefills)
        # the worker has no canvas of these: they are new, or were preempted
        begun = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed = zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        begun |= {req_id: number for req_id, number in computed if req_id in cached.resumed_req_ids}
        canvases = {}
        for req_id in output.num_scheduled_tokens:
            plan = self.denoising[req_id].plan
            plan.num_cached = begun.get(req_id, plan.num_cached)
            if plan.canvas_is_full:
                plan.start_canvas()
                canvases[req_id] = self._new_canvas(self.requests[req_id])
            elif req_id in begun:
                self._recall(req_id)
                plan.restart_canvas()
                self.denoising[req_id].forget_from(plan.num_passes)
                canvases[req_id] = self._new_canvas(self.requests[req_id])
        turns = self._take_turns(output)
        scored = {req_id: windows for req_id in turns if (windows := self.denoising[req_id].scored)}
        served = [req_id for req_id in turns if req_id not in scored]
        grammar = self._lay_grammars(served)
        steps = self._look_ahead({req_id: self._window(req_id) for req_id in served})
        self._scheduled_at = time.monotonic()
        return DiffusionSchedulerOutput(
            **vars(output), new_canvases=canvases, steps=steps, grammar=grammar, scored=scored
        )

    def _recall(self, req_id: str) -> None:
        """Have a canvas under a grammar begin with what was emitted of it: the matcher does not go back."""
        denoising, request = self.denoising[req_id], self.requests[req_id]
        if denoising.constraint is not None:
            denoising.constraint.unmasked.clear()
            denoising.constraint.refused = None
            denoising.plan.known = request.all_token_ids[denoising.plan.restart_position :]

    def _lay_grammars(self, req_ids: list[str]) -> dict[str, GrammarStep]:
        """What grammars ask of the next step; their plans know of it."""
        asked = {}
        for req_id in req_ids:
            denoising, window = self.denoising[req_id], self._window(req_id)
            if denoising.constraint is not None and window.blocks:
                asked[req_id], changes = denoising.constraint.lay(denoising.plan.emitted, window.blocks[0])
                for position, change in changes.items():
                    denoising.plan.recount(position, change)
        return asked

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> None:
        """Nothing: masks travel with the windows, and `execute_model` chooses tokens itself."""

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        assert isinstance(scheduler_output, DiffusionSchedulerOutput)
        if isinstance(model_runner_output, DiffusionModelRunnerOutput):
            self._record_scores(model_runner_output.scores)
        if scheduler_output.steps:
            assert isinstance(model_runner_output, DiffusionModelRunnerOutput)
            num_run = len(next(iter(model_runner_output.num_emitted.values())))
            self._step_seconds = (time.monotonic() - self._scheduled_at) / num_run
            self._step_tokens = num_tokens(scheduler_output.steps[0])
            for i, req_id in enumerate(model_runner_output.req_ids):
                if (denoising := self.denoising.get(req_id)) is None:
                    continue  # aborted while the steps ran
                num_masked = model_runner_output.num_masked[req_id]
                num_emitted = model_runner_output.num_emitted[req_id]
                denoising.record(self.requests[req_id].num_prompt_tokens, model_runner_output.written.get(req_id, ()))
                refused = None
                if denoising.constraint is not None:
                    tokens = self._accept(req_id, i, scheduler_output, model_runner_output)
                    model_runner_output.sampled_token_ids[i], num_emitted[-1] = tokens, len(tokens)
                    refused = denoising.constraint.refused
                    for number, block in enumerate(scheduler_output.steps[0][req_id].blocks):
                        if refused is not None and block.start <= refused < block.end:
                            num_masked[-1][number] += 1
                            refused = None
                denoising.plan.advance_through(
                    num_masked,
                    req_id in model_runner_output.eos_is_taken and denoising.constraint is None,
                    num_emitted,
                    model_runner_output.num_edited[req_id],
                )
                if refused is not None:  # in a block that was filled before this step
                    denoising.plan.recount(refused, 1)
                self._share_pages(req_id)
                if req_id in model_runner_output.broken:
                    end_with_error(self, req_id, NO_NUMBERS, unforeseen=True)
                if req_id in self.grammar_compile_error_reqs:  # vLLM ends it with an error; nothing else may
                    model_runner_output.sampled_token_ids[i] = []
                    continue
                num_before = [block.num_masked for block in scheduler_output.steps[0][req_id].blocks]
                self._steps_run[req_id] = [
                    (sum(before), emitted)
                    for before, emitted in zip([num_before, *num_masked[:-1]], num_emitted, strict=True)
                ]
                if not any(num_emitted):  # vLLM has nothing to update the request with
                    self._record_steps(self.requests[req_id])
                elif denoising.likelihood is not None:
                    model_runner_output.prompt_logprobs_dict[req_id] = tensors_of(denoising.likelihood)
                    denoising.likelihood = None
        if isinstance(model_runner_output, DiffusionModelRunnerOutput):
            model_runner_output.add_idle(scheduler_output.num_scheduled_tokens)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _accept(
        self, req_id: str, index: int, scheduled: DiffusionSchedulerOutput, output: DiffusionModelRunnerOutput
    ) -> list[int]:
        """The tokens of a step that the request's grammar takes."""
        denoising, tokens = self.denoising[req_id], output.sampled_token_ids[index]
        assert denoising.constraint is not None
        for written in output.written[req_id]:
            denoising.constraint.keep(written)
        accepted = denoising.constraint.accept(tokens, denoising.plan.emitted)
        step, end = scheduled.grammar.get(req_id), scheduled.steps[0][req_id].settles_below
        reached = denoising.plan.emitted + len(accepted)
        if step is not None and step.mask is not None and reached <= step.hole < end:  # a chunk of a prompt has no step
            end_with_error(
                self,
                req_id,
                "no token is left at the next position of the answer: the grammar excludes what the other sampling parameters "
                "allow; leave one of them out",
                unforeseen=False,
            )
        return accepted

    def _record_scores(self, scores: dict[str, np.ndarray]) -> None:
        for req_id, rows in scores.items():
            if (denoising := self.denoising.get(req_id)) and denoising.likelihood:  # else it was aborted meanwhile
                denoising.likelihood.record(rows)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        """vLLM's stops, and those it does not know: a filled template, spent steps, no room before a suffix."""
        new_token_ids, stopped = super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
        self._record_steps(request, len(new_token_ids) if stopped else None)
        plan = self.denoising[request.request_id].plan
        if not stopped and plan.is_over:
            stopped, request.status = True, RequestStatus.FINISHED_LENGTH_CAPPED
            if plan.params.template and not plan.steps_are_spent:
                request.status, request.stop_reason = RequestStatus.FINISHED_STOPPED, "diffusion_template"
        if stopped and request.status == RequestStatus.FINISHED_LENGTH_CAPPED and plan.steps_are_spent:
            request.stop_reason = "diffusion_max_steps"
        return new_token_ids, stopped

    def _look_ahead(self, windows: dict[str, Window]) -> list[dict[str, Window]]:
        """The steps to run before the scheduler is asked again: one, or up to eight that are alike and seen by nobody.

        So a step costs an eighth of what the host does around it. No output may be asked for before the end, nothing may
        end a request but a token, which the worker sees, as it sees a block that is filled before its time, and no running
        request may have been passed over. Who waits was just refused, and would be as long as the same requests go on.
        """
        if not windows:
            return []
        steps, running = [windows], [self.denoising[req_id] for req_id in windows]
        if len(running) < len(self.running) or not all(one.unwatched and one.likelihood is None for one in running):
            return steps
        seconds = self._step_seconds * max(1.0, num_tokens(windows) / self._step_tokens)
        num_steps = max(1, int(min(MOST_STEPS, MOST_SECONDS / seconds)))
        ahead = [one.plan.look_ahead(num_steps, one.reserved) for one in running]
        return [dict(zip(windows, step, strict=True)) for step in zip(*ahead, strict=False)]  # as far as all are alike

    def _record_steps(self, request: Request, num_tokens: int | None = None) -> None:
        """Count the steps that ran; of a request that ended, only up to the one that brought its last token."""
        left, metrics = num_tokens, request.spec_decode_metrics
        assert metrics is not None  # from `add_request` on
        for num_masked, num_emitted in self._steps_run.pop(request.request_id):
            metrics.observe(num_masked, num_emitted)
            if left is not None and (left := left - num_emitted) <= 0:
                break

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        denoising, metrics = self.denoising[request.request_id], request.spec_decode_metrics
        kv_params, ec_params = super()._free_request(request, *args, **kwargs)
        if denoising.plan.params.trajectory and metrics is not None:
            extent = denoising.plan.extent(request.num_tokens)
            write_trajectory(metrics, extent, denoising.trajectory)
            # JSON has no infinity, which a grammar's position and EOS that is taken last are ranked by
            events = [[x if math.isfinite(x) else None for x in event] for event in denoising.trajectory]
            kv_params = (kv_params or {}) | {"diffusion": {"trajectory": events, **asdict(extent)}}
        return kv_params, ec_params

    def _free_blocks(self, request: Request) -> None:
        del self.denoising[request.request_id]
        super()._free_blocks(request)

    def _begin_denoising(self, request: Request, params: DiffusionParams) -> Denoising:
        """Plan and seed of a request. Raises ValueError for what only prompt, tokenizer and vocabulary can tell."""
        if request.use_structured_output:
            params = replace(params, edit_threshold=None)  # what the grammar has accepted stays
        if request.resumable:
            raise ValueError("a session of streamed prompts is not supported; send one prompt a request")
        if type(request.priority) is not int:  # the queue could not compare it
            raise ValueError(f"priority must be an integer, got {shown(request.priority)}; leave it out")
        if isinstance(params.suffix, str):
            raise ValueError(
                "diffusion_suffix reaches an engine as token ids; let vLLM's InputProcessor make the request"
            )
        check_token_ids(params, self.settings.vocab_size, label=PREFIX)
        num_prompt, num_suffix = request.num_prompt_tokens, len(params.suffix)
        limit = self.settings.answer_limit(params, num_prompt, request.max_tokens, self.max_model_len, num_suffix)
        sampling = sampling_of(request)
        watched = (
            sampling.output_kind != RequestOutputKind.FINAL_ONLY
            or bool(sampling.stop or sampling.repetition_detection)
            or request.use_structured_output
        )
        seed = self._draw_seed(63) if sampling.seed is None else philox.signed_64_bits(sampling.seed)
        most_tokens, num_prompt_logprobs = self._turns.budget, self._number_asked(sampling.prompt_logprobs)
        likelihood = None
        if num_prompt_logprobs >= 0 and request.request_id not in self.grammar_compile_error_reqs:
            likelihood = make_likelihood(
                params,
                request.all_token_ids[:num_prompt],
                num_prompt_logprobs,
                most_tokens,
                shift=self.settings.shift,
                longest=self.max_model_len,
                seed=seed,
            )
        return Denoising(
            plan=make_plan(
                params,
                num_prompt,
                limit,
                self.settings.shift,
                num_suffix,
                seed,
                longest=self.max_model_len,
                most_tokens=most_tokens,
                prompt_first=likelihood is not None,
            ),
            likelihood=likelihood,
            suffix_ids=list(params.suffix),
            seed=seed,
            unwatched=not watched,
            # keys and values of other blocks are others
            constraint=Constraint(request, self.structured_output_manager) if request.use_structured_output else None,
            shares_pages=self.kv_cache_manager.enable_caching
            and params.block_length == self.settings.defaults.block_length,
        )

    def _take_turns(self, output: SchedulerOutput) -> list[str]:
        """Those of the scheduled requests whose windows the step forwards."""
        costs = {req_id: self._window_tokens(req_id) for req_id in output.num_scheduled_tokens}
        strides = None
        if self.policy == SchedulingPolicy.PRIORITY:
            priorities = {req_id: self.requests[req_id].priority for req_id in costs}
            # vLLM's priorities are any integers, the lowest the most urgent: each next one has half the turns
            stride_of = {
                priority: min(2**rank, LONGEST_STRIDE) for rank, priority in enumerate(sorted({*priorities.values()}))
            }
            strides = {req_id: stride_of[priority] for req_id, priority in priorities.items()}
        return self._turns.take(costs, strides)

    def _window_tokens(self, req_id: str) -> int:
        """Tokens the request's next window forwards; guidance forwards a second, unconditional copy."""
        if scored := self.denoising[req_id].scored:
            return sum(window.end - window.start for window in scored)
        window, params = self._window(req_id), self.denoising[req_id].plan.params
        return (window.end - window.start) * (2 if params.cfg_scale > 0 else 1)

    def _window(self, req_id: str) -> Window:
        window = self.denoising[req_id].plan.window
        assert window is not None  # a full canvas is followed by another, or ends the request
        return window

    def _allocate_canvas(
        self, request: Request, num_new_tokens: int, num_new_computed_tokens: int = 0, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """vLLM's ``allocate_slots``, reserving what the plan's next windows need: a whole canvas, or a block."""
        denoising = self.denoising[request.request_id]
        needed = denoising.plan.reserved_length
        if request.status == RequestStatus.RUNNING and needed <= denoising.reserved:
            return self.kv_cache_manager.empty_kv_cache_blocks
        known = request.num_computed_tokens + num_new_computed_tokens + num_new_tokens
        kwargs |= {"num_lookahead_tokens": max(0, needed - known), "delay_cache_blocks": True}
        pages = self._allocate_slots(request, num_new_tokens, num_new_computed_tokens, *args, **kwargs)
        if pages is not None:
            needed = -(-needed // self.block_size) * self.block_size  # pages are whole
            denoising.reserved, denoising.shared = needed, denoising.shared * (request.status == RequestStatus.RUNNING)
        return pages

    def _share_pages(self, req_id: str) -> None:
        """Let other requests find the pages of the prefix whose keys and values will not change any more."""
        denoising, request = self.denoising[req_id], self.requests[req_id]
        exact = min(denoising.plan.num_cached, request.num_tokens)
        if denoising.shares_pages and exact > denoising.shared:
            self.kv_cache_manager.cache_blocks(request, exact)
            denoising.shared = exact

    def _new_canvas(self, request: Request) -> NewCanvas:
        denoising, sampling = self.denoising[request.request_id], sampling_of(request)
        plan = denoising.plan
        eos_token_id = -1 if sampling.eos_token_id is None else sampling.eos_token_id
        return NewCanvas(
            token_ids=request.all_token_ids[: plan.canvas_start],
            canvas_ids=plan.canvas_ids,
            suffix_ids=denoising.suffix_ids,
            num_emitted=request.num_tokens - plan.canvas_start,
            eos_token_id=eos_token_id,
            ends_at=frozenset([eos_token_id, *(sampling.stop_token_ids or ())]),
            lora_request=request.lora_request,
            params=replace(plan.params, suffix=(), template=()),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=min(sampling.top_k, self.settings.vocab_size),
            min_p=sampling.min_p,
            seed=denoising.seed,
            answer_start=request.num_prompt_tokens,
            controls=Controls.of(sampling),
            num_logprobs=max(self._number_asked(sampling.num_logprobs), plan.params.trajectory - 1),
            logprob_ids=tuple(sampling.logprob_token_ids or ()),
            has_grammar=denoising.constraint is not None,
            num_prompt_logprobs=self._number_asked(sampling.prompt_logprobs),
        )

    def _number_asked(self, asked: int | None) -> int:
        """Of likeliest tokens, -1 where nothing is to be told."""
        if asked is None:
            return -1
        return self.settings.vocab_size if asked == -1 else asked


def sampling_of(request: Request) -> SamplingParams:
    assert request.sampling_params is not None  # only a request to pool has none, and no diffusion model takes one
    return request.sampling_params


def tensors_of(likelihood: Likelihood) -> LogprobsTensors:
    """vLLM's message of a prompt's tokens, the first one left out."""
    logprobs = likelihood.logprobs.astype(np.float32)
    ids, values, ranks = map(torch.from_numpy, (likelihood.ids, logprobs, likelihood.ranks))
    return LogprobsTensors(ids, values, ranks)


def num_tokens(windows: dict[str, Window]) -> int:
    """That a step of these windows forwards, guidance left out."""
    return sum(window.end - window.start for window in windows.values())
