"""The bundled checkpoints answer the held-out questions, through the engine and the chat template."""

import pytest
from support.engines import engine
from vllm import SamplingParams

from dllm_plugin.checkpoints import DECODING, NAMES
from dllm_plugin.checkpoints.tasks import questions
from dllm_plugin.metrics import tokens_per_forward

# checkpoint, its decoding, the least share of right answers, the least tokens per forward
SETTINGS = {
    "llada one token a step": ("tiny-llada", {"block_length": 8}, 0.95, 0.0),
    "llada cached threshold": ("tiny-llada", {"block_length": 8, "cache": "dual", "threshold": 0.9}, 0.95, 2.0),
    "dream entropy": ("tiny-dream", {"remasking": "entropy", "block_length": 8}, 0.95, 0.0),
    "dream cached threshold": ("tiny-dream", {"block_length": 8, "cache": "dual", "threshold": 0.9}, 0.95, 2.0),
    "d2f": ("tiny-d2f", {"strategy": "d2f", "block_length": 16}, 0.95, 2.0),
    "sdar one token a step": ("tiny-sdar", {}, 0.95, 0.0),
    "sdar threshold": ("tiny-sdar", {"threshold": 0.9}, 0.95, 2.0),
    "llada2 threshold": ("tiny-llada2", {}, 0.95, 2.0),
    "llada2 quality": ("tiny-llada2", {"preset": "quality"}, 0.95, 1.0),
    "llada2 speed": ("tiny-llada2", {"preset": "speed"}, 0.95, 1.0),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_held_out_questions_are_answered(setting):
    checkpoint, extras, least_right, least_tpf = SETTINGS[setting]
    asked = questions("held_out", 200, seed=0)
    params = SamplingParams(
        temperature=0, max_tokens=32, seed=0, extra_args={f"diffusion_{name}": value for name, value in extras.items()}
    )
    chats = [[{"role": "user", "content": question.text}] for question in asked]
    outputs = engine(checkpoint).chat(chats, params, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    wrong = [
        (question.text, completion.text)
        for question, completion in zip(asked, completions, strict=True)
        if completion.text != question.answer
    ]
    assert len(asked) == 200
    assert 1 - len(wrong) / len(asked) >= least_right, wrong
    assert sum(map(tokens_per_forward, completions)) / len(completions) >= least_tpf


@pytest.mark.parametrize("checkpoint", ["tiny-sdar", "tiny-llada2"])
def test_a_chat_of_three_turns_finds_its_history(checkpoint):
    """Each turn reads the keys and values of those before it, its answers too, and the answers are right all the same."""
    llm = engine(checkpoint, block_size=16)
    chat, hits = [], []
    for question in questions("held_out", 3, seed=2):
        chat.append({"role": "user", "content": question.text})
        output = llm.chat(chat, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)[0]
        assert output.outputs[0].text == question.answer
        hits.append(output.num_cached_tokens)
        chat.append({"role": "assistant", "content": output.outputs[0].text})
        length = len(output.prompt_token_ids) + len(output.outputs[0].token_ids)
    assert hits[0] <= 16 < hits[1] < hits[2] < length


@pytest.mark.parametrize("checkpoint", NAMES)
def test_no_text_shows_the_end_of_turn(checkpoint):
    """A parser of tools or reasoning has special tokens shown, and none of them would take it out."""
    chats = [[{"role": "user", "content": question.text}] for question in questions("held_out", 8, seed=1)]
    hidden, shown, whole = (
        engine(checkpoint).chat(
            chats,
            SamplingParams(
                temperature=0, max_tokens=32, seed=0, extra_args=dict(DECODING.get(checkpoint, {})), **asked
            ),
            use_tqdm=False,
        )
        for asked in ({}, {"skip_special_tokens": False}, {"skip_special_tokens": False, "ignore_eos": True})
    )
    assert [output.outputs[0].text for output in shown] == [output.outputs[0].text for output in hidden]
    assert {output.outputs[0].finish_reason for output in shown} == {"stop"}
    # who asks for everything sees it
    assert all("<|" in output.outputs[0].text for output in whole)
