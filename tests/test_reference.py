"""The reference decoders against schedules and small cases worked out by hand, so that they may judge the engine."""

import json
import math

import pytest
import torch
from reference import checkpoints, dream, llada
from reference import model as reference_model
from reference.decoding import Block, Commit, Generation, blocks, generate_canvases, most_confident, truncate_at_eos
from safetensors import safe_open
from torch import Tensor

MASK = 4
EOS = 3
PROMPT = [1, 2]


class Table:
    """A model whose predictions do not depend on the tokens: one row of logits per position of the response."""

    mask_token_id = MASK

    def __init__(self, *rows: list[float], prompt_length: int = len(PROMPT)) -> None:
        self.rows = torch.tensor(rows)
        self.prompt_length = prompt_length
        self.seen: list[list[int]] = []

    def logits_for_positions(self, ids: Tensor) -> Tensor:
        self.seen.append(ids.tolist())
        filler = torch.zeros(self.prompt_length, self.rows.shape[1])
        return torch.cat([filler, self.rows])[: len(ids)]


def sure_of(token: int, probability: float, vocab_size: int = 5) -> list[float]:
    """Logits that give `token` this probability and share the rest evenly."""
    rest = (1 - probability) / (vocab_size - 1)
    return [math.log(probability if t == token else rest) for t in range(vocab_size)]


def positions(generation: Generation) -> list[list[int]]:
    return [commit.positions for commit in generation.trace]


# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gen_length, block_length, steps, expected",
    [
        (8, None, 3, [Block(0, 8, 3)]),
        (8, 4, 8, [Block(0, 4, 4), Block(4, 8, 4)]),
        (8, 4, 5, [Block(0, 4, 3), Block(4, 8, 2)]),
        (9, 4, 3, [Block(0, 4, 1), Block(4, 8, 1), Block(8, 9, 1)]),
        (3, 32, 2, [Block(0, 3, 2)]),
    ],
)
def test_blocks_share_the_steps(gen_length, block_length, steps, expected):
    assert blocks(gen_length, block_length, steps) == expected


def test_fewer_steps_than_blocks_is_an_error():
    with pytest.raises(ValueError, match="1 steps cannot serve 2 blocks"):
        blocks(8, 4, 1)


@pytest.mark.parametrize(
    "masked, steps, expected",
    [(32, 5, [7, 7, 6, 6, 6]), (4, 4, [1, 1, 1, 1]), (2, 4, [1, 1, 0, 0]), (7, 1, [7])],
)
def test_llada_quota(masked, steps, expected):
    assert llada.transfer_counts(masked, steps) == expected


@pytest.mark.parametrize(
    "masked, steps, expected",
    [
        *[(n, n, [0] + [1] * (n - 2) + [2]) for n in (24, 32, 64, 128, 256, 512, 768)],
        (256, 128, [1] + [2] * 126 + [3]),
        (256, 64, [3] + [4] * 62 + [5]),
        (32, 8, [3] + [4] * 6 + [5]),
        (5, 1, [5]),
    ],
)
def test_dream_counts(masked, steps, expected):
    counts = []
    for share in dream.transfer_shares(steps, 1e-3):
        counts.append(int(masked * share))
        masked -= counts[-1]
    assert counts == expected


# --- LLaDA ----------------------------------------------------------------------------------------------------------


def test_low_confidence_commits_the_surest_first():
    model = Table(sure_of(0, 0.5), sure_of(1, 0.9), sure_of(2, 0.7), sure_of(0, 0.6))
    generation = llada.generate(model, PROMPT, 4, 4)
    assert generation.tokens == [0, 1, 2, 0]
    assert generation.trace == [Commit([1], [1]), Commit([2], [2]), Commit([3], [0]), Commit([0], [0])]
    assert model.seen[1] == [*PROMPT, MASK, 1, MASK, MASK]


def test_blocks_go_from_left_to_right():
    model = Table(sure_of(0, 0.5), sure_of(1, 0.6), sure_of(2, 0.8), sure_of(0, 0.9))
    assert positions(llada.generate(model, PROMPT, 4, 4, 2)) == [[1], [0], [3], [2]]
    assert positions(llada.generate(model, PROMPT, 4, 2, 2)) == [[0, 1], [2, 3]]


def test_a_full_block_ends_although_steps_are_left():
    model = Table(sure_of(0, 0.5), sure_of(1, 0.6))
    assert positions(llada.generate(model, PROMPT, 2, 5)) == [[1], [0]]
    assert len(model.seen) == 2


def test_confidence_ties_commit_the_lowest_position():
    assert most_confident(torch.tensor([0.1, 0.9, 0.9, 0.9, 0.2, 0.9]), 2).tolist() == [1, 2]
    assert most_confident(torch.ones(64), 5).tolist() == [0, 1, 2, 3, 4]
    model = Table(*[sure_of(0, 0.5)] * 4)
    assert positions(llada.generate(model, PROMPT, 4, 4)) == [[0], [1], [2], [3]]


def test_token_ties_take_the_lowest_id():
    model = Table([0.0, 2.0, 2.0, 0.0, 0.0])
    assert llada.generate(model, PROMPT, 1, 1).tokens == [1]
    assert dream.generate(model, PROMPT, 1, 1, alg="entropy").tokens == [1]


def test_the_mask_is_never_chosen_but_counts_in_the_confidence():
    mask_likely = [math.log(p) for p in (0.1, 0.05, 0.15, 0.1, 0.6)]
    model = Table(mask_likely, sure_of(1, 0.3))
    for generation in (
        llada.generate(model, PROMPT, 2, 2),
        dream.generate(model, PROMPT, 2, 2, alg="maskgit_plus", eps=1e-9),
    ):
        assert generation.tokens == [2, 1]
        # 0.15 against 0.3; without the mask in the softmax it would be 0.375
        assert positions(generation) == [[1], [0]]


def test_a_mask_id_in_the_prompt_is_text():
    model = Table(sure_of(0, 0.5), prompt_length=3)
    assert llada.generate(model, [1, MASK, 2], 1, 1).tokens == [0]
    assert model.seen == [[1, MASK, 2, MASK]]


def test_random_remasking_orders_by_the_injected_numbers():
    model = Table(sure_of(0, 0.9), sure_of(1, 0.5), sure_of(2, 0.7))
    order = {0: 0.2, 1: 0.9, 2: 0.4}
    calls = []

    def uniforms(forward: int, at: Tensor) -> Tensor:
        calls.append((forward, at.tolist()))
        return torch.tensor([order[p] for p in at.tolist()])

    generation = llada.generate(model, PROMPT, 3, 3, remasking="random", uniforms=uniforms)
    assert positions(generation) == [[1], [2], [0]]
    assert calls == [(0, [0, 1, 2]), (1, [0, 2]), (2, [0])]


def test_sequential_remasking_goes_from_left_to_right():
    model = Table(sure_of(0, 0.5), sure_of(1, 0.9), sure_of(2, 0.7))
    generation = llada.generate(model, PROMPT, 3, 2, remasking="sequential")
    assert generation.tokens == [0, 1, 2] and positions(generation) == [[0, 1], [2]]


def test_temperature_scales_the_noise_and_leaves_the_confidence():
    model = Table([2.0, 1.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0, 0.0])
    noise = torch.tensor([[0.0, 3.0, 0.0, 0.0, 99.0], [0.0, 0.0, 0.0, 0.0, 99.0]], dtype=torch.float64)

    def gumbel(forward: int, at: Tensor) -> Tensor:
        return noise[at]

    cold = llada.generate(model, PROMPT, 2, 2, temperature=0.25, gumbel=gumbel)  # 2 against 1 + 0.75
    warm = llada.generate(model, PROMPT, 2, 2, temperature=0.5, gumbel=gumbel)  # 2 against 1 + 1.5
    assert cold.tokens == [0, 0]
    assert warm.tokens == [1, 0]
    assert positions(warm) == [[1], [0]]


def test_logits_suppression_forbids_eos():
    model = Table([math.log(p) for p in (0.1, 0.2, 0.1, 0.5, 0.1)])
    assert llada.generate(model, PROMPT, 1, 1, eos_id=EOS).tokens == [EOS]
    assert llada.generate(model, PROMPT, 1, 1, eos_suppression="logits", eos_id=EOS).tokens == [1]


@pytest.mark.parametrize("temperature, expected", [(0.0, [[2], [0], [1]]), (1.0, [[0], [2], [1]])])
def test_confidence_suppression_defers_eos_and_eot(temperature, expected):
    """At a temperature EOS keeps its confidence and only EoT is deferred, as in the published code."""
    eot = 0
    model = Table(sure_of(EOS, 0.9), sure_of(eot, 0.9), sure_of(1, 0.4))
    generation = llada.generate(
        model,
        PROMPT,
        3,
        3,
        eos_suppression="confidence",
        eos_id=EOS,
        eot_id=eot,
        temperature=temperature,
        gumbel=lambda forward, at: torch.zeros(len(at), 5, dtype=torch.float64),
    )
    assert generation.tokens == [EOS, eot, 1]
    assert positions(generation) == expected


class Guided:
    """Prefers token 0, but token 1 once the prompt is masked."""

    mask_token_id = MASK

    def logits_for_positions(self, ids: Tensor) -> Tensor:
        prompted = ids[0] != MASK
        row = [1.0, 0.9, 0.5, 0.0, 0.0] if prompted else [1.0, 1.2, 0.0, 0.0, 0.0]
        return torch.tensor([row] * len(ids))


def test_guidance_pushes_away_from_the_unprompted_logits():
    assert llada.generate(Guided(), PROMPT, 1, 1).tokens == [0]
    # scale 2: 1 + 3 * 0 = 1, 1.2 - 3 * 0.3 = 0.3, 0 + 3 * 0.5 = 1.5
    assert llada.generate(Guided(), PROMPT, 1, 1, cfg_scale=2.0).tokens == [2]


# --- Dream ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
def test_dream_spends_its_first_pass_without_a_commit(alg):
    model = Table(sure_of(0, 0.5), sure_of(1, 0.9), sure_of(2, 0.7), sure_of(0, 0.6))
    generation = dream.generate(model, PROMPT, 4, 4, alg=alg)
    assert positions(generation) == [[1], [2], [0, 3]]
    assert (generation.num_steps, generation.num_forwards) == (4, 3)


def test_each_block_of_dream_runs_its_own_schedule():
    model = Table(sure_of(0, 0.5), sure_of(1, 0.9), sure_of(2, 0.7), sure_of(0, 0.6))
    generation = dream.generate(model, PROMPT, 4, 4, 2, alg="maskgit_plus")
    assert positions(generation) == [[0, 1], [2, 3]] and generation.num_steps == 4


ORDERS = {
    # each row is the surest by one measure only; ids 0..4, the mask is 4
    "maskgit_plus": [0.50, 0.45, 0.02, 0.02, 0.01],
    "topk_margin": [0.42, 0.15, 0.15, 0.14, 0.14],
    "entropy": [0.48, 0.47, 0.05, 0.00, 0.00],
}


@pytest.mark.parametrize("alg", ORDERS)
def test_each_algorithm_has_its_own_confidence(alg):
    model = Table(*[[math.log(max(p, 1e-30)) for p in row] for row in ORDERS.values()])
    generation = dream.generate(model, PROMPT, 3, 3, alg=alg, eps=1e-9)
    assert generation.trace[0].positions == [list(ORDERS).index(alg)]


def test_margin_is_negative_where_the_mask_leads():
    logits = torch.tensor([[0.1, 0.05, 0.15, 0.1, 0.6]]).log()
    confidence, chosen = dream.sample_tokens(logits, MASK, "topk_margin")
    assert chosen.tolist() == [2]
    torch.testing.assert_close(confidence, torch.tensor([0.15 - 0.6]))


def test_entropy_keeps_the_mask():
    probs = torch.tensor([[0.1, 0.05, 0.15, 0.1, 0.6]])
    confidence, _ = dream.sample_tokens(probs.log(), MASK, "entropy")
    torch.testing.assert_close(confidence, (probs * probs.log()).sum(-1))


def test_top_p_keeps_the_token_that_crosses_and_the_first():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    kept = lambda top_p: (dream.top_p_filter(logits, top_p) > -1e30).tolist()[0]  # noqa: E731
    assert kept(0.4) == [False, True, False]
    assert kept(0.6) == [False, True, True]
    assert kept(0.0) == [False, True, False]
    assert kept(0.99) == [True, True, True]


def test_top_k_keeps_ties_and_allows_any_k():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0]])
    kept = lambda top_k: (dream.top_k_filter(logits, top_k) > -1e30).tolist()[0]  # noqa: E731
    assert kept(1) == [False, True, False, False]
    assert kept(2) == [False, True, True, True]
    assert kept(99) == [True, True, True, True]


def test_filters_renormalise_at_temperature_0():
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0001]])
    confidence, chosen = dream.sample_tokens(probs.log(), MASK, top_k=2)
    assert chosen.tolist() == [0]
    torch.testing.assert_close(confidence, torch.tensor([0.4 / 0.7]))


def test_top_p_comes_before_top_k():
    # top_p leaves 0.5, 0.3 of the row; top_k 3 would otherwise have kept 0.15 as well
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.01]]).log()
    confidence, _ = dream.sample_tokens(logits, MASK, top_p=0.6, top_k=3)
    torch.testing.assert_close(confidence, torch.tensor([0.5 / 0.8]))


def test_min_p_keeps_what_has_its_share_of_the_likeliest():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.06, 0.04]]).log()
    kept = lambda min_p: (dream.min_p_filter(logits, min_p) > -1e30).tolist()[0]  # noqa: E731
    assert kept(0.4) == [True, True, False, False, False]
    assert kept(0.29) == [True, True, True, False, False]
    assert kept(0.0) == [True] * 5 and kept(1.0) == [True, False, False, False, False]


def test_min_p_comes_before_top_p():
    # 0.5 of the 0.9 that min_p leaves passes 0.54 alone; of the whole row it needs the second
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.06, 0.04]]).log()
    confidence, _ = dream.sample_tokens(logits, MASK, min_p=0.29, top_p=0.54)
    torch.testing.assert_close(confidence, torch.tensor([1.0]))
    confidence, _ = dream.sample_tokens(logits, MASK, top_p=0.54)
    torch.testing.assert_close(confidence, torch.tensor([0.5 / 0.75]))


def test_where_only_the_mask_survives_the_filters_the_best_other_token_is_taken():
    logits = torch.tensor([[0.1, 0.05, 0.15, 0.1, 0.6]]).log()
    noise = torch.zeros(1, 5, dtype=torch.float64)
    for temperature in (0.0, 1.0):
        confidence, chosen = dream.sample_tokens(logits, MASK, top_k=1, temperature=temperature, noise=noise)
        assert chosen.tolist() == [2]
        assert confidence.tolist() == [0.0]


def test_temperature_divides_and_confidence_is_of_the_drawn_token():
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0, 0.0]])
    noise = torch.tensor([[0.0, 1.9, 0.0, 0.0, 99.0]], dtype=torch.float64)
    confidence, chosen = dream.sample_tokens(logits, MASK, temperature=0.5, noise=noise)  # 4 against 2 + 1.9
    assert chosen.tolist() == [0]
    confidence, chosen = dream.sample_tokens(logits, MASK, temperature=1.0, noise=noise)  # 2 against 1 + 1.9
    assert chosen.tolist() == [1]
    torch.testing.assert_close(confidence, torch.softmax(logits, -1)[:, 1])


def test_origin_commits_each_position_whose_number_is_below_the_share():
    model = Table(*[sure_of(0, 0.5)] * 4)
    numbers = {0: [0.9, 0.1, 0.24, 0.26], 1: [0.2, 0.9, 0.5], 2: [0.7, 0.9], 3: [0.99, 0.999]}

    def uniforms(forward: int, at: Tensor, time: Tensor) -> Tensor:
        return torch.tensor(numbers[forward][: len(at)])

    # shares 1/4, 1/3, 1/2 (all but eps) and 1
    generation = dream.generate(model, PROMPT, 4, 4, alg="origin", uniforms=uniforms, eps=1e-6)
    assert positions(generation) == [[1, 2], [0], [3]] and generation.num_steps == 4


def test_alg_temp_adds_noise_to_the_scaled_confidence():
    model = Table(sure_of(0, 0.5), sure_of(1, 0.9))
    noise = torch.tensor([0.5, 0.0], dtype=torch.float64)
    run = lambda alg_temp: dream.generate(  # noqa: E731
        model, PROMPT, 2, 2, alg="maskgit_plus", eps=1e-9, alg_temp=alg_temp, position_gumbel=lambda f, at: noise[at]
    )
    assert positions(run(0.5)) == [[1], [0]]  # 1.0 + 0.5 against 1.8
    assert positions(run(2.0)) == [[0], [1]]  # 0.25 + 0.5 against 0.45


# --- stopping and going on ------------------------------------------------------------------------------------------


def test_truncate_keeps_the_first_eos():
    assert truncate_at_eos([5, EOS, 6, EOS], EOS) == [5, EOS]
    assert truncate_at_eos([5, 6], EOS) == [5, 6]
    assert truncate_at_eos([5, 9, EOS], (EOS, 9)) == [5, 9]
    assert truncate_at_eos([], EOS) == []


def test_stopping_waits_for_everything_before_eos():
    model = Table(sure_of(0, 0.5), sure_of(EOS, 0.9), sure_of(2, 0.4), sure_of(0, 0.3))
    generation = llada.generate(model, PROMPT, 4, 4, stop_ids={EOS})
    assert positions(generation) == [[1], [0]]
    assert generation.tokens == [0, EOS, MASK, MASK]
    later_blocks = llada.generate(model, PROMPT, 4, 4, 2, stop_ids={EOS})
    assert later_blocks.num_forwards == 2


class Endless:
    """Position i of the sequence becomes token i mod 3; EOS at one place."""

    mask_token_id = MASK

    def __init__(self, eos_at: int = -1) -> None:
        self.eos_at = eos_at
        self.lengths: list[int] = []

    def logits_for_positions(self, ids: Tensor) -> Tensor:
        self.lengths.append(len(ids))
        return torch.tensor([sure_of(EOS if i == self.eos_at else i % 3, 0.9) for i in range(len(ids))])


def test_canvases_follow_each_other_until_max_tokens():
    model = Endless()
    generation = generate_canvases(llada.generate, model, PROMPT, 10, 4, 4)
    assert generation.tokens == [i % 3 for i in range(2, 12)]
    # two canvases of 4 in 4 passes each, then 2 tokens in 2
    assert model.lengths == [6] * 4 + [10] * 4 + [12] * 2
    assert [p for commit in generation.trace for p in commit.positions] == list(range(10))


def test_a_shorter_canvas_gets_its_share_of_the_steps_rounded_up():
    model = Endless()
    generate_canvases(dream.generate, model, PROMPT, 7, 4, 2, alg="entropy", eps=1e-9)
    assert model.lengths == [6] * 2 + [9] * 2


def test_canvases_stop_at_eos():
    model = Endless(eos_at=7)
    generation = generate_canvases(llada.generate, model, PROMPT, 10, 4, 4, stop_ids={EOS})
    assert generation.tokens == [2, 0, 1, 2, 0, EOS]
    assert generation.num_forwards == 6


def test_callbacks_are_told_of_earlier_canvases():
    calls = []

    def uniforms(forward: int, at: Tensor) -> Tensor:
        calls.append((forward, at.tolist()))
        return torch.zeros(len(at))

    generate_canvases(llada.generate, Endless(), PROMPT, 5, 3, 3, block_length=2, remasking="random", uniforms=uniforms)
    assert calls == [(0, [0, 1]), (1, [1]), (2, [2]), (3, [3, 4]), (4, [4])]


# --- models and checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", checkpoints.WRITERS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_has_exactly_the_tensors_the_model_uses(family, tied, tmp_path):
    key = {"llada": "weight_tying", "dream": "tie_word_embeddings"}[family]
    model = reference_model.load(checkpoints.WRITERS[family](tmp_path, 3, **{key: tied}))
    logits = model.logits_for_positions(torch.tensor([5, 6, 7]))
    assert logits.shape == (3, model.vocab_size)
    assert model.used == set(model.weights)
    per_layer, outside = {"llada": (9, 3), "dream": (12, 3)}[family]
    assert len(model.weights) == 2 * per_layer + outside - tied


@pytest.mark.parametrize("family", checkpoints.WRITERS)
def test_checkpoints_are_a_function_of_the_seed(family, tmp_path):
    write = checkpoints.WRITERS[family]
    bytes_of = lambda folder: (folder / "model.safetensors").read_bytes()  # noqa: E731
    assert bytes_of(write(tmp_path / "a", 1)) == bytes_of(write(tmp_path / "b", 1))
    assert bytes_of(write(tmp_path / "a", 1)) != bytes_of(write(tmp_path / "c", 2))


@pytest.mark.parametrize("family", checkpoints.WRITERS)
def test_predictions_are_diverse_and_depend_on_what_is_committed(family, tmp_path):
    model = reference_model.load(checkpoints.WRITERS[family](tmp_path, 1))
    ids = torch.tensor(list(range(40, 53)) + [model.mask_token_id] * 32)
    before = model.logits_for_positions(ids)[13:]
    assert len(set(before.argmax(-1).tolist())) >= 5
    exact = reference_model.load(tmp_path, torch.float64).logits_for_positions(ids)[13:]
    torch.testing.assert_close(before.double(), exact, rtol=0, atol=1e-4)
    top = before.softmax(-1).amax(-1)
    assert top.max() - top.min() > 0.1
    ids[20] = 7
    after = model.logits_for_positions(ids)[13:]
    assert (after.argmax(-1) != before.argmax(-1)).any()


def test_a_loud_token_is_often_first(tmp_path):
    model = reference_model.load(checkpoints.write_llada(tmp_path, 1, loud={320: 5.0}))
    ids = torch.tensor(list(range(40, 53)) + [model.mask_token_id] * 64)
    assert 320 in model.logits_for_positions(ids).argmax(-1)


def test_saved_dtype_is_that_of_file_and_config(tmp_path):
    checkpoints.write_dream(tmp_path, 1, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert reference_model.load(tmp_path).weights["lm_head.weight"].dtype == torch.float32


def test_dream_is_shifted_and_llada_is_not(tmp_path):
    ids = torch.tensor([3, 1, 4, 1, 5])
    dream_model = reference_model.load(checkpoints.write_dream(tmp_path / "dream", 1))
    rows = dream_model.forward(ids)
    assert torch.equal(dream_model.logits_for_positions(ids), rows[[0, 0, 1, 2, 3]])
    llada_model = reference_model.load(checkpoints.write_llada(tmp_path / "llada", 1))
    assert torch.equal(llada_model.logits_for_positions(ids), llada_model.forward(ids))


def test_every_position_sees_every_other(tmp_path):
    for family, write in checkpoints.WRITERS.items():
        model = reference_model.load(write(tmp_path / family, 1))
        one = model.forward(torch.tensor([3, 1, 4, 1, 5]))
        other = model.forward(torch.tensor([3, 1, 4, 1, 6]))
        assert ((one - other).abs().amax(-1) > 1e-3).all()


def test_rotary_angles_depend_on_distance_only():
    cos, sin = reference_model.rotation(8, 4, 100.0)
    q, k = torch.randn(2, 1, 1, 4, generator=torch.Generator().manual_seed(0))
    score = lambda i, j: float(  # noqa: E731
        (reference_model.rotate(q, cos[i], sin[i]) * reference_model.rotate(k, cos[j], sin[j])).sum()
    )
    assert score(5, 2) == pytest.approx(score(7, 4), abs=1e-5)
    assert score(5, 2) != pytest.approx(score(2, 5), abs=1e-3)
    # second half of the pair of angle 1, third position: cos 2, sin 2 on elements 0 and 2
    rotated = reference_model.rotate(torch.tensor([[[1.0, 0, 0, 0]]]), cos[2], sin[2])[0, 0]
    assert rotated.tolist() == pytest.approx([math.cos(2), 0, math.sin(2), 0])
