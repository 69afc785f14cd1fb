"""How the benchmarks measure: the environment of an engine, times, the ceilings of a GPU, and how a result is reported.

A benchmark of the engine imports this module before torch and vLLM, which read the environment when they are imported.
"""

import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

# What a request leaves open is as in the reference decoders.
EXACT = {"diffusion": {"profile": "exact"}}
CACHE_BYTES = 256 << 20  # input sets together exceed this: four times the second-level cache of an H200


def int32(values: list[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def graph_time(calls: list[Callable[[], object]], repeats: int = 20) -> float:
    """Median seconds of one call, from replays of a CUDA graph of all of them in turn."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    calls = calls * max(1, 16 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # held, or the outputs of one call would become the next one's
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    del kept
    return statistics.median(times)


def wall_time(call: Callable[[], object], repeats: int) -> float:
    """Fastest of several calls: the machine may be busy with other work, which only adds."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def input_sets(make: Callable[[], Callable[[], object]], bytes_of_one: float) -> list[Callable[[], object]]:
    return [make() for _ in range(max(1, min(32, math.ceil(CACHE_BYTES / bytes_of_one))))]


def ceilings() -> dict[str, float]:
    """The best that large transfers and products do, so the fastest of many: a ceiling that code beats is none."""
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy = fastest(lambda: target.copy_(source))
    product = fastest(lambda: torch.mm(a, b))
    return {"copy_bytes_per_s": 2 * source.nbytes / copy, "matrix_flops_per_s": 2 * 8192**3 / product}


def fastest(call: Callable[[], object], repeats: int = 60) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for _ in range(10):
        call()
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    torch.cuda.synchronize()
    return min(begin.elapsed_time(end) for begin, end in pairwise(events)) / 1e3


def report(
    name: str, seconds: float, moved: float, flops: float, limits: dict[str, float], error: float, allowed: float
) -> dict:
    if not error <= allowed:
        raise AssertionError(f"{name}: error {error:.2e} exceeds {allowed:.0e}; no time is reported for a wrong result")
    floor = max(moved / limits["copy_bytes_per_s"], flops / limits["matrix_flops_per_s"])
    row = {"case": name, "us": seconds * 1e6, "floor_us": floor * 1e6, "of_limit": floor / seconds, "error": error}
    bound = "matrix" if flops / limits["matrix_flops_per_s"] == floor > 0 else "bytes"
    print(
        f"{name:38s} {row['us']:10.1f} us  floor {row['floor_us']:9.1f} us  {row['of_limit']:6.1%} of {bound}  error {error:.1e}"
    )
    return row


def table(result: dict) -> str:
    """The cases as Markdown, rivals in their own column."""
    lines = ["| case | µs | floor µs | of the floor | others, µs |", "| --- | --- | --- | --- | --- |"]
    for row in result["cases"]:
        rivals = row.get("rivals_s", {})
        others = ", ".join(
            f"{name} {seconds if isinstance(seconds, str) else f'{seconds * 1e6:.1f}'}"
            for name, seconds in rivals.items()
        )
        floor = (f"{row['floor_us']:.1f}", f"{row['of_limit']:.0%}") if row["floor_us"] else ("", "")
        lines.append(f"| {row['case']} | {row['us']:.1f} | {floor[0]} | {floor[1]} | {others} |")
    return "\n".join(lines)


def environment() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    found = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip() if commit.returncode == 0 else "not in a git checkout",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        import triton

        found |= {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "triton": triton.__version__}
    else:
        found |= {"device": platform.processor() or platform.machine(), "threads": str(torch.get_num_threads())}
    return found
