"""Answers under a grammar: all valid, whatever was unmasked first, and nobody else's tokens change."""

import json
import sys
from pathlib import Path

import pytest
from support.checkpoints import folder
from support.engines import new_engine, num_forwards, scheduler
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from dllm_plugin.metrics import trajectory

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import structured

CHAT = [{"role": "user", "content": "reverse abcde"}]
ENGINES = {}


def engine(checkpoint, backend="xgrammar"):
    if (checkpoint, backend) not in ENGINES:
        config = {"backend": backend, "disable_any_whitespace": True}
        ENGINES[checkpoint, backend] = new_engine(folder(checkpoint), structured_outputs_config=config)
    return ENGINES[checkpoint, backend]


def ask(checkpoint, *, temperature=0.0, max_tokens=64, extras=None, n=1, **constraint):
    params = SamplingParams(
        temperature=temperature,
        seed=1,
        max_tokens=max_tokens,
        n=n,
        logprobs=1,
        extra_args={f"diffusion_{name}": value for name, value in (extras or {}).items()},
        structured_outputs=StructuredOutputsParams(**constraint),
    )
    return engine(checkpoint).chat(CHAT, params, use_tqdm=False)[0]


@pytest.mark.parametrize(
    "checkpoint, extras, backend",
    [
        ("tiny-llada", {"canvas_length": 32, "threshold": 0.5}, "xgrammar"),
        ("tiny-llada", {"canvas_length": 32, "block_length": 8, "cache": "dual", "steps": 8}, "xgrammar"),
        ("tiny-dream", {"canvas_length": 24, "alg_temp": 0.3, "remasking": "maskgit_plus"}, "xgrammar"),
        ("tiny-sdar", {}, "xgrammar"),
        ("tiny-llada2", {"entropy_bound": 0.5}, "xgrammar"),
        ("tiny-llada2", {"threshold": 0.5}, "guidance"),
        ("tiny-d2f", {"strategy": "d2f"}, "xgrammar"),
    ],
    ids=str,
)
def test_random_grammars(checkpoint, extras, backend):
    llm, extras = engine(checkpoint, backend), {f"diffusion_{name}": value for name, value in extras.items()}
    result = structured.run(llm, 8, extras, seed=len(extras))
    assert result["valid"] == 1 and result["neighbours_changed"] == result["changed_by_neighbours"] == 0
    assert not scheduler(llm).requests


@pytest.mark.parametrize("checkpoint", ["tiny-llada", "tiny-llada2"])
def test_no_string_has_a_control_character(checkpoint):
    """However likely it is; XGrammar takes it where a string has a greatest length."""
    control, tab, letter = engine(checkpoint).get_tokenizer().encode("\x03\ta", add_special_tokens=False)
    params = SamplingParams(
        temperature=0, seed=1, max_tokens=40, logit_bias={control: 60.0, tab: 50.0, letter: 40.0},
        extra_args={"diffusion_threshold": 0.3, "diffusion_canvas_length": 24},
        structured_outputs=StructuredOutputsParams(
            json={"type": "object", "properties": {"b": {"type": "string", "minLength": 3, "maxLength": 4}}, "required": ["b"]}
        ),
    )  # fmt: skip
    text = engine(checkpoint).chat(CHAT, params, use_tqdm=False)[0].outputs[0].text
    assert json.loads(text)["b"].strip("a") == ""


@pytest.mark.parametrize("checkpoint", ["tiny-llada", "tiny-sdar"])
def test_what_is_forced_costs_no_forward(checkpoint):
    """Of a constant all but the last token of each block are written without a forward pass, and are certain."""
    text = '{"name":"abcdefghij","size":12}'
    output = ask(checkpoint, choice=[text], extras={"canvas_length": 48, "trajectory": 1})
    (completion,) = output.outputs
    assert completion.text == text and completion.finish_reason == "stop"
    assert len(completion.logprobs) == len(completion.token_ids)
    block = 48 if checkpoint == "tiny-llada" else 4
    assert num_forwards(output) <= len(completion.token_ids) // block + 2
    chosen = {event.position for event in trajectory(completion)}
    for position, (token, told) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        assert position in chosen or told[token].logprob == 0


def test_samples_differ_and_each_is_valid():
    output = ask("tiny-sdar", temperature=1.0, n=4, regex=r"[a-z]{6}\d{2}")
    texts = [completion.text for completion in output.outputs]
    assert len(set(texts)) > 1
    assert all(structured.is_valid(StructuredOutputsParams(regex=r"[a-z]{6}\d{2}"), text) for text in texts)


def test_a_token_that_is_cut_off_leaves_a_prefix():
    output = ask(
        "tiny-sdar",
        max_tokens=5,
        json={"type": "object", "properties": {"name": {"enum": ["red"]}}, "required": ["name"]},
    )
    assert output.outputs[0].text.startswith('{"nam') and output.outputs[0].finish_reason == "length"


def test_a_grammar_that_leaves_nothing_ends_its_request_alone():
    """The one token that may be chosen is none that the grammar takes."""
    llm = engine("tiny-sdar")
    (token,) = llm.get_tokenizer().encode("z", add_special_tokens=False)
    params = SamplingParams(
        temperature=0,
        max_tokens=8,
        allowed_token_ids=[token],
        structured_outputs=StructuredOutputsParams(regex="[ab]{4}"),
    )
    plain = SamplingParams(temperature=0, max_tokens=12)
    wrong, right = llm.chat([CHAT, CHAT], [params, plain], use_tqdm=False)
    assert wrong.outputs[0].finish_reason == "error"
    assert right.outputs[0].token_ids == llm.chat(CHAT, plain, use_tqdm=False)[0].outputs[0].token_ids
    assert not scheduler(llm).requests


def test_a_template_beside_a_grammar_is_refused():
    with pytest.raises(ValueError, match=r"structured_outputs and diffusion_template=.* exclude each other"):
        ask("tiny-sdar", regex="[ab]{4}", extras={"template": [-1, 5, -1]})


def test_json_objects_parse():
    output = ask(
        "tiny-sdar",
        json={
            "type": "object",
            "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}},
            "required": ["n"],
        },
    )
    assert json.loads(output.outputs[0].text)["n"] <= 99
