"""Profiles of the engine: what a request that says nothing is decoded with, token for token as if it had said it all."""

import pytest
from support.checkpoints import folder
from support.engines import drive, engine, new_engine, num_forwards
from vllm import LLM, SamplingParams

from dllm_plugin.families import ARCHITECTURES
from dllm_plugin.params import PREFIX

PROMPTS = [[5, 6, 7], list(range(9, 40))]
FAMILIES = {"llada": "LLaDAModelLM", "dream": "DreamModel", "sdar": "SDARForCausalLM", "llada2": "LLaDA2MoeModelLM"}
_engines: dict[str, LLM] = {}


def served(name: str) -> LLM:
    """An engine as an operator starts it who says nothing; kept to the end."""
    if name not in _engines:
        _engines[name] = new_engine(folder(name), additional_config={"diffusion": {"profile": "balanced"}})
    return _engines[name]


def answers(llm: LLM, extras: dict) -> list[tuple[list[int], int]]:
    params = SamplingParams(
        temperature=0.0, seed=3, max_tokens=140, detokenize=False,
        extra_args={PREFIX + name: value for name, value in extras.items()},
    )  # fmt: skip
    outputs, _ = drive(llm, [(prompt, params) for prompt in PROMPTS])
    return [(list(output.outputs[0].token_ids), num_forwards(output)) for output in outputs]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_profile_stands_for_what_the_family_says(name: str) -> None:
    family, exact = ARCHITECTURES[FAMILIES[name]], engine(name)
    balanced = answers(exact, dict(family.profiles.get("balanced", {})))
    assert answers(served(name), {}) == balanced
    assert answers(exact, {"profile": "balanced"}) == balanced
    assert answers(served(name), {"profile": "fast"}) == answers(exact, dict(family.profiles["fast"]))
    assert answers(served(name), {"profile": "exact"}) == answers(exact, {})


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_profiles_differ(name: str) -> None:
    """Or the test above would say nothing."""
    each = [answers(served(name), {"profile": profile}) for profile in ("exact", "balanced", "fast")]
    assert each[0] != each[1] != each[2]


def test_what_the_operator_says_holds_under_every_profile() -> None:
    llm = new_engine(folder("llada"), additional_config={"diffusion": {"profile": "fast", "block_length": 8}})
    _engines["operator"] = llm
    fast = ARCHITECTURES["LLaDAModelLM"].profiles["fast"]
    assert answers(llm, {}) == answers(engine("llada"), {**fast, "block_length": 8})
    assert answers(llm, {"profile": "exact"}) == answers(engine("llada"), {"block_length": 8})
