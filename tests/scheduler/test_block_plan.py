"""The windows of strategy `block`, as tables of steps, and what holds for any course of a request."""

import copy
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_plugin.params import HOLE, DiffusionParams
from dllm_plugin.scheduler.block_causal import BlockCausalPlan
from dllm_plugin.scheduler.strategies import make_plan
from dllm_plugin.scheduler.window import FULL, ActiveBlock, Attention, Window

CAUSAL = Attention("block_causal", 0, 4)


def plan_of(
    prompt: int = 9, tokens: int = 8, shift: int = 0, started: bool = True, cached: int = 0, longest: int = 10_000,
    budget: int = 10_000, **params,
) -> BlockCausalPlan:  # fmt: skip
    params = DiffusionParams(**{"strategy": "block", "block_length": 4} | params)
    limit = min(prompt + max(tokens, len(params.template)), longest)
    plan = make_plan(params, prompt, limit, shift, longest=longest, most_tokens=budget)
    plan.num_cached = cached
    if started:
        plan.start_canvas()
    return plan


def row(window: Window) -> tuple:
    """(start, end, (start, end, masks, quota) of the active block or None), of a window that sees the end of its block."""
    assert window.visible >= window.end and window.caches and not window.pipelined
    block = window.blocks[0] if window.blocks else None
    return window.start, window.end, block and (block.start, block.end, block.num_masked, block.quota)


class Course:
    """A request without a model: takes positions, edits some, and emits what is settled, as the worker would."""

    def __init__(self, plan: BlockCausalPlan) -> None:
        self.plan = plan
        self.masked: set[int] = set()

    def begin(self) -> None:
        plan = self.plan
        self.masked = {i for i in self.masked if i < plan.canvas_start}
        self.masked |= {plan.canvas_start + i for i, token in enumerate(plan.canvas_ids) if token == HOLE}

    def take(self, number: int | None = None, edited: int = 0, choose=lambda masked, n: masked[:n]) -> None:
        """Unmask so many positions of the active block, the first ones, or as many as its quota."""
        plan, window = self.plan, self.plan.window
        if not window.blocks:
            plan.advance([], num_emitted=self.num_new(window, [], edited))
            return
        (block,) = window.blocks
        masked = sorted(i for i in self.masked if block.start <= i < block.end)
        assert len(masked) == block.num_masked, "the plan lost count"
        self.masked -= set(choose(masked, block.quota if number is None else number))
        left = sum(i in self.masked for i in masked)
        plan.advance([left], num_emitted=self.num_new(window, [left], edited), num_edited=edited)

    def num_new(self, window: Window, masks_left: list[int], edited: int) -> int:
        settled = window.settles_below
        if window.settles != "at_once" and window.blocks:
            is_still = edited == 0 and window.blocks[0].num_masked == 0
            if any(masks_left) or not (is_still or window.settles == "when_filled"):
                settled = window.blocks[0].start
        first_mask = min(self.masked, default=self.plan.canvas_end)
        return max(0, min(first_mask, settled) - self.plan.emitted)


def table(plan: BlockCausalPlan, *taken: int | tuple[int, int]) -> list[tuple]:
    """The rows of a canvas. `taken`: positions unmasked in each step, or these and tokens replaced; then each quota."""
    course, rows = Course(plan), []
    course.begin()
    while plan.window is not None:
        rows.append(row(plan.window))
        number = taken[len(rows) - 1] if len(rows) <= len(taken) else None
        course.take(*(number if isinstance(number, tuple) else (number,)))
        assert len(rows) < 1000, "the plan makes no progress"
    return rows


# ---- blocks


def test_the_next_blocks_first_window_holds_the_last_block():
    """It writes keys and values of tokens that are final now; the first window of all holds the prompt."""
    plan = plan_of(block_steps=2)
    assert table(plan) == [
        (0, 12, (9, 12, 3, 2)),
        (8, 12, (9, 12, 1, 1)),
        (8, 16, (12, 16, 4, 2)),
        (12, 16, (12, 16, 2, 2)),
        (12, 20, (16, 20, 4, 2)),
    ]
    assert plan.is_over and plan.num_cached == 16  # the answer ends at 17, after the first pass of its last block


def test_a_window_is_block_causal_only_over_several_blocks():
    plan, seen = plan_of(block_steps=2), []
    course = Course(plan)
    course.begin()
    while plan.window is not None:
        seen.append(plan.window.attention)
        course.take()
    assert seen == [CAUSAL, FULL, CAUSAL, FULL, CAUSAL]


@pytest.mark.parametrize(
    ("prompt", "first"), [(7, (0, 8, (7, 8, 1, 1))), (8, (0, 12, (8, 12, 4, 1))), (1, (0, 4, (1, 4, 3, 1)))]
)
def test_a_prompts_tail_shares_the_first_block(prompt, first):
    assert row(plan_of(prompt=prompt).window) == first


def test_the_last_block_is_denoised_beyond_the_answer_and_emits_none_of_it():
    plan = plan_of(prompt=8, tokens=2, block_steps=1)
    assert row(plan.window) == (0, 12, (8, 12, 4, 4)) and plan.window.settles_below == 10
    assert plan.reserved_length == 12 and plan.most_emitted == 2


def test_the_last_block_ends_with_the_models_length():
    plan = plan_of(prompt=8, tokens=50, longest=10, block_steps=2)
    assert table(plan) == [(0, 10, (8, 10, 2, 2))] and plan.is_over


@pytest.mark.parametrize(
    ("steps", "quotas"), [(None, [1] * 4), (1, [4]), (2, [2, 2]), (3, [2, 1, 1]), (4, [1] * 4), (9, [1] * 4)]
)
def test_quotas_are_those_of_a_full_block(steps, quotas):
    assert [block[3] for *_, block in table(plan_of(prompt=8, tokens=4, block_steps=steps))] == quotas
    partly = [block[3] for *_, block in table(plan_of(prompt=9, tokens=3, block_steps=steps))]
    assert partly == [*quotas[:-1], 1][-len(partly) :] if steps is None else sum(partly) == 3


def test_what_a_block_is_admitted_by():
    block = plan_of(threshold=0.9).window.blocks[0]
    assert block == ActiveBlock(9, 12, 3, 1, threshold=0.9)
    assert plan_of(factor=1.5).window.blocks[0] == ActiveBlock(9, 12, 3, 1, factor=1.5)
    assert plan_of(entropy_bound=2.0).window.blocks[0] == ActiveBlock(9, 12, 3, 1, entropy_bound=2.0)
    assert plan_of(edit_threshold=0.0).window.blocks[0] == ActiveBlock(9, 12, 3, 1, edit_threshold=0.0)
    assert plan_of().window.blocks[0] == ActiveBlock(9, 12, 3, 1)


def test_timesteps_count_from_0_in_every_block():
    plan, seen = plan_of(block_steps=2), []
    course = Course(plan)
    course.begin()
    while plan.window is not None:
        seen.append(plan.window.timestep)
        course.take()
    assert seen == [0, 1, 0, 1, 0] and plan.num_passes == 5


def test_a_short_canvas_reaches_to_the_end_of_its_block():
    plan = plan_of(prompt=9, tokens=9, canvas_length=1, block_steps=1)
    assert (plan.canvas_start, plan.canvas_end) == (9, 12) and plan.most_emitted == 4
    assert table(plan) == [(0, 12, (9, 12, 3, 3))] and not plan.is_over
    plan.start_canvas()
    assert (plan.canvas_start, plan.canvas_end) == (12, 16) and row(plan.window) == (8, 16, (12, 16, 4, 4))


# ---- infilling


def test_pinned_blocks_are_passed_over_and_written_with_the_next_one():
    template = (7, HOLE, *[7] * 8, HOLE, 7)
    plan = plan_of(prompt=8, template=template)
    assert plan.canvas_end == 20
    assert table(plan) == [(0, 12, (8, 12, 1, 1)), (8, 20, (16, 20, 1, 1))] and plan.is_over


@pytest.mark.parametrize(("pinned", "reserved"), [(0, 12), (3, 12), (4, 16), (9, 20)])
def test_pages_reach_to_the_first_block_that_is_not_pinned(pinned, reserved):
    plan = plan_of(prompt=8, template=(*[7] * pinned, HOLE), started=False)
    assert plan.reserved_length == reserved
    plan.start_canvas()
    assert plan.reserved_length == plan.window.end == reserved


# ---- chunks


def test_a_prompt_above_the_budget_is_forwarded_in_whole_blocks():
    plan = plan_of(prompt=25, tokens=3, budget=11, block_steps=1)
    assert table(plan) == [(0, 8, None), (8, 16, None), (16, 24, None), (24, 28, (25, 28, 3, 3))]
    assert plan.num_passes == 1


def test_a_chunk_ends_before_the_open_block():
    assert table(plan_of(prompt=9, tokens=3, budget=11, block_steps=1)) == [(0, 8, None), (8, 12, (9, 12, 3, 3))]


def test_a_block_above_the_budget_is_not_cut():
    assert table(plan_of(prompt=9, tokens=7, budget=3, block_steps=1)) == [
        (0, 4, None),
        (4, 8, None),
        (8, 12, (9, 12, 3, 3)),
        (8, 12, None),
        (12, 16, (12, 16, 4, 4)),
    ]


def test_chunks_begin_behind_what_is_cached():
    assert row(plan_of(prompt=25, cached=16, budget=11).window) == (16, 24, None)
    assert row(plan_of(prompt=25, cached=16, budget=12).window) == (16, 28, (25, 28, 3, 1))


# ---- sub-blocks


def test_sub_blocks_are_unmasked_one_after_the_other_by_quotas_of_their_own():
    plan = plan_of(prompt=8, tokens=4, sub_block_length=2, block_steps=1)
    assert table(plan) == [(0, 12, (8, 10, 2, 2)), (8, 12, (10, 12, 2, 2))]
    plan = plan_of(prompt=9, tokens=3, sub_block_length=2)
    assert table(plan) == [(0, 12, (9, 10, 1, 1)), (8, 12, (10, 12, 2, 1)), (8, 12, (10, 12, 1, 1))]


def test_dual_forwards_a_sub_block_alone_once_its_first_position_has_a_token():
    """As `alone` in reference/block.py: never in a block's first pass."""
    plan = plan_of(prompt=8, tokens=8, block_length=8, sub_block_length=4, cache="dual")
    course, rows = Course(plan), []
    course.begin()
    for choose in ([11], [8], [9], [10], [12], [13], [14], [15]):
        rows.append(row(plan.window))
        assert plan.window.visible == 16
        course.take(choose=lambda masked, _, choose=choose: choose)
    assert rows == [
        (0, 16, (8, 12, 4, 1)),
        (8, 16, (8, 12, 3, 1)),  # 8 is masked
        (8, 12, (8, 12, 2, 1)),
        (8, 12, (8, 12, 1, 1)),
        (8, 16, (12, 16, 4, 1)),
        (12, 16, (12, 16, 3, 1)),
        (12, 16, (12, 16, 2, 1)),
        (12, 16, (12, 16, 1, 1)),
    ]


def test_the_last_pass_of_a_cap_forwards_all_of_the_block_that_it_unmasks():
    plan = plan_of(prompt=8, tokens=8, block_length=8, sub_block_length=4, cache="dual", max_steps=3)
    assert table(plan) == [(0, 16, (8, 12, 4, 1)), (8, 12, (8, 12, 3, 1)), (8, 16, (8, 16, 6, 6))]


def test_dual_begins_with_all_of_the_block_where_the_prompt_reaches_into_it():
    plan = plan_of(prompt=9, tokens=7, block_length=8, sub_block_length=4, cache="dual")
    assert [each[:2] for each in table(plan)[:2]] == [(0, 16), (8, 12)]


# ---- a family whose logits at i predict token i + 1


def test_the_first_token_of_a_block_comes_from_the_row_before_it():
    """In the pass that writes the block before it; then all but that position, in windows that begin with the block."""
    plan = plan_of(prompt=8, tokens=8, shift=1, block_steps=1)
    assert table(plan) == [
        (0, 8, (8, 9, 1, 1)),
        (8, 12, (9, 12, 3, 3)),
        (8, 12, (12, 13, 1, 1)),
        (12, 16, (13, 16, 3, 3)),
    ]


def test_a_first_token_that_is_given_takes_no_pass():
    assert table(plan_of(prompt=9, tokens=3, shift=1, block_steps=1)) == [(0, 12, (9, 12, 3, 3))]
    template = (7, HOLE, HOLE, HOLE)
    assert table(plan_of(prompt=8, shift=1, block_steps=1, template=template)) == [(0, 12, (8, 12, 3, 3))]
    # no row of a window that begins with the block predicts its first token, which is given
    plan = plan_of(prompt=8, shift=1, block_steps=1, template=template, cached=8)
    assert table(plan) == [(8, 12, (9, 12, 3, 3))]


def test_first_tokens_have_no_timestep():
    plan, seen = plan_of(prompt=8, tokens=4, shift=1), []
    course = Course(plan)
    course.begin()
    while plan.window is not None:
        seen.append(plan.window.timestep)
        course.take()
    assert seen == [0, 0, 1, 2] and plan.num_passes == 4


def test_the_row_before_is_forwarded_though_its_block_is_cached():
    """A preempted request comes back, and pages reach to its open block."""
    plan = plan_of(prompt=8, tokens=8, shift=1, cached=8)
    assert row(plan.window) == (7, 8, (8, 9, 1, 1)) and plan.window.attention == FULL


def test_fast_dllm_v2():
    plan = plan_of(prompt=8, tokens=8, shift=1, block_length=8, sub_block_length=4, cache="dual", block_steps=2)
    assert table(plan) == [
        (0, 8, (8, 9, 1, 1)),
        (8, 16, (9, 12, 3, 2)),
        (8, 12, (9, 12, 1, 1)),
        (8, 16, (12, 16, 4, 2)),
        (12, 16, (13, 16, 2, 2)),
    ]


def test_a_first_token_is_chunked_too():
    plan = plan_of(prompt=12, tokens=4, shift=1, budget=8, block_steps=1)
    assert table(plan) == [(0, 8, None), (8, 12, (12, 13, 1, 1)), (12, 16, (13, 16, 3, 3))]


# ---- editing


def test_an_edited_block_is_final_when_a_step_changes_nothing():
    plan = plan_of(prompt=8, tokens=8, edit_threshold=0.5, block_steps=2)
    assert table(plan, (2, 0), (2, 1), (0, 1), (0, 0), (4, 0), (0, 0)) == [
        (0, 12, (8, 12, 4, 2)),
        (8, 12, (8, 12, 2, 2)),
        (8, 12, (8, 12, 0, 0)),  # one replaced
        (8, 12, (8, 12, 0, 0)),  # none
        (12, 16, (12, 16, 4, 2)),  # keys of the block before are those of the last pass
        (12, 16, (12, 16, 0, 0)),
    ]
    assert plan.is_over


def test_an_edited_block_whose_steps_are_spent_is_written_with_the_next_one():
    plan = plan_of(prompt=8, tokens=8, edit_threshold=0.5, block_steps=1, max_post_steps=1)
    assert table(plan, (4, 0), (0, 2), (4, 0), (0, 0)) == [
        (0, 12, (8, 12, 4, 4)),
        (8, 12, (8, 12, 0, 0)),
        (8, 16, (12, 16, 4, 4)),  # two were replaced in the last pass
        (12, 16, (12, 16, 0, 0)),
    ]


@pytest.mark.parametrize(
    ("most", "settles"),
    [(0, ["when_filled"]), (1, ["when_still", "when_filled"]), (2, ["when_still", "when_still", "when_filled"])],
)
def test_when_an_edited_block_settles(most, settles):
    plan = plan_of(prompt=8, tokens=4, edit_threshold=0.5, block_steps=1, max_post_steps=most)
    course, seen = Course(plan), []
    course.begin()
    while plan.window is not None:
        assert plan.emitted == 8
        seen.append(plan.window.settles)
        course.take(edited=1 if len(seen) > 1 else 0)
    assert seen == settles and plan.emitted == 12


def test_without_editing_tokens_settle_at_once():
    assert plan_of().window.settles == "at_once"


# ---- a cap on steps


def test_the_last_pass_takes_all_that_is_left_of_its_block():
    plan = plan_of(prompt=8, tokens=12, max_steps=6)
    assert table(plan)[4:] == [(8, 16, (12, 16, 4, 1)), (12, 16, (12, 16, 3, 3))] and plan.is_over
    plan = plan_of(prompt=8, tokens=12, max_steps=2, threshold=0.5, block_length=8, sub_block_length=4)
    course = Course(plan)
    course.begin()
    course.take(2)
    assert plan.window.blocks == (ActiveBlock(8, 16, 6, 6),) and plan.look_ahead(5) == [plan.window]
    plan = plan_of(prompt=8, tokens=12, max_steps=2, edit_threshold=0.5, block_steps=2)
    course = Course(plan)
    course.begin()
    course.take()
    assert plan.window.settles == "when_filled" and plan.window.blocks == (ActiveBlock(8, 12, 2, 2),)
    course.take()
    assert plan.is_over and plan.emitted == 12


def test_chunks_are_no_passes_of_the_cap():
    plan = plan_of(prompt=25, tokens=20, budget=8, max_steps=1)
    assert table(plan)[-1] == (24, 28, (25, 28, 3, 3)) and plan.is_over


# ---- preemption


def test_a_preempted_request_begins_again_with_its_open_block():
    """What was emitted of it is a mask again, and not what was emitted before it."""
    plan = plan_of(prompt=9, tokens=12)
    course = Course(plan)
    course.begin()
    for _ in range(3 + 4 + 2):
        course.take()
    assert plan.emitted == 18 and plan.num_passes == 9
    plan.num_cached = 0
    plan.restart_canvas()
    assert (plan.canvas_start, plan.canvas_end, plan.num_passes, plan.timestep) == (16, 24, 7, 0)
    assert plan.canvas_ids == [HOLE] * 8 and row(plan.window) == (0, 20, (16, 20, 4, 1))
    plan.num_cached = 16
    plan.restart_canvas()
    assert row(plan.window) == (16, 20, (16, 20, 4, 1))


def test_passes_of_sub_blocks_that_are_run_again_are_alike():
    """Though more was emitted when they are: the first position of the sub-block is a mask again."""
    plan = plan_of(prompt=8, tokens=8, block_length=8, sub_block_length=4, cache="dual")
    rows: list[tuple] = []
    for _ in range(2):
        course = Course(plan)
        course.begin()
        for choose in ([11], [10], [8], [9], [12], [13]):
            rows.append(row(plan.window))
            course.take(choose=lambda masked, _, choose=choose: choose)
        plan.num_cached = 0
        plan.restart_canvas()
    assert rows[:6] == rows[6:]
    assert [each[:2] for each in rows[:6]] == [(0, 16), (8, 16), (8, 16), (8, 12), (8, 16), (12, 16)]


def test_a_preempted_template_keeps_its_pinned_tokens():
    template = (HOLE, HOLE, HOLE, HOLE, 5, HOLE, 6, HOLE, 7, 7, HOLE)
    plan = plan_of(prompt=8, template=template)
    course = Course(plan)
    course.begin()
    for _ in range(5):
        course.take()
    assert plan.emitted == 15
    plan.restart_canvas()
    assert plan.canvas_start == 12 and plan.canvas_ids == [5, HOLE, 6, HOLE, 7, 7, HOLE, HOLE]
    assert plan.window.blocks[0].num_masked == 2


# ---- looking ahead


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({}, [7, 6, 5, 4, 3, 2, 1]),  # on into the next block
        ({"block_steps": 2}, [4, 3, 2, 1]),
        ({"threshold": 0.5}, [3, 2, 1, 4, 3, 2, 1]),  # when a block is filled, nobody knows
        ({"edit_threshold": 0.5}, [1] * 9),
        ({"max_steps": 7}, [1] * 7),
        ({"sub_block_length": 2}, [7, 6, 5, 4, 3, 2, 1]),
        ({"cache": "dual", "sub_block_length": 2}, [1] * 7),
    ],
    ids=str,
)
def test_how_far_a_plan_looks_ahead(settings, seen):
    plan = plan_of(prompt=9, tokens=7, **settings)
    course, ahead = Course(plan), []
    course.begin()
    while plan.window is not None:
        windows = plan.look_ahead(9)
        assert windows[0] == plan.window and windows[:2] == plan.look_ahead(2)
        ahead.append(len(windows))
        course.take()
    assert ahead == seen


def test_quotas_begin_anew_with_each_sub_block():
    plan = plan_of(prompt=8, tokens=8, block_length=8, sub_block_length=4, block_steps=3)
    course = Course(plan)
    course.begin()
    quotas = []
    while plan.window is not None:
        quotas.append(plan.window.blocks[0].quota)
        course.take()
    assert quotas == [2, 1, 1, 2, 1, 1]


@pytest.mark.parametrize(("reserved", "number"), [(12, 3), (15, 3), (16, 7), (19, 7), (20, 9)])
def test_windows_ahead_end_with_the_pages(reserved, number):
    windows = plan_of(prompt=9, tokens=9).look_ahead(9, reserved)
    assert len(windows) == number and windows[-1].end == reserved // 4 * 4


def test_windows_ahead_hold_all_of_their_keys_or_none_does():
    """They are laid out before the others."""
    assert len(plan_of(prompt=1, tokens=9).look_ahead(9)) == 3


def test_windows_ahead_have_the_quotas_of_their_timesteps():
    plan = plan_of(prompt=12, tokens=12, block_length=12, block_steps=5)
    course = Course(plan)
    course.begin()
    course.take()
    ahead = plan.look_ahead(9)
    assert [(window.timestep, *window.blocks[0][2:4]) for window in ahead] == [
        (1, 9, 3),
        (2, 6, 2),
        (3, 4, 2),
        (4, 2, 2),
    ]


# ---- whatever happens

PARAMS = st.fixed_dictionaries(
    {
        "block_length": st.integers(1, 12),
        "block_steps": st.none() | st.integers(1, 9),
        "canvas_length": st.integers(1, 40),
        "max_steps": st.none() | st.integers(1, 20),
    }
)
KINDS = st.sampled_from(
    [
        {},
        {"threshold": 0.5},
        {"entropy_bound": 0.5},
        {"sub_block_length": 1},
        {"sub_block_length": 3},
        {"sub_block_length": 2, "cache": "dual"},
        {"sub_block_length": 5, "cache": "dual", "threshold": 0.5},
        {"edit_threshold": 0.5, "max_post_steps": 0},
        {"edit_threshold": 0.5, "max_post_steps": 3, "threshold": 0.5},
    ]
)
TEMPLATES = st.just(()) | st.lists(st.sampled_from([HOLE, 5, 5]), min_size=1, max_size=30).map(
    lambda ids: (*ids, HOLE, 5)
)
EXTENTS = st.fixed_dictionaries(
    {
        "prompt": st.integers(1, 30),
        "tokens": st.integers(1, 40),
        "shift": st.integers(0, 1),
        "budget": st.sampled_from([1, 5, 16, 999]),
    }
)


class Simulation(Course):
    """Any course of a request, preempted or not. ``written``: the tokens that a position's keys were last made beside."""

    def __init__(self, plan: BlockCausalPlan, seed: int, preempted: int) -> None:
        super().__init__(plan)
        self.seed, self.random, self.preemptions = seed, random.Random(seed), preempted
        self.tokens: dict[int, int] = {}  # of each position that has one, how often it was written
        self.written: dict[int, tuple] = {}
        self.final: set[int] = set()
        self.ahead: list[Window] = []
        self.reserved = 0

    def run(self) -> None:
        plan, steps = self.plan, 0
        while not plan.is_over and plan.emitted < plan.limit:
            if plan.canvas_is_full:
                plan.start_canvas()
                self.lay_out()
            elif self.preemptions and self.random.random() < 0.1:
                self.preempt()
            self.step()
            steps += 1
            assert steps < 3000, "the plan makes no progress"
        template = plan.params.template
        end = plan.limit if not template else min(plan.limit, plan.prompt_length + len(template))
        assert plan.emitted == end or plan.steps_are_spent

    def lay_out(self) -> None:
        plan = self.plan
        self.begin()
        self.ahead = []
        for position in range(plan.canvas_end):
            if position in self.masked:
                self.tokens.pop(position, None)
            else:
                self.tokens.setdefault(position, 0)

    def preempt(self) -> None:
        """Its pages go, or other requests keep those of whole blocks before its open one."""
        plan, self.preemptions = self.plan, self.preemptions - 1
        length = plan.block_length
        most = (plan.emitted - 1) // length * length
        plan.num_cached = self.random.choice([0, min(most, plan.num_cached) // length * length])
        self.written = {i: keys for i, keys in self.written.items() if i < plan.num_cached}
        plan.restart_canvas()
        self.lay_out()
        self.final = {i for i in self.final if i < plan.canvas_start}  # the same tokens come again

    def context(self, position: int) -> tuple:
        """What the keys of a position depend on: the tokens of its block and of all before it."""
        end = (position // self.plan.block_length + 1) * self.plan.block_length
        return tuple(self.tokens.get(i) for i in range(end))

    def step(self) -> None:
        plan, window = self.plan, self.plan.window
        self.check(window)
        if not self.ahead:
            self.reserved = plan.reserved_length + self.random.randrange(9)
            self.ahead = plan.look_ahead(5, self.reserved)[1:]
        self.written |= {i: self.context(i) for i in range(window.start, window.end)}
        if not window.blocks:
            self.take()
        else:
            (block,) = window.blocks
            draw = random.Random(f"{self.seed} {block.start} {block.end} {window.timestep}")  # again after a preemption
            admits = block.threshold < math.inf or block.entropy_bound > 0
            number = min(block.quota, block.num_masked)
            number = draw.randint(number, block.num_masked) if admits else number
            before = set(self.masked)
            edited = 0
            if block.edit_threshold < math.inf:
                open_ones = [i for i in range(block.start, block.end) if i not in self.masked and self.is_own(i)]
                edited = draw.choice([0, min(1, len(open_ones))])
                for position in draw.sample(open_ones, edited):
                    assert position not in self.final, "a final token is replaced"
                    self.tokens[position] += 1
            self.take(number, edited, draw.sample)
            for position in before - self.masked:
                assert position not in self.final, "a position is unmasked twice"
                self.tokens[position] = 1
        self.final |= set(range(plan.prompt_length, plan.emitted)) - self.masked
        for position in range(plan.num_cached):
            assert self.written[position] == self.context(position), "what is said to be cached is stale"
        assert plan.num_cached == 0 or plan.num_cached % plan.block_length == 0 or plan.num_cached == plan.longest
        self.compare(window)

    def compare(self, last: Window) -> None:
        """The present window with the one that was looked ahead."""
        window, expected = self.plan.window, self.ahead.pop(0) if self.ahead else None
        if expected is None or window is None:
            self.ahead = []
            return
        params = self.plan.params
        assert expected.end <= self.reserved
        if params.threshold is None and params.entropy_bound is None:
            assert expected == window
        elif window.blocks and [block[:2] for block in window.blocks] == [block[:2] for block in last.blocks]:
            ours, theirs = window.blocks[0], expected.blocks[0]
            assert expected._replace(blocks=()) == window._replace(blocks=())
            assert ours[:2] == theirs[:2] and ours.num_masked <= theirs.num_masked
        else:
            self.ahead = []  # the worker stops where a block is filled before its time

    def is_own(self, position: int) -> bool:
        template, place = self.plan.params.template, position - self.plan.prompt_length
        return place >= 0 and (place >= len(template) or template[place] == HOLE)

    def check(self, window: Window) -> None:
        plan = self.plan
        assert 0 <= window.start < window.end <= window.visible <= max(plan.reserved_length, window.start + 1)
        assert window.visible == window.end or (plan.params.cache == "dual" and window.visible == plan._end)
        length = plan.block_length
        # a query sees all of its block, and what is before the window was written beside the tokens that are there now
        assert window.end % length == 0 or window.end == plan.longest or plan.params.cache == "dual"
        if (
            window.blocks
            and (window.start > plan._start or window.end < plan._end)
            and not plan._stages[0].is_first_token
        ):
            assert window.start not in self.masked, "a sub-block is forwarded alone though its first position is masked"
        for position in range(window.start):
            if position < plan._start or plan.params.cache != "dual":
                assert self.written[position] == self.context(position), "a stale key is read"
            assert position in self.written
        several = window.start // length != (window.end - 1) // length
        assert window.attention == (Attention("block_causal", 0, length) if several else FULL)
        fits = window.end - window.start <= plan.most_tokens
        assert fits or window.end - window.start <= length, "a window above the budget that is more than a block"
        for block in window.blocks:
            assert (
                max(plan.canvas_start, window.start + plan.shift) <= block.start < block.end <= window.end + plan.shift
            )
            assert block.start // length == (block.end - 1) // length
            assert 0 < block.quota <= block.num_masked or block.num_masked == 0 == block.quota
        assert window.settles_below <= plan.limit


@settings(deadline=None, max_examples=400, derandomize=True)
@given(PARAMS, KINDS, TEMPLATES, EXTENTS, st.integers(0, 2**32), st.integers(0, 3))
def test_every_key_that_is_read_is_what_its_tokens_make_it(params, kind, template, extent, seed, preempted):
    extent = extent | ({"shift": 0} if "edit_threshold" in kind else {})  # no family has both
    plan = plan_of(started=False, **extent, **params | kind, template=template)
    Simulation(plan, seed, preempted).run()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(PARAMS, st.sampled_from([{}, {"threshold": 0.5}]), EXTENTS, st.integers(0, 2**32))
def test_passes_recorded_together_are_those_recorded_one_by_one(params, kind, extent, seed):
    plan = plan_of(**extent, **params | kind)
    course = Course(plan)
    course.begin()
    while plan.window is not None and plan.emitted < plan.limit:
        ahead, behind = plan.look_ahead(5), copy.deepcopy(plan)
        masks_left, num_emitted = [], []
        for window in ahead:
            if plan.window is None:  # as on a GPU, where a pass is launched before the one that ends the answer is read
                masks_left, num_emitted = [*masks_left, [0]], [*num_emitted, 0]
                break
            assert window == plan.window
            emitted = plan.emitted
            course.take()
            masks_left.append(
                [sum(i in course.masked for i in range(block.start, block.end)) for block in window.blocks]
            )
            num_emitted.append(plan.emitted - emitted)
        behind.advance_through(masks_left, False, num_emitted, 0)
        assert vars(behind) == vars(plan)
