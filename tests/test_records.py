"""Every record of policies, rankings and families is in the tests, and the engine is compared with its reference.

A new record fails here until it is, with what to add: docs/changing.md has the whole way.
"""

from dataclasses import replace

import pytest
import test_parity
import test_sampling
import test_strategies
import torch
from support.block_cases import BlockCase
from support.cases import LLADA_POLICIES, PolicyCase, difference, random_prompt
from support.cases import POLICIES as WITH_REFERENCE
from support.checkpoints import BLOCK_WEIGHTS, RANDOM_WEIGHTS, architecture, edit_config, write_checkpoint
from support.engines import drive, model_runner, new_engine
from vllm import SamplingParams

from dllm_plugin import policies
from dllm_plugin.families import ARCHITECTURES, FAMILIES
from dllm_plugin.kernels.confidence import STATISTICS, Confidence
from dllm_plugin.params import RULES, DiffusionParams
from dllm_plugin.policies import POLICIES, RANKINGS
from dllm_plugin.scheduler.strategies import make_plan
from dllm_plugin.worker.ranking import RANKED_BY, RankedRows

# ---- policies


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_has_a_reference(policy):
    even = POLICIES[policy].schedule == "even"
    file, rule, names = ("llada", "rank", "REMASKING") if even else ("dream", "sample_tokens", "ALGORITHMS")
    assert policy in WITH_REFERENCE, (
        f"no reference decodes {policy!r}: write its rule in {rule} of tests/reference/{file}.py, its name in {names} there"
    )
    assert (policy in LLADA_POLICIES) == even, f"another reference decoder has the schedule of {policy!r}"


def test_no_reference_is_of_a_policy_that_is_gone():
    assert set(WITH_REFERENCE) <= set(POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_is_compared_with_its_reference(policy):
    greedy = {case.policy for case in test_parity.CASES}
    sampled = {case.policy for case in test_sampling.CASES if case.temperature > 0}
    cached = {case.extras["remasking"] for case in test_strategies.ALL if "cache" in case.extras}
    for file, decoded in (("test_parity", greedy), ("test_sampling", sampled), ("test_strategies", cached)):
        assert policy in decoded, (
            f"tests/{file}.py does not decode {policy!r}: let its cases be of all POLICIES of tests/support/cases.py"
        )


def test_a_policy_compares_the_probabilities_of_one_that_has_them():
    """It is what a threshold over a default of this policy turns it into."""
    low_confidence, random = POLICIES["low_confidence"], POLICIES["random"]
    for name in ("low_confidance", "random"):
        with pytest.raises(ValueError, match=f"'random' has by_probability '{name}', .* take one of .'low_confidence'"):
            policies.by_name(low_confidence, replace(random, by_probability=name))
    assert policies.by_name(low_confidence, random) == {"low_confidence": low_confidence, "random": random}


@pytest.mark.parametrize("field", ["schedule", "ranking"])
def test_a_policy_of_what_nobody_implements_is_refused(field):
    with pytest.raises(ValueError, match=f"policy 'random' has {field} 'other', which nobody implements"):
        replace(POLICIES["random"], **{field: "other"})


def test_a_schedule_that_no_plan_knows_is_none_of_dreams(monkeypatch):
    monkeypatch.setattr(policies, "SCHEDULES", (*policies.SCHEDULES, "cosine"))
    monkeypatch.setitem(POLICIES, "entropy", replace(POLICIES["entropy"], schedule="cosine"))
    plan = make_plan(DiffusionParams(remasking="entropy"), 5, 13)
    with pytest.raises(ValueError, match="nothing says when schedule 'cosine' unmasks"):
        plan.start_canvas()


def test_every_ranking_is_implemented():
    assert list(RANKED_BY) == list(RANKINGS), (
        "RANKED_BY of dllm_plugin/worker/ranking.py lacks a ranking of policies.py"
    )
    assert set(RANKINGS) == {policy.ranking for policy in POLICIES.values()}


@pytest.mark.parametrize("name", RANKINGS)
def test_a_ranking_says_what_it_needs(name):
    """Given that alone, it ranks; and not without."""
    ranking, rows, position = RANKED_BY[name], torch.full((3,), 0.25), torch.arange(3)
    assert ranking.statistic in (None, *STATISTICS)

    def ranked(statistic, seed):
        given = {statistic: rows} if statistic else {}
        return ranking.value(RankedRows(Confidence(position, rows, **given), position, seed, seed))

    value = ranked(ranking.statistic, position if ranking.draws else None)
    assert value.shape == (3,) and value.dtype == torch.float32
    if ranking.statistic or ranking.draws:
        with pytest.raises(AssertionError):
            ranked(None, None)


# ---- families

KEPT: list = []  # closing an engine takes vLLM's process groups from the others


def checkpoint_of(family):
    """The name of a random-weight checkpoint of the family, which is that of its writer."""
    written = [name for name, (writer, _) in (RANDOM_WEIGHTS | BLOCK_WEIGHTS).items() if name == writer]
    named = [name for name in written if ARCHITECTURES.get(architecture(name)) is family]
    assert named, (
        f"the tests have no checkpoint of {family.name}: add a writer of random weights to WRITERS of "
        "tests/reference/block_checkpoints.py, and the model in plain torch to FAMILIES of tests/reference/block_models.py"
    )
    return named[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_engine_answers_as_the_reference(name):
    """Every family under each of its names, to requests that give no parameter and one: the defaults are the family's."""
    family = ARCHITECTURES[name]
    checkpoint = checkpoint_of(family)
    writer, options = (RANDOM_WEIGHTS | BLOCK_WEIGHTS)[checkpoint]
    path = write_checkpoint(writer, f"named-{name}", **options)
    edit_config(path, architectures=[name])
    llm = new_engine(path)
    KEPT.append(llm)
    assert llm.model_config.architecture == name
    assert type(model_runner(llm).model).__name__ == family.adapter.rpartition(":")[2]

    prompt = tuple(random_prompt(9, checkpoint))
    if family.attention == "full":
        cases = [PolicyCase(checkpoint, family.defaults.remasking, 13, prompt=prompt)]
        cases.append(PolicyCase(checkpoint, "low_confidence", 13, 5, prompt=prompt))
    else:
        neutral = DiffusionParams()
        values = {each: getattr(family.defaults, each) for each in RULES}
        defaults = {each: value for each, value in values.items() if value != getattr(neutral, each)}
        cases = [BlockCase(checkpoint, 13, prompt, defaults | more) for more in ({}, {"threshold": 0.2})]
    bare = SamplingParams(temperature=0, max_tokens=13, ignore_eos=True, seed=cases[0].seed, detokenize=False)
    outputs, _ = drive(llm, [(list(prompt), bare), cases[1].request])
    assert [difference(case, output) for case, output in zip(cases, outputs, strict=True)] == ["", ""]


def test_no_two_families_have_an_architecture():
    assert sum(len(family.architectures) for family in FAMILIES) == len(ARCHITECTURES)
