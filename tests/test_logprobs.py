"""Log-probabilities, ranks and trajectories of the engine's tokens, against the reference model's own logits."""

import pytest
import torch
from support.cases import random_prompt
from support.checkpoints import reference
from support.engines import drive, engine
from vllm import SamplingParams

from dllm_plugin.metrics import trajectory

NUM_LOGPROBS = 4
TOKENS = 12


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
    assert output.kv_transfer_params == {"diffusion": {"trajectory": [list(event) for event in events]}}
    ids = torch.tensor([*prompt, *[model.mask_token_id] * TOKENS])
    for number in range(max(event.forward_pass for event in events) + 1):
        logprobs = model.logits_for_positions(ids).float().log_softmax(1)
        for event in (event for event in events if event.forward_pass == number):
            at = len(prompt) + event.position
            said, told = logprobs[at], completion.logprobs[event.position]
            assert completion.token_ids[event.position] == event.token_id
            assert told[event.token_id].rank == int((said >= said[event.token_id]).sum())
            assert list(told)[:1] == [event.token_id]
            assert set(said.topk(NUM_LOGPROBS).indices.tolist()) <= set(told)
            for token, entry in told.items():
                assert entry.logprob == pytest.approx(float(said[token]), abs=1e-4)
        for event in (event for event in events if event.forward_pass == number):
            ids[len(prompt) + event.position] = event.token_id
