"""Experts: routers against the published rules, ties included, and rows alone against rows among others."""

import pytest
import torch
import torch.nn.functional as F
from reference.block_models import LLaDA2, SDARMoe
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

from dllm_plugin.kernels.route import GroupedSigmoidRouting, SoftmaxRouting, route
from dllm_plugin.models import experts as module
from dllm_plugin.models.experts import Experts, ExpertsShape, run_all, run_each

HIDDEN, EXPERTS, WIDTH = 64, 16, 24


def scores(kind, tokens=200):
    """Logits [tokens, experts] that are all different, or of few values, so that most choices are between equal ones."""
    torch.manual_seed(0)
    logits = torch.randn(tokens, EXPERTS)
    return logits if kind == "random" else (logits * 1.5).round() / 4


class Published:
    """A reference model whose router has these logits, and which shows what it has chosen."""

    def __init__(self, model, config, logits, bias=None):
        self.model = object.__new__(model)
        self.model.config = {"num_experts": EXPERTS} | config
        self.model.linear = lambda name, x: logits
        self.model.weight = lambda name: bias
        self.model.experts = lambda name, x, weights, chosen: (weights, chosen)


@pytest.mark.parametrize("top_k", [1, 3, 8, EXPERTS])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("kind", ["random", "tied"])
def test_softmax_routing(kind, normalized, top_k):
    logits = scores(kind)
    config = {"num_experts_per_tok": top_k, "norm_topk_prob": normalized}
    want_weights, want = Published(SDARMoe, config, logits).model.softmax_mixture("", logits)
    weights, chosen = route(logits, None, SoftmaxRouting(top_k, normalized))
    assert torch.equal(chosen, want.int()) and torch.equal(weights, want_weights)


@pytest.mark.parametrize("groups, kept, top_k", [(4, 2, 3), (8, 4, 8), (1, 1, 4), (2, 2, EXPERTS), (4, 1, 1)])
@pytest.mark.parametrize("kind", ["random", "tied"])
def test_grouped_sigmoid_routing(kind, groups, kept, top_k):
    logits = scores(kind)
    bias = torch.randn(EXPERTS) * 0.2 if kind == "random" else torch.randint(0, 2, (EXPERTS,)) / 8
    config = {"num_experts_per_tok": top_k, "n_group": groups, "topk_group": kept, "routed_scaling_factor": 2.5}
    want_weights, want = Published(LLaDA2, config, logits, bias).model.route("", logits)
    weights, chosen = route(logits, bias, GroupedSigmoidRouting(top_k, groups, kept, 2.5))
    assert torch.equal(chosen, want.int()) and torch.equal(weights, want_weights)
    if kind == "random" and groups == 4:
        assert (route(logits, -bias, GroupedSigmoidRouting(top_k, groups, kept, 2.5))[1] != chosen).any()


@pytest.mark.parametrize("routing", [SoftmaxRouting(3, False), GroupedSigmoidRouting(3, 4, 2, 1.0)], ids=str)
def test_among_equals_the_lowest_is_chosen(routing):
    _, chosen = route(torch.zeros(5, EXPERTS), torch.zeros(EXPERTS) if routing.has_bias else None, routing)
    assert chosen.tolist() == [[0, 1, 2]] * 5


def test_the_bias_has_no_part_in_the_weights():
    logits = torch.zeros(1, EXPERTS)
    bias = torch.zeros(EXPERTS)
    bias[[9, 14]] = 5.0
    weights, chosen = route(logits, bias, GroupedSigmoidRouting(2, 4, 2, 2.5))
    assert chosen.tolist() == [[9, 14]] and weights.tolist() == [[1.25, 1.25]]


def test_softmax_weights_are_rounded_and_sigmoid_weights_are_not():
    logits = scores("random").bfloat16()
    weights, _ = route(logits, None, SoftmaxRouting(2, True))
    exact, _ = route(logits.float(), None, SoftmaxRouting(2, True))
    assert weights.dtype == torch.bfloat16 and torch.equal(weights, exact.bfloat16())
    weights, _ = route(logits.float(), torch.zeros(EXPERTS), GroupedSigmoidRouting(2, 4, 2, 2.5))
    assert weights.dtype == torch.float32


def experts(dtype=torch.float32):
    torch.manual_seed(1)
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5
    return gate_up.to(dtype), (torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5).to(dtype)


def test_outputs_are_weighted_and_added_up():
    x, (gate_up, down) = torch.randn(40, HIDDEN), experts()
    weights, chosen = route(scores("random", 40), None, SoftmaxRouting(3, True))
    want = torch.zeros(40, HIDDEN, dtype=torch.float64)
    for token in range(40):
        for weight, expert in zip(weights[token].double(), chosen[token], strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            want[token] += weight * (down[expert].double() @ (F.silu(gate) * up))
    torch.testing.assert_close(run_each(x, gate_up, down, weights, chosen).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_sums_have_the_dtype_of_the_weights(weights_dtype):
    x, (gate_up, down) = torch.randn(8, HIDDEN).bfloat16(), experts(torch.bfloat16)
    weights, chosen = route(scores("random", 8), None, SoftmaxRouting(3, True))
    assert run_each(x, gate_up, down, weights.to(weights_dtype), chosen).dtype == weights_dtype


def test_a_row_has_its_bits_alone_and_among_others():
    """Whether its expert has one row or many. That a product of few rows has other bits was seen on x86 with MKL."""
    x, (gate_up, down) = torch.randn(40, HIDDEN), experts()
    weights, chosen = route(scores("random", 40), None, SoftmaxRouting(3, True))
    together = run_each(x, gate_up, down, weights, chosen)
    for rows in ([0], [5, 6], [7, 30, 2], list(range(20)), [39]):
        assert torch.equal(run_each(x[rows], gate_up, down, weights[rows], chosen[rows]), together[rows])


def test_no_tokens():
    weights, chosen = route(torch.zeros(0, EXPERTS), None, SoftmaxRouting(3, True))
    assert run_each(torch.zeros(0, HIDDEN), *experts(), weights, chosen).shape == (0, HIDDEN)


# ---- shares of a rank


def loaded(monkeypatch, world_size, rank, expert_parallel=False):
    """A layer of experts as one rank has it, with the tensors of a checkpoint."""
    for name, value in (("world_size", world_size), ("rank", rank)):
        monkeypatch.setattr(module, f"get_tensor_model_parallel_{name}", lambda value=value: value)
    monkeypatch.setattr(module, "tensor_model_parallel_all_reduce", lambda x: x)
    config = VllmConfig()
    config.parallel_config.enable_expert_parallel = expert_parallel
    torch.manual_seed(2)
    routing = GroupedSigmoidRouting(3, 4, 2, 2.5)
    layer = Experts(HIDDEN, ExpertsShape(EXPERTS, WIDTH, 0, routing), None, config, "mlp")
    layer.router.weight.data = torch.randn(EXPERTS, HIDDEN)
    gate, up = torch.randn(2, EXPERTS, WIDTH, HIDDEN)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH)
    for param in layer.experts.parameters():
        param.data.fill_(torch.nan)
    for shard, tensor in (("w1", gate), ("w3", up), ("w2", down)):
        param = layer.experts.w2_weight if shard == "w2" else layer.experts.w13_weight
        for expert in range(EXPERTS):
            param.weight_loader(param, tensor[expert], "", shard, expert)
    return layer


@pytest.mark.parametrize("of", ["widths", "experts"])
@pytest.mark.parametrize("run", [run_each, run_all])
@torch.inference_mode()
def test_shares_of_the_ranks_add_up(monkeypatch, run, of):
    """`run_all` is what a GPU runs in float32."""
    monkeypatch.setattr(module, "run_each", run)
    x = torch.randn(20, HIDDEN)
    whole = loaded(monkeypatch, 1, 0)(x)
    shares = sum(loaded(monkeypatch, 3, rank, of == "experts")(x) for rank in range(3))
    assert whole.abs().max() > 1
    torch.testing.assert_close(shares, whole, rtol=1e-4, atol=1e-4)


def test_a_width_that_ranks_cannot_share_is_refused(monkeypatch):
    with pytest.raises(
        ValueError, match=f"intermediate size of each expert, {WIDTH}, which tensor_parallel_size=5 does not"
    ):
        loaded(monkeypatch, 5, 0)
    assert len(loaded(monkeypatch, 5, 0, expert_parallel=True).experts.w2_weight) == 4


@pytest.mark.parametrize(
    "world_size, shares",
    [
        (1, [range(0, 16)]),
        (2, [range(0, 8), range(8, 16)]),
        (3, [range(0, 6), range(6, 11), range(11, 16)]),
        (16, [range(i, i + 1) for i in range(16)]),
    ],
)
def test_experts_of_the_ranks(monkeypatch, world_size, shares):
    """As vLLM's own layer shares them out: one after the other, the first ranks one more."""
    for rank, mine in enumerate(shares):
        layer = loaded(monkeypatch, world_size, rank, expert_parallel=True).experts
        assert layer.mine == mine and layer.w13_weight.shape == (len(mine), 2 * WIDTH, HIDDEN)
        num_experts, vllms, _ = determine_expert_map(world_size, rank, EXPERTS)
        assert num_experts == len(mine)
        assert (layer.places is None and vllms is None) or torch.equal(layer.places, vllms)


def test_more_ranks_than_experts_are_refused(monkeypatch):
    with pytest.raises(
        ValueError, match=r"16 are too few for tensor_parallel_size=17; remove --enable-expert-parallel"
    ):
        loaded(monkeypatch, 17, 0, expert_parallel=True)


def test_no_expert_of_a_dropped_group_is_chosen():
    """Whatever the bias: among four groups of four, two are kept, whose experts may all be worth less than nothing."""
    bias = torch.full((EXPERTS,), -3.0)
    bias[[0, 1, 4, 5]] = -1.0
    _, chosen = route(torch.zeros(1, EXPERTS), bias, GroupedSigmoidRouting(6, 4, 2, 1.0))
    assert chosen.tolist() == [[0, 1, 4, 5, 2, 3]]
