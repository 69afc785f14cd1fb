"""Sampling controls of the engine, token for token against `reference/controls.py` in the reference decoders."""

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import block, decoding, dream, llada
from reference.controls import Controlled, Controls, has_phrase
from support.cases import random_prompt
from support.checkpoints import EOS, TURN_END, block_reference, reference
from support.engines import drive, engine
from vllm import SamplingParams

PROMPT = 7
TOKENS = 16


@dataclass(frozen=True)
class Case:
    """One request under one kind of control, or all of them."""

    checkpoint: str
    kind: str
    extras: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def id(self) -> str:
        return "-".join([self.checkpoint, self.kind, *(f"{name}={value}" for name, value in self.extras.items())])

    @property
    def is_block(self) -> bool:
        return self.checkpoint in ("sdar", "llada2")

    @property
    def plain(self) -> "Case":
        """The same without controls: what it says tells which controls change anything."""
        return Case(self.checkpoint, "none", self.extras)

    @property
    def prompt_ids(self) -> list[int]:
        return random_prompt(PROMPT, self.checkpoint)

    @property
    def controls(self) -> Controls:
        if self.kind == "none":
            return Controls()
        said = self.plain.expected
        kinds: dict[str, dict[str, Any]] = {
            "allowed": {"allowed": [*range(40, 300, 3), EOS]},
            "phrases": {"phrases": [said[:1], said[3:5], said[6:9], said[11:13], [said[10]] * 2]},
            "min_tokens": {"min_tokens": 6, "stop_ids": [EOS, TURN_END, *said[2:4]]},
            "bias": {"bias": {said[0]: -4.0, said[5]: 2.5, 33: 3.0}},
            "repetition": {"repetition": 1.7},
            "frequency": {"frequency": 0.9},
            "presence": {"presence": 1.4},
            "negative": {"frequency": -0.4, "presence": -0.3, "repetition": 0.8},
        }
        if self.kind != "all":
            return Controls(**kinds[self.kind])
        together = {key: value for kind, part in kinds.items() if kind != "negative" for key, value in part.items()}
        return Controls(**together | {"allowed": [*range(0, 310), EOS]})

    @property
    def request(self) -> tuple[list[int], SamplingParams]:
        asked = self.controls
        params = SamplingParams(
            temperature=0.0,
            max_tokens=TOKENS,
            ignore_eos=True,
            detokenize=False,
            seed=1,
            allowed_token_ids=list(asked.allowed) or None,
            stop_token_ids=[t for t in asked.stop_ids if t not in (EOS, TURN_END)],
            min_tokens=asked.min_tokens,
            logit_bias=asked.bias or None,
            repetition_penalty=asked.repetition,
            frequency_penalty=asked.frequency,
            presence_penalty=asked.presence,
            extra_args={f"diffusion_{name}": value for name, value in self.extras.items()},
        )
        params._bad_words_token_ids = [list(phrase) for phrase in asked.phrases] or None
        return self.prompt_ids, params

    def rows(self, ids: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Positions of the open block that get a token."""
        if self.is_block:
            length = block_reference(self.checkpoint).block_length
            in_block = torch.arange(len(ids)) >= len(ids) - length
            if "edit_threshold" in self.extras:
                return (in_block & (torch.arange(len(ids)) >= PROMPT)).nonzero()[:, 0]
            return (in_block & masked).nonzero()[:, 0]
        length, canvas = self.extras.get("block_length", len(ids)), self.extras.get("canvas_length", len(ids))
        first = int(masked.int().argmax())
        start = PROMPT + (first - PROMPT) // canvas * canvas
        start += (first - start) // length * length
        return (masked & (torch.arange(len(ids)) < start + length)).nonzero()[:, 0]

    @property
    def expected(self) -> list[int]:
        return decoded(self, self.id)

    def decode(self) -> list[int]:
        """What the reference decoder makes of it."""
        asked = self.controls
        stops = [t for t in asked.stop_ids if t not in (EOS, TURN_END)]
        settings = dict(self.extras)
        if self.is_block:
            model = Controlled(block_reference(self.checkpoint), PROMPT, asked, self.rows)
            return block.generate(
                model, self.prompt_ids, TOKENS, block_length=model.block_length, stop_ids=stops, **settings
            ).tokens
        model = Controlled(reference(self.checkpoint), PROMPT, asked, self.rows)
        policy = settings.pop("remasking")
        of_llada = policy in llada.REMASKING
        return decoding.generate_canvases(
            (llada if of_llada else dream).generate,
            model,
            self.prompt_ids,
            TOKENS,
            settings.pop("canvas_length", 1024),
            settings.pop("steps", TOKENS),
            stop_ids=stops,
            block_length=settings.pop("block_length", None),
            **{"remasking" if of_llada else "alg": policy},
        ).tokens


@functools.cache
def decoded(case: Case, name: str) -> list[int]:
    return case.decode()


KINDS = (
    "allowed", "phrases", "min_tokens", "bias", "repetition", "frequency", "presence", "negative", "all",
)  # fmt: skip
DECODERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llada", {"remasking": "low_confidence", "steps": 6}),
    ("llada", {"remasking": "low_confidence", "block_length": 4, "canvas_length": 8}),
    ("dream", {"remasking": "maskgit_plus", "steps": 7}),
    ("dream", {"remasking": "topk_margin", "block_length": 8, "steps": 8}),
    ("sdar", {"threshold": 0.05}),
    ("llada2", {"threshold": 0.02, "edit_threshold": 0.01}),
)
CASES = [Case(checkpoint, kind, extras) for checkpoint, extras in DECODERS for kind in KINDS]


def differences(cases: list[Case], outputs: list) -> list[str]:
    pairs = [(case, list(output.outputs[0].token_ids)) for case, output in zip(cases, outputs, strict=True)]
    return [f"{case.id}\nengine    {got}\nreference {want}" for case, got in pairs if got != (want := case.expected)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_control_alone(case):
    (output,), _ = drive(engine(case.checkpoint), [case.request])
    assert case.expected != case.plain.expected, "the control changes nothing"
    assert not differences([case], [output])
    assert not has_phrase(output.outputs[0].token_ids, case.controls.phrases)
    if case.controls.allowed:
        assert {*output.outputs[0].token_ids} <= {*case.controls.allowed}


@pytest.mark.parametrize("checkpoint", ["llada", "dream", "sdar", "llada2"])
def test_neighbours_keep_their_tokens(checkpoint):
    """Sixteen at once, constrained or not, in slots that others had before: requests come and go, longer lists and shorter."""
    cases = [case for case in CASES if case.checkpoint == checkpoint]
    plain = [Case(checkpoint, "none", extras) for name, extras in DECODERS if name == checkpoint]
    mixed = [case for controlled in cases for case in (controlled, plain[cases.index(controlled) % len(plain)])]
    mixed += mixed[::-1]
    arrivals = [number // 16 * 2 + number % 3 for number in range(len(mixed))]
    outputs, running = drive(engine(checkpoint), [case.request for case in mixed], arrivals)
    assert max(running) > 8
    assert not differences(mixed, outputs)


SMALL = 8  # tokens that an answer is made of


@st.composite
def crowded(draw):
    """A request whose answer has few tokens to be made of, most of which would complete a phrase with another one."""
    few = st.integers(0, SMALL - 3)
    phrases = draw(st.lists(st.lists(few, min_size=1, max_size=4), min_size=1, max_size=9))
    checkpoint, extras = draw(st.sampled_from(CROWDED))
    return checkpoint, extras, [phrase for phrase in phrases if len(phrase) > 1 or phrase[0] < 2]


CROWDED = (
    ("llada", {"remasking": "low_confidence", "steps": 2}),
    ("llada", {"remasking": "random", "steps": 5, "canvas_length": 6}),
    ("llada", {"remasking": "low_confidence", "block_length": 4, "steps": 6, "cache": "dual"}),
    ("llada", {"strategy": "d2f", "block_length": 4}),
    ("llada2", {"threshold": 0.02, "edit_threshold": 0.0}),
    ("llada2", {"threshold": 0.1, "edit_threshold": 0.05}),
    ("sdar", {"threshold": 0.01, "template": [-1, 101, -1, -1, 102, 100, -1, -1, -1, 101, -1, -1]}),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(crowded(), min_size=1, max_size=5), st.sampled_from([0.0, 1.0]), st.integers(0, 99))
def test_no_phrase_ever_stands(cases, temperature, seed):
    """Whichever of its tokens is unmasked last, or replaced: none but what the template itself pins."""
    for checkpoint in {name for name, *_ in cases}:
        requests = []
        for _, extras, phrases in (case for case in cases if case[0] == checkpoint):
            params = SamplingParams(
                temperature=temperature,
                max_tokens=12,
                ignore_eos=True,
                detokenize=False,
                seed=seed,
                allowed_token_ids=list(range(100, 100 + SMALL)),
                extra_args={f"diffusion_{name}": value for name, value in extras.items()},
            )
            params._bad_words_token_ids = [[100 + token for token in phrase] for phrase in phrases]
            requests.append((random_prompt(PROMPT, checkpoint), params))
        for (_, params), output in zip(requests, drive(engine(checkpoint), requests)[0], strict=True):
            tokens, phrases = list(output.outputs[0].token_ids), params._bad_words_token_ids
            pinned = params.extra_args.get("diffusion_template", [-1] * len(tokens))
            assert {*tokens} <= {*range(100, 100 + SMALL)}
            for phrase in phrases:
                for first in range(len(tokens) - len(phrase) + 1):
                    part = slice(first, first + len(phrase))
                    assert tokens[part] != phrase or tuple(pinned[part]) == tuple(phrase), (phrase, tokens, params)
