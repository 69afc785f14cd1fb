"""Which columns of a row of logits min-p, top-k and top-p leave to choose from, as the one column that ends them.

Columns are ranked by logit, divided in fp32 by the row's temperature (0: as they are): highest first, the lowest index first
among equal ones. Each filter keeps columns from the first to some last one, so that a `Cut` says what all of them leave:

* min-p comes first and keeps the columns not below `max + log(min_p)`, whose probability is at least `min_p` times the
  largest (vllm/v1/sample/logits_processor/builtin.py, `MinPLogitsProcessor`);
* top-k keeps every column that is not below the k-th of these;
* top-p keeps a column when those before it have no more than `top_p` of the mass, so at least one. The mass is that of
  what min-p leaves (Dream), or with `k_first` that of what top-k leaves of it (SDAR, vLLM).

A row that asks for nothing, or whose columns are all `-inf`, has a cut of `-inf`, which takes nothing out; so may a row with
NaN. Zero rows are allowed. All paths agree on top-k to the column; on min-p and top-p too, but where a column is within fp32
rounding of `max + log(min_p)`, or the mass before it of `top_p`. The kernel sums fp32 exponentials relative to the highest
logit, in an order that follows from the columns of the row alone; nothing is summed atomically, nothing waits for the host.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm_plugin.kernels import dispatch
from dllm_plugin.kernels.dispatch import contiguous, refuse, triton, use_triton
from dllm_plugin.kernels.filter_triton import select_kernel, survey_kernel

_SCRATCH_BYTES = 8_000_000
_BYTES_PER_COLUMN = 32  # of a row that is sorted: values, columns, sums of probabilities, and what sorting takes itself
_TILE, _TILE_WARPS = 4096, 4
_GROUP = 64  # columns whose highest logit tells whether any of them can be kept
_SELECT_TILE, _SELECT_WARPS, _SELECTS_PER_MULTIPROCESSOR = 2048, 8, 2
_TRAILING_ZEROS = {torch.bfloat16: 16, torch.float16: 13}  # of their bits as fp32
_KINDS = {"temperature": "floating", "top_k": "integer", "top_p": "floating", "min_p": "floating", "k_first": "bool"}
_PER_ROW = (*_KINDS, "gone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What every row asks for, `[rows]` each; None: nobody does."""

    temperature: Tensor | None = None  # floating, 0: greedy, which divides nothing
    top_k: Tensor | None = None  # integer, 0: off; may exceed the vocabulary
    top_p: Tensor | None = None  # floating, 1: off
    min_p: Tensor | None = None  # floating, 0: off
    k_first: Tensor | None = None  # bool
    gone: Tensor | None = None  # [rows, A] int64: columns that count as -inf; -1 and what else is none are ignored

    def of(self, rows: Tensor) -> "Filters":
        """Those of some of the rows."""
        per_row = ((name, getattr(self, name)) for name in _PER_ROW)
        return replace(self, **{name: tensor[rows] for name, tensor in per_row if tensor is not None})

    def asked(self) -> Tensor:
        """Which rows have a filter, [rows] bool; empty where none is given."""
        asked = [] if self.top_k is None else [self.top_k > 0]
        asked += [] if self.top_p is None else [self.top_p < 1]
        asked += [] if self.min_p is None else [self.min_p > 0]
        return torch.stack(asked).any(0) if asked else torch.empty(0, dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class Cut:
    """The last column that is kept of every row: its logit, divided by the temperature, and its index.

    Columns of lower logits are out, and those of the same logit behind it.
    """

    logit: Tensor  # [rows] fp32, -inf: nothing is out
    column: Tensor  # [rows] int32

    def of(self, rows: slice | Tensor) -> "Cut":
        return Cut(self.logit[rows], self.column[rows])

    def takes_out(self, logits: Tensor, temperature: Tensor | None) -> Tensor:
        """Whether a column is out, bool [rows, vocab]."""
        x, column = divided(logits, temperature), torch.arange(logits.shape[1], device=logits.device)
        logit = self.logit[:, None]
        return (logit > -torch.inf) & ((x < logit) | ((x == logit) & (column > self.column[:, None])))


def divided(logits: Tensor, temperature: Tensor | None) -> Tensor:
    """fp32 logits [rows, vocab], divided by the temperature [rows] where there is one."""
    x = logits.float()
    return x if temperature is None else x / divisor(temperature)


def divisor(temperature: Tensor) -> Tensor:
    """What the logits of a row are divided by, fp32 [rows, 1]."""
    return torch.where(temperature > 0, temperature, 1.0).float()[:, None]


def find_cut(logits: Tensor, filters: Filters) -> Cut:
    """The cut of every row of `logits` [rows, vocab], any float dtype, any row stride."""
    _check(logits, filters)
    return (find_cut_triton if use_triton(logits.device.type) else find_cut_cpu)(logits, filters)


def find_cut_rule(logits: Tensor, filters: Filters) -> Cut:
    """The contract, row by row, with logarithms and sums in float64."""
    cut = no_cut(logits)
    x = without(divided(logits, filters.temperature).clone(), filters.gone)
    for row in range(len(x)):
        k, p, m, k_first = (
            default if (tensor := getattr(filters, name)) is None else tensor[row].item()
            for name, default in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("k_first", False))
        )
        values, column = x[row].double().sort(descending=True, stable=True)
        num_kept = int((values > -torch.inf).sum())
        if num_kept == 0 or (k <= 0 and p >= 1 and m <= 0):
            continue
        if m > 0:
            num_kept = int((values >= values[0] + torch.tensor(m).double().log()).sum())
        num_weighed = num_kept
        if 0 < k < num_kept:
            num_kept = min(num_kept, int((values >= values[int(k) - 1]).sum()))
        if p < 1:
            mass = values[: num_kept if k_first else num_weighed].softmax(0)
            num_kept = min(num_kept, int((mass.cumsum(0) - mass <= p).sum()))
        cut.logit[row], cut.column[row] = values[num_kept - 1], column[num_kept - 1]
    return cut


def no_cut(logits: Tensor) -> Cut:
    """That of rows which have no filter."""
    rows, vocab = logits.shape
    return Cut(
        torch.full((rows,), -torch.inf, device=logits.device),
        torch.full((rows,), vocab, dtype=torch.int32, device=logits.device),
    )


def without(x: Tensor, ids: Tensor | None) -> Tensor:
    """Puts `-inf` into the columns that the rows of `ids` name."""
    for entry in () if ids is None else ids.unbind(1):
        x.masked_fill_(entry[:, None] == torch.arange(x.shape[1], device=x.device), -torch.inf)
    return x


def find_cut_cpu(logits: Tensor, filters: Filters) -> Cut:
    """The torch path: sorts the rows that ask, as many at a time as 8 MB of scratch hold, and at least one."""
    cut, asked = no_cut(logits), filters.asked()
    if not asked.any():
        return cut
    at_once = max(_SCRATCH_BYTES // (_BYTES_PER_COLUMN * logits.shape[1]), 1)
    for block in asked.nonzero().squeeze(1).split(at_once):
        cut.logit[block], column = _last_kept(logits[block].float(), filters.of(block))
        cut.column[block] = column.to(torch.int32)
    return cut


def _last_kept(x: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    """Logit and column of the cuts of fp32 logits, which are overwritten."""
    top_k, top_p, min_p, k_first = filters.top_k, filters.top_p, filters.min_p, filters.k_first
    vocab = x.shape[1]
    if filters.temperature is not None:
        x.div_(divisor(filters.temperature))
    values, column = without(x, filters.gone).sort(dim=1, descending=True, stable=True)
    if min_p is not None:
        values.masked_fill_(values < values[:, :1] + min_p.float().log()[:, None], -torch.inf)
    if top_k is not None:
        kth = values.gather(1, torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).to(torch.int64)[:, None] - 1)
        is_below = values < kth
        if k_first is not None:
            values.masked_fill_(is_below & k_first[:, None], -torch.inf)
    if top_p is not None:
        mass = values.softmax(1)
        torch.cumsum(mass, 1, out=mass)
        # At 1 the filter is off: the sum may round past 1 before the last column.
        limit = torch.where(top_p < 1, top_p, torch.inf)
        values[:, 1:].masked_fill_(mass[:, :-1] > limit[:, None], -torch.inf)
    if top_k is not None:
        values.masked_fill_(is_below, -torch.inf)
    last = (values > -torch.inf).sum(1, keepdim=True).clamp_(min=1) - 1
    return values.gather(1, last).squeeze(1), column.gather(1, last).squeeze(1)


def _check(logits: Tensor, filters: Filters) -> None:
    if logits.dim() != 2 or not logits.dtype.is_floating_point or logits.shape[1] == 0 or logits.stride(1) != 1:
        must = "logits must be floating [rows, vocab] with contiguous rows of at least one column"
        refuse(must, {"logits": logits}, remedy="pass logits.contiguous()")
    rows = logits.shape[0]
    for name, kind in _KINDS.items():
        if (tensor := getattr(filters, name)) is None:
            continue
        is_kind = "floating" if tensor.dtype.is_floating_point else "bool" if tensor.dtype == torch.bool else "integer"
        if is_kind != kind or tensor.shape != (rows,) or tensor.device != logits.device:
            refuse(f"{name} must be {kind} [{rows}]", {name: tensor}, {"logits": logits})
    check_ids("gone", filters.gone, logits)


def check_ids(name: str, ids: Tensor | None, logits: Tensor) -> None:
    """Refuses what cannot be lists of columns of these rows, by shape, dtype and device."""
    if ids is None:
        return
    rows = logits.shape[0]
    if ids.dim() != 2 or ids.shape[0] != rows or ids.dtype != torch.int64 or ids.device != logits.device:
        refuse(f"{name} must be int64 [{rows}, n], padded with -1", {name: ids}, {"logits": logits})


def find_cut_triton(logits: Tensor, filters: Filters) -> Cut:
    """Two launches: one that reads the logits, and one with a program a row, which reads what may be kept once more.

    Scratch beside a 64th of the logits: an fp32 row for every program that runs at a time.
    """
    rows, vocab = logits.shape
    cut = Cut(logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.int32))
    if rows == 0:
        return cut
    asks = contiguous(filters.temperature, filters.top_k, filters.top_p, filters.min_p)
    k_first, gone = contiguous(filters.k_first, filters.gone)
    num_gone = 0 if gone is None else gone.shape[1]
    tile = min(_TILE, max(triton.next_power_of_2(vocab), 2 * _GROUP))
    tiles = triton.cdiv(vocab, tile)
    groups = tiles * (tile // _GROUP)
    group_max = logits.new_empty((rows, groups), dtype=torch.float32)
    tile_mass = logits.new_empty((rows, 2, tiles), dtype=torch.float32)
    survey_kernel[(rows * tiles,)](
        logits, logits.stride(0), gone, *asks, group_max, tile_mass, vocab, groups, tiles,
        GONE=num_gone, GROUP=_GROUP, BLOCK=tile, num_warps=_TILE_WARPS,
    )  # fmt: skip
    programs = min(rows, _SELECTS_PER_MULTIPROCESSOR * dispatch.num_multiprocessors(logits.device))
    kept = logits.new_empty((programs, vocab), dtype=torch.float32)
    kept_groups = logits.new_empty((programs, groups), dtype=torch.int32)
    select_kernel[(programs,)](
        logits, logits.stride(0), gone, *asks, k_first, group_max, tile_mass, kept, kept_groups, cut.logit, cut.column,
        rows, vocab, groups, tiles,
        GONE=num_gone, GROUP=_GROUP, TILES=triton.next_power_of_2(tiles),
        ZEROS=_TRAILING_ZEROS.get(logits.dtype, 0), BLOCK=min(tile, _SELECT_TILE), num_warps=_SELECT_WARPS,
    )  # fmt: skip
    return cut
