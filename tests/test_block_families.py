"""Strategy `block` through the real engine, in float32: tokens and number of forward passes are those of
`reference/block.py`, which shares no code with the engine, whatever else is in the batch.

All cases of a checkpoint are decoded together, sixteen at a time; some again alone, in shifting company, preempted, and
with every token watched. What requests share of each other's pages is in test_block_prefix_caching.py.
"""

import functools
import itertools
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.block_cases import HOLE, BlockCase, grid, result
from support.cases import difference, expected
from support.checkpoints import EOS, MASK
from support.engines import counted_launches, drive, engine, model_runner, num_forwards, scheduler
from support.steps import Steps, check, leave_engines_empty, nothing_is_left  # noqa: F401
from vllm.outputs import RequestOutput

from dllm_plugin.scheduler import scheduler as scheduling

# tokens, prompt length, extras
SHAPES = (
    (16, 8, {}),  # everything divides
    (13, 3, {}),  # nothing does
    (9, 1, {"block_length": 16}),  # one block, longer than the answer
    (20, 130, {"block_length": 6}),  # the prompt lies on two pages of 128
)
ALIGNED = [
    case
    for length in (1, 2, 3, 4, 8)
    for prompt in range(1, 2 * length + 2)
    for case in grid("sdar", [(2 * length + 1, prompt, {"block_length": length})], {"threshold": 0.2})
]
LENGTHS = grid(
    "sdar-b8",
    [(tokens, 5, {"block_length": length}) for length in (1, 2, 3, 4, 8, 16, 32, 64) for tokens in (1, 2, 19)],
    {},
)
SCHEDULES = [
    *grid("sdar", SHAPES, {}, *({"block_steps": steps} for steps in (1, 2, 3, 40))),
    *grid("sdar", SHAPES, *({"threshold": t} for t in (0.9, 0.5, 0.2, 0.05)), {"threshold": 0.1, "block_steps": 2}),
    *grid("sdar", SHAPES, *({"factor": f} for f in (0.5, 1.5, 3.0))),
    *grid("sdar", SHAPES, *({"entropy_bound": b} for b in (0.5, 3.0, 9.0)), {"entropy_bound": 4.0, "block_steps": 2}),
    *grid(
        "sdar",
        SHAPES,
        *({"remasking": r} for r in ("sequential", "entropy", "random")),
        *({"remasking": r, "block_steps": 2} for r in ("sequential", "entropy", "random")),
        *({"alg_temp": t} for t in (0.1, 2.0)),
        {"alg_temp": 0.5, "remasking": "entropy"},
        {"alg_temp": 0.3, "block_steps": 2},
    ),
    *grid("sdar-tied", SHAPES, {}, {"threshold": 0.2}, {"remasking": "entropy"}),
    *grid("sdar-b8", SHAPES, {}, {"threshold": 0.2, "block_steps": 3}, {"entropy_bound": 3.0}),
]
SUB_BLOCKS = grid(
    "sdar-b8",
    SHAPES[:3],
    *(
        {"sub_block_length": length} | kind
        for length in (2, 3)
        for kind in ({}, {"threshold": 0.1}, {"block_steps": 1})
    ),
)
SAMPLINGS = (
    {"temperature": 0.3},
    {"temperature": 0.7, "top_k": 6},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.2, "top_p": 0.6, "top_k": 9},
    {"temperature": 0.9, "top_k": 1},
    {"temperature": 0.8, "min_p": 0.2, "top_p": 0.8},
)
DRAWN = [
    case
    for i, sampling in enumerate(SAMPLINGS)
    for case in (
        *grid(
            "sdar",
            SHAPES[:2],
            {},
            *({"confidence": c, "threshold": 0.3} for c in ("plain", "tempered", "filtered")),
            {"remasking": "entropy"},
            {"entropy_bound": 2.0},
            {"alg_temp": 0.4},
            {"edit_threshold": 0.3, "threshold": 0.4},
            sampling=sampling,
        ),
        *grid(
            "sdar-b8", SHAPES[1:2], {"threshold": 0.5}, {"confidence": "plain"}, sampling=sampling, seed=-(2**63) + i
        ),
    )
]
EDITING = [
    *grid(
        "sdar-b8",
        SHAPES[:3],
        *(
            {"edit_threshold": edit, "threshold": 0.2, "max_post_steps": most}
            for edit in (0.0, 0.2, 0.9)
            for most in (0, 1, 16)
        ),
        {"edit_threshold": 0.05},
        {"edit_threshold": 0.05, "block_steps": 2},
        {"edit_threshold": 0.1, "factor": 1.5},
        {"edit_threshold": 0.1, "alg_temp": 0.5},
    ),
    *grid("sdar", SHAPES, {"preset": "quality"}, {"preset": "speed"}, {"preset": "speed", "threshold": 0.1}),
]
PINNED = (7,) * 9
TEMPLATES = (
    (5, HOLE, HOLE, 7, HOLE, 9, 9, 9, 9, HOLE, HOLE, HOLE, 6, HOLE),
    (*PINNED, HOLE, HOLE, HOLE, 8),  # whole blocks first
    (HOLE, *PINNED, HOLE),  # and between
    (HOLE, HOLE, *PINNED),  # and last
    (*PINNED * 3, HOLE, 4, HOLE),  # beyond the first page of 16
)
INFILLING = [
    case
    for template in TEMPLATES
    for case in (
        *grid(
            "sdar",
            [(len(template), prompt, {"template": template}) for prompt in (8, 3)],
            {},
            {"threshold": 0.1},
            {"edit_threshold": 0.0, "threshold": 0.3, "max_post_steps": 3},
        ),
        *grid("sdar-b8", [(len(template), 6, {"template": template})], {"remasking": "entropy"}, {"block_length": 3}),
        *grid("sdar-b8", [(len(template), 2, {"template": template})], {"sub_block_length": 4}),
    )
]
UNTIL_EOS = [
    *grid(
        "sdar-loud",
        [(24, 9, {}), (24, 4, {"block_length": 8}), (40, 3, {"block_length": 16}), (24, 5, {"block_length": 1})],
        {},
        {"threshold": 0.2},
        {"remasking": "random"},
        {"remasking": "entropy"},
        {"edit_threshold": 0.1, "threshold": 0.3, "max_post_steps": 4},
        eos=True,
    ),
    *grid("sdar-loud", [(40, 3, {"block_length": 16}), (24, 5, {"block_length": 1})], {}, {"remasking": "random"}),
    *grid("sdar", SHAPES[:2], {}, {"preset": "speed"}, stops=tuple(range(0, 331, 9))),
]
ENDS = grid(
    "sdar", [(1, prompt, {}) for prompt in (3, 4, 5)] + [(3, 4, {}), (3, 5, {}), (3, 6, {})], {}, {"block_steps": 1}
)
CANVASES = grid("sdar", [(21, 6, {"canvas_length": n}) for n in (1, 5, 8)], {}, {"threshold": 0.1}, {"preset": "speed"})
CAPPED = [
    *grid(
        "sdar-b8",
        [(20, 5, {"max_steps": cap}) for cap in (1, 2, 3, 7, 8, 9, 60)],
        {},
        {"threshold": 0.2},
        {"edit_threshold": 0.1, "threshold": 0.3},
        {"sub_block_length": 4},
    ),
    *grid("sdar-b8", [(20, 5, {"max_steps": 4}), (9, 8, {"max_steps": 3})], {"threshold": 0.2}, sampling=SAMPLINGS[0]),
    *grid("sdar", [(14, 9, {"max_steps": cap, "template": TEMPLATES[0]}) for cap in (1, 4, 6)], {}),
    *grid("sdar-loud", [(24, 9, {"max_steps": cap, "block_length": 8}) for cap in (2, 5)], {}, eos=True),
]

ALL = [*ALIGNED, *LENGTHS, *SCHEDULES, *SUB_BLOCKS, *DRAWN, *EDITING, *INFILLING, *UNTIL_EOS, *ENDS, *CANVASES, *CAPPED]
assert len({case.id for case in ALL}) == len(ALL) >= 300


def tables(cases: list[BlockCase]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


def differences(cases: list[BlockCase], outputs: list[RequestOutput]) -> list[str]:
    return [wrong for case, output in zip(cases, outputs, strict=True) if (wrong := difference(case, output))]


def mixture(number: int, seed: int, checkpoint: str = "sdar") -> list[BlockCase]:
    cases = [case for case in ALL if case.checkpoint == checkpoint]
    return random.Random(seed).sample(cases, min(number, len(cases)))


@functools.cache
def together(checkpoint: str) -> dict[str, RequestOutput]:
    """Outputs of all the cases of a checkpoint in one call, in an order that mixes their kinds."""
    cases = [case for case in ALL if case.checkpoint == checkpoint]
    random.Random(0).shuffle(cases)
    outputs = engine(checkpoint).generate(
        [{"prompt_token_ids": case.prompt_ids} for case in cases],
        [case.sampling_params for case in cases],
        use_tqdm=False,
    )
    return {case.id: output for case, output in zip(cases, outputs, strict=True)}


@tables(ALL)
def test_equals_the_reference(case):
    assert difference(case, together(case.checkpoint)[case.id]) == ""


@tables(ALL[::9])
def test_alone(case):
    outputs, running = drive(engine(case.checkpoint), [case.request])
    assert max(running) <= 1
    assert not difference(case, outputs[0])


# number of requests, engine steps between two of them
COMPOSITIONS = {"sixteen": (16, 0), "joining-every-third-step": (16, 3), "joining-every-step": (24, 1)}


@pytest.mark.parametrize("company", COMPOSITIONS)
@pytest.mark.parametrize("checkpoint", ["sdar", "sdar-b8"])
def test_in_company(checkpoint, company):
    """Requests that differ in everything join at different steps and leave when they are done."""
    size, pause = COMPOSITIONS[company]
    cases = mixture(size, seed=pause, checkpoint=checkpoint)
    outputs, running = drive(engine(checkpoint), [case.request for case in cases], [i * pause for i in range(size)])
    assert differences(cases, outputs) == []
    assert max(running) >= (12 if pause == 0 else 2) and len(set(running)) > 2


@pytest.mark.parametrize("checkpoint", ["sdar", "sdar-b8", "sdar-loud"])
def test_watched_tokens_never_change(checkpoint):
    """And each comes out in the pass that settles it: while nobody edits, with the last mask before it."""
    cases = mixture(20, seed=1, checkpoint=checkpoint)
    for case in cases:
        steps = Steps(engine(checkpoint))
        steps.add(case)
        decided: set[int] = set()
        for commit in expected(case).trace:
            steps.step()
            decided |= {*commit.positions, *(i for i, t in enumerate(case.extras.get("template", ())) if t != HOLE)}
            prefix = next(i for i in range(case.tokens + 1) if i == case.tokens or i not in decided)
            if not {"edit_threshold", "preset", "max_steps"} & case.extras.keys():
                assert steps.emitted["A"] == expected(case).tokens[:prefix], case.id
        steps.drain()
        check(steps, case)


@pytest.mark.parametrize("unread", [0, 1])
@pytest.mark.parametrize("checkpoint", ["sdar", "sdar-b8", "sdar-loud"])
def test_steps_that_nobody_watches_share_an_engine_step(checkpoint, unread, monkeypatch):
    """On a GPU, where the host reads one step late, a pass may be in vain where a token ends the request."""
    monkeypatch.setattr(scheduling, "MOST_SECONDS", math.inf)
    llm = engine(checkpoint)
    monkeypatch.setattr(model_runner(llm), "overlaps", bool(unread))
    passes = engine_steps = 0
    for case in mixture(40, seed=3 + unread, checkpoint=checkpoint):
        before = scheduler(llm).current_step
        with counted_launches(llm) as launches:
            (output,), _ = drive(llm, [case.unwatched])
        assert not difference(case, output)
        assert num_forwards(output) <= len(launches) <= num_forwards(output) + unread
        passes, engine_steps = passes + len(launches), engine_steps + scheduler(llm).current_step - before
    assert engine_steps < 0.95 * passes


def test_a_batch_that_nobody_watches(monkeypatch):
    monkeypatch.setattr(scheduling, "MOST_SECONDS", math.inf)
    cases = [case for case in ALL if case.checkpoint == "sdar"][::6]
    outputs, _ = drive(engine("sdar"), [case.unwatched for case in cases])
    assert differences(cases, outputs) == []


def test_steps_that_nobody_watches_stay_within_reserved_pages(monkeypatch):
    """Of 16 positions: steps run on from block to block as far as these reach."""
    monkeypatch.setattr(scheduling, "MOST_SECONDS", math.inf)
    llm = engine("sdar-b8", block_size=16)
    cases = grid(
        "sdar-b8", [(50, prompt, {"block_length": n}) for prompt in (5, 14) for n in (4, 8, 12)], {"block_steps": 1}
    )
    drive(llm, [cases[0].request])
    for case in cases:
        with counted_launches(llm) as launches:
            before = scheduler(llm).current_step
            (output,), _ = drive(llm, [case.unwatched])
        assert not difference(case, output)
        assert scheduler(llm).current_step - before < len(launches)


# ---- preemption


@pytest.mark.parametrize("as_new", [False, True])
@pytest.mark.parametrize("after", [1, 2, 5, 9])
@pytest.mark.parametrize("checkpoint", ["sdar", "sdar-b8", "sdar-loud"])
def test_preempted_requests_decode_the_same(checkpoint, after, as_new, monkeypatch):
    """`as_new`: on CUDA vLLM's scheduler hands them to the worker as new ones. Tokens are not emitted twice."""
    llm = engine(checkpoint)
    monkeypatch.setattr(scheduler(llm), "use_v2_model_runner", as_new)
    cases = mixture(14, seed=after, checkpoint=checkpoint)
    steps = Steps(llm)
    for case in cases:
        steps.add(case)
    while llm.llm_engine.has_unfinished_requests():
        steps.step()
        if len(steps.ran) in (after, 2 * after + 1):
            assert llm.reset_prefix_cache(reset_running_requests=True)
    assert [
        case.id for name, case in zip(steps.emitted, cases, strict=True) if steps.emitted[name] != expected(case).tokens
    ] == []


def test_a_preempted_block_begins_again_and_no_other():
    """The passes of the open block are run twice, those of the blocks before it once."""
    (case,) = grid("sdar-b8", [(24, 5, {})], {})
    llm = engine("sdar-b8")
    for after, repeated in ((2, 2), (3, 0), (7, 4), (11, 0), (18, 7)):  # blocks end after 3, 11, 19, 24 passes
        steps = Steps(llm)
        steps.add(case)
        for _ in range(after):
            steps.step()
        assert llm.reset_prefix_cache(reset_running_requests=True)
        steps.drain()
        assert not difference(case, steps.finished["A"], more=repeated), after


def test_a_kv_cache_too_small_for_all():
    """Pages are reserved block by block, so all begin, and later ones give way to earlier ones."""
    page = 2 * 16 * 2 * 32 * 4 * 2  # k and v, tokens, heads, head size, bytes, layers
    llm = engine("sdar", max_model_len=96, block_size=16, kv_cache_memory_bytes=13 * page, enable_prefix_caching=False)
    assert scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks() == 12
    cases = [BlockCase("sdar", 50, 10 + i, {"threshold": 0.2}, note=f"cramped{i}") for i in range(8)]
    steps = Steps(llm)
    for case in cases:
        steps.add(case)
    preempted: set[str] = set()
    while llm.llm_engine.has_unfinished_requests():
        steps.step()
        preempted |= {request.request_id for request in scheduler(llm).requests.values() if request.num_preemptions}
    assert len(preempted) >= 2
    assert [steps.emitted[name] for name in steps.emitted] == [expected(case).tokens for case in cases]
    nothing_is_left(llm)


# ---- chunks of a prompt


@pytest.mark.parametrize("budget", [6, 24, 50])
@pytest.mark.parametrize("checkpoint", ["sdar", "sdar-b8"])
def test_a_prompt_above_the_token_budget_is_forwarded_in_chunks(checkpoint, budget):
    """Whole blocks, at least one; others go on meanwhile. A block that is larger than the budget runs alone."""
    llm = engine(
        checkpoint, max_num_batched_tokens=budget, max_num_seqs=6, max_model_len=256, enable_prefix_caching=False
    )
    prompts = sorted({1, 4, budget - 1, budget, budget + 1, 2 * budget, 2 * budget + 3, 77, 96, 201})
    cases = [
        BlockCase(checkpoint, 11, prompt, extras)
        for prompt in prompts
        for extras in ({}, {"threshold": 0.2, "block_length": 3}, {"preset": "speed", "block_length": 12})
    ]
    for one in cases[::5]:
        assert not difference(one, drive(llm, [one.request])[0][0], more=one.num_chunks(budget)), one.id
    draw = random.Random(budget)
    outputs, _ = drive(llm, [case.request for case in cases], [draw.randrange(20) for _ in cases])
    wrong = [difference(case, output, case.num_chunks(budget)) for case, output in zip(cases, outputs, strict=True)]
    assert not any(wrong), wrong
    assert max(case.num_chunks(budget) for case in cases) > 3
    nothing_is_left(llm)


def test_pinned_blocks_are_forwarded_in_chunks_too():
    llm = engine("sdar", max_num_batched_tokens=24, max_model_len=256, enable_prefix_caching=False)
    template = (HOLE, *[7] * 60, HOLE)
    (case,) = grid("sdar", [(62, 30, {"template": template})], {"threshold": 0.1})
    (output,), _ = drive(llm, [case.request])
    # 30 tokens and the rest of the block are one chunk and one window; from 28 to 92 are two chunks
    assert not difference(case, output, more=1 + 2)


# ---- the end of the model's length


@pytest.mark.parametrize("prompt", range(53, 63))
def test_the_last_block_ends_with_max_model_len(prompt):
    """Of 63 positions, the last of which lie in a block of 8 that has no room for all of it."""
    llm = engine("sdar-b8", max_model_len=63, max_num_batched_tokens=512)
    room = [(63 - prompt, prompt, {})]
    cases = grid("sdar-b8", room, {}, {"threshold": 0.2}, {"preset": "speed"}, {"block_length": 63}, cut=True)
    outputs, _ = drive(llm, [case.request for case in cases])
    assert differences(cases, outputs) == []
    shorter = BlockCase("sdar-b8", 1, prompt, {"preset": "speed"})
    (output,), _ = drive(llm, [shorter.request])
    assert prompt < 56 or result(output) == expected(cases[2]).tokens[:1]


# ---- whatever is asked for

requests = st.builds(
    lambda tokens, prompt, length, kind, sampling, eos, seed: BlockCase(
        "sdar-loud", tokens, prompt, kind | length, sampling, eos, seed=seed
    ),
    st.integers(1, 20),
    st.integers(1, 40),
    st.sampled_from([{}, *({"block_length": length} for length in (1, 2, 3, 5, 8, 16))]),
    st.sampled_from(
        [
            {},
            {"block_steps": 2},
            {"threshold": 0.2},
            {"threshold": 0.05, "block_steps": 2},
            {"factor": 2.0},
            {"entropy_bound": 4.0},
            {"remasking": "random"},
            {"remasking": "entropy", "alg_temp": 0.3},
            {"sub_block_length": 2},
            {"preset": "speed", "max_post_steps": 2},
            {"edit_threshold": 0.3, "threshold": 0.2},
            {"max_steps": 3},
            {"canvas_length": 3},
        ]
    ),
    st.sampled_from(
        [
            {},
            {},
            {"temperature": 0.8},
            {"temperature": 0.5, "top_k": 9},
            {"temperature": 1.0, "top_p": 0.7, "min_p": 0.01},
        ]
    ),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.lists(st.tuples(requests, st.integers(0, 9), st.booleans()), min_size=1, max_size=9))
def test_any_mixture(mixed):
    llm = engine("sdar-loud", block_size=16, max_num_batched_tokens=48, max_model_len=128, enable_prefix_caching=False)
    cases = [case for case, _, _ in mixed]
    wanted = [case.request if watched else case.unwatched for case, _, watched in mixed]
    outputs, _ = drive(llm, wanted, [arrival for _, arrival, _ in mixed])
    wrong = [difference(case, output, case.num_chunks(48)) for case, output in zip(cases, outputs, strict=True)]
    assert not any(wrong), "\n".join(wrong)


# ---- the cases reach what they name


def changed(cases: list[BlockCase], **settings) -> int:
    """How many of the cases decode otherwise with these settings."""
    others = [
        BlockCase(**vars(case) | {"extras": case.extras | settings, "prompt": tuple(case.prompt_ids)}) for case in cases
    ]
    return sum(expected(one) != expected(other) for one, other in zip(cases, others, strict=True))


def test_editing_replaces_tokens():
    """Of a pass that decides a position again, in most of the cases."""
    edits = 0
    for case in EDITING:
        times = Counter(position for commit in expected(case).trace for position in commit.positions)
        edits += max(times.values()) > 1
    assert edits > len(EDITING) // 2
    assert changed([case for case in EDITING if "max_post_steps" in case.extras], max_post_steps=2) > 9


def test_schedules_differ():
    for _, group in itertools.groupby(
        sorted(SCHEDULES, key=lambda c: (c.tokens, c.checkpoint)), lambda c: (c.tokens, c.checkpoint)
    ):
        traces = [repr(expected(case).trace) for case in group]
        assert len(set(traces)) > 0.6 * len(traces)


def test_confidences_differ():
    cases = [case for case in DRAWN if case.extras.get("confidence") == "tempered"]
    assert changed(cases, confidence="plain") > 2 and changed(cases, confidence="filtered") > 2


def test_eos_ends_requests_in_mid_block():
    ended = [case for case in UNTIL_EOS if case.eos and len(expected(case).tokens) < case.tokens]
    assert len(ended) > 9
    assert sum((case.prompt + len(expected(case).tokens)) % case.block_length != 0 for case in ended) > 5
    for case in ended:
        assert together(case.checkpoint)[case.id].outputs[0].finish_reason == "stop"
    assert any(EOS in expected(case).tokens[:-1] for case in UNTIL_EOS if not case.eos)


@tables(CAPPED)
def test_a_cap_on_forward_passes(case):
    output, cap = together(case.checkpoint)[case.id], case.extras["max_steps"]
    assert num_forwards(output) <= cap and MASK not in result(output)
    if num_forwards(output) == cap and len(result(output)) < case.tokens and not case.eos:
        assert (case.prompt + len(result(output))) % case.block_length == 0 or "template" in case.extras
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("length", "diffusion_max_steps")


@tables(INFILLING)
def test_pinned_ids_stay(case):
    tokens = result(together(case.checkpoint)[case.id])
    assert all(want in (HOLE, got) for want, got in zip(case.extras["template"], tokens, strict=True))


@pytest.mark.parametrize(
    "case", [case for case in INFILLING if case.checkpoint == "sdar"][::3], ids=lambda case: case.id
)
def test_a_template_ends_its_request(case):
    """In mid-block, though there is room, and without a pass more."""
    prompt, params = case.request
    params.max_tokens = 50
    (output,), _ = drive(engine("sdar"), [(prompt, params)])
    assert not difference(case, output)
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "diffusion_template")


def test_the_engine_is_the_one_under_test():
    for checkpoint in {case.checkpoint for case in ALL}:
        llm = engine(checkpoint)
        assert type(scheduler(llm)).__module__ == "dllm_plugin.scheduler.scheduler"
        assert llm.model_config.dtype == torch.float32
