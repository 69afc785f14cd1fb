"""The small operations of a decoder block: the kernels round where the references do."""

import pytest
import torch

from dllm_plugin.kernels.gated_silu import gated_silu, gated_silu_reference
from dllm_plugin.kernels.rms_norm import rms_norm, rms_norm_reference
from dllm_plugin.kernels.rotary import rotate, rotate_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# a different order of adding up, or another exponential, moves a result by one rounding of its dtype at most
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def what_is_interpreted(request):
    case = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if case.get("implementation") == "triton" and case.get("dtype") == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bf16; benchmarks/kernels.py --check compares it on a GPU")


def close(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape and not got.isnan().any()
    torch.testing.assert_close(got, want, rtol=ROUNDING[want.dtype], atol=ROUNDING[want.dtype] / 8)


def part_of_a_wider(rows, columns, dtype):
    """Rows that are not next to each other."""
    return torch.randn(rows, columns + 3).to(dtype)[:, 1 : columns + 1]


def angles(tokens, head_size, dtype):
    angle = torch.randn(tokens, 1, head_size // 2) * 50
    return [torch.cat((half, half), -1).to(dtype) for half in (angle.cos(), angle.sin())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 63), (2, 64), (5, 1000), (2, 4097), (0, 8)])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "with a residual"])
def test_rms_norm(implementation, rows, size, dtype, added):
    x, residual = (part_of_a_wider(rows, size, dtype) for _ in range(2))
    residual = residual if added else None
    weight = torch.randn(size).to(dtype)
    normed, total = rms_norm(x, weight, 1e-5, residual)
    want_normed, want_total = rms_norm_reference(x, weight, 1e-5, residual)
    assert normed.is_contiguous() and torch.equal(total, want_total)
    close(normed, want_normed)
    wide = total.double()
    exact = wide / (wide.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(normed.double(), exact, rtol=2 * ROUNDING[dtype], atol=ROUNDING[dtype] / 4)


def test_rms_norm_rounds_before_the_weight(implementation):
    """1 / 3 rounded to 16 bits and then tripled is not 1 rounded: the reference's order shows."""
    x = torch.tensor([[1.0, 3.0, 2.0, 5.0]] * 2).to(torch.float16)
    weight = torch.tensor([3.0, 1.7, 0.3, 9.1]).to(torch.float16)
    inverse = (x.float().pow(2).mean(1, keepdim=True) + 1e-5).rsqrt()
    assert torch.equal(rms_norm(x, weight, 1e-5)[0], weight * (x.float() * inverse).half())
    assert not torch.equal(weight * (x.float() * inverse).half(), (weight.float() * x.float() * inverse).half())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned_in", ["float32", "own dtype"])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_size"), [
    (1, 1, 1, 32), (5, 7, 1, 80), (3, 4, 4, 128), (2, 28, 4, 64), (0, 2, 2, 32),
])  # fmt: skip
def test_rotate(implementation, tokens, heads, kv_heads, head_size, dtype, turned_in):
    held = part_of_a_wider(tokens, (heads + 2 * kv_heads) * head_size, dtype).unflatten(1, (-1, head_size))
    cos_sin = angles(tokens, head_size, torch.float32 if turned_in == "float32" else dtype)
    got, want = rotate(held, heads, kv_heads, *cos_sin), rotate_reference(held, heads, kv_heads, *cos_sin)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other), "rounded elsewhere than the reference"
    x, (cos, sin) = held[:, : heads + kv_heads].double(), (tensor.double() for tensor in cos_sin)
    first, second = x.chunk(2, -1)
    exact = x * cos + torch.cat((-second, first), -1) * sin
    slack = 1e-6 if dtype == torch.float32 else 4 * ROUNDING[dtype]
    torch.testing.assert_close(torch.cat(got, 1).double(), exact, rtol=slack, atol=slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 63), (2, 1024), (5, 1500), (0, 4)])
def test_gated_silu(implementation, rows, size, dtype):
    x = part_of_a_wider(rows, 2 * size, dtype) * 4
    got = gated_silu(x)
    assert got.is_contiguous()
    close(got, gated_silu_reference(x))
    gate, up = x.double().chunk(2, 1)
    torch.testing.assert_close(
        got.double(), gate * gate.sigmoid() * up, rtol=2 * ROUNDING[dtype], atol=ROUNDING[dtype] / 4
    )


@pytest.mark.parametrize("call", [
    lambda: rms_norm(torch.ones(2, 4, dtype=torch.float64), torch.ones(4), 1e-5),
    lambda: rms_norm(torch.ones(4, 2).T, torch.ones(4), 1e-5),
    lambda: rms_norm(torch.ones(2, 4), torch.ones(3), 1e-5),
    lambda: rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5, torch.ones(1, 4)),
    lambda: rms_norm(torch.ones(2, 4), torch.ones(4, device="meta"), 1e-5),
    lambda: rotate(torch.ones(2, 3, 5), 1, 1, *angles(2, 4, torch.float32)),
    lambda: rotate(torch.ones(2, 3, 4), 3, 1, *angles(2, 4, torch.float32)),
    lambda: rotate(torch.ones(2, 3, 4), 1, 1, *angles(3, 4, torch.float32)),
    lambda: rotate(torch.ones(2, 3, 4), 1, 1, *angles(2, 4, torch.float16)),
    lambda: gated_silu(torch.ones(2, 5)),
    lambda: gated_silu(torch.ones(4, 2).T),
])  # fmt: skip
def test_what_a_kernel_would_misread_is_refused(call):
    with pytest.raises(ValueError, match=r"must|device"):
        call()
