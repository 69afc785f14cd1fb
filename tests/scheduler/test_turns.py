"""Turns: every running request takes part in a bounded number of steps, whatever its neighbours are.

`simulate` is the scheduler without vLLM: requests come, each wants a number of windows, and leave.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_plugin.scheduler.turns import Turns


@dataclass
class Simulated:
    name: str
    windows: list[int]  # tokens of each
    arrives: int = 0
    stride: int = 1


@dataclass
class Step:
    running: dict[str, int]  # window of each running request
    served: list[str]


def simulate(budget: int, requests: list[Simulated], most_steps: int = 10_000) -> list[Step]:
    turns, left, steps = Turns(budget), {one.name: list(one.windows) for one in requests}, []
    while any(left.values()):
        running = [one for one in requests if one.arrives <= len(steps) and left[one.name]]
        windows = {one.name: left[one.name][0] for one in running}
        served = turns.take(windows, {one.name: one.stride for one in running}) if running else []
        steps.append(Step(windows, served))
        for name in served:
            left[name].pop(0)
        assert len(steps) < most_steps, "no progress"
    return steps


def waits(steps: list[Step], requests: list[Simulated]) -> Iterator[tuple[Simulated, list[Step], set[str]]]:
    """Each run of steps in which a request was running and had no turn, and who else was running then."""
    for one in requests:
        waiting = [one.name in step.running and one.name not in step.served for step in steps]
        for waits_here, run in groupby(zip(waiting, steps, strict=True), key=itemgetter(0)):
            if waits_here:
                wait = [step for _, step in run]
                yield one, wait, set().union(*(step.running for step in wait)) - {one.name}


@st.composite
def loads(draw, largest=1.0, strides=(1,)):
    budget = draw(st.integers(4, 64))
    window = st.integers(1, max(1, int(budget * largest)))
    requests = draw(
        st.lists(
            st.builds(
                Simulated,
                name=st.just(""),
                windows=st.lists(window, min_size=1, max_size=12),
                arrives=st.integers(0, 12),
                stride=st.sampled_from(strides),
            ),
            min_size=1,
            max_size=10,
        )
    )
    for i, one in enumerate(requests):
        one.name = f"r{i}"
    return budget, requests


@settings(max_examples=200, deadline=None)
@given(loads(largest=2.5))
def test_a_step_holds_its_budget_and_serves_somebody(load):
    budget, requests = load
    for step in simulate(budget, requests):
        assert bool(step.served) == bool(step.running)
        total = sum(step.running[name] for name in step.served)
        assert total <= budget or len(step.served) == 1


@settings(max_examples=200, deadline=None)
@given(loads(largest=2.5))
def test_who_waits_waits_for_each_neighbour_at_most_once(load):
    """A request is passed over for those before it, each of which goes once. Who comes after it goes into gaps only."""
    budget, requests = load
    for _, wait, neighbours in waits(simulate(budget, requests), requests):
        assert len(wait) <= len(neighbours)


@settings(max_examples=200, deadline=None)
@given(loads())
def test_a_wait_is_bounded_by_the_neighbours_windows(load):
    """S tokens of neighbours, each counted with its largest window, delay a window of w tokens by S / (B - w + 1) steps."""
    budget, requests = load
    for one, wait, neighbours in waits(simulate(budget, requests), requests):
        total = sum(max(step.running.get(name, 0) for step in wait) for name in neighbours)
        own = wait[0].running[one.name]
        assert len(wait) <= total // (budget - own + 1)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 6))
def test_windows_that_fill_a_step_evenly_wait_no_longer_than_their_sum(per_step, lengths, arrives):
    """Equal windows of which a step holds a whole number: the sum of the neighbours over the budget, rounded up, plus one."""
    window, budget = 8, 8 * per_step
    requests = [Simulated(f"r{i}", [window] * n, arrives * (i % 2)) for i, n in enumerate(lengths)]
    for _, wait, neighbours in waits(simulate(budget, requests), requests):
        assert len(wait) <= math.ceil(window * len(neighbours) / budget) + 1


@settings(max_examples=150, deadline=None)
@given(loads(strides=(1, 2, 4, 16)))
def test_strides_bound_the_wait_too(load):
    budget, requests = load
    for one, wait, neighbours in waits(simulate(budget, requests), requests):
        assert len(wait) <= one.stride * len(neighbours) + one.stride


SHARES = [
    # strides of four requests that each fill the budget, and the turns each has of 60
    pytest.param([1, 1, 1, 1], [15, 15, 15, 15], id="equal"),
    pytest.param([1, 2, 2, 4], [28, 13, 13, 6], id="halves-and-a-quarter"),
    pytest.param([1, 1, 16, 16], [29, 29, 1, 1], id="hardly"),
]


@pytest.mark.parametrize("strides, expected", SHARES)
def test_a_stride_is_a_share(strides, expected):
    requests = [Simulated(f"r{i}", [10] * 100, stride=stride) for i, stride in enumerate(strides)]
    steps = simulate(10, requests)[:60]
    assert [sum(one.name in step.served for step in steps) for one in requests] == expected


@pytest.mark.parametrize(
    "windows, expected",
    [([6, 6, 6], [20] * 3), ([4, 4, 4], [40] * 3), ([3] * 7, [26, 26, 26, 26, 26, 25, 25])],
    ids=str,
)
def test_equal_requests_have_equal_shares(windows, expected):
    steps = simulate(10, [Simulated(f"r{i}", [w] * 100) for i, w in enumerate(windows)])[:60]
    assert [sum(f"r{i}" in step.served for step in steps) for i in range(len(windows))] == expected


QUEUES = [
    # budget, windows of the requests and when each comes, who is served in the first steps
    pytest.param(10, [(6, 0), (6, 0), (4, 0)], ["ac", "bc", "ac", "bc"], id="a-small-one-fills-the-gap"),
    pytest.param(10, [(9, 0), (9, 0), (1, 2)], ["a", "b", "ac", "bc", "ac"], id="the-late-one-finds-room"),
    pytest.param(10, [(10, 0), (2, 1), (2, 1)], ["a", "a", "bc", "a", "bc"], id="heavy-and-short-alternate"),
    pytest.param(10, [(25, 0), (3, 0), (3, 0)], ["a", "bc", "a", "bc"], id="larger-than-the-budget-runs-alone"),
]


@pytest.mark.parametrize("budget, requests, expected", QUEUES)
def test_who_is_served(budget, requests, expected):
    simulated = [Simulated("abc"[i], [w] * 50, arrives) for i, (w, arrives) in enumerate(requests)]
    assert ["".join(step.served) for step in simulate(budget, simulated)][: len(expected)] == expected


@pytest.mark.parametrize("window", [4, 5])
def test_nobody_is_owed_a_step_after_one_that_serves_all(window):
    """The queue begins anew, also where the windows fill the budget to the last token."""
    turns = Turns(10)
    assert turns.take({"a": 6, "b": 6}) == ["a"]
    assert turns.take({"a": window, "b": window}) == ["a", "b"]
    assert turns.take({"a": 6, "b": 6}) == ["a"]


def test_a_stream_of_newcomers_starves_nobody():
    requests = [Simulated("heavy", [10] * 20)] + [Simulated(f"new{i}", [2], arrives=i) for i in range(200)]
    steps = simulate(10, requests)
    assert max(len(wait) for _, wait, _ in waits(steps, requests[:1])) <= 2
