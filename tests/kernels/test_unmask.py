"""unmask against its rule, and the rule against a table."""

from itertools import cycle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dllm_plugin.kernels.unmask import Segments, unmask, unmask_cpu, unmask_rule, unmask_triton

INT32 = torch.int32
INFINITY, NAN = float("inf"), float("nan")


class Batch:
    """Requests as lists of segments; a segment is (columns, confidences, quota, threshold, factor)."""

    def __init__(self, requests, canvas=24, alg_temp=None, integer=INT32):
        self.requests = requests
        segments = [segment for request in requests for segment in request]
        self.tokens = torch.randint(0, 5, (len(requests) + 2, canvas), dtype=integer)
        self.masked = torch.zeros(len(requests) + 2, canvas, dtype=torch.bool)
        slots = list(range(len(requests) + 1, 1, -1))
        for slot, request in zip(slots, requests, strict=True):
            for columns, *_ in request:
                self.masked[slot, columns] = True
        rows = [column for columns, *_ in segments for column in columns]
        of_segment = [slot for slot, request in zip(slots, requests, strict=True) for _ in request]
        cells = [
            slot * canvas + column
            for slot, (columns, *_) in zip(of_segment, segments, strict=True)
            for column in columns
        ]
        bounds = lambda counts: torch.tensor([0, *counts], dtype=INT32).cumsum(0).to(INT32)  # noqa: E731
        self.arguments = {
            "slot": torch.tensor(slots, dtype=integer),
            "request_start_loc": bounds([len(request) for request in requests]),
            "segment_start_loc": bounds([len(columns) for columns, *_ in segments]),
            "row_cell": torch.tensor(cells, dtype=torch.int64),
            "token": torch.tensor([100 + column for column in rows], dtype=torch.int64),
            "confidence": torch.tensor([c for _, values, *_ in segments for c in values], dtype=torch.float32),
            "quota": torch.tensor([segment[2] for segment in segments], dtype=INT32),
            "threshold": torch.tensor([segment[3] for segment in segments], dtype=torch.float32),
            "factor": torch.tensor([segment[4] for segment in segments], dtype=torch.float32),
        }
        if alg_temp is not None:
            self.arguments |= {
                "alg_temp": torch.tensor(alg_temp, dtype=torch.float32),
                "seed": torch.arange(len(segments)) + 10**11,
                "timestep": torch.arange(len(segments)) + 5,
            }

    def list_unmasked(self, others):
        """Lists rows for columns without a mask too: a {column: confidence} for each segment of each request."""
        requests = []
        for request, more in zip(self.requests, others, strict=True):
            rows = [
                sorted([*zip(columns, values, strict=True), *unmasked.items()], key=lambda row: row[0])
                for (columns, values, *_), unmasked in zip(request, more, strict=True)
            ]
            requests.append([([c for c, _ in segment], [v for _, v in segment], 0, 0, 0) for segment in rows])
        listed = Batch(requests, canvas=self.masked.shape[1]).arguments
        listed["token"][~self.masked.view(-1)[listed["row_cell"]]] = -99
        self.arguments |= {name: listed[name] for name in ("segment_start_loc", "row_cell", "token", "confidence")}
        self.arguments["skip_unmasked"] = True
        return self

    def run(self, operation=unmask):
        """Canvas tokens and masks afterwards, and what the operation returns."""
        segments = dict(self.arguments)
        rows = segments.pop("token"), segments.pop("confidence")
        tokens, masked = self.tokens.clone(), self.masked.clone()
        return tokens, masked, operation(tokens, masked, Segments(**segments), *rows)

    def check(self):
        tokens, masked, got = self.run()
        want_tokens, want_masked, summary = self.run(unmask_rule)
        assert torch.equal(got.summary, summary)
        assert torch.equal(tokens, want_tokens) and torch.equal(masked, want_masked)
        return got


VALUES = [0.2, 0.9, 0.5, 0.9, 0.95, 0.1]
COLUMNS = [3, 4, 6, 9, 10, 20]
RULES = [
    # id, confidences, quota, threshold, factor, columns taken
    ("quota", VALUES, 2, INFINITY, 0, [10, 4]),
    ("quota_ties_by_position", [0.5] * 6, 3, INFINITY, 0, [3, 4, 6]),
    ("quota_above_rows", VALUES, 99, INFINITY, 0, COLUMNS),
    ("nothing", VALUES, 0, INFINITY, 0, []),
    ("negative_quota", VALUES, -3, INFINITY, 0, []),
    ("threshold_is_strict", [0.2, 0.75, 0.5, 0.75, 0.95, 0.1], 0, 0.75, 0, [10]),
    ("threshold_forces_one", VALUES, 1, 0.99, 0, [10]),
    ("threshold_or_quota", VALUES, 4, 0.93, 0, [10, 4, 9, 6]),
    ("semi_activated", VALUES, 0, 0.99, 0, []),
    ("factor", VALUES, 0, INFINITY, 0.45, [10, 4, 9]),  # 0.9 >= 1 - 0.45/3, 0.9 >= 1 - 0.45/4, 0.5 < 1 - 0.45/5
    ("factor_first_always", [0.1] * 6, 0, INFINITY, 0.1, [3]),
    ("factor_no_exception_for_the_last", [0.99, 0.99, 0.99, 0.99, 0.99, 0.1], 0, INFINITY, 0.5, [3, 4, 6, 9, 10]),
    ("factor_zero_is_off", VALUES, 0, INFINITY, 0.0, []),
    ("nan_last", [NAN, 0.1, -INFINITY, NAN, -3.0, 0.0], 4, INFINITY, 0, [4, 20, 10, 6]),
    ("nan_passes_nothing", [NAN] * 6, 0, -INFINITY, 0, []),
    ("negative_entropy", [-0.1, -2.0, -0.01, -5.0, 0.0, -0.3], 2, INFINITY, 0, [10, 6]),
    ("all_minus_infinity", [-INFINITY] * 6, 2, INFINITY, 0, [3, 4]),
]


def test_the_limit_of_a_factor_is_fp32(implementation):
    """A confidence equal to the rounded limit passes, and the next one below does not: numpy would divide in float64."""
    factor, one = torch.tensor(0.3), torch.tensor(1.0)
    ranks = torch.arange(1, 12, dtype=torch.float32)
    limits = (one - factor / (ranks + 2)).tolist()
    exact = [1 - factor.item() / (rank + 2) for rank in ranks.tolist()]
    assert any(limit < more for limit, more in zip(limits, exact, strict=True)), "rounding makes no difference"
    for i, limit in enumerate(limits):
        below = torch.nextafter(torch.tensor(limit), -one).item()
        for value, taken in ((limit, i + 2), (below, i + 1)):
            columns = list(range(i + 2))
            values = [1.0] * (i + 1) + [value]
            _, masked, _ = Batch([[(columns, values, 0, INFINITY, factor.item())]]).run()
            assert int((~masked[2, : i + 2]).sum()) == taken


UNMASKED = {0: NAN, 2: 0.92, 5: INFINITY, 7: NAN, 8: 0.9, 11: -INFINITY, 19: 0.0, 21: INFINITY, 23: 0.99}


@pytest.mark.parametrize("unmasked", [{}, UNMASKED], ids=["masked_rows", "all_rows"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule[0])
def test_rules(implementation, rule, unmasked):
    _, values, quota, threshold, factor, taken = rule
    batch = Batch([[(COLUMNS, values, quota, threshold, factor)]])
    if unmasked:
        batch.list_unmasked([[unmasked]])
    batch.check()
    for run in (unmask, unmask_rule):
        tokens, masked, got = batch.run(run)
        assert sorted(taken) == [column for column in COLUMNS if not masked[2, column]]
        assert all(tokens[2, column] == 100 + column for column in taken)
        summary = got.summary if run is unmask else got
        assert summary.tolist() == [len(COLUMNS) - len(taken), next((c for c in range(24) if masked[2, c]), 24)]


ENTROPIES = [-0.5, -0.25, -2.0, -0.25, -0.125, -4.0]  # in order of rank: 0.125, 0.25, 0.25, 0.5, 2, 4
BOUNDS = [
    # id, quota, bound, columns taken
    ("zero_is_off", 0, 0.0, []),
    ("negative_is_off", 0, -1.0, []),
    ("below_the_least", 1, 0.1, [10]),
    ("none_is_forced", 0, 0.1, []),
    ("a_sum_that_is_reached_is_not_below", 0, 0.375, [10]),
    ("ties_by_position", 0, 0.5, [10, 4]),
    ("a_sum", 0, 0.7, [10, 4, 9]),
    ("less_than_the_quota", 5, 0.7, [10, 4, 9, 3, 6]),
    ("more_than_the_quota", 1, 1.2, [10, 4, 9, 3]),
    ("all", 0, 100.0, COLUMNS),
]


def with_bound(batch, *bounds):
    batch.arguments["entropy_bound"] = torch.tensor(bounds, dtype=torch.float32)
    return batch


@pytest.mark.parametrize("unmasked", [{}, UNMASKED], ids=["masked_rows", "all_rows"])
@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound[0])
def test_entropy_bounds(implementation, bound, unmasked):
    _, quota, limit, taken = bound
    batch = Batch([[(COLUMNS, ENTROPIES, quota, INFINITY, 0)]])
    if unmasked:
        batch.list_unmasked([[unmasked]])
    with_bound(batch, limit).check()
    _, masked, _ = batch.run()
    assert sorted(taken) == [column for column in COLUMNS if not masked[2, column]]


def test_segments_have_bounds_of_their_own(implementation):
    """Of two requests, and beside a quota and a threshold, which have none."""
    request = [(COLUMNS, ENTROPIES, 1, INFINITY, 0), ([11, 12, 13], [-0.5, -0.25, -0.125], 0, INFINITY, 0)]
    other = [([2, 3], [0.5, 0.9], 0, 0.6, 0), ([5, 6], [-0.5, -0.25], 1, INFINITY, 0)]
    got = with_bound(Batch([request, other]), 0.7, 0.5, 0.0, 0.0).check()
    assert got.remaining.tolist() == [3, 1, 1, 1]


def test_entropies_are_added_up_in_float64(implementation):
    """The bound lies between the sum and what float32 makes of it: 2^24 + 1 is no float32."""
    values = [-1.0, -(2.0**24), -(2.0**24) - 4]
    batch = with_bound(Batch([[([0, 1, 2], values, 0, INFINITY, 0)]]), 2.0**24 + 2)
    _, masked, _ = batch.run()
    assert masked[2, :3].tolist() == [False, False, True]
    batch = with_bound(Batch([[([0, 1, 2], values, 0, INFINITY, 0)]]), 2.0**24)
    assert batch.run()[1][2, :3].tolist() == [False, True, True]


@pytest.mark.parametrize("rows", [63, 64, 65, 200, 700])
def test_long_segments_with_an_entropy_bound(implementation, rows):
    """More rows than a tile of the kernel. Eighths, so that sums are exact in any order."""
    values = (-torch.randint(0, 40, (rows,)) / 8).tolist()
    columns = sorted(torch.randperm(900)[:rows].tolist())
    for bound in (rows / 8, rows * 1.5 + 0.0625):
        with_bound(Batch([[(columns, values, 2, INFINITY, 0)]] * 2, canvas=900), bound, 3.0).check()


@pytest.mark.parametrize("skip_unmasked", [False, True])
@given(st.data())
def test_entropy_bounds_agree_with_the_rule(skip_unmasked, data):
    value = st.sampled_from([0.0, -0.0, -0.25, -0.5, -1.5, -2.0, -3.0])
    requests, others = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        columns, request, more = list(range(16)), [], []
        for _ in range(data.draw(st.integers(1, 3))):
            rows = data.draw(st.integers(0, min(5, len(columns))))
            mine, columns = columns[:rows], columns[rows:]
            unmasked = data.draw(st.sets(st.sampled_from(mine))) if skip_unmasked and mine else set()
            more.append({column: data.draw(value | st.sampled_from([NAN, INFINITY])) for column in unmasked})
            mine = [column for column in mine if column not in unmasked]
            values = data.draw(st.lists(value, min_size=len(mine), max_size=len(mine)))
            request.append((mine, values, data.draw(st.integers(0, 3)), INFINITY, 0))
        requests.append(request)
        others.append(more)
    batch = Batch(requests, canvas=17)
    if skip_unmasked:
        batch.list_unmasked(others)
    number = sum(map(len, requests))
    with_bound(
        batch, *data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.6, 2.0, 9.0]), min_size=number, max_size=number))
    )
    want = batch.run(unmask_rule)
    for run in (unmask_cpu, unmask_triton):
        assert all(map(torch.equal, batch.run(run), want)), run.__name__


def test_optional_tensors_may_be_missing(implementation):
    batch = Batch([[(COLUMNS, VALUES, 2, INFINITY, 0)], [([1], [0.3], 1, INFINITY, 0)]])
    whole = batch.run()
    for name in ("threshold", "factor", "request_start_loc"):
        del batch.arguments[name]
    for a, b in zip(whole[:2], batch.run()[:2], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole[2].summary, batch.run()[2].summary)


SEVERAL = [
    [([0, 1], [0.5, 0.6], 1, INFINITY, 0), ([], [], 3, 0.5, 1.0), ([5, 6, 7], [0.1, 0.2, 0.3], 0, 0.15, 0)],
    [],
    [([2], [NAN], 1, INFINITY, 0)],
]


def test_requests_with_several_and_empty_segments(implementation):
    Batch(SEVERAL).check()


def test_segments_of_unmasked_rows_only(implementation):
    Batch(SEVERAL).list_unmasked([[{}, {2: INFINITY, 3: 0.9, 4: NAN}, {9: 0.9}], [], [{0: 1.0, 1: INFINITY}]]).check()
    got = Batch([[([], [], 3, 0.5, 1.0)]]).list_unmasked([[UNMASKED]]).check()
    assert got.remaining.tolist() == [0] and got.unmasked_prefix.tolist() == [24]


@pytest.mark.parametrize("alg_temp", [None, [0.5, 0.0, 2.0, 0.7]])
def test_long_segments_with_unmasked_rows(implementation, alg_temp):
    """More rows than a tile of the kernel, with tiles without a masked one."""
    requests, others = [], []
    for _ in range(2):
        masked = torch.rand(400) < 0.4
        masked[70:200] = False
        requests.append([])
        others.append([])
        for columns in (range(210), range(210, 400)):
            mine = [column for column in columns if masked[column]]
            values = (torch.randint(0, 20, (len(mine),)) / 20).tolist()
            requests[-1].append((mine, values, len(mine) // 3, 0.9, 0.7))
            garbage = cycle([0.95, NAN, INFINITY, 0.5, -INFINITY])
            others[-1].append({column: next(garbage) for column in columns if not masked[column]})
    Batch(requests, canvas=400, alg_temp=alg_temp).list_unmasked(others).check()


def test_other_slots_and_columns_stay(implementation):
    batch = Batch([[(COLUMNS, VALUES, 6, INFINITY, 0)]])
    tokens, masked, _ = batch.run()
    assert torch.equal(tokens[:2], batch.tokens[:2]) and torch.equal(masked[:2], batch.masked[:2])
    others = [column for column in range(24) if column not in COLUMNS]
    assert torch.equal(tokens[2, others], batch.tokens[2, others])


@pytest.mark.parametrize("canvas", [24, 1024, 1500])
def test_unmasked_prefix(implementation, canvas):
    cases = [([4, 5, 6], 1, [0.9, 0.1, 0.2]), ([4, 5, 6], 2, [0.9, 0.8, 0.2]), ([4, 5, 6], 3, [0.9, 0.8, 0.2])]
    requests = [[(columns, values, quota, INFINITY, 0)] for columns, quota, values in cases]
    got = Batch(requests, canvas=canvas).check()
    assert got.unmasked_prefix.tolist() == [5, 6, canvas]
    assert got.summary.shape == (6,) and got.summary.dtype == INT32


@pytest.mark.parametrize("rows", [1, 7, 63, 64, 65, 200, 1000])
def test_long_segments(implementation, rows):
    values = (torch.randint(0, 20, (rows,)) / 20).tolist()
    columns = sorted(torch.randperm(1300)[:rows].tolist())
    Batch([[(columns, values, rows // 3, 0.9, 0.7)]] * 2, canvas=1300).check()


REQUESTS = [
    [(COLUMNS, VALUES, 2, 0.93, 0.45), ([11, 12], [0.3, 0.4], 1, INFINITY, 0)],
    [([1, 2, 7], [0.5, NAN, 0.8], 1, 0.7, 2.0)],
]


def test_int64_tokens_and_slots(implementation):
    """As the runner passes them."""
    batch = Batch(REQUESTS, integer=torch.int64)
    batch.masked[3, 3] = False
    got = batch.check()
    assert batch.tokens.dtype == batch.arguments["slot"].dtype == torch.int64 and got.summary.dtype == INT32


@pytest.mark.parametrize("alg_temp", [None, [0.5, 0.0, 2.0]])
def test_strided_inputs(implementation, alg_temp):
    batch = Batch(REQUESTS, alg_temp=alg_temp)
    whole = batch.run()
    batch.arguments = {name: strided(tensor) for name, tensor in batch.arguments.items()}
    tokens, masked, got = batch.run()
    assert (
        torch.equal(tokens, whole[0]) and torch.equal(masked, whole[1]) and torch.equal(got.summary, whole[2].summary)
    )


def strided(tensor):
    """The same numbers two apart, with others between them."""
    return torch.stack((tensor, torch.zeros_like(tensor)), -1)[..., 0]


@pytest.mark.filterwarnings("error")
def test_alg_temp_orders_by_noise(implementation):
    request = [(COLUMNS, VALUES, 3, INFINITY, 0), ([11, 12, 13], [0.1, 0.2, NAN], 2, INFINITY, 0)]
    Batch([request, request], alg_temp=[0.5, 0.0, 2.0, 1.0]).check()


def test_alg_temp_draws_without_replacement():
    """The first pick follows softmax(confidence / alg_temp)."""
    values, temperature, trials = [0.9, 0.5, 0.1], 0.4, 3000
    batch = Batch([[([0, 1, 2], values, 1, INFINITY, 0)]] * trials, canvas=3, alg_temp=[temperature] * trials)
    _, masked, _ = batch.run()
    picked = (~masked[2:]).sum(0).tolist()
    share = (torch.tensor(values, dtype=torch.float64) / temperature).softmax(0)
    assert stats.chisquare(picked, (share * trials).tolist()).pvalue > 0.001


@pytest.mark.parametrize("skip_unmasked", [False, True])
@given(st.data())
def test_both_paths_agree_with_the_rule(skip_unmasked, data):
    value = st.sampled_from([0.0, -0.0, 0.25, 0.5, 0.9, 0.95, 1.0, -1.5, NAN, -INFINITY])
    garbage = value | st.just(INFINITY)
    requests, others = [], []
    for _ in range(data.draw(st.integers(0, 3))):
        columns, request, more = list(range(16)), [], []
        for _ in range(data.draw(st.integers(0, 3))):
            rows = data.draw(st.integers(0, min(5, len(columns))))
            mine, columns = columns[:rows], columns[rows:]
            unmasked = data.draw(st.sets(st.sampled_from(mine))) if skip_unmasked and mine else set()
            more.append({column: data.draw(garbage) for column in unmasked})
            mine = [column for column in mine if column not in unmasked]
            rows = len(mine)
            values = data.draw(st.lists(value, min_size=rows, max_size=rows))
            rule = st.tuples(st.integers(-1, 6), st.sampled_from([0.5, 0.9, INFINITY]), st.sampled_from([0, 0.3, 2.0]))
            request.append((mine, values, *data.draw(rule)))
        requests.append(request)
        others.append(more)
    segments = sum(map(len, requests))
    temperatures = data.draw(st.none() | st.lists(st.sampled_from([0.0, 0.7]), min_size=segments, max_size=segments))
    batch = Batch(requests, canvas=17, alg_temp=temperatures)
    if skip_unmasked:
        batch.list_unmasked(others)
    want = batch.run(unmask_rule)
    for run in (unmask_cpu, unmask_triton):
        assert all(map(torch.equal, batch.run(run), want)), run.__name__


def test_empty_batch(implementation):
    assert Batch([]).run()[2].summary.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quota": torch.zeros(1)}, r"quota must be torch.int32 \[1\]"),
        ({"confidence": torch.zeros(5)}, r"confidence must be torch.float32 \[6\]"),
        ({"token": torch.zeros(6)}, "token must be integer"),
        ({"request_start_loc": None, "slot": torch.zeros(2, dtype=INT32)}, "need request_start_loc"),
        ({"alg_temp": torch.ones(1)}, "from seed and timestep"),
        ({"canvas_masked": torch.zeros(3, 24)}, "canvas_tokens and canvas_masked"),
        ({"quota": torch.zeros(1, dtype=INT32, device="meta")}, r"quota on 'meta'; pass quota.to\('cpu'\)"),
        ({"canvas_masked": torch.zeros(3, 24, dtype=torch.bool, device="meta")}, "canvas_masked on 'meta'"),
    ],
)
def test_refusals(change, message):
    batch = Batch([[(COLUMNS, VALUES, 2, INFINITY, 0)]])
    batch.masked = change.get("canvas_masked", batch.masked)
    batch.arguments |= {name: tensor for name, tensor in change.items() if name != "canvas_masked"}
    with pytest.raises(ValueError, match=message):
        batch.run()
