"""Per-request state on the device, indexed by slot: the sequence, which positions are masked, how it is decoded."""

from dataclasses import dataclass

import torch

from dllm_plugin.params import HOLE
from dllm_plugin.policies import POLICIES, RANKINGS
from dllm_plugin.scheduler.output import NewCanvas

_MIN_SLOTS, _MIN_LENGTH = 16, 256


@dataclass(slots=True)
class Request:
    """The host's part of a request's state. ``serial`` differs for every canvas that was ever laid out."""

    slot: int
    canvas: NewCanvas
    canvas_end: int
    emitted: int  # every position below it is settled, and the user has its token
    has_pinned: bool
    serial: int


class CanvasStore:
    """Sequences being denoised. A slot belongs to one request from its first window until it ends or is preempted.

    ``tokens`` int64 and ``masked`` bool ``[slots, length]``, both in sequence positions: the prompt first, never
    masked even where it holds the mask id, then the canvas, then the suffix; what lies behind counts as masked, so that
    no unmasked prefix reaches it. Both grow to what is asked of them. The other tensors are ``[slots]``, or ``[slots, 2]``
    lists of token ids padded with -1.
    """

    def __init__(self, mask_token_id: int, eos_token_id: int, turn_end_token_id: int, device: torch.device) -> None:
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.turn_end_token_id = turn_end_token_id
        self.device = device
        self.requests: dict[str, Request] = {}
        self.forbidden_mask = torch.tensor([[mask_token_id]], device=device)
        self.generation = 0  # goes up when the tensors below are replaced by larger ones
        self._free: list[int] = []
        self._num_begun = 0
        self.tokens = torch.empty((0, _MIN_LENGTH), dtype=torch.int64, device=device)
        self.masked = torch.empty((0, _MIN_LENGTH), dtype=torch.bool, device=device)
        # choice
        self.temperature = torch.empty(0, dtype=torch.float32, device=device)
        self.top_k = torch.empty(0, dtype=torch.int64, device=device)
        self.top_p = torch.empty(0, dtype=torch.float32, device=device)
        self.seed = torch.empty(0, dtype=torch.int64, device=device)
        self.stop_at = torch.empty(0, dtype=torch.int64, device=device)
        self.no_choice = torch.empty((0, 2), dtype=torch.int64, device=device)
        self.no_mass = torch.empty((0, 2), dtype=torch.int64, device=device)
        self.guidance = torch.empty(0, dtype=torch.float32, device=device)
        # ranking
        self.ranking = torch.empty(0, dtype=torch.int64, device=device)
        self.tempered = torch.empty(0, dtype=torch.bool, device=device)
        self.alg_temp = torch.empty(0, dtype=torch.float32, device=device)
        self._grow(_MIN_SLOTS, _MIN_LENGTH)

    def begin(self, request_id: str, canvas: NewCanvas) -> None:
        """Lay out a canvas after the request's final tokens, in its slot or a free one."""
        if request_id in self.requests:
            slot = self.requests[request_id].slot
        else:
            if not self._free:
                self._grow(2 * len(self.tokens), 0)
            slot = self._free.pop()
        start = len(canvas.token_ids)
        end = start + len(canvas.canvas_ids)
        sequence = torch.tensor([*canvas.token_ids, *canvas.canvas_ids, *canvas.suffix_ids])
        self._grow(0, len(sequence))
        masked = sequence[start:end] == HOLE
        sequence[start:end].masked_fill_(masked, self.mask_token_id)
        self.tokens[slot, : len(sequence)] = sequence
        self.masked[slot, : len(sequence)] = False
        self.masked[slot, start:end] = masked
        self.masked[slot, len(sequence) :] = True
        self._num_begun += 1
        self.requests[request_id] = Request(
            slot=slot,
            canvas=canvas,
            canvas_end=end,
            emitted=start + canvas.num_emitted,
            has_pinned=not bool(masked.all()),
            serial=self._num_begun,
        )
        self._set_decoding(slot, canvas)

    def free(self, request_id: str) -> None:
        """Give the request's slot back; a request without one is left alone."""
        if (request := self.requests.pop(request_id, None)) is not None:
            self._free.append(request.slot)

    def _set_decoding(self, slot: int, canvas: NewCanvas) -> None:
        params = canvas.params
        # zhijie-group/Discrete-Diffusion-Forcing:D2F-eval ranks with Dream's sampler on both families
        policy = POLICIES["maskgit_plus" if params.strategy == "d2f" else params.remasking]
        sampled = canvas.temperature > 0
        filtered = sampled or policy.filters_greedy
        self.temperature[slot] = canvas.temperature
        self.tempered[slot] = policy.tempered and sampled
        self.top_k[slot] = canvas.top_k if filtered else 0
        self.top_p[slot] = canvas.top_p if filtered else 1.0
        self.stop_at[slot] = canvas.eos_token_id
        self.seed[slot] = canvas.seed
        self.guidance[slot] = params.cfg_scale
        self.ranking[slot] = RANKINGS.index(policy.ranking)
        self.alg_temp[slot] = params.alg_temp if policy.ordered else 0.0
        eos, turn_end = self.eos_token_id, self.turn_end_token_id
        # the mask id is never chosen, but keeps its mass: the references' confidences have it in their softmax
        no_choice, no_mass = [self.mask_token_id, -1], [-1, -1]
        if params.eos_suppression == "logits":
            no_choice[1] = no_mass[0] = eos
        elif params.eos_suppression == "confidence":
            # ML-GSAI/LLaDA:generate.py assigns -inf to EOS in the noised logits and to the end of turn in the plain
            # ones; at temperature 0 these are one tensor, above it EOS keeps its confidence
            no_mass = [-1 if sampled else eos, turn_end]
        self.no_choice[slot] = torch.tensor(no_choice, device=self.device)
        self.no_mass[slot] = torch.tensor(no_mass, device=self.device)

    def _grow(self, num_slots: int, length: int) -> None:
        old_slots, old_length = self.tokens.shape
        num_slots = max(num_slots, old_slots)
        length = old_length if length <= old_length else 1 << (length - 1).bit_length()
        if (num_slots, length) == (old_slots, old_length):
            return
        for name, old in vars(self).items():
            if isinstance(old, torch.Tensor) and name != "forbidden_mask":
                shape = (num_slots, length) if name in ("tokens", "masked") else (num_slots, *old.shape[1:])
                new = torch.full(shape, name == "masked", dtype=old.dtype, device=self.device)
                new[tuple(slice(size) for size in old.shape)] = old
                setattr(self, name, new)
        self.generation += 1
        self._free.extend(range(old_slots, num_slots))
