"""Strategy `block` over vLLM's prefix cache: what requests share of each other's pages changes no token.

A page may be shared once each of its positions lies in a final block, whose keys and values do not change any more; and a
hit ends where a block does. Every case is the reference's, token for token, and has the hits that it says.
"""

import math
import random
from dataclasses import replace

import pytest
from support.block_cases import BlockCase, result
from support.cases import difference, expected, random_prompt
from support.engines import drive, engine, scheduler
from support.steps import Steps, leave_engines_empty, nothing_is_left  # noqa: F401
from vllm import LLM

from dllm_plugin.scheduler.block_causal import BlockCausalPlan

PAGES = [(16, 3), (16, 4), (16, 8), (16, 16), (16, 24), (16, 32), (16, 64), (128, 4), (128, 24), (128, 32)]
KINDS = (
    {"block_steps": 3},
    {"threshold": 0.1, "block_steps": 6},
    {"preset": "speed", "threshold": 0.1, "max_post_steps": 2},
)


def engine_of(page: int, block_length: int, checkpoint: str = "sdar", **settings) -> LLM:
    """An engine with an empty prefix cache, whose requests have this block length where they say nothing."""
    llm = engine(checkpoint, block_size=page, additional_config=Config(block_length), **settings)
    assert llm.reset_prefix_cache()
    return llm


class Config(dict):
    """--additional-config, hashable because engines are remembered by their settings."""

    def __init__(self, block_length: int) -> None:
        super().__init__(diffusion={"block_length": block_length})

    def __hash__(self) -> int:
        return hash(self["diffusion"]["block_length"])


def run(llm: LLM, cases: list[BlockCase], chunked_by: int | None = None) -> list[int]:
    """Cached tokens of each of the cases, decoded together, and each as the reference does it."""
    outputs, _ = drive(llm, [case.request for case in cases])
    for case, output in zip(cases, outputs, strict=True):
        more = case.num_chunks(chunked_by, output.num_cached_tokens) if chunked_by else 0
        assert difference(case, output, more) == "", f"{output.num_cached_tokens} cached"
    return [output.num_cached_tokens for output in outputs]


def most_cached(num_known: int, prompt: int, page: int, block_length: int) -> int:
    """Of a prompt's tokens, whole pages and whole blocks of what is known, and never the last one."""
    both = math.lcm(page, block_length)
    return min(num_known // page * page, prompt - 1) // both * both


@pytest.mark.parametrize(("page", "length"), PAGES)
def test_the_same_prompt_again(page, length):
    """Cold, and then with all that a prompt may find, at every side of the edges of pages and blocks."""
    llm, both = engine_of(page, length), math.lcm(page, length)
    prompts = [both - 1, both, both + 1, min(2 * both + length // 2, 400)]
    cases = [
        BlockCase("sdar", 9, prompt, {"block_length": length} | kind, note=f"{kind}")
        for prompt in prompts
        for kind in KINDS
    ]
    assert run(llm, cases) == [0] * len(cases)
    assert run(llm, cases) == [most_cached(case.prompt // length * length, case.prompt, page, length) for case in cases]
    nothing_is_left(llm)


@pytest.mark.parametrize(("page", "length"), PAGES)
def test_a_prompt_that_shares_a_part(page, length):
    """The part ends within a page and within a block, whose keys depend on what follows in the prompt or the answer."""
    llm, both = engine_of(page, length), math.lcm(page, length)
    whole = random_prompt(min(2 * both + page + 5, 450), "whole")
    first = BlockCase("sdar", 5, tuple(whole), {"block_length": length, "block_steps": 2})
    run(llm, [first])
    for shared in sorted({both - 1, both, both + 3, both + page, min(2 * both, len(whole) - 6), len(whole) - 2}):
        other = (*whole[:shared], *random_prompt(7, f"other {shared}"))
        (cached,) = run(llm, [replace(first, prompt=other)])
        assert cached == most_cached(shared, len(other), page, length)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("page", "length"), PAGES)
def test_a_second_turn_of_a_chat(page, length, kind):
    """Its prompt is that of the first, the answer, and more: it finds the blocks of the answer that became final too."""
    llm, both = engine_of(page, length), math.lcm(page, length)
    first = BlockCase("sdar", both + 7, 9, {"block_length": length} | kind, note="chat")
    run(llm, [first])
    prompt = (*first.prompt_ids, *expected(first).tokens, *random_prompt(5, "chat"))
    second = replace(first, prompt=prompt, tokens=6)
    (cached,) = run(llm, [second])
    # all blocks but the last one, which no pass has forwarded with all its tokens
    assert cached == most_cached((both + 15) // length * length, len(prompt), page, length) > 0
    assert run(llm, [second]) == [most_cached(len(prompt) // length * length, len(prompt), page, length)]


# ---- what must not be shared


@pytest.mark.parametrize(("page", "length"), [(16, 24), (16, 32), (16, 64), (16, 4)])
@pytest.mark.parametrize("kind", ["aborted", "ended"])
@pytest.mark.parametrize("filled", [False, True], ids=["in_mid_block", "filled"])
def test_a_block_that_is_not_final_is_never_shared(page, length, filled, kind):
    """Its tokens come out from left to right and fill pages, whose keys were written beside masks.

    Where the last one has come, no pass has forwarded it yet.
    """
    llm, both = engine_of(page, length), math.lcm(page, length)
    num_tokens = both if filled else both - length // 4 - 1
    case = BlockCase("sdar", both + 20, both, {"block_length": length, "remasking": "sequential"}, note="poison")
    if kind == "ended":
        case = replace(case, tokens=num_tokens)
        run(llm, [case])
        taken = expected(case).tokens
    else:
        steps = Steps(llm)
        steps.add(case)
        while len(steps.emitted["A"]) < num_tokens:
            steps.step()
        steps.abort("A")
        taken = steps.emitted["A"]
    prompt = (*case.prompt_ids, *taken, *random_prompt(3, "poison"))
    final = both + (num_tokens - 1) // length * length
    after = replace(case, prompt=prompt, tokens=5)
    assert run(llm, [after]) == [most_cached(final, len(prompt), page, length)]
    assert not filled or most_cached(len(prompt), len(prompt), page, length) > final, "it would not be found anyway"


def test_another_block_length_neither_reads_nor_leaves_pages():
    """Its keys are others: a position sees another block. Beside it, the usual length goes on as ever."""
    llm = engine_of(16, 4)
    usual = BlockCase("sdar", 9, 70, {"threshold": 0.2}, note="lengths")
    other = replace(usual, extras={"threshold": 0.2, "block_length": 8})
    assert expected(usual).tokens != expected(other).tokens
    assert run(llm, [other]) == [0] and run(llm, [other]) == [0]
    assert run(llm, [usual]) == [0]
    assert run(llm, [other, usual, replace(usual, extras={"block_length": 4}), other]) == [0, 64, 64, 0]


@pytest.mark.parametrize("length", [4, 24])
def test_what_shapes_an_answer_does_not_shape_its_prompt(length):
    """Pages are shared between requests that decode in every other way, in one batch, and pinned blocks are as any."""
    llm = engine_of(16, length)
    prompt = tuple(random_prompt(100, "shapes"))
    kinds = [
        {},
        {"threshold": 0.1},
        {"remasking": "random"},
        {"preset": "speed"},
        {"sub_block_length": 2},
        {"template": (-1, *[7] * 30, -1)},
        {"max_steps": 2},
    ]
    cases = [BlockCase("sdar", 32, prompt, {"block_length": length} | kind) for kind in kinds]
    cases += [
        BlockCase("sdar", 32, prompt, {"block_length": length}, {"temperature": 0.8}, seed=seed) for seed in (1, 2)
    ]
    run(llm, cases[:1])
    assert run(llm, cases) == [96] * len(cases)


def test_requests_of_one_prompt_at_once():
    """Those that begin together find nothing; those that come while these decode find their prompt, and their answer."""
    llm = engine_of(16, 8)
    case = BlockCase("sdar", 60, 50, {"block_length": 8}, note="at once")
    longer = replace(case, prompt=(*case.prompt_ids, *expected(case).tokens[:30], 5), tokens=9)
    outputs, _ = drive(llm, [one.request for one in (case, case, case, longer)], [0, 0, 2, 40])
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 48, 80]
    assert [difference(one, out) for one, out in zip((case, case, case, longer), outputs, strict=True)] == [""] * 4


# ---- pages that go and come


def cramped(num_pages: int, **settings) -> LLM:
    page = 2 * 16 * 2 * 32 * 4 * 2  # k and v, tokens, heads, head size, bytes, layers
    return engine_of(16, 8, max_model_len=128, kv_cache_memory_bytes=(num_pages + 1) * page, **settings)


def test_pages_that_were_evicted():
    """Ten prompts over pages for two or three: what is found is right, and what is gone is written again."""
    llm = cramped(12)
    cases = [BlockCase("sdar", 20, 40 + i, {"threshold": 0.1}, note=f"evicted {i}") for i in range(10)]
    cases = [replace(case, extras={"block_length": 8} | case.extras) for case in cases]
    draw = random.Random(1)
    cached = [run(llm, [draw.choice(cases)])[0] for _ in range(40)]
    assert 0 < sum(map(bool, cached)) < 30
    outputs, _ = drive(llm, [case.request for case in cases], [draw.randrange(9) for _ in cases])
    assert [difference(*pair) for pair in zip(cases, outputs, strict=True)][:1] == [""]
    assert [result(output) for output in outputs] == [expected(case).tokens for case in cases]
    nothing_is_left(llm)


ANSWERS = ({"block_steps": 3}, {"threshold": 0.1}, {"preset": "speed"})


@pytest.mark.parametrize("kind", ANSWERS, ids=str)
@pytest.mark.parametrize("as_new", [False, True])
@pytest.mark.parametrize("length", [8, 24])
def test_a_preempted_request_comes_back_to_its_own_pages(length, kind, as_new, monkeypatch):
    """Those of its prompt and of its final blocks; `as_new`: as on CUDA."""
    llm = engine_of(16, length)
    inside = scheduler(llm)
    monkeypatch.setattr(inside, "use_v2_model_runner", as_new)
    restart, found = BlockCausalPlan.restart_canvas, []
    monkeypatch.setattr(BlockCausalPlan, "restart_canvas", lambda plan: found.append(plan.num_cached) or restart(plan))
    cases = [BlockCase("sdar", 70, 20 + i, {"block_length": length} | kind, note=f"preempted {i}") for i in range(6)]
    steps = Steps(llm)
    for case in cases:
        steps.add(case)
    emitted_before = [1, 30, 55]
    while llm.llm_engine.has_unfinished_requests():
        steps.step()
        if emitted_before and len(steps.emitted["A"]) >= emitted_before[0]:
            emitted_before.pop(0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(inside.kv_cache_manager, "reset_prefix_cache", lambda: True)  # all but the pages
                llm.reset_prefix_cache(reset_running_requests=True)
    assert list(steps.emitted.values()) == [expected(case).tokens for case in cases]
    assert max(found) >= 48 and len(set(found)) > 1
    nothing_is_left(llm)


@pytest.mark.parametrize("kind", ANSWERS, ids=str)
def test_requests_that_take_each_others_pages(kind):
    """A KV cache for one and a half of six that grow: what a preempted request finds when it comes back is right."""
    llm = cramped(12)
    cases = [BlockCase("sdar", 70, 20 + i, {"block_length": 8} | kind, note=f"grows {i}") for i in range(6)]
    steps = Steps(llm)
    for case in cases:
        steps.add(case)
    preempted: set[str] = set()
    while llm.llm_engine.has_unfinished_requests():
        steps.step()
        preempted |= {name for name, request in scheduler(llm).requests.items() if request.num_preemptions}
    assert list(steps.emitted.values()) == [expected(case).tokens for case in cases]
    assert len(preempted) > 2
    nothing_is_left(llm)


@pytest.mark.parametrize("budget", [20, 50])
def test_a_prompt_in_chunks_finds_and_leaves_pages(budget):
    """Pages of a chunk are shared while the next one is forwarded; the first chunk begins behind those that are found."""
    llm = engine_of(16, 8, max_num_batched_tokens=budget)
    first = BlockCase("sdar", 9, 150, {"block_length": 8, "threshold": 0.2}, note="chunks")
    steps = Steps(llm)
    steps.add(first)
    steps.step()
    steps.step()
    second = steps.add(first)
    steps.drain()
    assert steps.finished[second].num_cached_tokens == 2 * budget // 8 * 8 // 16 * 16
    cases = [first, replace(first, prompt=(*first.prompt_ids[:101], *random_prompt(90, "chunks")))]
    assert run(llm, cases, chunked_by=budget) == [144, 96]
    nothing_is_left(llm)


def test_a_salt_keeps_prompts_apart():
    """vLLM's own: who gives another salt finds no pages."""
    llm = engine_of(16, 4)
    prompt, params = BlockCase("sdar", 4, 40, note="salt").request
    cached = []
    for salt in ("a", "b", "a"):
        request = {"prompt_token_ids": prompt, "cache_salt": salt}
        (output,) = llm.generate([request], params, use_tqdm=False)
        cached.append(output.num_cached_tokens)
    assert cached == [0, 0, 32]


def test_without_prefix_caching_nothing_is_found():
    llm = engine_of(16, 4, enable_prefix_caching=False)
    case = BlockCase("sdar", 9, 70)
    assert run(llm, [case]) == run(llm, [case]) == [0]


def test_any_course_of_chats():
    """Turns of several conversations over few pages, some of which are aborted: tokens are always the reference's."""
    llm, draw = cramped(30), random.Random(5)
    chats = [random_prompt(draw.randrange(3, 30), f"chat {i}") for i in range(5)]
    cached = []
    for turn in range(30):
        i = draw.randrange(5)
        kind = draw.choice([{"threshold": 0.1}, {"block_steps": 3}, {"preset": "speed"}, {"remasking": "random"}])
        case = BlockCase("sdar", draw.randrange(1, 20), tuple(chats[i]), {"block_length": 8} | kind, note=f"{turn}")
        if draw.random() < 0.3:
            steps = Steps(llm)
            steps.add(case)
            for _ in range(draw.randrange(1, 9)):
                steps.step()
            steps.abort("A")
            answer = steps.emitted["A"]
        else:
            cached += run(llm, [case])
            answer = expected(case).tokens
        chats[i] = [*chats[i], *answer, *random_prompt(draw.randrange(1, 9), f"turn {turn}")][-100:][: 128 - 20]
    assert sum(map(bool, cached)) > 5
    nothing_is_left(llm)
