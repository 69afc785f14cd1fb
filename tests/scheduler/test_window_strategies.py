"""The windows of every strategy, as tables of steps, and what holds for any course of a request."""

import copy
import math
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_plugin.params import HOLE, DiffusionParams
from dllm_plugin.policies import POLICIES
from dllm_plugin.scheduler.plan import Plan
from dllm_plugin.scheduler.strategies import make_plan
from dllm_plugin.scheduler.window import ActiveBlock, Attention, Window


def plan_of(
    prompt: int = 10,
    tokens: int = 8,
    shift: int = 0,
    suffix: int = 0,
    room: int | None = None,
    started: bool = True,
    **params,
) -> Plan:
    """A plan for a response of `tokens`, or of `room` where that is more than the template needs."""
    least = len(params.get("template", ())) or 1
    limit = prompt + max(least, room or (least if "template" in params else tokens))
    plan = make_plan(DiffusionParams(**params), prompt, limit, shift, suffix)
    if started:
        plan.start_canvas()
    return plan


def row(window: Window) -> tuple:
    """(start, end, visible, [(start, end, masks, quota) of each active block])."""
    blocks = [(block.start, block.end, block.num_masked, block.quota) for block in window.blocks]
    return window.start, window.end, window.visible, blocks


def table(plan: Plan, *taken: int | Sequence[int]) -> list[tuple]:
    """The rows of a canvas. `taken`: positions unmasked in each step, a list where several blocks are active; after
    the last of them, and without any, each block's quota."""
    rows: list[tuple] = []
    while plan.window is not None:
        rows.append(row(plan.window))
        blocks = plan.window.blocks
        number = taken[len(rows) - 1] if len(rows) <= len(taken) else [block.quota for block in blocks]
        numbers = [number] if isinstance(number, int) else number
        plan.advance([block.num_masked - n for block, n in zip(blocks, numbers, strict=True)])
        assert len(rows) < 1000, "the plan makes no progress"
    return rows


# ---- caches


def test_without_a_cache_every_step_forwards_everything():
    plan = plan_of(block_length=4, steps=4)
    assert not plan.window.caches
    assert table(plan) == [
        (0, 18, 18, [(10, 14, 4, 2)]),
        (0, 18, 18, [(10, 14, 2, 2)]),
        (0, 18, 18, [(14, 18, 4, 2)]),
        (0, 18, 18, [(14, 18, 2, 2)]),
    ]


def test_prefix_cache_forwards_the_block_and_all_behind_it():
    plan = plan_of(block_length=4, steps=4, cache="prefix")
    assert plan.window.caches
    assert table(plan) == [
        (0, 18, 18, [(10, 14, 4, 2)]),
        (10, 18, 18, [(10, 14, 2, 2)]),
        (0, 18, 18, [(14, 18, 4, 2)]),
        (14, 18, 18, [(14, 18, 2, 2)]),
    ]


def test_dual_cache_forwards_the_block_alone_and_sees_everything():
    plan = plan_of(block_length=4, steps=6, cache="dual")
    assert table(plan) == [
        (0, 18, 18, [(10, 14, 4, 2)]),
        (10, 14, 18, [(10, 14, 2, 1)]),
        (10, 14, 18, [(10, 14, 1, 1)]),
        (0, 18, 18, [(14, 18, 4, 2)]),
        (14, 18, 18, [(14, 18, 2, 1)]),
        (14, 18, 18, [(14, 18, 1, 1)]),
    ]


def test_a_shifted_family_begins_one_position_early():
    plan = plan_of(block_length=4, steps=4, cache="dual", shift=1)
    assert table(plan) == [
        (0, 18, 18, [(10, 14, 4, 2)]),
        (9, 14, 18, [(10, 14, 2, 2)]),
        (0, 18, 18, [(14, 18, 4, 2)]),
        (13, 18, 18, [(14, 18, 2, 2)]),
    ]


@pytest.mark.parametrize("cache, later", [("none", (0, 21)), ("prefix", (9, 21)), ("dual", (9, 14))])
def test_a_suffix_is_part_of_the_sequence_and_of_a_prefix_window(cache, later):
    plan = plan_of(block_length=4, steps=4, cache=cache, shift=1, suffix=3)
    assert table(plan)[:3] == [
        (0, 21, 21, [(10, 14, 4, 2)]),
        (*later, 21, [(10, 14, 2, 2)]),
        (0, 21, 21, [(14, 18, 4, 2)]),
    ]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("refresh", [1, 2, 3, 7])
def test_refresh_every_n_steps_of_a_block(cache, refresh):
    plan = plan_of(prompt=5, tokens=12, block_length=6, steps=12, cache=cache, cache_refresh=refresh)
    refreshed = [start == 0 for start, *_ in table(plan)]
    assert refreshed == [step % refresh == 0 for step in range(6)] * 2


def test_refresh_of_one_is_no_cache_at_all():
    for cache in ("prefix", "dual"):
        cached = plan_of(tokens=12, block_length=5, steps=7, cache=cache, cache_refresh=1, shift=1, suffix=2)
        plain = plan_of(tokens=12, block_length=5, steps=7, shift=1, suffix=2)
        assert table(cached) == table(plain)


EVERYTHING, CANVAS = (0, 26), (9, 26)  # a prompt of 10, four blocks of 4; the family is shifted


@pytest.mark.parametrize(
    "given, refreshes",
    [
        ({}, [EVERYTHING] * 8),
        ({"prompt_refresh": 1}, [EVERYTHING] * 8),
        ({"prompt_refresh": 0}, [EVERYTHING, *[CANVAS] * 7]),
        ({"prompt_refresh": 2}, [*[EVERYTHING] * 2, *[CANVAS] * 2] * 2),
        ({"prompt_refresh": 9}, [*[EVERYTHING] * 2, *[CANVAS] * 6]),
        # two positions on each side, within the canvas
        (
            {"refresh_window": 2},
            [EVERYTHING, (9, 16), (11, 20), (11, 20), (15, 24), (15, 24), (19, 26), (19, 26)],
        ),
        # the first of every block, as in dInfer; the others reach into the prompt
        (
            {"refresh_window": 2, "prompt_refresh": 1},
            [EVERYTHING, (7, 16), EVERYTHING, (11, 20), EVERYTHING, (15, 24), EVERYTHING, (19, 26)],
        ),
        (
            {"refresh_window": 2, "prompt_refresh": 2},
            [EVERYTHING, (7, 16), (11, 20), (11, 20), EVERYTHING, (15, 24), (19, 26), (19, 26)],
        ),
        ({"refresh_window": 99}, [EVERYTHING, *[CANVAS] * 7]),
    ],
    ids=str,
)
def test_what_a_refresh_forwards(given, refreshes):
    """Of steps 0 and 2 of each block, which unmask one position each; the others forward the block alone."""
    plan = plan_of(tokens=16, block_length=4, cache="dual", cache_refresh=2, shift=1, **given)
    rows = table(plan)
    assert [(start, end) for start, end, *_ in rows[::2]] == refreshes
    assert [(start, end) for start, end, *_ in rows[1::2]] == [(9 + 4 * (i // 2), 14 + 4 * (i // 2)) for i in range(8)]
    assert {visible for _, _, visible, _ in rows} == {26}


def test_a_refresh_of_the_prefix_cache_ends_where_its_steps_do():
    plan = plan_of(block_length=4, steps=4, cache="prefix", refresh_window=1)
    assert [(start, end) for start, end, *_ in table(plan)] == [(0, 18), (10, 18), (13, 18), (14, 18)]


def test_every_canvas_begins_with_everything():
    """Its pages may be new: a preempted request begins its canvas again."""
    plan = plan_of(
        tokens=12, canvas_length=8, block_length=4, steps=2, cache="dual", prompt_refresh=0, refresh_window=0
    )
    assert [(start, end) for start, end, *_ in table(plan)] == [(0, 18), (14, 18)]
    plan.start_canvas()
    assert [(start, end) for start, end, *_ in table(plan)] == [(0, 22)]
    plan = plan_of(tokens=8, block_length=4, steps=2, cache="dual", prompt_refresh=0)
    plan.advance([0])
    assert plan.window.start == 10
    plan.restart_canvas()
    assert (plan.window.start, plan.window.end) == (0, 18)


def test_blocks_that_a_template_pins_do_not_count():
    template = (5, 5, HOLE, HOLE, 5, 5, HOLE, HOLE, HOLE, HOLE)
    plan = plan_of(template=template, block_length=2, steps=5, cache="dual", prompt_refresh=2)
    assert [(start, end) for start, end, *_ in table(plan) if end - start > 2] == [(0, 20), (10, 20), (0, 20)]


def test_without_a_cache_nothing_is_refreshed_in_part():
    plan = plan_of(block_length=4, steps=4, prompt_refresh=0, refresh_window=0)
    assert table(plan) == table(plan_of(block_length=4, steps=4))


def test_blocks_that_do_not_divide():
    plan = plan_of(prompt=3, tokens=10, block_length=4, steps=3, cache="dual")
    assert table(plan) == [
        (0, 13, 13, [(3, 7, 4, 4)]),
        (0, 13, 13, [(7, 11, 4, 4)]),
        (0, 13, 13, [(11, 13, 2, 2)]),
    ]


# ---- how much a step unmasks


def test_a_threshold_asks_for_one_position_and_takes_what_is_above_it():
    plan = plan_of(block_length=4, steps=1, threshold=0.9, cache="dual")
    assert plan.window.blocks == (ActiveBlock(10, 14, 4, 1, 0.9, 0.0),)
    assert table(plan, 3, 1, 1, 1, 2) == [
        (0, 18, 18, [(10, 14, 4, 1)]),
        (10, 14, 18, [(10, 14, 1, 1)]),
        (0, 18, 18, [(14, 18, 4, 1)]),
        (14, 18, 18, [(14, 18, 3, 1)]),
        (14, 18, 18, [(14, 18, 2, 1)]),
    ]


def test_a_factor_asks_for_one_position():
    plan = plan_of(block_length=4, factor=1.5)
    assert plan.window.blocks == (ActiveBlock(10, 14, 4, 1, math.inf, 1.5),)


def test_quota_threshold_and_factor_of_a_block_do_not_leak_into_one_another():
    assert plan_of().window.blocks[0].threshold == math.inf
    assert plan_of().window.blocks[0].factor == 0.0


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_dreams_schedule_passes_over_what_asks_for_nothing_and_takes_the_rest_at_the_end(cache):
    """The first step, which would refresh, asks for nothing: the second one refreshes in its place."""
    plan = plan_of(tokens=6, remasking="entropy", cache=cache)
    rows = table(plan)
    assert [blocks[0][3] for *_, blocks in rows] == [1, 1, 1, 1, 2]
    assert [start for start, *_ in rows] == ([0] * 5 if cache == "none" else [0] + [10] * 4)


@pytest.mark.parametrize("refresh", [3, 4, 7])
def test_a_refresh_that_is_passed_over_comes_with_the_next_pass(refresh):
    """The first pass is in step 15 of 24, which 3 divides and the others do not: they were due in steps passed over."""
    plan = plan_of(tokens=10, remasking="entropy", cache="dual", cache_refresh=refresh, steps=24)
    assert plan.window.timestep == 15
    before, refreshed, due = -1, [], []
    while not plan.canvas_is_full:
        step = plan.window.timestep
        due.append(any(between % refresh == 0 for between in range(before + 1, step + 1)))
        refreshed.append(plan.window.start == 0)
        before = step
        plan.advance([block.num_masked - block.quota for block in plan.window.blocks])
    assert refreshed == due and 0 < sum(due) < len(due)


# ---- infilling


def test_a_block_that_a_template_pins_is_passed_over():
    template = (HOLE, 7, HOLE, HOLE, 5, 5, 5, 5, HOLE, HOLE)
    plan = plan_of(template=template, block_length=4, steps=6, cache="dual")
    assert table(plan) == [
        (0, 20, 20, [(10, 14, 3, 2)]),
        (10, 14, 20, [(10, 14, 1, 1)]),
        (0, 20, 20, [(18, 20, 2, 1)]),
        (18, 20, 20, [(18, 20, 1, 1)]),
    ]
    assert plan.is_over


def test_a_template_ends_its_request_though_there_is_room():
    plan = plan_of(template=(HOLE, 3, HOLE), steps=1, room=50)
    assert table(plan) == [(0, 13, 13, [(10, 13, 2, 2)])]
    assert plan.is_over and plan.canvas_end < plan.limit


@pytest.mark.parametrize("template", [(4, 4, HOLE, HOLE), (HOLE, HOLE, 4, 4), (4, 4, HOLE, 4)])
def test_pinned_blocks_at_either_end(template):
    plan = plan_of(template=template, block_length=2, steps=4)
    ((_, _, _, blocks), *_) = table(plan)
    assert blocks[0][2] == template.count(HOLE)
    assert plan.is_over


# ---- a cap on steps


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_the_last_step_of_a_cap_forwards_everything_and_unmasks_it(cache):
    plan = plan_of(block_length=4, steps=8, max_steps=3, cache=cache, suffix=2, shift=1)
    later = {"none": (0, 20), "prefix": (9, 20), "dual": (9, 14)}[cache]
    assert table(plan) == [
        (0, 20, 20, [(10, 14, 4, 1)]),
        (*later, 20, [(10, 14, 3, 1)]),
        (0, 20, 20, [(10, 18, 6, 6)]),
    ]
    assert plan.is_over


def test_a_cap_of_one_step():
    assert table(plan_of(block_length=4, max_steps=1)) == [(0, 18, 18, [(10, 18, 8, 8)])]
    d2f = plan_of(strategy="d2f", block_length=4, max_steps=1)
    assert table(d2f) == [(0, 18, 18, [(10, 18, 8, 8)])]
    assert d2f.is_over


def test_a_cap_counts_over_canvases_and_lets_none_begin_after_it():
    plan = plan_of(tokens=8, canvas_length=4, steps=4, max_steps=6)
    assert len(table(plan)) == 4 and not plan.is_over
    plan.start_canvas()
    assert [window_row[3] for window_row in table(plan)] == [[(14, 18, 4, 1)], [(14, 18, 3, 3)]]
    plan = plan_of(tokens=12, canvas_length=4, steps=4, max_steps=6)
    table(plan)
    plan.start_canvas()
    table(plan)
    assert plan.is_over and plan.canvas_end < plan.limit


def test_a_cap_that_is_not_reached_changes_nothing():
    assert table(plan_of(block_length=4, steps=4, max_steps=5)) == table(plan_of(block_length=4, steps=4))


# ---- several canvases


def test_the_next_canvas_begins_where_the_last_one_ended():
    plan = plan_of(prompt=4, tokens=10, canvas_length=6, block_length=3, steps=2, cache="dual", suffix=2)
    assert table(plan) == [(0, 12, 12, [(4, 7, 3, 3)]), (0, 12, 12, [(7, 10, 3, 3)])]
    assert not plan.is_over
    plan.start_canvas()
    assert table(plan) == [(0, 16, 16, [(10, 13, 3, 3)]), (0, 16, 16, [(13, 14, 1, 1)])]
    assert plan.is_over


# ---- D2F


def d2f_of(**settings) -> Plan:
    thresholds = {"d2f_add_threshold": 0.5, "d2f_complete_threshold": 0.75, "d2f_accept_threshold": 0.9}
    return plan_of(strategy="d2f", **{"block_length": 4, "tokens": 16, **thresholds, **settings})


def test_d2f_opens_the_next_block_when_the_last_one_is_far_enough():
    plan = d2f_of()
    assert plan.window.caches and plan.window.attention == Attention("block_causal", 10, 4)
    assert plan.window.blocks == (ActiveBlock(10, 14, 4, 1, 0.9, 0.0),)
    assert table(plan, 1, 1, [1, 0], [0, 2], [1, 1, 1], [1, 1], [2, 2], 2) == [
        (0, 14, 14, [(10, 14, 4, 1)]),
        (10, 14, 14, [(10, 14, 3, 1)]),  # the prompt is final since the first pass
        (10, 18, 18, [(10, 14, 2, 1), (14, 18, 4, 0)]),  # half is unmasked: the next block opens, and may rest
        (10, 18, 18, [(10, 14, 1, 1), (14, 18, 4, 1)]),  # three quarters: it must progress
        (10, 22, 22, [(10, 14, 1, 1), (14, 18, 2, 1), (18, 22, 4, 0)]),
        (10, 22, 22, [(14, 18, 1, 1), (18, 22, 3, 1)]),  # the first block once more, now without a mask
        (14, 26, 26, [(18, 22, 2, 1), (22, 26, 4, 0)]),
        (18, 26, 26, [(22, 26, 2, 1)]),
    ]


@pytest.mark.parametrize("shift", [0, 1])
def test_d2f_forwards_a_finished_block_once_more_and_then_begins_behind_it(shift):
    plan = d2f_of(tokens=12, shift=shift)
    assert table(plan, 4, 4, 4) == [
        (0, 14, 14, [(10, 14, 4, 1)]),
        (10 - shift, 18, 18, [(14, 18, 4, 1)]),
        (14 - shift, 22, 22, [(18, 22, 4, 1)]),
    ]
    assert plan.is_over


def test_d2f_keeps_a_finished_block_in_the_window_while_one_before_it_has_masks():
    plan = d2f_of(tokens=12)
    assert table(plan, 2, [0, 4], [0, 4], 1, 1) == [
        (0, 14, 14, [(10, 14, 4, 1)]),
        (10, 18, 18, [(10, 14, 2, 1), (14, 18, 4, 0)]),
        (10, 22, 22, [(10, 14, 2, 1), (18, 22, 4, 1)]),
        (10, 22, 22, [(10, 14, 2, 1)]),
        (10, 22, 22, [(10, 14, 1, 1)]),
    ]
    assert plan.is_over


def test_d2f_opens_one_block_a_step():
    plan = d2f_of(d2f_add_threshold=0.0)
    ends = [end for _, end, *_ in table(plan, 0, [0, 0], [0, 0, 0], [4, 4, 4, 4])]
    assert ends == [14, 18, 22, 26]


def test_d2f_opens_no_block_after_eos():
    plan = d2f_of()
    plan.advance([1], eos_is_taken=True)
    assert [blocks for *_, blocks in table(plan)] == [[(10, 14, 1, 1)]]


def test_d2f_finishes_the_blocks_that_are_open_when_eos_is_taken():
    plan = d2f_of()
    plan.advance([2])
    plan.advance([2, 3], eos_is_taken=True)  # in the second block, masks before it
    plan.advance([0, 3])
    assert row(plan.window) == (10, 18, 18, [(14, 18, 3, 1)])


def test_d2f_last_block_is_shorter():
    plan = d2f_of(tokens=6)
    assert table(plan, 4, 2) == [(0, 14, 14, [(10, 14, 4, 1)]), (10, 16, 16, [(14, 16, 2, 1)])]


def test_d2f_default_block_length():
    assert d2f_of(tokens=100, block_length=None).window.end == 10 + 32


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_d2f_has_at_most_so_many_blocks_open(limit):
    plan = d2f_of(tokens=24, d2f_max_blocks=limit, d2f_add_threshold=0.0)
    most, rows = 0, []
    while plan.window is not None:
        rows.append(row(plan.window))
        most = max(most, len(plan.window.blocks))
        plan.advance([max(0, block.num_masked - block.quota) for block in plan.window.blocks])
    assert most == limit
    assert rows[-1][1] == plan.canvas_end, "every block was opened in the end"


@pytest.mark.parametrize("limit", [1, 2])
def test_d2f_goes_on_when_all_open_blocks_finish_at_once(limit):
    plan = d2f_of(tokens=16, d2f_max_blocks=limit, d2f_add_threshold=0.0)
    plan.advance([3])
    while plan.window is not None:
        end = plan.window.end
        plan.advance([0] * len(plan.window.blocks))
    assert end == plan.canvas_end


@pytest.mark.parametrize("length, taken", [(10, 1), (20, 2), (30, 3), (5, 2), (7, 5)])
def test_d2f_a_share_that_is_reached_exactly_counts(length, taken):
    """A share is a fraction of whole numbers: 1 of 10 reaches 0.1 though 1 - 9 / 10 does not."""
    share = taken / length
    plan = d2f_of(tokens=2 * length, block_length=length, d2f_add_threshold=share, d2f_complete_threshold=share)
    plan.advance([length - taken])
    assert [block[3] for block in row(plan.window)[3]] == [1, 1]


def test_d2f_cap_lays_out_all_blocks():
    plan = d2f_of(max_steps=2)
    plan.advance([3])
    assert row(plan.window) == (0, 26, 26, [(10, 26, 15, 15)])
    assert plan.window.attention == Attention("block_causal", 10, 4)
    plan.advance([0])
    assert plan.is_over


def test_d2f_next_canvas_takes_all_before_it_as_its_prompt():
    plan = d2f_of(tokens=8, canvas_length=4, shift=1)
    table(plan, 4)
    assert not plan.is_over
    plan.start_canvas()
    assert row(plan.window) == (0, 18, 18, [(14, 18, 4, 1)])
    assert plan.window.attention.prefix_length == 14


# ---- whatever happens

lengths = st.integers(1, 40)
blockwise = st.fixed_dictionaries(
    {
        "block_length": st.none() | st.integers(1, 45),
        "steps": st.none() | st.integers(1, 60),
        "canvas_length": lengths,
        "cache": st.sampled_from(["none", "prefix", "dual"]),
        "cache_refresh": st.integers(0, 4),
        "prompt_refresh": st.none() | st.integers(0, 3),
        "refresh_window": st.none() | st.integers(0, 12),
        "max_steps": st.none() | st.integers(1, 30),
        "remasking": st.sampled_from(["low_confidence", "sequential", "maskgit_plus", "origin"]),
        "threshold": st.none() | st.just(0.9),
        "suffix": st.integers(0, 3),
    }
)
templated = st.fixed_dictionaries(
    {
        "template": st.lists(st.sampled_from([HOLE, 5]), min_size=1, max_size=40).map(lambda ids: (*ids, HOLE)),
        "block_length": st.none() | st.integers(1, 45),
        "steps": st.none() | st.integers(1, 60),
        "cache": st.sampled_from(["none", "prefix", "dual"]),
        "cache_refresh": st.integers(0, 4),
        "prompt_refresh": st.none() | st.integers(0, 3),
        "refresh_window": st.none() | st.integers(0, 12),
        "max_steps": st.none() | st.integers(1, 30),
    }
)
pipelined = st.fixed_dictionaries(
    {
        "strategy": st.just("d2f"),
        "block_length": st.none() | st.integers(1, 45),
        "canvas_length": lengths,
        "d2f_add_threshold": st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
        "d2f_complete_threshold": st.sampled_from([0.0, 0.5, 0.95, 1.0]),
        "d2f_max_blocks": st.integers(0, 4),
        "max_steps": st.none() | st.integers(1, 30),
    }
)
requests = st.fixed_dictionaries({"prompt": st.integers(1, 20), "shift": st.integers(0, 1), "room": st.integers(1, 60)})


def places(window: Window) -> tuple:
    return window.start, window.end, [(block.start, block.end) for block in window.blocks]


def state_of(plan: Plan) -> dict:
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in vars(plan).items()}


class Simulation:
    """A request without a model. Each step takes some positions of each active block, at least its quota."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.random = plan, random.Random(seed)
        self.masked: set[int] = set()
        self.written: dict[int, int] = {}  # position -> step that forwarded it last
        self.taken: dict[int, int] = {}  # position -> step that unmasked it
        self.windows: list[Window] = []
        self.reports: list[list[int]] = []
        self.ahead: list[Window] = []
        self.behind, self.num_behind = plan, 0  # the plan so many steps ago, when it looked ahead

    def run(self) -> None:
        while not self.plan.is_over:
            if self.plan.canvas_is_full:
                self.plan.start_canvas()
                holes = self.plan.params.template or [HOLE] * self.plan.canvas_length
                self.masked |= {self.plan.canvas_start + i for i, token in enumerate(holes) if token == HOLE}
            self.step()
            assert len(self.windows) < 5000, "the plan makes no progress"
        assert not self.masked

    def step(self) -> None:
        if not self.num_behind:
            self.ahead, self.behind = self.plan.look_ahead(5), copy.deepcopy(self.plan)
        window = self.plan.window
        self.num_behind += 1
        alike = self.num_behind < len(self.ahead)
        by_quota = all(block.threshold == math.inf and block.factor == 0 for block in window.blocks)
        self.check(window)
        self.written |= dict.fromkeys(range(window.start, window.end), window.timestep)
        report = []
        for block in window.blocks:
            masked = sorted(self.masked.intersection(range(block.start, block.end)))
            assert len(masked) == block.num_masked, "the plan lost count"
            fewest = len(masked) if block.threshold <= 0 else min(block.quota, len(masked))
            most = (
                fewest if alike and by_quota else self.random.choice([fewest, self.random.randint(fewest, len(masked))])
            )
            taken = self.random.sample(masked, most)
            self.masked -= set(taken)
            self.taken |= dict.fromkeys(taken, window.timestep)
            report.append(len(masked) - len(taken))
        self.windows.append(window)
        self.reports.append(report)
        self.plan.advance(report)
        if alike and 0 not in report:
            next_window = self.ahead[self.num_behind]
            assert places(next_window) == places(self.plan.window) == places(window)
            assert next_window == self.plan.window or not by_quota
        else:
            self.behind.advance(report, num_passes=self.num_behind)
            assert state_of(self.behind) == state_of(self.plan), "passes recorded together and one by one differ"
            self.num_behind = 0

    def check(self, window: Window) -> None:
        plan = self.plan
        assert window.timestep >= plan.timestep and plan.num_passes == len(self.windows)
        assert window.timestep == plan.timestep or POLICIES[plan.params.remasking].schedule != "even"
        assert 0 <= window.start < window.end <= window.visible <= plan.reserved_length
        assert all(b.start >= plan.canvas_start and b.end <= min(window.end, plan.canvas_end) for b in window.blocks)
        assert all(before.end <= after.start for before, after in pairwise(window.blocks))
        assert window.start <= window.blocks[0].start - plan.shift, "no row predicts the first position"
        assert window.caches or window.start == 0
        # what follows the canvas is given, and never the request's own token
        assert max(block.end for block in window.blocks) <= window.settles_below == plan.canvas_end
        seen = {*range(window.start), *range(window.end, window.visible)}
        assert all(position in self.written for position in seen), "a key is seen that was never written"
        if plan.params.strategy == "d2f":
            finished = range(plan.canvas_start, window.start)
            assert all(self.written[i] > self.taken[i] for i in finished), "a key is seen that was written as a mask"
            assert window.visible == window.end


@settings(deadline=None, max_examples=150)
@given(
    requests,
    blockwise | pipelined | templated,
    st.integers(0, 2**32),
)
def test_every_mask_is_unmasked_once_inside_its_window(request_settings, strategy, seed):
    Simulation(plan_of(**request_settings, **strategy, started=False), seed).run()


@settings(deadline=None, max_examples=100)
@given(
    requests,
    blockwise | pipelined | templated,
    st.integers(0, 2**32),
)
def test_a_restarted_canvas_replays(request_settings, strategy, seed):
    plan = plan_of(**request_settings, **strategy, started=False)
    undisturbed = Simulation(plan_of(**request_settings, **strategy, started=False), seed)
    undisturbed.run()
    chance = random.Random(seed)
    first_of_canvas = step = 0
    restarts = 3
    while not plan.is_over:
        if plan.canvas_is_full:
            plan.start_canvas()
            first_of_canvas = step
        elif restarts and chance.random() < 0.3:
            plan.restart_canvas()
            step, restarts = first_of_canvas, restarts - 1
        assert plan.window == undisturbed.windows[step]
        plan.advance(undisturbed.reports[step])
        step += 1
    assert step == len(undisturbed.windows)


@pytest.mark.parametrize(
    ("settings", "num_steps"),
    [
        ({}, [8, 7, 6, 5, 4, 3, 2, 1]),
        ({"steps": 4}, [4, 3, 2, 1]),
        ({"block_length": 4}, [4, 3, 2, 1] * 2),
        ({"block_length": 4, "cache": "dual"}, [1, 3, 2, 1] * 2),  # the first step of a block forwards more
        ({"block_length": 4, "cache": "prefix", "cache_refresh": 2}, [1, 1, 1, 1] * 2),
        ({"remasking": "entropy", "steps": 4}, [4, 3, 2, 1]),
        ({"remasking": "origin"}, [4, 3, 2, 1]),  # what the numbers of the positions say
        ({"threshold": 0.9}, [8, 7, 6, 5, 4, 3, 2, 1]),
        ({"factor": 0.5}, [8, 7, 6, 5, 4, 3, 2, 1]),
        ({"max_steps": 8}, [1] * 8),
        ({"strategy": "d2f"}, [1] * 8),
    ],
    ids=str,
)
def test_how_far_a_plan_looks_ahead(settings, num_steps):
    plan = plan_of(prompt=5, room=8, **settings)
    seen = []
    while not plan.canvas_is_full:
        ahead = plan.look_ahead(9)
        assert ahead[0] == plan.window and ahead[:2] == plan.look_ahead(2)
        passed_over = POLICIES[settings.get("remasking", "low_confidence")].schedule != "even"
        assert passed_over or [window.timestep for window in ahead] == [
            *range(plan.timestep, plan.timestep + len(ahead))
        ]
        seen.append(len(ahead))
        plan.advance([block.num_masked - max(1, block.quota) for block in plan.window.blocks])
    assert seen == num_steps
