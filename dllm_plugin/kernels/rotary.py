"""Rotary embedding of queries and keys, NeoX layout: dimension i turns with dimension i + rotary_size / 2.

`x * cos + rotated_half(x) * sin` in the dtype of `cos` and `sin`: `x` is converted to it, and both products and their sum are
rounded to it. The result is rounded to the dtype of `x`. The dimensions of a head from rotary_size on stay as they are.
Zero tokens are allowed. Rule and kernel agree exactly.
"""

import torch
from torch import Tensor

from dllm_plugin.kernels.dispatch import FLOATS, refuse, tl, triton, use_triton


def rotate(heads: Tensor, num_heads: int, num_kv_heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries [tokens, num_heads, head_size] and keys [tokens, num_kv_heads, head_size]; their strides may differ.

    They are the first of `heads` [tokens, n, head_size], bf16, fp16 or fp32 with any strides over a contiguous last dimension.
    `cos`, `sin` [tokens, 1, rotary_size], of an even rotary_size up to head_size, are contiguous, float32 or of the dtype of
    `heads`, and their two halves are alike: the kernel reads the first.
    """
    check_heads(heads, num_heads, num_kv_heads)
    tokens, _, head_size = heads.shape
    if (
        cos.dim() != 3
        or cos.shape[:2] != (tokens, 1)
        or cos.shape[2] % 2
        or not 0 < cos.shape[2] <= head_size
        or cos.shape != sin.shape
        or (cos.dtype != torch.float32 and cos.dtype != heads.dtype)
        or cos.dtype != sin.dtype
        or not (cos.is_contiguous() and sin.is_contiguous())
        or not (heads.device == cos.device == sin.device)
    ):
        must = (
            f"cos and sin must both be contiguous [{tokens}, 1, even size of at most {head_size}], float32 or {heads.dtype} "
            "as heads is"
        )
        refuse(must, {"cos": cos, "sin": sin}, {"heads": heads})
    run = rotate_triton if use_triton(heads.device.type) else rotate_rule
    return run(heads, num_heads, num_kv_heads, cos, sin)


def check_heads(heads: Tensor, num_heads: int, num_kv_heads: int) -> None:
    if heads.dim() != 3 or heads.dtype not in FLOATS or heads.stride(2) != 1:
        must = "heads must be bf16, fp16 or fp32 [tokens, n, head_size] with a contiguous last dimension"
        refuse(must, {"heads": heads})
    if num_heads < 1 or num_kv_heads < 1 or num_heads + num_kv_heads > heads.shape[1]:
        raise ValueError(
            f"heads is {list(heads.shape)} and must hold num_heads and num_kv_heads, got {num_heads} and {num_kv_heads}"
        )


def rotate_rule(heads: Tensor, num_heads: int, num_kv_heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    query, key, _ = heads.tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turning, rest = x.tensor_split((cos.shape[2],), dim=-1)
    wide = turning.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    turned = (wide * cos).add_(torch.cat((-second, first), dim=-1).mul_(sin)).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[2] else turned


def rotate_triton(heads: Tensor, num_heads: int, num_kv_heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    tokens, _, head_size = heads.shape
    count = num_heads + num_kv_heads
    out = heads.new_empty((tokens, count, head_size))
    if out.numel():
        block = min(triton.next_power_of_2(count), 16)
        # without fused multiply-adds, which would skip the rounding of a float32 product
        _rotate_kernel[(tokens, triton.cdiv(count, block))](
            heads, heads.stride(0), heads.stride(1), cos, sin, out, count, head_size, cos.shape[2] // 2,
            block, triton.next_power_of_2(cos.shape[2] // 2), triton.next_power_of_2(head_size - cos.shape[2]),
            enable_fp_fusion=False,
        )  # fmt: skip
    return out[:, :num_heads], out[:, num_heads:]


@triton.jit
def _rotate_kernel(
    heads_ptr, stride_token, stride_head, cos_ptr, sin_ptr, out_ptr,
    COUNT: tl.constexpr, SIZE: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Some heads of one token a program. HALF: dimensions of a rotated half; REST: room for those that do not turn."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    dim = tl.arange(0, BLOCK)[None, :]
    inside = (head < COUNT) & (dim < HALF)
    cos = tl.load(cos_ptr + token * 2 * HALF + dim, mask=dim < HALF)
    sin = tl.load(sin_ptr + token * 2 * HALF + dim, mask=dim < HALF)
    head_ptr = heads_ptr + token * stride_token + head * stride_head
    source = head_ptr + dim
    first = tl.load(source, mask=inside).to(cos.dtype)
    second = tl.load(source + HALF, mask=inside).to(cos.dtype)
    low = (_product(first, cos) - _product(second, sin)).to(cos.dtype)
    high = (_product(second, cos) + _product(first, sin)).to(cos.dtype)
    target = out_ptr + (token * COUNT + head) * SIZE
    tl.store(target + dim, low.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(target + dim + HALF, high.to(out_ptr.dtype.element_ty), mask=inside)
    if SIZE > 2 * HALF:
        still = 2 * HALF + tl.arange(0, REST)[None, :]
        inside = (head < COUNT) & (still < SIZE)
        tl.store(target + still, tl.load(head_ptr + still, mask=inside), mask=inside)


@triton.jit
def _product(x, y):
    """Rounded to the dtype of its factors, as float32."""
    return (x.to(tl.float32) * y.to(tl.float32)).to(x.dtype).to(tl.float32)
