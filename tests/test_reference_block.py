"""The reference decoders of block diffusion against cases worked out by hand, so that they may judge the engine."""

import math
from itertools import product

import pytest
import torch
from reference.block import HOLE, generate, sample
from reference.block_models import block_causal
from reference.decoding import Commit, Generation
from torch import Tensor

MASK = 4
EOS = 3
PROMPT = [1, 2]
B = 4
LN2 = math.log(2)


def sure_of(token: int, probability: float) -> list[float]:
    """Logits over five tokens that give `token` this probability and share the rest evenly."""
    return [math.log(probability if t == token else (1 - probability) / 4) for t in range(5)]


def between(*tokens: int) -> list[float]:
    """Logits that leave these tokens alone, and equally likely: powers of two have exact probabilities."""
    return [0.0 if token in tokens else -torch.inf for token in range(5)]


class Table:
    """A model whose predictions do not depend on the tokens: one row per position, from that of the answer's start on."""

    mask_token_id = MASK
    shift = 0

    def __init__(self, *rows: list[float], prompt_length: int = len(PROMPT)) -> None:
        self.rows = torch.tensor([sure_of(0, 0.3)] * prompt_length + list(rows))
        self.seen: list[list[int]] = []
        self.visible: list[Tensor] = []

    def logits(self, ids: Tensor, visible: Tensor) -> Tensor:
        self.seen.append(ids.tolist())
        self.visible.append(visible)
        return self.rows[: len(ids)]


class Rule(Table):
    """A model whose row for a position is a function of all tokens, and of the position."""

    def __init__(self, rule) -> None:
        super().__init__()
        self.rule = rule

    def logits(self, ids: Tensor, visible: Tensor) -> Tensor:
        self.seen.append(ids.tolist())
        return torch.tensor([self.rule(ids.tolist(), position) for position in range(len(ids))])


def positions(generation: Generation) -> list[list[int]]:
    return [commit.positions for commit in generation.trace]


# --- blocks ---------------------------------------------------------------------------------------------------------

SIX = [sure_of(t, p) for t, p in ((0, 0.5), (1, 0.9), (2, 0.7), (0, 0.6), (1, 0.8), (2, 0.3))]


def test_the_prompts_tail_shares_the_first_block():
    model = Table(*SIX)
    generation = generate(model, PROMPT, 4, block_length=B)
    assert generation.trace == [
        Commit([1], [1]),
        Commit([0], [0]),
        Commit([4], [1]),
        Commit([2], [2]),
        Commit([3], [0]),
    ]
    assert generation.tokens == [0, 1, 2, 0] and generation.num_forwards == 5
    assert model.seen[0] == [*PROMPT, MASK, MASK]
    assert model.seen[2] == [*PROMPT, 0, 1, MASK, MASK, MASK, MASK]
    assert all(torch.equal(visible, block_causal(len(visible), B)) for visible in model.visible)


def test_a_full_block_before_the_prompts_tail_is_not_decoded():
    model = Table(*SIX, prompt_length=4)
    assert positions(generate(model, [1, 2, 0, 1], 2, block_length=B)) == [[1], [2], [3], [0]]
    assert model.seen[0] == [1, 2, 0, 1, MASK, MASK, MASK, MASK]


def test_the_last_block_may_end_with_the_answer():
    model = Table(*SIX)
    generation = generate(model, PROMPT, 4, block_length=B, shorten_last_block=True)
    assert positions(generation) == [[1], [0], [2], [3]]
    assert model.seen[2] == [*PROMPT, 0, 1, MASK, MASK]


@pytest.mark.parametrize(
    "steps, expected",
    [
        (None, [[1], [2], [3], [0]]),
        (4, [[1], [2], [3], [0]]),
        (3, [[1, 2], [3], [0]]),
        (2, [[1, 2], [0, 3]]),
        (1, [[0, 1, 2, 3]]),
        (9, [[1], [2], [3], [0]]),
    ],
)
def test_quota_of_a_full_block(steps, expected):
    model = Table(*SIX, prompt_length=4)
    assert positions(generate(model, [1, 2, 0, 1], 4, block_length=B, steps_per_block=steps)) == expected


def test_quota_belongs_to_the_pass_and_not_to_the_masks_of_a_partial_block():
    model = Table(*SIX)
    assert positions(generate(model, PROMPT, 6, block_length=B, steps_per_block=2)) == [[0, 1], [2, 4], [3, 5]]


def test_ties_take_the_lowest_position_and_the_lowest_token():
    model = Table(*[between(1, 2)] * 4, prompt_length=4)
    generation = generate(model, [0] * 4, 4, block_length=B)
    assert generation.tokens == [1] * 4 and positions(generation) == [[0], [1], [2], [3]]


def test_the_mask_is_never_chosen_but_counts_in_the_confidence():
    mask_likely = [math.log(p) for p in (0.1, 0.05, 0.15, 0.1, 0.6)]
    generation = generate(Table(mask_likely, sure_of(1, 0.3)), PROMPT, 2, block_length=B)
    assert generation.tokens == [2, 1] and positions(generation) == [[1], [0]]  # without the mask, 0.375 against 0.3


def test_a_mask_id_in_prompt_or_template_is_text():
    model = Table(*SIX)
    generation = generate(model, [1, MASK], 2, block_length=B, template=[HOLE, MASK])
    assert generation.tokens == [0, MASK] and model.seen == [[1, MASK, MASK, MASK]]


# --- what a pass unmasks --------------------------------------------------------------------------------------------


def test_a_threshold_is_passed_by_what_is_greater():
    rows = [between(0, 1), between(0), between(0, 1, 2, 3), between(1)]
    run = lambda threshold: positions(  # noqa: E731
        generate(Table(*rows, prompt_length=4), [0] * 4, 4, block_length=B, threshold=threshold)
    )
    assert run(0.5) == [[1, 3], [0], [2]]
    assert run(0.49) == [[0, 1, 3], [2]]
    assert run(0.2) == [[0, 1, 2, 3]]
    assert run(1.0) == run(1.5) == [[1], [3], [0], [2]]


def test_threshold_and_quota_are_the_published_rule():
    """All above the threshold where they fill the quota, else the best of the quota; after every pass of 200 blocks."""
    generator = torch.Generator().manual_seed(0)
    for steps, threshold, _ in product((1, 2, 3, 4), (0.3, 0.5), range(25)):
        model = Table(*(3 * torch.randn(4, 5, generator=generator)).tolist(), prompt_length=4)
        free = model.rows[4:].softmax(-1)[:, :MASK].amax(-1).tolist()
        expected, left = [], set(range(4))
        for step in range(steps):
            quota = min(4 // steps + (step < 4 % steps), len(left))
            best = sorted(left, key=lambda p: -free[p])[:quota]
            high = [p for p in left if free[p] > threshold]
            taken = sorted(high if len(high) >= quota else best)
            left -= set(taken)
            expected += [taken] if taken else []
        settings = {"block_length": B, "steps_per_block": steps, "threshold": threshold}
        assert positions(generate(model, [0] * 4, 4, **settings)) == expected


def test_a_factor_takes_ranks_from_the_best_until_one_fails():
    rows = [sure_of(t, p) for t, p in ((0, 0.9), (1, 0.5), (2, 0.95), (0, 0.86))]
    generation = generate(Table(*rows, prompt_length=4), [0] * 4, 4, block_length=B, factor=0.6)
    assert positions(generation) == [[0, 2, 3], [1]]  # 0.9 >= 1 - 0.6 / 3, 0.86 >= 1 - 0.6 / 4, 0.5 < 1 - 0.6 / 5


def test_random_takes_the_highest_numbers_of_the_pass():
    uniforms = lambda step, at: (at * 7 + step * 3) % 5 / 5  # noqa: E731
    generation = generate(Table(*SIX), PROMPT, 6, block_length=B, remasking="random", uniforms=uniforms)
    # 4 and 1 fifths at 2 and 3; then 3, 0, 2, 4 at 4 to 7, and 1, 3, 0 at 4 to 6, and 4, 3 at 4 and 6
    assert positions(generation) == [[0], [1], [5], [3], [2], [4]]


def test_parts_of_a_block_are_decoded_one_after_the_other():
    """Each with quotas of its own; passes are counted through."""
    model, asked = Table(*SIX), []
    uniforms = lambda step, at: asked.append(step) or -at.double()  # noqa: E731
    settings = {"sub_block_length": 2, "remasking": "random", "uniforms": uniforms}
    generation = generate(model, PROMPT, 6, block_length=B, steps_per_block=1, **settings)
    assert positions(generation) == [[0, 1], [2, 3], [4, 5]] and asked == [0, 0, 1]
    assert positions(generate(Table(*SIX), PROMPT, 6, block_length=B, sub_block_length=3)) == [
        [0],
        [1],
        [4],
        [2],
        [3],
        [5],
    ]


def test_sequential_goes_from_left_to_right():
    model = Table(*SIX, prompt_length=4)
    settings = {"block_length": B, "steps_per_block": 3, "remasking": "sequential"}
    assert positions(generate(model, [0] * 4, 4, **settings)) == [[0, 1], [2], [3]]


# entropies: ln 2, 0, 2 ln 2, ln 2
ENTROPIES = [between(0, 1), between(2), between(0, 1, 2, 3), between(1, 2)]


@pytest.mark.parametrize(
    "bound, steps, expected",
    [
        (None, None, [[1], [0], [3], [2]]),
        (0.0, None, [[1], [0], [3], [2]]),  # no sum is below it: the surest alone
        (LN2 - 1e-3, None, [[1], [0], [3], [2]]),
        (LN2 + 1e-3, None, [[0, 1], [3], [2]]),
        (2 * LN2 + 1e-3, None, [[0, 1, 3], [2]]),
        (4 * LN2 + 1e-3, None, [[0, 1, 2, 3]]),
        (LN2 + 1e-3, 1, [[0, 1, 2, 3]]),
        (0.0, 2, [[0, 1], [2, 3]]),
    ],
)
def test_an_entropy_bound_is_filled_from_the_lowest(bound, steps, expected):
    settings = {"block_length": B, "remasking": "entropy", "entropy_bound": bound, "steps_per_block": steps}
    assert positions(generate(Table(*ENTROPIES, prompt_length=4), [0] * 4, 4, **settings)) == expected


def test_entropy_is_of_the_tempered_and_unfiltered_distribution():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]]).log()
    noise = torch.zeros(1, 5, dtype=torch.float64)
    _, plain, _ = sample(logits, MASK, top_k=1)
    assert plain.item() == pytest.approx(1.875 * LN2)
    _, tempered, _ = sample(logits, MASK, temperature=0.5, top_k=1, noise=noise)
    squares = torch.tensor([0.25, 0.0625, 1 / 64, 1 / 256, 1 / 256])
    expected = -(squares / squares.sum() * (squares / squares.sum()).log()).sum()
    assert tempered.item() == pytest.approx(expected.item())


def test_alg_temp_adds_noise_to_the_scaled_confidence():
    model = Table(sure_of(0, 0.5), sure_of(1, 0.9))
    calls = []

    def noise(step: int, at: Tensor) -> Tensor:
        calls.append((step, at.tolist()))
        return torch.tensor([0.5, 0.0], dtype=torch.float64)[at - 2]

    run = lambda alg_temp: generate(  # noqa: E731
        model, PROMPT, 2, block_length=B, alg_temp=alg_temp, position_gumbel=noise
    )
    assert positions(run(0.5)) == [[1], [0]]  # 1.0 + 0.5 against 1.8
    assert positions(run(2.0)) == [[0], [1]]  # 0.25 + 0.5 against 0.45
    assert calls == [(0, [2, 3]), (1, [2]), (0, [2, 3]), (1, [3])]


# --- tokens and confidences -----------------------------------------------------------------------------------------

PROBS = [0.4, 0.3, 0.2, 0.1, 1e-9]
SQUARES = [p * p / 0.3 for p in PROBS]  # at temperature 1/2


@pytest.mark.parametrize(
    "confidence, temperature, expected",
    [
        ("tempered", 0.5, SQUARES[0]),
        ("filtered", 0.5, SQUARES[0] / (SQUARES[0] + SQUARES[1])),
        ("plain", 0.5, 0.4),
        ("tempered", 0.0, 0.4),
        ("filtered", 0.0, 0.4 / 0.7),
        ("plain", 0.0, 0.4),
    ],
)
def test_confidences(confidence, temperature, expected):
    logits, noise = torch.tensor([PROBS]).log(), torch.zeros(1, 5, dtype=torch.float64)
    settings = {"temperature": temperature, "top_k": 2, "confidence": confidence, "noise": noise}
    probability, _, chosen = sample(logits, MASK, **settings)
    assert chosen.tolist() == [0]
    assert probability.item() == pytest.approx(expected, rel=1e-5)


def test_min_p_comes_before_top_k_and_top_p():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.06, 0.04]]).log()
    settings = {"min_p": 0.29, "confidence": "filtered"}
    assert sample(logits, MASK, top_k=3, top_p=0.54, **settings)[0].item() == 1.0  # 0.5 / 0.9
    assert sample(logits, MASK, top_k=4, top_p=0.57, **settings)[0].item() == pytest.approx(0.5 / 0.75)


def test_top_k_comes_before_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.01]]).log()
    probability, _, _ = sample(logits, MASK, top_k=2, top_p=0.6, confidence="filtered")
    assert probability.item() == 1.0  # 0.5 / 0.8 passes 0.6 alone; of the whole row it needs the second


def test_top_k_keeps_ties_and_0_is_off():
    kept = lambda top_k: sample(  # noqa: E731
        torch.tensor([[1.0, 1.0, 1.0, 0.0, -torch.inf]]), MASK, top_k=top_k, confidence="filtered"
    )[0].item()
    assert kept(1) == kept(2) == pytest.approx(1 / 3)
    assert kept(0) == kept(None) == kept(99) < 0.31


def test_noise_chooses_among_what_the_filters_leave():
    logits = torch.tensor([[2.0, 1.0, 0.9, 0.0, 0.0]])
    noise = torch.tensor([[0.0, 1.5, 9.0, 0.0, 99.0]], dtype=torch.float64)
    drawn = lambda **settings: sample(logits, MASK, noise=noise, **settings)[2].item()  # noqa: E731
    assert drawn(temperature=1.0) == 2
    assert drawn(temperature=1.0, top_k=2) == 1  # 1 + 1.5 against 2
    assert drawn(temperature=0.5, top_k=2) == 0  # 2 + 1.5 against 4
    assert drawn(temperature=0.0) == 0


def test_where_only_the_mask_is_left_the_best_other_token_is_taken():
    logits = torch.tensor([[0.1, 0.05, 0.15, 0.1, 0.6]]).log()
    noise = torch.zeros(1, 5, dtype=torch.float64)
    for temperature in (0.0, 1.0):
        settings = {"top_k": 1, "temperature": temperature, "noise": noise, "confidence": "filtered"}
        probability, _, chosen = sample(logits, MASK, **settings)
        assert (probability.item(), chosen.item()) == (0.0, 2)


def test_noise_is_asked_for_by_pass_and_absolute_position():
    calls = []

    def gumbel(step: int, at: Tensor) -> Tensor:
        calls.append((step, at.tolist()))
        return torch.zeros(len(at), 5, dtype=torch.float64)

    generate(Table(*SIX), PROMPT, 3, block_length=B, temperature=1.0, gumbel=gumbel, steps_per_block=2)
    assert calls == [(0, [2, 3]), (0, [4, 5, 6, 7])]


# --- stops and templates --------------------------------------------------------------------------------------------


def test_a_stop_waits_for_what_is_before_it_and_then_nothing_is_run():
    model = Table(sure_of(0, 0.5), sure_of(EOS, 0.9), *SIX[2:])
    generation = generate(model, PROMPT, 6, block_length=B, stop_ids={EOS})
    assert generation.tokens == [0, EOS] and positions(generation) == [[1], [0]]
    early = Table(sure_of(EOS, 0.9), sure_of(0, 0.5), *SIX[2:])
    assert generate(early, PROMPT, 6, block_length=B, stop_ids={EOS}).trace == [Commit([0], [EOS])]


def test_a_stop_behind_the_answer_or_in_the_prompt_is_none():
    model = Table(sure_of(0, 0.5), sure_of(EOS, 0.9))
    assert generate(model, [EOS, EOS], 1, block_length=B, stop_ids={EOS}).tokens == [0]
    assert positions(generate(model, PROMPT, 1, block_length=B, stop_ids={EOS})) == [[1], [0]]


def test_pinned_tokens_stay_and_a_pinned_block_costs_no_pass():
    model = Table(*SIX, *SIX)
    template = [2, HOLE, 1, 1, 1, 1, HOLE, 0]
    generation = generate(model, PROMPT, 8, block_length=B, template=template)
    assert generation.tokens == [2, 1, 1, 1, 1, 1, 0, 0]
    assert positions(generation) == [[1], [8], [9], [6]]  # 8 and 9 are behind the answer, and surer
    assert model.seen[0] == [*PROMPT, 2, MASK]
    assert model.seen[1] == [*PROMPT, 2, 1, 1, 1, 1, 1, MASK, 0, MASK, MASK]


def test_a_pinned_stop_ends_the_answer():
    model = Table(*SIX)
    generation = generate(model, PROMPT, 4, block_length=B, template=[HOLE, EOS, HOLE, HOLE], stop_ids={EOS})
    assert generation.tokens == [0, EOS] and generation.num_forwards == 1


# --- editing --------------------------------------------------------------------------------------------------------


def test_a_block_is_final_after_a_pass_that_changes_nothing():
    generation = generate(Table(*SIX), PROMPT, 2, block_length=B, edit_threshold=0.0)
    assert positions(generation) == [[1], [0], []] and generation.tokens == [0, 1]


def changes_its_mind(ids: list[int], position: int) -> list[float]:
    """Position 2 is 0 until position 3 is known, then 1 with probability 1/2."""
    if position == 2:
        return sure_of(0, 0.9) if ids[3] == MASK else between(1, 2)
    return sure_of(2, 0.8)


@pytest.mark.parametrize("edit_threshold, expected", [(0.0, 1), (0.49, 1), (0.5, 0), (1.0, 0)])
def test_an_edit_needs_another_token_above_its_threshold(edit_threshold, expected):
    generation = generate(Rule(changes_its_mind), PROMPT, 2, block_length=B, edit_threshold=edit_threshold)
    assert generation.tokens == [expected, 2]
    edits = [Commit([0], [1])] if expected else []
    assert generation.trace == [Commit([0], [0]), Commit([1], [2]), *edits, Commit([], [])]


def test_masks_and_edits_are_decided_by_the_same_pass():
    def rule(ids, position):
        return sure_of(0 if position == 2 and ids[2] == MASK else 1, 0.9 - position / 100)

    generation = generate(Rule(rule), PROMPT, 2, block_length=B, edit_threshold=0.5)
    assert generation.trace == [Commit([0], [0]), Commit([0, 1], [1, 1]), Commit([], [])]


@pytest.mark.parametrize("max_post_steps", [0, 1, 16])
def test_editing_ends_within_its_budget(max_post_steps):
    """Position 2 is never content: as many passes without a mask as the budget has, and the block is left as it is."""
    restless = lambda ids, position: sure_of(1 - ids[2] % 2 if position == 2 else 2, 0.9)  # noqa: E731
    settings = {"block_length": B, "edit_threshold": 0.5, "max_post_steps": max_post_steps}
    generation = generate(Rule(restless), PROMPT, 6, **settings)
    edits = [1, 0] * 16
    in_first_block = [Commit([0], [1]), Commit([0, 1], [0, 2]), *(Commit([0], [t]) for t in edits[:max_post_steps])]
    assert generation.trace[: 2 + max_post_steps] == in_first_block
    assert generation.trace[2 + max_post_steps].positions == [2]
    assert generation.num_forwards == 2 + max_post_steps + 4 + (max_post_steps > 0)


def test_what_is_given_is_never_edited():
    def rule(ids, position):
        return sure_of(2, 0.9)

    generation = generate(Rule(rule), PROMPT, 2, block_length=B, template=[1, HOLE], edit_threshold=0.0)
    assert generation.tokens == [1, 2] and positions(generation) == [[1], []]
    pinned = generate(Rule(rule), PROMPT, 3, block_length=B, template=[1, 1, HOLE], edit_threshold=0.0)
    assert pinned.tokens == [1, 1, 2] and pinned.trace[0].positions == [2]  # the first block costs no pass


def test_a_stop_is_one_when_its_block_is_final():
    """EOS is unmasked first and edited away; the one of the second block stays, and ends the answer."""

    def rule(ids, position):
        if position == 2:
            return sure_of(EOS if ids[3] == MASK else 0, 0.9)
        return sure_of(EOS if position == 5 else 1, 0.8)

    generation = generate(Rule(rule), PROMPT, 9, block_length=B, edit_threshold=0.5, stop_ids={EOS})
    assert generation.trace[0] == Commit([0], [EOS])
    assert generation.tokens == [0, 1, 1, EOS]
    assert {p for commit in generation.trace for p in commit.positions} == set(range(6))


def test_an_editing_pass_draws_for_every_position_it_may_write():
    calls = []

    def gumbel(step: int, at: Tensor) -> Tensor:
        calls.append((step, at.tolist()))
        return torch.zeros(len(at), 5, dtype=torch.float64)

    settings = {"block_length": B, "edit_threshold": 0.9, "temperature": 1.0, "gumbel": gumbel}
    generate(Table(*SIX), PROMPT, 2, **settings)
    assert calls == [(step, [2, 3]) for step in range(3)]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"remasking": "origin"}, "low_confidence, entropy, sequential or random, not 'origin'"),
        ({"confidence": "raw"}, "tempered, filtered, plain, not 'raw'"),
        ({"remasking": "sequential", "threshold": 0.5}, "sequential has none"),
        ({"entropy_bound": 0.5}, "set remasking to entropy"),
        ({"alg_temp": 0.5, "threshold": 0.5}, "leave out"),
        ({"alg_temp": 0.5, "factor": 0.5}, "leave out"),
        ({"remasking": "entropy", "factor": 0.5}, "entropy has none"),
        ({"template": [HOLE]}, "1, not 2"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(Table(*SIX), PROMPT, 2, block_length=B, **settings)
