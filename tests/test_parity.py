"""Token for token equality with the reference decoders, in float32 at temperature 0, through the whole engine.

Every case is decoded among all the cases of its checkpoint, sixteen at a time through `LLM.generate`; some are again
alone, and in small or shifting company, through the engine's own step(). Whatever the company, the tokens and the
number of forward passes are the reference's.
"""

import functools
from collections import Counter

import pytest
import torch
from reference import checkpoints
from support.cases import DREAM_POLICIES, LLADA_POLICIES, POLICIES, PolicyCase, difference, expected, random_prompt
from support.checkpoints import EOS, MASK, RANDOM_WEIGHTS, VOCABULARY, folder, reference
from support.engines import drive, engine, model_runner, num_forwards, scheduler
from vllm.outputs import RequestOutput

from dllm_plugin.checkpoints import tasks

FAMILIES = tuple(checkpoints.WRITERS)

# tokens, block length, steps, prompt length
SHAPES = (
    (16, None, None, 1),  # one block; one step a position
    (16, 8, 16, 9),  # everything divides
    (24, 8, 9, 20),  # steps do not divide over the blocks
    (13, 5, 7, 3),  # nor do the positions: the last block is shorter
    (7, None, 12, 33),  # more steps than positions
    (32, 32, 5, 9),  # several positions a step
    (6, 1, 6, 5),  # blocks of one position
    (20, 6, 4, 150),  # one step a block, long prompt
    (9, 40, 1, 2),  # block longer than the canvas, one step
)
SHAPE_CASES = [
    PolicyCase(family, policy, tokens, block, steps, prompt)
    for family in FAMILIES
    for policy in POLICIES
    for tokens, block, steps, prompt in SHAPES
]

CANVAS_CASES = [
    PolicyCase(family, policy, tokens, block, steps, prompt, canvas)
    for family in FAMILIES
    for policy, (tokens, block, steps, prompt, canvas) in (
        ("low_confidence", (24, None, 8, 5, 8)),  # three canvases
        ("low_confidence", (19, 4, 5, 11, 8)),  # the last one shorter
        ("random", (19, 4, 5, 11, 8)),
        ("random", (10, None, None, 7, 9)),  # the last one is a single position
        ("origin", (21, 5, 9, 11, 10)),
        ("maskgit_plus", (24, None, 8, 5, 8)),
        ("topk_margin", (19, 4, 5, 11, 8)),
        ("entropy", (19, 4, 5, 11, 8)),
        ("entropy", (6, None, None, 4, 1)),  # a canvas of one position: left to right
    )
]

EPS_CASES = [
    PolicyCase(family, policy, 24, None, 7, 6, eps=eps)
    for family in FAMILIES
    for policy in DREAM_POLICIES
    for eps in (0.0, 0.3)
]

GUIDED_CASES = [
    PolicyCase(family, policy, tokens, block, steps, prompt, canvas, cfg=cfg)
    for family in FAMILIES
    for policy, (tokens, block, steps, prompt, canvas), cfg in (
        ("low_confidence", (16, 8, 8, 9, None), 0.5),
        ("low_confidence", (13, None, None, 1, None), 2.0),
        ("low_confidence", (14, 4, 5, 6, 8), 1.0),  # what came before the canvas is hidden, not the prompt alone
        ("random", (12, 5, 6, 7, None), 1.5),
        ("maskgit_plus", (16, 8, 8, 9, None), 0.5),
        ("entropy", (14, 4, 5, 6, 8), 1.0),
        ("topk_margin", (12, 5, 6, 7, None), 1.5),
        ("origin", (12, 5, 6, 7, None), 1.5),
    )
]

# The mask, EOS and the end of turn are loud in these checkpoints.
LOUD = ("llada-loud", "dream-loud")
LOUD_CASES = [PolicyCase(checkpoint, policy, 16, 8, prompt=7) for checkpoint in LOUD for policy in POLICIES]
MASK_PROMPT = (MASK, 17, MASK, MASK, 201, 44, MASK)
MASK_PROMPT_CASES = [
    PolicyCase(checkpoint, policy, 12, block, prompt=MASK_PROMPT, cfg=cfg)
    for checkpoint in (*FAMILIES, *LOUD)
    for policy, block, cfg in (
        ("low_confidence", 4, 0),
        ("entropy", None, 0),
        ("random", 5, 0),
        ("maskgit_plus", 4, 1.0),
    )
]
SUPPRESSION_CASES = [
    PolicyCase(checkpoint, policy, 16, block, steps, prompt, suppression=suppression)
    for checkpoint in LOUD
    for policy, suppression in (
        *((policy, "logits") for policy in POLICIES),
        *((policy, "confidence") for policy in LLADA_POLICIES),
    )
    for block, steps, prompt in ((None, 8, 9), (8, 16, 4), (None, 16, 30), (6, None, 14))
]
EOS_CASES = [
    PolicyCase(checkpoint, policy, tokens, block, None, prompt, canvas, eos=True, suppression=suppression)
    for checkpoint in LOUD
    for policy in POLICIES
    for tokens, block, prompt, canvas, suppression in (
        (16, None, 9, None, "none"),
        (24, 4, 1, None, "none"),
        (24, None, 9, 7, "none"),
        *([(24, 8, 5, None, "confidence")] if policy in LLADA_POLICIES else [(24, 8, 5, None, "logits")]),
    )
]

TIED = ("llada-tied", "dream-tied")
TIED_CASES = [
    PolicyCase(checkpoint, policy, 14, 6, 10, 8) for checkpoint in TIED for policy in POLICIES
]  # fmt: skip

PADDED_CASES = [
    PolicyCase("llada-padded", policy, tokens, block, prompt=9, cfg=cfg)
    for policy in POLICIES
    for tokens, block, cfg in ((16, 8, 0.0), (12, None, 1.0))
]

QUESTIONS = [question.text for question in tasks.questions("held_out", len(POLICIES), seed=5)]
TRAINED = ("tiny-llada", "tiny-dream")
TRAINED_CASES = [
    PolicyCase(checkpoint, policy, 24, block, steps, QUESTIONS[i], eos=eos)
    for checkpoint in TRAINED
    for i, policy in enumerate(POLICIES)
    for block, steps, eos in ((None, None, False), (8, 12, True))
]

CASES = [
    *SHAPE_CASES,
    *CANVAS_CASES,
    *EPS_CASES,
    *GUIDED_CASES,
    *LOUD_CASES,
    *MASK_PROMPT_CASES,
    *SUPPRESSION_CASES,
    *EOS_CASES,
    *TIED_CASES,
    *PADDED_CASES,
    *TRAINED_CASES,
]
assert len({case.id for case in CASES}) == len(CASES)

# A mixture of everything, for the cases that are also decoded in other company.
SUBSET = CASES[::7]


def tables(cases: list[PolicyCase]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


@functools.cache
def among_all(checkpoint: str) -> dict[PolicyCase, RequestOutput]:
    """All cases of a checkpoint in one generate()."""
    cases = [case for case in CASES if case.checkpoint == checkpoint]
    prompts, params = zip(*(case.request for case in cases), strict=True)
    outputs = engine(checkpoint).generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], list(params), use_tqdm=False
    )
    return dict(zip(cases, outputs, strict=True))


@tables(CASES)
def test_among_all(case):
    output = among_all(case.checkpoint)[case]
    assert not difference(case, output)


@tables(SUBSET)
def test_alone(case):
    outputs, running = drive(engine(case.checkpoint), [case.request])
    assert max(running) <= 1
    assert not difference(case, outputs[0])


# number of requests, engine steps between two of them
COMPOSITIONS = {"two": (2, 0), "sixteen": (16, 0), "joining-every-third-step": (16, 3), "joining-every-step": (24, 1)}


@pytest.mark.parametrize("company", COMPOSITIONS)
@pytest.mark.parametrize("checkpoint", [*RANDOM_WEIGHTS, *TRAINED])
def test_in_company(checkpoint, company):
    """Requests that differ in everything join at different steps and leave when they are done."""
    size, pause = COMPOSITIONS[company]
    cases = [case for case in CASES if case.checkpoint == checkpoint]
    cases = cases[:: max(1, len(cases) // size)][:size]
    size = len(cases)
    outputs, running = drive(engine(checkpoint), [case.request for case in cases], [i * pause for i in range(size)])
    assert [d for case, output in zip(cases, outputs, strict=True) if (d := difference(case, output))] == []
    # the company was kept
    assert max(running) >= (min(size, 16) - 4 if pause == 0 else 2)
    assert len(set(running)) > (2 if size > 2 else 1)


@tables(PADDED_CASES)
def test_what_pads_the_vocabulary_is_chosen(case):
    """Otherwise the parity above would not tell its columns from none."""
    assert any(token >= VOCABULARY for token in expected(case).tokens)


def test_the_order_of_requests_does_not_matter():
    cases = [case for case in SHAPE_CASES if case.checkpoint == "dream"][::4]
    backwards, _ = drive(engine("dream"), [case.request for case in reversed(cases)])
    assert not any(difference(case, output) for case, output in zip(reversed(cases), backwards, strict=True))


def test_logits_in_chunks(monkeypatch):
    """Five rows at a time, guided ones among them."""
    cases = [case for case in (*SHAPE_CASES, *GUIDED_CASES) if case.checkpoint == "llada"][::5]
    runner = model_runner(engine("llada"))
    chunks, logits_of = [], runner.logits_of
    monkeypatch.setattr(runner, "rows_at_once", 5)
    monkeypatch.setattr(runner, "logits_of", lambda *args: chunks.append(logits_of(*args)) or chunks[-1])
    outputs, _ = drive(engine("llada"), [case.request for case in cases])
    assert not any(difference(*pair) for pair in zip(cases, outputs, strict=True))
    assert max(map(len, chunks)) == 5


# ---- the cases reach what they name


def test_there_are_enough_cases():
    assert len(CASES) >= 130


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_policies_differ(family, shape):
    """The policies of a shape are not one algorithm under several names: they unmask in another order."""
    tokens, block, steps, prompt = shape
    traces = set()
    for policy in POLICIES:
        case = PolicyCase(family, policy, tokens, block, steps, tuple(random_prompt(prompt, "policies")))
        traces.add(repr(expected(case).trace))
    blocks = -(-tokens // block) if block else 1
    assert len(traces) >= (len(POLICIES) - 2 if max(1, steps or tokens) > blocks and block != 1 else 1)


@tables([case for case in CANVAS_CASES if case.policy != "origin"])
def test_canvases_are_continued(case):
    """No pass decides positions of two canvases."""
    canvases = [{position // case.canvas for position in commit.positions} for commit in expected(case).trace]
    assert max(map(len, canvases)) == 1
    assert len(Counter(canvas for decided in canvases for canvas in decided)) == -(-case.max_tokens // case.canvas)


@tables(GUIDED_CASES)
def test_guidance_matters(case):
    plain = PolicyCase(
        case.checkpoint, case.policy, case.max_tokens, case.block, case.steps, tuple(case.prompt_ids), case.canvas
    )
    assert expected(plain).tokens != expected(case).tokens


@pytest.mark.parametrize("checkpoint", LOUD)
def test_the_mask_is_often_the_argmax(checkpoint):
    cases = [case for case in CASES if case.checkpoint == checkpoint]
    model = reference(checkpoint)
    argmax = Counter()
    for case in cases:
        canvas = torch.tensor(case.prompt_ids + [MASK] * case.max_tokens)
        argmax.update(model.logits_for_positions(canvas)[len(case.prompt_ids) :].argmax(-1).tolist())
    assert argmax[MASK] > 0.05 * argmax.total()
    assert not any(MASK in output.outputs[0].token_ids for output in among_all(checkpoint).values())


@pytest.mark.parametrize("suppression", ["logits", "confidence"])
@pytest.mark.parametrize("checkpoint", LOUD)
def test_suppression_matters(checkpoint, suppression):
    """Without it the reference decides something else, or in another order."""
    cases = [case for case in SUPPRESSION_CASES if (case.checkpoint, case.suppression) == (checkpoint, suppression)]
    changed = 0
    for case in cases:
        plain = PolicyCase(checkpoint, case.policy, case.max_tokens, case.block, case.steps, tuple(case.prompt_ids))
        changed += expected(plain).trace != expected(case).trace
        if suppression == "logits":
            assert EOS not in expected(case).tokens
    assert changed >= 2


@pytest.mark.parametrize("checkpoint", LOUD)
def test_eos_ends_requests_early(checkpoint):
    """Some of the cases end before max_tokens, and then before all steps are done."""
    early = 0
    for case, output in among_all(checkpoint).items():
        if case.eos and len(output.outputs[0].token_ids) < case.max_tokens:
            assert output.outputs[0].finish_reason == "stop"
            early += num_forwards(output) < case.max_tokens
    assert early >= 5


def test_the_engine_is_the_one_under_test():
    """vLLM took our scheduler, and the checkpoints are float32 through and through."""
    for checkpoint in (*RANDOM_WEIGHTS, *TRAINED):
        llm = engine(checkpoint)
        assert type(scheduler(llm)).__module__ == "dllm_plugin.scheduler.scheduler"
        assert llm.model_config.dtype == torch.float32
        assert llm.model_config.model == str(folder(checkpoint))
