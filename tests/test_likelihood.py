"""Log-probabilities of given text, against `reference/likelihood.py`."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from reference import likelihood
from support.cases import random_prompt
from support.checkpoints import block_reference, reference
from support.engines import core, drive, engine, num_forwards, scheduler
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

from dllm_plugin.params import DiffusionParams
from dllm_plugin.scheduler.likelihood import GivenText, Likelihood, MonteCarlo, make_likelihood

LONGEST = 128  # max_model_len of the checkpoints of random weights
FULL = ("llada", "dream")
NUM_LOGPROBS = 3
SEED = 11


def llm_of(checkpoint: str) -> LLM:
    """An engine whose steps hold few copies of a text, so that there are several steps."""
    budget = LONGEST if checkpoint in FULL else 24
    return engine(checkpoint, max_num_batched_tokens=budget, max_model_len=LONGEST, max_logprobs=-1)


def sampling(prompt_logprobs: int = NUM_LOGPROBS, tokens: int = 1, **extras: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=tokens,
        seed=SEED,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=prompt_logprobs,
        extra_args={f"diffusion_{name}": value for name, value in extras.items()},
    )


@dataclass(frozen=True)
class Text:
    """A text of a checkpoint, of which the first ``start`` tokens are context; below 0: all but the last so many."""

    checkpoint: str
    length: int
    start: int = 0
    block_length: int | None = None

    def __str__(self) -> str:
        block = f"-block{self.block_length}" if self.block_length else ""
        return f"{self.checkpoint}-{self.length}tokens-from{self.start}{block}"

    @property
    def ids(self) -> list[int]:
        return random_prompt(self.length, str(self))

    @property
    def first_scored(self) -> int:
        return max(1, self.start if self.start >= 0 else self.length + self.start)

    @property
    def request(self) -> tuple[list[int], SamplingParams]:
        extras = {"likelihood_start": self.start} | ({"block_length": self.block_length} if self.block_length else {})
        return self.ids, sampling(**extras)

    def chain(self) -> torch.Tensor:
        if self.checkpoint in FULL:
            return likelihood.full_chain(reference(self.checkpoint), self.ids, self.first_scored)
        model = block_reference(self.checkpoint)
        block_length = self.block_length or model.block_length
        return likelihood.block_chain(model, self.ids, self.first_scored, block_length, LONGEST)


TEXTS = (
    Text("llada", 13),
    Text("llada", 9, start=4),
    Text("dream", 11),
    Text("dream", 7, start=-2),
    Text("sdar", 1 + 3 * 4),
    Text("sdar", 16),
    Text("sdar", 2),
    Text("sdar", 37, start=18),
    Text("sdar", 23, block_length=7),
    Text("sdar", 127, start=-8, block_length=7),  # its last block ends with the model's length
    Text("llada2", 45),
    Text("fast-dllm-v2", 19),
    Text("fast-dllm-v2", 40, start=8),
)


def check(output: RequestOutput, text: Text, expected: torch.Tensor) -> None:
    told = output.prompt_logprobs
    assert len(told) == text.length
    assert told[0] is None
    for token, entry in zip(text.ids[1 : text.first_scored], told[1 : text.first_scored], strict=True):
        assert entry.keys() == {token}
        assert entry[token].logprob == 0.0
    for token, entry, said in zip(text.ids[text.first_scored :], told[text.first_scored :], expected, strict=True):
        best = said.sort(descending=True, stable=True).indices[:NUM_LOGPROBS].tolist()
        assert list(entry) == list(dict.fromkeys([token, *best]))
        assert entry[token].rank == int((said >= said[token]).sum())
        for other, one in entry.items():
            assert one.logprob == pytest.approx(float(said[other]), abs=1e-4)


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_the_chain_is_the_references(text):
    (output,), _ = drive(llm_of(text.checkpoint), [text.request])
    check(output, text, text.chain())


@pytest.mark.parametrize("checkpoint", ["llada", "sdar", "fast-dllm-v2"])
def test_beside_others(checkpoint):
    """Neither is changed: what is told of texts is alike, and so are the tokens of answers."""
    texts = [text for text in TEXTS if text.checkpoint == checkpoint][:3]
    answers = [
        (
            random_prompt(length, "beside"),
            SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, detokenize=False),
        )
        for length in (5, 21)
    ]
    llm = llm_of(checkpoint)
    alone = [drive(llm, [one])[0][0].outputs[0].token_ids for one in answers]
    requests = [*[text.request for text in texts], *answers]
    outputs, _ = drive(llm, requests, arrivals=[0, 2, 1, 0, 1][: len(requests)])
    for text, output in zip(texts, outputs, strict=False):
        check(output, text, text.chain())
    assert [output.outputs[0].token_ids for output in outputs[len(texts) :]] == alone
    assert len(scheduler(llm).denoising) == 0


@pytest.mark.parametrize("checkpoint", ["llada", "dream", "sdar", "fast-dllm-v2"])
def test_the_answer_is_the_same_as_without(checkpoint):
    llm, prompt = llm_of(checkpoint), random_prompt(10, checkpoint)
    asked = sampling(tokens=9)
    plain = sampling(tokens=9)
    plain.prompt_logprobs = None
    (scored,), _ = drive(llm, [(prompt, asked)])
    (unscored,), _ = drive(llm, [(prompt, plain)])
    assert scored.outputs[0].token_ids == unscored.outputs[0].token_ids
    assert unscored.prompt_logprobs is None
    # none of the scoring passes counts, but the prompt in a window of its own, as any chunk of one
    assert num_forwards(scored) == num_forwards(unscored) + (checkpoint == "sdar")


@pytest.mark.parametrize("checkpoint", ["llada", "sdar", "fast-dllm-v2"])
def test_after_a_preemption(checkpoint):
    text = next(text for text in TEXTS if text.checkpoint == checkpoint)
    llm = llm_of(checkpoint)
    llm.llm_engine.add_request("preempted", {"prompt_token_ids": text.ids}, text.request[1])
    outputs = []
    for number in itertools.count():
        outputs += llm.llm_engine.step()
        if not llm.llm_engine.has_unfinished_requests():
            break
        if number in (0, 2):
            core(llm).scheduler.reset_prefix_cache(reset_running_requests=True)
    check(outputs[-1], text, text.chain())


def test_a_text_of_one_token_and_none_that_is_asked_for():
    (output,), _ = drive(llm_of("sdar"), [([17], sampling())])
    assert output.prompt_logprobs == [None]
    (output,), _ = drive(llm_of("llada"), [([17, 18], sampling(prompt_logprobs=0))])
    assert [entry.keys() for entry in output.prompt_logprobs[1:]] == [{18}]


def test_all_of_the_vocabulary():
    text = Text("sdar", 6)
    llm = llm_of("sdar")
    asked = text.request[1]
    asked.prompt_logprobs = -1
    (output, beside), _ = drive(llm, [(text.ids, asked), text.request])
    check(beside, text, text.chain())
    for entry, said in zip(output.prompt_logprobs[1:], text.chain(), strict=True):
        assert [entry[token].logprob for token in range(len(said))] == pytest.approx(said.tolist(), abs=1e-4)


# ---- Monte Carlo


def drawn_masks(ids: list[int], start: int, samples: int) -> list[list[int]]:
    plan = MonteCarlo(GivenText(ids, start, 0), 1 << 30, SEED, samples)
    return [list(window.masked) for window in plan.windows]


@pytest.mark.parametrize(("checkpoint", "length", "start", "samples"), [("llada", 12, 5, 7), ("dream", 9, 0, 3)])
def test_monte_carlo_is_the_references_over_the_same_masks(checkpoint, length, start, samples):
    ids = random_prompt(length, checkpoint)
    request = ids, sampling(0, likelihood_start=start, likelihood_samples=samples)
    first = max(1, start)
    masks = drawn_masks(ids, first, samples)
    expected = likelihood.monte_carlo(reference(checkpoint), ids, first, masks)
    (output, beside), _ = drive(llm_of(checkpoint), [request, Text(checkpoint, 8).request])
    told = [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
    assert told == pytest.approx(expected[1:].tolist(), abs=1e-4)
    check(beside, Text(checkpoint, 8), Text(checkpoint, 8).chain())


@pytest.mark.parametrize("num_scored", [1, 2, 5, 8])
@pytest.mark.parametrize("samples", [1, 3, 8, 20])
def test_samples_mask_every_number_alike_often(num_scored, samples):
    """Over all first numbers, which are drawn uniformly, each sample has each number of masks once."""
    seen = np.zeros((samples, num_scored + 1), int)
    plan = MonteCarlo(GivenText(range(num_scored + 3), 3, 0), 1, SEED, samples)
    for first in range(num_scored):
        plan._first = first
        for sample in range(samples):
            masked = plan._window(sample).masked
            assert len({*masked}) == len(masked)
            assert {*masked} <= {*range(3, num_scored + 3)}
            seen[sample, len(masked)] += 1
    assert (seen[:, 1:] == 1).all()
    if samples == num_scored:  # in one request, too
        assert sorted(len(plan._window(sample).masked) for sample in range(samples)) == [*range(1, num_scored + 1)]


def test_monte_carlo_is_unbiased():
    """The mean over all masks is what many samples come to; drawn by the engine's own numbers, priced by the reference."""
    ids, start, samples = random_prompt(6, "unbiased"), 2, 1500
    model, num_scored = reference("llada"), 4
    price = {}
    for masked in itertools.chain.from_iterable(
        itertools.combinations(range(start, 6), k) for k in range(1, num_scored + 1)
    ):
        price[masked] = float(likelihood.monte_carlo(model, ids, start, [masked]).sum())
    # over every number k, and for each over every choice of k
    exact = np.mean(
        [np.mean([price[m] for m in itertools.combinations(range(start, 6), k)]) for k in range(1, num_scored + 1)]
    )
    masks = [tuple(masked) for masked in drawn_masks(ids, start, samples)]
    drawn = [price[masked] for masked in masks]
    assert abs(np.mean(drawn) - exact) < 4 * np.std(list(price.values())) / math.sqrt(samples)
    assert {*masks} == {*price}


# ---- what is forwarded


def forwarded(plan: Likelihood) -> list[tuple[int, int]]:
    """Copies and tokens of each step."""
    steps = []
    while not plan.is_done:
        windows = plan.windows
        steps.append((len(windows), sum(window.end - window.start for window in windows)))
        num_rows = sum(len(window.scored) for window in windows)
        plan.record(np.zeros((num_rows, 2), np.float32))
    return steps


@pytest.mark.parametrize(
    ("strategy", "shift", "length", "budget", "steps"),
    [
        pytest.param("block", 0, 12, 1000, [(11, 44)], id="all-blocks-and-passes-in-one-step"),
        pytest.param("block", 0, 12, 12, [(3, 12)] * 3 + [(2, 8)], id="a-pass-of-all-blocks-a-step"),
        pytest.param("block", 0, 12, 1, [(1, 4)] * 11, id="a-block-larger-than-the-budget"),
        pytest.param("block", 1, 9, 1000, [(8, 2 + 6 * 4)], id="shifted-first-tokens-forward-one-row"),
        pytest.param("full", 0, 5, 11, [(2, 10)] * 2, id="full-copies-of-the-text"),
        pytest.param("full", 0, 1, 11, [], id="nothing-to-score"),
    ],
)  # fmt: skip
def test_a_step_forwards_what_the_budget_holds(strategy, shift, length, budget, steps):
    params = DiffusionParams(strategy=strategy, block_length=4)
    plan = make_likelihood(params, range(length), 0, budget, shift=shift, longest=LONGEST, seed=0)
    assert forwarded(plan) == steps
