"""RMSNorm of each head of queries and keys, before they are rotated.

`x / sqrt(mean(x²) + eps)` over the head is computed in float32 and rounded to the dtype of `x` before it is multiplied by the
weight and rounded again, as `rms_norm` does. Zero tokens are allowed. Rule and kernel differ by a few float32 roundings,
because they add up a head in another order.
"""

import torch
from torch import Tensor

from dllm_plugin.kernels.dispatch import refuse, tl, triton, use_triton
from dllm_plugin.kernels.rotary import check_heads


def head_norm(
    heads: Tensor, num_heads: int, num_kv_heads: int, q_weight: Tensor, k_weight: Tensor, eps: float
) -> Tensor:
    """Normed queries, then keys, [tokens, num_heads + num_kv_heads, head_size] with a contiguous last dimension.

    They are the first of `heads` [tokens, n, head_size], bf16, fp16 or fp32 with any strides over a contiguous last dimension.
    `q_weight`, `k_weight` [head_size] are contiguous and have the dtype of `heads`.
    """
    check_heads(heads, num_heads, num_kv_heads)
    dtype, device = heads.dtype, heads.device
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        right = weight.shape == heads.shape[2:] and weight.dtype == dtype and weight.device == device
        if not (right and weight.is_contiguous()):
            must = f"{name} must be contiguous {dtype} [{heads.shape[2]}] as heads is {list(heads.shape)}"
            refuse(must, {name: weight}, {"heads": heads})
    run = head_norm_triton if use_triton(heads.device.type) else head_norm_rule
    return run(heads, num_heads, num_kv_heads, q_weight, k_weight, eps)


def head_norm_rule(
    heads: Tensor, num_heads: int, num_kv_heads: int, q_weight: Tensor, k_weight: Tensor, eps: float
) -> Tensor:
    wide = heads[:, : num_heads + num_kv_heads].float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(heads.dtype)
    normed[:, :num_heads].mul_(q_weight)
    normed[:, num_heads:].mul_(k_weight)
    return normed


def head_norm_triton(
    heads: Tensor, num_heads: int, num_kv_heads: int, q_weight: Tensor, k_weight: Tensor, eps: float
) -> Tensor:
    tokens, _, head_size = heads.shape
    count = num_heads + num_kv_heads
    out = heads.new_empty((tokens, count, head_size))
    if out.numel():
        block = min(triton.next_power_of_2(count), 16)
        _head_norm_kernel[(tokens, triton.cdiv(count, block))](
            heads, heads.stride(0), heads.stride(1), q_weight, k_weight, out, eps,
            num_heads, count, head_size, block, triton.next_power_of_2(head_size),
        )  # fmt: skip
    return out


@triton.jit
def _head_norm_kernel(
    heads_ptr, stride_token, stride_head, q_weight_ptr, k_weight_ptr, out_ptr, eps,
    QUERIES: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some heads of one token a program."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    dim = tl.arange(0, BLOCK)[None, :]
    inside = (head < COUNT) & (dim < SIZE)
    x = tl.load(heads_ptr + token * stride_token + head * stride_head + dim, mask=inside, other=0.0)
    weight_ptr = tl.where(head < QUERIES, q_weight_ptr + dim, k_weight_ptr + dim)
    weight = tl.load(weight_ptr, mask=inside).to(tl.float32)
    wide = x.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 1)[:, None] / SIZE + eps)
    out = weight * normed.to(x.dtype).to(tl.float32)
    tl.store(out_ptr + (token * COUNT + head) * SIZE + dim, out.to(x.dtype), mask=inside)
