"""Every strategy through the real engine, in float32: the tokens and the number of forward passes are the reference
decoders', whatever else is in the batch. Above temperature 0 these are given the noise that the engine draws.

The reference decoders, `reference/fast_dllm.py` and `reference/d2f.py`, share no code with the engine. All cases of a
checkpoint are decoded together, sixteen at a time, and again alone.
"""

import functools
import itertools
import math
import random
from typing import Any

import pytest
from reference import fast_dllm
from support.cases import POLICIES, difference, expected, random_prompt
from support.checkpoints import RANDOM_WEIGHTS, reference
from support.engines import counted_launches, drive, engine, model_runner, num_forwards, scheduler
from support.strategy_cases import (
    CACHED,
    CACHES,
    FAMILIES,
    HOLE,
    PARALLEL,
    SHAPES,
    SUFFIX,
    TEMPLATE,
    StrategyCase,
    by_probability,
    grid,
    guided,
    result,
    run,
    run_mixed,
    without_steps,
)
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

from dllm_plugin.checkpoints import tasks
from dllm_plugin.scheduler import scheduler as scheduling

SCHEDULED = [
    case
    for family in FAMILIES
    for policy in POLICIES
    for cache in (CACHES if policy in ("low_confidence", "entropy") else CACHES[:2])
    for case in grid(family, SHAPES, {"remasking": policy} | cache)
] + [case for family in FAMILIES for case in grid(family, SHAPES, {"remasking": "sequential"})]
PARALLEL_CASES = [
    case
    for family in FAMILIES
    for pace in PARALLEL
    for cache in ({}, *CACHES)
    for case in grid(family, without_steps(SHAPES), {"remasking": by_probability(family)} | pace | cache)
]

INFILLING = [
    case
    for family in FAMILIES
    for cache in ({}, *CACHES)
    for remasking in (by_probability(family), "entropy")
    for case in (
        *grid(family, SHAPES[1:3], {"remasking": remasking, "suffix": SUFFIX} | cache),
        *grid(
            family,
            ((14, 9, {}), (14, 120, {"block_length": 4}), (14, 3, {"block_length": 3, "steps": 9})),
            {"remasking": remasking, "template": TEMPLATE} | cache,
        ),
        *grid(
            family,
            ((14, 9, {"block_length": 4}),),
            {"remasking": remasking, "template": TEMPLATE, "suffix": SUFFIX} | cache,
        ),
        *grid(
            family,
            ((20, 6, {"block_length": 4, "canvas_length": 9, "suffix": SUFFIX}),),
            {"remasking": remasking} | cache,
        ),
    )
] + [
    case
    for family in FAMILIES
    for cache in ({}, *CACHES[:2])
    for case in grid(
        family,
        ((14, 9, {"block_length": 4, "template": TEMPLATE}),),
        {"remasking": by_probability(family), "threshold": 0.2} | cache,
    )
]
GUIDED = [
    case
    for family in FAMILIES
    for given in ({"template": TEMPLATE}, {"suffix": SUFFIX}, {"template": TEMPLATE, "suffix": SUFFIX})
    for case in grid(
        family, ((14, 9, {"block_length": 4}),), {"remasking": by_probability(family), "cfg_scale": 1.5} | given
    )
]
CANVASES = [
    case
    for family in FAMILIES
    for cache in CACHES
    for case in (
        *grid(
            family,
            ((24, 5, {"canvas_length": 8}), (21, 11, {"canvas_length": 10, "block_length": 4, "steps": 6})),
            {"remasking": by_probability(family)} | cache,
            {"remasking": "entropy"} | cache,
        ),
        *grid(
            family,
            ((30, 120, {"canvas_length": 12, "block_length": 5}),),
            {"remasking": by_probability(family), "threshold": 0.2} | cache,
        ),
    )
]
CAPPED = [
    case
    for family in FAMILIES
    for cap in (1, 4, 9)
    for cache in ({}, *CACHES[:2])
    for case in (
        *grid(family, SHAPES[:3], {"remasking": by_probability(family), "max_steps": cap} | cache),
        *grid(
            family,
            ((14, 9, {"block_length": 4}),),
            {"remasking": "entropy", "max_steps": cap, "template": TEMPLATE} | cache,
        ),
    )
]

# block, add, complete and accept thresholds, blocks open at once
PIPELINES = (
    (8, 0.1, 0.95, 0.2, 0),
    (8, 0.1, 0.95, 0.05, 0),
    (4, 0.25, 0.5, 0.35, 0),
    (5, 0.0, 1.0, 0.25, 0),  # a block every step
    (5, 1.0, 0.0, 0.25, 0),  # one after another
    (10, 0.1, 0.9, 0.35, 0),  # a share is reached exactly
    (4, 0.0, 0.5, 0.3, 1),
    (4, 0.0, 0.5, 0.3, 2),
    (4, 0.0, 0.5, 0.05, 2),
    (3, 0.0, 0.0, 0.3, 4),
    (32, 0.1, 0.95, 1.0, 0),  # a token a step in each block that must progress
)
D2F = [
    {
        "strategy": "d2f",
        "block_length": block,
        "d2f_add_threshold": add,
        "d2f_complete_threshold": complete,
        "d2f_accept_threshold": accept,
    }
    | ({"d2f_max_blocks": most} if most else {})
    for block, add, complete, accept, most in PIPELINES
]
PIPELINED = [
    case
    for family in FAMILIES
    for case in (
        *grid(family, ((24, 9, {}), (17, 1, {}), (40, 120, {}), (12, 150, {})), *D2F),
        *grid(family, ((30, 7, {"canvas_length": 13}),), *D2F[:4]),
        *grid(family, ((24, 9, {"max_steps": 1}), (24, 9, {"max_steps": 5}), (40, 120, {"max_steps": 7})), *D2F[:4]),
    )
]
UNTIL_EOS = [
    case
    for checkpoint in ("llada-loud", "dream-loud")
    for case in (
        *grid(checkpoint, ((24, 9, {}), (40, 3, {}), (40, 120, {}), (30, 5, {"canvas_length": 13})), *D2F, eos=True),
        *grid(
            checkpoint,
            ((24, 9, {"block_length": 8}), (24, 3, {"canvas_length": 7})),
            *({"remasking": by_probability(checkpoint), "threshold": 0.2} | cache for cache in ({}, *CACHES)),
            eos=True,
        ),
    )
]

SAMPLINGS = (
    {"temperature": 0.2},
    {"temperature": 0.5, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 6},
    {"temperature": 1.2, "top_p": 0.6, "top_k": 9},
    {"temperature": 0.8, "min_p": 0.2, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 1},  # every probability is 1, or of the mask, which is not chosen: 0
)
DRAWN = [
    case
    for family in FAMILIES
    for sampling in SAMPLINGS
    for case in (
        *grid(family, ((24, 9, {}), (17, 1, {}), (40, 120, {}), (30, 7, {"canvas_length": 13})), *D2F[:4], **sampling),
        *grid(family, ((24, 9, {"max_steps": 3}),), *D2F[:2], **sampling),
        *grid(f"{family}-loud", ((24, 9, {}),), *D2F[::3], eos=True, **sampling),
        # whatever the two policies that d2f admits do elsewhere
        *grid(
            family, ((24, 9, {}),), *({"remasking": r} | D2F[0] for r in ("low_confidence", "maskgit_plus")), **sampling
        ),
    )
]

# every probability of these is exactly 1, and 1 is not above a threshold of 1
RANDOM_WEIGHTS |= {
    f"{family}-saturated": (family, {"seed": 3, "loud": dict.fromkeys(range(331), 1e3)}) for family in FAMILIES
}
SATURATED = [
    case
    for family in FAMILIES
    for case in grid(
        f"{family}-saturated",
        ((12, 9, {"block_length": 4}),),
        *({"remasking": by_probability(family), "threshold": threshold} for threshold in (1.0, 0.999)),
        *({"strategy": "d2f", "d2f_accept_threshold": threshold} for threshold in (1.0, 0.999)),
    )
]

PADDED = [
    *grid(
        "llada-padded", SHAPES[:1], {"remasking": "low_confidence"} | CACHES[0], {"remasking": "entropy"} | CACHES[1]
    ),
    *grid("llada-padded", ((24, 9, {}),), D2F[0], **SAMPLINGS[1]),
]

ALL = (
    SCHEDULED
    + PARALLEL_CASES
    + INFILLING
    + GUIDED
    + CANVASES
    + CAPPED
    + PIPELINED
    + UNTIL_EOS
    + DRAWN
    + SATURATED
    + PADDED
)
assert len({case.id for case in ALL}) == len(ALL)


@functools.cache
def together(checkpoint: str) -> dict[str, RequestOutput]:
    return run_mixed([case for case in ALL if case.checkpoint == checkpoint])


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.id)
def test_equals_the_reference(case: StrategyCase):
    assert difference(case, together(case.checkpoint)[case.id]) == ""


@pytest.mark.parametrize("checkpoint", [*FAMILIES, "llada-loud", "dream-loud"])
def test_alone_equals_together(checkpoint: str):
    cases = [case for case in ALL if case.checkpoint == checkpoint][::3]
    for case, output in zip(cases, run(engine(checkpoint), cases, alone=True), strict=True):
        assert result(output) == result(together(checkpoint)[case.id]), case.id


def test_the_references_two_ways_agree():
    """D2F's cache is exact: the published cache gives what recomputing everything gives."""
    for case in [case for case in PIPELINED + UNTIL_EOS + DRAWN if "strategy" in case.extras][::3]:
        with_cache, without = (case.expected(with_cache=cached) for cached in (True, False))
        assert with_cache == without, case.id


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", CACHED)
def test_a_refresh_every_step_equals_no_cache(family: str, cache: str):
    def plain(case: StrategyCase) -> StrategyCase:
        return StrategyCase(
            family, case.tokens, case.prompt, {k: v for k, v in case.extras.items() if not k.startswith("cache")}
        )

    chosen = [case for case in SCHEDULED + PARALLEL_CASES + INFILLING + CANVASES if case.checkpoint == family]
    cases = list({case.id: case for case in map(plain, chosen)}.values())
    refreshed = [
        StrategyCase(family, c.tokens, c.prompt, c.extras | {"cache": cache, "cache_refresh": 1}) for c in cases
    ]
    outputs = run(engine(family), cases + refreshed)
    for case, none, cached in zip(cases, outputs[: len(cases)], outputs[len(cases) :], strict=True):
        assert result(none) == result(cached), case.id


# ---- what a result says


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_are_used_and_drift(family: str):
    """Otherwise the parity above would not tell a cache from none."""
    for cache in CACHED:
        same = [
            expected(StrategyCase(family, 16, 9, {"remasking": policy, "block_length": 8} | mode)).tokens
            for policy in ("low_confidence", "entropy")
            for mode in ({"cache": cache}, {})
        ]
        assert same[0] != same[1] and same[2] != same[3]


@pytest.mark.parametrize("case", CAPPED, ids=lambda case: case.id)
def test_a_cap_on_forward_passes(case: StrategyCase):
    output = together(case.checkpoint)[case.id]
    completion, cap = output.outputs[0], case.extras["max_steps"]
    uncapped = StrategyCase(
        case.checkpoint, case.tokens, case.prompt, {k: v for k, v in case.extras.items() if k != "max_steps"}
    )
    assert num_forwards(output) == min(cap, expected(uncapped).num_forwards)
    assert len(completion.token_ids) == case.tokens
    mask = reference(case.checkpoint).mask_token_id
    assert mask not in completion.token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cap_that_ends_a_request_is_its_stop_reason(family: str):
    prompt = random_prompt(7, "cap")
    policy = by_probability(family)
    capped = {"diffusion_remasking": policy, "diffusion_canvas_length": 6, "diffusion_max_steps": 9}
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False, extra_args=capped)
    (output,) = engine(family).generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    completion = output.outputs[0]
    first = fast_dllm.generate(reference(family), prompt, 6, 6, remasking=policy)
    left = 9 - first.num_forwards
    second = fast_dllm.generate(reference(family), prompt + first.tokens, 6, 6, remasking=policy, max_steps=left)
    assert list(completion.token_ids) == first.tokens + second.tokens
    assert num_forwards(output) == 9
    assert (completion.finish_reason, completion.stop_reason) == ("length", "diffusion_max_steps")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cap_that_leaves_a_full_response(family: str):
    (case,) = (
        c
        for c in CAPPED
        if c.checkpoint == family and c.extras.get("max_steps") == 4 and c.tokens == 16 and "cache" not in c.extras
    )
    completion = together(family)[case.id].outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("length", "diffusion_max_steps")


@pytest.mark.parametrize("case", [c for c in INFILLING if "template" in c.extras], ids=lambda case: case.id)
def test_pinned_ids_stay(case: StrategyCase):
    tokens = together(case.checkpoint)[case.id].outputs[0].token_ids
    assert len(tokens) == len(TEMPLATE)
    assert all(want in (HOLE, token) for want, token in zip(TEMPLATE, tokens, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_ends_its_request(family: str):
    extras = {"diffusion_template": list(TEMPLATE), "diffusion_remasking": by_probability(family)}
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, detokenize=False, extra_args=extras)
    (output,) = engine(family).generate([{"prompt_token_ids": random_prompt(9, f"{family} 9")}], params, use_tqdm=False)
    completion = output.outputs[0]
    assert len(completion.token_ids) == len(TEMPLATE)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "diffusion_template")


@pytest.mark.parametrize("checkpoint", ["tiny-llada", "tiny-dream"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_text_is_what_stands_between_prompt_and_suffix(checkpoint: str, cache: str):
    llm = engine(checkpoint)
    tokenizer, policy = llm.get_tokenizer(), by_probability(checkpoint.removeprefix("tiny-"))
    suffix = " dog."
    suffix_ids = tokenizer.encode(suffix, add_special_tokens=False)
    extras = {"remasking": policy, "block_length": 5, "cache": cache}

    def generate(**more: Any) -> RequestOutput:
        given = {f"diffusion_{name}": value for name, value in (extras | more).items()}
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args=given)
        return llm.generate(["Say cat three"], params, use_tqdm=False)[0]

    as_text, as_ids, without = generate(suffix=suffix), generate(suffix=suffix_ids), generate()
    want = fast_dllm.generate(
        reference(checkpoint), list(as_text.prompt_token_ids), 12, 12, 5,
        cache=cache, remasking=policy, suffix_ids=suffix_ids,
    )  # fmt: skip
    for output in (as_text, as_ids):
        assert result(output) == (want.tokens, want.num_forwards)
        assert output.outputs[0].text == text_of(tokenizer, want.tokens)
    assert without.outputs[0].text == text_of(tokenizer, list(without.outputs[0].token_ids))


def text_of(tokenizer: Any, token_ids: list[int]) -> str:
    """vLLM holds back the bytes of a character that is not complete; a tokenizer shows them as U+FFFD."""
    return tokenizer.decode(token_ids, skip_special_tokens=True).rstrip("\ufffd")


@pytest.mark.parametrize("case", GUIDED, ids=lambda case: case.id)
def test_guidance_hides_the_prompt_alone(case: StrategyCase):
    """Fast-dLLM hides all that is given: with suffix and pinned tokens hidden too, the answer is another one."""
    template, suffix, start = case.extras.get("template", ()), case.extras.get("suffix", ()), case.prompt
    pinned = [start + i for i, token in enumerate(template) if token != HOLE]
    hidden = [*range(start), *pinned, *range(start + case.tokens, start + case.tokens + len(suffix))]
    settings = {name: value for name, value in case.extras.items() if name not in ("cfg_scale", "suffix")}
    model = guided(reference(case.checkpoint), case.extras["cfg_scale"], hidden)
    published = fast_dllm.generate(model, case.prompt_ids, case.tokens, case.tokens, suffix_ids=suffix, **settings)
    assert published.tokens != expected(case).tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_factor_makes_no_exception_for_the_last_rank(family: str, monkeypatch):
    """Fast-dLLM's loop takes it where it alone fails, and needs another number of passes."""
    admitted = fast_dllm.admitted

    def published(confidence: Tensor, factor: float) -> int:
        number = admitted(confidence, factor)
        return len(confidence) if number == len(confidence) - 1 else number

    cases = [case for case in PARALLEL_CASES if case.checkpoint == family and "factor" in case.extras]
    ours = [expected(case) for case in cases]
    monkeypatch.setattr(fast_dllm, "admitted", published)
    assert sum(case.expected() != want for case, want in zip(cases, ours, strict=True)) >= 3


# ---- company


def mixture(family: str, number: int = 28, seed: int = 5) -> list[StrategyCase]:
    kinds = (SCHEDULED, PARALLEL_CASES, INFILLING, CANVASES, CAPPED, PIPELINED, DRAWN)
    draw = random.Random(seed)
    of_family = [[case for case in kind if case.checkpoint == family] for kind in kinds]
    return [draw.choice(of_family[i % len(kinds)]) for i in range(number)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_requests_that_join_and_leave(family: str, seed: int):
    cases = mixture(family, seed=seed)
    draw = random.Random(seed)
    arrivals = [draw.randrange(40) for _ in cases]
    outputs, running = drive(engine(family), [case.request for case in cases], arrivals)
    assert max(running) > 5 and len(set(running)) > 5
    assert [difference(case, output) for case, output in zip(cases, outputs, strict=True)] == [""] * len(cases)


@pytest.mark.parametrize("unread", [0, 1])
@pytest.mark.parametrize("checkpoint", [*FAMILIES, "llada-loud", "dream-loud"])
def test_steps_share_an_engine_step_until_a_block_is_filled(checkpoint: str, unread: int, monkeypatch):
    """How many a threshold admits is known after the step: no pass is in vain, not even where the host reads one late."""
    llm = engine(checkpoint)
    monkeypatch.setattr(model_runner(llm), "overlaps", bool(unread))
    monkeypatch.setattr(scheduling, "MOST_SECONDS", math.inf)
    cases = [case for case in PARALLEL_CASES + UNTIL_EOS if case.checkpoint == checkpoint and case.admits]
    passes = engine_steps = 0
    for case in cases:
        before = scheduler(llm).current_step
        with counted_launches(llm) as launches:
            assert difference(case, run(llm, [case])[0]) == ""
        assert len(launches) == expected(case).num_forwards
        passes, engine_steps = passes + len(launches), engine_steps + scheduler(llm).current_step - before
    assert 0 < engine_steps < passes, (len(cases), engine_steps, passes)


@pytest.mark.parametrize("checkpoint", [*FAMILIES, "llada-loud", "dream-loud"])
def test_pipelines_among_themselves(checkpoint: str):
    """Blocks that fill before the first one is full become final with it, all at once."""
    cases = [case for case in PIPELINED + UNTIL_EOS if case.checkpoint == checkpoint and "strategy" in case.extras]
    for case, output in zip(cases, run(engine(checkpoint), cases), strict=True):
        assert difference(case, output) == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_batch_over_a_small_token_budget(family: str):
    """Windows take turns where the step's token budget cannot hold all of them."""
    llm = engine(family, max_num_batched_tokens=512, max_model_len=512, max_num_seqs=16)
    cases = mixture(family, seed=11)
    outputs = run(llm, cases)
    assert [difference(case, output) for case, output in zip(cases, outputs, strict=True)] == [""] * len(cases)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("page", [16, 32])
def test_smaller_pages(family: str, page: int):
    """A window, a block and a prompt cross pages at other places."""
    llm = engine(family, block_size=page)
    assert model_runner(llm).batches.page_size == page
    cases = [case for case in SCHEDULED + PARALLEL_CASES + CANVASES + PIPELINED if case.checkpoint == family][::4]
    for case, output in zip(cases, run(llm, cases), strict=True):
        assert difference(case, output) == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_pages_that_are_not_in_order(family: str):
    """Later requests get the pages of those that left, so a block table is no run of numbers."""
    llm = engine(family, block_size=16)
    cases = [case for case in SCHEDULED + PIPELINED if case.checkpoint == family and case.prompt >= 110][:24]
    draw = random.Random(3)
    outputs, _ = drive(llm, [case.request for case in cases], [draw.randrange(30) for _ in cases])
    assert [difference(case, output) for case, output in zip(cases, outputs, strict=True)] == [""] * len(cases)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("after", [1, 2, 5, 9, 14])
@pytest.mark.parametrize("as_new", [False, True])
def test_preempted_requests_decode_the_same(family: str, after: int, as_new: bool, monkeypatch):
    """`as_new`: on CUDA vLLM's scheduler hands them to the worker as new ones."""
    monkeypatch.setattr(scheduler(engine(family)), "use_v2_model_runner", as_new)
    llm, cases = engine(family), mixture(family, number=14, seed=after)
    for i, case in enumerate(cases):
        llm.llm_engine.add_request(
            f"preempted-{as_new}-{after}-{i}", {"prompt_token_ids": case.prompt_ids}, case.sampling_params
        )
    finished: dict[str, RequestOutput] = {}
    for step in itertools.count(1):
        if not llm.llm_engine.has_unfinished_requests():
            break
        finished |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
        if step in (after, 2 * after + 1):
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
    for i, case in enumerate(cases):
        tokens = list(finished[f"preempted-{as_new}-{after}-{i}"].outputs[0].token_ids)
        assert tokens == expected(case).tokens, case.id


# ---- memory


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_leaks_after_a_thousand_requests_with_aborts(family: str):
    llm = engine(family, block_size=16)
    plans, pool, runner = scheduler(llm).denoising, scheduler(llm).kv_cache_manager.block_pool, model_runner(llm)
    settle(llm)
    num_free, num_slots = pool.get_num_free_blocks(), len(runner.state._free)
    draw = random.Random(family)
    live: list[str] = []
    finished = aborted = added = 0
    while added < 1000 or live:
        while added < 1000 and len(live) < 20:
            name = f"leak-{added}"
            llm.llm_engine.add_request(name, *random_request(family, draw))
            live.append(name)
            added += 1
        done = [output.request_id for output in llm.llm_engine.step() if output.finished]
        finished += len(done)
        live = [name for name in live if name not in done]
        if live and draw.random() < 0.4:
            victims = draw.sample(live, min(len(live), draw.randint(1, 3)))
            llm.llm_engine.abort_request(victims)
            aborted += len(victims)
            live = [name for name in live if name not in victims]
        if draw.random() < 0.01:
            llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
    settle(llm)
    assert finished + aborted == 1000 and min(finished, aborted) > 100
    assert pool.get_num_free_blocks() == num_free
    assert len(runner.state._free) == num_slots
    assert not plans and not runner.state.requests and not runner.batches.pages
    assert not scheduler(llm).requests and not scheduler(llm).running and not scheduler(llm).waiting


def random_request(family: str, draw: random.Random) -> tuple[dict[str, list[int]], SamplingParams]:
    cache = {"cache": draw.choice(["none", *CACHED]), "block_length": draw.randint(1, 6)}
    extras = draw.choice(
        [
            {"strategy": "d2f", "block_length": draw.randint(1, 5), "d2f_accept_threshold": draw.random() / 2},
            {"threshold": draw.random() / 2} | cache,
            {"steps": draw.randint(8, 9), "cache_refresh": draw.randint(0, 3)} | cache,
            {"template": [draw.choice([HOLE, 9]) for _ in range(4)] + [HOLE]} | cache,
            {"suffix": [7] * draw.randint(1, 20)} | cache,
            {"max_steps": draw.randint(1, 4), "canvas_length": draw.randint(1, 8)} | cache,
        ]
    )
    prompt = [draw.randrange(10, 310) for _ in range(draw.choice([1, 3, 15, 16, 17, 40]))]
    params = SamplingParams(
        temperature=0,
        max_tokens=draw.randint(5, 8),
        ignore_eos=draw.random() < 0.5,
        detokenize=False,
        extra_args={f"diffusion_{name}": value for name, value in extras.items()},
    )
    return {"prompt_token_ids": prompt}, params


def settle(llm: LLM) -> None:
    """Step until workers were told of every request that ended."""
    while llm.llm_engine.has_unfinished_requests() or scheduler(llm).has_finished_requests():
        llm.llm_engine.step()


# ---- drift


def test_drift_report():
    """The share of tokens that differ from those without a cache; none where everything is refreshed every step."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from strategies import drift

    questions = tasks.questions("held_out", 12, seed=0)
    llm = engine("tiny-llada")
    assert drift(llm, questions, {"cache": "dual", "cache_refresh": 1, "block_length": 8}) == 0
    assert 0 <= drift(llm, questions, {"cache": "dual", "block_length": 8}) <= 1
