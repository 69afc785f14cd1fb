"""Per-request state on the device, indexed by slot: the sequence, which positions are masked, how it is decoded."""

import torch

from dllm_plugin.params import DREAM_POLICIES, REMASKING_POLICIES
from dllm_plugin.scheduler.output import Canvas

_MIN_SLOTS, _MIN_LENGTH = 16, 256


class CanvasStore:
    """Sequences being denoised. A slot belongs to one request from its first window until it ends or is preempted.

    ``tokens`` int32 and ``masked`` bool ``[slots, length]``, both in sequence positions: the prompt first, never
    masked even where it holds the mask id, then the canvas; what lies behind the canvas counts as masked, so that no
    final prefix reaches it. Both grow to what is asked of them. The other tensors are ``[slots]``, or ``[slots, 2]``
    lists of token ids padded with -1.
    """

    def __init__(
        self, mask_token_id: int, eos_token_id: int, turn_end_token_id: int, device: torch.device
    ) -> None:
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.turn_end_token_id = turn_end_token_id
        self.device = device
        self.canvases: dict[str, Canvas] = {}
        self.slot_of: dict[str, int] = {}
        self.final_prefix: dict[str, int] = {}
        self.guided_from: dict[str, int] = {}  # where the canvas begins, of requests with guidance
        self._free: list[int] = []
        self.tokens = torch.empty((0, _MIN_LENGTH), dtype=torch.int32, device=device)
        self.masked = torch.empty((0, _MIN_LENGTH), dtype=torch.bool, device=device)
        # choice
        self.temperature = torch.empty(0, dtype=torch.float32, device=device)
        self.top_k = torch.empty(0, dtype=torch.int64, device=device)
        self.top_p = torch.empty(0, dtype=torch.float32, device=device)
        self.seed = torch.empty(0, dtype=torch.int64, device=device)
        self.no_choice = torch.empty((0, 2), dtype=torch.int64, device=device)
        self.no_mass = torch.empty((0, 2), dtype=torch.int64, device=device)
        self.guidance = torch.empty(0, dtype=torch.float32, device=device)
        # ranking
        self.policy = torch.empty(0, dtype=torch.int64, device=device)
        self.tempered = torch.empty(0, dtype=torch.bool, device=device)
        self.alg_temp = torch.empty(0, dtype=torch.float32, device=device)
        self._grow(_MIN_SLOTS, _MIN_LENGTH)

    def begin(self, request_id: str, canvas: Canvas) -> None:
        """Lay out a canvas of masks after the request's final tokens, in its slot or a free one."""
        if request_id not in self.slot_of:
            if not self._free:
                self._grow(2 * len(self.tokens), 0)
            self.slot_of[request_id] = self._free.pop()
        slot, start = self.slot_of[request_id], len(canvas.token_ids)
        end = start + canvas.length
        self._grow(0, end)
        self.tokens[slot, :start] = torch.tensor(canvas.token_ids, dtype=torch.int32)
        self.tokens[slot, start:end] = self.mask_token_id
        self.masked[slot, :start] = False
        self.masked[slot, start:] = True
        self.canvases[request_id] = canvas
        self.final_prefix[request_id] = start + canvas.num_emitted
        if canvas.params.cfg_scale > 0:
            self.guided_from[request_id] = start
        self._set_decoding(slot, canvas)

    def free(self, request_id: str) -> None:
        """Give the request's slot back; a request without one is left alone."""
        if (slot := self.slot_of.pop(request_id, None)) is not None:
            del self.canvases[request_id], self.final_prefix[request_id]
            self.guided_from.pop(request_id, None)
            self._free.append(slot)

    def _set_decoding(self, slot: int, canvas: Canvas) -> None:
        params = canvas.params
        dream = params.remasking in DREAM_POLICIES
        sampled = canvas.temperature > 0
        filtered = dream or sampled  # LLaDA's decoder has no filter, and greedy needs none
        self.temperature[slot] = canvas.temperature
        self.tempered[slot] = dream and sampled
        self.top_k[slot] = canvas.top_k if filtered else 0
        self.top_p[slot] = canvas.top_p if filtered else 1.0
        self.seed[slot] = signed_64_bits(canvas.seed)
        self.guidance[slot] = params.cfg_scale
        self.policy[slot] = REMASKING_POLICIES.index(params.remasking)
        # `origin` decides each position by itself: there is no order to sample
        self.alg_temp[slot] = 0.0 if params.remasking == "origin" else params.alg_temp
        eos, turn_end = self.eos_token_id, self.turn_end_token_id
        # the mask id is never chosen, but keeps its mass: the references' confidences have it in their softmax
        no_choice, no_mass = [self.mask_token_id, -1], [-1, -1]
        if params.eos_suppression == "logits":
            no_choice[1] = no_mass[0] = eos
        elif params.eos_suppression == "confidence":
            # ML-GSAI/LLaDA:generate.py assigns -inf to EOS in the noised logits and to the end of turn in the plain
            # ones; at temperature 0 these are one tensor, above it EOS keeps its confidence
            no_mass = [-1 if sampled else eos, turn_end]
        self.no_choice[slot] = torch.tensor(no_choice)
        self.no_mass[slot] = torch.tensor(no_mass)

    def _grow(self, num_slots: int, length: int) -> None:
        old_slots, old_length = self.tokens.shape
        num_slots = max(num_slots, old_slots)
        length = old_length if length <= old_length else 1 << (length - 1).bit_length()
        if (num_slots, length) == (old_slots, old_length):
            return
        for name, old in vars(self).items():
            if isinstance(old, torch.Tensor):
                shape = (num_slots, length) if name in ("tokens", "masked") else (num_slots, *old.shape[1:])
                new = torch.full(shape, name == "masked", dtype=old.dtype, device=self.device)
                new[tuple(slice(size) for size in old.shape)] = old
                setattr(self, name, new)
        self._free.extend(range(old_slots, num_slots))


def signed_64_bits(seed: int) -> int:
    """Any integer seed as the int64 with the same low 64 bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
