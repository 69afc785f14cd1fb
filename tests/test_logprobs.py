"""Log-probabilities, ranks and trajectories of the engine's tokens, against the reference model's own logits."""

import pytest
import torch
from support.cases import random_prompt
from support.checkpoints import MASK, reference
from support.engines import drive, engine
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from dllm_plugin.metrics import trajectory
from dllm_plugin.worker.records import score

NUM_LOGPROBS = 4
TOKENS = 12

# On a GPU a product of more rows may add up in another order.
ROUNDING = 1e-4 if torch.cuda.is_available() else 0


@pytest.mark.parametrize("checkpoint", ["llada", "dream"])
def test_a_trajectory_tells_when_each_token_was_written(checkpoint):
    """Replayed on the reference model: each token is what the model said in its forward pass, with its logprob and rank."""
    llm, model, prompt = engine(checkpoint), reference(checkpoint), random_prompt(9, checkpoint)
    params = SamplingParams(
        temperature=0,
        max_tokens=TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=NUM_LOGPROBS,
        seed=5,
        extra_args={"diffusion_trajectory": 1, "diffusion_block_length": 4, "diffusion_remasking": "low_confidence"},
    )
    (output,), _ = drive(llm, [(prompt, params)])
    completion = output.outputs[0]
    events = trajectory(completion)
    assert sorted(event.position for event in events) == list(range(TOKENS))
    assert output.kv_transfer_params == {
        "diffusion": {
            "trajectory": [list(event) for event in events],
            "block_length": 4,
            "canvas_length": TOKENS,
            "end": TOKENS,
            "from_start": 0,
        }
    }
    ids = torch.tensor([*prompt, *[model.mask_token_id] * TOKENS])
    for number in range(max(event.forward_pass for event in events) + 1):
        logprobs = model.logits_for_positions(ids).float().log_softmax(1)
        for event in (event for event in events if event.forward_pass == number):
            at = len(prompt) + event.position
            said, told = logprobs[at], completion.logprobs[event.position]
            assert completion.token_ids[event.position] == event.token_id
            assert told[event.token_id].logprob == pytest.approx(event.logprob)
            assert told[event.token_id].rank == int((said >= said[event.token_id]).sum())
            assert list(told)[:1] == [event.token_id]
            assert set(said.topk(NUM_LOGPROBS).indices.tolist()) <= set(told)
            for token, entry in told.items():
                assert entry.logprob == pytest.approx(float(said[token]), abs=1e-4)
        for event in (event for event in events if event.forward_pass == number):
            ids[len(prompt) + event.position] = event.token_id


# ---- what is told, against the model's own logits: a canvas of one token has one forward pass

MODES = ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")


def one_token(**asked):
    return SamplingParams(
        **{"max_tokens": 1, "ignore_eos": True, "detokenize": False, "seed": 3, "temperature": 0} | asked
    )


def said_of(mode, logits, params):
    """Plain torch: float32 ``[vocabulary]`` of the mode."""
    x = logits.float().clone()
    if mode.startswith("processed"):
        for token, bias in (params.logit_bias or {}).items():
            x[token] += bias
        if params.temperature > 0:
            x /= params.temperature
            if params.top_k > 0:
                x[x < x.topk(params.top_k).values[-1]] = -torch.inf
            if params.top_p < 1:
                order = x.argsort(descending=True, stable=True)
                before = x[order].softmax(0).cumsum(0) - x[order].softmax(0)
                x[order[before > params.top_p]] = -torch.inf
        x[MASK] = -torch.inf
    return x.log_softmax(0) if mode.endswith("logprobs") else x


ASKED = {
    "greedy": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_p": {"temperature": 1.3, "top_p": 0.6},
    "bias": {"logit_bias": {17: 3.0, 18: -50.0}},
}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_tells_what_it_says(mode):
    llm, model, prompt = (
        engine("llada", logprobs_mode=mode, max_logprobs=-1),
        reference("llada"),
        random_prompt(9, "mode"),
    )
    logits = model.logits_for_positions(torch.tensor([*prompt, MASK]))[-1]
    requests = [(prompt, one_token(logprobs=number, **asked)) for asked in ASKED.values() for number in (6, 0, -1)]
    neighbours = [(prompt, one_token(**asked)) for asked in ASKED.values()]
    outputs, _ = drive(llm, [*requests, *neighbours])
    assert all(output.outputs[0].logprobs is None for output in outputs[len(requests) :])
    for (_, params), output in zip(requests, outputs, strict=False):
        said, (told,), (token,) = said_of(mode, logits, params), output.outputs[0].logprobs, output.outputs[0].token_ids
        number = len(said) if params.logprobs == -1 else params.logprobs
        assert told[token].rank == int((said >= said[token]).sum())
        likeliest = said.argsort(descending=True, stable=True)[:number].tolist()
        likely = [t for t in likeliest if said[t] > -torch.inf]
        assert {*likely, token} <= {*told}
        assert len(told) <= number + 1
        for other, entry in told.items():
            assert entry.logprob == pytest.approx(float(said[other]), abs=1e-4), (params, other)


def test_given_tokens_are_told():
    llm, prompt = engine("llada"), random_prompt(9, "given")
    logits = reference("llada").logits_for_positions(torch.tensor([*prompt, MASK]))[-1].log_softmax(0)
    given = [[5, 77], [300, 4, 9, 11, 12], None]
    requests = [(prompt, one_token(logprob_token_ids=ids) if ids else one_token(logprobs=3)) for ids in given]
    for ids, output in zip(given, drive(llm, requests)[0], strict=True):
        (told,), (token,) = output.outputs[0].logprobs, output.outputs[0].token_ids
        assert {*told} == {token, *(ids or logits.topk(3).indices.tolist())}
        assert all(entry.logprob == pytest.approx(float(logits[t]), abs=1e-4) for t, entry in told.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_take_the_lowest_id_whatever_is_asked_beside(dtype):
    """The two likeliest are the first two of the five likeliest, among logits of which many are equal."""
    logits = (torch.randn(40, 97, generator=torch.Generator().manual_seed(0)) * 1.5).round().to(dtype)
    logits[:, 0] = -0.0
    token = logits.float().argmax(1)
    five, two = (score(logits, token, number, None, normalize=False) for number in (5, 2))
    assert torch.equal(five[:, 2:4], two[:, 2:4])
    assert torch.equal(five[:, 2:7].long(), logits.float().argsort(dim=1, descending=True, stable=True)[:, :5])


# ---- as many as there are tokens, whatever ends the answer and however it travels

FORMS = {
    "blocks": ("llada", {"diffusion_block_length": 4}),
    "canvases": ("llada", {"diffusion_canvas_length": 5, "diffusion_steps": 6}),
    "pinned": ("sdar", {"diffusion_template": [-1, 50, -1, 51, 52, *[-1] * 7]}),
    "edited": ("llada2", {"diffusion_threshold": 0.02, "diffusion_edit_threshold": 0.01}),
    "d2f": ("llada", {"diffusion_strategy": "d2f", "diffusion_block_length": 4}),
}


@pytest.mark.parametrize("form", FORMS)
def test_there_is_one_for_each_token(form):
    """Streamed or at the end, cut by stop_token_ids or not, flat or not, beside each other under a small budget."""
    checkpoint, extras = FORMS[form]
    llm, prompt = engine(checkpoint, max_num_batched_tokens=64, max_model_len=48), random_prompt(9, checkpoint)
    asked = {"max_tokens": TOKENS, "extra_args": extras}
    (whole,), _ = drive(llm, [(prompt, one_token(**asked))])
    end = whole.outputs[0].token_ids[TOKENS // 2]
    kinds = (RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY)
    requests = [
        (prompt, one_token(**asked, logprobs=number, output_kind=kind, stop_token_ids=stops, flat_logprobs=flat))
        for number in (0, 2)
        for kind in kinds
        for stops in ([], [end])
        for flat in (False, True)
    ]
    outputs = [output.outputs[0] for output in drive(llm, [*requests, *[(prompt, one_token(**asked))] * 4])[0]]
    first = {}
    for (_, params), completion in zip(requests, outputs, strict=False):
        tokens, told = list(completion.token_ids), [dict(entry) for entry in completion.logprobs]
        assert len(told) == len(tokens)
        assert tokens == list(whole.outputs[0].token_ids)[: len(tokens)]
        assert tokens[-1] == end or not params.stop_token_ids
        said = [(entry[token].logprob, entry[token].rank) for token, entry in zip(tokens, told, strict=True)]
        before = first.setdefault("said", said)[: len(said)]
        assert said == [(pytest.approx(number, abs=ROUNDING), rank) for number, rank in before]
    pinned = extras.get("diffusion_template", [])
    assert all(first["said"][i] == (0.0, 1) for i, token in enumerate(pinned) if token >= 0)

    streamed = one_token(**asked, logprobs=2, output_kind=RequestOutputKind.DELTA, stop_token_ids=[end])
    llm.llm_engine.add_request(f"delta-{form}", {"prompt_token_ids": prompt}, streamed)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            assert len(output.outputs[0].logprobs) == len(output.outputs[0].token_ids)


@pytest.mark.parametrize(("long", "short"), [(0, 5), (1, -1), (5, 0)])
def test_a_token_written_beside_who_asked_for_more_is_told_when_he_has_ended(long, short):
    """What is told of a token waits until all before it is unmasked; meanwhile the neighbours come and go."""
    llm, prompt = engine("llada", max_logprobs=-1), random_prompt(9, "neighbour")
    alone = one_token(max_tokens=TOKENS, logprobs=long, extra_args={"diffusion_remasking": "low_confidence"})
    (want,), _ = drive(llm, [(prompt, alone)])
    requests = [(prompt, alone), *[(prompt, one_token(max_tokens=n, logprobs=short)) for n in (1, 2, 3, 2)]]
    (got, *_), _ = drive(llm, requests, [0, 1, 2, 3, 5])
    assert got.outputs[0].token_ids == want.outputs[0].token_ids
    for told, alone_told in zip(got.outputs[0].logprobs, want.outputs[0].logprobs, strict=True):
        assert {t: e.rank for t, e in told.items()} == {t: e.rank for t, e in alone_told.items()}
