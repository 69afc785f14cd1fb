"""rotate against float64, and the kernel against the rule, bit for bit."""

import pytest
import torch

from dllm_plugin.kernels.rotary import rotate, rotate_rule, rotate_triton

pytestmark = pytest.mark.usefixtures("rounded_bfloat16")
# of the heads, and of cos and sin
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


def angles(tokens, head_size, dtype=torch.float32):
    angle = torch.rand(tokens, 1, head_size // 2) * 1000
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def check(heads, num_heads, num_kv_heads, cos, sin):
    before = [tensor.clone() for tensor in (heads, cos, sin)]
    got = rotate(heads, num_heads, num_kv_heads, cos, sin)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((heads, cos, sin), before, strict=True))
    used, rest = heads[:, : num_heads + num_kv_heads].double().tensor_split((cos.shape[2],), -1)
    first, second = used.chunk(2, -1)
    want = torch.cat((used * cos.double() + torch.cat((-second, first), -1) * sin.double(), rest), -1)
    tolerance = 3 * torch.finfo(cos.dtype).eps + torch.finfo(heads.dtype).eps
    for part, expected in zip(got, want.split([num_heads, num_kv_heads], 1), strict=True):
        assert part.shape == expected.shape and part.dtype == heads.dtype and part.stride(2) == 1
        torch.testing.assert_close(part.double(), expected, rtol=0, atol=tolerance * float(used.abs().max()))
        assert torch.equal(part[..., cos.shape[2] :].double(), expected[..., cos.shape[2] :])
    for kernel, rule in zip(
        rotate_triton(heads, num_heads, num_kv_heads, cos, sin),
        rotate_rule(heads, num_heads, num_kv_heads, cos, sin),
        strict=True,
    ):
        assert torch.equal(kernel, rule)


@pytest.mark.parametrize(("dtype", "angle_dtype"), DTYPES)
@pytest.mark.parametrize("head_size", [32, 80, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (7, 1), (7, 7), (28, 4)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_rotation(implementation, tokens, num_heads, num_kv_heads, head_size, dtype, angle_dtype):
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_size).to(dtype)
    check(qkv.view(tokens, -1, head_size), num_heads, num_kv_heads, *angles(tokens, head_size, angle_dtype))


def test_odd_head_sizes_and_no_values(implementation):
    for head_size in (2, 6, 34):
        check(torch.randn(3, 9, head_size), 5, 4, *angles(3, head_size))


@pytest.mark.parametrize(("dtype", "angle_dtype"), DTYPES)
@pytest.mark.parametrize(("head_size", "rotary_size"), [(128, 64), (32, 2), (40, 38), (96, 24), (31, 8)])
def test_part_of_a_head(implementation, head_size, rotary_size, dtype, angle_dtype):
    """The first dimensions turn among themselves, the rest has its very bits."""
    heads = torch.randn(3, 11, head_size).to(dtype)
    check(heads, 7, 2, *angles(3, rotary_size, angle_dtype))


def test_strided_heads(implementation):
    cos, sin = angles(4, 32)
    check(torch.randn(4, 999)[:, 7:487].view(4, 15, 32), 9, 3, cos, sin)
    check(torch.randn(12, 4, 40)[..., 8:].transpose(0, 1), 5, 7, cos, sin)  # heads before tokens
    check(torch.randn(1, 6, 32).expand(4, 6, 32), 4, 2, cos, sin)
    check(torch.randn(8, 12, 32)[::2, ::2], 4, 2, cos, sin)


def test_position_zero_changes_nothing(implementation):
    heads = torch.randn(2, 3, 32)
    query, key = rotate(heads, 2, 1, torch.ones(2, 1, 32), torch.zeros(2, 1, 32))
    assert torch.equal(torch.cat((query, key), 1), heads)


def test_no_tokens(implementation):
    query, key = rotate(torch.zeros(0, 8, 64), 4, 2, torch.zeros(0, 1, 64), torch.zeros(0, 1, 64))
    assert query.shape == (0, 4, 64) and key.shape == (0, 2, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": torch.zeros(3, 256)}, r"heads must be bf16, fp16 or fp32 \[tokens, n, head_size\]"),
        ({"heads": torch.zeros(3, 8, 32, dtype=torch.float64)}, "got torch.float64"),
        ({"heads": torch.zeros(3, 8, 31)}, r"even size of at most 31\], .* got .*\[3, 1, 32\]"),
        ({"cos": torch.zeros(3, 1, 15), "sin": torch.zeros(3, 1, 15)}, r"even size.* got .*\[3, 1, 15\]"),
        ({"cos": torch.zeros(3, 1, 0), "sin": torch.zeros(3, 1, 0)}, r"even size.* got .*\[3, 1, 0\]"),
        ({"heads": torch.zeros(3, 8, 64)[..., ::2]}, r"contiguous last dimension, .* strides \(512, 64, 2\)"),
        ({"num_heads": 7}, "must hold num_heads and num_kv_heads, got 7 and 2"),
        ({"num_heads": -1}, "got -1 and 2"),
        ({"num_kv_heads": 0}, "got 4 and 0"),
        ({"cos": torch.zeros(2, 1, 32)}, r"cos and sin must both be contiguous \[3, 1, even size of at most 32\]"),
        ({"sin": torch.zeros(3, 1, 16)}, r"torch.float32 \[3, 1, 16\]"),
        ({"sin": torch.zeros(3, 1, 32, dtype=torch.float16)}, "torch.float16"),
        ({"cos": torch.zeros(3, 1, 32).half(), "sin": torch.zeros(3, 1, 32).half()}, "float32 or torch.float32"),
        ({"cos": torch.zeros(3, 2, 32)[:, :1]}, r"strides \(64, 32, 1\)"),
        ({"sin": torch.zeros(3, 1, 64)[..., ::2]}, r"strides \(64, 64, 2\)"),
        ({"cos": torch.zeros(3, 1, 32, device="meta")}, r"cos on 'meta'; pass cos.to\('cpu'\)"),
        ({"sin": torch.zeros(3, 1, 32, device="meta")}, "sin on 'meta'"),
    ],
)
def test_refusals(change, message):
    arguments = {
        "heads": torch.zeros(3, 8, 32), "num_heads": 4, "num_kv_heads": 2, "cos": torch.zeros(3, 1, 32),
        "sin": torch.zeros(3, 1, 32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        rotate(**arguments | change)
