"""Reference decoders over tiny checkpoints of the block-diffusion families, and Fast-dLLM v2's own loop."""

import pytest
import torch
from reference.block import HOLE, generate, generate_fast_dllm_v2
from reference.block_checkpoints import WRITERS
from reference.block_models import BlockModel, block_causal, load
from reference.decoding import Commit, choose, most_confident
from test_reference_block import EOS, MASK, PROMPT, SIX, Table, positions, sure_of
from torch import Tensor

LOOPS = [family for family in WRITERS if family not in ("fast-dllm-v2", "llada-moe")]
LONG = list(range(40, 53))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, BlockModel]:
    return {family: load(WRITERS[family](tmp_path_factory.mktemp(family), 1, block_size=8)) for family in WRITERS}


# --- one loop, several families -------------------------------------------------------------------------------------


def published(model, prompt: list[int], gen_length: int, block: int, steps: int, threshold: float) -> list[int]:
    """The loop of LLaDA2.0, which is SDAR's dynamic one, as its file has it: nothing stops it within a block."""
    end = -(-(len(prompt) + gen_length) // block) * block
    ids = torch.tensor(prompt + [model.mask_token_id] * (end - len(prompt)))
    known = torch.arange(end) < len(prompt)
    for start in range(len(prompt) // block * block, end, block):
        window = slice(start, start + block)
        for step in range(steps):
            if known[window].all():
                break
            logits = model.logits(ids[: window.stop], block_causal(window.stop, block))[window]
            chosen = choose(logits, model.mask_token_id)
            probability = logits.softmax(-1).gather(1, chosen[:, None])[:, 0]
            probability = probability.masked_fill(known[window], -torch.inf)
            high = probability > threshold
            quota = block // steps + (step < block % steps)
            if high.sum() >= quota:
                taken = high.nonzero()[:, 0]
            else:
                taken = most_confident(probability, min(quota, int((~known[window]).sum())))
            ids[start + taken] = chosen[taken]
            known[start + taken] = True
    return ids[len(prompt) :][:gen_length].tolist()


@pytest.mark.parametrize("steps, threshold", [(8, 0.95), (8, 0.3), (3, 0.5), (1, 2.0)])
@pytest.mark.parametrize("family", LOOPS)
def test_it_is_the_published_loop(family, steps, threshold, models):
    expected = published(models[family], LONG, 21, 8, steps, threshold)
    settings = {"block_length": 8, "steps_per_block": steps, "threshold": threshold}
    generation = generate(models[family], LONG, 21, **settings)
    assert generation.tokens == expected
    if steps == 8 and threshold == 0.3:
        assert any(len(commit.positions) > 1 for commit in generation.trace)


@pytest.mark.parametrize("family", LOOPS)
@pytest.mark.parametrize("edit_threshold", [None, 0.2], ids=["plain", "editing"])
def test_a_longer_answer_begins_with_the_shorter(family, edit_threshold, models):
    settings = {"block_length": 8, "threshold": 0.4, "edit_threshold": edit_threshold}
    longest = generate(models[family], LONG, 24, **settings)
    if edit_threshold is not None:
        assert len([p for commit in longest.trace for p in commit.positions]) > 24 + 3
    for max_tokens in (1, 3, 4, 11, 17):
        shorter = generate(models[family], LONG, max_tokens, **settings)
        assert shorter.tokens == longest.tokens[:max_tokens]
        assert shorter.trace == longest.trace[: shorter.num_forwards]


@pytest.mark.parametrize("family", LOOPS)
def test_a_stop_cuts_the_answer(family, models):
    settings = {"block_length": 8, "threshold": 0.4}
    whole = generate(models[family], LONG, 24, **settings)
    for token in whole.tokens[2:20:5]:
        stopped = generate(models[family], LONG, 24, stop_ids={token}, **settings)
        assert stopped.tokens == whole.tokens[: whole.tokens.index(token) + 1]
        assert stopped.trace == whole.trace[: stopped.num_forwards]


@pytest.mark.parametrize("family", LOOPS)
def test_a_threshold_above_1_is_one_token_a_pass(family, models):
    without = generate(models[family], LONG, 11, block_length=8)
    assert generate(models[family], LONG, 11, block_length=8, threshold=1.5) == without
    assert all(len(commit.positions) == 1 for commit in without.trace)


# --- Fast-dLLM v2 ---------------------------------------------------------------------------------------------------


class Shifted(Table):
    """A table whose row i predicts position i + 1, and which notes over what each pass runs."""

    shift = 1

    def __init__(self, *rows: list[float], prompt_length: int = len(PROMPT)) -> None:
        super().__init__(*rows, prompt_length=prompt_length)
        self.rows = torch.cat([self.rows[1:], self.rows[:1]])
        self.windows: list[tuple[int, int]] = []

    def new_cache(self, length: int) -> None:
        return None

    def forward(self, ids: Tensor, start: int, end: int, visible: Tensor, cache: None) -> Tensor:
        self.windows.append((start, end))
        return self.rows[start:end]


def decode(model: Shifted, prompt: list[int], max_tokens: int, **settings):
    settings = {"block_length": 4, "sub_block_length": 2} | settings
    return generate_fast_dllm_v2(model, prompt, max_tokens, **settings)


def test_sub_blocks_from_left_to_right_and_a_seed_in_front_of_each_block():
    model = Shifted(*SIX)
    generation = decode(model, PROMPT, 6)
    # of the first block 3 before 2; the seed 4; then 5 alone, 6 before 7 although 6 is surer than 5
    assert positions(generation) == [[1], [0], [2], [3], [4], [5]]
    assert generation.tokens == [0, 1, 2, 0, 1, 2]
    assert model.seen == [[*PROMPT, 0, 1]]  # what the seed is the next token of
    assert model.windows == [(0, 4)] * 2 + [(0, 4)] + [(4, 8)] * 3


@pytest.mark.parametrize("prompt", [[1, 2, 0, 1], [1, 2, 0, 1] * 2], ids=["one block", "two blocks"])
def test_a_prompt_of_whole_blocks_is_followed_by_a_seed(prompt):
    """Also where it is one block, which the published code does not forward at all."""
    model = Shifted(*SIX, prompt_length=len(prompt))
    generation = decode(model, prompt, 3)
    assert positions(generation) == [[0], [1], [2]]
    assert model.seen == [prompt]


def test_an_answer_may_end_with_a_seed():
    model = Shifted(*SIX, prompt_length=4)
    assert decode(model, [1] * 4, 1).trace == [Commit([0], [0])]


def test_a_threshold_counts_within_the_sub_block():
    model = Shifted(*[sure_of(0, p) for p in (0.5, 0.9, 0.7, 0.6, 0.8, 0.95, 0.9, 0.9)], prompt_length=4)
    assert positions(decode(model, [1] * 4, 8, threshold=0.55)) == [[0], [1], [2, 3], [4], [5], [6, 7]]
    assert positions(decode(model, [1] * 4, 8, threshold=0.85)) == [[0], [1], [2], [3], [4], [5], [6, 7]]


def test_a_seed_may_be_a_stop_and_nothing_is_run_after_it():
    model = Shifted(sure_of(EOS, 0.9), prompt_length=4)
    assert decode(model, [1] * 4, 8, stop_ids={EOS}).tokens == [EOS]
    within = Shifted(sure_of(0, 0.9), sure_of(EOS, 0.9), *SIX, prompt_length=4)
    generation = decode(within, [1] * 4, 8, stop_ids={EOS})
    assert generation.tokens == [0, EOS] and generation.num_forwards == 2


def test_a_seed_is_never_the_mask_nor_drawn():
    model = Shifted([0.0, 0.1, 0.2, 0.0, 9.0], *SIX, prompt_length=4)
    calls = []

    def gumbel(step: int, at: Tensor) -> Tensor:
        calls.append((step, at.tolist()))
        return 99.0 * torch.eye(5, dtype=torch.float64)[[1] * len(at)]

    generation = decode(model, [1] * 4, 4, temperature=1.0, gumbel=gumbel)
    assert generation.tokens == [2, 1, 1, 1]
    assert calls == [(0, [5]), (1, [6, 7]), (2, [7 if generation.trace[2].positions == [2] else 6])]


def test_a_pinned_first_token_needs_no_seed():
    model = Shifted(*SIX, prompt_length=4)
    generation = decode(model, [1] * 4, 4, template=[MASK, HOLE, HOLE, 2])
    assert generation.tokens == [MASK, 1, 2, 2] and positions(generation) == [[1], [2]]


def test_with_a_block_cache_a_sub_block_runs_alone_once_its_first_token_is_known():
    rows = [sure_of(0, p) for p in (0.5, 0.6, 0.7, 0.85, 0.9, 0.8, 0.7)]  # positions 9 to 15
    order = [[2], [1], [0], [4], [3], [5], [6]]
    with_cache, without = (Shifted(*rows, prompt_length=9) for _ in range(2))
    settings = {"block_length": 8, "sub_block_length": 4}
    assert positions(decode(with_cache, [1] * 9, 7, block_cache=True, **settings)) == order
    assert positions(decode(without, [1] * 9, 7, **settings)) == order
    # the prompt; the first pass of a block; 8 is known; 12 is masked until the second pass over its sub-block
    whole, first, second = (8, 16), (8, 12), (12, 16)
    assert with_cache.windows == [(0, 8), whole, first, first, whole, whole, second, second]
    assert without.windows == [(0, 8), *[whole] * 7]


def test_each_block_begins_with_a_pass_over_all_of_it():
    model = Shifted(*[sure_of(0, 0.5)] * 8, prompt_length=4)
    decode(model, [1] * 4, 8, block_cache=True)
    whole_then_alone = [(8, 12), (8, 12), (10, 12)]
    assert model.windows == [(0, 4), (4, 8), (4, 8), (6, 8), (0, 8), *whole_then_alone]


@pytest.mark.parametrize("prompt_length", [31, 32, 52])
@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("layers, sub_block_length, stale", [(1, 8, False), (2, 32, False), (2, 8, True)])
def test_a_block_cache_is_stale_behind_the_first_layer(
    layers, sub_block_length, stale, threshold, prompt_length, tmp_path
):
    """In the first layer keys and values depend on tokens alone, and those outside a sub-block that runs alone stay."""
    model = load(WRITERS["fast-dllm-v2"](tmp_path, 1, num_hidden_layers=layers))
    prompt = (LONG * 4)[:prompt_length]
    settings = {"sub_block_length": sub_block_length, "threshold": threshold}
    exact, cached = (generate_fast_dllm_v2(model, prompt, 50, block_cache=c, **settings) for c in (False, True))
    assert (exact.tokens != cached.tokens) == stale
    assert exact.trace[:2] == cached.trace[:2]


def test_rows_are_those_of_the_whole_sequence_shifted_by_one(models):
    """Without a block cache the loop is this one: recompute everything, row i - 1 for position i."""
    model = models["fast-dllm-v2"]
    ids = torch.tensor([*LONG, *[model.mask_token_id] * 19])
    for start in (8, 16, 24):
        while (masked := (ids[start : start + 8] == model.mask_token_id).nonzero()[:, 0] + start).numel():
            sub_block = masked[masked // 4 == masked[0] // 4]
            if masked[0] == start:
                sub_block, end = masked[:1], start
            else:
                end = start + 8
            logits = model.logits(ids[:end], block_causal(end, 8))[sub_block - 1]
            chosen = choose(logits, model.mask_token_id)
            best = logits.softmax(-1).gather(1, chosen[:, None])[:, 0].argmax()
            ids[sub_block[best]] = chosen[best]
    generation = generate_fast_dllm_v2(model, LONG, 19, block_length=8, sub_block_length=4)
    assert generation.tokens == ids[13:].tolist()
    assert generation.num_forwards == 19


def test_a_shifted_model_has_a_loop_of_its_own(models):
    with pytest.raises(ValueError, match="generate_fast_dllm_v2"):
        generate(models["fast-dllm-v2"], LONG, 4, block_length=8)
