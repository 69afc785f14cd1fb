"""Several denoising steps in one engine step: when there may be, where they are cut, and that it changes no token."""

import math

import pytest
from support.cases import POLICIES, PolicyCase, difference
from support.engines import counted_launches, drive, engine, model_runner, num_forwards, scheduler
from support.steps import Steps, case, check, leave_engines_empty, nothing_is_left  # noqa: F401
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

from dllm_plugin.scheduler import scheduler as scheduling


@pytest.fixture(scope="module")
def narrow():
    return engine("llada", max_model_len=64, max_num_batched_tokens=64)


def unwatched(one: PolicyCase) -> tuple[list[int], SamplingParams]:
    prompt, params = one.request
    params.output_kind = RequestOutputKind.FINAL_ONLY
    return prompt, params


@pytest.fixture
def wide(monkeypatch):
    """An engine that has run before, and whose steps are never too slow to look ahead."""
    drive(engine("llada"), [case(2, 8).request])
    monkeypatch.setattr(scheduling, "MOST_SECONDS", math.inf)
    return engine("llada")


def test_steps_that_nobody_watches_share_an_engine_step(wide):
    """Up to eight over the same positions: after A's last one there are none, since it fills the canvas."""
    cases = [case(10, 8, "a"), case(20, 9, "b")]
    steps = Steps(wide)
    for one in cases:
        steps.add(*unwatched(one))
    steps.drain()
    assert steps.table == [("AB", 2), ("B", 2)]  # 8 + 2, and again
    check(steps, *cases)
    nothing_is_left(wide)


def test_each_of_the_steps_is_counted_with_the_masks_before_it(wide, monkeypatch):
    counted = []
    monkeypatch.setattr(scheduling.RequestSpecDecodeMetrics, "observe", lambda _, *numbers: counted.append(numbers))
    Steps(wide).add(*unwatched(case(10, 8, "a")))
    while wide.llm_engine.has_unfinished_requests():
        wide.llm_engine.step()
    assert [num_masked for num_masked, _ in counted] == [*range(10, 0, -1)]
    assert sum(num_emitted for _, num_emitted in counted) == 10


@pytest.mark.parametrize("seconds, table", [(1e-9, [("A", 10)]), (math.inf, [("A", 2)])], ids=["slow", "fast"])
def test_how_long_a_step_takes_is_known_from_the_last_one(seconds, table, monkeypatch):
    """A request that arrives is not to wait for eight slow ones."""
    one = case(10, 8, "a")
    llm = engine("llada")
    drive(llm, [one.request])
    monkeypatch.setattr(scheduling, "MOST_SECONDS", seconds)
    steps = Steps(llm)
    steps.add(*unwatched(one))
    assert steps.drain().table == table


def first_step_after(llm, before: PolicyCase, one: PolicyCase, most_seconds: float, monkeypatch) -> Steps:
    """The first engine step of a request, after another one each of whose steps took 0.1 s."""
    steps = Steps(llm)
    steps.add(*unwatched(before))
    steps.drain()
    monkeypatch.setattr(scheduler(llm), "_step_seconds", 0.1)
    monkeypatch.setattr(scheduling, "MOST_SECONDS", most_seconds)
    steps.add(*unwatched(one))
    steps.step()
    return steps


def test_a_larger_step_is_expected_to_take_longer(wide, monkeypatch):
    """After a step of ten tokens, one of two hundred is not run eight times before its time is known."""
    steps = first_step_after(wide, case(2, 8, "a"), case(10, 190, "b"), 1.0, monkeypatch)
    assert len(steps.emitted) == 2 and scheduler(wide).denoising and steps.table[-1] == ("B", 1)
    (denoising,) = scheduler(wide).denoising.values()
    assert denoising.plan.timestep == 1


def test_a_smaller_step_is_not_expected_to_be_quicker(wide, monkeypatch):
    """A small step takes as long as its launches do."""
    first_step_after(wide, case(2, 190, "a"), case(10, 8, "b"), 0.1, monkeypatch)
    (denoising,) = scheduler(wide).denoising.values()
    assert denoising.plan.timestep == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"stop": "never written"},  # of which only the front end knows
        {"repetition_detection": RepetitionDetectionParams(max_pattern_size=2, min_count=9)},
        {"output_kind": RequestOutputKind.CUMULATIVE},
    ],
    ids=str,
)
def test_one_watched_request_has_every_step_seen(settings):
    steps = Steps(engine("tiny-llada"))
    for extra in ({}, settings):
        greedy = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "output_kind": RequestOutputKind.FINAL_ONLY}
        steps.add([5, 6, 7], SamplingParams(**greedy | extra))
    steps.drain()
    assert steps.table == [("AB", 8)]


def test_who_arrives_joins_after_eight_steps_at_most(wide):
    cases = [case(16, 8, "a"), case(9, 9, "b")]
    steps = Steps(wide)
    steps.add(*unwatched(cases[0]))
    steps.step()
    steps.add(*unwatched(cases[1]))
    steps.drain()
    assert steps.table == [("A", 1), ("AB", 1), ("B", 1)]  # 8, 8, 1
    check(steps, *cases)


def test_who_waits_joins_when_one_has_ended(monkeypatch):
    """A and B take both seats. Steps are looked ahead, since C is not admitted before A ends; and then it is at once."""
    monkeypatch.setattr(scheduling, "MOST_SECONDS", math.inf)
    llm = engine("llada", max_num_seqs=2)
    cases = [case(20, 10, "a"), case(22, 8, "b"), case(20, 10, "c")]
    drive(llm, [cases[0].request])
    steps = Steps(llm)
    for one in cases:
        steps.add(*unwatched(one))
    steps.drain()
    assert steps.table == [("AB", 3), ("BC", 1), ("C", 3)]  # 8 + 8 + 4, 2, 8 + 8 + 2
    check(steps, *cases)


def test_nobody_looks_ahead_past_who_waits_for_a_turn(narrow, monkeypatch):
    """Three canvases fit the budget together and their continuations do not: each engine step is one denoising step."""
    monkeypatch.setattr(scheduling, "MOST_SECONDS", math.inf)
    cases = [case(24, 4, name, canvas=12, steps=12) for name in "abc"]
    steps = Steps(narrow)
    for one in cases:
        steps.add(*unwatched(one))
    steps.drain()
    # two steps of eight and four, then 36 of 28 tokens of which the budget holds two at once
    assert steps.ran == ["ABC"] * 2 + ["AB", "AC", "BC"] * 6
    check(steps, *cases)


@pytest.mark.parametrize("unread", [0, 1])
@pytest.mark.parametrize("checkpoint", ["llada-loud", "dream-loud"])
def test_an_end_cuts_the_steps_that_were_looked_ahead(checkpoint, unread, monkeypatch):
    """Tokens and forward passes are the reference's; on a GPU, where the host reads one step late, one pass is in vain."""
    monkeypatch.setattr(scheduling, "MOST_SECONDS", math.inf)
    llm = engine(checkpoint)
    runner = model_runner(llm)
    monkeypatch.setattr(runner, "overlaps", bool(unread))
    cases = [
        PolicyCase(checkpoint, policy, 24, block, None, prompt, eos=True)
        for policy in POLICIES
        for block, prompt in ((None, 9), (12, 1), (None, 5), (8, 5))
    ]
    shared = 0
    for one in cases:
        with counted_launches(llm) as launches:
            (output,), running = drive(llm, [unwatched(one)])
        assert not difference(one, output)
        assert num_forwards(output) <= len(launches) <= num_forwards(output) + unread
        shared += len(running) < num_forwards(output)
    assert shared > len(cases) // 2


def test_requests_of_all_kinds_look_ahead_together(wide):
    """Some end, and the others go on from where they were."""
    cases = [
        PolicyCase("llada", policy, 24, block, None, prompt, eos=True)
        for policy in POLICIES
        for block, prompt in ((None, 9), (8, 5))
    ]
    outputs, running = drive(wide, [unwatched(one) for one in cases])
    assert not any(difference(*pair) for pair in zip(cases, outputs, strict=True))
    assert len(running) < max(num_forwards(output) for output in outputs)


def test_summaries_end_with_the_store(wide):
    """A may grow by a few tokens and B by many; A lies last, and what B may grow by would end behind the store."""
    store = model_runner(wide).state
    drive(wide, [case(2, 8).request])
    wide.llm_engine.step()  # the worker hears that it has ended
    store._free.sort()
    stride = store.tokens.shape[1]
    cases = [case(4, stride - 20, "last"), case(60, 8, "long")]
    steps = Steps(wide)
    for one in cases:
        steps.add(*unwatched(one))
    steps.step()
    (slot,) = (request.slot for name, request in store.requests.items() if name.startswith("A"))
    assert slot == len(store.tokens) - 1 and store.tokens.shape[1] == stride
    check(steps.drain(), *cases)
