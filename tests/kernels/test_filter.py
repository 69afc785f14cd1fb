"""find_cut against its rule, and against Dream's, SDAR's and vLLM's sampling code, restated."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_plugin.kernels import filter as module
from dllm_plugin.kernels.filter import Filters, find_cut, find_cut_cpu, find_cut_rule, find_cut_triton

INFINITY = float("inf")


def filters(**asked):
    """Filters of lists or tensors, of which None is left out."""
    dtypes = {"top_k": torch.int64, "k_first": torch.bool, "gone": torch.int64}
    given = {name: value for name, value in asked.items() if value is not None}
    return Filters(**{name: torch.as_tensor(v, dtype=dtypes.get(name, torch.float32)) for name, v in given.items()})


def kept(run, logits, asked):
    """Which finite columns are left."""
    return ~run(logits, asked).takes_out(logits, asked.temperature) & (logits > -INFINITY)


def top_p_of(logits, top_p):
    values, order = torch.sort(logits, descending=True)
    remove = torch.cumsum(values.softmax(-1), -1) > top_p
    remove[1:] = remove[:-1].clone()
    remove[0] = False
    return logits.masked_fill(torch.zeros_like(remove).scatter(0, order, remove), -INFINITY)


def top_k_of(logits, top_k):
    return logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -INFINITY)


def min_p_of(logits, min_p):
    """`MinPLogitsProcessor.apply` of vLLM."""
    probability = torch.softmax(logits, dim=-1)
    return logits.masked_fill(probability < probability.max() * min_p, -INFINITY)


def published(logits, temperature, top_p, top_k, min_p, k_first):
    """`sample_tokens` of Dream for one row, up to the fill value; with `k_first` that of SDAR and vLLM's sampler."""
    if temperature > 0:
        logits = logits / temperature
    if min_p:
        logits = min_p_of(logits, min_p)
    if top_k and k_first:
        logits = top_k_of(logits, top_k)
    if top_p is not None and top_p < 1:
        logits = top_p_of(logits, top_p)
    if top_k and not k_first:
        logits = top_k_of(logits, top_k)
    return logits


@pytest.mark.parametrize("k_first", [False, True], ids=["dream", "sdar"])
@pytest.mark.parametrize("min_p", [None, 0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("top_k", [None, 0, 1, 5, 500])
@pytest.mark.parametrize("top_p", [None, 0.0, 0.1, 0.7, 0.999, 1.0])
def test_like_the_published_code(top_p, top_k, min_p, k_first):
    logits, temperature = torch.randn(6, 200) * 3, torch.tensor([0.0, 0.3, 2.0]).repeat(2)
    every = lambda value: None if value is None else [value] * 6  # noqa: E731
    asked = filters(temperature=temperature, top_p=every(top_p), top_k=every(top_k), min_p=every(min_p))
    asked = module.replace(asked, k_first=torch.full((6,), k_first))
    got = kept(find_cut_cpu, logits, asked)
    for row in range(6):
        want = published(logits[row], float(temperature[row]), top_p, top_k, min_p, k_first)
        assert torch.equal(got[row], want.isfinite())


def test_rows_of_both_orders_side_by_side(implementation):
    logits, temperature = torch.randn(12, 700) * 3, torch.tensor([0.5, 1.0, 0.0]).repeat(4)
    k_first, top_k = torch.arange(12) % 2 == 0, torch.tensor([5, 0, 40, 300] * 3)
    top_p, min_p = torch.tensor([0.9, 0.6, 1.0] * 4), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.05, 0.001] * 2)
    asked = filters(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, k_first=k_first)
    got = kept(find_cut, logits, asked)
    for row in range(12):
        numbers = (float(top_p[row]), int(top_k[row]), float(min_p[row]), bool(k_first[row]))
        assert torch.equal(got[row], published(logits[row], float(temperature[row]), *numbers).isfinite()), row


def test_top_k_first_leaves_less_mass_for_top_p(implementation):
    """0.4, 0.3, 0.2, 0.1: of the best two, 0.57 and 0.43, the first one has more than half; of all it has less."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(2, 4)
    got = kept(find_cut, logits, filters(top_k=[2, 2], top_p=[0.5, 0.5], k_first=[True, False]))
    assert got.sum(1).tolist() == [1, 2]


def test_min_p_comes_before_top_k_and_top_p(implementation):
    """Of 0.4, 0.3, 0.2, 0.1 min-p leaves two or three; top-p counts among these."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(5, 4)
    asked = filters(
        min_p=[0.6, 0.4, 0.6, 0.4, 0.4], top_k=[3, 2, 0, 0, 3], top_p=[1.0, 1.0, 0.55, 0.75, 0.45],
        k_first=[False, False, False, True, True],
    )  # fmt: skip
    assert kept(find_cut, logits, asked).sum(1).tolist() == [2, 2, 1, 2, 2]


def test_equal_logits_go_by_their_columns(implementation):
    """Top-k and min-p keep all of them, top-p the first ones; -0 equals 0."""
    logits = torch.zeros(6, 1000)
    logits[:, ::3] = -0.0
    logits[3:, 500] = 1.0
    asked = filters(top_k=[3, 0, 0, 2, 0, 0], top_p=[1.0, 0.3705, 0.0, 1.0, 0.0, 0.2], min_p=[0.0] * 6)
    got = kept(find_cut, logits, asked)
    assert got.sum(1).tolist() == [1000, 371, 1, 1000, 1, 199]
    assert got[1].nonzero().squeeze(1).tolist() == list(range(371)) and got[2, 0] and got[4, 500]
    assert got[5].nonzero().squeeze(1).tolist() == [*range(198), 500]


def test_logits_that_a_temperature_makes_equal_go_by_their_columns(implementation):
    """Top-p ends among them: the one ahead is the first of the row, not that of the higher logit."""
    temperature, low = torch.tensor([1.8]), torch.tensor(1.9)
    high = torch.nextafter(low, low + 1)
    assert low < high and (low / temperature).equal(high / temperature)
    logits = torch.tensor([[-9.0, low, high, -9.0]])
    for top_k, top_p, want in ((0, 0.3, [1]), (0, 0.9, [1, 2]), (1, 1.0, [1, 2])):
        got = kept(find_cut, logits, filters(temperature=temperature, top_k=[top_k], top_p=[top_p]))
        assert got[0].nonzero().squeeze(1).tolist() == want


def test_columns_that_are_gone_have_no_mass(implementation):
    logits = torch.tensor([[9.0, 1.0, 3.0, 2.0], [9.0, 8.0, 1.0, 0.0], [9.0, 1.0, 2.0, 3.0]])
    gone = [[0, -1], [0, 1], [-1, 4]]
    assert kept(find_cut, logits, filters(top_k=[2, 1, 1], gone=gone)).tolist() == [
        [True, False, True, True],
        [True, True, True, False],  # one that is gone is never below a cut, and not above it either
        [True, False, False, False],
    ]
    top_p = find_cut(logits, filters(top_p=[0.8, 0.8, 0.8], min_p=[0.0, 0.0, 0.3], gone=gone))
    assert top_p.logit.tolist() == [2.0, 0.0, 9.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 4097, 9001])
def test_awkward_sizes(implementation, vocab, dtype):
    logits = (torch.randn(5, vocab) * 3).to(dtype)
    asked = filters(
        temperature=[0.0, 1.3, 0.5, 1.0, 1.0], top_k=[0, 20, 3, 0, 7], top_p=[1.0, 0.9, 1.0, 0.97, 0.8],
        min_p=[0.0, 0.0, 0.1, 0.0, 0.0], k_first=[True] * 5,
    )  # fmt: skip
    got, want = find_cut(logits, asked), find_cut_rule(logits, asked)
    assert torch.equal(*(cut.takes_out(logits, asked.temperature) for cut in (got, want)))
    assert (got.logit.dtype, got.column.dtype) == (torch.float32, torch.int32)
    assert (got.logit[0], got.column[0]) == (-INFINITY, vocab)


def test_a_vocabulary_above_150_000(implementation):
    logits = (torch.randn(4, 152_064) * 3).to(torch.bfloat16)
    asked = filters(top_k=[0, 50, 5000, 3], top_p=[0.9, 1.0, 0.7, 1.0], min_p=[0.0, 0.0, 0.0, 0.01])
    got, want = (run(logits, asked).takes_out(logits, None) for run in (find_cut, find_cut_rule))
    # 3,000 columns share a logit of bf16: the last few of some 60,000 are within rounding
    assert torch.equal(got[1:], want[1:]) and (got[0] ^ want[0]).sum() <= 2


def test_row_stride_and_neighbours(implementation):
    wide = torch.full((9, 300), float("nan"))
    wide[::2, 40:240] = torch.randn(5, 200) * 3
    asked = filters(top_k=[3, 0, 0, 9, 0], top_p=[1.0, 0.8, 1.0, 0.9, 1.0])
    got, want = (run(wide[::2, 40:240], asked) for run in (find_cut, find_cut_rule))
    assert torch.equal(*(cut.takes_out(wide[::2, 40:240], None) for cut in (got, want)))


def test_a_row_does_not_depend_on_its_batch(implementation):
    logits, asked = torch.randn(9, 500) * 3, filters(top_k=[0, 3, 0] * 3, top_p=[1.0, 0.9, 0.6] * 3)
    whole = find_cut(logits, asked)
    for row in (0, 4, 8):
        alone = find_cut(logits[[row]], asked.of(torch.tensor([row])))
        assert torch.equal(alone.logit, whole.logit[[row]]) and torch.equal(alone.column, whole.column[[row]])


@pytest.mark.parametrize("number", [-INFINITY, INFINITY, float("nan")], ids=str)
def test_rows_that_are_no_distribution(implementation, number):
    """They end, and disturb nobody: a cut of -inf where there is nothing to choose from."""
    logits = torch.randn(3, 200)
    logits[1], logits[2, [3, 7]] = number, number
    asked = filters(top_k=[5, 5, 250], top_p=[0.9, 0.9, 1.0], min_p=[0.0, 0.1, 0.0], k_first=[False, True, False])
    got = find_cut(logits, asked)
    assert got.logit[0] == find_cut_rule(logits[:1], asked.of(torch.tensor([0]))).logit
    if number == -INFINITY:
        assert got.logit[1] == -INFINITY
        assert kept(find_cut, logits, asked)[2].sum() == 198


@pytest.mark.parametrize("asked", [Filters(), filters(temperature=[1.0] * 3, k_first=[True] * 3)], ids=["none", "some"])
def test_nobody_asks(implementation, asked):
    got = find_cut(torch.randn(3, 50), asked)
    assert got.logit.tolist() == [-INFINITY] * 3 and got.column.tolist() == [50] * 3
    assert find_cut(torch.randn(0, 50), Filters(top_k=torch.ones(0, dtype=torch.int64))).logit.shape == (0,)


def drawn_case(data, most_rows, vocabularies):
    rows, vocab = data.draw(st.integers(0, most_rows)), data.draw(st.sampled_from(vocabularies))
    logits = (torch.randn(rows, vocab) * data.draw(st.sampled_from([0.1, 4.0]))).to(torch.bfloat16)  # with ties
    if data.draw(st.booleans(), "banned"):
        logits[:, vocab // 2 :] = -INFINITY

    def drawn(name, *values, always=False):
        column = data.draw(st.lists(st.sampled_from(values), min_size=rows, max_size=rows), name)
        return column if always or data.draw(st.booleans(), name) else None

    gone = drawn("gone", -1, 0, 400)
    return logits, filters(
        temperature=drawn("temperature", 0.0, 0.3, 2.0), top_k=drawn("top_k", 0, 1, 5, 400),
        top_p=drawn("top_p", 1.0, 0.9123, 0.3123, 0.0), min_p=drawn("min_p", 0.0, 0.0312, 0.4123),
        k_first=drawn("k_first", False, True), gone=None if gone is None else torch.tensor(gone).view(rows, 1),
    )  # fmt: skip


@settings(max_examples=40)
@given(data=st.data())
def test_both_paths_agree_with_the_rule(data):
    logits, asked = drawn_case(data, 4, [2, 9, 150, 331])
    want = find_cut_rule(logits, asked).takes_out(logits, asked.temperature)
    for run in (find_cut_cpu, find_cut_triton):
        # what is -inf is out or not, which is all the same
        got = run(logits, asked).takes_out(logits, asked.temperature)
        assert torch.equal(got & (logits > -INFINITY), want & (logits > -INFINITY)), run


@settings(max_examples=100)
@given(data=st.data())
def test_blocks_of_rows_change_nothing(data):
    """In blocks where none, one or all ask for a filter, and in no rows at all. Every number keeps its bits."""
    logits, asked = drawn_case(data, 7, [1, 2, 9, 331])
    whole = find_cut_cpu(logits, asked)
    for size in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_SCRATCH_BYTES", size * module._BYTES_PER_COLUMN * logits.shape[1])
            cut = find_cut_cpu(logits, asked)
        assert torch.equal(cut.logit, whole.logit) and torch.equal(cut.column, whole.column)
    if len(rows := asked.asked()):
        assert not whole.takes_out(logits, asked.temperature)[~rows].any()


@pytest.mark.parametrize(("rows", "vocab"), [(20, 126_464), (40_000, 50)])
def test_scratch_does_not_grow_with_the_rows(rows, vocab):
    logits, row = torch.randn(rows, vocab), torch.ones(rows)
    asked = filters(temperature=row, top_k=row * 5, top_p=row * 0.9, min_p=row * 0.01, gone=row[:, None])
    with torch.profiler.profile(profile_memory=True) as profile:
        find_cut_cpu(logits, asked)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    assert 0 < peak < 8_000_000 + 20 * rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4)}, r"logits must be floating \[rows, vocab\]"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, "logits must be floating .* got torch.int64"),
        ({"logits": torch.zeros(3, 0)}, "at least one column"),
        ({"logits": torch.zeros(4, 3).T}, "contiguous rows"),
        ({"temperature": torch.ones(1)}, r"temperature must be floating \[3\], got torch.float32 \[1\]"),
        ({"temperature": torch.ones(3, dtype=torch.int64)}, "temperature must be floating"),
        ({"top_k": torch.ones(3)}, "top_k must be integer"),
        ({"top_k": torch.ones(3, dtype=torch.bool)}, "top_k must be integer"),
        ({"top_p": torch.ones(3, 1)}, "top_p must be floating"),
        ({"min_p": torch.ones(3, dtype=torch.int64)}, "min_p must be floating"),
        ({"k_first": torch.ones(3, dtype=torch.int64)}, "k_first must be bool"),
        ({"gone": torch.zeros(2, 1, dtype=torch.int64)}, r"gone must be int64 \[3, n\]"),
        ({"top_p": torch.ones(3, device="meta")}, r"logits on 'cpu' and top_p on 'meta'; pass top_p.to\('cpu'\)"),
        ({"gone": torch.zeros(3, 1, dtype=torch.int64, device="meta")}, "gone on 'meta'"),
    ],
)
def test_refusals(change, message):
    logits = change.pop("logits", torch.zeros(3, 4))
    with pytest.raises(ValueError, match=message):
        find_cut(logits, Filters(**{"top_p": torch.ones(3)} | change))
