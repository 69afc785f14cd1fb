"""What reinforcement learning asks of an engine: rollouts that can be replayed, and weights that change between them."""

import pytest
import torch
from safetensors.torch import load_file
from support.cases import random_prompt
from support.checkpoints import block_reference, folder, reference, write_checkpoint
from support.engines import engine, new_engine
from vllm import LLM, SamplingParams

from dllm_plugin.params import HOLE
from dllm_plugin.rollouts import Rollout, rollouts

STOPS = [*range(40)]  # of 331 tokens, so that samples end anywhere


def sample(llm: LLM, prompt: list[int], n: int = 4, **extras) -> list[Rollout]:
    """Neither log-probabilities nor text are asked for."""
    params = SamplingParams(
        n=n, temperature=1, seed=3, max_tokens=18, stop_token_ids=STOPS, detokenize=False,
        extra_args={f"diffusion_{name}": value for name, value in ({"trajectory": 1} | extras).items()},
    )  # fmt: skip
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    made = rollouts(output)
    for rollout, completion in zip(made, output.outputs, strict=True):
        assert rollout.token_ids[: rollout.num_answer] == completion.token_ids and rollout.prompt_token_ids == prompt
        assert HOLE not in completion.token_ids
    return made


def logprobs_by_replay(rollout: Rollout, checkpoint: str) -> list[float]:
    """Those that the reference model gives each token, with everything that an earlier pass had written and no other token."""
    is_block, prompt = rollout.num_prompt_blocks is not None, len(rollout.prompt_token_ids)
    model = (block_reference if is_block else reference)(checkpoint)
    length = rollout.block_length if is_block else rollout.canvas_length
    found = [0.0] * len(rollout.token_ids)
    for number in range(max(rollout.forward_passes) + 1):
        places = [at for at, step in enumerate(rollout.forward_passes) if step == number]
        begin = prompt if not is_block else 0  # of the blocks' count
        end = min(begin + ((prompt + places[0] - begin) // length + 1) * length, prompt + len(rollout.token_ids))
        steps = zip(rollout.token_ids, rollout.forward_passes, strict=True)
        answer = [token if HOLE < step < number else model.mask_token_id for token, step in steps]
        ids = torch.tensor([*rollout.prompt_token_ids, *answer][:end])
        if is_block:
            block = torch.arange(end) // length
            said = model.logits(ids, block[:, None] >= block)
        else:
            said = model.logits_for_positions(ids)
        for at in places:
            found[at] = float(said[prompt + at].float().log_softmax(0)[rollout.token_ids[at]])
    return found


@pytest.mark.parametrize(
    "checkpoint, extras",
    [
        ("llada", {"canvas_length": 8, "block_length": 4}),
        ("llada", {"block_length": 6, "threshold": 0.01}),
        ("dream", {"canvas_length": 12, "remasking": "entropy"}),
        ("sdar", {}),
        ("sdar", {"block_length": 7, "block_steps": 3}),
        ("llada2", {"threshold": 0.02}),
    ],
    ids=str,
)
def test_a_rollout_is_replayed_on_the_reference_model(checkpoint, extras):
    """What was unmasked behind a stop was seen by the answer's last tokens, so that a replay needs it."""
    made = sample(engine(checkpoint), random_prompt(9, checkpoint), **extras)
    assert len({tuple(rollout.token_ids) for rollout in made}) > 1
    assert any(rollout.num_answer < len(rollout.token_ids) for rollout in made)
    for rollout in made:
        assert rollout.logprobs == pytest.approx(logprobs_by_replay(rollout, checkpoint), abs=1e-4)
        if checkpoint in ("sdar", "llada2"):
            assert rollout.block_length == extras.get("block_length", block_reference(checkpoint).block_length)
            assert rollout.num_prompt_blocks == 9 // rollout.block_length
        else:
            assert rollout.block_length == extras.get("block_length", 12) and rollout.num_prompt_blocks is None
        for token, step, logprob in zip(rollout.token_ids, rollout.forward_passes, rollout.logprobs, strict=True):
            assert (token == HOLE) == (step == HOLE) and (step == HOLE or logprob < 0)


def test_a_pinned_token_has_no_pass():
    """A template's; the holes have one."""
    llm, template = engine("sdar"), [-1, 50, 51, -1, -1, 52]
    (made,) = sample(llm, random_prompt(8, "sdar"), n=1, template=template)
    for token, pinned, step in zip(made.token_ids[: made.num_answer], template, made.forward_passes, strict=False):
        assert (step == HOLE) == (pinned != HOLE) and token == (pinned if pinned != HOLE else token)


def test_a_completion_without_a_trajectory_is_no_rollout():
    (output,) = engine("sdar").generate([{"prompt_token_ids": [5, 6]}], SamplingParams(max_tokens=2, detokenize=False))
    with pytest.raises(ValueError, match="carries no trajectory; ask for it with diffusion_trajectory=1"):
        rollouts(output)


# ---- weights that change between rollouts


@pytest.mark.parametrize("checkpoint", ["llada", "sdar"])
def test_weights_reloaded_in_place_are_those_of_a_fresh_engine(checkpoint):
    """Keys and values that were kept of a prompt are those of the old weights, until the prefix cache is reset."""
    llm, other = (
        new_engine(folder(checkpoint), block_size=16),
        write_checkpoint(checkpoint, f"{checkpoint}-new", seed=12),
    )
    prompt = random_prompt(50, checkpoint)
    old = sample(engine(checkpoint), prompt)
    new = sample(new_engine(other), prompt)
    assert old != new
    for path, expected in ((folder(checkpoint), old), (other, new), (folder(checkpoint), old)):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        assert llm.reset_prefix_cache()
        assert sample(llm, prompt) == expected
    # sleep ends what runs, and empties the prefix cache; after level 2 the weights are the caller's to bring back
    llm.sleep(1)
    llm.wake_up()
    assert sample(llm, prompt) == old
    llm.sleep(2)
    llm.wake_up()
    tensors = [*load_file(other / "model.safetensors").items()]
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
    assert sample(llm, prompt) == new
