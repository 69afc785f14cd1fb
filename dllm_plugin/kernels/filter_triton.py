"""The kernels of `find_cut`: one that surveys the logits, and one that selects the last column kept of a row.

The survey, of several programs a row, leaves the highest logit of every 64 columns and the mass of every tile. From these
follows a bound that no cut is below: the k-th highest of groups is not above the k-th highest of columns, and what has less
than its share of `1 - top_p` is not kept. The columns above the bound, few where the model is sure, are listed, and the cut is
found among them by bisection over the numbers of the logits' dtype, whose bits are in their order: at most 16 rounds in 16
bits, 32 in fp32. Dividing may make two fp32 logits equal but never turns them round: which are equal is asked at the end.
"""

from dllm_plugin.kernels.dispatch import tl, triton


@triton.jit
def without(x, column, row, ids_ptr, COUNT: tl.constexpr):
    """`x` with `-inf` in the columns that the row's ids name."""
    for entry in tl.static_range(COUNT):
        x = tl.where(column == tl.load(ids_ptr + row * COUNT + entry), float("-inf"), x)
    return x


@triton.jit
def load_temperature(temperature_ptr, row):
    """What the logits of a row are divided by to be cut."""
    divisor = 1.0
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
        divisor = tl.where(temperature > 0, temperature, 1.0)
    return divisor


@triton.jit
def is_out(x, column, divisor, cut_logit, cut_column):
    """Whether a cut, which must be above `-inf`, takes out columns of logits `x`."""
    x = tl.div_rn(x, divisor)
    return (x < cut_logit) | ((x == cut_logit) & (column > cut_column))


@triton.jit
def _load_asked(row, top_k_ptr, top_p_ptr, min_p_ptr, vocab):
    top_k = tl.full([], 0, tl.int32)
    top_p = tl.full([], 1.0, tl.float32)
    min_p = tl.full([], 0.0, tl.float32)
    if top_k_ptr is not None:
        top_k = tl.minimum(tl.load(top_k_ptr + row), vocab).to(tl.int32)
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + row).to(tl.float32)
    if min_p_ptr is not None:
        min_p = tl.load(min_p_ptr + row).to(tl.float32)
    return top_k, top_p, min_p


@triton.jit
def survey_kernel(
    logits_ptr, logits_stride, gone_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, group_max_ptr, tile_mass_ptr,
    vocab, groups, tiles,
    GONE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one tile the highest logit of each group, and the highest of all with the sum of exponentials relative to it."""
    GROUPS: tl.constexpr = BLOCK // GROUP
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    top_k, top_p, min_p = _load_asked(row, top_k_ptr, top_p_ptr, min_p_ptr, vocab)
    if (top_k > 0) | (top_p < 1) | (min_p > 0):
        column = tile * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * logits_stride + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        x = without(x, column, row, gone_ptr, GONE)
        high = tl.max(tl.reshape(x, [GROUPS, GROUP]), 1)
        tl.store(group_max_ptr + row * groups + tile * GROUPS + tl.arange(0, GROUPS), high)
        if top_p < 1:
            peak = tl.max(high, 0)
            scale = 1.4426950408889634 / load_temperature(temperature_ptr, row)
            weights = tl.exp2((x - tl.where(peak == float("-inf"), 0.0, peak)) * scale)
            tl.store(tile_mass_ptr + row * 2 * tiles + tile, peak)
            tl.store(tile_mass_ptr + row * 2 * tiles + tiles + tile, tl.sum(weights, 0))


@triton.jit
def _order_of(x, ZEROS: tl.constexpr):
    """The place of a number among those of its dtype, whose fp32 bits end with so many zeros; of NaN an extreme one."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) >> ZEROS


@triton.jit
def _number_at(order, ZEROS: tl.constexpr):
    """Inverse of `_order_of`."""
    bits = (order << ZEROS).to(tl.int32)
    return tl.where(bits < 0, (bits | ((1 << ZEROS) - 1)) ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _measure(
    list_ptr, count, divisor, pivot, peak, scale, MASS: tl.constexpr, EQUAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """How many of the listed logits, divided, are above the pivot, or equal it; or the MASS of these."""
    measured = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        x = tl.load(list_ptr + entry, mask=entry < count, other=float("-inf"))
        weight = tl.exp2((x - peak) * scale) if MASS else 1.0
        if divisor is not None:
            x = tl.div_rn(x, divisor)
        inside = (entry < count) & (x == pivot) if EQUAL else x > pivot
        measured += tl.where(inside, weight, 0.0)
    return tl.sum(measured, 0)


@triton.jit
def _lowest_within(
    list_ptr, count, low, high, limit, peak, scale, MASS: tl.constexpr, ZEROS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The lowest number, from `low` to `high` in their order, that has no more than `limit` above it: one of the listed, or
    `low`. NaN is no more than anything."""
    while low < high:
        middle = low + (high - low) // 2
        above = _measure(list_ptr, count, None, _number_at(middle, ZEROS), peak, scale, MASS, False, BLOCK)
        low = tl.where(above > limit, middle + 1, low)
        high = tl.where(above > limit, high, middle)
    return low


@triton.jit
def _load_groups(
    first, num_groups, groups_ptr, logits, row, gone_ptr, vocab,
    GONE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns of some listed groups in their order, and their logits, `-inf` where there is none."""
    entry = first + tl.arange(0, BLOCK // GROUP)
    group = tl.load(groups_ptr + entry, mask=entry < num_groups, other=0)
    group = tl.where(entry < num_groups, group, 1 << 24)  # past any vocabulary
    column = tl.reshape(group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [BLOCK])
    x = tl.load(logits + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
    return column, without(x, column, row, gone_ptr, GONE)


@triton.jit
def select_kernel(
    logits_ptr, logits_stride, gone_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, k_first_ptr,
    group_max_ptr, tile_mass_ptr, kept_ptr, kept_groups_ptr, cut_logit_ptr, cut_column_ptr,
    rows, vocab, groups, tiles,
    GONE: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, ZEROS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The cuts of some rows, one after the other."""
    lowest = float("-inf")
    program = tl.program_id(0).to(tl.int64)
    kept, kept_groups = kept_ptr + program * vocab, kept_groups_ptr + program * groups
    row = program
    while row < rows:
        top_k, top_p, min_p = _load_asked(row, top_k_ptr, top_p_ptr, min_p_ptr, vocab)
        cut_logit = lowest
        cut_column = vocab
        if (top_k > 0) | (top_p < 1) | (min_p > 0):
            k_first = False
            if k_first_ptr is not None:
                k_first = tl.load(k_first_ptr + row) != 0
            divisor = load_temperature(temperature_ptr, row)
            scale = 1.4426950408889634 / divisor
            logits, group_max = logits_ptr + row * logits_stride, group_max_ptr + row * groups
            highest = tl.full([BLOCK], lowest, tl.float32)
            for first in range(0, groups, BLOCK):
                group = first + tl.arange(0, BLOCK)
                highest = tl.maximum(highest, tl.load(group_max + group, mask=group < groups, other=lowest))
            peak = tl.max(highest, 0)
            cut_logit = tl.where(min_p > 0, tl.div_rn(peak, divisor) + tl.log(min_p), lowest)

            # Columns below the bound are not listed. What has top-p's mass must be: all that min-p leaves, or of it top-k.
            of_listed = (min_p > 0) | (k_first & (top_k > 0))
            bound = tl.full([], lowest, tl.float32)
            if (top_k > 0) & (top_k <= groups) & (k_first | (min_p == 0) | (top_p >= 1)):
                order = _lowest_within(
                    group_max, groups, _order_of(bound, ZEROS), _order_of(peak, ZEROS), top_k - 1, peak, scale, False,
                    ZEROS, BLOCK,
                )  # fmt: skip
                bound = _number_at(order, ZEROS)
            mass = 0.0
            if (top_p < 1) & (of_listed == 0):
                tile = tl.arange(0, TILES)
                tile_mass = tile_mass_ptr + row * 2 * tiles + tile
                peaks = tl.load(tile_mass, mask=tile < tiles, other=lowest)
                masses = tl.load(tile_mass + tiles, mask=tile < tiles, other=0.0)
                mass = tl.sum(masses * tl.exp2((peaks - peak) * scale), 0)
                # All that is below has at most half of 1 - top_p, which leaves room for rounding.
                bound = tl.maximum(bound, peak + divisor * tl.log(0.5 * (1 - top_p) * mass / vocab))

            num_groups = 0
            for first in range(0, groups, BLOCK):
                group = first + tl.arange(0, BLOCK)
                high = tl.load(group_max + group, mask=group < groups, other=lowest)
                taken = (high >= bound) & (high > lowest)
                tl.store(kept_groups + num_groups + tl.cumsum(taken.to(tl.int32), 0) - 1, group, mask=taken)
                num_groups += tl.sum(taken.to(tl.int32), 0)
            tl.debug_barrier()  # what follows reads what other threads of this program wrote
            count = 0
            for first in range(0, num_groups, BLOCK // GROUP):
                column, x = _load_groups(
                    first, num_groups, kept_groups, logits, row, gone_ptr, vocab, GONE, GROUP, BLOCK
                )
                taken = (x >= bound) & (x > lowest)
                if min_p > 0:
                    taken = taken & (tl.div_rn(x, divisor) >= cut_logit)
                tl.store(kept + count + tl.cumsum(taken.to(tl.int32), 0) - 1, x, mask=taken)
                count += tl.sum(taken.to(tl.int32), 0)
            tl.debug_barrier()

            low, high_order = _order_of(bound, ZEROS), _order_of(peak, ZEROS)
            if top_k > 0:
                low = _lowest_within(kept, count, low, high_order, top_k - 1, peak, scale, False, ZEROS, BLOCK)
                cut_logit = tl.maximum(cut_logit, tl.div_rn(_number_at(low, ZEROS), divisor))
            if top_p < 1:
                if of_listed:
                    base = tl.where(k_first, cut_logit, lowest)
                    mass = _measure(kept, count, divisor, base, peak, scale, True, False, BLOCK)
                    mass += _measure(kept, count, divisor, base, peak, scale, True, True, BLOCK)
                limit = top_p * mass
                low = _lowest_within(kept, count, low, high_order, limit, peak, scale, True, ZEROS, BLOCK)
                at = _number_at(low, ZEROS)
                cut_logit = tl.maximum(cut_logit, tl.div_rn(at, divisor))
                # Of the columns that equal the cut, those stay that have no more than the limit before them.
                before = _measure(kept, count, divisor, cut_logit, peak, scale, True, False, BLOCK)
                num_equal = _measure(kept, count, divisor, cut_logit, peak, scale, False, True, BLOCK)
                num_kept = tl.floor((limit - before) / tl.exp2((at - peak) * scale)) + 1
                if num_kept < num_equal:
                    last = num_kept.to(tl.int32)
                    seen = 0
                    first = 0
                    while seen < last:
                        column, x = _load_groups(
                            first, num_groups, kept_groups, logits, row, gone_ptr, vocab, GONE, GROUP, BLOCK
                        )
                        equal = tl.div_rn(x, divisor) == cut_logit
                        is_last = equal & (seen + tl.cumsum(equal.to(tl.int32), 0) == last)
                        cut_column = tl.minimum(cut_column, tl.min(tl.where(is_last, column, vocab), 0))
                        seen += tl.sum(equal.to(tl.int32), 0)
                        first += BLOCK // GROUP
            tl.debug_barrier()  # the next row overwrites the lists
        tl.store(cut_logit_ptr + row, cut_logit)
        tl.store(cut_column_ptr + row, cut_column)
        row += tl.num_programs(0)
