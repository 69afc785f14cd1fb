"""Engine steps driven one by one, for tests of the scheduler inside the real engine."""

import itertools
import string
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from support.cases import PolicyCase, difference
from support.engines import model_runner, scheduler

_run = itertools.count()
_used: list["Steps"] = []


@pytest.fixture(autouse=True)
def leave_engines_empty():
    """A test that fails leaves its requests behind; they must not reach the next one."""
    yield
    for steps in _used:
        steps.abort(*steps.emitted)
        steps.drain()
    _used.clear()


class Steps:
    """Engine steps driven one by one, with a record of each. Requests are named A, B, C in the order they are added."""

    def __init__(self, llm) -> None:
        self.llm = llm
        self.run = next(_run)
        self.ran: list[str] = []  # the requests of every step
        self.emitted: dict[str, list[int]] = {}  # tokens of each request so far
        self.finished: dict[str, object] = {}
        _used.append(self)

    def add(self, case_or_prompt, params=None, **kwargs) -> str:
        name = string.ascii_uppercase[len(self.emitted)]
        prompt, params = case_or_prompt.request if params is None else (case_or_prompt, params)
        self.emitted[name] = []
        self.llm.llm_engine.add_request(self._id(name), {"prompt_token_ids": prompt}, params, **kwargs)
        return name

    def step(self) -> None:
        with self._recorded():
            outputs = self.llm.llm_engine.step()
        for output in outputs:
            name, tokens = output.request_id[0], list(output.outputs[0].token_ids)
            before = self.emitted[name]
            assert tokens[: len(before)] == before, "a token that was emitted has changed"
            assert len(tokens) > len(before) or output.finished, "an output without news"
            self.emitted[name] = tokens
            if output.finished:
                self.finished[name] = output

    def drain(self) -> "Steps":
        while self.llm.llm_engine.has_unfinished_requests():
            self.step()
            assert len(self.ran) < 10_000, "the engine makes no progress"
        return self

    def abort(self, *names) -> None:
        self.llm.llm_engine.abort_request([self._id(name) for name in names])

    @property
    def table(self) -> list[tuple[str, int]]:
        return [(ran, len(list(group))) for ran, group in itertools.groupby(self.ran)]

    def _id(self, name) -> str:
        return f"{name}-steps-{self.run}"

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Notes of which requests the scheduler gives the worker windows."""
        inside = scheduler(self.llm)
        schedule = inside.schedule

        def record(*args, **kwargs):
            output = schedule(*args, **kwargs)
            windows = output.steps[0] if output.steps else {}
            self.ran.append("".join(sorted(req_id[0] for req_id in windows)))
            return output

        inside.schedule = record
        try:
            yield
        finally:
            del inside.schedule


def check(steps, *cases) -> None:
    """Every request's result is the reference's, as if it had been alone."""
    names = sorted(steps.emitted)
    wrong = [difference(case, steps.finished[name]) for name, case in zip(names, cases, strict=True)]
    assert not any(wrong), "\n".join(wrong)


def run_together(llm, cases: list[PolicyCase]) -> Steps:
    """The steps of an engine that gets all the cases at once; each has the reference's result, and nothing is left."""
    steps = Steps(llm)
    for one in cases:
        steps.add(one)
    steps.drain()
    check(steps, *cases)
    nothing_is_left(llm)
    return steps


def nothing_is_left(llm) -> None:
    """No request, no page, no slot is held."""
    inside, store = scheduler(llm), model_runner(llm).state
    assert not inside.requests and not inside.denoising
    pool = inside.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one block is vLLM's null block
    # the worker hears of the last ones in the next step
    assert set(store.requests) <= inside.finished_req_ids


def case(tokens=12, prompt=8, note="", **settings) -> PolicyCase:
    return PolicyCase(
        **{"checkpoint": "llada", "policy": "low_confidence"} | settings, max_tokens=tokens, prompt=prompt, note=note
    )
