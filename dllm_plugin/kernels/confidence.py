"""The chosen token of every row of logits, and how sure the model is of it.

The choice is `argmax(logits + temperature * gumbel)`, which is a sample of softmax(logits / temperature); temperature 0 is
greedy. The statistics are of softmax(logits), or of softmax(logits / temperature) in the rows that ask for it (`tempered`):

* `probability` and `log_probability` of the chosen token;
* `margin`: probability of the best column that may be chosen minus that of the best of all the others, negative when a
  column that may not be chosen is the likeliest;
* `entropy`: `-sum(p * log(p + 1e-10))`.

`no_choice` columns are never chosen but keep their mass (the mask id: public references leave it in the softmax);
`no_mass` columns may be chosen but are dropped from the statistics, so that choosing one has probability 0. A column in
both is gone. Rows of ids are padded with -1; what is not a column, below 0 or past the last, is ignored. What a `cut` takes
out is neither drawn nor has mass; in `unfiltered` rows it keeps its mass. A row whose cut leaves nothing that may be chosen
chooses the best column that may, which then has probability 0 unless it keeps its mass.

Ties take the lowest index. Statistics are fp32. A row whose columns are all `-inf` chooses its lowest column that is not
in `no_choice`; its statistics are NaN where no column has mass, which `unmask` ranks last. A forbidden column is never
returned, whatever the logits hold. Zero rows are allowed. Noise is a function of (seed, position, timestep, column).

On a CPU the fp32 statistics have the bits of `torch.softmax(logits, -1)`: policies rank positions by them, and near 1.0 one
rounding changes the order. The kernel agrees with the rule on the token, and to 1e-5 on the statistics.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm_plugin.kernels import dispatch, philox
from dllm_plugin.kernels.confidence_triton import entropy_kernel, merge_kernel, part_kernel
from dllm_plugin.kernels.dispatch import contiguous, refuse, triton, use_triton
from dllm_plugin.kernels.filter import Cut, check_ids, no_cut, without

ENTROPY_EPSILON = 1e-10  # Dream's
_SCRATCH_BYTES = 2_000_000
_TILE, _TILE_WARPS = 1024, 4
_PARTS_PER_MULTIPROCESSOR = 16  # as many as run at a time: more of them only repeat the work at the ends of a part
_PARTIALS = 7  # score, token, maximum, sum, best logit, best column, best of the others
_DTYPES = {  # of what has one entry a row
    "unfiltered": torch.bool, "temperature": torch.float32, "tempered": torch.bool,
    "seed": torch.int64, "position": torch.int64, "timestep": torch.int64,
}  # fmt: skip
_PER_ROW = ("no_choice", "no_mass", *_DTYPES)
STATISTICS = ("log_probability", "margin", "entropy")  # computed only where a `Choice` asks for them


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What may be chosen in every row, with which noise, and which statistics are asked for."""

    no_choice: Tensor | None = None  # [rows, A] int64, padded with -1
    no_mass: Tensor | None = None  # [rows, B] int64, likewise
    temperature: Tensor | None = None  # [rows] fp32; None: all greedy
    tempered: Tensor | None = None  # [rows] bool
    cut: Cut | None = None  # found at the same temperature
    unfiltered: Tensor | None = None  # [rows] bool
    seed: Tensor | None = None  # [rows] int64, needed with `temperature` as the next two are
    position: Tensor | None = None
    timestep: Tensor | None = None
    log_probability: bool = False
    margin: bool = False
    entropy: bool = False

    @property
    def noise_keys(self) -> tuple[Tensor, Tensor, Tensor]:
        """Seed, position and timestep, where there is a `temperature`."""
        assert self.seed is not None and self.position is not None and self.timestep is not None
        return self.seed, self.position, self.timestep

    def of(self, rows: slice | Tensor) -> "Choice":
        """The choice in some of the rows."""
        per_row = ((name, getattr(self, name)) for name in _PER_ROW)
        parts = {name: tensor[rows] for name, tensor in per_row if tensor is not None}
        return replace(self, **parts, cut=None if self.cut is None else self.cut.of(rows))


@dataclass(frozen=True, slots=True)
class Confidence:
    """One entry a row; what was not asked for is None."""

    token: Tensor  # int64
    probability: Tensor  # fp32, and so are the rest
    log_probability: Tensor | None = None
    margin: Tensor | None = None
    entropy: Tensor | None = None


def confidence(logits: Tensor, choice: Choice) -> Confidence:
    """Token and statistics of `logits` [rows, vocab], any float dtype, any row stride."""
    _check(logits, choice)
    return (confidence_triton if use_triton(logits.device.type) else confidence_cpu)(logits, choice)


def confidence_rule(logits: Tensor, choice: Choice) -> Confidence:
    """The contract in float64, whose statistics are all there, asked for or not."""
    x = logits.double()
    score = without(x.clamp(min=torch.finfo(x.dtype).min), choice.no_choice)
    best = token = score.argmax(1, keepdim=True)
    cut = no_cut(logits) if choice.cut is None else choice.cut
    out = cut.takes_out(logits, choice.temperature)
    if choice.temperature is not None:
        temperature = choice.temperature[:, None].double()
        noise = philox.gumbel(*choice.noise_keys, num_columns=x.shape[1])
        drawn = (score + temperature * noise).masked_fill(out, -torch.inf)
        highest, drawn = drawn.max(1, keepdim=True)
        token = torch.where((temperature > 0) & (highest > -torch.inf), drawn, best)
        if choice.tempered is not None:
            x = torch.where(choice.tempered[:, None] & (temperature > 0), x / temperature, x)
    if choice.unfiltered is not None:
        out = out & ~choice.unfiltered[:, None]
    x = without(x.masked_fill(out, -torch.inf), choice.no_mass)
    p = x.softmax(1)
    margin = p.gather(1, best) - p.scatter(1, best, 0.0).amax(1, keepdim=True)
    return Confidence(
        token=token.squeeze(1),
        probability=p.gather(1, token).squeeze(1),
        log_probability=x.log_softmax(1).gather(1, token).squeeze(1),
        margin=margin.squeeze(1),
        entropy=-(p * (p + ENTROPY_EPSILON).log()).sum(1),
    )


def confidence_cpu(logits: Tensor, choice: Choice) -> Confidence:
    """The torch path: blocks of rows through one fp32 scratch buffer, whatever the number of rows.

    No tensor beside the result takes more than 2,000,000 bytes, or one fp32 row where that is more. No number of a row
    depends on the rows beside it.
    """
    rows, vocab = logits.shape
    at_once = rows_per_block(vocab)
    if at_once >= rows:
        changed = any(part is not None for part in (choice.no_mass, choice.tempered, choice.cut))
        x = logits.to(torch.float32, copy=changed)
        return Confidence(*_block(x, choice, overwrite=x is not logits))
    scratch = logits.new_empty((at_once, vocab), dtype=torch.float32)
    blocks = []
    for begin in range(0, rows, at_once):
        window = slice(begin, begin + at_once)
        x = scratch[: rows - begin].copy_(logits[window])
        blocks.append(_block(x, choice.of(window), overwrite=True))
    token, probability, *parts = zip(*blocks, strict=True)
    others = (None if part[0] is None else torch.cat(part) for part in parts)
    return Confidence(torch.cat(token), torch.cat(probability), *others)


def _block(
    x: Tensor, choice: Choice, overwrite: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The parts of a `Confidence` of fp32 logits `x`; False leaves them as they are where no column changes."""
    best = token = _greedy(x, choice.no_choice)
    if choice.temperature is not None:
        token = _sample(x, token, choice.temperature, choice)
    if choice.cut is not None:
        _filter(x, choice.cut, choice)
    if choice.temperature is not None and choice.tempered is not None:
        x.div_(torch.where(choice.tempered & (choice.temperature > 0), choice.temperature, 1.0)[:, None])
    if choice.no_mass is not None:
        _drop(x, choice.no_mass)

    column = token[:, None]
    if choice.log_probability:
        below_max = x.gather(1, column).squeeze(1) - x.amax(1)
    p = torch.softmax(x, -1, out=x if overwrite else None)
    return (
        token,
        p.gather(1, column).squeeze(1),
        # The likeliest column has probability 1 / normaliser, which spares a pass of log_softmax.
        below_max + p.amax(1).log() if choice.log_probability else None,
        _margin(p, best[:, None]) if choice.margin else None,
        _entropy(p) if choice.entropy else None,
    )


def _greedy(x: Tensor, no_choice: Tensor | None) -> Tensor:
    token = _first_argmax(x)
    if no_choice is not None:
        forbidden = (token.cpu().numpy()[:, None] == no_choice.cpu().numpy()).any(1)
        if forbidden.any():  # in NumPy: three calls of torch to find none would be a tenth of a small step's choice
            for row in _copied_rows(torch.from_numpy(forbidden).to(x.device), x):
                token[row] = _first_argmax(_allow(x[row], no_choice[row]))
    return token


def _sample(x: Tensor, greedy: Tensor, temperature: Tensor, choice: Choice) -> Tensor:
    """Gumbel-max samples in the rows that have a temperature, the greedy token in the others."""
    token = greedy.clone()
    for row in _copied_rows(temperature, x):
        mine, noised = choice.of(row), x[row]
        out = None if mine.cut is None else mine.cut.takes_out(noised, mine.temperature)
        _allow(noised, mine.no_choice)
        _add_noise(noised, temperature[row], *mine.noise_keys)
        if out is not None:
            noised.masked_fill_(out, float("-inf"))
        drawn = _first_argmax(noised)
        is_drawn = noised.gather(1, drawn[:, None]).squeeze(1) > float("-inf")
        token[row] = torch.where(is_drawn, drawn, greedy[row])
    return token


def _filter(x: Tensor, cut: Cut, choice: Choice) -> None:
    """Puts `-inf` into the columns that have no mass because they are out."""
    cuts = cut.logit > float("-inf")
    for row in _copied_rows(cuts if choice.unfiltered is None else cuts & ~choice.unfiltered, x):
        mine, kept = choice.of(row), x[row]
        x[row] = kept.masked_fill_(cut.of(row).takes_out(kept, mine.temperature), float("-inf"))


def _add_noise(x: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, timestep: Tensor) -> None:
    width = max(2**14 // x.shape[0], 128)  # columns at a time: the int64 words of Philox are the larger scratch
    for part, begin in zip(x.split(width, 1), range(0, x.shape[1], width), strict=True):
        bits = philox.row_bits(seed, position, timestep, philox.TOKEN, part.shape[1], begin)
        part.add_(philox.gumbel_from_bits(bits).mul_(temperature[:, None]))


def _allow(x: Tensor, no_choice: Tensor | None) -> Tensor:
    """`x` with its forbidden columns below all others, also below the `-inf` ones."""
    x.clamp_(min=torch.finfo(torch.float32).min)
    if no_choice is not None:
        _drop(x, no_choice)
    return x


def _drop(x: Tensor, ids: Tensor) -> None:
    """Puts `-inf` into the columns that the rows of `ids` name; other numbers name none."""
    if torch.equal(ids.clamp(0, x.shape[1] - 1), ids):
        x.scatter_(1, ids, float("-inf"))
    else:
        row, entry = ((ids >= 0) & (ids < x.shape[1])).nonzero(as_tuple=True)
        x[row, ids[row, entry]] = float("-inf")


def _first_argmax(x: Tensor) -> Tensor:
    """`x.argmax(1)`, lowest index on ties. On a CPU NumPy's is vectorised, and torch's takes 4 to 13 times as long."""
    return torch.from_numpy(x.numpy().argmax(1)) if x.device.type == "cpu" else x.argmax(1)


def _margin(p: Tensor, best: Tensor) -> Tensor:
    top = p.gather(1, best)
    p.scatter_(1, best, 0.0)
    margin = top.squeeze(1) - p.amax(1)
    p.scatter_(1, best, top)
    return margin


def _entropy(p: Tensor) -> Tensor:
    for part in p.split(_rows_per_copy(p)):
        part.mul_((part + ENTROPY_EPSILON).log_())
    return _sum_of_rows(p).neg_()


def _sum_of_rows(x: Tensor) -> Tensor:
    """`x.sum(1)`, with the same bits whatever the number of rows: torch would split the sum of a single one over threads,
    in another order than that of one among many."""
    return x.expand(2, -1).sum(1)[:1] if len(x) == 1 else x.sum(1)


def rows_per_block(vocab: int) -> int:
    """Rows that fit the scratch beside one that `_rows_per_copy` allows, and at least one."""
    return max(_SCRATCH_BYTES // (4 * vocab) - 1, 1)


def _copied_rows(asked: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Indices of the rows of `x` that ask, as many at a time as may be copied; nothing where none does."""
    rows = asked.nonzero().squeeze(1)
    return rows.split(_rows_per_copy(x)) if len(rows) else ()  # `split` makes one empty part of no rows


def _rows_per_copy(x: Tensor) -> int:
    return max(_SCRATCH_BYTES // (16 * x.shape[1]), 1)


def _check(logits: Tensor, choice: Choice) -> None:
    if logits.dim() != 2 or not logits.dtype.is_floating_point or logits.shape[1] == 0 or logits.stride(1) != 1:
        must = "logits must be floating [rows, vocab] with contiguous rows of at least one column"
        refuse(must, {"logits": logits}, remedy="pass logits.contiguous()")
    check_ids("no_choice", choice.no_choice, logits)
    check_ids("no_mass", choice.no_mass, logits)
    rows, device = logits.shape[0], logits.device
    tensors = {name: (getattr(choice, name), dtype) for name, dtype in _DTYPES.items()}
    if choice.cut is not None:
        tensors |= {"cut.logit": (choice.cut.logit, torch.float32), "cut.column": (choice.cut.column, torch.int32)}
    for name, (tensor, dtype) in tensors.items():
        if tensor is not None and (tensor.shape != (rows,) or tensor.dtype != dtype or tensor.device != device):
            refuse(f"{name} must be {dtype} [{rows}]", {name: tensor}, {"logits": logits})
    if choice.temperature is None:
        if choice.tempered is not None:
            raise ValueError("tempered asks for statistics at the row's temperature; pass temperature too")
        return
    for name in ("seed", "position", "timestep"):
        if getattr(choice, name) is None:
            raise ValueError(f"temperature needs {name} [{rows}] for its noise; pass it, or temperature=None")


def confidence_triton(logits: Tensor, choice: Choice) -> Confidence:
    """Two launches; the entropy, whose epsilon needs the finished normaliser, reads the logits once more."""
    rows, vocab = logits.shape
    margin, entropy = choice.margin, choice.entropy
    new = functools.partial(logits.new_empty, rows, dtype=torch.float32)
    others = (new() if wanted else None for wanted in (choice.log_probability, margin, entropy))
    result = Confidence(new(dtype=torch.int64), new(), *others)
    if rows == 0:
        return result
    no_choice, no_mass, unfiltered, temperature, tempered, *noise = contiguous(
        *(getattr(choice, name) for name in _PER_ROW)
    )
    cut = (None, None) if choice.cut is None else contiguous(choice.cut.logit, choice.cut.column)
    filters = (*cut, unfiltered)
    num_no_choice, num_no_mass = (0 if ids is None else ids.shape[1] for ids in (no_choice, no_mass))
    tile, tiles, parts = _split_rows(logits)
    num_warps = max(tile * _TILE_WARPS // _TILE, 1)
    partial = logits.new_empty((rows, _PARTIALS, parts), dtype=torch.float32)
    normalizer = logits.new_empty((rows, 2), dtype=torch.float32) if entropy else None
    # From capability 9 on the second kernel is launched while the first one ends, and waits for it on the device.
    early = dispatch.device_generation(logits.device) >= 9 and not dispatch.INTERPRETED
    part_kernel[(rows * parts,)](
        logits, logits.stride(0), no_choice, no_mass, temperature, tempered, *filters, *noise, partial,
        vocab, tiles, parts,
        NO_CHOICE=num_no_choice, NO_MASS=num_no_mass, MARGIN=margin, TOKEN_STREAM=philox.TOKEN,
        PARTIALS=_PARTIALS, BLOCK=tile, EARLY=early, num_warps=num_warps,
    )  # fmt: skip
    merge_kernel[(rows,)](
        partial, logits, logits.stride(0), no_mass, temperature, tempered, *filters, normalizer,
        result.token, result.probability, result.log_probability, result.margin, parts,
        NO_MASS=num_no_mass, MARGIN=margin, PARTIALS=_PARTIALS, BLOCK=triton.next_power_of_2(parts), EARLY=early,
        num_warps=1, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    if entropy:
        partial = logits.new_empty((rows, parts), dtype=torch.float32)
        entropy_kernel[(rows * parts,)](
            logits, logits.stride(0), no_mass, temperature, tempered, *filters, normalizer, partial,
            vocab, tiles, parts,
            NO_MASS=num_no_mass, EPSILON=ENTROPY_EPSILON, BLOCK=tile, num_warps=num_warps,
        )  # fmt: skip
        torch.sum(partial, 1, out=result.entropy).neg_()
    return result


def _split_rows(logits: Tensor) -> tuple[int, int, int]:
    """Columns of a tile, tiles of a part, parts of a row."""
    rows, vocab = logits.shape
    tile = min(_TILE, max(triton.next_power_of_2(vocab), 128))
    tiles = triton.cdiv(vocab, tile)
    slots = _PARTS_PER_MULTIPROCESSOR * dispatch.num_multiprocessors(logits.device)
    parts = triton.cdiv(tiles, min(max(triton.cdiv(rows * tiles, slots), 1), tiles))
    return tile, triton.cdiv(tiles, parts), parts
