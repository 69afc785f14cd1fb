"""What the scheduler and the workers tell each other beyond vLLM's own messages. They travel by pickle."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from dllm_plugin.controls import Controls
from dllm_plugin.params import DiffusionParams
from dllm_plugin.scheduler.likelihood import ScoredWindow
from dllm_plugin.scheduler.window import Window


@dataclass(frozen=True, slots=True)
class Record:
    """What is told of a token that a step has written: unmasked, or put in the place of another one.

    ``confidence``: what its position was ranked by. ``ids`` and ``logprobs``: the token and those likest in its place, and the
    value of each by vLLM's ``logprobs_mode``; ``logprobs`` is empty where nobody asks. ``rank``: the token's among all.
    """

    position: int
    token: int
    confidence: float
    rank: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @classmethod
    def of_given(cls, position: int, token: int, others: Sequence[int]) -> "Record":
        """That of a token which the request itself has given: it was certain, and so no other one was possible."""
        logprobs = [0.0 if other == token else -math.inf for other in others]
        return cls(position, token, 1.0, 1, (token, *others), (0.0, *logprobs))


@dataclass(frozen=True, slots=True)
class GrammarStep:
    """What a grammar asks of the next step of a request.

    ``emitted``: positions below it are emitted; the worker had counted those that the grammar refused. ``forced``: tokens by
    position that are written before the step, ``again``: positions that are masked again. ``hole``: the first masked position,
    for which ``mask`` has int32 words with a bit for each token that may stand there; None: any may.
    """

    emitted: int
    forced: dict[int, int]
    again: tuple[int, ...]
    hole: int
    mask: np.ndarray | None


@dataclass(frozen=True, slots=True)
class NewCanvas:
    """The message that begins a canvas: what to lay out after ``token_ids``, and how it is to be decoded.

    ``token_ids``: prompt and everything final before this canvas. ``canvas_ids``: -1 for a mask, otherwise a pinned
    token. ``suffix_ids``: what stands behind. ``num_emitted``: tokens of this canvas that were emitted before a
    preemption made it begin again. ``eos_token_id``: the EOS that ends the response, -1 if none does; ``ends_at``: all
    tokens that do. ``seed``: signed 64 bits, the same on every rank. ``answer_start``: length of the prompt.
    ``has_grammar``: each step comes with a `GrammarStep`.
    ``num_logprobs``: how many of the likeliest tokens are told with each token, -1 if nothing is told of it; ``logprob_ids``: the
    tokens that are told instead. ``num_prompt_logprobs``: the same of the prompt's tokens.
    """

    token_ids: list[int]
    canvas_ids: list[int]
    suffix_ids: list[int]
    num_emitted: int
    eos_token_id: int
    ends_at: frozenset[int]
    lora_request: LoRARequest | None
    params: DiffusionParams
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    answer_start: int
    controls: Controls
    num_logprobs: int = -1
    logprob_ids: tuple[int, ...] = ()
    has_grammar: bool = False
    num_prompt_logprobs: int = -1


@dataclass
class DiffusionSchedulerOutput(SchedulerOutput):
    """Denoising steps to run one after the other, and the canvases that begin before them.

    ``steps``: the window of every scheduled request, by step. Windows of later steps cover the same positions, and know how
    many are masked where that follows from quotas. When a token ends a request or a block is filled, the steps that have
    not begun are left out. ``scored``: copies of requests' given text, which are forwarded before.
    """

    new_canvases: dict[str, NewCanvas] = field(default_factory=dict)
    steps: list[dict[str, Window]] = field(default_factory=list)
    grammar: dict[str, GrammarStep] = field(default_factory=dict)
    scored: dict[str, list[ScoredWindow]] = field(default_factory=dict)


@dataclass
class DiffusionModelRunnerOutput(ModelRunnerOutput):
    """``sampled_token_ids``: the tokens of each request that are emitted; often none.

    ``num_emitted``: request id to the number of them that each step brought, as many steps as were run. ``num_masked``:
    request id to the number of positions still masked in each block that was active, after each of the steps.
    ``eos_is_taken``: requests of which an active block holds EOS, masks before it or not. ``num_edited``: request id to the
    number of tokens that the last step replaced. ``written``: of requests that ask for their trajectory, what each step wrote.
    ``scores``: request id to float32 rows of what was told of its given text (worker/records.py:score). ``broken``: requests
    for which a token was to be chosen out of logits that are no numbers.
    """

    num_emitted: dict[str, list[int]] = field(default_factory=dict)
    num_masked: dict[str, list[list[int]]] = field(default_factory=dict)
    eos_is_taken: set[str] = field(default_factory=set)
    num_edited: dict[str, int] = field(default_factory=dict)
    written: dict[str, list[list[Record]]] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)

    def add_idle(self, request_ids: Iterable[str]) -> None:
        """Give those of the requests that had no window an output without tokens."""
        for request_id in request_ids:
            if request_id not in self.req_id_to_index:
                self.req_id_to_index[request_id] = len(self.req_ids)
                self.req_ids.append(request_id)
                self.sampled_token_ids.append([])
                if self.logprobs is not None and self.logprobs.cu_num_generated_tokens is not None:
                    self.logprobs.cu_num_generated_tokens.append(len(self.logprobs.logprobs))
