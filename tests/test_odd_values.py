"""No value leaves anything behind: the call that gives it fails, or serves it, and the next call serves as ever.

The engine in this process and one in a process of its own, which vLLM's `LLM` starts by default, refuse the same values
with the same words.
"""

import json
import os
import signal
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import torch
from support.cases import PolicyCase, difference, expected
from support.checkpoints import VOCABULARY, folder
from support.engines import engine, new_engine, scheduler
from vllm import LLM, PoolingParams, SamplingParams
from vllm.sampling_params import BeamSearchParams

PROMPT = {"prompt_token_ids": [11, 12, 13]}
AS_EVER = PolicyCase("llada", "low_confidence", 6, prompt=5)
SHORT = {"max_tokens": 4, "extra_args": {"diffusion_max_steps": 3}}


def changed(**fields):
    """SamplingParams with fields that vLLM has not checked, which it does where they are made."""
    params = SamplingParams(temperature=0.5, max_tokens=4)
    for name, value in fields.items():
        setattr(params, name, value)
    return params


NOT_PLAIN = "give a plain Python value of that type"
PARAMETERS = {
    "max_tokens-fraction": (lambda: SamplingParams(max_tokens=1.5), "max_tokens must be int | None, got 1.5; " + NOT_PLAIN),
    "max_tokens-bool": (lambda: SamplingParams(max_tokens=True), "max_tokens must be int | None, got True"),
    "max_tokens-numpy": (lambda: SamplingParams(max_tokens=np.int64(4)), "got np.int64(4); give value.item(), not NumPy's"),
    "max_tokens-nan": (lambda: SamplingParams(max_tokens=float("nan")), "max_tokens must be int | None, got nan"),
    "max_tokens-huge": (lambda: SamplingParams(max_tokens=2**64), "max_tokens must be int | None, got 18446744073709551616"),
    "max_tokens-changed-to-0": (lambda: changed(max_tokens=0), "max_tokens must be at least 1, got 0"),
    "min_tokens-fraction": (lambda: SamplingParams(min_tokens=1.5), "min_tokens must be int, got 1.5; " + NOT_PLAIN),
    "min_tokens-bool": (lambda: SamplingParams(min_tokens=False), "min_tokens must be int, got False"),
    "seed-fraction": (lambda: SamplingParams(seed=1.5), "seed must be an integer of at most 64 bits, got 1.5; leave it out"),
    "seed-bool": (lambda: SamplingParams(seed=True), "seed must be an integer of at most 64 bits, got True"),
    "seed-numpy": (lambda: SamplingParams(seed=np.int64(3)), "seed must be an integer of at most 64 bits, got np.int64(3)"),
    # the second completion has the seed 2**64, which does not travel
    "seed-huge": (lambda: SamplingParams(n=2, seed=2**64 - 1), "seed must be an integer of at most 64 bits"),
    "temperature-bool": (lambda: SamplingParams(temperature=True), "temperature must be float, got True"),
    "temperature-float32": (lambda: SamplingParams(temperature=np.float32(1)), "temperature must be float, got np.float32(1.0)"),
    "temperature-float64": (lambda: SamplingParams(temperature=np.float64(1)), "temperature must be float, got np.float64(1.0)"),
    "temperature-changed-to-nan": (lambda: changed(temperature=float("nan")), "temperature must be a finite number"),
    "top_p-numpy": (lambda: SamplingParams(top_p=np.float64(0.5)), "top_p must be float, got np.float64(0.5)"),
    "top_p-changed": (lambda: changed(top_p=7), "top_p must be in (0, 1], got 7"),
    "min_p-changed": (lambda: changed(min_p=1.5), "min_p must be in [0, 1], got 1.5"),
    "repetition_penalty-huge": (lambda: SamplingParams(repetition_penalty=2**63), "repetition_penalty must be a finite number"),
    "frequency_penalty-huge": (lambda: changed(frequency_penalty=-1e39), "frequency_penalty must be a finite number of at most"),
    "presence_penalty-nan": (lambda: changed(presence_penalty=float("nan")), "presence_penalty must be a finite number of at"),
    "top_k-bool": (lambda: SamplingParams(temperature=1.0, top_k=True), "top_k must be int, got True"),
    "top_k-huge": (lambda: SamplingParams(temperature=1.0, top_k=2**70), "top_k must be int, got 1180591620717411303424"),
    "n-bool": (lambda: SamplingParams(n=True), "n must be int, got True"),
    "n-changed-to-0": (lambda: changed(n=0), "n must be at least 1, got 0"),
    "stop_token_ids-bool": (lambda: SamplingParams(stop_token_ids=[True]), "stop_token_ids must be list[int] | None, got [True]"),
    "stop-bytes": (lambda: SamplingParams(stop=[b"a"]), "stop must be str | list[str] | None, got [b'a']"),
    "ignore_eos-number": (lambda: SamplingParams(ignore_eos=1), "ignore_eos must be bool, got 1"),
    "detokenize-none": (lambda: SamplingParams(detokenize=None), "detokenize must be bool, got None"),
    "repetition_detection-mapping": (
        lambda: SamplingParams(repetition_detection={"max_pattern_size": 2, "min_count": 2}),
        "repetition_detection must be vllm.sampling_params.RepetitionDetectionParams | None, got {",
    ),
    "extra-numpy": (
        lambda: SamplingParams(extra_args={"diffusion_steps": np.int64(4)}),
        "of at least 1, got np.int64(4); write 4, not NumPy's",
    ),
    "extra-float64": (
        lambda: SamplingParams(extra_args={"diffusion_threshold": np.float64(0.5)}),
        "got np.float64(0.5); write 0.5, not NumPy's",
    ),
    "extra-of-others-array": (
        lambda: SamplingParams(extra_args={"mine": np.zeros(2)}),
        "with extra_args={'mine': array([0., 0.])}; make them anew, of plain Python values",
    ),
    "extra-of-others": (lambda: SamplingParams(extra_args={"mine": object()}), "extra_args={'mine': <object object"),
}  # fmt: skip

IN_LIST = "prompt_token_ids must be a list of integers, got {} in it; write int(...)"
OF_TYPE = (
    "prompt_token_ids must be a list of integers, got {} of type {}; write list(...), or array.tolist() for an array"
)
OUTSIDE = f"prompt_token_ids must be at least 0 and below the vocabulary's size {VOCABULARY}, got {{}}; take the ids"
PROMPTS = {
    "tuple": ((65, 66), OF_TYPE.format("(65, 66)", "tuple")),
    "array": (np.array([65, 66]), OF_TYPE.format("array([65, 66])", "ndarray")),
    "array-of-one": (np.array([65]), OF_TYPE.format("array([65])", "ndarray")),
    "tensor": (torch.tensor([65]), OF_TYPE.format("tensor([65])", "Tensor")),
    "range": (range(3), OF_TYPE.format("range(0, 3)", "range")),
    "text": ("ab", OF_TYPE.format("'ab'", "str")),
    "set": ({65}, OF_TYPE.format("{65}", "set")),
    "numpy-in-list": ([np.int64(65), 66], IN_LIST.format(r"np.int64(65)")),
    "fraction": ([65, 65.5], IN_LIST.format("65.5")),
    "whole-fraction": ([65.0], IN_LIST.format("65.0")),
    "nan": ([float("nan")], IN_LIST.format("nan")),
    "bool": ([True, False], IN_LIST.format("True")),
    "none-in-list": ([None], IN_LIST.format("None")),
    "text-in-list": (["a"], IN_LIST.format("'a'")),
    "nested": ([[65, 66]], IN_LIST.format("[65, 66]")),
    "negative": ([-1], OUTSIDE.format(-1)),
    "out-of-vocabulary": ([VOCABULARY], OUTSIDE.format(VOCABULARY)),
    "huge": ([2**70], OUTSIDE.format(2**70)),
    "empty": ([], "prompt cannot be empty"),
    "none": (None, "has no len()"),
    "number": (65, "has no len()"),
}  # fmt: skip

CALLS = {
    **{name: (lambda llm, make=make: generate(llm, PROMPT, make()), message) for name, (make, message) in PARAMETERS.items()},
    **{
        f"prompt-{name}": (lambda llm, ids=ids: generate(llm, {"prompt_token_ids": ids}, SamplingParams(**SHORT)), message)
        for name, (ids, message) in PROMPTS.items()
    },
    "cache_salt": (lambda llm: generate(llm, PROMPT | {"cache_salt": 5}, SamplingParams(**SHORT)), "cache_salt must be a text"),
    "bad-prompt-among-good": (
        lambda llm: generate(llm, [PROMPT, {"prompt_token_ids": (65,)}, PROMPT], SamplingParams(temperature=1, n=3)),
        "got (65,) of type tuple",
    ),
    "bad-parameters-among-good": (
        lambda llm: generate(llm, [PROMPT] * 3, [SamplingParams(temperature=1, n=3), changed(max_tokens=1.5), changed()]),
        "max_tokens must be int | None, got 1.5",
    ),
    **{
        f"priority-{priority!r}": (
            lambda llm, priority=priority: generate(llm, [PROMPT] * 3, SamplingParams(**SHORT), priority=[1, priority, 0]),
            f"priority must be an integer, got {priority!r}; leave it out",
        )
        for priority in ("x", 1.5, None, np.int64(1))
    },
    "other-parameters": (lambda llm: generate(llm, PROMPT, {"max_tokens": 4}), "params must be either SamplingParams or"),
    "pooling": (lambda llm: generate(llm, PROMPT, PoolingParams()), "does not support pooling"),
    "beam-search": (lambda llm: llm.beam_search([PROMPT], BeamSearchParams(beam_width=2, max_tokens=4)), "Tokenizer not"),
}  # fmt: skip


def generate(llm, prompts, params, **given):
    return llm.generate(prompts if isinstance(prompts, list) else [prompts], params, use_tqdm=False, **given)


def error_of(llm, call):
    try:
        return f"no error, but {call(llm)}"
    except Exception as error:
        return str(error)


@pytest.fixture(autouse=True)
def no_call_is_endless(monkeypatch):
    """A call that would wait forever fails."""
    for checkpoint in ("llada", "tiny-llada"):
        llm_engine = engine(checkpoint).llm_engine
        step, num_steps = llm_engine.step, iter(range(20_000))

        def counted(step=step, num_steps=num_steps):
            assert next(num_steps, None) is not None, "the call would never end"
            return step()

        monkeypatch.setattr(llm_engine, "step", counted)


def serves(llm, case=AS_EVER):
    """The next call has the reference's tokens, and nothing of an earlier one is left."""
    prompt, params = case.request
    (output,) = generate(llm, {"prompt_token_ids": prompt}, params)
    assert not difference(case, output)
    assert nothing_left(llm)


def nothing_left(llm: LLM) -> bool:
    ours, front = scheduler(llm), llm.llm_engine.output_processor
    return not (ours.requests or ours.denoising or ours.waiting or ours.running or front.request_states)


@pytest.mark.parametrize("name", CALLS)
def test_an_odd_value_is_refused_and_leaves_nothing_behind(name):
    call, message = CALLS[name]
    llm = engine("llada")
    error = error_of(llm, call)
    assert message in error and not error.startswith("no error")
    assert nothing_left(llm)
    serves(llm)


ODD = [
    None, True, False, 0, 1, -1, 1.5, float("nan"), float("inf"), 2**31, 2**63, 2**64, -(2**63) - 1, "", "x", b"x", 1j,
    [], [0], [1.5], [None], ["x"], [b"x"], [True], [[0]], [2**64], (), (3,), {3}, {}, {3: 4}, {"a": 1}, object(),
    np.int64(1), np.float32(1), np.float64(1), np.bool_(True), np.str_("x"), np.array([1, 2]), torch.tensor(1),
]  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in msgspec.structs.fields(SamplingParams)])
def test_no_value_of_a_field_leaves_anything_behind(name):
    """Given where the parameters are made, which vLLM checks, and set on them later."""
    llm = engine("llada")
    for value in ODD:
        for make in (
            lambda value=value: SamplingParams(**SHORT | {name: value}),
            lambda value=value: short(name, value),
        ):
            error_of(llm, lambda llm, make=make: generate(llm, PROMPT, make()))
            assert nothing_left(llm), f"{name}={value!r}"
    serves(llm)


def short(name, value):
    params = SamplingParams(temperature=0.5, **SHORT)
    setattr(params, name, value)
    return params


USER = {"role": "user", "content": "reverse: abc"}
CHATS = {
    "content-number": [[USER], [USER | {"content": 5}]],
    "role-number": [[USER], [USER | {"role": 5}]],
    "no-role": [[USER], [{"content": "x"}]],
    "half-a-character": [[USER], [USER | {"content": "\ud800"}]],
    "image": [[USER], [USER | {"content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]],
    "empty": [[USER], []],
    "number": [[USER], 5],
}


@pytest.mark.parametrize("name", CHATS)
def test_an_odd_message_leaves_nothing_behind(name):
    llm = engine("tiny-llada")
    params = SamplingParams(temperature=0, max_tokens=8)
    (before,) = llm.chat([USER], params, use_tqdm=False)
    error = error_of(llm, lambda llm: llm.chat(CHATS[name], params, use_tqdm=False))
    assert not error.startswith("no error")
    assert nothing_left(llm)
    (after,) = llm.chat([USER], params, use_tqdm=False)
    assert after.outputs[0].token_ids == before.outputs[0].token_ids


def test_an_engine_in_a_process_of_its_own():
    """Every call of the table above, to one engine; a hang runs into the time limit."""
    command = [sys.executable, __file__]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        printed, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    (line,) = [line for line in printed.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    assert list(result) == list(CALLS)
    for name, (error, tokens) in result.items():
        assert CALLS[name][1] in error and not error.startswith("no error"), name
        assert tokens == expected(AS_EVER).tokens, name


def in_a_process_of_its_own():
    llm = new_engine(folder(AS_EVER.checkpoint))
    prompt, params = AS_EVER.request
    result = {}
    for name, (call, _) in CALLS.items():
        error = error_of(llm, call)
        (output,) = generate(llm, {"prompt_token_ids": prompt}, params)
        result[name] = error, list(output.outputs[0].token_ids)
    print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    in_a_process_of_its_own()
