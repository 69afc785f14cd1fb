"""Sampling: seeds, noise that depends on nothing but the request, and the distribution of what is drawn."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare
from support.cases import POLICIES, PolicyCase, difference, expected, random_prompt
from support.checkpoints import MASK, VOCABULARY, folder, reference
from support.engines import drive, engine, new_engine
from vllm import SamplingParams

FAMILIES = ("llada", "dream")


def sampled(**settings):
    """A case for both families."""
    return [
        PolicyCase(family, **({"max_tokens": 16, "prompt": 7, "temperature": 0.8} | settings)) for family in FAMILIES
    ]


# Decoded by the reference with the numbers that the engine draws.
CASES = [
    case
    for settings in (
        *({"policy": policy} for policy in POLICIES),
        {"policy": "maskgit_plus", "min_p": 0.3},
        {"policy": "entropy", "min_p": 0.1, "top_p": 0.8},
        {"policy": "topk_margin", "min_p": 0.25, "top_k": 9},
        {"policy": "low_confidence", "block": 5, "steps": 9, "temperature": 1.5, "seed": -3},
        {"policy": "low_confidence", "canvas": 6, "prompt": 1, "seed": 0},
        {"policy": "low_confidence", "cfg": 1.0, "temperature": 0.3},
        {"policy": "random", "block": 8, "steps": 16},
        {"policy": "random", "temperature": 0.2, "seed": 2**40 + 5},
        {"policy": "origin", "block": 8, "steps": 6},
        {"policy": "origin", "temperature": 1.3, "top_p": 0.9},
        {"policy": "maskgit_plus", "block": 6, "steps": 10, "top_k": 5},
        {"policy": "maskgit_plus", "alg_temp": 0.5},
        {"policy": "maskgit_plus", "alg_temp": 0.2, "temperature": 0.0},
        {"policy": "topk_margin", "top_p": 0.6, "top_k": 8},
        {"policy": "topk_margin", "alg_temp": 0.1, "steps": 5, "canvas": 10, "max_tokens": 19},
        {"policy": "entropy", "top_p": 0.95, "prompt": 40},
        # Dream's own setting: most rows keep one token, and so have the same confidence
        *({"policy": p, "temperature": 0.2, "top_p": 0.95} for p in ("maskgit_plus", "topk_margin", "entropy")),
        {"policy": "entropy", "alg_temp": 0.4, "temperature": 0.0, "block": 8},
        {"policy": "entropy", "alg_temp": 2.0, "block": 7, "steps": 8, "top_k": 20, "seed": 99},
    )
    for case in sampled(**settings)
] + [
    PolicyCase(checkpoint, policy, 16, prompt=6, temperature=1.0, block=8, eos=True)
    for checkpoint in ("llada-loud", "dream-loud")
    for policy in ("low_confidence", "random", "entropy", "origin")
] + [
    PolicyCase(checkpoint, "low_confidence", 16, prompt=9, temperature=0.7, suppression=suppression)
    for checkpoint in ("llada-loud", "dream-loud")
    for suppression in ("logits", "confidence")
] + [
    PolicyCase(checkpoint, policy, 16, prompt=9, temperature=0.7, suppression="logits", **filters)
    for checkpoint, policy in (("llada-loud", "maskgit_plus"), ("dream-loud", "entropy"), ("dream-loud", "topk_margin"))
    for filters in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.6})
] + [
    PolicyCase("llada-padded", policy, 16, prompt=9, temperature=0.7, **filters)
    for policy, filters in (("low_confidence", {}), ("entropy", {"top_p": 0.8}), ("maskgit_plus", {"top_k": 5}))
] + [  # the mask is often what a filter keeps
    PolicyCase("dream-loud", policy, 16, prompt=9, temperature=0.7, top_k=top_k)
    for policy in ("maskgit_plus", "topk_margin", "entropy", "origin")
    for top_k in (1, 2)
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_equals_the_reference_with_the_same_noise(case):
    outputs, _ = drive(engine(case.checkpoint), [case.request])
    assert not difference(case, outputs[0])


@pytest.mark.parametrize("checkpoint", sorted({case.checkpoint for case in CASES}))
def test_same_tokens_in_a_batch(checkpoint):
    """All of them together, then in the other order, joining one by one."""
    cases = [case for case in CASES if case.checkpoint == checkpoint][:16]
    together, running = drive(engine(checkpoint), [case.request for case in cases])
    assert max(running) >= len(cases) - 1
    cases.reverse()
    staggered, _ = drive(engine(checkpoint), [case.request for case in cases], range(0, 2 * len(cases), 2))
    wrong = [difference(case, output) for case, output in zip(cases, staggered, strict=True)]
    wrong += [difference(case, output) for case, output in zip(reversed(cases), together, strict=True)]
    assert not any(wrong), "\n".join(wrong)


@pytest.mark.parametrize("policy", ["maskgit_plus", "topk_margin", "entropy"])
def test_equal_confidences_go_by_position(policy):
    """One token kept a row makes every probability 1 and every entropy 0: the order is from left to right."""
    case = PolicyCase("dream", policy, 16, prompt=7, temperature=0.2, top_k=1)
    trace = expected(case).trace
    assert [position for commit in trace for position in commit.positions] == list(range(16))
    (output,), _ = drive(engine("dream"), [case.request])
    assert not difference(case, output)
    # what a step unmasks is final at once
    final = Counter(len(commit.positions) for commit in trace)
    histogram = output.outputs[0].spec_decode_metrics.histogram
    assert {n: steps for n, steps in enumerate(histogram) if steps} == dict(final)


def test_greedy_has_no_filters():
    """vLLM resets top_p, top_k and min_p at temperature 0, where Dream's decoder would still let them change confidences."""
    case = PolicyCase("dream", "maskgit_plus", 16, prompt=7)
    prompt, plain = case.request
    filters = SamplingParams(
        temperature=0.0,
        top_p=0.7,
        top_k=4,
        min_p=0.3,
        max_tokens=16,
        ignore_eos=True,
        detokenize=False,
        extra_args=plain.extra_args,
    )
    assert not difference(case, drive(engine("dream"), [(prompt, filters)])[0][0])


@pytest.mark.parametrize("policy", ["low_confidence", "random", "entropy"])
def test_a_filter_that_takes_nothing_out_changes_nothing(policy):
    """Whatever it is divided by on the way."""
    case = PolicyCase("llada", policy, 24, prompt=9, block=8, temperature=0.2, seed=4)
    prompt, plain = case.request
    filtered = SamplingParams(
        temperature=0.2, top_k=VOCABULARY, seed=4, max_tokens=24, ignore_eos=True, detokenize=False,
        extra_args=plain.extra_args,
    )  # fmt: skip
    assert not difference(case, drive(engine("llada"), [(prompt, filtered)])[0][0])


# ---- seeds

PROMPT = random_prompt(5, "seeds")


def tokens(llm, *params, prompt=PROMPT):
    outputs, _ = drive(llm, [(prompt, p) for p in params])
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def params(seed=None, **settings):
    extras = settings.pop("extra_args", {})
    defaults = {
        "temperature": 1.0,
        "max_tokens": 12,
        "ignore_eos": True,
        "detokenize": False,
        "seed": seed,
        "extra_args": extras,
    }
    return SamplingParams(**defaults | settings)


@pytest.mark.parametrize("policy", ["low_confidence", "entropy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_seeds(family, policy):
    extras = {"diffusion_remasking": policy}
    results = tokens(engine(family), *(params(seed, extra_args=extras) for seed in (1, 2, 1, 2**62, 1, -2)))
    assert results[0] == results[2] == results[4]
    assert len(set(results)) == 4


def test_n_completions():
    """The completions of one request differ, and each is that of a request of its own with the seed vLLM gives it."""
    llm = engine("dream")
    output = llm.generate([{"prompt_token_ids": PROMPT}], params(5, n=3), use_tqdm=False)[0]
    completions = [tuple(completion.token_ids) for completion in output.outputs]
    assert len(set(completions)) == 3
    again = llm.generate([{"prompt_token_ids": PROMPT}], params(5, n=3), use_tqdm=False)[0]
    assert [tuple(completion.token_ids) for completion in again.outputs] == completions
    # vLLM seeds completion i with seed + i
    assert completions == tokens(llm, *(params(5 + i) for i in range(3)))


@pytest.mark.parametrize("policy", ["random", "origin"])
def test_n_greedy_completions_of_a_random_order(policy):
    """At temperature 0 only the order is random; n > 1 still asks for a seed each."""
    extras = {"diffusion_remasking": policy, "diffusion_steps": 6}
    results = tokens(engine("llada"), *(params(seed, temperature=0.0, extra_args=extras) for seed in (1, 1, 2, 3)))
    assert results[0] == results[1]
    assert len(set(results)) > 1


def test_requests_without_a_seed():
    """They differ from each other, and an engine with the same seed gives the same ones again."""
    first, second, third = (new_engine(folder("llada"), seed=seed) for seed in (11, 11, 12))
    results = tokens(first, *(params() for _ in range(4)))
    assert len(set(results)) == 4
    assert tokens(second, *(params() for _ in range(4))) == results
    assert not set(tokens(third, *(params() for _ in range(4)))) & set(results)
    KEPT.extend((first, second, third))


KEPT: list = []  # closing an engine takes vLLM's process groups from the others


# ---- distributions

NUM_DRAWS = 4000
MIN_EXPECTED = 8  # ids that are expected less often are counted together


def filtered(logits, temperature, top_p=1.0, top_k=0, min_p=0.0):
    """Probabilities of softmax(logits / temperature) after min-p, top-p, then top-k; the mask is not chosen. float64."""
    probability = np.exp(logits / temperature - (logits / temperature).max())
    probability /= probability.sum()
    probability = np.where(probability < min_p * probability.max(), 0, probability)
    probability /= probability.sum()
    order = np.argsort(-probability, kind="stable")
    kept = np.ones(len(order), dtype=bool)
    if top_p < 1:
        before = np.concatenate(([0.0], np.cumsum(probability[order])[:-1]))
        kept[order[before > top_p]] = False
    if top_k:
        kept[order[top_k:]] = False
    kept[MASK] = False
    return np.where(kept, probability, 0) / probability[kept].sum()


def p_value(drawn, probability):
    """Chi-square test of counts [vocabulary] against probabilities, rare ids together."""
    if drawn[probability == 0].any():
        return 0.0
    expected = probability * drawn.sum()
    common = expected >= MIN_EXPECTED
    counts, means = drawn[common], expected[common]
    rest = expected[~common].sum()
    if rest > 0.5:
        counts, means = np.append(counts, drawn[~common].sum()), np.append(means, rest)
    else:
        means = means * counts.sum() / means.sum()
    assert len(counts) >= 4, "the distribution is too narrow to be tested"
    return chisquare(counts, means).pvalue


DISTRIBUTIONS = {
    "llada": {"policy": "low_confidence", "temperature": 1.0},
    "llada-cool": {"policy": "low_confidence", "temperature": 0.7},
    "llada-top-p": {"policy": "low_confidence", "temperature": 1.0, "top_p": 0.8},
    "llada-min-p": {"policy": "low_confidence", "temperature": 1.0, "min_p": 0.04},
    "dream": {"policy": "entropy", "temperature": 1.0},
    "dream-min-p-top-p": {"policy": "entropy", "temperature": 1.0, "min_p": 0.1, "top_p": 0.7},
    "dream-hot-top-p": {"policy": "maskgit_plus", "temperature": 1.3, "top_p": 0.7},
    "dream-top-k": {"policy": "topk_margin", "temperature": 0.9, "top_k": 12},
    "dream-top-p-top-k": {"policy": "origin", "temperature": 1.2, "top_p": 0.9, "top_k": 20},
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distribution_of_a_token(name):
    """One masked position after a prompt, drawn again and again with other seeds."""
    settings = dict(DISTRIBUTIONS[name])
    family, policy = name.partition("-")[0], settings.pop("policy")
    prompt = random_prompt(6, "distribution")
    model = reference(family)
    logits = model.logits_for_positions(torch.tensor([*prompt, MASK]))[-1].double().numpy()
    probability = filtered(logits, **settings)

    requests = [
        (prompt, params(seed, max_tokens=1, extra_args={"diffusion_remasking": policy}, **settings))
        for seed in range(NUM_DRAWS)
    ]
    drawn = np.zeros(len(probability), dtype=int)
    for output in drive(engine(family, max_num_seqs=512), requests)[0]:
        drawn[output.outputs[0].token_ids[0]] += 1

    assert p_value(drawn, probability) > 1e-4
    # the test would notice a temperature that is a fifth off, and a filter left out
    assert p_value(drawn, filtered(logits, **settings | {"temperature": settings["temperature"] * 1.2})) < 1e-4
    if set(settings) & {"top_p", "top_k", "min_p"}:
        assert p_value(drawn, filtered(logits, settings["temperature"])) < 1e-4


def test_distribution_of_an_order():
    """alg_temp draws the first position from softmax(confidence / alg_temp): is it the first one of the response?"""
    length, num_requests, prompt = 6, 512, random_prompt(6, "order")
    model, llm = reference("dream"), engine("dream", max_num_seqs=512, max_num_batched_tokens=8192)
    logits = model.logits_for_positions(torch.tensor(prompt + [MASK] * length))[len(prompt) :].double()
    chosen = logits.clone().index_fill_(1, torch.tensor([MASK]), -torch.inf).argmax(1)
    confidence = logits.softmax(-1).gather(1, chosen[:, None])[:, 0]

    def p_value_of(count, alg_temp):
        return binomtest(count, num_requests, (confidence / alg_temp).softmax(0)[0].item()).pvalue

    for alg_temp in (0.1, 0.2):
        extras = {"diffusion_remasking": "maskgit_plus", "diffusion_alg_temp": alg_temp, "diffusion_eps": 0.0}
        for seed in range(num_requests):
            one_by_one = params(seed, temperature=0.0, max_tokens=length, extra_args=extras)
            llm.llm_engine.add_request(f"order-{alg_temp}-{seed}", {"prompt_token_ids": prompt}, one_by_one)
        begun = [output for output in llm.llm_engine.step() if output.outputs[0].token_ids]
        llm.llm_engine.abort_request([f"order-{alg_temp}-{seed}" for seed in range(num_requests)])
        assert all(tuple(output.outputs[0].token_ids) == (chosen[0],) for output in begun)
        assert p_value_of(len(begun), alg_temp) > 1e-4
        assert p_value_of(len(begun), alg_temp * 3) < 1e-4
        assert p_value_of(len(begun), alg_temp / 3) < 1e-4
