"""Tools, reasoning and structured outputs over HTTP: vLLM's parsers on a real server, asked by the OpenAI client.

The model is tiny-llada with the tokens that parsers look for. It has learnt neither to think nor to call a tool, so what the
model should have said is pinned by a template, or forced by a grammar.
"""

import json
import random
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from support.checkpoints import folder, temporary_folder
from support.server import Server, start
from transformers import PreTrainedTokenizerFast

from dllm_plugin.rollouts import rollout_of_response

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import structured

MARKS = {"<think>": 266, "</think>": 267, "<tool_call>": 268, "</tool_call>": 269}
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- if enable_thinking is false %}{{ '<think></think>' }}{% endif %}
"""
ARGUMENTS = {
    "type": "object",
    "properties": {
        "word": {"type": "string", "maxLength": 5},
        "times": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["word", "times"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": ARGUMENTS, "strict": True}}
    for name in ("reverse", "repeat")
]
LAX = [{"type": "function", "function": {"name": "reverse", "parameters": ARGUMENTS}}]
NAMED = {"type": "function", "function": {"name": "repeat"}}
both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


class Answer(NamedTuple):
    """What a client has of an answer in the end. ``calls``: name and arguments of each."""

    content: str
    reasoning: str
    calls: list[tuple[str, str]]
    finish_reason: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    checkpoint, logs = temporary_folder("llada-with-marks"), tmp_path_factory.mktemp("server")
    shutil.copytree(folder("tiny-llada"), checkpoint)
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["added_tokens"] += [
        tokenizer["added_tokens"][-1] | {"id": number, "content": mark, "special": False}
        for mark, number in MARKS.items()
    ]
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    (logs / "chat.jinja").write_text(CHAT_TEMPLATE)
    flags = [
        *("--chat-template", str(logs / "chat.jinja"), "--dtype", "float32", "--reasoning-parser", "qwen3"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--structured-outputs-config", json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})),
    ]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(checkpoint), *flags]
    running = start(command, str(checkpoint), logs / "log")
    try:
        running.wait()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def ids(server: Server) -> Any:
    """Token ids of a text."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{server.model}/tokenizer.json")
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def ask(
    server: Server,
    stream: bool,
    text: str = "Reverse the word cat.",
    thinks: bool = False,
    extras: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    **settings: Any,
) -> Answer:
    body = {
        "vllm_xargs": extras or {"diffusion_canvas_length": 32},
        "chat_template_kwargs": {"enable_thinking": thinks},
    } | (extra or {})
    settings = {"temperature": 0, "seed": 1, "max_tokens": 96} | settings
    answer = server.client.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": text}], stream=stream, extra_body=body, **settings
    )
    if not stream:
        (choice,) = answer.choices
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        reasoning = getattr(choice.message, "reasoning", None)
        return Answer(choice.message.content or "", reasoning or "", calls, choice.finish_reason)
    content, reasoning, finish_reason = "", "", ""
    told: dict[int, list[str]] = defaultdict(lambda: ["", ""])
    for chunk in answer:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning", None) or ""
        for call in choice.delta.tool_calls or []:
            told[call.index][0] += call.function.name or ""
            told[call.index][1] += call.function.arguments or ""
        finish_reason = choice.finish_reason or finish_reason
    return Answer(
        content, reasoning, [(name, arguments) for _, (name, arguments) in sorted(told.items())], finish_reason
    )


# ---- special tokens


@both
@pytest.mark.parametrize(
    "asked", [{}, {"tools": LAX}, {"extra": {"skip_special_tokens": False}}], ids=["plain", "tools", "shown"]
)
def test_the_end_of_turn_is_no_content(server: Server, stream: bool, asked: dict[str, Any]) -> None:
    """The parsers have special tokens shown, for every request."""
    answer = ask(server, stream, thinks=True, **asked)
    assert answer == Answer("", "tac", [], "stop")


@both
def test_reasoning_and_content_are_told_apart(server: Server, ids: Any, stream: bool) -> None:
    template = [*ids("turn "), -1, *ids("it</think>ta"), -1, *ids("<|eot_id|>"), -1, -1]
    answer = ask(
        server, stream, thinks=True, extras={"diffusion_template": template}, extra={"allowed_token_ids": ids("abcde")}
    )
    assert re.fullmatch("turn [a-e]it", answer.reasoning) and re.fullmatch("ta[a-e]", answer.content)
    assert answer.finish_reason == "stop"


@both
def test_a_grammar_begins_where_reasoning_ends(server: Server, ids: Any, stream: bool) -> None:
    """All want to be x and two beside each other may not, so that the second one is the end of reasoning."""
    extra = {
        "logit_bias": {str(MARKS["</think>"]): 90.0, str(ids("x")[0]): 100.0},
        "bad_words": ["xx"],
        "structured_outputs": {"regex": r"[ab]{3}\d"},
    }
    answer = ask(server, stream, thinks=True, extra=extra)
    assert answer.reasoning == "x" and re.fullmatch(r"[ab]{3}\d", answer.content) and answer.finish_reason == "stop"


# ---- tools


@both
@pytest.mark.parametrize("before", ["", "I say "])
def test_auto_calls_what_the_model_calls(server: Server, ids: Any, stream: bool, before: str) -> None:
    call = '<tool_call>{"name": "reverse", "arguments": {"word": "c', '", "times": 3}}</tool_call><|eot_id|>'
    template = [*ids(before + call[0]), -1, -1, *ids(call[1]), -1, -1]
    answer = ask(
        server, stream, tools=LAX, extras={"diffusion_template": template}, extra={"allowed_token_ids": ids("abcde")}
    )
    ((name, arguments),) = answer.calls
    assert name == "reverse" and re.fullmatch("c[a-e]{2}", json.loads(arguments)["word"])
    assert (answer.content.strip(), answer.finish_reason) == (before.strip(), "tool_calls")


@pytest.mark.parametrize("stream, temperature", [(False, 0.0), (True, 1.0)], ids=["whole", "streamed"])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_that_is_asked_for_fits_its_schema(
    server: Server, ids: Any, choice: Any, stream: bool, temperature: float
) -> None:
    """The schema of a tool that is strict; JSON in a structural tag may have whitespace without end."""
    no_whitespace = {str(token): -100.0 for token in ids(" \n\t\r")}
    answer = ask(
        server, stream, tools=TOOLS, tool_choice=choice, temperature=temperature, max_tokens=192,
        extra={"logit_bias": no_whitespace, "parallel_tool_calls": False},
    )  # fmt: skip
    assert answer.calls and not answer.content
    for name, arguments in answer.calls:
        assert name in (["repeat"] if choice is NAMED else ["repeat", "reverse"])
        assert structured.is_valid(structured.StructuredOutputsParams(json=ARGUMENTS), arguments)
    assert answer.finish_reason == ("stop" if choice is NAMED else "tool_calls")


# ---- structured outputs

SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ARGUMENTS}}
CONSTRAINED = {
    "json_object": ({"response_format": {"type": "json_object"}}, r"\{.*"),
    "json_schema": ({"response_format": SCHEMA}, r'\{"word":"[^"]*","times":\d\}'),
    "json": ({"extra": {"structured_outputs": {"json": ARGUMENTS}}}, r'\{"word":"[^"]*","times":\d\}'),
    "regex": ({"extra": {"structured_outputs": {"regex": r"[ab]{3}\d"}}}, r"[ab]{3}\d"),
    "choice": ({"extra": {"structured_outputs": {"choice": ["red one", "blue"]}}}, "red one|blue"),
    "grammar": ({"extra": {"structured_outputs": {"grammar": 'root ::= "a" ("b" | "c") "d"'}}}, "a[bc]d"),
}


@both
@pytest.mark.parametrize("constraint", CONSTRAINED)
def test_an_answer_fits_its_constraint(server: Server, stream: bool, constraint: str) -> None:
    asked, expected = CONSTRAINED[constraint]
    answer = ask(server, stream, **asked)
    assert re.fullmatch(expected, answer.content), answer
    assert answer.finish_reason == "stop"


def test_random_constraints_beside_requests_without_one(server: Server) -> None:
    draw = random.Random(5)
    constraints = [structured.random_constraint(draw) for _ in range(8)]
    alone = ask(server, False)

    def constrained(number: int) -> Answer:
        asked = {kind: value for kind in ("json", "regex") if (value := getattr(constraints[number], kind)) is not None}
        return ask(
            server, number % 3 == 0, temperature=number % 2, seed=number, max_tokens=structured.MAX_TOKENS,
            extra={"structured_outputs": asked},
        )  # fmt: skip

    with ThreadPoolExecutor(8) as threads:
        free = [threads.submit(ask, server, False) for _ in constraints]
        answers = [*threads.map(constrained, range(len(constraints)))]
    assert [
        (constraint, answer)
        for constraint, answer in zip(constraints, answers, strict=True)
        if not structured.is_valid(constraint, answer.content)
    ] == []
    assert [future.result() for future in free] == [alone] * len(free)


# ---- rollouts


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
@pytest.mark.parametrize("asked", [{}, {"structured_outputs": {"regex": "[ab]{3}"}}], ids=["free", "grammar"])
def test_a_response_is_a_rollout(server: Server, route: str, asked: dict[str, Any]) -> None:
    """A grammar's position is ranked by infinity, of which JSON has none."""
    text = "Reverse the word cat."
    body = {"prompt": text} if route == "completions" else {"messages": [{"role": "user", "content": text}]}
    body |= {"max_tokens": 12, "temperature": 1, "seed": 1, "return_token_ids": True} | asked
    response = httpx.post(
        f"{server.url}/v1/{route}",
        json=body | {"model": server.model, "vllm_xargs": {"diffusion_trajectory": 1, "diffusion_canvas_length": 8}},
        timeout=60,
    ).json()
    rollout = rollout_of_response(response)
    assert rollout.token_ids[: rollout.num_answer] == response["choices"][0]["token_ids"]
    assert len(rollout.prompt_token_ids) == response["usage"]["prompt_tokens"]
    assert len(rollout.token_ids) in (8, 12) and rollout.canvas_length == 8
    assert sorted({step for step in rollout.forward_passes if step >= 0})[0] == 0
    assert all(
        (logprob < 0) == (step >= 0) for logprob, step in zip(rollout.logprobs, rollout.forward_passes, strict=True)
    )
    with pytest.raises(ValueError, match="ask with n=1, return_token_ids and diffusion_trajectory=1 in vllm_xargs"):
        rollout_of_response(response | {"kv_transfer_params": None})
