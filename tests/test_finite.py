"""Weights and logits that are no numbers: told once, and an error of the requests that they reach."""

import functools
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.block_cases import BlockCase
from support.cases import PolicyCase, difference
from support.checkpoints import MASK, VOCABULARY, folder, temporary_folder, write_checkpoint
from support.engines import drive, engine, model_runner, new_engine, scheduler
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from dllm_plugin import finite
from dllm_plugin.worker import model_runner as model_runner_module
from dllm_plugin.worker.model_runner import DiffusionModelRunner

RARE = 37  # a token that only some prompts hold
FAULTS = {
    # the rows of a prompt that holds the token, and so of all that see it
    "llada-row": ("llada", "model.transformer.wte.weight", lambda weight: weight[RARE].fill_(torch.nan)),
    "sdar-row": ("sdar", "model.embed_tokens.weight", lambda weight: weight[RARE].fill_(torch.inf)),
    "dream-layer": ("dream", "model.layers.1.mlp.down_proj.weight", lambda weight: weight[0, 0].fill_(torch.inf)),
    "llada-head": ("llada", "model.transformer.ff_out.weight", lambda weight: weight[RARE].fill_(torch.nan)),
}


@functools.cache
def broken(name: str) -> tuple[LLM, list[str]]:
    """An engine whose weights are not all finite, and what its start said of them."""
    family, tensor, harm = FAULTS[name]
    path, original = temporary_folder(name), folder(family)
    write_checkpoint(family, name, seed=3)
    tensors = load_file(original / "model.safetensors")
    harm(tensors[tensor])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with patch.object(model_runner_module.logger, "error") as told:
        llm = new_engine(path)
    return llm, [call.args[0] % call.args[1:] for call in told.mock_calls]


def params(extras: dict | None = None, **settings) -> SamplingParams:
    given = {"temperature": 0.0, "seed": 1, "max_tokens": 12, "ignore_eos": True, "detokenize": False}
    return SamplingParams(
        **given | settings, extra_args={f"diffusion_{key}": value for key, value in (extras or {}).items()}
    )


@pytest.mark.parametrize("name", FAULTS)
def test_the_log_names_the_first_tensor_once(name: str) -> None:
    _, messages = broken(name)
    (message,) = messages
    assert f"The weights hold NaN or infinity, first in {FAULTS[name][1]}, in 1 tensors" in message


WAYS = {
    "plain": {},
    "random": {"remasking": "random"},
    "sequential": {"remasking": "sequential"},
    "entropy": {"remasking": "entropy"},
    "origin": {"remasking": "origin"},
    "threshold": {"threshold": 0.9},
    "factor": {"factor": 1.0},
    "dual": {"cache": "dual", "block_length": 4},
    "d2f": {"strategy": "d2f", "block_length": 4},
    "guided": {"cfg_scale": 1.0},
    "last-pass": {"max_steps": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_request_that_they_reach_ends_with_an_error_and_no_other_does(way: str) -> None:
    llm, _ = broken("llada-row")
    case = PolicyCase("llada", "low_confidence", 6, prompt=5)
    assert RARE not in case.prompt_ids
    for kind in (RequestOutputKind.FINAL_ONLY, RequestOutputKind.CUMULATIVE):
        reached = [5, RARE, 7], params(WAYS[way], output_kind=kind)
        sampled = [5, RARE, 7], params(WAYS[way], temperature=1.0, output_kind=kind)
        outputs, _ = drive(llm, [reached, case.request, sampled])
        assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length", "error"]
        assert not outputs[0].outputs[0].token_ids and not outputs[2].outputs[0].token_ids
        assert not difference(case, outputs[1])
    assert not scheduler(llm).requests and not scheduler(llm).denoising


@pytest.mark.parametrize("extras", [{}, {"threshold": 0.9}, {"edit_threshold": 0.0}, {"entropy_bound": 0.5}], ids=str)
def test_of_a_block_diffusion_model(extras: dict) -> None:
    llm, _ = broken("sdar-row")
    case = BlockCase("sdar", 6, 5)
    assert RARE not in case.prompt_ids
    outputs, _ = drive(llm, [([5, RARE, 7], params(extras)), case.request])
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length"]
    assert not difference(case, outputs[1])


@pytest.mark.parametrize("name", ["dream-layer", "llada-head"])
def test_weights_that_every_request_meets(name: str) -> None:
    llm, _ = broken(name)
    for extras in ({}, {"remasking": "random"}):
        outputs, _ = drive(llm, [([5, 6, 7], params(extras))] * 2)
        assert [output.outputs[0].finish_reason for output in outputs] == ["error"] * 2


def test_a_mask_that_a_template_pins_is_text() -> None:
    llm, _ = broken("llada-row")
    outputs, _ = drive(
        llm, [([5, 6], params({"template": [-1, MASK, -1]})), ([5, RARE], params({"template": [-1, MASK]}))]
    )
    assert [output.outputs[0].finish_reason for output in outputs] == ["stop", "error"]
    assert outputs[0].outputs[0].token_ids[1] == MASK


def test_finite_weights_cost_nothing() -> None:
    assert not model_runner(engine("llada")).watches_logits


@pytest.mark.parametrize(
    "dtype, lora_config, watched",
    [
        (torch.float16, None, True),
        (torch.bfloat16, None, False),
        (torch.float32, None, False),
        (torch.bfloat16, object(), True),
    ],
    ids=["float16", "bfloat16", "float32", "adapters"],
)
def test_logits_are_watched_where_they_can_be_no_numbers(dtype, lora_config, watched, monkeypatch) -> None:
    runner = model_runner(engine("llada"))
    monkeypatch.setattr(runner, "model_config", type("Config", (), {"dtype": dtype}))
    monkeypatch.setattr(runner, "lora_config", lora_config)
    monkeypatch.setattr(runner, "watches_logits", not watched)
    dropped: list[None] = []
    monkeypatch.setattr(runner.graphs, "forget", lambda: dropped.append(None))
    DiffusionModelRunner.watch_logits(runner)
    assert runner.watches_logits == watched
    assert dropped == [None], "graphs of the other kind"


@pytest.mark.parametrize(
    "tensor, is_finite",
    [
        (torch.ones(3, 4), True),
        (torch.ones(3, 4).index_fill(1, torch.tensor([3]), torch.nan), False),
        (torch.tensor([1.0, -torch.inf], dtype=torch.bfloat16), False),
        (torch.tensor([65504.0], dtype=torch.float16), True),
        (torch.tensor([3e38, 3e38]), True),
        (torch.tensor([1, 2]), True),
        (torch.empty(0, 5), True),
        (torch.tensor([1.0, 448.0]).to(torch.float8_e4m3fn), True),
        (torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn), False),
        (torch.tensor(torch.nan), False),
    ],
    ids=["ones", "nan", "infinity", "half", "sum-overflows", "integers", "empty", "float8", "float8-nan", "scalar"],
)
def test_is_finite(tensor: torch.Tensor, is_finite: bool) -> None:
    assert finite.is_finite(tensor) is is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_without_numbers_have_the_mask_for_a_token(dtype: torch.dtype) -> None:
    logits = torch.randn(6, VOCABULARY, dtype=torch.float32).to(dtype)
    logits[1], logits[3, 7], logits[4, 0] = torch.nan, torch.nan, torch.inf
    logits[5] = 60000.0  # finite, though the sum of some is not in float16
    token = finite.in_place_of_no_choice(torch.arange(6), logits, MASK)
    assert token.tolist() == [0, MASK, 2, MASK, MASK, 5]
