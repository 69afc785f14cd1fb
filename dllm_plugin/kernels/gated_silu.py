"""The gated activation `silu(gate) * up` of a projection that holds gates and ups side by side.

`silu(gate) = gate / (1 + exp(-gate))` is computed in float32 and rounded to the dtype before the product, which is rounded again.
Zero rows are allowed. The exponentials of kernel and rule differ by a few float32 roundings.
"""

import torch.nn.functional as F
from torch import Tensor

from dllm_plugin.kernels.dispatch import FLOATS, refuse, tl, triton, use_triton


def gated_silu(x: Tensor) -> Tensor:
    """[rows, size], contiguous, of `x` [rows, 2 * size], gates first: bf16, fp16 or fp32, any row stride."""
    if x.dim() != 2 or x.shape[1] % 2 or x.dtype not in FLOATS or x.stride(1) != 1:
        refuse("x must be bf16, fp16 or fp32 [rows, 2 * size] with contiguous columns", {"x": x})
    run = gated_silu_triton if use_triton(x.device.type) else gated_silu_rule
    return run(x)


def gated_silu_rule(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gated_silu_triton(x: Tensor) -> Tensor:
    rows, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty((rows, size))
    if out.numel():
        block = 1024
        _gated_silu_kernel[(rows, triton.cdiv(size, block))](x, x.stride(0), out, size, block)
    return out


@triton.jit
def _gated_silu_kernel(x_ptr, stride, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of columns of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    source = x_ptr + row * stride + column
    gate = tl.load(source, mask=inside).to(tl.float32)
    up = tl.load(source + SIZE, mask=inside)
    silu = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(up.dtype)
    tl.store(out_ptr + row * SIZE + column, (silu.to(tl.float32) * up.to(tl.float32)).to(up.dtype), mask=inside)
