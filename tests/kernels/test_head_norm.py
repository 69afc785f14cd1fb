"""head_norm against rms_norm's rule, head by head, and the kernel against the rule."""

import pytest
import torch

from dllm_plugin.kernels.head_norm import head_norm, head_norm_rule, head_norm_triton
from dllm_plugin.kernels.rms_norm import rms_norm_rule

pytestmark = pytest.mark.usefixtures("rounded_bfloat16")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-6


def check(heads, num_heads, num_kv_heads, q_weight, k_weight):
    before = [tensor.clone() for tensor in (heads, q_weight, k_weight)]
    out = head_norm(heads, num_heads, num_kv_heads, q_weight, k_weight, EPS)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((heads, q_weight, k_weight), before, strict=True))
    assert out.stride(2) == 1 and out.dtype == heads.dtype
    assert out.shape == (heads.shape[0], num_heads + num_kv_heads, heads.shape[2])
    for head in range(num_heads + num_kv_heads):
        want, _ = rms_norm_rule(heads[:, head], q_weight if head < num_heads else k_weight, EPS, None)
        # one rounding in the dtype apart at most, where a float32 falls on either side of a midpoint
        tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[heads.dtype]
        torch.testing.assert_close(out[:, head], want, rtol=tolerance, atol=1e-30)
        if heads.dtype != torch.float32:
            assert (out[:, head] == want).double().mean() > 0.95 or want.numel() < 50


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [16, 80, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (7, 1), (28, 4)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_against_rms_norm(implementation, tokens, num_heads, num_kv_heads, head_size, dtype):
    qkv = (torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_size) * 3).to(dtype)
    weights = torch.randn(2, head_size).to(dtype)
    check(qkv.view(tokens, -1, head_size), num_heads, num_kv_heads, *weights)


def test_strided_heads(implementation):
    weights = torch.randn(2, 32)
    check(torch.randn(4, 999)[:, 7:487].view(4, 15, 32), 9, 3, *weights)
    check(torch.randn(12, 4, 40)[..., 8:].transpose(0, 1), 5, 7, *weights)  # heads before tokens
    check(torch.randn(1, 6, 32).expand(4, 6, 32), 4, 2, *weights)
    check(torch.randn(8, 12, 32)[::2, ::2], 4, 2, *weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [2, 64, 100])
def test_kernel_has_the_bits_of_the_rule(head_size, dtype):
    """Quarters: their squares add up to the same sum in any order."""
    heads = (torch.randint(-16, 17, (9, 12, head_size)) / 4).to(dtype)
    arguments = (heads, 5, 4, *torch.randn(2, head_size).to(dtype), EPS)
    assert torch.equal(head_norm_triton(*arguments), head_norm_rule(*arguments))


def test_zeros_and_no_tokens(implementation):
    weights = torch.ones(2, 64)
    check(torch.zeros(2, 8, 64), 4, 2, *weights)
    assert head_norm(torch.zeros(0, 8, 64), 4, 2, *weights, EPS).shape == (0, 6, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": torch.zeros(3, 256)}, r"heads must be bf16, fp16 or fp32 \[tokens, n, head_size\]"),
        ({"heads": torch.zeros(3, 8, 32, dtype=torch.float64)}, "got torch.float64"),
        ({"heads": torch.zeros(3, 8, 64)[..., ::2]}, r"contiguous last dimension, .* strides \(512, 64, 2\)"),
        ({"num_heads": 7}, "must hold num_heads and num_kv_heads, got 7 and 2"),
        ({"num_kv_heads": 0}, "got 4 and 0"),
        ({"q_weight": torch.zeros(33)}, r"q_weight must be contiguous torch.float32 \[32\]"),
        ({"k_weight": torch.zeros(32).half()}, "k_weight must be .* got torch.float16"),
        ({"k_weight": torch.zeros(64)[::2]}, r"k_weight must be .* strides \(2,\)"),
        ({"q_weight": torch.zeros(32, device="meta")}, r"q_weight on 'meta'; pass q_weight.to\('cpu'\)"),
    ],
)
def test_refusals(change, message):
    arguments = {
        "heads": torch.zeros(3, 8, 32), "num_heads": 4, "num_kv_heads": 2, "q_weight": torch.zeros(32),
        "k_weight": torch.zeros(32), "eps": EPS,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        head_norm(**arguments | change)
