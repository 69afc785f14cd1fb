"""rms_norm against float64, its roundings one by one, and the kernel against the rule."""

import pytest
import torch
from rounding import check_product

from dllm_plugin.kernels.rms_norm import rms_norm, rms_norm_rule, rms_norm_triton

pytestmark = pytest.mark.usefixtures("rounded_bfloat16")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def check(x, weight, residual):
    before = [None if tensor is None else tensor.clone() for tensor in (x, weight, residual)]
    out, total = rms_norm(x, weight, EPS, residual)
    for tensor, copy in zip((x, weight, residual), before, strict=True):
        assert tensor is copy is None or torch.equal(tensor, copy)
    if residual is None:
        assert total is x
    else:
        assert torch.equal(total, x + residual) and total.is_contiguous()
    assert out.is_contiguous() and out.shape == x.shape and out.dtype == x.dtype
    wide = total.double()
    check_product(out, wide * (wide.pow(2).mean(1, keepdim=True) + EPS).rsqrt(), weight)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 64, 1000, 4097])
@pytest.mark.parametrize("rows", [1, 5])
def test_against_float64(implementation, rows, size, dtype, with_residual):
    x, weight = (torch.randn(rows, size) * 3).to(dtype), torch.randn(size).to(dtype)
    check(x, weight, torch.randn(rows, size).to(dtype) if with_residual else None)


def test_the_largest_rows(implementation):
    for size in (16_384, 20_000):
        x = torch.randn(2, size, dtype=torch.float16)
        check(x, torch.randn(size, dtype=torch.float16), x * 0.5)


def test_strided_rows(implementation):
    wide, other = torch.randn(7, 300), torch.randn(14, 100)
    check(wide[:, 17:117], torch.randn(300)[100:200], other[::2])
    check(wide[:1].expand(4, 300)[:, :99], torch.randn(99), other[3:7, 1:])
    check(wide[::3, 200:], torch.randn(100), None)


def test_small_and_large_values(implementation):
    weight = torch.ones(64)
    check(torch.zeros(2, 64), weight, None)
    check(torch.randn(2, 64) * 1e-12, weight, None)
    check(torch.randn(2, 64) * 1e15, weight, None)
    check(torch.full((1, 64), 3e4).half(), weight.half(), torch.full((1, 64), 3e4).half())  # squares beyond fp16


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 64, 1000, 4097])
def test_kernel_has_the_bits_of_the_rule(size, dtype, with_residual):
    """Quarters: their squares add up to the same sum in any order."""
    x, residual = (torch.randint(-16, 17, (2, 9, size)) / 4).to(dtype)
    arguments = (x, torch.randn(size).to(dtype), EPS, residual if with_residual else None)
    for kernel, rule in zip(rms_norm_triton(*arguments), rms_norm_rule(*arguments), strict=True):
        assert torch.equal(kernel, rule)


@pytest.mark.parametrize("with_residual", [False, True])
def test_no_rows(implementation, with_residual):
    x = torch.zeros(0, 64)
    out, total = rms_norm(x, torch.ones(64), EPS, x if with_residual else None)
    assert out.shape == total.shape == (0, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8)}, r"x must be bf16, fp16 or fp32 \[rows, size\]"),
        ({"x": torch.zeros(3, 8, dtype=torch.float64)}, "got torch.float64"),
        ({"x": torch.zeros(3, 8, dtype=torch.int32)}, "got torch.int32"),
        ({"x": torch.zeros(3, 16)[:, ::2]}, r"contiguous columns, .* strides \(16, 2\)"),
        ({"weight": torch.zeros(9)}, r"weight must be contiguous torch.float32 \[8\]"),
        ({"weight": torch.zeros(8, dtype=torch.float16)}, "got torch.float16"),
        ({"weight": torch.zeros(16)[::2]}, r"weight must be contiguous .* strides \(2,\)"),
        ({"residual": torch.zeros(2, 8)}, r"residual must be torch.float32 \[3, 8\]"),
        ({"residual": torch.zeros(3, 8, dtype=torch.bfloat16)}, "got torch.bfloat16"),
        ({"residual": torch.zeros(8, 3).T}, r"residual must be .* strides \(1, 3\)"),
        ({"weight": torch.zeros(8, device="meta")}, r"weight on 'meta'; pass weight.to\('cpu'\)"),
        ({"residual": torch.zeros(3, 8, device="meta")}, "residual on 'meta'"),
    ],
)
def test_refusals(change, message):
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(8), "eps": EPS, "residual": torch.zeros(3, 8)}
    with pytest.raises(ValueError, match=message):
        rms_norm(**arguments | change)
