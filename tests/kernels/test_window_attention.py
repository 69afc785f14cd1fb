"""Both attention operations against their rules, on pages in any order."""

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dllm_plugin.kernels import dispatch
from dllm_plugin.kernels.store_kv import split_kv_cache, store_kv
from dllm_plugin.kernels.window_attention import (
    HEAD_SIZES,
    PagedWindows,
    Tiling,
    Windows,
    attention_triton,
    choose_splits,
    choose_tiling,
    full_attention,
    full_attention_rule,
    window_attention,
    window_attention_rule,
)

# bf16 products are wrong in the interpreter: torch only
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-9}


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).tolist()


class AttentionCase:
    """Windows (length, start, visible, prefix_len, block_length) over shuffled pages of NaN around the written keys."""

    def __init__(
        self, windows, heads=4, kv_heads=2, head_size=64, page_size=16, dtype=torch.float32, tokens_outside=True
    ):
        self.windows = windows
        most = max([-(-visible // page_size) for _, _, visible, *_ in windows], default=0)
        pages = len(windows) * most + 1
        shape = (pages, page_size, kv_heads, 2 * head_size)
        cache = torch.full(shape, float("nan"), dtype=dtype).transpose(1, 2)
        if not tokens_outside:
            cache = cache.contiguous()
        self.key_cache, self.value_cache = split_kv_cache(cache, head_size)
        self.block_table = torch.randperm(pages)[: len(windows) * most].view(len(windows), most).to(torch.int32)
        for (_, _, visible, *_), table in zip(windows, self.block_table.tolist(), strict=True):
            key, value = torch.randn(2, visible, kv_heads, head_size).to(dtype)
            slots = [table[p // page_size] * page_size + p % page_size for p in range(visible)]
            store_kv(key, value, self.key_cache, self.value_cache, torch.tensor(slots, dtype=torch.int64))
        self.starts = starts([length for length, *_ in windows])
        self.query = torch.randn(self.starts[-1], heads, head_size).to(dtype)
        self.scale = head_size**-0.5

    def record(self):
        column = lambda n: torch.tensor([window[n] for window in self.windows], dtype=torch.int32)  # noqa: E731
        return PagedWindows(
            query_start_loc=torch.tensor(self.starts, dtype=torch.int32),
            max_query_len=max((length for length, *_ in self.windows), default=0),
            window_start=column(1),
            visible=column(2),
            prefix_len=column(3),
            block_length=column(4),
            block_table=self.block_table,
            max_visible=max((visible for _, _, visible, *_ in self.windows), default=0),
        )

    def run(self, operation=window_attention, windows=None, **options):
        out = torch.full_like(self.query, float("nan"))
        windows = windows or self.record()
        got = operation(self.query, self.key_cache, self.value_cache, windows, self.scale, out=out, **options)
        assert got is out
        return out

    def kernel(self, tiling, num_splits):
        return self.run(attention_triton, tiling=tiling, num_splits=num_splits)

    def check(self, out):
        want = window_attention_rule(self.query, self.key_cache, self.value_cache, self.record(), self.scale)
        tolerance = TOLERANCE[out.dtype]
        torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance, equal_nan=False)


WINDOWS = {
    "one_key": [(1, 0, 1, 0, 0)],
    "whole": [(33, 0, 33, 0, 0)],
    "block_of_a_sequence": [(8, 40, 48, 0, 0)],
    "keys_after_the_window": [(8, 16, 63, 0, 0)],
    "first_pass_mixed_with_blocks": [(100, 0, 100, 0, 0), (8, 30, 70, 0, 0), (1, 5, 6, 0, 0)],
    "empty_window_and_no_keys": [(0, 0, 7, 0, 0), (3, 0, 0, 0, 0), (2, 0, 16, 0, 0)],
    "block_causal": [(24, 0, 24, 0, 8)],
    "block_causal_after_prefix": [(20, 13, 33, 13, 8)],
    "block_causal_from_inside_the_prefix": [(30, 3, 33, 10, 7)],
    "block_causal_cut_by_visible": [(10, 10, 17, 4, 8)],
    "only_prefix": [(6, 0, 40, 12, 4)],
    "prefix_of_nothing": [(5, 0, 5, 3, 2), (4, 0, 4, 0, 1)],
    "mixed_rules": [(16, 8, 24, 8, 8), (16, 8, 24, 0, 0), (40, 0, 40, 9, 5)],
}


@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_visibility(implementation, windows):
    case = AttentionCase(windows)
    case.check(case.run())


@pytest.mark.parametrize("start", range(16))
def test_every_alignment(implementation, start):
    case = AttentionCase([(7, start, start + 7, 5, 4), (7, start, start + 9, 0, 0)])
    case.check(case.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
def test_head_sizes(implementation, head_size, dtype):
    case = AttentionCase([(9, 12, 21, 0, 0), (5, 20, 25, 6, 8)], head_size=head_size, dtype=dtype)
    case.check(case.run())


@pytest.mark.parametrize("head_size", [64, 128])
def test_bf16_on_a_cpu(head_size):
    case = AttentionCase(WINDOWS["mixed_rules"], head_size=head_size, dtype=torch.bfloat16)
    case.check(case.run())
    inputs = sequences([20, 33], 8, 2, dtype=torch.bfloat16)
    check_full(run_full(*inputs, [20, 33]), *inputs, [20, 33])


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (8, 2), (7, 1), (28, 4)])
def test_grouped_heads(implementation, heads, kv_heads):
    case = AttentionCase([(5, 10, 15, 0, 0), (20, 0, 20, 4, 8)], heads=heads, kv_heads=kv_heads)
    case.check(case.run())


@pytest.mark.parametrize("tokens_outside", [True, False])
@pytest.mark.parametrize("page_size", [16, 32, 48])
def test_pages(implementation, page_size, tokens_outside):
    case = AttentionCase([(5, 60, 65, 0, 0), (3, 0, 50, 2, 4)], page_size=page_size, tokens_outside=tokens_outside)
    case.check(case.run())


@pytest.mark.parametrize("num_splits", [1, 2, 3, 5])
@pytest.mark.parametrize("tiling", [Tiling(16, 16, 4, 2), Tiling(64, 32, 4, 2)], ids=str)
def test_tilings_and_splits(tiling, num_splits):
    case = AttentionCase([(40, 30, 70, 20, 8), (1, 4, 5, 0, 0), (3, 0, 0, 0, 0), (9, 0, 90, 0, 0)])
    case.check(case.kernel(tiling, num_splits))


def test_a_long_row(implementation):
    case = AttentionCase([(1, 999, 1000, 0, 0), (63, 937, 1000, 1, 63)], heads=2, kv_heads=1)
    case.check(case.run())


@given(st.data())
def test_any_windows(data):
    windows = []
    for _ in range(data.draw(st.integers(1, 3))):
        visible = data.draw(st.integers(0, 40))
        start = data.draw(st.integers(0, visible))
        length = data.draw(st.integers(0, visible - start))
        windows.append((length, start, visible, data.draw(st.integers(0, visible)), data.draw(st.integers(0, 9))))
    case = AttentionCase(windows, heads=2, kv_heads=1, head_size=32)
    case.check(case.run())
    if case.starts[-1]:
        case.check(case.kernel(Tiling(16, 16, 4, 2), data.draw(st.integers(1, 3))))


def strided(tensor):
    """The same numbers two apart, with others between them."""
    return torch.stack((tensor, torch.full_like(tensor, 1)), -1)[..., 0]


PER_REQUEST = ("query_start_loc", "window_start", "visible", "prefix_len", "block_length")


@pytest.mark.parametrize(
    "names", [*((name,) for name in (*PER_REQUEST, "block_table")), (*PER_REQUEST, "block_table")], ids=str
)
def test_strided_inputs(implementation, names):
    case = AttentionCase(WINDOWS["mixed_rules"])
    windows = case.record()
    case.check(case.run(windows=replace(windows, **{name: strided(getattr(windows, name)) for name in names})))


def test_every_other_page_of_a_table(implementation):
    case = AttentionCase([(20, 50, 100, 0, 0), (9, 40, 70, 3, 7)])
    case.block_table = case.block_table.repeat_interleave(2, 1)[:, ::2]
    assert case.block_table.stride() == (14, 2)
    case.check(case.run())


def test_host_copies_change_nothing():
    case = AttentionCase(WINDOWS["mixed_rules"])
    windows = case.record()
    copies = {f"{name}_cpu": getattr(windows, name).tolist() for name in PER_REQUEST}
    assert copies.keys() == {field.name for field in fields(windows) if field.name.endswith("_cpu")}
    assert torch.equal(case.run(), case.run(windows=replace(windows, **copies)))


def sequences(lengths, heads=4, kv_heads=2, head_size=64, dtype=torch.float32):
    """Slices of one projection, as a model has them."""
    qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, head_size).to(dtype)
    return qkv.split([heads, kv_heads, kv_heads], 1)


def full_windows(lengths, **options):
    start_loc = torch.tensor(starts(lengths), dtype=torch.int32)
    return Windows(**{"query_start_loc": start_loc, "max_query_len": max(lengths, default=0), **options})


def run_full(query, key, value, lengths, **options):
    out = torch.full(query.shape, float("nan"), dtype=query.dtype)
    return full_attention(query, key, value, full_windows(lengths, **options), 0.125, out)


def check_full(out, query, key, value, lengths):
    want = full_attention_rule(query, key, value, full_windows(lengths), 0.125)
    torch.testing.assert_close(out.double(), want, rtol=TOLERANCE[out.dtype], atol=TOLERANCE[out.dtype])


def test_the_rules_are_softmax_attention():
    """Against torch's own, with the mask of every query written out."""
    query, key, value = (x.double() for x in sequences([9, 4], heads=4, kv_heads=2))
    want = [
        F.scaled_dot_product_attention(*(x[rows].transpose(0, 1) for x in (query, key, value)), enable_gqa=True)
        for rows in (slice(0, 9), slice(9, 13))
    ]
    got = full_attention_rule(query, key, value, full_windows([9, 4]), 64**-0.5)
    torch.testing.assert_close(got, torch.cat(want, 1).transpose(0, 1))

    case = AttentionCase([(8, 2, 12, 4, 3)], dtype=torch.float64)
    sees = [4, 4, 7, 7, 7, 10, 10, 10]  # positions 2 and 3 in the prefix, then two blocks of three
    key, value = (cache[case.block_table[0]].flatten(0, 1)[:12] for cache in (case.key_cache, case.value_cache))
    mask = torch.tensor([[j < limit for j in range(12)] for limit in sees])
    want = F.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (case.query, key, value)), attn_mask=mask, enable_gqa=True
    )
    got = window_attention_rule(case.query, case.key_cache, case.value_cache, case.record(), case.scale)
    torch.testing.assert_close(got, want.transpose(0, 1))


@pytest.mark.parametrize("lengths", [[1], [7, 7], [63, 0, 5], [130, 1, 1, 130]], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (7, 1)])
def test_full_attention(implementation, lengths, heads, kv_heads):
    inputs = sequences(lengths, heads, kv_heads)
    check_full(run_full(*inputs, lengths), *inputs, lengths)


def test_full_attention_of_a_long_request(implementation):
    inputs = sequences([1000], heads=1, kv_heads=1, head_size=32)
    check_full(run_full(*inputs, [1000]), *inputs, [1000])


@pytest.mark.parametrize("head_size", [32, 80, 96, 128, 256])
def test_full_attention_head_sizes(implementation, head_size):
    inputs = sequences([20, 5], head_size=head_size, dtype=torch.float16)
    check_full(run_full(*inputs, [20, 5]), *inputs, [20, 5])


@given(st.data())
def test_full_attention_of_any_lengths(data):
    lengths = data.draw(st.lists(st.integers(0, 25), min_size=1, max_size=3))
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    inputs = sequences(lengths, kv_heads * group, kv_heads, head_size=32)
    check_full(run_full(*inputs, lengths), *inputs, lengths)
    out = torch.full(inputs[0].shape, float("nan"))
    options = {"tiling": Tiling(16, 16, 4, 2), "num_splits": data.draw(st.integers(1, 3))}
    attention_triton(*inputs, full_windows(lengths), 0.125, out, **options)
    check_full(out, *inputs, lengths)


def test_full_attention_of_strided_starts(implementation):
    inputs, lengths = sequences([20, 40]), [20, 40]
    start_loc = strided(torch.tensor(starts(lengths), dtype=torch.int32))
    check_full(run_full(*inputs, lengths, query_start_loc=start_loc), *inputs, lengths)


def test_full_attention_of_values_that_no_descriptor_describes(implementation):
    query, key, _ = sequences([20, 40])
    apart = torch.randn(60, 4, 128)[:, ::2, :64]  # heads are not neighbours
    check_full(run_full(query, key, apart, [20, 40]), query, key, apart, [20, 40])


def test_nan_of_a_neighbour_stays_there(implementation):
    query, key, value = sequences([10, 20])
    value[10:] = float("nan")
    out = run_full(query, key, value, [10, 20])
    assert out[:10].isfinite().all() and out[10:].isnan().all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_result_of_a_request_does_not_depend_on_its_neighbours(dtype, threads):
    lengths = [24, 24, 24, 7, 200, 24, 1, 1]
    query, key, value = sequences(lengths, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    together = run_full(query, key, value, lengths, query_start_loc_cpu=starts(lengths))
    for first, last in zip(starts(lengths), starts(lengths)[1:], strict=False):
        alone = run_full(query[first:last].clone(), key[first:last].clone(), value[first:last].clone(), [last - first])
        assert torch.equal(together[first:last], alone)
    windows = [(24, 0, 60, 0, 0)] * 3 + [(24, 36, 60, 0, 0), (8, 0, 60, 20, 8)]
    case = AttentionCase(windows, dtype=torch.float32)
    whole = case.run()
    for n in range(len(windows)):
        case.windows = windows[n : n + 1]
        rows = slice(starts([w[0] for w in windows])[n], starts([w[0] for w in windows])[n + 1])
        one = AttentionCase.__new__(AttentionCase)
        one.__dict__ |= case.__dict__
        one.block_table, one.query = case.block_table[n : n + 1], case.query[rows].clone()
        one.starts = starts([windows[n][0]])
        assert torch.equal(one.run(), whole[rows])
    torch.set_num_threads(before)


def test_empty_batches(implementation):
    assert run_full(*sequences([]), []).shape == (0, 4, 64)
    assert AttentionCase([(0, 0, 5, 0, 0)]).run().shape == (0, 4, 64)
    assert full_attention(*sequences([5]), full_windows([5]), 1.0).shape == (5, 4, 64)


def test_the_number_of_splits_fills_the_device():
    assert choose_splits(4, 4096, slots=4) == 1 and choose_splits(1, 100, slots=4) == 1
    assert choose_splits(1, 4096, slots=4) == 4 and choose_splits(100, 4096, slots=4) == 1


@pytest.mark.parametrize("generation", [8, 9, 10])
def test_every_tiling_is_a_power_of_two(generation):
    for head_size in HEAD_SIZES:
        for rows in (1, 16, 17, 32, 64, 65, 5000):
            for paged in (True, False):
                tiling = choose_tiling(head_size, torch.bfloat16, rows, paged, generation)
                assert tiling.rows & (tiling.rows - 1) == 0 and tiling.keys & (tiling.keys - 1) == 0
                assert tiling.rows == 16 or tiling.rows < 2 * rows


def test_pointers_do_where_there_are_no_descriptors(monkeypatch):
    monkeypatch.setattr(dispatch, "device_generation", lambda device: 8)
    inputs = sequences([40, 7])
    out = torch.full(inputs[0].shape, float("nan"))
    attention_triton(*inputs, full_windows([40, 7]), 0.125, out)
    check_full(out, *inputs, [40, 7])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(8, 4, 48)}, "same head_size"),
        ({"query": torch.zeros(8, 3, 64)}, "num_heads must be a multiple of num_kv_heads"),
        ({"query": torch.zeros(8, 4, 64, dtype=torch.float16)}, "share a dtype"),
        ({"query": torch.zeros(8, 4, 128)[..., ::2]}, "contiguous last dimension"),
        ({"block_table": torch.zeros(2, 3, dtype=torch.int32)}, r"block_table must be int32 \[1, max_pages\]"),
        ({"block_table": torch.zeros(1, 3)}, "block_table must be int32 .* got torch.float32"),
        ({"block_table": torch.zeros(1, 3, dtype=torch.bool)}, "block_table must be int32 .* got torch.bool"),
        (
            {"block_table": torch.zeros(1, 3, dtype=torch.int32, device="meta")},
            r"block_table on 'meta'; pass block_table.to\(",
        ),
        ({"visible": torch.zeros(1, dtype=torch.int32, device="meta")}, "query on 'cpu' and visible on 'meta'"),
        ({"query_start_loc": torch.zeros(2, dtype=torch.int32, device="meta")}, "query_start_loc on 'meta'"),
        ({"out": torch.zeros(8, 4, 64, device="meta")}, "out on 'meta'"),
        ({"key_cache": torch.zeros(32, 2, 64)}, r"key_cache must be \[num_pages, page_size, .* got \[32, 2, 64\]"),
        ({"key_cache": torch.zeros(64)}, r"key_cache must be .* got \[64\]"),
        ({"key_cache": torch.zeros(2, 8, 2, 64)}, "page_size must be a multiple of 16, got 8"),
        ({"key_cache": torch.zeros(2, 0, 2, 64)}, "page_size must be a multiple of 16, got 0"),
        ({"query_start_loc": torch.zeros(0, dtype=torch.int32)}, "query_start_loc must be int32"),
        ({"query_start_loc": torch.tensor([0, 8])}, "query_start_loc must be int32"),
        ({"max_visible": 1000}, "max_visible 1000 exceeds"),
        ({"visible": torch.zeros(1)}, r"visible must be int32 \[1\]"),
        ({"out": torch.zeros(8, 4, 32)}, "out must be like the query"),
    ],
)
def test_refusals(implementation, change, message):
    case = AttentionCase([(8, 0, 8, 0, 0)])
    change = dict(change)
    tensors = [change.pop(name, getattr(case, name)) for name in ("query", "key_cache", "value_cache")]
    out = change.pop("out", None)
    with pytest.raises(ValueError, match=message):
        window_attention(*tensors, replace(case.record(), **change), case.scale, out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(4, 2, 64), "value": torch.zeros(4, 2, 64)}, r"key and value must be \[8,"),
        ({"key": torch.zeros(8), "value": torch.zeros(8)}, r"key and value must be \[8,"),
        ({"value": torch.zeros(8, 2, 128)[..., ::2]}, "contiguous last dimension"),
        ({"value": torch.zeros(8, 2, 64, device="meta")}, "query on 'cpu' and value on 'meta'"),
        ({"query_start_loc": torch.zeros(2, dtype=torch.int32, device="meta")}, "query_start_loc on 'meta'"),
    ],
)
def test_full_attention_refusals(implementation, change, message):
    query, key, value = sequences([8])
    with pytest.raises(ValueError, match=message):
        run_full(**{"query": query, "key": key, "value": value, "lengths": [8], **change})


def test_the_kernel_takes_a_tiling():
    inputs = sequences([100, 30])
    out = torch.full(inputs[0].shape, float("nan"))
    attention_triton(*inputs, full_windows([100, 30]), 0.125, out, tiling=Tiling(32, 16, 4, 2), num_splits=3)
    check_full(out, *inputs, [100, 30])
