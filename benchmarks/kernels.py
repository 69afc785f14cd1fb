"""Times the kernels of dllm_plugin against what the device can do, after checking that they are right.

    python benchmarks/kernels.py                      # CUDA if there is one, else the torch path on the CPU
    python benchmarks/kernels.py --op attention       # attention, confidence, filter, route, unmask or store_kv
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
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from choice_kernels import ALL, VOCABULARIES, confidence_cases, confidence_error, filter_cases, filter_error
from measure import ceilings, environment, graph_time, input_sets, int32, report, table, wall_time
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dllm_plugin.kernels.confidence import Choice, confidence
from dllm_plugin.kernels.filter import Filters, find_cut
from dllm_plugin.kernels.gated_silu import gated_silu, gated_silu_rule
from dllm_plugin.kernels.head_norm import head_norm, head_norm_rule
from dllm_plugin.kernels.rms_norm import rms_norm, rms_norm_rule
from dllm_plugin.kernels.rotary import rotate, rotate_rule
from dllm_plugin.kernels.route import GroupedSigmoidRouting, Routing, SoftmaxRouting, route, route_rule
from dllm_plugin.kernels.store_kv import split_kv_cache, store_kv, store_kv_rule
from dllm_plugin.kernels.unmask import Segments, unmask, unmask_rule
from dllm_plugin.kernels.window_attention import (
    PagedWindows,
    Windows,
    full_attention,
    full_attention_rule,
    limits_rule,
    window_attention,
    window_attention_rule,
)

LLADA, DREAM = (32, 32, 128), (28, 4, 128)  # heads, key-value heads, head size
OPERATIONS = ("attention", "confidence", "filter", "route", "unmask", "store_kv")


def starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:n]) for n in range(len(lengths) + 1)]


# --- attention ------------------------------------------------------------------------------------------------------


class Attention:
    """A call of `run`, whose contract is `rule`, into a buffer full of NaN."""

    def __init__(self, run: Callable[..., Tensor], rule: Callable[..., Tensor], *arguments: object) -> None:
        self.run, self.rule, self.arguments = run, rule, arguments
        self.out = torch.full_like(arguments[0], float("nan"), memory_format=torch.contiguous_format)

    def __call__(self) -> Tensor:
        return self.run(*self.arguments, self.out)

    def error(self) -> float:
        return relative_error(self(), self.rule(*self.arguments))


class Paged(Attention):
    """A batch of windows (length, visible, block_length, prefix_len) at the end of what they see, over shuffled pages."""

    def __init__(
        self, shape: tuple[int, int, int], windows: list[tuple[int, int, int, int]], page_size: int, device: str
    ):
        heads, kv_heads, size = shape
        lengths, visible, block_length, prefix_len = (list(column) for column in zip(*windows, strict=True))
        pages = [-(-seen // page_size) for seen in visible]
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        # vLLM's shape [pages, kv_heads, page_size, 2 * head_size], tokens outside heads in memory
        cache = torch.randn(sum(pages), page_size, kv_heads, 2 * size, device=device, dtype=dtype).transpose(1, 2)
        query = torch.randn(sum(lengths), heads, size, device=device, dtype=dtype)
        block_table = torch.zeros(len(windows), max(pages), dtype=torch.int32, device=device)
        shuffled = torch.randperm(sum(pages), device=device).to(torch.int32).split(pages)
        for row, own in zip(block_table, shuffled, strict=True):
            row[: len(own)] = own
        host = {
            "query_start_loc": starts(lengths),
            "window_start": [seen - length for seen, length in zip(visible, lengths, strict=True)],
            "visible": visible,
            "prefix_len": prefix_len,
            "block_length": block_length,
        }
        self.windows = PagedWindows(
            **{name: int32(values, device) for name, values in host.items()},
            **{f"{name}_cpu": values for name, values in host.items() if device == "cpu"},
            block_table=block_table,
            max_query_len=max(lengths),
            max_visible=max(visible),
        )
        arguments = (query, *split_kv_cache(cache, size), self.windows, size**-0.5)
        super().__init__(window_attention, window_attention_rule, *arguments)
        self.nbytes = query.element_size() * (2 * query.numel() + 2 * sum(visible) * kv_heads * size)

    def flops(self) -> float:
        _, heads, size = self.out.shape
        requests = range(len(self.windows.visible))
        return 4 * heads * size * sum(float(limits_rule(self.windows, n).sum()) for n in requests)


class Full(Attention):
    """Whole sequences over their own keys and values, slices of one projection as in a model."""

    def __init__(self, shape: tuple[int, int, int], lengths: list[int]) -> None:
        heads, kv_heads, size = shape
        self.lengths = lengths
        qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, size, device="cuda", dtype=torch.bfloat16)
        self.query, self.key, self.value = qkv.split([heads, kv_heads, kv_heads], 1)
        windows = Windows(query_start_loc=int32(starts(lengths), "cuda"), max_query_len=max(lengths))
        arguments = (self.query, self.key, self.value, windows, size**-0.5)
        super().__init__(full_attention, full_attention_rule, *arguments)
        self.nbytes = 2 * (2 * self.query.numel() + 2 * self.key.numel())

    def flops(self) -> float:
        _, heads, size = self.query.shape
        return 4 * heads * size * sum(length**2 for length in self.lengths)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


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

    def measure(name: str, make: Callable[[], Paged | Full], rivals: Callable[[], dict] | None = None) -> None:
        one = make()
        error = one.error()
        sets = input_sets(make, one.nbytes)
        row = report(name, graph_time(sets), one.nbytes, one.flops(), limits, error, 8e-3)
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
                lambda shape=shape, length=length, batch=batch: Full(shape, [length] * batch),
                dense(shape, batch, length, length) if length == 4096 and not quick else None,
            )
        for queries in (1, 8, 32, 256):
            for batch in (1, 8, 64):
                measure(
                    f"window {model} {batch}x{queries}q 4096k",
                    lambda shape=shape, queries=queries, batch=batch: Paged(
                        shape, [(queries, 4096, 0, 0)] * batch, 16, "cuda"
                    ),
                    dense(shape, batch, queries, 4096) if queries == 32 and batch == 8 and not quick else None,
                )
        mixed = [(4096, 4096, 0, 0), *[(8, 1000 + 37 * n, 0, 0) for n in range(16)], (2000, 2000, 32, 400)]
        measure(f"mixed {model}", lambda shape=shape, mixed=mixed: Paged(shape, mixed, 16, "cuda"))
        causal = [(64, 3000 + 64 * n, 32, 200) for n in range(8)]
        measure(f"block-causal {model} 8x64q", lambda shape=shape, causal=causal: Paged(shape, causal, 16, "cuda"))
    return rows


# --- route ----------------------------------------------------------------------------------------------------------

ROUTERS = {  # experts, routing
    "llada2": (256, GroupedSigmoidRouting(8, 8, 4, 2.5)),
    "sdar-moe": (128, SoftmaxRouting(8, True)),
    "llada-moe": (64, SoftmaxRouting(8, False)),
}


def route_inputs(name: str, tokens: int, tied: bool = False) -> tuple[Tensor, Tensor | None, Routing]:
    num_experts, routing = ROUTERS[name]
    logits, bias = torch.randn(tokens, num_experts, device="cuda") * 2, torch.randn(num_experts, device="cuda") * 0.1
    if tied:
        logits, bias = (logits * 1.5).round() / 4, (bias * 20).round() / 8
    return (
        logits.to(torch.float32 if routing.in_float32 else torch.bfloat16),
        bias if routing.has_bias else None,
        routing,
    )


def route_error(logits: Tensor, bias: Tensor | None, routing: Routing) -> float:
    """Largest relative error of a weight; infinite when an expert differs."""
    (weights, experts), (want_weights, want) = (run(logits, bias, routing) for run in (route, route_rule))
    if not torch.equal(experts, want):
        return math.inf
    return float(((weights.double() - want_weights.double()) / want_weights.double()).abs().max())


def route_cases(limits: dict[str, float], quick: bool) -> list[dict]:
    rows = []
    for name in ROUTERS:
        for tokens in (32, 1024, 8192):
            logits, _, routing = call = route_inputs(name, tokens)
            error, allowed = route_error(*call), 2.0**-22 if routing.in_float32 else 2.0**-7
            moved = float(logits.nbytes + tokens * routing.top_k * (4 + logits.itemsize))
            calls = [partial(route, *call)] + [partial(route, *route_inputs(name, tokens)) for _ in range(7)]
            row = report(f"route {name} {tokens}", graph_time(calls), moved, 0.0, limits, error, allowed)
            row["rivals_s"] = {"torch_sort": graph_time([partial(route_rule, *call)])}
            print("   ", {rival: f"{seconds * 1e6:.1f} us" for rival, seconds in row["rivals_s"].items()})
            rows.append(row)
    return rows


# --- unmask and store_kv --------------------------------------------------------------------------------------------


def unmask_inputs(
    requests: int, length: int, canvas: int, device: str
) -> tuple[Tensor, Tensor, Segments, Tensor, Tensor]:
    rows = requests * length
    tokens = torch.randint(0, 1000, (requests, canvas), dtype=torch.int32, device=device)
    masked = torch.zeros(requests, canvas, dtype=torch.bool, device=device)
    first = min(canvas // 2, canvas - length)
    masked[:, first:] = True
    cell = torch.arange(requests * canvas, device=device).view(requests, canvas)[:, first : first + length]
    segments = Segments(
        slot=torch.arange(requests, dtype=torch.int32, device=device),
        segment_start_loc=torch.arange(0, rows + 1, length, dtype=torch.int32, device=device),
        row_cell=cell.reshape(-1),
        quota=torch.ones(requests, dtype=torch.int32, device=device),
        threshold=torch.full((requests,), 0.9, device=device),
    )
    return tokens, masked, segments, torch.randint(0, 1000, (rows,), device=device), torch.rand(rows, device=device)


def unmask_error(requests: int, length: int, canvas: int) -> float:
    tokens, masked, *rows = unmask_inputs(requests, length, canvas, "cuda")
    want = tokens.clone(), masked.clone()
    pairs = [
        (unmask_rule(*want, *rows), unmask(tokens, masked, *rows).summary),
        *zip(want, (tokens, masked), strict=True),
    ]
    return 0.0 if all(torch.equal(a, b) for a, b in pairs) else math.inf


def unmask_cases(limits: dict[str, float], quick: bool) -> list[dict]:
    rows = []
    for requests, length, canvas in ((1, 32, 1024), (64, 32, 1024), (64, 256, 1024), (8, 1024, 1024)):
        error = unmask_error(requests, length, canvas)
        seconds = graph_time([partial(unmask, *unmask_inputs(requests, length, canvas, "cuda"))])
        rows.append(report(f"unmask {requests}x{length} rows", seconds, 0.0, 0.0, limits, error, 0.0))
    return rows


def store_kv_inputs(tokens: int, kv_heads: int, size: int, pages: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    key, value = torch.randn(2, tokens, kv_heads, size, device="cuda", dtype=dtype)
    cache = torch.zeros(pages, 16, kv_heads, 2 * size, device="cuda", dtype=dtype)
    return key, value, *split_kv_cache(cache.transpose(1, 2), size), torch.randperm(pages * 16, device="cuda")[:tokens]


def store_kv_error(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> float:
    want = key_cache.clone(), value_cache.clone()
    store_kv_rule(key, value, *want, slots)
    store_kv(key, value, key_cache, value_cache, slots)
    return 0.0 if torch.equal(key_cache, want[0]) and torch.equal(value_cache, want[1]) else math.inf


def store_kv_cases(limits: dict[str, float], quick: bool) -> list[dict]:
    rows = []
    for model, (_, kv_heads, size) in (("llada", LLADA), ("dream", DREAM)):
        for tokens in (256, 4096):

            def make(tokens: int = tokens, kv_heads: int = kv_heads, size: int = size) -> Callable[[], object]:
                call = store_kv_inputs(tokens, kv_heads, size, tokens // 8, torch.bfloat16)
                if store_kv_error(*call) > 0:
                    raise AssertionError("store_kv wrote something else than its input")
                return partial(store_kv, *call)

            moved = 4.0 * tokens * kv_heads * size * 2
            seconds = graph_time(input_sets(make, moved))
            rows.append(report(f"store_kv {model} {tokens}", seconds, moved, 0.0, limits, 0.0, 0.0))
    return rows


def error_beside_nan(shape: tuple[int, int, int]) -> float:
    """Infinite where a request sees anything of the one after it."""
    sequences = Full(shape, [200, 70])
    clean = sequences()[:200].clone()
    sequences.key[200:], sequences.value[200:] = math.nan, math.nan
    return 0.0 if torch.equal(clean, sequences()[:200]) else math.inf


def block_operation_errors() -> dict[str, float]:
    """Against the rules, which round at the same places; the rotation has their very bits."""
    wide = torch.randn(5, 3001, device="cuda", dtype=torch.bfloat16)
    x, residual, weight = wide[:, 1:3001], torch.randn_like(wide[:, 1:]), torch.randn_like(wide[0, 1:])
    heads = torch.randn(5, 36, 80, device="cuda", dtype=torch.bfloat16)
    normed = heads, 28, 4, *torch.randn_like(heads[0, :2]), 1e-6
    errors = {}
    for name, got, want in (
        ("rms_norm", rms_norm(x, weight, 1e-5, residual), rms_norm_rule(x, weight, 1e-5, residual)),
        ("gated_silu", [gated_silu(x)], [gated_silu_rule(x)]),
        ("head_norm", [head_norm(*normed)], [head_norm_rule(*normed)]),
    ):
        pairs = list(zip(got, want, strict=True))
        errors[name] = max(relative_error(a, b) for a, b in pairs)
    for dtype, rotary_size in ((torch.float32, 80), (torch.bfloat16, 80), (torch.bfloat16, 40)):
        angle = torch.randn(5, 1, rotary_size // 2, device="cuda").repeat(1, 1, 2)
        angles = 28, 4, angle.cos().to(dtype), angle.sin().to(dtype)
        same = all(map(torch.equal, rotate(heads, *angles), rotate_rule(heads, *angles)))
        errors[f"rotate {rotary_size} of 80, {dtype}"] = 0.0 if same else math.inf
    return errors


def check() -> dict[str, float]:
    """Errors of small cases of every kernel, ragged and at odd sizes."""
    errors = {}
    for shape in ((4, 4, 128), (7, 1, 80), (8, 2, 64)):
        few = [(33, 100, 8, 20), (1, 65, 0, 0), (8, 63, 0, 0), (0, 5, 0, 0)]
        many = [(130, 300, 8, 20), (200, 263, 0, 0), (140, 140, 4, 140), *few]
        for page_size, windows in ((16, few), (16, many), (48, many)):
            name = f"window_attention {shape}, {windows[0][0]} queries, pages of {page_size}"
            errors[name] = Paged(shape, windows, page_size, "cuda").error()
        errors[f"full_attention {shape}"] = Full(shape, [100, 1, 63]).error()
        errors[f"full_attention {shape}, many"] = Full(shape, [300, 1, 0, 256, 63]).error()
        errors[f"full_attention {shape}, beside NaN"] = error_beside_nan(shape)
    logits = torch.randn(5, 9001, device="cuda").to(torch.bfloat16)
    row = torch.arange(5, device="cuda")
    errors["confidence"] = confidence_error(logits, Choice(no_choice=row[:, None], **ALL))
    drawn = {"temperature": torch.ones(5, device="cuda"), "seed": row, "position": row, "timestep": row}
    errors["confidence, sampled"] = confidence_error(logits, Choice(**drawn, **ALL))
    mixed = Filters(
        temperature=torch.tensor([1.0, 0.5, 0.0, 1.5, 1.0], device="cuda"),
        top_k=torch.tensor([0, 7, 300, 0, 9001], device="cuda"),
        top_p=torch.tensor([0.7123, 0.9, 1.0, 0.3, 0.9912], device="cuda"),
        min_p=torch.tensor([0.0, 0.0, 0.01, 0.02, 0.0], device="cuda"),
        k_first=row % 2 == 0,
        gone=row[:, None],
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        errors[f"find_cut, {dtype}"] = filter_error(logits.to(dtype), mixed)
    cut = {"cut": find_cut(logits, mixed), "unfiltered": row % 2 == 1, "tempered": row < 3}
    sampled = drawn | {"temperature": mixed.temperature} | cut
    errors["confidence, filtered"] = confidence_error(logits, Choice(no_choice=row[:, None], **sampled, **ALL))
    for router in ROUTERS:
        for tied in (False, True):
            errors[f"route {router}{', tied' * tied}"] = route_error(*route_inputs(router, 500, tied))
    errors["unmask"] = unmask_error(3, 70, 200)
    errors |= block_operation_errors()
    errors["store_kv"] = store_kv_error(*store_kv_inputs(7, 3, 80, 4, torch.float32))
    if not max(errors.values()) < 8e-3:
        raise AssertionError(f"wrong: {errors}")
    return errors


# --- CPU ------------------------------------------------------------------------------------------------------------


def cpu_results() -> dict[str, float]:
    heads, queries, keys, size, batch = 8, 32, 512, 64, 16
    windows = Paged((heads, heads, size), [(queries, keys, 0, 0)] * batch, 16, "cpu")
    if windows.error() > 1e-5:
        raise AssertionError("window_attention is wrong")
    q = torch.randn(batch, heads, queries, size)
    k, v = torch.randn(2, batch, heads, keys, size)
    ours = wall_time(windows, 30)
    sdpa = wall_time(lambda: F.scaled_dot_product_attention(q, k, v), 30)

    logits = (torch.randn(256, VOCABULARIES["llada"]) * 3).to(torch.bfloat16)
    choice = Choice(no_choice=torch.full((256, 1), 126_336), margin=True, entropy=True)
    # torch's own fp32 softmax of a row this long, whose bits the torch path has, is off by up to 2e-5
    if confidence_error(logits[:32], replace(choice.of(slice(32)), **ALL)) > 5e-5:
        raise AssertionError("confidence is wrong")
    bare = wall_time(lambda: (logits.max(1), torch.logsumexp(logits, 1)), 5)
    token = wall_time(lambda: confidence(logits, Choice(no_choice=choice.no_choice)), 5)
    everything = wall_time(lambda: confidence(logits, choice), 5)

    results = {
        "window_attention_ratio": ours / sdpa,
        "confidence_ratio": token / bare,
        "confidence_all_ratio": everything / bare,
    }
    for requests in (1, 16):
        x = torch.randn(32 * requests, 128) * 4
        mask_id = Choice(no_choice=torch.full((32 * requests, 1), 5))
        results[f"confidence_us_{requests}x32x128"] = 1e6 * wall_time(partial(confidence, x, mask_id), 300)
        results[f"unmask_us_{requests}x32"] = 1e6 * wall_time(
            partial(unmask, *unmask_inputs(requests, 32, 128, "cpu")), 300
        )
    return results


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
            "filter": filter_cases,
            "route": route_cases,
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
