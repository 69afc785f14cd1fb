"""Rows cut into chunks of logits, blocks of choosing and blocks of filtering, one, two and three rows each: requests that
ask for something beside those that do not decode as they do where nothing is cut.

Tokens are compared and not bits: the last bits of a matrix product depend on its number of rows. The kernels' own blocks
keep every bit, see tests/kernels.
"""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import random_prompt
from support.checkpoints import VOCABULARY
from support.engines import drive, engine, model_runner, num_forwards
from vllm import SamplingParams

from dllm_plugin.kernels.confidence import confidence
from dllm_plugin.kernels.filter import find_cut

CHOICE, FILTER = (sys.modules[kernel.__module__] for kernel in (confidence, find_cut))
# the likeliest token of their rows is often one that may not be chosen
CHECKPOINTS = ("llada-loud", "dream-loud")
HOLE = -1

# What a row of logits can be asked for: (sampling parameters, diffusion parameters).
KINDS = {
    "greedy": ({}, {}),
    "sampled": ({"temperature": 0.8}, {}),
    "top_p": ({"temperature": 0.6, "top_p": 0.7}, {}),
    "top_k": ({"temperature": 1.3, "top_k": 5}, {}),
    "min_p": ({"temperature": 0.9, "min_p": 0.2}, {}),
    "guided": ({}, {"cfg_scale": 1.5}),
    "guided_and_sampled": ({"temperature": 0.5}, {"cfg_scale": 0.5, "remasking": "entropy"}),
    "never_eos": ({}, {"eos_suppression": "logits"}),
    "eos_last": ({"temperature": 0.6}, {"eos_suppression": "confidence"}),
    "random": ({}, {"remasking": "random"}),
    "sequential": ({}, {"remasking": "sequential"}),
    "origin": ({"temperature": 0.4}, {"remasking": "origin", "steps": 5}),
    "maskgit_plus": ({"temperature": 0.9, "top_k": 7}, {"remasking": "maskgit_plus", "alg_temp": 0.3}),
    "topk_margin": ({"temperature": 0.9, "top_p": 0.8}, {"remasking": "topk_margin"}),
    "entropy": ({}, {"remasking": "entropy", "block_length": 4}),
    "threshold": ({}, {"remasking": "low_confidence", "threshold": 0.2, "cache": "dual"}),
    "factor": ({}, {"remasking": "maskgit_plus", "factor": 1.5}),
    "d2f": ({}, {"strategy": "d2f", "block_length": 4, "d2f_add_threshold": 0.25, "d2f_accept_threshold": 0.2}),
    "template": ({}, {"template": (5, HOLE, 7, 7, HOLE, HOLE, 9)}),
}


def request(kind: str, seed: int, tokens: int) -> tuple[list[int], SamplingParams]:
    sampling, diffusion = KINDS[kind]
    extras = {f"diffusion_{name}": value for name, value in ({"remasking": "low_confidence"} | diffusion).items()}
    params = SamplingParams(
        **({"temperature": 0.0} | sampling),
        seed=seed,
        max_tokens=len(diffusion.get("template", range(tokens))),
        ignore_eos=True,
        detokenize=False,
        extra_args=extras,
    )
    return random_prompt(3 + seed % 7, f"row blocks {seed}"), params


def cut(patch: pytest.MonkeyPatch, checkpoint: str, place: str, rows: int) -> None:
    """So many rows at a time in one place, or in all of them."""
    if place in ("logits", "everywhere"):
        patch.setattr(model_runner(engine(checkpoint)), "rows_at_once", rows)
    if place in ("choice", "everywhere"):
        patch.setattr(CHOICE, "_SCRATCH_BYTES", 4 * VOCABULARY * (rows + 1))
    if place in ("filter", "everywhere"):
        patch.setattr(FILTER, "_SCRATCH_BYTES", FILTER._BYTES_PER_COLUMN * VOCABULARY * rows)


def decode(checkpoint: str, requests: list[tuple[list[int], SamplingParams]]) -> list[tuple[list[int], int]]:
    outputs, _ = drive(engine(checkpoint), requests)
    return [(list(output.outputs[0].token_ids), num_forwards(output)) for output in outputs]


def check(checkpoint: str, kinds: list[str], tokens: int, cuts: list[tuple[str, int]]) -> None:
    requests = [request(kind, seed, tokens) for seed, kind in enumerate(kinds)]
    whole = decode(checkpoint, requests)
    for place, rows in cuts:
        with pytest.MonkeyPatch.context() as patch:
            cut(patch, checkpoint, place, rows)
            for kind, got, want in zip(kinds, decode(checkpoint, requests), whole, strict=True):
                assert got == want, (kind, place, rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_one_that_asks_beside_some_that_do_not(checkpoint: str, kind: str):
    kinds = ["greedy", "greedy", kind, "greedy"]
    check(checkpoint, kinds, 7, [(place, rows) for place in ("logits", "choice", "filter") for rows in (1, 3)])
    check(checkpoint, [kind], 5, [("everywhere", 2)])


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@settings(deadline=None, max_examples=8, derandomize=True, database=None)
@given(kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=7), tokens=st.integers(1, 9))
def test_any_mixture(checkpoint: str, rows: int, kinds: list[str], tokens: int):
    check(checkpoint, kinds, tokens, [("everywhere", rows)])
