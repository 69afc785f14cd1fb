"""Times the kernels of dllm_plugin against what the device can do, after checking that they are right.

    python benchmarks/kernels.py                      # CUDA if there is one, else the torch path on the CPU
    python benchmarks/kernels.py --op attention       # attention, confidence, unmask or store_kv
    python benchmarks/kernels.py --json FILE          # the same JSON that the last line prints, indented
    python benchmarks/kernels.py --table FILE         # the table of docs/performance.md out of such a file
    compute-sanitizer python benchmarks/kernels.py --check    # small cases of each, checked and not timed

On CUDA it first measures two ceilings, the bandwidth of a large copy (bytes read plus written) and the rate of a large
bf16 matrix product. The floor of a case is the larger of its bytes over the one and its operations over the other, each
input read once; `of_limit` is floor over time. Every case is checked against float64 before it is timed, on inputs drawn
afresh into NaN-poisoned outputs. A call is timed inside a CUDA graph over enough input sets to outgrow the cache.

On a CPU the last line holds `window_attention_ratio` (16 windows of 32 queries over 512 keys in pages, against one
scaled_dot_product_attention call on contiguous tensors), `confidence_ratio` and `confidence_all_ratio` (token and
probability, then margin and entropy too, against max plus logsumexp over 256 x 126,464 bf16 logits).
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dllm_plugin.kernels.confidence import confidence
from dllm_plugin.kernels.dispatch import tl, triton
from dllm_plugin.kernels.gated_silu import gated_silu, gated_silu_reference
from dllm_plugin.kernels.rms_norm import rms_norm, rms_norm_reference
from dllm_plugin.kernels.rotary import rotate, rotate_reference
from dllm_plugin.kernels.store_kv import split_kv_cache, store_kv
from dllm_plugin.kernels.unmask import unmask
from dllm_plugin.kernels.window_attention import full_attention, window_attention

LLADA, DREAM = (32, 32, 128), (28, 4, 128)  # heads, key-value heads, head size
VOCABULARIES = {"llada": 126_464, "dream": 152_064}
CACHE_BYTES = 256 << 20  # input sets together exceed this: four times the second-level cache of an H200
OPERATIONS = ("attention", "confidence", "unmask", "store_kv")


def int32(values: list[int], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:n]) for n in range(len(lengths) + 1)]


# --- timing ---------------------------------------------------------------------------------------------------------


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


# --- attention ------------------------------------------------------------------------------------------------------


class Windows:
    """A batch of windows (length, visible, block_length, prefix_len) at the end of what they see, over shuffled pages."""

    def __init__(
        self, shape: tuple[int, int, int], windows: list[tuple[int, int, int, int]], page_size: int, device: str
    ):
        heads, kv_heads, size = shape
        self.shape, self.windows, self.device = shape, windows, device
        self.lengths = [length for length, *_ in windows]
        pages = [-(-visible // page_size) for _, visible, *_ in windows]
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        # vLLM's shape [pages, kv_heads, page_size, 2 * head_size], tokens outside heads in memory
        cache = torch.randn(sum(pages), page_size, kv_heads, 2 * size, device=device, dtype=dtype).transpose(1, 2)
        self.key_cache, self.value_cache = split_kv_cache(cache, size)
        order = torch.randperm(sum(pages), device=device).to(torch.int32)
        self.block_table = torch.zeros(len(windows), max(pages), dtype=torch.int32, device=device)
        for request, (first, last) in enumerate(pairwise(starts(pages))):
            self.block_table[request, : last - first] = order[first:last]
        self.query = torch.randn(sum(self.lengths), heads, size, device=device, dtype=dtype)
        self.out = torch.full_like(self.query, float("nan"))
        columns = list(zip(*windows, strict=True))
        cpu = {
            "query_start_loc": starts(self.lengths),
            "window_start": [visible - length for length, visible, *_ in windows],
            "visible": list(columns[1]),
            "prefix_len": list(columns[3]),
            "block_length": list(columns[2]),
        }
        self.arguments = {name: int32(values, device) for name, values in cpu.items()}
        if device == "cpu":
            self.arguments |= {f"{name}_cpu": values for name, values in cpu.items()}
        self.arguments |= {
            "block_table": self.block_table,
            "max_query_len": max(self.lengths),
            "max_visible": max(columns[1]),
            "scale": size**-0.5,
        }

    def __call__(self) -> Tensor:
        return window_attention(self.query, self.key_cache, self.value_cache, out=self.out, **self.arguments)

    def keys_of(self, request: int) -> tuple[Tensor, Tensor]:
        visible = self.windows[request][1]
        pages = self.block_table[request, : -(-visible // self.key_cache.shape[1])]
        return tuple(cache[pages].flatten(0, 1)[:visible] for cache in (self.key_cache, self.value_cache))

    def limits(self, request: int) -> Tensor:
        length, visible, block, prefix = self.windows[request]
        position = torch.arange(visible - length, visible, device=self.device)
        if block == 0:
            return torch.full_like(position, visible)
        own = prefix + ((position - prefix) // block + 1) * block
        return torch.where(position < prefix, prefix, own).clamp(max=visible)

    def error(self) -> float:
        self()
        first = starts(self.lengths)
        pieces = (
            (self.out[first[n] : first[n + 1]], self.query[first[n] : first[n + 1]], *self.keys_of(n), self.limits(n))
            for n in range(len(self.windows))
        )
        return relative_error(pieces)

    def flops(self) -> float:
        heads, _, size = self.shape
        return 4 * heads * size * sum(float(self.limits(n).sum()) for n in range(len(self.windows)))

    def bytes(self) -> float:
        _, kv_heads, size = self.shape
        keys = sum(visible for _, visible, *_ in self.windows)
        return self.query.element_size() * (2 * self.query.numel() + 2 * keys * kv_heads * size)


class Sequences:
    """Whole sequences over their own keys and values, slices of one projection as in a model."""

    def __init__(self, shape: tuple[int, int, int], lengths: list[int], device: str = "cuda") -> None:
        heads, kv_heads, size = shape
        self.shape, self.lengths = shape, lengths
        qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, size, device=device, dtype=torch.bfloat16)
        self.query, self.key, self.value = qkv.split([heads, kv_heads, kv_heads], 1)
        self.out = torch.full(self.query.shape, float("nan"), device=device, dtype=torch.bfloat16)
        self.query_start_loc = int32(starts(lengths), device)

    def __call__(self) -> Tensor:
        return full_attention(
            self.query, self.key, self.value, query_start_loc=self.query_start_loc,
            max_query_len=max(self.lengths), scale=self.shape[2] ** -0.5, out=self.out,
        )  # fmt: skip

    def error(self) -> float:
        self()
        return relative_error(
            (
                *(tensor[first:last] for tensor in (self.out, self.query, self.key, self.value)),
                torch.full((last - first,), last - first, device="cuda"),
            )
            for first, last in pairwise(starts(self.lengths))
        )

    def flops(self) -> float:
        return 4 * self.shape[0] * self.shape[2] * sum(length**2 for length in self.lengths)

    def bytes(self) -> float:
        return 2 * (2 * self.query.numel() + 2 * self.key.numel())


def relative_error(pieces) -> float:
    """|out - reference| / |reference| over (out, query, key, value, limit) of each request, the reference in float64."""
    difference = norm = 0.0
    for out, query, key, value, limit in pieces:
        group = query.shape[1] // key.shape[1]
        for head in range(query.shape[1]):
            k, v = (tensor[:, head // group].double() for tensor in (key, value))
            for part in torch.arange(query.shape[0], device=query.device).split(4096):
                scores = query[part, head].double() @ k.T * query.shape[2] ** -0.5
                scores.masked_fill_(torch.arange(k.shape[0], device=k.device) >= limit[part, None], float("-inf"))
                reference = scores.softmax(1) @ v
                difference += float((out[part, head].double() - reference).square().sum())
                norm += float(reference.square().sum())
    return math.sqrt(difference / norm)


def dense_rivals(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> dict[str, Callable[[], object]]:
    """Other implementations on contiguous [batch, heads, tokens, size] tensors."""
    from torch.nn.attention.flex_attention import flex_attention

    grouped = query.shape[1] != key.shape[1]

    def sdpa(backend: SDPBackend, mask: Tensor | None) -> Callable[[], object]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)

        return call

    rivals: dict[str, Callable[[], object]] = {}
    if mask is None:
        rivals["sdpa_flash"] = sdpa(SDPBackend.FLASH_ATTENTION, None)
        rivals["sdpa_cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION, None)
        flex = torch.compile(flex_attention, dynamic=False)
        rivals["flex_attention"] = lambda: flex(query, key, value, enable_gqa=grouped)
        mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    rivals["sdpa_mask"] = lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
    return rivals


def time_rivals(rivals: dict[str, Callable[[], object]]) -> dict[str, float | str]:
    times: dict[str, float | str] = {}
    for name, call in rivals.items():
        try:
            times[name] = graph_time([call], 10)
        except Exception as error:  # a rival that cannot express the case is a result, not a failure
            times[name] = f"cannot: {str(error).splitlines()[0][:80]}"
    return times


def attention_cases(limits: dict[str, float], quick: bool) -> list[dict]:
    rows = []

    def measure(name: str, make: Callable[[], Windows | Sequences], rivals: Callable[[], dict] | None = None) -> None:
        one = make()
        error = one.error()
        sets = input_sets(make, one.bytes())
        row = report(name, graph_time(sets), one.bytes(), one.flops(), limits, error, 8e-3)
        if rivals:
            row["rivals_s"] = time_rivals(rivals())
            print("   ", {k: v if isinstance(v, str) else f"{v * 1e6:.1f} us" for k, v in row["rivals_s"].items()})
        rows.append(row)

    def dense(shape: tuple[int, int, int], batch: int, queries: int, keys: int) -> Callable[[], dict]:
        def make() -> dict:
            heads, kv_heads, size = shape
            q = torch.randn(batch, heads, queries, size, device="cuda", dtype=torch.bfloat16)
            k, v = (torch.randn(batch, kv_heads, keys, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            return dense_rivals(q, k, v, None)

        return make

    for model, shape in (("llada", LLADA), ("dream", DREAM)):
        for length, batch in ((4096, 1), (4096, 4), (16384, 1), (1024, 8)):
            measure(
                f"full {model} {batch}x{length}",
                lambda shape=shape, length=length, batch=batch: Sequences(shape, [length] * batch),
                dense(shape, batch, length, length) if length == 4096 and not quick else None,
            )
        for queries in (1, 8, 32, 256):
            for batch in (1, 8, 64):
                measure(
                    f"window {model} {batch}x{queries}q 4096k",
                    lambda shape=shape, queries=queries, batch=batch: Windows(
                        shape, [(queries, 4096, 0, 0)] * batch, 16, "cuda"
                    ),
                    dense(shape, batch, queries, 4096) if queries == 32 and batch == 8 and not quick else None,
                )
        mixed = [(4096, 4096, 0, 0), *[(8, 1000 + 37 * n, 0, 0) for n in range(16)], (2000, 2000, 32, 400)]
        measure(f"mixed {model}", lambda shape=shape, mixed=mixed: Windows(shape, mixed, 16, "cuda"))
        causal = [(64, 3000 + 64 * n, 32, 200) for n in range(8)]
        measure(f"block-causal {model} 8x64q", lambda shape=shape, causal=causal: Windows(shape, causal, 16, "cuda"))
    return rows


# --- confidence -----------------------------------------------------------------------------------------------------


@triton.jit
def _read_kernel(source, maxima, numel, steps, BLOCK: tl.constexpr):
    """The highest number of one part: as little as a kernel can do with what it reads."""
    first = tl.program_id(0).to(tl.int64) * steps * BLOCK
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for step in range(steps):
        index = first + step * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(source + index, mask=index < numel, other=float("-inf"))
        highest = tl.maximum(highest, x.to(tl.float32))
    tl.store(maxima + tl.program_id(0), tl.max(highest, 0))


def read_time(buffers: list[Tensor]) -> float:
    """Seconds of one launch that reads a buffer and leaves one number a program, with the best of some tilings."""

    def read(source: Tensor, block: int, programs: int) -> Tensor:
        steps = math.ceil(source.numel() / (block * programs))
        maxima = torch.empty(programs, device="cuda")
        _read_kernel[(programs,)](source, maxima, source.numel(), steps, BLOCK=block)
        return maxima

    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    tilings = [(block, multiprocessors * each) for block in (1024, 2048, 4096, 8192) for each in (2, 4, 8, 16)]
    return min(graph_time([partial(read, x, *tiling) for x in buffers], 10) for tiling in tilings)


def confidence_error(logits: Tensor, no_choice: Tensor) -> float:
    """Largest error of any statistic against float64, relative above 1; infinite when a token differs."""
    got = confidence(logits, no_choice=no_choice, log_probability=True, margin=True, entropy=True)
    worst = 0.0
    for part in torch.arange(logits.shape[0], device=logits.device).split(64):
        x = logits[part].double()
        allowed = x.scatter(1, no_choice[part], float("-inf"))
        token = allowed.argmax(1)
        p = x.softmax(1)
        top = p.gather(1, token[:, None]).squeeze(1)
        other = p.scatter(1, token[:, None], -1.0).amax(1)
        expected = (top, top.log(), top - other, -(p * (p + 1e-10).log()).sum(1))
        if not torch.equal(got.token[part], token):
            return math.inf
        found = (got.probability, got.log_probability, got.margin, got.entropy)
        worst = max(
            worst,
            *(float(((a[part] - b) / b.abs().clamp(min=1)).abs().max()) for a, b in zip(found, expected, strict=True)),
        )
    return worst


def confidence_cases(limits: dict[str, float], quick: bool) -> list[dict]:
    rows = []
    for model, vocab in VOCABULARIES.items():
        for count in (32, 256, 2048):
            index = torch.arange(count, device="cuda")
            no_choice = torch.full((count, 1), vocab - 128, device="cuda")
            drawn = {"temperature": torch.ones(count, device="cuda"), "seed": index, "position": index, "step": index}

            def logits(count: int = count, vocab: int = vocab) -> Tensor:
                return (torch.randn(count, vocab, device="cuda") * 3).to(torch.bfloat16)

            one = logits()
            error = confidence_error(one, no_choice)
            buffers = [one] + [logits() for _ in range(min(31, math.ceil(CACHE_BYTES / one.nbytes) - 1))]
            for what, options in {
                "token": {},
                "token+margin": {"margin": True},
                "all": {"margin": True, "entropy": True, "log_probability": True},
                "sampled": drawn,
            }.items():
                calls = [lambda x=x, o=options, n=no_choice: confidence(x, no_choice=n, **o) for x in buffers]
                passes = 2 if what == "all" else 1
                name = f"confidence {model} {count} {what}"
                row = report(name, graph_time(calls), one.nbytes * passes, 0.0, limits, error, 2e-5)
                rows.append(row)
                if what == "token" and model == "llada" and not quick:
                    copies = [torch.empty_like(x) for x in buffers]
                    rivals = {
                        "copy_of_the_logits": [
                            lambda x=x, y=y: y.copy_(x) for x, y in zip(buffers, copies, strict=True)
                        ],
                        "torch_softmax": [lambda x=x: x.softmax(1) for x in buffers],
                        "torch_max": [lambda x=x: x.max(1) for x in buffers],
                    }
                    if count <= 256:
                        rivals["torch_sort"] = [lambda x=x: x.sort(1) for x in buffers[:1]]
                    row["rivals_s"] = {name: graph_time(calls, 10) for name, calls in rivals.items()}
                    row["rivals_s"]["one_launch_that_reads_them"] = read_time(buffers)
                    print("   ", {name: f"{seconds * 1e6:.1f} us" for name, seconds in row["rivals_s"].items()})
    return rows


# --- unmask and store_kv --------------------------------------------------------------------------------------------


def unmask_inputs(requests: int, length: int, canvas: int, device: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    rows = requests * length
    tokens = torch.randint(0, 1000, (requests, canvas), dtype=torch.int32, device=device)
    masked = torch.zeros(requests, canvas, dtype=torch.bool, device=device)
    first = min(canvas // 2, canvas - length)
    masked[:, first:] = True
    cell = torch.arange(requests * canvas, device=device).view(requests, canvas)[:, first : first + length]
    return tokens, masked, {
        "slot": torch.arange(requests, dtype=torch.int32, device=device),
        "segment_start_loc": torch.arange(0, rows + 1, length, dtype=torch.int32, device=device),
        "row_cell": cell.reshape(-1),
        "token": torch.randint(0, 1000, (rows,), device=device),
        "confidence": torch.rand(rows, device=device),
        "quota": torch.ones(requests, dtype=torch.int32, device=device),
        "threshold": torch.full((requests,), 0.9, device=device),
        "eos_token_id": torch.full((requests,), 2, dtype=torch.int32, device=device),
    }  # fmt: skip


def unmask_error(requests: int, length: int, canvas: int) -> float:
    tokens, masked, arguments = unmask_inputs(requests, length, canvas, "cuda")
    host = tokens.cpu(), masked.cpu(), {name: tensor.cpu() for name, tensor in arguments.items()}
    got = unmask(tokens, masked, **arguments).summary.cpu()
    expected = unmask(host[0], host[1], **host[2]).summary
    same = torch.equal(got, expected) and torch.equal(tokens.cpu(), host[0]) and torch.equal(masked.cpu(), host[1])
    return 0.0 if same else math.inf


def unmask_cases(limits: dict[str, float], quick: bool) -> list[dict]:
    rows = []
    for requests, length, canvas in ((1, 32, 1024), (64, 32, 1024), (64, 256, 1024), (8, 1024, 1024)):
        error = unmask_error(requests, length, canvas)
        tokens, masked, arguments = unmask_inputs(requests, length, canvas, "cuda")
        seconds = graph_time([lambda t=tokens, m=masked, a=arguments: unmask(t, m, **a)])
        rows.append(report(f"unmask {requests}x{length} rows", seconds, 0.0, 0.0, limits, error, 0.0))
    return rows


def store_kv_cases(limits: dict[str, float], quick: bool) -> list[dict]:
    rows = []
    for model, (_, kv_heads, size) in (("llada", LLADA), ("dream", DREAM)):
        for tokens in (256, 4096):

            def make(tokens: int = tokens, kv_heads: int = kv_heads, size: int = size) -> Callable[[], object]:
                key, value = torch.randn(2, tokens, kv_heads, size, device="cuda", dtype=torch.bfloat16)
                cache = torch.zeros(tokens // 8, 16, kv_heads, 2 * size, device="cuda", dtype=torch.bfloat16)
                caches = split_kv_cache(cache.transpose(1, 2), size)
                slots = torch.randperm(tokens * 2, device="cuda")[:tokens]
                store_kv(key, value, *caches, slots)
                if not all(
                    torch.equal(c[slots // 16, slots % 16], x) for c, x in zip(caches, (key, value), strict=True)
                ):
                    raise AssertionError("store_kv wrote something else than its input")
                return lambda: store_kv(key, value, *caches, slots)

            moved = 4.0 * tokens * kv_heads * size * 2
            seconds = graph_time(input_sets(make, moved))
            rows.append(report(f"store_kv {model} {tokens}", seconds, moved, 0.0, limits, 0.0, 0.0))
    return rows


def error_beside_nan(shape: tuple[int, int, int]) -> float:
    """Infinite where a request sees anything of the one after it."""
    sequences = Sequences(shape, [200, 70])
    clean = sequences()[:200].clone()
    sequences.key[200:], sequences.value[200:] = math.nan, math.nan
    return 0.0 if torch.equal(clean, sequences()[:200]) else math.inf


def block_operation_errors() -> dict[str, float]:
    """Against the references, which round at the same places; the rotation has their very bits."""
    wide = torch.randn(5, 3001, device="cuda", dtype=torch.bfloat16)
    x, residual, weight = wide[:, 1:3001], torch.randn_like(wide[:, 1:]), torch.randn_like(wide[0, 1:])
    heads = torch.randn(5, 36, 80, device="cuda", dtype=torch.bfloat16)
    angle = torch.randn(5, 1, 40, device="cuda").repeat(1, 1, 2)
    errors = {}
    for name, got, want in (
        ("rms_norm", rms_norm(x, weight, 1e-5, residual), rms_norm_reference(x, weight, 1e-5, residual)),
        ("gated_silu", [gated_silu(x)], [gated_silu_reference(x)]),
    ):
        pairs = list(zip(got, want, strict=True))
        errors[name] = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
    for dtype in (torch.float32, torch.bfloat16):
        angles = 28, 4, angle.cos().to(dtype), angle.sin().to(dtype)
        same = all(map(torch.equal, rotate(heads, *angles), rotate_reference(heads, *angles)))
        errors[f"rotate, {dtype}"] = 0.0 if same else math.inf
    return errors


def check() -> dict[str, float]:
    """Errors of small cases of every kernel, ragged and at odd sizes."""
    errors = {}
    for shape in ((4, 4, 128), (7, 1, 80), (8, 2, 64)):
        few = [(33, 100, 8, 20), (1, 65, 0, 0), (8, 63, 0, 0), (0, 5, 0, 0)]
        many = [(130, 300, 8, 20), (200, 263, 0, 0), (140, 140, 4, 140), *few]
        for page_size, windows in ((16, few), (16, many), (48, many)):
            name = f"window_attention {shape}, {windows[0][0]} queries, pages of {page_size}"
            errors[name] = Windows(shape, windows, page_size, "cuda").error()
        errors[f"full_attention {shape}"] = Sequences(shape, [100, 1, 63]).error()
        errors[f"full_attention {shape}, many"] = Sequences(shape, [300, 1, 0, 256, 63]).error()
        errors[f"full_attention {shape}, beside NaN"] = error_beside_nan(shape)
    logits = torch.randn(5, 9001, device="cuda").to(torch.bfloat16)
    row = torch.arange(5, device="cuda")
    errors["confidence"] = confidence_error(logits, row[:, None])
    confidence(logits, temperature=torch.ones(5, device="cuda"), seed=row, position=row, step=row)
    errors["unmask"] = unmask_error(3, 70, 200)
    errors |= block_operation_errors()
    cache = torch.zeros(4, 16, 3, 160, device="cuda").transpose(1, 2)
    key, value = torch.randn(2, 7, 3, 80, device="cuda")
    keys, values = split_kv_cache(cache, 80)
    slots = torch.tensor([63, -1, 0, 5, 17, 40, -1], device="cuda")
    store_kv(key, value, keys, values, slots)
    used = slots >= 0
    stored = keys[slots[used] // 16, slots[used] % 16], values[slots[used] // 16, slots[used] % 16]
    errors["store_kv"] = 0.0 if torch.equal(torch.stack(stored), torch.stack((key, value))[:, used]) else math.inf
    if not max(errors.values()) < 8e-3:
        raise AssertionError(f"wrong: {errors}")
    return errors


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


# --- CPU ------------------------------------------------------------------------------------------------------------


def cpu_results() -> dict[str, float]:
    heads, queries, keys, size, batch = 8, 32, 512, 64, 16
    windows = Windows((heads, heads, size), [(queries, keys, 0, 0)] * batch, 16, "cpu")
    if windows.error() > 1e-5:
        raise AssertionError("window_attention is wrong")
    q = torch.randn(batch, heads, queries, size)
    k, v = torch.randn(2, batch, heads, keys, size)
    ours = wall_time(windows, 30)
    sdpa = wall_time(lambda: F.scaled_dot_product_attention(q, k, v), 30)

    logits = (torch.randn(256, VOCABULARIES["llada"]) * 3).to(torch.bfloat16)
    no_choice = torch.full((256, 1), 126_336)
    # torch's own fp32 softmax of a row this long, whose bits the torch path has, is off by up to 2e-5
    if confidence_error(logits[:32], no_choice[:32]) > 5e-5:
        raise AssertionError("confidence is wrong")
    bare = wall_time(lambda: (logits.max(1), torch.logsumexp(logits, 1)), 5)
    token = wall_time(lambda: confidence(logits, no_choice=no_choice), 5)
    everything = wall_time(lambda: confidence(logits, no_choice=no_choice, margin=True, entropy=True), 5)

    results = {
        "window_attention_ratio": ours / sdpa,
        "confidence_ratio": token / bare,
        "confidence_all_ratio": everything / bare,
    }
    for requests in (1, 16):
        x = torch.randn(32 * requests, 128) * 4
        mask_id = torch.full((32 * requests, 1), 5)
        tokens, masked, arguments = unmask_inputs(requests, 32, 128, "cpu")
        results[f"confidence_us_{requests}x32x128"] = 1e6 * wall_time(partial(confidence, x, no_choice=mask_id), 300)
        results[f"unmask_us_{requests}x32"] = 1e6 * wall_time(partial(unmask, tokens, masked, **arguments), 300)
    return results


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPERATIONS, action="append", help="CUDA only: this operation (default: all)")
    parser.add_argument("--quick", action="store_true", help="CUDA only: skip the other implementations")
    parser.add_argument("--table", type=Path, help="print the cases of this result as Markdown, measure nothing")
    parser.add_argument("--check", action="store_true", help="CUDA only: small cases of every kernel, not timed")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return
    torch.manual_seed(time.time_ns() % 2**31)
    result: dict = {"environment": environment()}
    if arguments.check:
        if not torch.cuda.is_available():
            parser.error("--check is for CUDA; on a CPU run pytest tests/kernels")
        result["errors"] = check()
    elif torch.cuda.is_available():
        result["ceilings"] = ceilings()
        print({name: f"{value:.4g}" for name, value in result["ceilings"].items()})
        cases = {
            "attention": attention_cases,
            "confidence": confidence_cases,
            "unmask": unmask_cases,
            "store_kv": store_kv_cases,
        }
        result["cases"] = []
        for operation in arguments.op or OPERATIONS:
            result["cases"] += cases[operation](result["ceilings"], arguments.quick)
    else:
        result |= cpu_results()
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
