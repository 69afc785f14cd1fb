"""gated_silu against float64, with silu rounded before the product, and the kernel against the rule."""

import pytest
import torch
from rounding import check_product

from dllm_plugin.kernels.gated_silu import gated_silu, gated_silu_rule, gated_silu_triton

pytestmark = pytest.mark.usefixtures("rounded_bfloat16")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(x):
    before = x.clone()
    out = gated_silu(x)
    assert torch.equal(x, before)
    gate, up = x.chunk(2, 1)
    assert out.is_contiguous() and out.shape == gate.shape and out.dtype == x.dtype
    check_product(out, gate.double() / (1 + (-gate.double()).exp()), up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 64, 1000, 4097])
@pytest.mark.parametrize("rows", [1, 5])
def test_against_float64(implementation, rows, size, dtype):
    check((torch.randn(rows, 2 * size) * 3).to(dtype))


def test_strided_rows(implementation):
    wide = torch.randn(9, 300)
    check(wide[:, 17:127])
    check(wide[::3, 2:])
    check(wide[:1, :40].expand(4, 40))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_has_the_bits_of_the_rule(dtype):
    """Of gates whose silu does not depend on the last bit of an exponential."""
    gate = torch.tensor([0.0, -0.0, 30.5, 200.0, 3e4, torch.inf, -200.0, -3e4, -torch.inf, torch.nan]).repeat(200)
    x = torch.cat((gate, torch.randn(2000) * 100)).to(dtype)[None]
    kernel, rule = gated_silu_triton(x), gated_silu_rule(x)
    number = ~rule.isnan()
    assert torch.equal(~kernel.isnan(), number) and number.sum() == 1600
    bits = torch.int32 if dtype == torch.float32 else torch.int16  # the sign of a zero too
    assert torch.equal(kernel[number].view(bits), rule[number].view(bits))


def test_no_rows(implementation):
    assert gated_silu(torch.zeros(0, 128)).shape == (0, 64)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(8), r"x must be bf16, fp16 or fp32 \[rows, 2 \* size\]"),
        (torch.zeros(3, 7), r"got torch.float32 \[3, 7\]"),
        (torch.zeros(3, 8, dtype=torch.float64), "got torch.float64"),
        (torch.zeros(3, 8, dtype=torch.int8), "got torch.int8"),
        (torch.zeros(8, 4).T, r"contiguous columns, .* strides \(1, 4\)"),
    ],
)
def test_refusals(x, message):
    with pytest.raises(ValueError, match=message):
        gated_silu(x)
