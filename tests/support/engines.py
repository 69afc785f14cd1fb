"""Engines in the process of the tests, kept to its end, and what is inside of them."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

from support.checkpoints import folder

torch.set_num_threads(1)  # OMP_NUM_THREADS comes too late where a test module imports torch first


@functools.cache
def engine(checkpoint: str | Path, **settings: Any) -> LLM:
    """An engine in this process, kept to its end: closing one takes vLLM's process groups from the others."""
    return new_engine(folder(checkpoint), **settings)


def new_engine(model: Path, **settings: Any) -> LLM:
    has_tokenizer = (model / "tokenizer_config.json").exists()
    defaults = {
        "dtype": "float32",
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 64 << 20,
        "use_tqdm_on_load": False,
        "skip_tokenizer_init": not has_tokenizer,
    }
    config = settings.pop("additional_config", {})
    if isinstance(
        wide := config.get("diffusion", {}), dict
    ):  # what a request leaves open is as in the reference decoders
        config = {**config, "diffusion": {"profile": "exact", **wide}}
    return LLM(model=str(model), additional_config=config, **defaults | settings)


def core(llm: LLM) -> Any:
    """vLLM's EngineCore of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core


def scheduler(llm: LLM) -> Any:
    return core(llm).scheduler


def model_runner(llm: LLM) -> Any:
    return core(llm).model_executor.driver_worker.worker.model_runner


def num_forwards(output: RequestOutput) -> int:
    """Denoising steps of a finished request, from the public result."""
    return sum(output.outputs[0].spec_decode_metrics.histogram)


@contextmanager
def counted_launches(llm: LLM) -> Iterator[list[None]]:
    """Its length is the number of denoising steps that the worker begins meanwhile."""
    runner, begun = model_runner(llm), []
    launch = runner.launch
    runner.launch = lambda *args: begun.append(None) or launch(*args)
    try:
        yield begun
    finally:
        del runner.launch


_request_number = itertools.count()


def drive(
    llm: LLM, requests: Sequence[tuple[list[int], SamplingParams]], arrivals: Sequence[int] | None = None
) -> tuple[list[RequestOutput], list[int]]:
    """Run (prompt, parameters) through the engine's own step(); returns final outputs and the running requests by step.

    arrivals[i]: engine steps done before request i is added; all at once if not given.
    """
    run = next(_request_number)
    arrivals = arrivals or [0] * len(requests)
    finished: dict[str, RequestOutput] = {}
    running: list[int] = []
    while len(finished) < len(requests):
        for i, (prompt, params) in enumerate(requests):
            if arrivals[i] == len(running):
                llm.llm_engine.add_request(f"{run}-{i}", {"prompt_token_ids": prompt}, params)
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = output
        running.append(len(scheduler(llm).running))
        assert len(running) < 100_000, "the engine makes no progress"
    return [finished[f"{run}-{i}"] for i in range(len(requests))], running
