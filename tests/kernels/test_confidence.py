"""confidence against its rule, and the bits of torch.softmax on a CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_plugin.kernels import confidence as module
from dllm_plugin.kernels.confidence import Choice, confidence, confidence_cpu, confidence_rule, confidence_triton
from dllm_plugin.kernels.filter import Cut

STATISTICS = {"log_probability": True, "margin": True, "entropy": True}
INFINITY = float("inf")


def ids(*rows):
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.int64).view(len(rows), width)


def sampling(row, **options):
    """Noise at temperature 1, by the numbers of the rows."""
    return {"temperature": torch.ones(len(row)), "seed": row, "position": row, "timestep": row, **options}


def check(logits, tolerance=1e-5, **options):
    drawn = {}
    rows = torch.arange(logits.shape[0])
    if options.get("temperature") is not None:
        drawn = {"seed": rows * 10**12 + 5, "position": rows + 3, "timestep": rows * 0 + 7}
    choice = Choice(**options, **drawn, **STATISTICS)
    got, want = confidence(logits, choice), confidence_rule(logits, choice)
    assert got.token.dtype == torch.int64 and got.token.tolist() == want.token.tolist()
    for name in ("probability", *STATISTICS):
        a, b = getattr(got, name), getattr(want, name)
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 7), (2, 63), (5, 1000), (7, 4097), (2, 9001)])
def test_statistics(implementation, rows, vocab, dtype):
    check((torch.randn(rows, vocab) * 4).to(dtype))


def test_a_vocabulary_above_150_000(implementation):
    # torch's own fp32 softmax of so long a row, whose bits the torch path has, is off by up to 2e-5
    check((torch.randn(2, 152_064) * 3).to(torch.bfloat16), tolerance=5e-5, no_choice=ids([151_666], [0]))


@pytest.fixture
def small_tiles(monkeypatch):
    """Three tiles of 128 columns a part, as long rows have on a GPU."""
    monkeypatch.setattr(module, "_split_rows", lambda x: (128, 3, -(-x.shape[1] // 384)))


@pytest.mark.parametrize("vocab", [384, 1000, 1300])
def test_several_tiles_a_part(implementation, small_tiles, vocab):
    logits = (torch.randn(6, vocab) * 3).to(torch.bfloat16)
    logits[0], logits[1, [140, 300]] = 0.0, 20.0
    logits[2, 256:264] = torch.arange(8.0) + 20  # winner and runner-up among eight neighbours
    logits[3, [8, 136]] = 30.0  # the same group of two tiles
    top = logits.float().topk(2, 1).indices
    check(logits, no_choice=ids([0, 1, 2], [140], *[[]] * 4))
    check(logits, no_choice=top[:, :1], no_mass=top[:, 1:])
    check(logits, no_choice=top[:, :1], temperature=torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 1.0]))
    assert confidence(torch.full((1, vocab), -INFINITY), Choice(no_choice=ids([0, 2, 1]))).token.item() == 3


@pytest.mark.parametrize("vocab", [9, 1000, 8200])
def test_forbidden_and_massless_columns(implementation, vocab):
    logits = torch.randn(4, vocab)
    top = logits.argmax(1).tolist()
    no_choice = ids([top[0], 3], [top[1]], [], [0, 1, 2])
    no_mass = ids([2], [top[1]], [top[2]], [0, vocab - 1])
    check(logits, no_choice=no_choice)
    check(logits, no_mass=no_mass)
    check(logits, no_choice=no_choice, no_mass=no_mass)


def test_a_chosen_column_without_mass_has_probability_zero(implementation):
    for run in (confidence, confidence_rule):
        got = run(torch.tensor([[0.0, 5.0, 1.0]]), Choice(no_mass=ids([1]), log_probability=True))
        assert (got.token.item(), got.probability.item(), got.log_probability.item()) == (1, 0.0, -INFINITY)


def test_margin_is_negative_when_the_likeliest_column_is_forbidden(implementation):
    for run in (confidence, confidence_rule):
        got = run(torch.tensor([[0.0, 5.0, 1.0]]), Choice(no_choice=ids([1]), margin=True))
        assert got.token.item() == 2 and got.margin.item() < -0.9


@pytest.mark.parametrize("vocab", [5, 4096 + 300, 3 * 4096])
def test_ties_take_the_lowest_index(implementation, vocab):
    logits = torch.zeros(4, vocab, dtype=torch.bfloat16)
    logits[1, [3, vocab - 1]] = 2.0
    logits[2, [vocab - 2, vocab - 1]] = 2.0
    logits[3, [0, 1, 2]] = 2.0
    check(logits, no_choice=ids([], [], [], [0]))
    for run in (confidence, confidence_rule):
        assert run(logits, Choice(no_choice=ids([], [], [], [0]))).token.tolist() == [0, 3, vocab - 2, 1]


@pytest.mark.parametrize("vocab", [6, 5000])
def test_rows_without_a_finite_logit(implementation, vocab):
    logits = torch.full((5, vocab), -INFINITY)
    logits[2, 4] = 1.0  # only the forbidden column is finite
    logits[3] = float("nan")
    logits[4, 4], logits[4, 5] = INFINITY, 0.0
    no_choice = ids([], [0, 1], [4], [1, 0], [4])
    got = confidence(logits, Choice(no_choice=no_choice, **STATISTICS))
    assert got.token[:3].tolist() == [0, 2, 0] and got.token[4] == 5
    assert 2 <= got.token[3] < vocab
    assert got.probability[[0, 1, 3]].isnan().all() and got.entropy[[0, 1, 3]].isnan().all()
    assert got.probability[2] == 0.0


@pytest.mark.parametrize("vocab", [7, 1000, 4100, 12_300])
def test_sampling_and_tempering(implementation, vocab):
    """The longest rows are of four parts on a CPU, which makes the noise of four rows for 4,096 columns at a time."""
    logits = torch.randn(6, vocab) * 2
    temperature = torch.tensor([0.0, 0.5, 1.0, 3.0, 0.0, 0.7])
    no_choice = ids(*[[int(row.argmax())] for row in logits])
    check(logits, temperature=temperature, no_choice=no_choice)
    check(logits, temperature=temperature, tempered=torch.tensor([1, 1, 0, 1, 0, 1]).bool(), no_choice=no_choice)


def cut_after(logits, temperature, *places):
    """A cut behind the column of such a place in the order of each row; None: everything is kept."""
    x = logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    values, column = x.sort(dim=1, descending=True, stable=True)
    at = torch.tensor([0 if place is None else place - 1 for place in places], dtype=torch.int64)[:, None]
    off = torch.tensor([place is None for place in places], dtype=torch.bool)
    logit = values.gather(1, at)[:, 0].masked_fill(off, -INFINITY)
    return Cut(logit, column.gather(1, at)[:, 0].masked_fill(off, logits.shape[1]).int())


@pytest.mark.parametrize("tiles", ["one", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cut_is_what_columns_of_minus_infinity_are(implementation, request, tiles, dtype):
    """To the bit, where something that is kept may be chosen; whole parts of a row may be out."""
    if tiles == "many":
        request.getfixturevalue("small_tiles")
    logits = (torch.randn(6, 1300) * 3).to(dtype)
    logits[3:] *= torch.linspace(2, 0, 1300).to(dtype)  # the first columns are the likeliest
    row, top = torch.arange(6), logits.float().argmax(1)
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.3, 1.0, 0.5])
    cut = cut_after(logits, temperature, 7, 3, None, 40, 2, 1200)
    options = sampling(row, temperature=temperature, tempered=row % 2 == 1) | STATISTICS
    options |= {"no_choice": ids(*[[int(column)] for column in top]), "no_mass": ids([3], [], [9], [], [11], [])}
    got = confidence(logits, Choice(cut=cut, **options))
    want = confidence(logits.masked_fill(cut.takes_out(logits, temperature), -INFINITY), Choice(**options))
    for name in ("token", "probability", *STATISTICS):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert not torch.equal(got.entropy, confidence(logits, Choice(**options)).entropy)


@pytest.mark.parametrize("tiles", ["one", "many"])
def test_statistics_of_what_a_cut_takes_out(implementation, request, tiles):
    """Unfiltered rows draw what is kept, and know what all columns are worth."""
    if tiles == "many":
        request.getfixturevalue("small_tiles")
    logits, row = torch.randn(6, 1000) * 2, torch.arange(6)
    temperature = torch.tensor([0.0, 0.7, 1.0, 2.0, 1.0, 1.0])
    unfiltered = torch.tensor([True, True, False, True, False, True])
    for tempered in (row < 0, row % 2 == 1):
        check(
            logits, temperature=temperature, tempered=tempered, no_choice=ids(*[[int(row.argmax())] for row in logits]),
            cut=cut_after(logits, temperature, 5, 2, 3, 100, None, None), unfiltered=unfiltered,
        )  # fmt: skip


@pytest.mark.parametrize("tiles", ["one", "many"])
def test_a_cut_that_leaves_nothing_to_choose(implementation, request, tiles):
    """The best column that may be chosen is, whatever its part of the row; its probability is 0 but in unfiltered rows."""
    if tiles == "many":
        request.getfixturevalue("small_tiles")
    logits = torch.randn(4, 1000)
    logits[:, 500], logits[0, 900], logits[1:, 10], logits[1:, 901] = 20.0, 9.0, 9.0, 9.0
    temperature = torch.tensor([1.0, 2.0, 0.0, 0.5])
    options = {
        "temperature": temperature, "cut": cut_after(logits, temperature, 1, 1, 1, 1), "no_choice": ids(*[[500]] * 4),
        "unfiltered": torch.tensor([False, True, False, True]),
    }  # fmt: skip
    check(logits, **options)
    rows = torch.arange(4)
    for run in (confidence, confidence_rule):
        got = run(logits, Choice(**sampling(rows) | options, **STATISTICS))
        assert got.token.tolist() == [900, 10, 10, 10]
        assert got.probability[[0, 2]].tolist() == [0.0, 0.0] and (got.probability[[1, 3]] > 0).all()
        assert got.log_probability[[0, 2]].tolist() == [-INFINITY] * 2 and got.margin[0] == -1.0


def test_a_cut_in_greedy_rows_needs_no_temperature(implementation):
    logits = torch.randn(3, 300)
    check(logits, cut=cut_after(logits, torch.zeros(3), 1, 10, None))


@pytest.mark.parametrize("run", [confidence, confidence_rule])
def test_samples_follow_the_softmax(run):
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(2000, 4)
    row = torch.arange(2000)
    options = {"temperature": torch.full((2000,), 2.0), "seed": row, "position": row, "timestep": row}
    token = run(logits, Choice(no_choice=ids(*[[3]] * 2000), **options)).token
    share = torch.bincount(token, minlength=4) / 2000
    want = torch.tensor([[0.5, 0.0, -0.5]]).softmax(1)[0]
    assert share[3] == 0 and (share[:3] - want).abs().max() < 0.04


def test_a_row_does_not_depend_on_its_batch(implementation):
    logits, row = torch.randn(9, 300), torch.arange(9)
    options = {"temperature": torch.full((9,), 0.8), "seed": row, "position": row, "timestep": row}
    whole = confidence(logits, Choice(**options, **STATISTICS))
    alone = confidence(logits[4:5], Choice(**{name: t[4:5] for name, t in options.items()}, **STATISTICS))
    assert whole.token[4] == alone.token[0] and whole.probability[4] == alone.probability[0]


def test_row_stride_and_empty_batch(implementation):
    wide = torch.randn(4, 200)
    check(wide[:, 40:101])
    check(wide[::2])
    got = confidence(torch.empty(0, 50), Choice(**STATISTICS))
    assert all(t.shape == (0,) for t in (got.token, got.probability, got.log_probability, got.margin, got.entropy))
    assert confidence(wide, Choice()).margin is None and confidence(wide, Choice()).entropy is None


def test_strided_inputs(implementation):
    """Every tensor that has an entry a row, with other numbers between its own."""
    logits, row = torch.randn(6, 300) * 2, torch.arange(6)
    temperature = torch.tensor([0.0, 0.5, 1.0, 3.0, 0.0, 0.7])
    cut = cut_after(logits, temperature, 5, None, 40, 5, 5, 9)
    options = {
        "no_choice": logits.topk(2, 1).indices, "no_mass": ids([5], [6], [7], [8], [9], []),
        "temperature": temperature, "tempered": row % 3 == 1, "cut": cut, "unfiltered": row % 2 == 1,
        "seed": row * 10**10, "position": row + 3, "timestep": row + 7,
    }  # fmt: skip
    whole = confidence(logits, Choice(**options, **STATISTICS))
    between = lambda t: torch.stack((t, torch.ones_like(t)), -1)[..., 0]  # noqa: E731
    strided = {name: between(t) for name, t in options.items() if name != "cut"}
    strided["cut"] = Cut(between(cut.logit), between(cut.column))
    got = confidence(logits, Choice(**strided, **STATISTICS))
    for name in ("token", "probability", *STATISTICS):
        assert torch.equal(getattr(got, name), getattr(whole, name)), name


@pytest.mark.parametrize("vocab", [40, 1000])
def test_ids_that_are_no_column_are_ignored(implementation, vocab):
    logits = torch.randn(4, vocab)
    top = logits.argmax(1).tolist()
    no_choice = ids([vocab, top[0]], [vocab + 3, -1], [top[2], -7], [2**40, vocab])
    no_mass = ids([vocab], [top[1]], [2**40], [0])  # none below 0: another path of torch
    inside = lambda rows: torch.where(rows < vocab, rows, -1)  # noqa: E731
    got = confidence(logits, Choice(no_choice=no_choice, no_mass=no_mass, **STATISTICS))
    want = confidence(logits, Choice(no_choice=inside(no_choice), no_mass=inside(no_mass), **STATISTICS))
    for name in ("token", "probability", *STATISTICS):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert got.token[0] != top[0] and got.token[1] == top[1] and got.probability[1] == 0.0


@given(
    st.integers(0, 4), st.integers(3, 40), st.integers(0, 2**31), st.booleans(), st.sampled_from([1.0, 8.0]), st.data()
)
def test_both_paths_agree_with_the_rule(rows, vocab, seed, sampled, spread, data):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * spread).to(torch.bfloat16)  # bf16: ties are common
    banned = st.lists(st.integers(-1, vocab - 1), min_size=2, max_size=2)
    no_choice, no_mass = (ids(*[data.draw(banned) for _ in range(rows)]) for _ in range(2))
    row = torch.arange(rows) + seed
    temperature = torch.tensor([data.draw(st.sampled_from([0.0, 1.0])) for _ in range(rows)])
    drawn = sampling(row, temperature=temperature, tempered=row % 2 == 0) if sampled else {}
    if data.draw(st.booleans(), "cut"):
        places = data.draw(st.lists(st.sampled_from([None, 1, 2, vocab]), min_size=rows, max_size=rows), "places")
        drawn["cut"] = cut_after(logits, temperature if sampled else temperature * 0, *places)
        drawn["unfiltered"] = row % 3 == 0
    choice = Choice(no_choice=no_choice, no_mass=no_mass, **drawn, **STATISTICS)
    want = confidence_rule(logits, choice)
    for run in (confidence_cpu, confidence_triton):
        got = run(logits, choice)
        assert torch.equal(got.token, want.token)
        for name in ("probability", *STATISTICS):
            a, b = getattr(got, name), getattr(want, name).float()
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


@settings(max_examples=100)
@given(data=st.data())
def test_blocks_of_rows_change_nothing(data):
    """Rows that ask for something stand in blocks where none, one or all do. Every number keeps its bits."""
    rows, vocab = data.draw(st.integers(0, 7), "rows"), data.draw(st.sampled_from([1, 2, 9, 40, 333]), "vocab")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "logits"))
    logits = (torch.randn(rows, vocab, generator=generator) * 4).to(torch.bfloat16)  # bf16: ties are common
    best = logits.float().argmax(1)

    def asked(name):
        """Which rows ask: none, one, all or any of them."""
        return torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows), name), dtype=torch.bool)

    def option(name, make):
        return make() if data.draw(st.booleans(), name) else None

    def two_ids(name):
        # the likeliest column and another, where the row asks
        return torch.stack((torch.where(asked(name), best, -1), torch.where(asked(name), best * 0 + 3, vocab)), 1)

    no_choice, no_mass = (
        option("no_choice", lambda: two_ids("no_choice")),
        option("no_mass", lambda: two_ids("no_mass")),
    )
    temperature = option("temperature", lambda: torch.where(asked("temperature"), 2.0, 0.0))
    tempered = None if temperature is None else option("tempered", lambda: asked("tempered"))
    row = torch.arange(rows)
    noise = {} if temperature is None else {"seed": row * 10**10, "position": row + 3, "timestep": row % 2}
    sampled = {"temperature": temperature, "tempered": tempered, **noise}
    if data.draw(st.booleans(), "cut"):
        places = [1 + number % vocab if asks else None for number, asks in enumerate(asked("cut").tolist())]
        sampled["cut"] = cut_after(logits, torch.zeros(rows) if temperature is None else temperature, *places)
        sampled["unfiltered"] = option("unfiltered", lambda: asked("unfiltered"))
    choice = Choice(no_choice=no_choice, no_mass=no_mass, **sampled, **STATISTICS)
    whole = confidence_cpu(logits, choice)
    for size in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_SCRATCH_BYTES", 4 * vocab * (size + 1))
            assert module.rows_per_block(vocab) == size
            got = confidence_cpu(logits, choice)
        for name in ("token", "probability", *STATISTICS):
            torch.testing.assert_close(
                getattr(got, name), getattr(whole, name), rtol=0, atol=0, equal_nan=True, msg=f"{name}, {size} rows"
            )


def test_a_row_has_the_same_bits_in_any_block(monkeypatch, threads):
    """torch splits a sum of at least 32,768 numbers over threads, where they are those of a single row."""
    logits, vocab = torch.randn(7, 40_001) * 3, 40_001
    choice = Choice(**STATISTICS)
    whole = confidence_cpu(logits, choice)
    alone = [confidence_cpu(row, choice) for row in logits.split(1)]
    for name in STATISTICS:
        assert torch.equal(torch.cat([getattr(row, name) for row in alone]), getattr(whole, name)), name
    for size in (1, 2, 3):
        monkeypatch.setattr(module, "_SCRATCH_BYTES", 4 * vocab * (size + 1))
        got = confidence_cpu(logits, choice)
        for name in STATISTICS:
            assert torch.equal(getattr(got, name), getattr(whole, name)), (name, size)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 50), (33, 129), (7, 126_464), (3, 250_001)])
def test_the_cpu_path_has_the_bits_of_torch_softmax(rows, vocab):
    logits = torch.randn(rows, vocab) * 6
    logits[0, 3] = 60.0  # near-certain: one rounding apart means another order
    got = confidence_cpu(logits, Choice(no_choice=ids(*[[1]] * rows), **STATISTICS))
    p = torch.softmax(logits, -1)
    best = logits.scatter(1, torch.ones(rows, 1, dtype=torch.int64), -INFINITY).argmax(1, keepdim=True)
    top = p.gather(1, best)
    assert torch.equal(got.probability, top.squeeze(1))
    assert torch.equal(got.margin, top.squeeze(1) - p.scatter(1, best, 0.0).amax(1))
    assert torch.equal(-got.entropy, (p * torch.log(p + 1e-10)).sum(-1))


def test_the_cpu_path_divides_like_a_scalar():
    logits, temperature = torch.randn(8, 500), 0.3
    hot = {"temperature": torch.full((8,), temperature), "tempered": torch.ones(8, dtype=torch.bool)}
    got = confidence_cpu(logits, Choice(**sampling(torch.arange(8), **hot), entropy=True))
    p = torch.softmax(logits / temperature, -1)
    assert torch.equal(got.probability, p.gather(1, got.token[:, None]).squeeze(1))
    assert torch.equal(-got.entropy, (p * torch.log(p + 1e-10)).sum(-1))


@pytest.mark.parametrize("sampled", [False, True])
def test_the_cpu_path_makes_no_large_tensor(sampled):
    """2 MB at most, whatever the number of rows."""

    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != logits.data_ptr():
                    self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
            return out

    logits = torch.randn(5, 126_464).to(torch.bfloat16)
    drawn = sampling(torch.arange(5)) if sampled else {}
    if sampled:
        drawn["cut"] = Cut(torch.full((5,), 2.0), torch.zeros(5, dtype=torch.int32))
    with Largest() as largest:
        confidence_cpu(logits, Choice(no_choice=ids(*[[126_336]] * 5), **drawn, **STATISTICS))
    assert 0 < largest.nbytes <= 2_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits": torch.zeros(3)}, "logits must be floating"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, "logits must be floating"),
        ({"logits": torch.zeros(4, 3).T}, "contiguous rows"),
        ({"no_choice": torch.zeros(2, 1, dtype=torch.int64)}, r"no_choice must be int64 \[3, n\]"),
        ({"no_mass": torch.zeros(3, 1)}, "no_mass must be int64"),
        ({"temperature": torch.ones(3)}, "temperature needs seed"),
        ({"tempered": torch.ones(3, dtype=torch.bool)}, "pass temperature too"),
        ({"temperature": torch.ones(3, dtype=torch.float64)}, "temperature must be torch.float32"),
        (
            {"no_mass": torch.zeros(3, 1, dtype=torch.int64, device="meta")},
            r"no_mass on 'meta'; pass no_mass.to\('cpu'\)",
        ),
        ({"temperature": torch.ones(3, device="meta")}, "logits on 'cpu' and temperature on 'meta'"),
        ({"unfiltered": torch.ones(3)}, r"unfiltered must be torch.bool \[3\]"),
        ({"cut": Cut(torch.ones(3), torch.ones(3))}, r"cut.column must be torch.int32 \[3\]"),
        ({"cut": Cut(torch.ones(1), torch.ones(3, dtype=torch.int32))}, r"cut.logit must be torch.float32 \[3\]"),
    ],
)
def test_refusals(options, message):
    options = dict(options)
    logits = options.pop("logits", torch.zeros(3, 4))
    with pytest.raises(ValueError, match=message):
        confidence(logits, Choice(**options))
