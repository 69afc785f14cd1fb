"""Two real servers, each started once: the OpenAI client, and plain HTTP where the client would hide something."""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIError, BadRequestError
from reference.likelihood import full_chain
from support.checkpoints import reference
from support.engines import engine
from support.server import Server, start

from dllm_plugin.checkpoints.tasks import questions

BIN = Path(sys.executable).parent
MESSAGES = [{"role": "user", "content": "Reverse the word cat."}]
# the seed decides the order in which Dream's default policy takes positions, at temperature 0 too
SHORT = {"max_tokens": 16, "temperature": 0, "seed": 1}


@pytest.fixture(scope="module")
def servers(checkpoints: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Both ways to start a server, side by side: with the worker named, and with no flag at all."""
    logs = tmp_path_factory.mktemp("servers")
    llada, dream = checkpoints["tiny-llada"], checkpoints["tiny-dream"]
    # a step of a server's default budget has too few rows for `test_more_rows_than_a_block_of_the_choice`
    worker = [
        "--worker-cls",
        "dllm_plugin.worker.DiffusionWorker",
        "--max-num-batched-tokens",
        "8192",
        "--dtype",
        "float32",
    ]
    running = {
        "tiny-llada": start([str(BIN / "vllm"), "serve", llada, *worker], llada, logs / "llada.log"),
        "tiny-dream": start(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", dream], dream, logs / "dream.log"
        ),
    }
    try:
        for server in running.values():
            server.wait()
        yield running
    finally:
        for server in running.values():
            server.stop()


@pytest.fixture(scope="module")
def llada(servers: dict[str, Server]) -> Server:
    return servers["tiny-llada"]


def chat(
    server: Server,
    messages: list[dict[str, str]] = MESSAGES,
    extras: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    **settings,
):
    body = {"vllm_xargs": extras or {}} | (extra or {})
    return server.client.chat.completions.create(
        model=server.model, messages=messages, extra_body=body, **(SHORT | settings)
    )


def complete(
    server: Server,
    prompt: str = "Reverse",
    extras: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    **settings,
):
    body = {"vllm_xargs": extras or {}} | (extra or {})
    return server.client.completions.create(model=server.model, prompt=prompt, extra_body=body, **(SHORT | settings))


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_streaming_gives_the_text_of_the_whole_answer(servers: dict[str, Server], name: str) -> None:
    server = servers[name]
    whole = chat(server)
    chunks = [chunk.choices[0] for chunk in chat(server, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].finish_reason == whole.choices[0].finish_reason
    assert 0 < whole.usage.completion_tokens <= SHORT["max_tokens"]

    whole = complete(server)
    chunks = [chunk.choices[0] for chunk in complete(server, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].finish_reason == whole.choices[0].finish_reason


def test_the_server_answers_as_the_engine_in_process(llada: Server) -> None:
    from vllm import SamplingParams

    asked = [[{"role": "user", "content": question.text}] for question in questions("held_out", 4, seed=5)]
    extras = {"diffusion_steps": 8, "diffusion_block_length": 8}
    settings = SamplingParams(max_tokens=16, temperature=0, extra_args=extras)
    # the server takes the checkpoint's own dtype
    offline = engine("tiny-llada", dtype="auto").chat(asked, settings, use_tqdm=False)
    online = [chat(llada, messages, extras).choices[0].message.content for messages in asked]
    assert online == [output.outputs[0].text for output in offline]


def test_n_gives_different_samples_and_a_seed_the_same_ones(llada: Server) -> None:
    # trained weights are sure of what they write: a random order and the highest temperature make samples differ
    sampled = {"n": 2, "seed": 11, "temperature": 2.0, "extras": {"diffusion_remasking": "random"}}
    first = [choice.text for choice in complete(llada, **sampled).choices]
    assert len(first) == 2
    assert first[0] != first[1]
    assert [choice.text for choice in complete(llada, **sampled).choices] == first
    assert [choice.text for choice in complete(llada, **(sampled | {"seed": 12})).choices] != first


@pytest.mark.parametrize("max_tokens", [1, 5])
def test_max_tokens_is_the_longest_answer(llada: Server, max_tokens: int) -> None:
    answer = complete(llada, max_tokens=max_tokens, extras={"diffusion_eos_suppression": "logits"})
    assert answer.usage.completion_tokens == max_tokens
    assert answer.choices[0].finish_reason == "length"


def test_a_stop_string_ends_the_answer(llada: Server) -> None:
    extras = {"diffusion_eos_suppression": "logits"}
    text = complete(llada, extras=extras, max_tokens=32).choices[0].text
    stop = text[len(text) // 2]
    answer = complete(llada, extras=extras, max_tokens=32, stop=[stop])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("extras", "settings", "said"),
    [
        ({"diffusion_steps": 0}, {}, ["diffusion_steps", "an integer of at least 1", "got 0"]),
        ({"diffusion_steps": "many"}, {}, ["diffusion_steps", "integer", "'many'"]),
        ({"diffusion_stepps": 4}, {}, ["diffusion_stepps", "did you mean 'diffusion_steps'"]),
        ({"diffusion_remasking": "best"}, {}, ["diffusion_remasking", "low_confidence", "'best'"]),
        ({"diffusion_steps": 2, "diffusion_block_length": 4}, {}, ["at least", "2", "raise diffusion_steps"]),
        ({"diffusion_suffix": [99999]}, {}, ["diffusion_suffix", "320", "99999", "tokenizer"]),
        ({"diffusion_template": [-1, 2**62]}, {}, ["diffusion_template", "320"]),
        ({}, {"temperature": 1, "extra": {"min_p": 1.5}}, ["min_p", "[0, 1]", "1.5"]),
        ({}, {"max_tokens": 0}, ["max_tokens", "0"]),
    ],
)
@pytest.mark.parametrize("route", [chat, complete])
def test_a_wrong_request_is_told_so_and_the_server_serves_on(
    llada: Server, route: Any, extras: dict[str, Any], settings: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(BadRequestError) as refusal:
        route(llada, extras=extras, **settings)
    assert refusal.value.status_code == 400
    message = refusal.value.response.json()["error"]["message"]
    assert [words for words in said if words not in message] == [], message
    assert route(llada, max_tokens=2).choices


def test_the_likelihood_that_lm_eval_asks_for(llada: Server) -> None:
    """Its own request, and the sum that it makes of the answer, against the reference model alone."""
    context, continuation = "Reverse the word cat. ", "tac"
    tokenizer, model = engine("tiny-llada").get_tokenizer(), reference("tiny-llada")
    ids = tokenizer.encode(context + continuation, add_special_tokens=False)
    num_context = len(tokenizer.encode(context, add_special_tokens=False))
    asked = {
        "prompt": [ids],
        "model": llada.model,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    told = {}
    for first in (0, num_context - len(ids)):
        body = asked | {"vllm_xargs": {"diffusion_likelihood_start": first}}
        (choice,) = httpx.post(f"{llada.url}/v1/completions", json=body, timeout=60).json()["choices"]
        assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1
        told[first] = choice["logprobs"]["token_logprobs"][num_context:-1]
        for own, best in zip(told[first], choice["logprobs"]["top_logprobs"][num_context:-1], strict=True):
            assert own in best.values()
    expected = full_chain(model, ids, num_context)
    for tokens in told.values():
        assert sum(tokens) == pytest.approx(
            sum(float(row[token]) for row, token in zip(expected, ids[num_context:], strict=True)), abs=1e-3
        )


def test_infilling(llada: Server) -> None:
    """What stands behind the canvas decides the answer; the text is the canvas alone. Pinned tokens come back."""
    from vllm import SamplingParams

    suffix = {"diffusion_suffix": " and no more", "diffusion_block_length": 8}
    offline = engine("tiny-llada", dtype="auto").generate(
        ["Say cat"], SamplingParams(max_tokens=16, temperature=0, seed=1, extra_args=suffix), use_tqdm=False
    )
    assert complete(llada, "Say cat", suffix).choices[0].text == offline[0].outputs[0].text
    template = [-1, 65, 66, -1, 67]
    answer = complete(
        llada, "Say cat", {"diffusion_template": template}, extra={"return_token_ids": True, "ignore_eos": True}
    )
    ids = answer.choices[0].token_ids
    assert len(ids) == 5 and [ids[1], ids[2], ids[4]] == [65, 66, 67]


@pytest.mark.parametrize("route", [chat, complete])
@pytest.mark.parametrize("extras", [{"diffusion_steps": 0}, {"diffusion_suffix": [5] * 511}], ids=["value", "room"])
def test_a_mistake_in_a_streamed_request_is_one_line_of_the_log(
    llada: Server, route: Any, extras: dict[str, Any]
) -> None:
    before = len(llada.log.read_text())
    with pytest.raises(APIError) as failure:
        list(route(llada, extras=extras, stream=True))
    assert int(failure.value.code) == 400 and next(iter(extras)) in failure.value.message
    logged = llada.log.read_text()[before:].splitlines()
    assert [line for line in logged if "Traceback" in line or '  File "' in line] == []
    (told,) = [line for line in logged if next(iter(extras)) in line]
    assert "WARNING" in told and failure.value.message in told


@pytest.mark.parametrize("suffix", ["no more " * 100, [5] * 511, "no more " * 100_000], ids=["text", "ids", "huge"])
def test_what_prompt_and_parameters_tell_together_is_a_400(llada: Server, suffix: Any) -> None:
    with pytest.raises(BadRequestError) as failure:
        complete(llada, "Say cat", {"diffusion_suffix": suffix})
    message = failure.value.response.json()["error"]["message"]
    assert "max_model_len" in message and len(message) < 500, message
    assert complete(llada, max_tokens=2).choices


def test_a_top_k_beyond_any_vocabulary(llada: Server) -> None:
    assert complete(llada, temperature=1, extra={"top_k": 2**63}).choices
    assert complete(llada).choices


def test_a_client_that_leaves_frees_its_place(llada: Server) -> None:
    body = {
        "model": llada.model,
        "prompt": "Say cat",
        "max_tokens": 400,
        "temperature": 0,
        "stream": True,
        "vllm_xargs": {"diffusion_eos_suppression": "logits", "diffusion_block_length": 8},
    }
    with httpx.stream("POST", f"{llada.url}/v1/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        next(response.iter_lines())
    deadline = time.monotonic() + 30
    while running_requests(llada) > 0:
        assert time.monotonic() < deadline, "the request is still running"
        time.sleep(0.1)
    assert complete(llada).choices


def running_requests(server: Server) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running{"))


def test_requests_side_by_side_give_what_each_gives_alone(llada: Server) -> None:
    mixed = [
        {"prompt": "Reverse", "extras": {"diffusion_steps": 4}},
        {"prompt": "Spell the word house please, letter by letter", "extras": {"diffusion_block_length": 4}},
        {"prompt": "a", "extras": {"diffusion_remasking": "random"}, "seed": 3, "temperature": 0.7},
        {"prompt": "What is 1 plus 1?", "extras": {"diffusion_cfg_scale": 1.5}, "max_tokens": 9},
        {"prompt": "xyz", "extras": {"diffusion_remasking": "entropy"}, "max_tokens": 24},
        {"prompt": "xyz", "extras": {"diffusion_canvas_length": 8}, "max_tokens": 20},
    ]
    alone = [complete(llada, **request).choices[0].text for request in mixed]
    with ThreadPoolExecutor(2 * len(mixed)) as threads:
        together = [*threads.map(lambda request: complete(llada, **request).choices[0].text, mixed * 2)]
    assert together == alone * 2


def test_more_rows_than_a_block_of_the_choice(llada: Server) -> None:
    """Nine canvases have more rows than two blocks of 2 MB hold: one of the blocks has no row of the request that samples."""
    long = {"max_tokens": 490, "extra": {"return_token_ids": True, "ignore_eos": True}}
    sampled = long | {"temperature": 1.0, "seed": 7, "extras": {"diffusion_steps": 96}}
    greedy, prompts = long | {"extras": {"diffusion_steps": 8}}, list("abcdefgh")

    def answers(request: dict[str, Any]) -> list[list[int]]:
        return [choice.token_ids for choice in complete(llada, **request).choices]

    alone = answers(sampled), [answers(greedy | {"prompt": prompt})[0] for prompt in prompts]
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(answers, sampled)
        while running_requests(llada) == 0:
            assert not first.done()
            time.sleep(0.01)
        beside = answers(greedy | {"prompt": prompts})
        assert not first.done(), "they were not served together"
        assert (first.result(), beside) == alone
    assert {len(ids) for ids in (*alone[0], *beside)} == {490}
    assert complete(llada).choices
