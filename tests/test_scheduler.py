"""The scheduler inside the real engine: who runs in which step, what is emitted when, and what is left behind.

Scenarios are tables of steps, run-length encoded: `("AB", 12)` is twelve steps in which requests A and B ran.
"""

from dataclasses import replace

import pytest
from support.cases import POLICIES, PolicyCase, difference, expected, random_prompt
from support.checkpoints import EOS
from support.engines import core, drive, engine, model_runner, num_forwards, scheduler
from support.steps import Steps, case, check, leave_engines_empty, nothing_is_left, run_together  # noqa: F401
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

# ---- token budget: 64 tokens a step


@pytest.fixture(scope="module")
def narrow():
    return engine("llada", max_model_len=64, max_num_batched_tokens=64)


def test_budget_holds_two_of_three(narrow):
    """30 tokens each: two fit, and the three take turns; D fits the gap."""
    cases = [case(4, 26, "a"), case(4, 26, "b"), case(4, 26, "c"), case(2, 2, "d")]
    assert " ".join(run_together(narrow, cases).ran) == "ABD ACD BC AB AC BC"


def test_running_requests_that_outgrow_the_budget(narrow):
    """Three first canvases fit the budget together, two second ones do not: the three take turns."""
    cases = [case(24, 4, name, canvas=12, steps=3) for name in "abc"]
    # 3 x 16 tokens, then 3 x 28
    assert " ".join(run_together(narrow, cases).ran) == "ABC ABC ABC AB AC BC AB C"


def test_a_canvas_that_grows_takes_turns_too(narrow):
    """B's second canvas does not fit beside A's; C goes with either of them."""
    cases = [case(44, 4, "a", canvas=22, steps=4), case(20, 8, "b", canvas=10, steps=4), case(7, 1, "c")]
    # windows of 26, 18, 8 tokens; then 48, 28, 8
    assert " ".join(run_together(narrow, cases).ran) == "ABC ABC ABC ABC AC BC AC B A B A B"


def test_guidance_counts_twice_and_may_run_alone(narrow):
    """A's windows are 2 x 40 tokens, more than the budget: it runs alone. B's are 2 x 20 and leave room for C or D."""
    cases = [case(10, 30, "a", cfg=1.0, steps=3), case(6, 14, "b", cfg=0.5, steps=3), *(case(3, 13, c) for c in "cd")]
    assert " ".join(run_together(narrow, cases).ran) == "A BC BD A CD BC A D"


def test_cached_windows_count_what_they_forward(narrow):
    """24 tokens in the first step of a request, 8 in the others: the budget is for windows, not for sequences."""
    params = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, detokenize=False,
        extra_args={"diffusion_cache": "dual", "diffusion_block_length": 8},
    )  # fmt: skip
    requests = [(random_prompt(16, name), params) for name in "abcdef"]
    steps = Steps(narrow)
    for request in requests:
        steps.add(*request)
    steps.drain()
    assert " ".join(steps.ran[:4]) == "AB ABCD CDEF ABCDEF"
    alone = [drive(narrow, [request])[0][0] for request in requests]
    assert [steps.emitted[name] for name in "ABCDEF"] == [list(one.outputs[0].token_ids) for one in alone]


def test_a_heavy_request_and_late_short_ones_alternate(narrow):
    """A fills the budget. B and C, which came later, take every other step."""
    cases = [case(20, 44, "a"), case(2, 10, "b"), case(3, 10, "c")]
    steps = Steps(narrow)
    steps.add(cases[0])
    for _ in range(3):
        steps.step()
    steps.add(cases[1])
    steps.add(cases[2])
    steps.drain()
    assert " ".join(steps.ran) == "A A A A BC A BC A C A A A A A A A A A A A A A A"
    check(steps, *cases)
    nothing_is_left(narrow)


def test_a_request_that_leaves_while_it_waits_for_its_turn(narrow):
    cases = [case(10, 44, "a"), case(6, 50, "b"), case(3, 10, "c")]
    steps = Steps(narrow)
    for one in cases:
        steps.add(one)
    for _ in range(2):
        steps.step()
    steps.abort("B")
    steps.drain()
    assert " ".join(steps.ran) == "A B C A C A C A A A A A A A"
    assert sorted(steps.finished) == ["A", "C"]
    assert not difference(cases[0], steps.finished["A"]) and not difference(cases[2], steps.finished["C"])
    nothing_is_left(narrow)


# ---- number of sequences


def test_max_num_seqs():
    llm = engine("dream", max_num_seqs=2)
    cases = [
        case(tokens, 5, checkpoint="dream", policy=policy, steps=steps)
        for tokens, policy, steps in ((6, "entropy", 4), (8, "maskgit_plus", 6), (4, "random", 3), (3, "origin", 3))
    ]
    assert [expected(one).num_forwards for one in cases] == [4, 6, 3, 2]
    assert run_together(llm, cases).table == [("AB", 4), ("BC", 2), ("CD", 1), ("D", 1)]


# ---- KV cache: pages of 16 tokens


@pytest.fixture(scope="module")
def cramped():
    """Six pages for requests: a whole sequence of max_model_len and two more."""
    page = 2 * 16 * 2 * 32 * 4 * 2  # k and v, tokens, heads, head size, bytes, layers
    llm = engine("llada", max_model_len=64, max_num_batched_tokens=512, block_size=16, kv_cache_memory_bytes=7 * page)
    assert scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks() == 6
    return llm


def test_kv_cache_too_small_for_all(cramped):
    """A canvas is reserved as a whole: three pages each, so two run and two wait."""
    cases = [case(30, 10, name, steps=6) for name in "abcd"]
    steps = Steps(cramped)
    for one in cases:
        steps.add(one)
    steps.drain()
    assert steps.table == [("AB", 6), ("CD", 6)]
    check(steps, *cases)
    nothing_is_left(cramped)


def test_a_further_canvas_preempts(cramped):
    """A grows by a page every other canvas: first C, then B give their pages up in mid-canvas, and begin it again."""
    cases = [case(56, 8, canvas=8, steps=4), case(40, 8), case(24, 8, policy="random")]
    steps = Steps(cramped)
    for one in cases:
        steps.add(one)
    steps.drain()
    assert steps.table == [("ABC", 4), ("AB", 16), ("A", 8), ("BC", 24), ("B", 16)]
    for name, one, repeated in zip("ABC", cases, (0, 20, 4), strict=True):
        assert steps.emitted[name] == expected(one).tokens
        assert num_forwards(steps.finished[name]) == expected(one).num_forwards + repeated
    nothing_is_left(cramped)


# ---- leaving early


def test_abort(cramped):
    """One request is aborted in mid-canvas, one while it waits, one before its first step; the others do not notice."""
    cases = [case(30, 10, name, steps=10) for name in "abcde"]
    steps = Steps(cramped)
    for one in cases[:3]:
        steps.add(one)
    for _ in range(3):
        steps.step()
    steps.abort("A", "C")
    steps.add(cases[3])
    steps.add(cases[4])
    steps.abort("D")
    steps.drain()
    assert steps.table == [("AB", 3), ("BE", 7), ("E", 3)]
    assert set(steps.finished) == {"B", "E"}
    assert not difference(cases[1], steps.finished["B"])
    assert not difference(cases[4], steps.finished["E"])
    nothing_is_left(cramped)


def test_abort_of_everything_frees_the_worker_too():
    llm = engine("llada")
    steps = Steps(llm)
    for name in "abcd":
        steps.add(case(40, 10, name))
    for _ in range(7):
        steps.step()
    assert len(model_runner(llm).state.requests) == 4
    steps.abort(*"ABCD")
    nothing_is_left(llm)
    last = case(5, 5, "last")
    steps.add(last)
    steps.step()
    assert len(model_runner(llm).state.requests) == 1
    steps.drain()
    assert not difference(last, steps.finished["E"])


# ---- preemption


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("after", [1, 6, 14, 20])
def test_preemption_in_mid_canvas(policy, after):
    """After it, the canvas begins again and is filled as before; what was emitted stays and is not emitted again."""
    llm = engine("llada")
    cases = [case(30, 9, policy=policy, canvas=16, steps=16, block=4, temperature=t) for t in (0.0, 1.0)]
    steps = Steps(llm)
    for one in cases:
        steps.add(one)
    for _ in range(after):
        steps.step()
    emitted = {name: len(tokens) for name, tokens in steps.emitted.items()}
    assert llm.reset_prefix_cache(reset_running_requests=True)
    assert all(request.num_preemptions == 1 for request in scheduler(llm).requests.values())
    steps.drain()  # checks that nothing emitted changes
    if after == 14:
        assert min(emitted.values()) > 0
    for name, one in zip("AB", cases, strict=True):
        assert steps.emitted[name] == expected(one).tokens
        # the steps of the present canvas are done twice, and said so
        first = expected(PolicyCase(**vars(one) | {"max_tokens": 16})).num_forwards
        repeated = after if after < first else after - first
        assert num_forwards(steps.finished[name]) == expected(one).num_forwards + repeated
    nothing_is_left(llm)


def test_preemption_again_and_again():
    llm = engine("dream")
    one = case(20, 9, checkpoint="dream", policy="entropy", canvas=12, block=4, temperature=0.9)
    steps = Steps(llm)
    steps.add(one)
    for pause in (3, 1, 5, 2, 13, 4):
        for _ in range(pause):
            steps.step()
        llm.reset_prefix_cache(reset_running_requests=True)
    steps.drain()
    assert steps.emitted["A"] == expected(one).tokens


# ---- priorities


def test_priorities():
    """Lower numbers first, whenever they come; equal ones in the order they came."""
    llm = engine("llada", max_num_seqs=1, scheduling_policy="priority")
    cases = [case(4, 5, name) for name in "abcd"]
    steps = Steps(llm)
    for one, priority in zip(cases, (5, 2, 2, 9), strict=True):
        steps.add(one, priority=priority)
    steps.step()
    first = steps.add(case(4, 5, "e"), priority=0)
    steps.drain()
    assert first == "E"
    order = [ran for ran, _ in steps.table]
    assert order == ["B", "E", "C", "A", "D"]
    check(steps, *cases, case(4, 5, "e"))


def test_priorities_within_the_token_budget():
    """The budget holds one of the three: C, the most urgent, has as many turns as A and B together."""
    llm = engine("llada", max_model_len=64, max_num_batched_tokens=64, scheduling_policy="priority")
    cases = [case(4, 40, "a"), case(4, 40, "b"), case(8, 40, "c")]
    steps = Steps(llm)
    for one, priority in zip(cases, (7, 7, -3), strict=True):
        steps.add(one, priority=priority)
    steps.drain()
    assert " ".join(steps.ran) == "C C A B C C A B C C A B C C A B"
    check(steps, *cases)


def test_the_least_urgent_of_many_priorities_have_a_turn_in_sixteen():
    """Seven that each fill the budget: with half the turns for each next one, the last would wait for 64 of the first."""
    llm = engine("llada", max_model_len=64, max_num_batched_tokens=64, scheduling_policy="priority")
    cases = [case(20 if name == "a" else 2, 40, name) for name in "abcdefg"]
    steps = Steps(llm)
    for priority, one in enumerate(cases):
        steps.add(one, priority=priority)
    steps.drain()
    first = [steps.ran.index(name) for name in "EFG"]
    assert first == [first[0], first[0] + 1, first[0] + 2] and steps.ran[: first[0]].count("A") == 16
    check(steps, *cases)


# ---- when tokens come out

STREAMED = [
    PolicyCase(checkpoint, policy, 18, block, steps, 7, canvas)
    for checkpoint in ("llada", "dream")
    for policy in POLICIES
    for block, steps, canvas in ((None, None, None), (6, 9, None), (4, 12, 12))
]


@pytest.mark.parametrize("one", STREAMED, ids=[one.id for one in STREAMED])
def test_tokens_come_out_as_soon_as_they_are_final_and_contiguous(one):
    steps = Steps(engine(one.checkpoint))
    steps.add(one)
    decided: set[int] = set()
    for commit in expected(one).trace:
        steps.step()
        decided.update(commit.positions)
        prefix = next(i for i in range(one.max_tokens + 1) if i not in decided)
        assert steps.emitted["A"] == expected(one).tokens[:prefix]
    assert "A" in steps.finished


ENDED = [
    PolicyCase(checkpoint, policy, 24, block, None, prompt, canvas, eos=True)
    for checkpoint in ("llada-loud", "dream-loud")
    for policy in ("low_confidence", "entropy", "random")
    for block, prompt, canvas in ((4, 9, None), (8, 3, None), (None, 9, 6), (1, 5, None))
]


def test_generation_ends_at_the_first_final_eos():
    """Later blocks are never computed."""
    saved = 0
    for one in ENDED:
        steps = Steps(engine(one.checkpoint))
        steps.add(one)
        steps.drain()
        check(steps, one)
        completion = steps.finished["A"].outputs[0]
        assert len(steps.ran) == num_forwards(steps.finished["A"])
        if EOS in completion.token_ids:
            assert list(completion.token_ids).index(EOS) == len(completion.token_ids) - 1
            assert completion.finish_reason == "stop"
            saved += len(steps.ran) < one.max_tokens
        else:
            assert completion.finish_reason == "length" and len(completion.token_ids) == one.max_tokens
    assert saved >= 4


def test_ignore_eos_fills_the_canvas():
    goes_on = 0
    for one in ENDED:
        filled = PolicyCase(**vars(one) | {"eos": False, "prompt": tuple(one.prompt_ids)})
        steps = Steps(engine(one.checkpoint))
        steps.add(filled)
        steps.drain()
        check(steps, filled)
        assert len(steps.emitted["A"]) == one.max_tokens
        goes_on += EOS in steps.emitted["A"][:-1]
    assert goes_on >= 4


@pytest.mark.parametrize("policy", ["low_confidence", "entropy"])
@pytest.mark.parametrize("place", [0, 3, 9])
def test_stop_token_ids(policy, place):
    """A stop token in the middle of a block ends the request as soon as all before it is final."""
    one = case(16, 7, policy=policy, block=8)
    tokens = expected(one).tokens
    end = tokens.index(tokens[place])
    prompt, params = one.request
    params.stop_token_ids = [tokens[place]]
    params = SamplingParams(
        temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False, stop_token_ids=[tokens[place]],
        seed=params.seed, extra_args=params.extra_args,
    )  # fmt: skip
    steps = Steps(engine("llada"))
    steps.add(prompt, params)
    steps.drain()
    completion = steps.finished["A"].outputs[0]
    assert (list(completion.token_ids), completion.stop_reason) == (tokens[: end + 1], tokens[place])
    trace = expected(one).trace
    decided_in = {position: step for step, commit in enumerate(trace, start=1) for position in commit.positions}
    assert len(steps.ran) == max(decided_in[position] for position in range(end + 1))
    nothing_is_left(engine("llada"))


def test_stop_strings():
    """The text ends before the stop string, and the engine forgets the request."""
    llm = engine("tiny-llada")
    prompt = llm.get_tokenizer().encode("Spell the word house.")
    params = {
        "temperature": 0.0,
        "max_tokens": 24,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "extra_args": {"diffusion_block_length": 4},
    }
    whole = llm.generate([{"prompt_token_ids": prompt}], SamplingParams(**params), use_tqdm=False)[0]
    text = whole.outputs[0].text
    assert len(text) > 6
    stop = text[4:6]
    end = text.index(stop)
    cut = llm.generate([{"prompt_token_ids": prompt}], SamplingParams(**params, stop=[stop]), use_tqdm=False)[0]
    assert (cut.outputs[0].text, cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == (text[:end], "stop", stop)
    kept = SamplingParams(**params, stop=[stop], include_stop_str_in_output=True)
    assert llm.generate([{"prompt_token_ids": prompt}], kept, use_tqdm=False)[0].outputs[0].text == text[: end + 2]
    nothing_is_left(llm)


def test_max_model_len_cuts_the_canvas(narrow):
    """A response that cannot be as long as asked is a canvas of what there is room for."""
    prompt = random_prompt(50, "clipped")
    extras = {"diffusion_remasking": "low_confidence"}
    params = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=None, extra_args=extras)
    steps = Steps(narrow)
    steps.add(prompt, params)
    steps.drain()
    check(steps, PolicyCase("llada", "low_confidence", 14, prompt=tuple(prompt)))
    assert steps.finished["A"].outputs[0].finish_reason == "length"


def test_guidance_cuts_the_canvas(narrow, monkeypatch):
    """Both copies of a sequence fit what a step may forward, and what memory there was found to be for."""
    inside = scheduler(narrow)
    monkeypatch.setattr(inside, "settings", replace(inside.settings, most_tokens=64))  # and no longest guided sequence
    prompt = tuple(random_prompt(20, "guided"))
    steps = Steps(narrow)
    steps.add(case(30, prompt, cfg=1.0))
    steps.add(case(30, 32, cfg=1.0))
    steps.drain()
    cut, ended = steps.finished["A"], steps.finished["B"].outputs[0]
    assert not difference(case(12, prompt, cfg=1.0), cut) and cut.outputs[0].finish_reason == "length"
    assert (ended.finish_reason, len(ended.token_ids)) == ("error", 0)


def test_memory_is_profiled_for_the_largest_step(narrow, monkeypatch):
    runner, forwarded = model_runner(narrow), []
    forward = runner.model.forward
    monkeypatch.setattr(runner.model, "forward", lambda ids, *rest: forwarded.append(len(ids)) or forward(ids, *rest))
    runner.profile_run()
    assert forwarded == [128]


def test_a_prompt_that_leaves_one_position(narrow):
    one = case(1, 63)
    steps = Steps(narrow)
    steps.add(one)
    steps.drain()
    check(steps, one)
    with pytest.raises(VLLMValidationError, match="maximum model length of 64"):
        narrow.llm_engine.add_request("too-long", {"prompt_token_ids": random_prompt(64, "")}, one.sampling_params)
    nothing_is_left(narrow)


def test_the_engine_core_is_in_this_process(narrow):
    assert type(core(narrow)).__name__ == "EngineCore"
