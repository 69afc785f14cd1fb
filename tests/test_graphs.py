"""Denoising steps replayed from graphs give the tokens of steps that are run.

There is no CUDA here: a recorded step is run again instead, on the tensors that a graph would read, so that a number which
was baked in, or a tensor that nobody loads, gives another token.
"""

import itertools
from collections.abc import Callable, Iterator

import pytest
import test_parity
import test_strategies
import torch
from support import strategy_cases
from support.cases import difference, random_prompt
from support.checkpoints import EOS
from support.engines import drive, engine, model_runner
from test_parity import FAMILIES
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from dllm_plugin.worker import graphs
from dllm_plugin.worker.batch import StepBatch
from dllm_plugin.worker.graphs import StepGraphs
from dllm_plugin.worker.summary import StepNumbers


class Rerun(StepGraphs):
    """Step graphs that run a recorded step again where a GPU would replay it."""

    num_replays = 0

    def __init__(self, of: StepGraphs, runner) -> None:
        super().__init__(of.run, of.store, runner.vllm_config)
        self.enabled = True

    def capture(self, batch: StepBatch) -> tuple[StepNumbers, Callable[[], None]]:
        records = torch.empty(0) if batch.layout.needs.records else None
        numbers = StepNumbers(torch.empty(0, dtype=torch.int64), records)

        def replay() -> None:
            self.num_replays += 1
            for buffer, written in zip(numbers, self.run(batch), strict=True):
                if buffer is not None:
                    buffer.resize_(written.shape).copy_(written)

        return numbers, replay


@pytest.fixture
def recording(monkeypatch) -> Iterator[Callable]:
    """``recording(checkpoint)``: its engine, and the graphs that its steps are replayed from for the time of a test."""

    def start(checkpoint: str):
        llm = engine(checkpoint)
        runner = model_runner(llm)
        rerun = Rerun(runner.graphs, runner)
        monkeypatch.setattr(runner, "graphs", rerun)
        return llm, rerun

    return start


@pytest.mark.parametrize("checkpoint", FAMILIES)
def test_every_strategy(recording, checkpoint):
    llm, rerun = recording(checkpoint)
    policy = {"remasking": strategy_cases.by_probability(checkpoint)}
    strategies = ({}, *strategy_cases.CACHES, {"cache": "dual", "threshold": 0.05}, {"cache": "prefix", "factor": 0.7})
    cases = strategy_cases.grid(checkpoint, strategy_cases.SHAPES, *(policy | strategy for strategy in strategies))
    cases += [case for case in test_strategies.PIPELINED if case.checkpoint == checkpoint]
    outputs = strategy_cases.run(llm, cases) + strategy_cases.run(llm, cases[::3], alone=True)
    wrong = [difference(*pair) for pair in zip(cases + cases[::3], outputs, strict=True)]
    assert not any(wrong), "\n".join(filter(None, wrong))
    assert rerun.num_replays > 50 and len(rerun.recorded) > 5


@pytest.mark.parametrize("checkpoint", [*FAMILIES, *test_parity.LOUD])
def test_every_policy(recording, checkpoint):
    """With guidance, suppression, several canvases and early ends, alone and sixteen at a time."""
    llm, rerun = recording(checkpoint)
    cases = [case for case in test_parity.CASES if case.checkpoint == checkpoint]
    together, _ = drive(llm, [case.request for case in cases])
    alone = [drive(llm, [case.request])[0][0] for case in cases[::3]]
    wrong = [difference(*pair) for pair in zip(cases + cases[::3], together + alone, strict=True)]
    assert not any(wrong), "\n".join(filter(None, wrong))
    assert rerun.num_replays > 50


@pytest.mark.parametrize("rule", [{"threshold": (0.9, 0.0)}, {"factor": (0.7, 5.0)}], ids=str)
def test_a_graph_does_not_keep_the_pace_it_was_recorded_with(recording, rule):
    """The second request has the first one's shape, and takes several positions a step instead of one."""
    llm, rerun = recording("llada")
    ((name, values),) = rule.items()
    settings = {"remasking": "low_confidence", "block_length": 8}
    for value in values:
        (one,) = strategy_cases.grid("llada", strategy_cases.SHAPES[:1], settings | {name: value})
        (output,) = strategy_cases.run(llm, [one])
        assert not difference(one, output)
    assert len(rerun.recorded) == 1 and rerun.num_replays > 0


FILTERS = ({}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.9, "min_p": 0.05})


@pytest.mark.parametrize("filters", [({},) * 4, FILTERS], ids=["plain", "filtered"])
def test_samples_are_those_of_steps_that_are_run(recording, filters):
    """The graphs of the second round serve other filters than they were recorded with."""
    rounds = [
        [
            (
                random_prompt(9, f"sampled {i}"),
                SamplingParams(temperature=1.0, seed=i, max_tokens=12, detokenize=False, ignore_eos=True, **asked),
            )
            for i, asked in enumerate(order)
        ]
        for order in (filters, filters[::-1])
    ]
    run = [drive(engine("llada"), requests)[0] for requests in rounds]
    llm, rerun = recording("llada")
    for requests, outputs in zip(rounds * 2, run * 2, strict=True):
        replayed, _ = drive(llm, requests)
        assert [o.outputs[0].token_ids for o in replayed] == [o.outputs[0].token_ids for o in outputs]
    assert rerun.num_replays > 10


def test_least_used_graphs_make_room(recording, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    llm, rerun = recording("dream")
    cases = [case for case in test_parity.SHAPE_CASES if case.checkpoint == "dream"][::3]
    for case in cases * 2:
        (output,), _ = drive(llm, [case.request])
        assert not difference(case, output)
        assert len(rerun.recorded) <= 2


def test_memory_that_is_full_is_given_back(recording, monkeypatch):
    """Each graph is made to look as if it took 8 bytes; two fit, and a third begins anew."""
    llm, rerun = recording("dream")
    reserved = itertools.count(step=8)
    monkeypatch.setattr(Rerun, "reserved_bytes", property(lambda self: next(reserved)), raising=False)
    rerun.most_bytes = 12
    most = 0
    for case in [case for case in test_parity.SHAPE_CASES if case.checkpoint == "dream"][::3] * 2:
        (output,), _ = drive(llm, [case.request])
        assert not difference(case, output)
        most = max(most, len(rerun.recorded))
    assert most == 2


def test_canvases_that_move_take_their_graphs_with_them(recording):
    """A longer sequence than any before has the canvases copied to larger tensors, which no graph knows."""
    llm, rerun = recording("llada")
    store = model_runner(llm).state
    case = test_parity.SHAPE_CASES[1]
    for _ in range(2):
        drive(llm, [case.request])
    before, generation = dict(rerun.recorded), store.generation
    assert before
    long = random_prompt(store.tokens.shape[1] + 1, "long")
    params = SamplingParams(temperature=0.0, max_tokens=2, detokenize=False, stop_token_ids=[EOS])
    drive(llm, [(long, params)])
    assert store.generation > generation
    (output,), _ = drive(llm, [case.request])
    assert not difference(case, output)
    assert not set(map(id, before.values())) & set(map(id, rerun.recorded.values()))


def test_a_graph_that_cannot_be_recorded_costs_no_request(recording, monkeypatch):
    """It is tried once, and no other afterwards, in the same engine step neither."""
    llm, rerun = recording("llada")
    tried = []

    def out_of_memory(batch):
        tried.append(batch)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(rerun, "capture", out_of_memory)
    prompt, params = test_parity.SHAPE_CASES[1].request
    params.output_kind = RequestOutputKind.FINAL_ONLY
    for _ in range(2):
        (output,), _ = drive(llm, [(prompt, params)])
        assert not difference(test_parity.SHAPE_CASES[1], output)
    assert len(tried) == 1 and not rerun.enabled and not rerun.recorded
