"""The vLLM scheduler, with denoising windows instead of tokens to compute."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from dllm_plugin.engine_config import engine_defaults
from dllm_plugin.params import parse_request
from dllm_plugin.scheduler.output import Canvas, DiffusionModelRunnerOutput, DiffusionSchedulerOutput
from dllm_plugin.scheduler.window import DenoisingPlan


class DiffusionScheduler(Scheduler):
    """Drives every request's plan; queues, memory, stops, preemption and LoRA accounting stay vLLM's.

    - A scheduled request runs its plan's next window. vLLM itself counts only the tokens that are final.
    - A request is admitted when its whole canvas fits the KV cache and its window fits the step's token budget.
    - First come, first served: where the budget cannot hold every running request, the latest wait for a later step.
    - A window is never chunked, since its queries see each other; one larger than the budget runs alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.defaults = engine_defaults(self.vllm_config)
        self.plans: dict[str, DenoisingPlan] = {}
        self.seeds: dict[str, int] = {}
        self._draw_seed = random.Random(self.vllm_config.model_config.seed).getrandbits
        self._allocate_slots = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_canvas

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            params = parse_request(request.sampling_params.extra_args, self.defaults)
            limit = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
            self.plans[request.request_id] = DenoisingPlan(params, request.num_prompt_tokens, limit)
            seed = request.sampling_params.seed
            self.seeds[request.request_id] = self._draw_seed(63) if seed is None else seed
            request.spec_decode_metrics = RequestSpecDecodeMetrics.new(params.canvas_length)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        with self._within_token_budget():
            output = super().schedule(throttle_prefills)
        # the worker has no canvas of these: they are new, or were preempted
        begun = {data.req_id for data in output.scheduled_new_reqs} | output.scheduled_cached_reqs.resumed_req_ids
        canvases, windows = {}, {}
        for req_id in output.num_scheduled_tokens:
            plan = self.plans[req_id]
            if plan.canvas_is_full:
                plan.start_canvas()
                canvases[req_id] = self._canvas(self.requests[req_id])
            elif req_id in begun:
                plan.restart_canvas()
                canvases[req_id] = self._canvas(self.requests[req_id])
            windows[req_id] = plan.next_window()
        return DiffusionSchedulerOutput(**vars(output), canvases=canvases, windows=windows)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        assert isinstance(scheduler_output, DiffusionSchedulerOutput)
        if scheduler_output.windows:
            assert isinstance(model_runner_output, DiffusionModelRunnerOutput)
            emitted = dict(zip(model_runner_output.req_ids, model_runner_output.sampled_token_ids, strict=True))
            for req_id, window in scheduler_output.windows.items():
                if (request := self.requests.get(req_id)) is None:
                    continue  # aborted while the step ran
                self.plans[req_id].advance(model_runner_output.num_masked[req_id])
                request.spec_decode_metrics.observe(window.num_masked, len(emitted[req_id]))
        return super().update_from_output(scheduler_output, model_runner_output)

    def _free_blocks(self, request: Request) -> None:
        del self.plans[request.request_id], self.seeds[request.request_id]
        super()._free_blocks(request)

    @contextmanager
    def _within_token_budget(self) -> Iterator[None]:
        """Let one call of vLLM's ``schedule`` see only the requests whose windows fit the token budget together."""
        budget = self.max_num_scheduled_tokens
        num_scheduled = 0
        for request in self.running:
            request.num_computed_tokens = 0  # every window begins at the start of the sequence
            cost = self._window_tokens(request)
            if cost <= budget or num_scheduled == 0:
                num_scheduled += 1
            else:
                # schedule() counts current_step up before it compares: this call alone passes the request over
                request.next_decode_eligible_step = self.current_step + 2
            budget -= cost
        num_admitted = 0
        for request in self.waiting:
            cost = self._window_tokens(request)
            if cost > budget and num_scheduled + num_admitted > 0:
                break
            num_admitted += 1
            budget -= cost
        max_num_active_reqs = self.max_num_active_reqs
        num_active = len(self.running) + self.num_waiting_for_streaming_input + num_admitted
        self.max_num_active_reqs = min(max_num_active_reqs, num_active)
        try:
            yield
        finally:
            self.max_num_active_reqs = max_num_active_reqs

    def _window_tokens(self, request: Request) -> int:
        """Tokens the request's next window forwards; guidance forwards a second, unconditional copy."""
        plan = self.plans[request.request_id]
        return plan.next_length * (2 if plan.params.cfg_scale > 0 else 1)

    def _allocate_canvas(
        self, request: Request, num_new_tokens: int, num_new_computed_tokens: int = 0, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """vLLM's ``allocate_slots``, reserving the whole canvas so that its later windows always have their pages."""
        known = request.num_computed_tokens + num_new_computed_tokens + num_new_tokens
        kwargs["num_lookahead_tokens"] = max(0, self.plans[request.request_id].next_length - known)
        return self._allocate_slots(request, num_new_tokens, num_new_computed_tokens, *args, **kwargs)

    def _canvas(self, request: Request) -> Canvas:
        plan, sampling = self.plans[request.request_id], request.sampling_params
        return Canvas(
            token_ids=request.all_token_ids[: plan.canvas_start],
            length=plan.canvas_length,
            num_emitted=request.num_tokens - plan.canvas_start,
            params=plan.params,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=self.seeds[request.request_id],
        )
