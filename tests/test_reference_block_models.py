"""Reference models and checkpoints of the block-diffusion families: layouts, routers, who sees whom."""

import json

import pytest
import torch
from reference import block_checkpoints, fast_dllm, llada
from reference.block_checkpoints import WRITERS
from reference.block_models import BlockModel, CachedBlockModel, LLaDA2, SDARMoe, block_causal, load, top
from safetensors import safe_open
from torch import Tensor

PROMPT = list(range(40, 53))


def visible_to(model: BlockModel, length: int) -> Tensor:
    return block_causal(length, model.block_length or length)


def logits_of(model: BlockModel, ids: list[int]) -> Tensor:
    return model.logits(torch.tensor(ids), visible_to(model, len(ids)))


def tensors_in(folder) -> dict[str, Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def test_block_causal_counts_blocks_from_position_0():
    assert block_causal(5, 2).int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


# --- checkpoints ----------------------------------------------------------------------------------------------------

DENSE = 11  # q, k, v, o, two norms of heads, two of rows, three of the MLP
EXPERTS = 8 * 3 + 1
FORMATS = {
    # family: architecture, model_type, tensors in the file, block length, shift
    "sdar": ("SDARForCausalLM", "sdar", 2 * DENSE + 3, 4, 0),
    "sdar-moe": ("SDARMoeForCausalLM", "sdar_moe", 2 * (8 + EXPERTS) + 3, 4, 0),
    "llada2": ("LLaDA2MoeModelLM", "llada2_moe", (6 + 3) + 2 * (6 + EXPERTS + 1 + 3) + 3, 32, 0),
    "fast-dllm-v2": ("Fast_dLLM_QwenForCausalLM", "Fast_dLLM_Qwen", 2 * 12 + 3, 32, 1),
    "stable-diffcoder": ("StableDiffcoderForCausalLM", "llama", 2 * 9 + 3, 4, 0),
    "dream-reasoner": ("DreamForCausalLM", "Dream", 2 * DENSE + 3, 32, 0),
    "llada-moe": ("LLaDAMoEModelLM", "llada", 2 * (8 + EXPERTS) + 3, None, 0),
}


UNDER_FULL_ATTENTION = [family for family, (*_, block_length, _) in FORMATS.items() if block_length is None]


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_has_exactly_the_tensors_the_model_uses(family, tied, tmp_path):
    architecture, model_type, tensors, block_length, shift = FORMATS[family]
    model = load(WRITERS[family](tmp_path, 3, tie_word_embeddings=tied))
    logits = logits_of(model, [5, 6, 7])
    assert logits.shape == (3, 331) and logits.dtype == torch.float32 and logits.isfinite().all()
    assert model.used == set(model.weights) == set(tensors_in(tmp_path))
    assert len(model.weights) == tensors - tied
    assert (model.config["architectures"], model.config["model_type"]) == ([architecture], model_type)
    assert (model.block_length, model.shift, model.eos_token_id) == (block_length, shift, 320)
    assert model.mask_token_id == (5 if family == "stable-diffcoder" else 325)


@pytest.mark.parametrize("family", WRITERS)
def test_checkpoints_are_a_function_of_the_seed(family, tmp_path):
    bytes_of = lambda folder: (folder / "model.safetensors").read_bytes()  # noqa: E731
    assert bytes_of(WRITERS[family](tmp_path / "a", 1)) == bytes_of(WRITERS[family](tmp_path / "b", 1))
    assert bytes_of(WRITERS[family](tmp_path / "a", 1)) != bytes_of(WRITERS[family](tmp_path / "c", 2))


@pytest.mark.parametrize("family", WRITERS)
def test_predictions_are_diverse_and_depend_on_what_is_committed(family, tmp_path):
    model = load(WRITERS[family](tmp_path, 1))
    ids = PROMPT + [model.mask_token_id] * 32
    before = logits_of(model, ids)[13:]
    assert len(set(before.argmax(-1).tolist())) >= 5
    exact = logits_of(load(tmp_path, torch.float64), ids)[13:]
    torch.testing.assert_close(before.double(), exact, rtol=0, atol=1e-4)
    top_probability = before.softmax(-1).amax(-1)
    assert top_probability.max() - top_probability.min() > 0.1
    ids[20] = 7
    assert (logits_of(model, ids)[13:].argmax(-1) != before.argmax(-1)).any()


@pytest.mark.parametrize("family", ["sdar-moe", "llada2", "llada-moe"])
def test_merged_experts_are_the_same_experts(family, tmp_path):
    separate = load(WRITERS[family](tmp_path / "separate", 1))
    merged = load(WRITERS[family](tmp_path / "merged", 1, merged_experts=True))
    stacked = {name: t.shape for name, t in tensors_in(tmp_path / "merged").items() if ".experts." in name}
    last = separate.config["num_hidden_layers"] - 1
    assert stacked[f"model.layers.{last}.mlp.experts.gate_proj"] == (8, 64, 128)
    assert stacked[f"model.layers.{last}.mlp.experts.down_proj"] == (8, 128, 64)
    assert set(separate.weights) == set(merged.weights)
    assert all(torch.equal(tensor, merged.weights[name]) for name, tensor in separate.weights.items())


@pytest.mark.parametrize("family", WRITERS)
def test_shards_hold_the_same_tensors(family, tmp_path):
    whole = tensors_in(WRITERS[family](tmp_path / "whole", 1))
    folder = WRITERS[family](tmp_path / "shards", 1, shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(p.name for p in folder.glob("*.safetensors")) == sorted(set(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), whole[name])
    assert set(index["weight_map"]) == set(whole)


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16], ids=str)
def test_the_bias_of_experts_has_a_dtype_of_its_own(bias, tmp_path):
    block_checkpoints.write_llada2(tmp_path, 1, dtype=torch.bfloat16, expert_bias_dtype=bias)
    dtypes = {name: tensor.dtype for name, tensor in tensors_in(tmp_path).items()}
    assert {dtypes[f"model.layers.{n}.mlp.gate.expert_bias"] for n in (1, 2)} == {bias}
    assert {dtype for name, dtype in dtypes.items() if "expert_bias" not in name} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_option_of_another_family_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="num_experts"):
        block_checkpoints.write_sdar(tmp_path, num_experts=4)


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in WRITERS if family not in UNDER_FULL_ATTENTION])
def test_a_row_sees_its_block_and_what_is_before_it(family, tmp_path):
    model = load(WRITERS[family](tmp_path, 1, block_size=4))
    assert model.block_length == 4
    ids = PROMPT[:12]
    for changed in (0, 5, 11):
        other = [*ids[:changed], 7, *ids[changed + 1 :]]
        moved = (logits_of(model, ids) - logits_of(model, other)).abs().amax(-1) > 1e-4
        assert moved.tolist() == [i >= changed // 4 * 4 for i in range(12)]


@pytest.mark.parametrize("family", UNDER_FULL_ATTENTION)
def test_every_position_sees_every_other(family, tmp_path):
    model = load(WRITERS[family](tmp_path, 1))
    one, other = (model.logits_for_positions(torch.tensor([3, 1, 4, 1, last])) for last in (5, 6))
    assert ((one - other).abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("family", WRITERS)
def test_block_after_block_over_a_cache_gives_the_same_rows(family, tmp_path):
    """What the decoders rest on when they recompute final blocks instead of keeping their keys and values."""
    model = load(WRITERS[family](tmp_path, 1))
    ids = torch.tensor(PROMPT)
    visible = block_causal(13, 4)
    cached = CachedBlockModel(model, 13)
    rows = [cached.forward(ids, start, min(start + 4, 13), visible) for start in range(0, 13, 4)]
    torch.testing.assert_close(torch.cat(rows), model.logits(ids, visible), rtol=0, atol=1e-4)


def test_a_key_that_nobody_has_written_is_noticed(tmp_path):
    cached = CachedBlockModel(load(WRITERS["sdar"](tmp_path, 1)), 8)
    assert cached.forward(torch.tensor(PROMPT[:8]), 4, 8, 8).isnan().all()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_llada_moe_is_decoded_by_the_loops_of_llada(cache, tmp_path):
    model = load(WRITERS["llada-moe"](tmp_path, 1))
    plain = llada.generate(model, PROMPT, 16, 16, 8)
    refreshed = fast_dllm.generate(model, PROMPT, 16, 16, 8, cache=cache, cache_refresh=1)
    assert refreshed.trace == plain.trace
    assert fast_dllm.generate(model, PROMPT, 16, 16, 8, cache=cache).trace != plain.trace


def test_only_the_first_part_of_a_head_is_rotated(tmp_path):
    model = load(WRITERS["llada2"](tmp_path, 1))
    assert (model.head_dim, model.rotary_dim, model.config["rotary_dim"]) == (32, 16, 16)
    quarter_turn = torch.zeros(1, 16), torch.ones(1, 16)
    x = torch.arange(32.0)[None, None]
    rotated = model.rotate(x, *quarter_turn)[0, 0].tolist()
    assert rotated == [*(-i for i in range(8, 16)), *range(8), *range(16, 32)]


def test_rows_of_the_fused_weight_are_queries_then_keys_then_values(tmp_path):
    model = load(WRITERS["llada2"](tmp_path, 1))
    fused = model.weights["model.layers.0.attention.query_key_value.weight"]
    assert fused.shape == ((4 + 2 + 2) * 32, 128)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    for part, rows in enumerate((slice(0, 128), slice(128, 192), slice(192, 256))):
        before = model.queries_keys_values("model.layers.0", x)
        fused[rows] *= -1
        after = model.queries_keys_values("model.layers.0", x)
        changed = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
        assert changed == [index == part for index in range(3)]


def test_a_null_head_dim_is_hidden_over_heads(tmp_path):
    model = load(WRITERS["dream-reasoner"](tmp_path, 1))
    assert model.config["head_dim"] is None and model.head_dim == 32
    wide = load(WRITERS["sdar"](tmp_path / "wide", 1, head_dim=48))
    assert logits_of(wide, PROMPT).isfinite().all()
    assert wide.weights["model.layers.0.self_attn.o_proj.weight"].shape == (128, 4 * 48)


# --- routers --------------------------------------------------------------------------------------------------------


def test_the_lowest_expert_of_equals_is_chosen():
    assert top(torch.tensor([[0.1, 0.9, 0.9, 0.9, 0.2, 0.9]]), 2).tolist() == [[1, 2]]
    assert top(torch.ones(1, 64), 5).tolist() == [[0, 1, 2, 3, 4]]


ROUTER = {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 8, "vocab_size": 1, "rms_norm_eps": 1e-6}


def llada2_router(bias: list[float], **config) -> LLaDA2:
    config = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 2, "routed_scaling_factor": 2.5} | config
    weights = {"mlp.gate.weight": torch.eye(8), "mlp.gate.expert_bias": torch.tensor(bias)}
    return LLaDA2(ROUTER | config, weights)


def logit(*probabilities: float) -> Tensor:
    return torch.logit(torch.tensor([probabilities]))


ROUTES = {
    # groups of two are worth 0.9, 1.2, 1.1 and 0.3: the best expert of all, 0.85, is in none of the two that are kept
    "groups": ([0.0] * 8, logit(0.85, 0.05, 0.6, 0.6, 0.8, 0.3, 0.1, 0.2), [4, 2]),
    # a bias of 0.5 for expert 7 lifts its group to 1.3 and makes it the best; its weight stays 0.2
    "bias": ([0.0] * 7 + [1.0], logit(0.85, 0.05, 0.6, 0.6, 0.8, 0.3, 0.1, 0.2), [7, 2]),
    # all alike: the lowest groups, in them the lowest experts
    "ties": ([0.0] * 8, logit(*[0.5] * 8), [0, 1]),
}


@pytest.mark.parametrize("bias, x, expected", ROUTES.values(), ids=ROUTES)
def test_llada2_chooses_by_group_and_bias_and_weighs_without_bias(bias, x, expected):
    weights, chosen = llada2_router(bias).route("mlp", x)
    assert chosen.tolist() == [expected]
    unbiased = x.sigmoid()[0, expected]
    torch.testing.assert_close(weights[0], 2.5 * unbiased / unbiased.sum())


def test_llada2_does_not_normalise_a_single_expert():
    weights, _ = llada2_router([0.0] * 8, num_experts_per_tok=1).route("mlp", logit(*[0.5] * 8))
    torch.testing.assert_close(weights, torch.tensor([[1.25]]))


@pytest.mark.parametrize(
    "norm_topk_prob, expected", [(True, 0.5 / 0.8 * 1 + 0.3 / 0.8 * 2), (False, 0.5 * 1 + 0.3 * 2)]
)
def test_softmax_mixture_weighs_the_best_experts(norm_topk_prob, expected):
    """Each expert is a gated MLP of width 1 that gives a number of its own: 3, 1, 2, 4 for experts 0 to 3."""
    config = ROUTER | {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": norm_topk_prob}
    probabilities = torch.tensor([0.15, 0.5, 0.3, 0.05])
    weights = {"mlp.gate.weight": probabilities.log()[:, None]}
    for expert, value in enumerate([3.0, 1.0, 2.0, 4.0]):
        weights |= {
            f"mlp.experts.{expert}.gate_proj.weight": torch.ones(1, 1),
            f"mlp.experts.{expert}.up_proj.weight": torch.ones(1, 1),
            f"mlp.experts.{expert}.down_proj.weight": torch.tensor([[value / torch.sigmoid(torch.tensor(1.0))]]),
        }
    out = SDARMoe(config, weights).softmax_mixture("mlp", torch.ones(1, 1))
    assert out.item() == pytest.approx(expected)


def test_every_expert_and_the_bias_matter_in_a_tiny_checkpoint(tmp_path):
    model = load(WRITERS["llada2"](tmp_path, 1))
    ids = list(range(100, 164))
    before = logits_of(model, ids)
    for name in ("gate.expert_bias", *(f"experts.{expert}.down_proj.weight" for expert in range(8))):
        kept = model.weights[f"model.layers.1.mlp.{name}"]
        model.weights[f"model.layers.1.mlp.{name}"] = torch.zeros_like(kept)
        assert not torch.equal(logits_of(model, ids), before), name
        model.weights[f"model.layers.1.mlp.{name}"] = kept
