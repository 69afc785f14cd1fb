"""Per-request state on the device, indexed by slot: the sequence, which positions are masked, how it is decoded."""

from dataclasses import dataclass, field, fields
from typing import Any

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


def _per_position(dtype: torch.dtype, fill: bool = False) -> dict[str, Any]:
    return {"dtype": dtype, "columns": None, "fill": fill}


def _per_slot(dtype: torch.dtype, *columns: int) -> dict[str, Any]:
    return {"dtype": dtype, "columns": columns, "fill": 0}


@dataclass
class Slots:
    """The tensors of a store, each declared once: ``[slots, length]`` in sequence positions, or ``[slots]`` and a list."""

    tokens: torch.Tensor = field(metadata=_per_position(torch.int64))
    masked: torch.Tensor = field(metadata=_per_position(torch.bool, fill=True))
    pinned: torch.Tensor = field(metadata=_per_position(torch.bool))  # given, not generated
    # choice; the lists are token ids padded with -1
    temperature: torch.Tensor = field(metadata=_per_slot(torch.float32))
    top_k: torch.Tensor = field(metadata=_per_slot(torch.int64))
    top_p: torch.Tensor = field(metadata=_per_slot(torch.float32))
    top_k_first: torch.Tensor = field(metadata=_per_slot(torch.bool))
    seed: torch.Tensor = field(metadata=_per_slot(torch.int64))
    stop_at: torch.Tensor = field(metadata=_per_slot(torch.int64))
    no_choice: torch.Tensor = field(metadata=_per_slot(torch.int64, 2))
    no_mass: torch.Tensor = field(metadata=_per_slot(torch.int64, 2))
    guidance: torch.Tensor = field(metadata=_per_slot(torch.float32))
    # ranking
    ranking: torch.Tensor = field(metadata=_per_slot(torch.int64))
    tempered: torch.Tensor = field(metadata=_per_slot(torch.bool))
    unfiltered: torch.Tensor = field(metadata=_per_slot(torch.bool))
    alg_temp: torch.Tensor = field(metadata=_per_slot(torch.float32))

    def grow(self, num_slots: int, length: int, device: torch.device) -> None:
        """Make every tensor larger, with what it holds."""
        for declared in fields(Slots):
            columns, old = declared.metadata["columns"], getattr(self, declared.name, None)
            shape = (num_slots, *((length,) if columns is None else columns))
            new = torch.full(shape, declared.metadata["fill"], dtype=declared.metadata["dtype"], device=device)
            if old is not None:
                new[tuple(slice(size) for size in old.shape)] = old
            setattr(self, declared.name, new)

    def set(self, slot: int, **numbers: float | list[int]) -> None:
        """Write the numbers of a slot by their names."""
        for name, number in numbers.items():
            tensor = getattr(self, name)
            tensor[slot] = torch.tensor(number, device=tensor.device) if isinstance(number, list) else number


class CanvasStore(Slots):
    """Sequences being denoised. A slot belongs to one request from its first window until it ends or is preempted.

    In ``tokens`` and ``masked`` the prompt comes first, never masked even where it holds the mask id, then the canvas, then
    the suffix; what lies behind counts as masked, so that no unmasked prefix reaches it. All tensors grow to what is asked
    of them.
    """

    def __init__(self, mask_token_id: int, eos_token_id: int, turn_end_token_id: int, device: torch.device) -> None:
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.turn_end_token_id = turn_end_token_id
        self.device = device
        self.requests: dict[str, Request] = {}
        self.forbidden_mask = torch.tensor([[mask_token_id]], device=device)
        self.generation = 0  # goes up when the tensors are replaced by larger ones
        self._free: list[int] = []
        self._num_begun = 0
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
        self.pinned[slot, : len(sequence)] = True
        self.pinned[slot, start:end] = ~masked
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
        sampled, confidence = canvas.temperature > 0, params.confidence
        filtered = sampled or policy.filters_greedy
        eos, turn_end = self.eos_token_id, self.turn_end_token_id
        # the mask id is never chosen, but keeps its mass: the references' confidences have it in their softmax
        no_choice, no_mass = [self.mask_token_id, -1], [-1, -1]
        if params.eos_suppression == "logits":
            no_choice[1] = no_mass[0] = eos
        elif params.eos_suppression == "confidence":
            # ML-GSAI/LLaDA:generate.py assigns -inf to EOS in the noised logits and to the end of turn in the plain
            # ones; at temperature 0 these are one tensor, above it EOS keeps its confidence
            no_mass = [-1 if sampled else eos, turn_end]
        self.set(
            slot,
            temperature=canvas.temperature,
            top_k=canvas.top_k if filtered else 0,
            top_p=canvas.top_p if filtered else 1.0,
            top_k_first=params.strategy == "block",
            seed=canvas.seed,
            stop_at=canvas.eos_token_id,
            no_choice=no_choice,
            no_mass=no_mass,
            guidance=params.cfg_scale,
            ranking=RANKINGS.index(policy.ranking),
            tempered=sampled and (policy.tempered if confidence is None else confidence != "plain"),
            unfiltered=confidence in ("plain", "tempered"),
            alg_temp=params.alg_temp if policy.ordered else 0.0,
        )

    def _grow(self, num_slots: int, length: int) -> None:
        old_slots, old_length = self.tokens.shape if self.generation else (0, 0)
        num_slots = max(num_slots, old_slots)
        length = old_length if length <= old_length else 1 << (length - 1).bit_length()
        if (num_slots, length) != (old_slots, old_length):
            self.grow(num_slots, length, self.device)
            self.generation += 1
            self._free.extend(range(old_slots, num_slots))
