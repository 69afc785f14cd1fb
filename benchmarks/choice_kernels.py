"""Cases of benchmarks/kernels.py: what chooses the tokens of a step, confidence and filters."""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from measure import CACHE_BYTES, graph_time, report
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dllm_plugin.kernels.confidence import Choice, confidence, confidence_rule
from dllm_plugin.kernels.dispatch import tl, triton
from dllm_plugin.kernels.filter import Filters, find_cut, find_cut_rule

VOCABULARIES = {"llada": 126_464, "dream": 152_064}
ALL = {"margin": True, "entropy": True, "log_probability": True}


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


def confidence_error(logits: Tensor, choice: Choice) -> float:
    """Largest error of any statistic, relative above 1; infinite when a token differs."""
    worst = 0.0
    for part in torch.arange(len(logits), device=logits.device).split(64):
        got, want = (run(logits[part], choice.of(part)) for run in (confidence, confidence_rule))
        if not torch.equal(got.token, want.token):
            return math.inf
        for name in ("probability", "log_probability", "margin", "entropy"):
            a, b = getattr(got, name), getattr(want, name)
            worst = max(worst, float(((a - b) / b.abs().clamp(min=1)).abs().max()))
    return worst


def confidence_cases(limits: dict[str, float], quick: bool) -> list[dict]:
    rows = []
    for model, vocab in VOCABULARIES.items():
        for count in (32, 256, 2048):
            index = torch.arange(count, device="cuda")
            no_choice = torch.full((count, 1), vocab - 128, device="cuda")
            drawn = {
                "temperature": torch.ones(count, device="cuda"),
                "seed": index,
                "position": index,
                "timestep": index,
            }

            def logits(count: int = count, vocab: int = vocab) -> Tensor:
                return (torch.randn(count, vocab, device="cuda") * 3).to(torch.bfloat16)

            one = logits()
            error = confidence_error(one, Choice(no_choice=no_choice, **ALL))
            buffers = [one] + [logits() for _ in range(min(31, math.ceil(CACHE_BYTES / one.nbytes) - 1))]
            for what, options in {
                "token": {},
                "token+margin": {"margin": True},
                "all": ALL,
                "sampled": drawn,
            }.items():
                calls = [partial(confidence, x, Choice(no_choice=no_choice, **options)) for x in buffers]
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


# --- filter ---------------------------------------------------------------------------------------------------------

FILTERS = {  # what is asked of every row
    "top_k 50": {"top_k": 50},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 50, then top_p 0.95": {"top_k": 50, "top_p": 0.95, "k_first": True},
    "min_p 0.05": {"min_p": 0.05},
    "nothing": {"top_k": 0},
}


def filters_of(rows: int, temperature: float = 1.0, **asked: float) -> Filters:
    """The same for every row."""
    columns = {name: torch.full((rows,), value, device="cuda") for name, value in asked.items()}
    return Filters(temperature=torch.full((rows,), temperature, device="cuda"), **columns)


def sharpened(rows: int, vocab: int, sure: bool) -> Tensor:
    """Logits of positions of which a model is sure, or not: some nats of entropy, or some ten thousand columns."""
    logits = torch.randn(rows, vocab, device="cuda") * 2
    if sure:
        best = torch.randint(vocab, (rows, 64), device="cuda")
        logits.scatter_(1, best, torch.linspace(22, 8, 64, device="cuda").expand(rows, 64))
    return logits.to(torch.bfloat16)


def loosened(filters: Filters, slack: float) -> Filters:
    """Filters that keep a little more, or less."""
    top_p, min_p = filters.top_p, filters.min_p
    if top_p is not None:
        top_p = torch.where(top_p < 1, (top_p * (1 + slack)).clamp(max=1 - 2**-24), top_p)
    return replace(filters, top_p=top_p, min_p=None if min_p is None else min_p * (1 - slack))


def filter_error(logits: Tensor, filters: Filters) -> float:
    """Infinite where the columns of a row that are out are not those of the rule: the mass before some of them is within
    rounding of top_p, so that more may be out than for a slightly looser rule, and fewer than for a stricter one."""
    runs = ((find_cut_rule, 1e-5), (find_cut, 0.0), (find_cut_rule, -1e-5))
    at_least, got, at_most = (
        run(logits, loosened(filters, slack)).takes_out(logits, filters.temperature) for run, slack in runs
    )
    return 0.0 if bool((got >= at_least).all() and (got <= at_most).all()) else math.inf


def draw_filtered(logits: Tensor, filters: Filters, choice: Choice) -> Tensor:
    return confidence(logits, replace(choice, cut=find_cut(logits, filters))).token


def filter_cases(limits: dict[str, float], quick: bool) -> list[dict]:
    cases = []
    for model, vocab in (("llada", VOCABULARIES["llada"]), ("sdar", 151_936)):
        for count, sure in ((1, True), (32, True), (32, False), (256, True), (256, False), (1024, True)):
            one = sharpened(count, vocab, sure)
            copies = math.ceil(CACHE_BYTES / one.nbytes) - 1
            buffers = [one, *(sharpened(count, vocab, sure) for _ in range(min(31, copies)))]
            index = torch.arange(count, device="cuda")
            choice = Choice(temperature=torch.ones(count, device="cuda"), seed=index, position=index, timestep=index)
            for what, asked in FILTERS.items():
                filters = filters_of(count, **asked)
                error = filter_error(one[:32], filters.of(index[:32]))
                name = f"filter {model} {count} {'sure' if sure else 'unsure'}, {what}"
                moved = 0.0 if what == "nothing" else float(one.nbytes)
                row = report(
                    name, graph_time([partial(find_cut, x, filters) for x in buffers]), moved, 0.0, limits, error, 1.0
                )
                row["rivals_s"] = {
                    "with_a_sampled_choice": graph_time([partial(draw_filtered, x, filters, choice) for x in buffers]),
                    "a_sampled_choice_of_all": graph_time([partial(confidence, x, choice) for x in buffers]),
                }
                if not quick and count <= 256:
                    row["rivals_s"]["torch_sort"] = graph_time([lambda x=x: x.float().sort(1) for x in buffers[:1]], 10)
                print("   ", {name: f"{seconds * 1e6:.1f} us" for name, seconds in row["rivals_s"].items()})
                cases.append(row)
    return cases
