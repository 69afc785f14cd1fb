"""The chosen token of every row of logits, and how sure the model is of it.

The choice is `argmax(logits + temperature * gumbel)`, which is a sample of softmax(logits / temperature); temperature 0 is
greedy. The statistics are of softmax(logits), or of softmax(logits / temperature) in the rows that ask for it (`tempered`):

* `probability` and `log_probability` of the chosen token;
* `margin`: probability of the best column that may be chosen minus that of the best of all the others, negative when a
  column that may not be chosen is the likeliest;
* `entropy`: `-sum(p * log(p + 1e-10))`.

`no_choice` columns are never chosen but keep their mass (the mask id: public references leave it in the softmax);
`no_mass` columns may be chosen but are dropped from the statistics, so that choosing one has probability 0. A column in
both is gone. Rows of ids are padded with -1; what is not a column, below 0 or past the last, is ignored.

Ties take the lowest index. Statistics are fp32. A row whose columns are all `-inf` chooses its lowest column that is not
in `no_choice`; its statistics are NaN where no column has mass, which `unmask` ranks last. A forbidden column is never
returned, whatever the logits hold. Zero rows are allowed. Noise is a function of (seed, position, step, column).

On a CPU the fp32 statistics have the bits of `torch.softmax(logits, -1)`: policies rank positions by them, and near 1.0 one
rounding changes the order. The kernel agrees with the reference on the token, and to 1e-5 on the statistics.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_plugin.kernels import philox
from dllm_plugin.kernels.dispatch import (
    INTERPRETED,
    contiguous,
    device_generation,
    num_multiprocessors,
    refuse_devices,
    tl,
    triton,
    use_triton,
)

ENTROPY_EPSILON = 1e-10  # Dream's
_SCRATCH_BYTES = 2_000_000


@dataclass(frozen=True, slots=True)
class Confidence:
    """One entry a row; what was not asked for is None."""

    token: Tensor  # int64
    probability: Tensor  # fp32, and so are the rest
    log_probability: Tensor | None = None
    margin: Tensor | None = None
    entropy: Tensor | None = None


def confidence(
    logits: Tensor,
    *,
    no_choice: Tensor | None = None,
    no_mass: Tensor | None = None,
    temperature: Tensor | None = None,
    tempered: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
    step: Tensor | None = None,
    log_probability: bool = False,
    margin: bool = False,
    entropy: bool = False,
) -> Confidence:
    """Token and statistics of `logits` [rows, vocab], any float dtype, any row stride.

    `no_choice` [rows, A] and `no_mass` [rows, B] int64; `temperature` [rows] fp32 (None: all greedy); `tempered` [rows] bool;
    `seed`, `position`, `step` [rows] int64, needed with `temperature`.
    """
    check_arguments(logits, no_choice, no_mass, temperature, tempered, seed, position, step)
    run = confidence_triton if use_triton(logits.device.type) else confidence_reference
    return run(
        logits,
        no_choice,
        no_mass,
        temperature,
        tempered,
        (seed, position, step),
        log_probability,
        margin,
        entropy,
    )


def confidence_reference(
    logits: Tensor,
    no_choice: Tensor | None,
    no_mass: Tensor | None,
    temperature: Tensor | None,
    tempered: Tensor | None,
    noise: tuple[Tensor | None, Tensor | None, Tensor | None],
    log_probability: bool,
    margin: bool,
    entropy: bool,
) -> Confidence:
    """The torch path: blocks of rows through one fp32 scratch buffer, whatever the number of rows.

    No tensor beside the result takes more than 2,000,000 bytes up to a vocabulary of 250,000, nor more than two fp32 rows
    above it, see `rows_per_block`.
    """
    rows, vocab = logits.shape
    per_row = [no_choice, no_mass, temperature, tempered, *noise]
    step = rows_per_block(vocab)
    if step >= rows:
        changed = no_mass is not None or tempered is not None
        x = logits.to(torch.float32, copy=changed)
        return Confidence(*_block(x, *per_row, log_probability, margin, entropy, overwrite=x is not logits))
    scratch = logits.new_empty((step, vocab), dtype=torch.float32)
    blocks = []
    for begin in range(0, rows, step):
        # The last block reaches back instead of being short: torch splits the sum of a single row over threads.
        first = min(begin, rows - step)
        window = slice(first, first + step)
        block = _block(
            scratch.copy_(logits[window]),
            *(None if tensor is None else tensor[window] for tensor in per_row),
            log_probability,
            margin,
            entropy,
            overwrite=True,
        )
        blocks.append([None if tensor is None else tensor[begin - first :] for tensor in block])
    return Confidence(*(None if column[0] is None else torch.cat(column) for column in zip(*blocks, strict=True)))


def _block(
    x: Tensor,
    no_choice: Tensor | None,
    no_mass: Tensor | None,
    temperature: Tensor | None,
    tempered: Tensor | None,
    seed: Tensor | None,
    position: Tensor | None,
    step: Tensor | None,
    log_probability: bool,
    margin: bool,
    entropy: bool,
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Token, probability and statistics of fp32 logits `x`; False leaves them as they are where no column changes."""
    best = token = _greedy(x, no_choice)
    if temperature is not None:
        token = _sample(x, token, no_choice, temperature, seed, position, step)
    temper(x, temperature, tempered)
    if no_mass is not None:
        drop(x, no_mass)

    column = token[:, None]
    if log_probability:
        below_max = x.gather(1, column).squeeze(1) - x.amax(1)
    p = torch.softmax(x, -1, out=x if overwrite else None)
    return (
        token,
        p.gather(1, column).squeeze(1),
        # The likeliest column has probability 1 / normaliser, which spares a pass of log_softmax.
        below_max + p.amax(1).log() if log_probability else None,
        _margin(p, best[:, None]) if margin else None,
        _entropy(p) if entropy else None,
    )


def _greedy(x: Tensor, no_choice: Tensor | None) -> Tensor:
    token = first_argmax(x)
    if no_choice is not None:
        forbidden = (token.cpu().numpy()[:, None] == no_choice.cpu().numpy()).any(1)
        if forbidden.any():
            for row in torch.from_numpy(forbidden.nonzero()[0]).to(x.device).split(_rows_per_copy(x)):
                token[row] = first_argmax(allow(x[row], no_choice[row]))
    return token


def _sample(
    x: Tensor,
    greedy: Tensor,
    no_choice: Tensor | None,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
) -> Tensor:
    """Gumbel-max samples in the rows that have a temperature, the greedy token in the others."""
    token = greedy.clone()
    for row in temperature.nonzero().squeeze(1).split(_rows_per_copy(x)):
        noised = allow(x[row], None if no_choice is None else no_choice[row])
        add_noise(noised, temperature[row], seed[row], position[row], step[row])
        token[row] = first_argmax(noised)
    return token


def add_noise(x: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, step: Tensor) -> None:
    width = max(2**14 // x.shape[0], 128)  # columns at a time: the int64 words of Philox are the larger scratch
    for part, begin in zip(x.split(width, 1), range(0, x.shape[1], width), strict=True):
        bits = philox.row_bits(seed, position, step, philox.TOKEN, part.shape[1], begin)
        part.add_(philox.gumbel_from_bits(bits).mul_(temperature[:, None]))


def temper(x: Tensor, temperature: Tensor | None, tempered: Tensor | None) -> None:
    """Divides the tempered rows of `x` by their temperature."""
    if tempered is not None:
        x.div_(torch.where(tempered & (temperature > 0), temperature, 1.0)[:, None])


def allow(x: Tensor, no_choice: Tensor | None) -> Tensor:
    """`x` with its forbidden columns below all others, also below the `-inf` ones."""
    x.clamp_(min=torch.finfo(torch.float32).min)
    if no_choice is not None:
        drop(x, no_choice)
    return x


def drop(x: Tensor, ids: Tensor) -> None:
    """Puts `-inf` into the columns that the rows of `ids` name; other numbers name none."""
    if torch.equal(ids.clamp(0, x.shape[1] - 1), ids):
        x.scatter_(1, ids, float("-inf"))
    else:
        row, entry = ((ids >= 0) & (ids < x.shape[1])).nonzero(as_tuple=True)
        x[row, ids[row, entry]] = float("-inf")


def first_argmax(x: Tensor) -> Tensor:
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
    return p.sum(1).neg_()


def rows_per_block(vocab: int) -> int:
    """Rows that fit the scratch beside one that `_rows_per_copy` allows, but at least two, though two exceed it above a
    vocabulary of 250,000: torch sums a single row over threads, in another order than one of many, and the entropy would
    lose its bits."""
    return max(_SCRATCH_BYTES // (4 * vocab) - 1, 2)


def _rows_per_copy(x: Tensor) -> int:
    return max(_SCRATCH_BYTES // (16 * x.shape[1]), 1)


def check_arguments(
    logits: Tensor,
    no_choice: Tensor | None,
    no_mass: Tensor | None,
    temperature: Tensor | None,
    tempered: Tensor | None,
    *noise: Tensor | None,
) -> None:
    """`noise`: seed, position and step, left out where nothing is drawn."""
    if logits.dim() != 2 or not logits.dtype.is_floating_point or logits.shape[1] == 0 or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be floating [rows, vocab] with contiguous rows of at least one column, got {logits.dtype} "
            f"{list(logits.shape)} with strides {logits.stride()}; pass logits.contiguous()"
        )
    rows, device = logits.shape[0], logits.device
    for name, ids in (("no_choice", no_choice), ("no_mass", no_mass)):
        if ids is None:
            continue
        if ids.dim() != 2 or ids.shape[0] != rows or ids.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 [{rows}, n], padded with -1, got {ids.dtype} {list(ids.shape)}")
        if ids.device != device:
            refuse_devices(logits=logits, **{name: ids})
    if temperature is None:
        if tempered is not None:
            raise ValueError("tempered asks for statistics at the row's temperature; pass temperature too")
        return
    for name, tensor, dtype in (
        ("temperature", temperature, torch.float32),
        ("tempered", tempered, torch.bool),
        *zip(("seed", "position", "step"), noise, (torch.int64,) * 3, strict=False),
    ):
        if tensor is None:
            if name != "tempered":
                raise ValueError(f"temperature needs {name} [{rows}] for its noise; pass it, or temperature=None")
        elif tensor.shape != (rows,) or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} [{rows}], got {tensor.dtype} {list(tensor.shape)}")
        elif tensor.device != device:
            refuse_devices(logits=logits, **{name: tensor})


# A program reads some tiles of a row once. It keeps a maximum and a sum for every eight neighbouring columns, so that an
# element costs a conversion, two comparisons and an exponential and nothing crosses threads inside the loop, and finds the
# winning column at the end by reading its eight again. It leaves seven numbers, which a second kernel merges in the order
# of the columns. Nothing is summed atomically. Column ids travel as fp32, exact below 2**24.
_TILE, _TILE_WARPS = 1024, 4
_PARTS_PER_MULTIPROCESSOR = 16  # as many as run at a time: more of them only repeat the work at the ends of a part
_PARTIALS = 7  # score, token, maximum, sum, best logit, best column, best of the others


def confidence_triton(
    logits: Tensor,
    no_choice: Tensor | None,
    no_mass: Tensor | None,
    temperature: Tensor | None,
    tempered: Tensor | None,
    noise: tuple[Tensor | None, Tensor | None, Tensor | None],
    log_probability: bool,
    margin: bool,
    entropy: bool,
) -> Confidence:
    """Two launches; the entropy, whose epsilon needs the finished normaliser, reads the logits once more."""
    rows = logits.shape[0]
    result = Confidence(
        logits.new_empty(rows, dtype=torch.int64),
        *(
            logits.new_empty(rows, dtype=torch.float32) if wanted else None
            for wanted in (True, log_probability, margin, entropy)
        ),
    )
    if rows == 0:
        return result
    vocab = logits.shape[1]
    no_choice, no_mass, temperature, tempered, *noise = contiguous(no_choice, no_mass, temperature, tempered, *noise)
    num_no_choice, num_no_mass = (0 if ids is None else ids.shape[1] for ids in (no_choice, no_mass))
    tile, tiles, parts = _split_rows(logits)
    num_warps = max(tile * _TILE_WARPS // _TILE, 1)
    partial = logits.new_empty((rows, _PARTIALS, parts), dtype=torch.float32)
    normalizer = logits.new_empty((rows, 2), dtype=torch.float32) if entropy else None
    # From capability 9 on the second kernel is launched while the first one ends, and waits for it on the device.
    early = device_generation(logits.device) >= 9 and not INTERPRETED
    _part_kernel[(rows * parts,)](
        logits, logits.stride(0), no_choice, no_mass, temperature, tempered, *noise, partial,
        vocab, tiles, parts,
        NO_CHOICE=num_no_choice, NO_MASS=num_no_mass, MARGIN=margin, TOKEN_STREAM=philox.TOKEN,
        PARTIALS=_PARTIALS, BLOCK=tile, EARLY=early, num_warps=num_warps,
    )  # fmt: skip
    _merge_kernel[(rows,)](
        partial, logits, logits.stride(0), no_mass, temperature, tempered, normalizer,
        result.token, result.probability, result.log_probability, result.margin, parts,
        NO_MASS=num_no_mass, MARGIN=margin, PARTIALS=_PARTIALS, BLOCK=triton.next_power_of_2(parts), EARLY=early,
        num_warps=1, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    if entropy:
        partial = logits.new_empty((rows, parts), dtype=torch.float32)
        _entropy_kernel[(rows * parts,)](
            logits, logits.stride(0), no_mass, temperature, tempered, normalizer, partial,
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
    slots = _PARTS_PER_MULTIPROCESSOR * num_multiprocessors(logits.device)
    parts = triton.cdiv(tiles, min(max(triton.cdiv(rows * tiles, slots), 1), tiles))
    return tile, triton.cdiv(tiles, parts), parts


@triton.jit
def _temper(x, row, temperature_ptr, tempered_ptr):
    """The logits that the statistics are of."""
    if tempered_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
        if tl.load(tempered_ptr + row) & (temperature > 0):
            x = x / temperature
    return x


@triton.jit
def _without(x, column, row, ids_ptr, COUNT: tl.constexpr):
    """`x` with `-inf` in the columns that the row's ids name."""
    for entry in tl.static_range(COUNT):
        x = tl.where(column == tl.load(ids_ptr + row * COUNT + entry), float("-inf"), x)
    return x


@triton.jit
def _any_inside(first, row, ids_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Whether one of the row's ids lies in a tile. Few do: the other tiles are spared the comparison of their columns."""
    inside = first < first
    for entry in tl.static_range(COUNT):
        column = tl.load(ids_ptr + row * COUNT + entry)
        inside = inside | ((column >= first) & (column < first + BLOCK))
    return inside


@triton.jit
def _first_of_eight(score, column):
    """Lowest column of the highest of eight scores, past all columns if none is a number above -inf."""
    highest = tl.max(score, 0)
    return tl.min(tl.where((score == highest) & (score > float("-inf")), column, 2147483647), 0)


@triton.jit
def _part_kernel(
    logits_ptr, logits_stride, no_choice_ptr, no_mass_ptr, temperature_ptr, tempered_ptr, seed_ptr, position_ptr,
    step_ptr, partial_ptr,
    vocab, tiles, parts,
    NO_CHOICE: tl.constexpr, NO_MASS: tl.constexpr, MARGIN: tl.constexpr, TOKEN_STREAM: tl.constexpr,
    PARTIALS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The seven numbers of one part of one row."""
    GROUPS: tl.constexpr = BLOCK // 8
    lowest = float("-inf")
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    logits = logits_ptr + row * logits_stride
    first = part * tiles * BLOCK
    noisy = False
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
        noisy = temperature > 0
        seed, position, step = tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.load(step_ptr + row)

    best = tl.full([GROUPS], lowest, tl.float32)  # of what may be chosen, and the tile where it was first seen
    best_tile = tl.zeros([GROUPS], tl.int32)
    drawn, drawn_tile = best, best_tile  # the same with noise
    peak, peak_tile = best, best_tile  # of what has mass
    second = best  # the highest after it, of another tile
    total = tl.zeros([GROUPS], tl.float32)  # sum of exponentials relative to the peak
    end = tl.minimum(first + tiles * BLOCK, vocab)
    for tile in range(tiles):
        start = first + tile * BLOCK
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < end, other=lowest).to(tl.float32)
        high = tl.max(tl.reshape(x, [GROUPS, 8]), 1)
        top = high
        if _any_inside(start, row, no_choice_ptr, NO_CHOICE, BLOCK):
            top = tl.max(tl.reshape(_without(x, column, row, no_choice_ptr, NO_CHOICE), [GROUPS, 8]), 1)
        best_tile = tl.where(top > best, tile, best_tile)
        best = tl.maximum(best, top)
        if temperature_ptr is not None:
            if noisy:
                bits = philox.row_bits_block(seed, position, step, start // 4, TOKEN_STREAM, BLOCK // 4)
                score = _without(x, column, row, no_choice_ptr, NO_CHOICE)
                score += temperature * philox.gumbel_from_bits_block(bits)
                top = tl.max(tl.reshape(score, [GROUPS, 8]), 1)
            drawn_tile = tl.where(top > drawn, tile, drawn_tile)
            drawn = tl.maximum(drawn, top)

        logit = _temper(x, row, temperature_ptr, tempered_ptr)
        if _any_inside(start, row, no_mass_ptr, NO_MASS, BLOCK):
            logit = _without(logit, column, row, no_mass_ptr, NO_MASS)
        logit = tl.reshape(logit, [GROUPS, 8])
        if NO_MASS > 0 or tempered_ptr is not None:
            high = tl.max(logit, 1)
        if MARGIN:
            second = tl.maximum(second, tl.minimum(high, peak))
            peak_tile = tl.where(high > peak, tile, peak_tile)
        higher = tl.maximum(peak, high)
        base = tl.where(higher == lowest, 0.0, higher)  # or no mass so far would subtract -inf from -inf
        weights = tl.exp2((logit - base[:, None]) * 1.4426950408889634)
        total = total * tl.exp2((peak - base) * 1.4426950408889634) + tl.sum(weights, 1)
        peak = higher

    # The lowest column of the best score: the first tile, in it the first group, in it the first of its eight.
    eight, group = tl.arange(0, 8), tl.arange(0, GROUPS)
    best_score = tl.max(best, 0)
    best_group = tl.min(tl.where(best == best_score, best_tile * GROUPS + group, tiles * GROUPS - 1), 0)
    near = first + best_group * 8 + eight
    near_x = tl.load(logits + near, mask=near < vocab, other=lowest).to(tl.float32)
    best_column = _first_of_eight(_without(near_x, near, row, no_choice_ptr, NO_CHOICE), near)
    if (best_score > lowest) == 0:
        # Nothing but -inf and NaN: the lowest column that may be chosen, below every number and above no choice.
        best_column = first
        for _ in tl.static_range(NO_CHOICE):
            for entry in tl.static_range(NO_CHOICE):
                best_column += (best_column == tl.load(no_choice_ptr + row * NO_CHOICE + entry)).to(tl.int32)
        exists = best_column < end
        best_score = tl.where(exists, -3.4028234663852886e38, lowest)
    score, chosen = best_score, best_column
    if temperature_ptr is not None:
        drawn_score = tl.max(drawn, 0)
        if noisy & (drawn_score > lowest):
            drawn_group = tl.min(tl.where(drawn == drawn_score, drawn_tile * GROUPS + group, tiles * GROUPS - 1), 0)
            close = first + drawn_group * 8 + eight
            close_x = tl.load(logits + close, mask=close < vocab, other=lowest).to(tl.float32)
            bits = philox.row_bits_block(seed, position, step, (first + drawn_group * 8) // 4, TOKEN_STREAM, 2)
            close_score = _without(close_x, close, row, no_choice_ptr, NO_CHOICE)
            close_score += temperature * philox.gumbel_from_bits_block(bits)
            score, chosen = drawn_score, _first_of_eight(close_score, close)

    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    out = partial_ptr + row * PARTIALS * parts + part
    maximum = tl.max(peak, 0)
    tl.store(out, score)
    tl.store(out + parts, chosen.to(tl.float32))
    tl.store(out + 2 * parts, maximum)
    tl.store(out + 3 * parts, tl.sum(total * tl.exp(peak - tl.where(maximum == lowest, 0.0, maximum)), 0))
    if MARGIN:
        near_logit = _temper(near_x, row, temperature_ptr, tempered_ptr)
        near_logit = _without(near_logit, near, row, no_mass_ptr, NO_MASS)
        beside = tl.max(tl.where(near == best_column, lowest, near_logit), 0)
        elsewhere = tl.where(peak_tile == best_group // GROUPS, second, peak)
        elsewhere = tl.max(tl.where(group == best_group % GROUPS, elsewhere, peak), 0)
        tl.store(out + 4 * parts, best_score)
        tl.store(out + 5 * parts, best_column.to(tl.float32))
        tl.store(out + 6 * parts, tl.maximum(beside, elsewhere))


@triton.jit
def _merge_kernel(
    partial_ptr, logits_ptr, logits_stride, no_mass_ptr, temperature_ptr, tempered_ptr, normalizer_ptr,
    token_ptr, probability_ptr, log_probability_ptr, margin_ptr, parts,
    NO_MASS: tl.constexpr, MARGIN: tl.constexpr, PARTIALS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merges the parts of one row."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    inside = part < parts
    source = partial_ptr + row * PARTIALS * parts + part
    lowest, nowhere = float("-inf"), 2147483648.0

    # Columns ascend with the parts, so the lowest column of the best score is the first of ties.
    scores = tl.load(source, mask=inside, other=lowest)
    score = tl.max(scores, 0)
    tokens = tl.load(source + parts, mask=inside, other=nowhere)
    token = tl.min(tl.where(scores == score, tokens, nowhere), 0)
    maxima = tl.load(source + 2 * parts, mask=inside, other=lowest)
    maximum = tl.max(maxima, 0)
    sums = tl.load(source + 3 * parts, mask=inside, other=0.0)
    total = tl.sum(sums * tl.exp(maxima - tl.where(maximum == lowest, 0.0, maximum)), 0)
    logits = logits_ptr + row * logits_stride
    column = token.to(tl.int64)
    x = tl.load(logits + column, mask=score > lowest, other=lowest).to(tl.float32)
    token_logit = _temper(x, row, temperature_ptr, tempered_ptr)
    token_logit = _without(token_logit, column, row, no_mass_ptr, NO_MASS)

    if MARGIN:
        bests = tl.load(source + 4 * parts, mask=inside, other=lowest)
        columns = tl.load(source + 5 * parts, mask=inside, other=nowhere)
        best = tl.max(bests, 0)
        best_token = tl.min(tl.where(bests == best, columns, nowhere), 0)
        best_column = best_token.to(tl.int64)
        best_x = tl.load(logits + best_column, mask=best > lowest, other=lowest).to(tl.float32)
        best_logit = _temper(best_x, row, temperature_ptr, tempered_ptr)
        best_logit = _without(best_logit, best_column, row, no_mass_ptr, NO_MASS)
        # In the part of the best column its runner-up competes, in the others their maximum.
        others = tl.load(source + 6 * parts, mask=inside, other=lowest)
        other = tl.max(tl.where(columns == best_token, others, maxima), 0)
        tl.store(margin_ptr + row, (tl.exp(best_logit - maximum) - tl.exp(other - maximum)) / total)

    if normalizer_ptr is not None:
        tl.store(normalizer_ptr + row * 2, maximum)
        tl.store(normalizer_ptr + row * 2 + 1, total)
    tl.store(token_ptr + row, column)
    tl.store(probability_ptr + row, tl.exp(token_logit - maximum) / total)
    if log_probability_ptr is not None:
        tl.store(log_probability_ptr + row, token_logit - maximum - tl.log(total))


@triton.jit
def _entropy_kernel(
    logits_ptr, logits_stride, no_mass_ptr, temperature_ptr, tempered_ptr, normalizer_ptr, partial_ptr,
    vocab, tiles, parts,
    NO_MASS: tl.constexpr, EPSILON: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum(p * log(p + epsilon)) over one part of one row."""
    GROUPS: tl.constexpr = BLOCK // 8
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    maximum = tl.load(normalizer_ptr + row * 2)
    scale = 1.0 / tl.load(normalizer_ptr + row * 2 + 1)
    entropy = tl.zeros([GROUPS], tl.float32)
    for tile in range(tiles):
        column = (part * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * logits_stride + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        logit = _temper(x, row, temperature_ptr, tempered_ptr)
        if _any_inside((part * tiles + tile) * BLOCK, row, no_mass_ptr, NO_MASS, BLOCK):
            logit = _without(logit, column, row, no_mass_ptr, NO_MASS)
        p = tl.exp2((logit - maximum) * 1.4426950408889634) * scale
        entropy += tl.sum(tl.reshape(p * tl.log(p + EPSILON), [GROUPS, 8]), 1)
    tl.store(partial_ptr + row * parts + part, tl.sum(entropy, 0))
