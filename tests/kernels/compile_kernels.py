"""Compiles all kernels for a GPU that need not be there: python tests/kernels/compile_kernels.py 90

Runs the Triton wrappers on CPU tensors with a stand-in driver that compiles each launch and skips it, so what is compiled
is what the wrappers ask for. Prints one JSON line a configuration: registers, bytes of stack (spills) and of shared memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from dllm_plugin.kernels import dispatch
from dllm_plugin.kernels.confidence import Choice, confidence_triton
from dllm_plugin.kernels.filter import Cut, Filters, find_cut_triton
from dllm_plugin.kernels.gated_silu import gated_silu_triton
from dllm_plugin.kernels.head_norm import head_norm_triton
from dllm_plugin.kernels.rms_norm import rms_norm_triton
from dllm_plugin.kernels.rotary import rotate_triton
from dllm_plugin.kernels.route import GroupedSigmoidRouting, Routing, SoftmaxRouting, route_triton
from dllm_plugin.kernels.store_kv import split_kv_cache, store_kv_triton
from dllm_plugin.kernels.unmask import Segments, unmask_triton
from dllm_plugin.kernels.window_attention import PagedWindows, Windows, attention_triton


class OfflineDriver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention(head_size: int, dtype: torch.dtype, rows: int, paged: bool, splits: int, group: int = 1) -> None:
    query = torch.zeros(rows // group, group * 2, head_size, dtype=dtype)
    out = torch.empty_like(query)
    ragged = {"query_start_loc": int32(0, rows // group), "max_query_len": rows // group}
    if paged:
        keys = split_kv_cache(torch.zeros(4, 2, 16, 2 * head_size, dtype=dtype), head_size)
        windows = PagedWindows(
            **ragged, window_start=int32(0), visible=int32(64), prefix_len=int32(0), block_length=int32(0),
            block_table=int32(0, 1, 2, 3)[None], max_visible=64,
        )  # fmt: skip
    else:
        keys = (torch.zeros(rows // group, 2, head_size, dtype=dtype),) * 2
        windows = Windows(**ragged)
    attention_triton(query, *keys, windows, 1.0, out, num_splits=splits)


def confidence(
    dtype: torch.dtype, vocab: int, sampled: bool, statistics: bool, mass: bool = False, filtered: bool = False
) -> None:
    logits = torch.zeros(16, vocab, dtype=dtype)  # several tiles a part
    ids = torch.zeros(16, 1, dtype=torch.int64)
    row = torch.zeros(16, dtype=torch.int64)
    drawn = {"temperature": torch.ones(16), "tempered": torch.ones(16, dtype=torch.bool)} if sampled else {}
    drawn |= dict.fromkeys(("seed", "position", "timestep"), row) if sampled else {}
    asked = dict.fromkeys(("log_probability", "margin", "entropy"), statistics)
    if filtered:
        drawn |= {"cut": Cut(torch.zeros(16), torch.zeros(16, dtype=torch.int32)), "unfiltered": drawn["tempered"]}
    confidence_triton(logits, Choice(no_choice=ids, no_mass=ids if mass else None, **drawn, **asked))


def find_cut(dtype: torch.dtype, vocab: int, gone: bool) -> None:
    one = torch.ones(16)
    find_cut_triton(
        torch.zeros(16, vocab, dtype=dtype),
        Filters(
            temperature=one, top_k=one.long(), top_p=one, min_p=one, k_first=one.bool(),
            gone=one.long()[:, None] if gone else None,
        ),
    )  # fmt: skip


def unmask(policies: bool, integer: torch.dtype, skip_unmasked: bool) -> None:
    tokens, masked = torch.zeros(2, 64, dtype=integer), torch.ones(2, 64, dtype=torch.bool)
    row = torch.zeros(4, dtype=torch.int64)
    one, real, long = int32(1), torch.ones(1), torch.ones(1, dtype=torch.int64)
    optional = {"threshold": real, "factor": real, "alg_temp": real, "seed": long, "timestep": long} if policies else {}
    segments = Segments(
        slot=int32(0).to(integer), request_start_loc=int32(0, 1) if policies else None, segment_start_loc=int32(0, 4),
        row_cell=row, quota=one, skip_unmasked=skip_unmasked, **optional,
    )  # fmt: skip
    unmask_triton(tokens, masked, segments, row, torch.rand(4))


def store(dtype: torch.dtype, head_size: int) -> None:
    key = torch.zeros(3, 2, head_size, dtype=dtype)
    caches = split_kv_cache(torch.zeros(4, 2, 16, 2 * head_size, dtype=dtype), head_size)
    store_kv_triton(key, key, *caches, torch.zeros(3, dtype=torch.int64))


def norm(dtype: torch.dtype, size: int, residual: bool) -> None:
    x = torch.zeros(2, size, dtype=dtype)
    rms_norm_triton(x, x[0], 1e-5, x if residual else None)


def heads_norm(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_size: int) -> None:
    heads = torch.zeros(2, num_heads + 2 * num_kv_heads, head_size, dtype=dtype)
    head_norm_triton(heads, num_heads, num_kv_heads, heads[0, 0], heads[0, 1], 1e-6)


def rotary(
    dtype: torch.dtype, angles: torch.dtype, num_heads: int, num_kv_heads: int, head_size: int, rotary_size: int = 0
) -> None:
    heads = torch.zeros(2, num_heads + 2 * num_kv_heads, head_size, dtype=dtype)
    angle = torch.zeros(2, 1, rotary_size or head_size, dtype=angles)
    rotate_triton(heads, num_heads, num_kv_heads, angle, angle)


def gated(dtype: torch.dtype, size: int) -> None:
    gated_silu_triton(torch.zeros(2, 2 * size, dtype=dtype))


def routes(dtype: torch.dtype, num_experts: int, routing: Routing) -> None:
    bias = torch.zeros(num_experts) if routing.has_bias else None
    route_triton(torch.zeros(2, num_experts, dtype=dtype), bias, routing)


def configurations() -> Iterator[tuple[str, Callable, tuple]]:
    """Every value of every parameter, and together those that share registers or shared memory.

    Left out is what another configuration compiles with more: fewer rows a tile but the same keys, warps and stages; heads of
    32, 64 and 96 where 80, which is padded to 128, has the same tile; and float16, which fills registers as bfloat16 does.
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for rows, paged in ((32, True), (64, True), (64, False), (128, True), (128, False)):
        yield "attention", attention, (128, bf16, rows, paged, 1)
    # The group and the splits are outside the loop over keys: they only add to what a launch without them needs.
    yield "attention, split", attention, (80, bf16, 32, True, 4)
    yield "attention, grouped heads", attention, (80, bf16, 64, True, 1, 4)
    yield "attention, grouped heads", attention, (80, bf16, 7 * 32, True, 1, 7)
    yield "attention, grouped heads, split", attention, (128, bf16, 7 * 32, True, 32, 7)
    for rows in (32, 64):
        yield "attention", attention, (80, bf16, rows, False, 1)
    yield "attention, split", attention, (256, bf16, 64, True, 32)
    yield "attention", attention, (256, bf16, 64, False, 1)
    yield "attention", attention, (96, bf16, 16, True, 1)
    yield "attention", attention, (32, bf16, 16, False, 1)
    yield "attention, fp16", attention, (64, fp16, 64, False, 1)
    yield "attention, fp16", attention, (64, fp16, 128, True, 1, 4)
    for head_size, paged in ((128, True), (80, False), (256, False)):
        yield "attention, fp32", attention, (head_size, fp32, 64, paged, 1)
    # The other operations compute in float32 whatever they read: dtypes need not meet all else.
    for sampled in (False, True):
        yield "confidence", confidence, (bf16, 126_464, sampled, True, True)
    yield "confidence", confidence, (bf16, 126_464, False, True)
    yield "confidence", confidence, (bf16, 128, True, False)
    for dtype in (fp16, fp32):
        yield "confidence", confidence, (dtype, 126_464, True, True, True)
        yield "confidence, filtered", confidence, (dtype, 126_464, True, True, True, True)
        yield "find_cut", find_cut, (dtype, 126_464, False)
    yield "confidence, filtered", confidence, (bf16, 126_464, True, True, False, True)
    yield "find_cut", find_cut, (bf16, 151_936, True)
    yield "find_cut", find_cut, (bf16, 300, True)
    for policies in (False, True):
        for skip_unmasked in (False, True):
            yield "unmask", unmask, (policies, torch.int32 if policies == skip_unmasked else torch.int64, skip_unmasked)
    for dtype in (bf16, fp16, fp32):
        yield "store_kv", store, (dtype, 128)
        yield "rms_norm", norm, (dtype, 16_384, True)
        yield "rotate", rotary, (dtype, dtype, 20, 20, 80)
        yield "head_norm", heads_norm, (dtype, 20, 20, 80)
        yield "gated_silu", gated, (dtype, 18_944)
    for residual in (False, True):
        yield "rms_norm", norm, (bf16, 3584, residual)
    for dtype in (bf16, fp16):
        yield "rotate", rotary, (dtype, fp32, 20, 20, 80)
    for shape in ((28, 4, 128), (3, 2, 64)):
        yield "rotate", rotary, (bf16, fp32, *shape)
    yield "rotate, part of a head", rotary, (bf16, bf16, 16, 4, 128, 64)
    yield "head_norm", heads_norm, (bf16, 32, 8, 128)
    yield "head_norm", heads_norm, (bf16, 3, 2, 64)
    yield "gated_silu", gated, (bf16, 12_288)
    for shape in ((256, 8, 8, 4), (160, 6, 5, 3), (16, 1, 1, 1)):
        yield "route", routes, (fp32, shape[0], GroupedSigmoidRouting(*shape[1:], scale=2.5))
    for dtype in (bf16, fp16, fp32):
        yield "route", routes, (dtype, 128, SoftmaxRouting(8, True))
    yield "route", routes, (bf16, 64, SoftmaxRouting(8, False))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and static shared memory as cuobjdump reads them from the binary."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {name.lower(): int(value) for name, value in found.items()}


def main(capability: int, only: str = "") -> None:
    driver.set_active(OfflineDriver(capability))
    dispatch.device_generation = lambda device: capability // 10
    run, compiled = JITFunction.run, []

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    seen = set()
    for name, launch, arguments in configurations():
        if only not in name:
            continue
        launch(*arguments)
        for kernel in compiled:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                line = {
                    "operation": name,
                    "kernel": kernel.metadata.name,
                    "arguments": [str(argument) for argument in arguments],
                    "num_warps": kernel.metadata.num_warps,
                    "shared": kernel.metadata.shared,
                    **resources(kernel.asm["cubin"]),
                }
                print(json.dumps(line), flush=True)
        compiled.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
