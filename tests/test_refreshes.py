"""Refreshes that forward less than everything, through the real engine in float32: the reference's tokens in its number of
forward passes, whatever else is in the batch.

The prompt at an interval of its own (`diffusion_prompt_refresh`) and the vicinity of a block (`diffusion_refresh_window`).
"""

import functools
import itertools
import random
from typing import Any

import pytest
from support.cases import difference, expected
from support.engines import engine
from support.strategy_cases import (
    CACHED,
    FAMILIES,
    SHAPES,
    SUFFIX,
    TEMPLATE,
    StrategyCase,
    by_probability,
    grid,
    result,
    run,
    run_mixed,
    without_steps,
)
from vllm.outputs import RequestOutput

REFRESHES = (
    {"prompt_refresh": 0},
    {"prompt_refresh": 2},
    {"prompt_refresh": 0, "cache_refresh": 2},
    {"refresh_window": 0},
    {"refresh_window": 3},
    {"refresh_window": 3, "prompt_refresh": 1, "cache_refresh": 1},  # dInfer's
    {"refresh_window": 7, "prompt_refresh": 2, "cache_refresh": 2},
    {"refresh_window": 128, "prompt_refresh": 1, "cache_refresh": 2},  # all but a part of the longest prompt
)


def cases_of(family: str, mode: dict[str, Any]) -> list[StrategyCase]:
    policy, (one, *_, long) = {"remasking": by_probability(family)} | mode, SHAPES[1:]
    return [
        *grid(family, (one, SHAPES[2]), policy),
        *grid(family, (one,), {"remasking": "entropy"} | mode, {"remasking": "origin"} | mode),
        *grid(family, without_steps((one, long)), policy | {"threshold": 0.2}),
        *grid(family, ((14, 9, {"block_length": 4}),), policy | {"template": TEMPLATE, "suffix": SUFFIX}),
        *grid(
            family,
            ((30, 120, {"canvas_length": 12, "block_length": 5}), (16, 9, {"block_length": 4, "max_steps": 9})),
            policy,
        ),
    ]


ALL = [
    case
    for family in FAMILIES
    for cache, refresh in itertools.product(CACHED, REFRESHES)
    for case in cases_of(family, {"cache": cache} | refresh)
]
assert len({case.id for case in ALL}) == len(ALL)


@functools.cache
def together(family: str) -> dict[str, RequestOutput]:
    return run_mixed([case for case in ALL if case.checkpoint == family])


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)
def test_equals_the_reference(case: StrategyCase):
    assert difference(case, together(case.checkpoint)[case.id]) == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_equals_together(family: str):
    cases = [case for case in ALL if case.checkpoint == family][::4]
    for case, output in zip(cases, run(engine(family), cases, alone=True), strict=True):
        assert result(output) == result(together(family)[case.id]), case.id


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", CACHED)
def test_refreshing_everything_every_step_equals_no_cache(family: str, cache: str):
    everything = {"cache": cache, "cache_refresh": 1, "prompt_refresh": 1, "refresh_window": 1000}
    plain, refreshed = cases_of(family, {}), cases_of(family, everything)
    outputs = run(engine(family), plain + refreshed)
    for case, none, cached in zip(plain, outputs[: len(plain)], outputs[len(plain) :], strict=True):
        assert result(none) == result(cached), case.id


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("refresh", [mode for mode in REFRESHES if mode.get("refresh_window") != 128], ids=str)
def test_a_smaller_refresh_drifts(family: str, refresh: dict[str, int]):
    """Otherwise the parity above would not tell it from a refresh of everything."""
    everything = {k: v for k, v in refresh.items() if k == "cache_refresh"}
    smaller, whole = (
        [expected(case).tokens for case in cases_of(family, {"cache": "dual"} | mode)] for mode in (refresh, everything)
    )
    assert smaller != whole


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("after", [3, 8, 13])
def test_preempted_requests_decode_the_same(family: str, after: int):
    """They lose the pages of the prompt, too, which no later refresh may have written."""
    llm = engine(family)
    cases = random.Random(after).sample([case for case in ALL if case.checkpoint == family], 14)
    for case in cases:
        llm.llm_engine.add_request(f"{case.id}-{after}", {"prompt_token_ids": case.prompt_ids}, case.sampling_params)
    finished: dict[str, RequestOutput] = {}
    for step in itertools.count(1):
        if not llm.llm_engine.has_unfinished_requests():
            break
        finished |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
        if step in (after, 2 * after + 1):
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
    for case in cases:
        assert list(finished[f"{case.id}-{after}"].outputs[0].token_ids) == expected(case).tokens, case.id
