"""route against its rule, which tests/test_experts.py compares with the published routers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_plugin.kernels.route import GroupedSigmoidRouting, SoftmaxRouting, route, route_rule, route_triton

SIGMOIDS = {  # experts, routing
    "llada2": (256, GroupedSigmoidRouting(8, 8, 4, 2.5)),
    "groups-of-three": (15, GroupedSigmoidRouting(4, 5, 2, 1.0)),
    "all-groups": (24, GroupedSigmoidRouting(6, 3, 3, 0.5)),
    "one-group-of-odd-size": (37, GroupedSigmoidRouting(5, 1, 1, 2.5)),
    "one-expert": (16, GroupedSigmoidRouting(1, 4, 1, 3.0)),
    "more-than-the-kept-groups-have": (12, GroupedSigmoidRouting(7, 4, 2, 1.0)),
}
SOFTMAXES = {
    "llada-moe": (64, SoftmaxRouting(8, False)),
    "sdar-moe": (128, SoftmaxRouting(8, True)),
    "odd": (60, SoftmaxRouting(5, True)),
    "all": (9, SoftmaxRouting(9, False)),
    "one": (8, SoftmaxRouting(1, True)),
}
CASES = SIGMOIDS | SOFTMAXES


def inputs(name, tokens=20, tied=False):
    """Logits that are all different, or of few values, so that most choices are between equal ones; and a bias."""
    num_experts, routing = CASES[name]
    logits, bias = torch.randn(tokens, num_experts) * 2, torch.randn(num_experts) * 0.2
    if tied:
        logits, bias = (logits * 1.5).round() / 4, torch.randint(-1, 2, (num_experts,)) / 8
    return logits, bias if routing.has_bias else None, routing


def check(logits, bias, routing):
    (weights, experts), (want_weights, want) = (run(logits, bias, routing) for run in (route_triton, route_rule))
    assert experts.dtype == torch.int32 and torch.equal(experts, want)
    assert weights.dtype == logits.dtype
    # the interpreter's exponential and torch's are each within a rounding
    rtol = 2**-7 if logits.dtype == torch.bfloat16 else 2**-10 if logits.dtype == torch.float16 else 2**-20
    torch.testing.assert_close(weights, want_weights, rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("tied", [False, True], ids=["different", "tied"])
@pytest.mark.parametrize("name", CASES)
def test_like_the_rule(name, tied):
    check(*inputs(name, tied=tied))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_half_precision(name, dtype, rounded_bfloat16):
    logits, bias, routing = inputs(name)
    check(logits.to(dtype), bias, routing)


@given(data=st.data())
def test_any_groups(data):
    groups, size = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 9))
    routing = GroupedSigmoidRouting(
        data.draw(st.integers(1, groups * size)), groups, data.draw(st.integers(1, groups)), 1.5
    )
    logits = torch.randint(-3, 4, (3, groups * size)) / 2
    check(logits, torch.randint(-2, 3, (groups * size,)) / 4, routing)


@pytest.mark.parametrize("name", CASES)
def test_extreme_logits(name, implementation):
    """Scores that are 0 or 1, and logits of no number: experts are still experts."""
    logits, bias, routing = inputs(name, tokens=4)
    logits[0] *= 1e4
    logits[1] = -200.0
    if implementation == "triton":
        check(logits[:2], bias, routing)
    logits[2], logits[3, 1] = float("nan"), float("inf")
    _, experts = route(logits, bias, routing)
    assert ((experts >= 0) & (experts < logits.shape[1])).all()
    assert all(len(set(row)) == routing.top_k for row in experts.tolist())


@pytest.mark.parametrize("name", ["llada2", "sdar-moe"])
def test_row_stride_neighbours_and_no_tokens(name, implementation):
    logits, bias, routing = inputs(name, tokens=5)
    wide = torch.full((9, 400), float("nan"))
    wide[::2, 40 : 40 + logits.shape[1]] = logits
    got = route(wide[::2, 40 : 40 + logits.shape[1]], bias, routing)
    assert all(map(torch.equal, got, route(logits, bias, routing)))
    assert all(map(torch.equal, route(logits[3:4], bias, routing), (part[3:4] for part in got)))
    weights, experts = route(logits[:0], bias, routing)
    assert weights.shape == experts.shape == (0, routing.top_k)


SIGMOID, SOFTMAX = GroupedSigmoidRouting(2, 4, 2, 1.0), SoftmaxRouting(2, True)


@pytest.mark.parametrize(
    ("logits", "bias", "routing", "message"),
    [
        (torch.zeros(8), None, SOFTMAX, r"\[tokens, experts\] of at least 2 experts"),
        (torch.zeros(2, 1), None, SOFTMAX, "of at least 2 experts side by side"),
        (torch.zeros(8, 2).T, None, SOFTMAX, "side by side"),
        (torch.zeros(2, 8, dtype=torch.float64), None, SOFTMAX, "must be torch.bfloat16 or torch.float16 or torch.float32"),
        (torch.zeros(2, 8), torch.zeros(8), SOFTMAX, "SoftmaxRouting has no bias; leave it out"),
        (torch.zeros(2, 8).half(), torch.zeros(8), SIGMOID, "logits must be torch.float32"),
        (torch.zeros(2, 9), torch.zeros(9), SIGMOID, "4 groups of as many experts"),
        (torch.zeros(2, 4), torch.zeros(4), SIGMOID, "two at least"),
        (torch.zeros(2, 8), None, SIGMOID, r"GroupedSigmoidRouting needs a bias \[8\]; pass it"),
        (torch.zeros(2, 8), torch.zeros(7), SIGMOID, r"bias must be torch.float32 \[8\]"),
        (torch.zeros(2, 8), torch.zeros(8, device="meta"), SIGMOID, "bias on 'meta'"),
    ],
)  # fmt: skip
def test_refusals(logits, bias, routing, message):
    with pytest.raises(ValueError, match=message):
        route(logits, bias, routing)
