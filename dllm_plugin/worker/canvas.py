"""Per-request state on the device, indexed by slot: the sequence, which positions are masked, how it is decoded."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from dllm_plugin.controls import Controls
from dllm_plugin.params import HOLE
from dllm_plugin.policies import POLICIES, RANKINGS
from dllm_plugin.scheduler.output import GrammarStep, NewCanvas, Record

_MIN_SLOTS, _MIN_LENGTH = 16, 256
NEUTRAL = Controls()


@dataclass(slots=True)
class Request:
    """The host's part of a request's state. ``serial`` differs for every canvas that was ever laid out."""

    slot: int
    canvas: NewCanvas
    canvas_end: int
    emitted: int  # every position below it is settled, and the user has its token
    has_pinned: bool
    serial: int
    records: dict[int, Record] = field(default_factory=dict)  # by position: what is told when the token is emitted
    hole: int = -1  # the position that ``grammar`` is about, which has a bit for each token that may stand there
    grammar: np.ndarray | None = None


def _per_position(dtype: torch.dtype, fill: bool = False) -> dict[str, Any]:
    return {"dtype": dtype, "columns": None, "fill": fill}


def _per_slot(dtype: torch.dtype, *columns: int, fill: float = 0) -> dict[str, Any]:
    return {"dtype": dtype, "columns": columns, "fill": fill}


def _per_list(dtype: torch.dtype, dimensions: int = 1, fill: float = 0) -> dict[str, Any]:
    return {"dtype": dtype, "columns": (0,) * dimensions, "fill": fill, "is_list": True}


@dataclass
class Slots:
    """The tensors of a store, each declared once: ``[slots, length]`` in sequence positions, or ``[slots]`` and a list.

    A list that a request gives has as many columns as the longest that was ever given, none at first.
    """

    tokens: torch.Tensor = field(metadata=_per_position(torch.int64))
    masked: torch.Tensor = field(metadata=_per_position(torch.bool, fill=True))
    pinned: torch.Tensor = field(metadata=_per_position(torch.bool))  # given, not generated
    # choice; the lists are token ids padded with -1
    temperature: torch.Tensor = field(metadata=_per_slot(torch.float32))
    top_k: torch.Tensor = field(metadata=_per_slot(torch.int64))
    top_p: torch.Tensor = field(metadata=_per_slot(torch.float32))
    min_p: torch.Tensor = field(metadata=_per_slot(torch.float32))
    top_k_first: torch.Tensor = field(metadata=_per_slot(torch.bool))
    seed: torch.Tensor = field(metadata=_per_slot(torch.int64))
    stop_at: torch.Tensor = field(metadata=_per_slot(torch.int64))
    no_choice: torch.Tensor = field(metadata=_per_slot(torch.int64, 2))
    no_mass: torch.Tensor = field(metadata=_per_slot(torch.int64, 2))
    gone: torch.Tensor = field(metadata=_per_slot(torch.int64, 1))  # to filters too
    guidance: torch.Tensor = field(metadata=_per_slot(torch.float32))
    # ranking
    ranking: torch.Tensor = field(metadata=_per_slot(torch.int64))
    tempered: torch.Tensor = field(metadata=_per_slot(torch.bool))
    unfiltered: torch.Tensor = field(metadata=_per_slot(torch.bool))
    alg_temp: torch.Tensor = field(metadata=_per_slot(torch.float32))
    # controls (worker/controls.py), and where the answer is
    answer_start: torch.Tensor = field(metadata=_per_slot(torch.int64))
    answer_end: torch.Tensor = field(metadata=_per_slot(torch.int64))
    is_restricted: torch.Tensor = field(metadata=_per_slot(torch.bool))
    allowed_bits: torch.Tensor = field(metadata=_per_list(torch.int32))  # of token i, bit i % 32 of number i // 32
    phrases: torch.Tensor = field(metadata=_per_list(torch.int64, dimensions=2, fill=-1))
    no_stop_below: torch.Tensor = field(metadata=_per_slot(torch.int64))
    stop_ids: torch.Tensor = field(metadata=_per_list(torch.int64, fill=-1))
    bias_ids: torch.Tensor = field(metadata=_per_list(torch.int64))
    bias: torch.Tensor = field(metadata=_per_list(torch.float32))
    repetition: torch.Tensor = field(metadata=_per_slot(torch.float32, fill=1))
    frequency: torch.Tensor = field(metadata=_per_slot(torch.float32))
    presence: torch.Tensor = field(metadata=_per_slot(torch.float32))
    logprob_ids: torch.Tensor = field(metadata=_per_list(torch.int64, fill=-1))

    def grow(self, num_slots: int, length: int, device: torch.device) -> None:
        """Make every tensor larger, with what it holds."""
        for declared in fields(Slots):
            columns, old = declared.metadata["columns"], getattr(self, declared.name, None)
            if old is not None and "is_list" in declared.metadata:
                columns = old.shape[1:]
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

    def set_lists(self, slot: int, **lists: np.ndarray) -> bool:
        """Write lists of a slot by their names; whether a tensor had to be replaced by a wider one."""
        is_wider = False
        for name, values in lists.items():
            tensor, fill = getattr(self, name), _FILL[name]
            width = tuple(map(max, tensor.shape[1:], (power_of_two(size) for size in values.shape)))
            if width != tensor.shape[1:]:
                wider = tensor.new_full((len(tensor), *width), fill)
                wider[tuple(slice(size) for size in tensor.shape)] = tensor
                setattr(self, name, tensor := wider)
                is_wider = True
            if tensor.numel():
                tensor[slot] = fill
                tensor[slot][tuple(slice(size) for size in values.shape)] = torch.from_numpy(values).to(tensor.device)
        return is_wider


_FILL = {declared.name: declared.metadata["fill"] for declared in fields(Slots)}


def power_of_two(size: int) -> int:
    """The next one, so that batches that differ a little have tensors of one shape and a recorded step serves them all."""
    return 1 << (size - 1).bit_length() if size else 0


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
        self._controlled: set[int] = set()  # slots whose controls are not neutral
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
        if canvas.controls != NEUTRAL or canvas.logprob_ids or slot in self._controlled:
            self._set_controls(slot, canvas, end)

    def obey(self, request_id: str, step: GrammarStep) -> None:
        """Write and mask again what a grammar asks for."""
        request = self.requests[request_id]
        request.emitted, request.hole, request.grammar = step.emitted, step.hole, step.mask
        for position, token in [*step.forced.items(), *((position, self.mask_token_id) for position in step.again)]:
            self.tokens[request.slot, position] = token
            self.masked[request.slot, position] = position in step.again
            request.records.pop(position, None)

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
        no_choice, no_mass, gone = [self.mask_token_id, -1], [-1, -1], [-1]
        if params.eos_suppression == "logits":
            no_choice[1] = no_mass[0] = gone[0] = eos
        elif params.eos_suppression == "confidence":
            # ML-GSAI/LLaDA:generate.py assigns -inf to EOS in the noised logits and to the end of turn in the plain
            # ones; at temperature 0 these are one tensor, above it EOS keeps its confidence
            no_mass = [-1 if sampled else eos, turn_end]
        self.set(
            slot,
            temperature=canvas.temperature,
            top_k=canvas.top_k if filtered else 0,
            top_p=canvas.top_p if filtered else 1.0,
            min_p=canvas.min_p if filtered else 0.0,
            top_k_first=params.strategy == "block",
            seed=canvas.seed,
            stop_at=canvas.eos_token_id,
            no_choice=no_choice,
            no_mass=no_mass,
            gone=gone,
            guidance=params.cfg_scale,
            ranking=RANKINGS.index(policy.ranking),
            tempered=sampled and (policy.tempered if confidence is None else confidence != "plain"),
            unfiltered=confidence in ("plain", "tempered"),
            alg_temp=params.alg_temp if policy.ordered else 0.0,
        )

    def _set_controls(self, slot: int, canvas: NewCanvas, end: int) -> None:
        controls, start = canvas.controls, canvas.answer_start
        self._controlled.add(slot)
        self.set(
            slot,
            answer_start=start,
            answer_end=end,
            is_restricted=bool(controls.allowed),
            no_stop_below=start + controls.min_tokens,
            repetition=controls.repetition,
            frequency=controls.frequency,
            presence=controls.presence,
        )
        ids, bias = zip(*controls.bias, strict=True) if controls.bias else ((), ())
        self.generation += self.set_lists(
            slot,
            allowed_bits=bits_of(controls.allowed),
            phrases=padded(controls.phrases),
            stop_ids=np.array(controls.stop_ids, np.int64),
            bias_ids=np.array(ids, np.int64),
            bias=np.array(bias, np.float32),
            logprob_ids=np.array(canvas.logprob_ids, np.int64),
        )

    def _grow(self, num_slots: int, length: int) -> None:
        old_slots, old_length = self.tokens.shape if self.generation else (0, 0)
        num_slots = max(num_slots, old_slots)
        length = old_length if length <= old_length else 1 << (length - 1).bit_length()
        if (num_slots, length) != (old_slots, old_length):
            self.grow(num_slots, length, self.device)
            self.generation += 1
            self._free.extend(range(old_slots, num_slots))


def bits_of(ids: Sequence[int]) -> np.ndarray:
    """int32 words in which the bits of these numbers are set."""
    bits = np.zeros(-(-(max(ids, default=-1) + 1) // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """The rows as one int64 array, short ones with -1 behind them."""
    array = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int64)
    for line, row in zip(array, rows, strict=True):
        line[: len(row)] = row
    return array
