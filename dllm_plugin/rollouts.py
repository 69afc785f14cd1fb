"""Completions as their decoders made them, for reinforcement learning: what each forward pass unmasked. Standard library only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dllm_plugin.metrics import Event, Extent, read_trajectory
from dllm_plugin.params import HOLE

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion to be replayed. The lists have an entry for each position behind the prompt, up to the end of the last
    canvas, or under block-causal attention of the block that holds the last token of the answer.

    ``token_ids``: -1 where a mask was left. ``forward_passes``: the pass that wrote the token, 0 the first, which saw what has a
    lower one and masks elsewhere; -1 for a token that was given, by a template or a grammar, and for a mask. ``logprobs``: of the
    token in that pass, by vLLM's ``logprobs_mode``; 0.0 where no pass wrote it. A token that was replaced
    (``diffusion_edit_threshold``) has the last pass; `dllm_plugin.metrics.trajectory` has all.
    ``num_answer``: positions that are the answer. ``block_length`` and ``canvas_length``: positions of a block and of a canvas;
    the last ones may be shorter. ``num_prompt_blocks``: whole blocks of the prompt, whose tail shares the first block of the
    answer; None where blocks are counted from the start of the canvas.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    forward_passes: list[int]
    logprobs: list[float]
    num_answer: int
    block_length: int
    canvas_length: int
    num_prompt_blocks: int | None


def rollouts(output: "RequestOutput") -> list[Rollout]:
    """That of each completion of a finished request, which asked for ``diffusion_trajectory`` 1. Raises ValueError if not."""
    return [
        _rollout(output.prompt_token_ids or [], completion.token_ids, *read_trajectory(completion))
        for completion in output.outputs
    ]


def rollout_of_response(response: Mapping[str, Any]) -> Rollout:
    """That of the JSON of a chat or text completion, which asked for ``diffusion_trajectory`` 1 and ``return_token_ids``.

    Raises ValueError where it has no trajectory or no token ids, or several choices, of which vLLM tells one alone.
    """
    told = (response.get("kv_transfer_params") or {}).get("diffusion")
    choices = response["choices"]
    prompt = response.get("prompt_token_ids") or choices[0].get("prompt_token_ids")
    if told is None or prompt is None or choices[0].get("token_ids") is None or len(choices) != 1:
        raise ValueError(
            "a rollout needs one choice with its trajectory and token ids; ask with n=1, return_token_ids and "
            "diffusion_trajectory=1 in vllm_xargs, and without stream"
        )
    extent = Extent(**{field.name: told[field.name] for field in fields(Extent)})
    return _rollout(prompt, choices[0]["token_ids"], extent, [Event(*event) for event in told["trajectory"]])


def _rollout(prompt: Sequence[int], answer: Sequence[int], extent: Extent, events: Sequence[Event]) -> Rollout:
    token_ids = [*answer, *[HOLE] * (extent.end - len(answer))]
    forward_passes, logprobs = [HOLE] * extent.end, [0.0] * extent.end
    for event in events:
        if event.position < extent.end:
            token_ids[event.position] = event.token_id
            forward_passes[event.position], logprobs[event.position] = event.forward_pass, event.logprob
    return Rollout(
        prompt_token_ids=list(prompt),
        token_ids=token_ids,
        forward_passes=forward_passes,
        logprobs=logprobs,
        num_answer=len(answer),
        block_length=extent.block_length,
        canvas_length=extent.canvas_length,
        num_prompt_blocks=len(prompt) // extent.block_length if extent.from_start else None,
    )
