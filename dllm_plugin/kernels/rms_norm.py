"""RMSNorm of every row, after the residual has been added where there is one.

`x + residual` is rounded to the dtype of `x`. `x / sqrt(mean(x²) + eps)` is computed in float32 and rounded to the dtype of `x`
before it is multiplied by the weight and rounded again, which is HF Llama's order. Zero rows are allowed. Kernel and
rule agree exactly on `x + residual`; their norms differ by a few float32 roundings, because they add up a row in
another order.
"""

import torch
from torch import Tensor

from dllm_plugin.kernels.dispatch import FLOATS, refuse, tl, triton, use_triton


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The norm of `x + residual` times `weight`, contiguous, and `x + residual`; of `x`, and `x` itself, without a residual.

    `x`, `residual` [rows, size], any row stride over contiguous columns, and `weight` [size] have one of the dtypes FLOATS.
    """
    if x.dim() != 2 or x.dtype not in FLOATS or x.stride(1) != 1:
        refuse("x must be bf16, fp16 or fp32 [rows, size] with contiguous columns", {"x": x})
    dtype, device = x.dtype, x.device
    if weight.shape != x.shape[1:] or weight.dtype != dtype or not weight.is_contiguous() or weight.device != device:
        must = f"weight must be contiguous {dtype} [{x.shape[1]}] as x is {list(x.shape)}"
        refuse(must, {"weight": weight}, {"x": x})
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != dtype or residual.stride(1) != 1 or residual.device != device
    ):
        must = f"residual must be {dtype} {list(x.shape)} with contiguous columns as x is"
        refuse(must, {"residual": residual}, {"x": x})
    run = rms_norm_triton if use_triton(x.device.type) else rms_norm_rule
    return run(x, weight, eps, residual)


def rms_norm_rule(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    if residual is not None:
        x = x + residual
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype).mul_(weight), x


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, size = x.shape
    out = x.new_empty((rows, size))
    total = x if residual is None else x.new_empty((rows, size))
    if rows and size:
        block = triton.next_power_of_2(size)
        _rms_norm_kernel[(rows,)](
            x, x.stride(0), residual, 0 if residual is None else residual.stride(0), weight, out, total, eps,
            size, block, num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return out, total


@triton.jit
def _rms_norm_kernel(
    x_ptr, x_stride, residual_ptr, residual_stride, weight_ptr, out_ptr, total_ptr, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + column, mask=inside).to(tl.float32)
    wide = x.to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        total = (wide + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * SIZE + column, total, mask=inside)
        wide = total.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    out = weight * normed.to(x.dtype).to(tl.float32)
    tl.store(out_ptr + row * SIZE + column, out.to(x.dtype), mask=inside)
