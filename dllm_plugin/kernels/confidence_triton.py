"""The kernels of `confidence`: one that reads the logits, one that merges what it found, and one for the entropy.

A program reads some tiles of a row once. It keeps a maximum and a sum for every eight neighbouring columns, so that an
element costs a conversion, two comparisons and an exponential and nothing crosses threads inside the loop, and finds the
winning column at the end by reading its eight again. It leaves seven numbers, which a second kernel merges in the order
of the columns. Nothing is summed atomically. Column ids travel as fp32, exact below 2**24.
"""

from dllm_plugin.kernels import philox
from dllm_plugin.kernels.dispatch import tl, triton
from dllm_plugin.kernels.filter_triton import is_out, load_temperature, without


@triton.jit
def _temper(x, row, temperature_ptr, tempered_ptr):
    """The logits that the statistics are of."""
    if tempered_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
        if tl.load(tempered_ptr + row) & (temperature > 0):
            x = x / temperature
    return x


@triton.jit
def _load_cut(row, cut_logit_ptr, cut_column_ptr, unfiltered_ptr, temperature_ptr):
    """A row's cut, what its logits are divided by to be cut, whether it takes anything out, and of the mass too."""
    cut_logit = float("-inf")
    cut_column = 0
    cuts = False
    if cut_logit_ptr is not None:
        cut_logit = tl.load(cut_logit_ptr + row)
        cut_column = tl.load(cut_column_ptr + row)
        cuts = cut_logit > float("-inf")
    cuts_mass = cuts
    if unfiltered_ptr is not None:
        cuts_mass = cuts & (tl.load(unfiltered_ptr + row) == 0)
    return cut_logit, cut_column, load_temperature(temperature_ptr, row), cuts, cuts_mass


@triton.jit
def _weighed(
    x, column, row, no_mass_ptr, temperature_ptr, tempered_ptr, cut_logit_ptr, cut_column_ptr, unfiltered_ptr,
    NO_MASS: tl.constexpr,
):  # fmt: skip
    """The logits that the statistics are of, `-inf` in columns without mass."""
    logit = without(_temper(x, row, temperature_ptr, tempered_ptr), column, row, no_mass_ptr, NO_MASS)
    cut_logit, cut_column, divisor, _, cuts_mass = _load_cut(
        row, cut_logit_ptr, cut_column_ptr, unfiltered_ptr, temperature_ptr
    )
    if cuts_mass:
        logit = tl.where(is_out(x, column, divisor, cut_logit, cut_column), float("-inf"), logit)
    return logit


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
def part_kernel(
    logits_ptr, logits_stride, no_choice_ptr, no_mass_ptr, temperature_ptr, tempered_ptr,
    cut_logit_ptr, cut_column_ptr, unfiltered_ptr, seed_ptr, position_ptr, timestep_ptr, partial_ptr,
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
        seed, position, timestep = tl.load(seed_ptr + row), tl.load(position_ptr + row), tl.load(timestep_ptr + row)
    cut_logit, cut_column, divisor, cuts, cuts_mass = _load_cut(
        row, cut_logit_ptr, cut_column_ptr, unfiltered_ptr, temperature_ptr
    )

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
            top = tl.max(tl.reshape(without(x, column, row, no_choice_ptr, NO_CHOICE), [GROUPS, 8]), 1)
        best_tile = tl.where(top > best, tile, best_tile)
        best = tl.maximum(best, top)
        # Of a tile below the cut nothing is drawn and nothing has mass, which spares its noise and its exponentials.
        keeps = cuts == 0
        if cuts:
            keeps = tl.div_rn(tl.max(high, 0), divisor) >= cut_logit
        weighs = keeps | (cuts_mass == 0)
        if temperature_ptr is not None:
            if noisy:
                top = tl.full([GROUPS], lowest, tl.float32)
                if keeps:
                    bits = philox.row_bits_block(seed, position, timestep, start // 4, TOKEN_STREAM, BLOCK // 4)
                    score = without(x, column, row, no_choice_ptr, NO_CHOICE)
                    score += temperature * philox.gumbel_from_bits_block(bits)
                    if cuts:
                        score = tl.where(is_out(x, column, divisor, cut_logit, cut_column), lowest, score)
                    top = tl.max(tl.reshape(score, [GROUPS, 8]), 1)
            drawn_tile = tl.where(top > drawn, tile, drawn_tile)
            drawn = tl.maximum(drawn, top)

        if weighs:
            logit = _temper(x, row, temperature_ptr, tempered_ptr)
            if _any_inside(start, row, no_mass_ptr, NO_MASS, BLOCK):
                logit = without(logit, column, row, no_mass_ptr, NO_MASS)
            if cuts_mass:
                logit = tl.where(is_out(x, column, divisor, cut_logit, cut_column), lowest, logit)
            logits_of_eight = tl.reshape(logit, [GROUPS, 8])
            if (NO_MASS > 0) | (tempered_ptr is not None) | (cut_logit_ptr is not None):
                high = tl.max(logits_of_eight, 1)
            if MARGIN:
                second = tl.maximum(second, tl.minimum(high, peak))
                peak_tile = tl.where(high > peak, tile, peak_tile)
            higher = tl.maximum(peak, high)
            base = tl.where(higher == lowest, 0.0, higher)  # or no mass so far would subtract -inf from -inf
            weights = tl.exp2((logits_of_eight - base[:, None]) * 1.4426950408889634)
            total = total * tl.exp2((peak - base) * 1.4426950408889634) + tl.sum(weights, 1)
            peak = higher

    # The lowest column of the best score: the first tile, in it the first group, in it the first of its eight.
    eight, group = tl.arange(0, 8), tl.arange(0, GROUPS)
    best_score = tl.max(best, 0)
    best_group = tl.min(tl.where(best == best_score, best_tile * GROUPS + group, tiles * GROUPS - 1), 0)
    near = first + best_group * 8 + eight
    near_x = tl.load(logits + near, mask=near < vocab, other=lowest).to(tl.float32)
    best_column = _first_of_eight(without(near_x, near, row, no_choice_ptr, NO_CHOICE), near)
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
            bits = philox.row_bits_block(seed, position, timestep, (first + drawn_group * 8) // 4, TOKEN_STREAM, 2)
            close_score = without(close_x, close, row, no_choice_ptr, NO_CHOICE)
            close_score += temperature * philox.gumbel_from_bits_block(bits)
            if cuts:
                close_score = tl.where(is_out(close_x, close, divisor, cut_logit, cut_column), lowest, close_score)
            score, chosen = drawn_score, _first_of_eight(close_score, close)
        if cuts:  # a part that keeps nothing has no say, unless none does
            score = tl.where(noisy & (drawn_score == lowest), lowest, score)

    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    out = partial_ptr + row * PARTIALS * parts + part
    maximum = tl.max(peak, 0)
    tl.store(out, score)
    tl.store(out + parts, chosen.to(tl.float32))
    tl.store(out + 2 * parts, maximum)
    tl.store(out + 3 * parts, tl.sum(total * tl.exp(peak - tl.where(maximum == lowest, 0.0, maximum)), 0))
    if MARGIN | (cut_logit_ptr is not None):
        tl.store(out + 4 * parts, best_score)
        tl.store(out + 5 * parts, best_column.to(tl.float32))
    if MARGIN:
        near_logit = _weighed(
            near_x, near, row, no_mass_ptr, temperature_ptr, tempered_ptr, cut_logit_ptr, cut_column_ptr, unfiltered_ptr,
            NO_MASS,
        )  # fmt: skip
        beside = tl.max(tl.where(near == best_column, lowest, near_logit), 0)
        elsewhere = tl.where(peak_tile == best_group // GROUPS, second, peak)
        elsewhere = tl.max(tl.where(group == best_group % GROUPS, elsewhere, peak), 0)
        tl.store(out + 6 * parts, tl.maximum(beside, elsewhere))


@triton.jit
def merge_kernel(
    partial_ptr, logits_ptr, logits_stride, no_mass_ptr, temperature_ptr, tempered_ptr,
    cut_logit_ptr, cut_column_ptr, unfiltered_ptr, normalizer_ptr,
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
    if MARGIN | (cut_logit_ptr is not None):
        bests = tl.load(source + 4 * parts, mask=inside, other=lowest)
        columns = tl.load(source + 5 * parts, mask=inside, other=nowhere)
        best = tl.max(bests, 0)
    if cut_logit_ptr is not None:  # where nothing that is kept may be chosen, the best that may
        tokens = tl.where(score == lowest, columns, tokens)
        scores = tl.where(score == lowest, bests, scores)
        score = tl.where(score == lowest, best, score)
    token = tl.min(tl.where(scores == score, tokens, nowhere), 0)
    maxima = tl.load(source + 2 * parts, mask=inside, other=lowest)
    maximum = tl.max(maxima, 0)
    sums = tl.load(source + 3 * parts, mask=inside, other=0.0)
    total = tl.sum(sums * tl.exp(maxima - tl.where(maximum == lowest, 0.0, maximum)), 0)
    logits = logits_ptr + row * logits_stride
    column = token.to(tl.int64)
    x = tl.load(logits + column, mask=score > lowest, other=lowest).to(tl.float32)
    token_logit = _weighed(
        x, column, row, no_mass_ptr, temperature_ptr, tempered_ptr, cut_logit_ptr, cut_column_ptr, unfiltered_ptr, NO_MASS,
    )  # fmt: skip

    if MARGIN:
        best_token = tl.min(tl.where(bests == best, columns, nowhere), 0)
        best_column = best_token.to(tl.int64)
        best_x = tl.load(logits + best_column, mask=best > lowest, other=lowest).to(tl.float32)
        best_logit = _weighed(
            best_x, best_column, row, no_mass_ptr, temperature_ptr, tempered_ptr, cut_logit_ptr, cut_column_ptr,
            unfiltered_ptr, NO_MASS,
        )  # fmt: skip
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
def entropy_kernel(
    logits_ptr, logits_stride, no_mass_ptr, temperature_ptr, tempered_ptr, cut_logit_ptr, cut_column_ptr, unfiltered_ptr,
    normalizer_ptr, partial_ptr,
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
    cut_logit, cut_column, divisor, _, cuts_mass = _load_cut(
        row, cut_logit_ptr, cut_column_ptr, unfiltered_ptr, temperature_ptr
    )
    for tile in range(tiles):
        column = (part * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * logits_stride + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        weighs = cuts_mass == 0
        if cuts_mass:
            weighs = tl.div_rn(tl.max(x, 0), divisor) >= cut_logit
        if weighs:
            logit = _temper(x, row, temperature_ptr, tempered_ptr)
            if _any_inside((part * tiles + tile) * BLOCK, row, no_mass_ptr, NO_MASS, BLOCK):
                logit = without(logit, column, row, no_mass_ptr, NO_MASS)
            if cuts_mass:
                logit = tl.where(is_out(x, column, divisor, cut_logit, cut_column), float("-inf"), logit)
            p = tl.exp2((logit - maximum) * 1.4426950408889634) * scale
            entropy += tl.sum(tl.reshape(p * tl.log(p + EPSILON), [GROUPS, 8]), 1)
    tl.store(partial_ptr + row * parts + part, tl.sum(entropy, 0))
