"""What requests ask of their logits (`Controls`), applied to the rows of a step on the device, without a word from the host.

All of it in float32. Controls change the distribution itself, in the order of vLLM's sampler: tokens are chosen from the
changed logits, and confidences are of them.
"""

import torch
from torch import Tensor

from dllm_plugin.worker.batch import StepBatch
from dllm_plugin.worker.canvas import CanvasStore

_IN_PROMPT = 1 << 32  # in one number with how often a token stands in the answer


def control(logits: Tensor, batch: StepBatch, state: CanvasStore, beside: Tensor | None = None) -> Tensor:
    """float32 ``[rows, vocab]``: the logits under the controls of each row's request.

    ``beside``: the tokens of all rows of the step that are about to be written, ``[slots * length]`` as the store's, -1 where
    none is; no phrase may then be completed with whatever these rows may hold.
    """
    kinds, slot = batch.layout.needs.controls, batch.slots[batch.row_request]
    x = logits.to(torch.float32, copy=True)
    if batch.grammar is not None:
        allowed = unpacked(batch.grammar[batch.row_request], x.shape[1]) | ~is_hole(batch, state)[:, None]
        x.masked_fill_(~allowed, -torch.inf)
    if "allowed" in kinds:
        x.masked_fill_(~is_allowed(x.shape[1], state, slot), -torch.inf)
    if "phrases" in kinds:
        around = Surroundings(batch, state, slot)
        forbid(
            x,
            around.words,
            around.others_match(around.is_old if beside is None else around.is_old | around.any_of(beside)),
        )
    if "stops" in kinds:
        is_early = batch.row_position < state.no_stop_below[slot]
        ids = state.stop_ids[slot]
        forbid(x, ids, is_early[:, None] & (ids >= 0))
    if "bias" in kinds:
        x.scatter_add_(1, state.bias_ids[slot], state.bias[slot])
    if "penalties" in kinds:
        penalize(x, batch, state, slot)
    return x


def is_allowed(vocab: int, state: CanvasStore, slot: Tensor) -> Tensor:
    """``[rows, vocab]`` bool."""
    return unpacked(state.allowed_bits[slot], vocab) | ~state.is_restricted[slot][:, None]


def is_hole(batch: StepBatch, state: CanvasStore) -> Tensor:
    """``[rows]``: the first masked position of a request under a grammar."""
    cell = batch.slots[batch.row_request] * state.tokens.shape[1] + batch.row_position
    return cell == batch.hole[batch.row_request]


def unpacked(words: Tensor, columns: int) -> Tensor:
    """bool ``[rows, columns]`` of the bits of int32 ``words``; False behind them."""
    bits = ((words[:, :, None] >> torch.arange(32, device=words.device)) & 1).flatten(1)[:, :columns] > 0
    return torch.nn.functional.pad(bits, (0, columns - bits.shape[1]))


def forbid(x: Tensor, ids: Tensor, applies: Tensor) -> None:
    """-inf in the columns ``ids [rows, n]`` of ``x`` where it ``applies``; the same column may come more than once."""
    x.scatter_reduce_(1, ids.clamp(min=0), torch.where(applies, -torch.inf, torch.inf), "amin")


def penalize(x: Tensor, batch: StepBatch, state: CanvasStore, slot: Tensor) -> None:
    """vLLM's repetition, frequency and presence penalties (vllm/model_executor/layers/utils.py:apply_penalties)."""
    slots, position = batch.slots, batch.layout.reach[None]
    tokens, masked = (whole[:, : position.shape[1]].index_select(0, slots) for whole in (state.tokens, state.masked))
    start, end = state.answer_start[slots][:, None], state.answer_end[slots][:, None]
    in_answer = ~masked & (position >= start) & (position < end)
    seen = torch.zeros(len(slots), x.shape[1], dtype=torch.int64, device=x.device)
    seen.scatter_add_(1, tokens, in_answer + (position < start) * _IN_PROMPT)
    request, own = batch.row_request, batch.row_position[:, None]
    ids, facts = tokens[request], seen.gather(1, tokens)[request]
    facts -= (in_answer[request].gather(1, own) & (ids == ids.gather(1, own))).long()
    value, count = x.gather(1, ids), facts % _IN_PROMPT
    repetition, frequency, presence = (
        getattr(state, name)[slot][:, None] for name in ("repetition", "frequency", "presence")
    )
    repetition = torch.where(facts > 0, repetition, 1.0)
    value = value * torch.where(value > 0, 1.0 / repetition, repetition)
    value = value - frequency * count
    value = value - presence * (count > 0)
    x.scatter_(1, ids, value)  # a token that comes more than once has one value


class Surroundings:
    """The phrases of each row's request laid over its position in every way: ``[rows, phrases, k, j]``.

    Token k of the phrase falls on the row, and token j on position ``row + j - k``.
    """

    def __init__(self, batch: StepBatch, state: CanvasStore, slot: Tensor) -> None:
        phrases = state.phrases[slot]
        longest = phrases.shape[2]
        offset = torch.arange(longest, device=phrases.device)
        self.words = phrases.flatten(1)  # [rows, phrases * k]
        self.token = phrases[:, :, None, :]  # of j
        self.is_own = offset[:, None] == offset  # [k, j]
        self.is_left = offset < offset[:, None]
        self.is_behind = self.token < 0
        position = batch.row_position[:, None, None] + offset - offset[:, None]  # [rows, k, j]
        start, end = state.answer_start[slot], state.answer_end[slot]
        self.is_inside = ((position >= start[:, None, None]) & (position < end[:, None, None]))[:, None]
        cell = slot[:, None, None] * state.tokens.shape[1] + position
        self.cell = cell.clamp(0, state.tokens.numel() - 1)
        tokens, masked = state.tokens.view(-1)[self.cell], state.masked.view(-1)[self.cell]
        self.is_old = (tokens[:, None] == self.token) & ~masked[:, None]  # stands there already

    def any_of(self, beside: Tensor) -> Tensor:
        """Where one of the rows that are about to be written falls."""
        return (beside[self.cell] >= 0)[:, None]

    def is_new(self, beside: Tensor) -> Tensor:
        """Where the token that is about to be written is that of the phrase."""
        return beside[self.cell][:, None] == self.token

    def others_match(self, matches: Tensor) -> Tensor:
        """``[rows, phrases * k]``: whether token k would complete the phrase, with what ``matches`` of the other tokens."""
        matches = self.is_own | self.is_behind | matches & self.is_inside
        return (matches.all(3) & (self.token[:, :, 0] >= 0)).flatten(1)

    def completed_by(self, beside: Tensor) -> Tensor:
        """``[rows]``: whether the row is the last of those that together complete a phrase."""
        is_new = self.is_new(beside)
        matches = self.is_old | is_new & (self.is_left | self.is_own)
        own_is_new = (is_new & ~self.is_old & self.is_own).any(3).flatten(1)
        inside = self.is_own | self.is_behind | self.is_inside
        complete = ((matches | self.is_behind) & inside).all(3) & (self.token[:, :, 0] >= 0)
        return (complete.flatten(1) & own_is_new).any(1)
