"""Schedules of the exact decoders as tables: blocks, quotas, canvases that follow one another, canvases begun again.

`test_window_strategies.py` has what caches, templates and pipelined blocks add.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_plugin.kernels import philox
from dllm_plugin.params import HOLE, DiffusionParams
from dllm_plugin.policies import POLICIES
from dllm_plugin.scheduler import blockwise
from dllm_plugin.scheduler.schedules import (
    dream_quota,
    dream_timesteps,
    even_quota,
    origin_timesteps,
    split_blocks,
)
from dllm_plugin.scheduler.strategies import make_plan

# ---- blocks


@pytest.mark.parametrize(
    "canvas, block, steps, lengths, shares",
    [
        (128, 32, 128, [32] * 4, [32] * 4),  # all divides: the reference
        (128, 32, 64, [32] * 4, [16] * 4),
        (16, None, None, [16], [16]),  # one block, one step a position
        (16, None, 5, [16], [5]),
        (16, 16, 16, [16], [16]),
        (16, 64, 16, [16], [16]),  # a block longer than the canvas
        (10, 4, 8, [4, 4, 2], [3, 3, 2]),  # nothing divides
        (10, 4, None, [4, 4, 2], [4, 3, 3]),
        (10, 3, 5, [3, 3, 3, 1], [2, 1, 1, 1]),
        (6, 1, 6, [1] * 6, [1] * 6),
        (6, 2, 2, [2, 2, 2], [1, 1, 1]),  # at least one step a block
        (1, 1, 1, [1], [1]),
        (1, None, 7, [1], [7]),
        (7, 7, 9, [7], [9]),
        (8, 4, 100, [4, 4], [50, 50]),
    ],
)
def test_split_blocks(canvas, block, steps, lengths, shares):
    assert split_blocks(canvas, block, steps) == (lengths, shares)


@settings(deadline=None)
@given(st.integers(1, 300), st.none() | st.integers(1, 400), st.none() | st.integers(1, 400))
def test_blocks_fill_the_canvas_and_share_the_steps(canvas, block, steps):
    lengths, shares = split_blocks(canvas, block, steps)
    assert sum(lengths) == canvas and min(lengths) >= 1
    assert len(set(lengths[:-1])) <= 1 and lengths[-1] <= lengths[0]
    assert sum(shares) == max(steps or canvas, len(lengths)) and min(shares) >= 1
    assert shares == sorted(shares, reverse=True) and shares[0] - shares[-1] <= 1


# ---- quotas


@pytest.mark.parametrize(
    "masks, steps, quotas",
    [
        (32, 5, [7, 7, 6, 6, 6]),
        (32, 32, [1] * 32),
        (5, 5, [1] * 5),
        (3, 5, [1, 1, 1, 0, 0]),  # more steps than positions
        (9, 1, [9]),
        (9, 2, [5, 4]),
    ],
)
def test_even_quota(masks, steps, quotas):
    assert [even_quota(masks, step, steps) for step in range(steps)] == quotas


def dream_quotas(masks, steps, eps=1e-3):
    quotas = []
    for step in range(steps):
        quotas.append(dream_quota(masks, step, steps, eps))
        masks -= quotas[-1]
    return quotas


# what the published schedule did when it was executed
@pytest.mark.parametrize(
    "masks, steps, quotas",
    [
        *((n, n, [0, *[1] * (n - 2), 2]) for n in (24, 32, 64, 128, 256, 512, 768)),
        (256, 128, [1, *[2] * 126, 3]),
        (256, 64, [3, *[4] * 62, 5]),
        (32, 8, [3, 4, 4, 4, 4, 4, 4, 5]),
        (7, 1, [7]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_dream_quota(masks, steps, quotas):
    assert dream_quotas(masks, steps) == quotas


@pytest.mark.parametrize("masks, steps", [(1, 1), (8, 8), (5, 40), (32, 8), (256, 64), (24, 1000), (8, 1_000_000)])
def test_steps_of_dreams_schedule_are_those_that_unmask_something(masks, steps):
    unmasked_in = dream_timesteps(masks, steps, 1e-3)
    left, before = masks, -1
    for step in sorted({*unmasked_in}):
        between = range(before + 1, step) if steps <= 1000 else range(before + 1, step, 997)
        assert not any(dream_quota(left, i, steps, 1e-3) for i in between)
        assert dream_quota(left, step, steps, 1e-3) == unmasked_in.count(step)
        left, before = left - unmasked_in.count(step), step
    assert left == 0 and before < steps and unmasked_in == sorted(unmasked_in)


@pytest.mark.parametrize("steps, eps", [(1, 1e-3), (7, 1e-3), (64, 1e-3), (9, 0.0), (5, 0.4), (1000, 1e-3)])
def test_origin_unmasks_as_the_published_rule_does(steps, eps):
    """Published: a fresh number below 1 - s / t in each step. One number u for all steps is the number 1 - u / t in a step."""
    draws = np.random.default_rng(steps).random(50, dtype=np.float32)
    time = np.linspace(1, eps, steps + 1)
    masked, unmasked_in = draws, []
    for step in range(steps):
        share = 1 - time[step + 1] / time[step] if step < steps - 1 else 1.0
        taken = 1 - masked / time[step] < share
        unmasked_in += [step] * int(taken.sum())
        masked = masked[~taken]
    assert origin_timesteps(draws, steps, eps) == unmasked_in and len(masked) == 0


@pytest.mark.parametrize("remasking", POLICIES)
@pytest.mark.parametrize("block_length", [None, 3])
def test_a_million_steps_cost_no_more_passes_than_positions(remasking, block_length):
    plan = plan_of(5, 8, remasking=remasking, steps=1_000_000, block_length=block_length)
    table = rows(plan)
    assert len(table) == plan.num_passes <= 8
    assert all(row[4] > 0 for row in table)


@pytest.mark.parametrize("remasking, search", [("origin", "origin_timesteps"), ("entropy", "dream_timesteps")])
def test_a_schedule_of_a_million_steps_is_searched_once_a_block(remasking, search, monkeypatch):
    """All requests wait while one is planned: a search in every pass would take longer than a small step."""
    searched = []
    schedule = getattr(blockwise, search)
    monkeypatch.setattr(blockwise, search, lambda *args: searched.append(args[1]) or schedule(*args))
    plan = plan_of(5, 12, remasking=remasking, steps=1_000_000, block_length=6)
    plan.start_canvas()
    while not plan.canvas_is_full:
        ahead = plan.look_ahead(3)
        plan.advance([ahead[-1].blocks[0].num_masked - ahead[-1].blocks[0].quota], num_passes=len(ahead))
    assert searched == [500_000] * 2


# ---- the windows of a request


def rows(plan):
    """(step, forwarded, active block, masks, quota) of every step of a canvas, each taking its quota."""
    plan.start_canvas()
    table = []
    while not plan.canvas_is_full:
        window = plan.window
        (block,) = window.blocks
        assert window.covers_all and (block.threshold, block.factor) == (math.inf, 0.0)
        table.append(
            (window.timestep, (window.start, window.end), (block.start, block.end), block.num_masked, block.quota)
        )
        plan.advance([block.num_masked - block.quota])
        assert len(table) < 10_000, "the plan makes no progress"
    return table


def plan_of(prompt, tokens, **params):
    return make_plan(DiffusionParams(**params), prompt, prompt + tokens)


TABLES = {
    "one-block-one-step-a-position": (
        plan_of(3, 3),
        [(0, (0, 6), (3, 6), 3, 1), (1, (0, 6), (3, 6), 2, 1), (2, (0, 6), (3, 6), 1, 1)],
    ),
    "blocks": (
        plan_of(10, 8, block_length=4, steps=4),
        [
            (0, (0, 18), (10, 14), 4, 2),
            (1, (0, 18), (10, 14), 2, 2),
            (2, (0, 18), (14, 18), 4, 2),
            (3, (0, 18), (14, 18), 2, 2),
        ],
    ),
    "nothing-divides": (
        plan_of(1, 5, block_length=3, steps=3, remasking="random"),
        [(0, (0, 6), (1, 4), 3, 2), (1, (0, 6), (1, 4), 1, 1), (2, (0, 6), (4, 6), 2, 2)],
    ),
    "a-block-ends-when-it-is-full": (
        plan_of(1, 4, block_length=2, steps=8),
        [(0, (0, 5), (1, 3), 2, 1), (1, (0, 5), (1, 3), 1, 1), (2, (0, 5), (3, 5), 2, 1), (3, (0, 5), (3, 5), 1, 1)],
    ),
    "dream-begins-with-nothing": (
        plan_of(2, 4, remasking="entropy"),
        [(1, (0, 6), (2, 6), 4, 1), (2, (0, 6), (2, 6), 3, 1), (3, (0, 6), (2, 6), 2, 2)],
    ),
    "dream-blocks-have-a-schedule-each": (
        plan_of(2, 4, remasking="maskgit_plus", block_length=2),
        [(1, (0, 6), (2, 4), 2, 2), (3, (0, 6), (4, 6), 2, 2)],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_windows(name):
    plan, expected = TABLES[name]
    assert rows(plan) == expected


@pytest.mark.parametrize("template", [(), (HOLE, 5, HOLE, HOLE, 9, 9, HOLE, HOLE, HOLE)], ids=["open", "pinned"])
def test_origin_draws_a_number_for_each_position(template):
    """The quotas are those of the numbers that the worker ranks by; the last step takes all; a step that takes none is none."""
    length = len(template) or 6
    plan = make_plan(DiffusionParams(remasking="origin", steps=3, eps=0.0, template=template), 4, 4 + length, seed=-7)
    position = torch.tensor([4 + i for i in range(length) if not template or template[i] == HOLE])
    numbers = philox.uniform(torch.full_like(position, -7), position, position * 0, stream=philox.UNIFORM)
    in_step = [int((numbers > 2 / 3).sum()), int(((numbers <= 2 / 3) & (numbers > 1 / 3)).sum())]
    in_step.append(6 - sum(in_step))
    assert [(row[0], row[4]) for row in rows(plan)] == [(i, n) for i, n in enumerate(in_step) if n]


def test_canvases_follow_one_another():
    """Steps are counted on; the last canvas is shorter and keeps the pace of the first; the end is the limit."""
    plan = plan_of(5, 10, canvas_length=4, steps=2)
    assert plan.reserved_length == 9 and plan.canvas_is_full and not plan.is_over
    assert rows(plan) == [(0, (0, 9), (5, 9), 4, 2), (1, (0, 9), (5, 9), 2, 2)]
    assert plan.reserved_length == 13 and not plan.is_over
    assert rows(plan) == [(2, (0, 13), (9, 13), 4, 2), (3, (0, 13), (9, 13), 2, 2)]
    assert plan.reserved_length == 15
    assert rows(plan) == [(4, (0, 15), (13, 15), 2, 2)]
    assert plan.is_over and plan.canvas_end == plan.limit == 15


def test_a_canvas_longer_than_the_response_is_cut():
    plan = plan_of(5, 3, canvas_length=64, steps=3)
    assert rows(plan) == [(0, (0, 8), (5, 8), 3, 1), (1, (0, 8), (5, 8), 2, 1), (2, (0, 8), (5, 8), 1, 1)]
    assert plan.is_over


REQUESTS = st.fixed_dictionaries(
    {
        "remasking": st.sampled_from([*POLICIES]),
        "canvas_length": st.integers(1, 40),
        "block_length": st.none() | st.integers(1, 40),
        "steps": st.none() | st.integers(1, 60),
        "eps": st.sampled_from([0.0, 1e-3, 0.5]),
    }
)


@settings(deadline=None)
@given(REQUESTS, st.integers(1, 30), st.integers(1, 90))
def test_every_position_is_unmasked_once(params, prompt, tokens):
    """Quotas of a block add up to its length, blocks follow one another, and no step is spent beyond the asked."""
    plan = plan_of(prompt, tokens, **params)
    unmasked, end, step = 0, prompt, 0
    while plan.canvas_end < plan.limit:
        table = rows(plan)
        length = plan.canvas_length
        assert [row[0] for row in table] == sorted({row[0] for row in table}) and table[0][0] >= step
        assert POLICIES[params["remasking"]].schedule != "even" or plan.timestep == step + len(table)
        step = plan.timestep
        blocks = sorted({row[2] for row in table})
        assert blocks[0][0] == end and all(a[1] == b[0] for a, b in itertools.pairwise(blocks))
        end = blocks[-1][1]
        for block in blocks:
            quotas = [row[4] for row in table if row[2] == block]
            assert sum(quotas) == block[1] - block[0] and min(quotas) > 0
            if POLICIES[params["remasking"]].schedule == "even":
                assert quotas == sorted(quotas, reverse=True)
        unmasked += sum(row[4] for row in table)
        first = min(params["canvas_length"], tokens)
        asked = math.ceil(params["steps"] * length / first) if params["steps"] else length
        assert len(table) <= max(asked, len(blocks))
    assert unmasked == tokens and plan.is_over


@settings(deadline=None)
@given(REQUESTS, st.integers(1, 30), st.integers(1, 90), st.integers(0, 20))
def test_a_restarted_canvas_has_the_same_windows(params, prompt, tokens, progress):
    undisturbed, plan = plan_of(prompt, tokens, **params), plan_of(prompt, tokens, **params)
    while undisturbed.canvas_end < undisturbed.limit:
        expected = rows(undisturbed)
        plan.start_canvas()
        for _ in range(min(progress, len(expected) - 1)):
            plan.advance([plan.window.blocks[0].num_masked - plan.window.blocks[0].quota])
        plan.restart_canvas()
        replayed = []
        while not plan.canvas_is_full:
            (block,) = plan.window.blocks
            span = (plan.window.start, plan.window.end)
            replayed.append((plan.window.timestep, span, (block.start, block.end), block.num_masked, block.quota))
            plan.advance([block.num_masked - block.quota])
        assert replayed == expected


def test_this_file_imports_no_vllm():
    """Planning is pure, so that it can be read and tested by itself."""
    import subprocess
    import sys

    code = (
        "import sys, dllm_plugin.scheduler.strategies; assert 'vllm' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
