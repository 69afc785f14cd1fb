"""What the decoding strategies cost and give: accuracy beside speed, on the held-out tasks of the bundled checkpoints.

    python benchmarks/strategies.py --questions 200
    python benchmarks/strategies.py --checkpoint tiny-sdar --checkpoint tiny-llada2     # the block-diffusion families
    python benchmarks/strategies.py --refreshes         # what refreshes that forward less give, and nothing else
    python benchmarks/strategies.py --table FILE    # the table of docs/performance.md out of a result that --json wrote

For each checkpoint a table of caches × ways to choose how much a step unmasks: share of exactly right answers, forward
passes (NFE) of an answer, tokens per forward pass (TPF), tokens a second, most KV blocks in use. Then the drift of each
cache mode: the share of tokens that differ from those without a cache. Last comes one JSON object. Its headline figures
are the worst over tiny-llada and tiny-dream. A plot of accuracy over TPF goes to docs/.

A token counts as generated where it belongs to the answer: EOS and what fills the canvas behind it do not, neither in
tokens a second nor in TPF. Every row decodes the same questions on the same canvas in blocks of the same length, in
float32, greedily, in this process. Batch 1 runs on the first questions only, and its answers have to be those of batch
16. The best time of `--repeats` is reported, so that a busy machine does less harm.

The reference decoder is the one that the tests hold the engine to, imported from tests/reference: plain torch, one
prompt, one token a step, the whole sequence in every step, and no end before the canvas is full, as the models' pages
have a user run them. A copy in here could only become wrong.

Block-diffusion families have rows and figures of their own: block_families.py.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import block_families
import measure  # sets the environment, before torch and vLLM are imported
import torch
from reference import decoding, dream, llada, model
from rows import (
    CANVAS,
    ONE_A_STEP,
    PAGE,
    POLICIES,
    Answer,
    Engine,
    Row,
    load,
    measure_row,
    print_heading,
    print_row,
    row_of,
    tokenized,
)
from vllm import LLM
from vllm import __version__ as vllm_version

from dllm_plugin import checkpoints
from dllm_plugin.checkpoints.tasks import Question, questions

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ("tiny-llada", "tiny-dream", "tiny-d2f", *block_families.PACES)
CACHES = ("none", "prefix", "dual")
HEADLINE = "threshold 0.9"
REFRESHES: dict[str, dict[str, int]] = {  # of the dual cache
    "dual": {},
    "prompt once": {"prompt_refresh": 0},
    "prompt / 2 blocks": {"prompt_refresh": 2},
    "window 8": {"refresh_window": 8},
    "window 0": {"refresh_window": 0},
    "vicinity 4": {"prompt_refresh": 1, "cache_refresh": 1, "refresh_window": 4},  # dInfer's
}
SHORT_BLOCK = 2  # an answer has about six tokens: several blocks, so that there is something to refresh


# ---- rows of the table


def measure_reference(engine: Engine, asked: Sequence[Question], block_length: int, repeats: int) -> Row:
    """The published decoding loop in plain torch."""
    reference, tokenizer = model.load(checkpoints.path(engine.name)), engine.llm.get_tokenizer()
    prompts = tokenized(engine.llm, asked)
    policy = POLICIES[engine.name]
    generate: Callable[..., decoding.Generation] = llada.generate if policy == "low_confidence" else dream.generate
    choice = {"remasking": policy} if generate is llada.generate else {"alg": policy}
    seconds, generations = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        generations = [generate(reference, prompt, CANVAS, CANVAS, block_length, **choice) for prompt in prompts]
        seconds.append(time.perf_counter() - begin)
    answers = []
    for generation in generations:
        response = decoding.truncate_at_eos(generation.tokens, tokenizer.eos_token_id)
        tokens = [token for token in response if token != tokenizer.eos_token_id]
        answers.append(Answer(tokens, tokenizer.decode(response, skip_special_tokens=True), generation.num_forwards))
    return row_of(engine.name, "reference", ONE_A_STEP, 1, asked, answers, min(seconds), kv_blocks=None)


def measure_all(
    engine: Engine, paces: dict[tuple[str, str], dict[str, Any]], asked: Sequence[Question], few: int, repeats: int
) -> list[Row]:
    """Rows at batch 16 over all questions and at batch 1 over the first few, for each (decoder, pace)."""
    rows = []
    for (decoder, pace), extras in paces.items():
        many, answers = measure_row(engine, asked, decoder, pace, extras, 16, repeats)
        one, alone = measure_row(engine, asked[:few], decoder, pace, extras, 1, repeats)
        if alone != answers[:few]:
            raise AssertionError(f"{engine.name}, {decoder}, {pace}: batch 16 has other answers than batch 1")
        rows += [one, many]
        for row in rows[-2:]:
            print_row(row)
    return rows


def full_attention_paces(thresholds: Sequence[float], block_length: int) -> dict[tuple[str, str], dict[str, Any]]:
    paces = (
        {ONE_A_STEP: {}} | {f"threshold {t:g}": {"threshold": t} for t in thresholds} | {"factor 1": {"factor": 1.0}}
    )
    return {
        (cache, pace): {"cache": cache, "block_length": block_length} | extras
        for cache in CACHES
        for pace, extras in paces.items()
    }


def d2f_paces(thresholds: Sequence[float], block_length: int) -> dict[tuple[str, str], dict[str, Any]]:
    """One token a step is the same checkpoint under the same attention, a block at a time, nothing ever accepted."""
    alone = {"d2f_add_threshold": 1.0, "d2f_complete_threshold": 1.0, "d2f_accept_threshold": 1.0}
    paces = {ONE_A_STEP: alone} | {f"accept {t:g}": {"d2f_accept_threshold": t} for t in thresholds}
    shared = {"strategy": "d2f", "block_length": block_length}
    return {("d2f", pace): shared | extras for pace, extras in paces.items()}


# ---- drift


def drift(llm: LLM, asked: Sequence[Question], extras: dict[str, Any], name: str = "tiny-llada") -> float:
    """Share of tokens that differ from those without a cache, over whole canvases."""
    engine, plain = Engine(name, llm), {key: value for key, value in extras.items() if not key.startswith("cache")}
    return drift_of(engine, tokenized(llm, asked), plain, extras)


def drift_of(engine: Engine, prompts: Sequence[list[int]], plain: dict[str, Any], extras: dict[str, Any]) -> float:
    return share_differing(*(engine.serve(prompts, settings, 16, ignore_eos=True) for settings in (plain, extras)))


def share_differing(without: Sequence[Any], cached: Sequence[Any]) -> float:
    """Of the tokens of completions of whole canvases."""
    pairs = zip(without, cached, strict=True)
    differing = sum(a != b for x, y in pairs for a, b in zip(x.token_ids, y.token_ids, strict=True))
    return differing / (CANVAS * len(without))


def report_drift(engine: Engine, asked: Sequence[Question], block_length: int) -> dict[str, float]:
    prompts, report = tokenized(engine.llm, asked), {}
    for pace in ({}, {"threshold": 0.9}):
        plain = {"block_length": block_length} | pace
        for mode in ({"cache": "prefix"}, {"cache": "dual"}, {"cache": "dual", "cache_refresh": 2}):
            refreshed = f", refreshed every {mode['cache_refresh']} steps" if "cache_refresh" in mode else ""
            label = f"{mode['cache']}{refreshed}, {HEADLINE if pace else ONE_A_STEP}"
            report[label] = round(drift_of(engine, prompts, plain, plain | mode), 4)
            print(f"drift of {engine.name}, {label}: {100 * report[label]:.2f} % of {CANVAS * len(prompts)} tokens")
    return report


def measure_refreshes(engine: Engine, asked: Sequence[Question], repeats: int) -> tuple[list[Row], dict[str, float]]:
    """Rows of the dual cache at batch 16 in blocks of `SHORT_BLOCK`, one for each refresh, and the drift of each."""
    prompts, rows, drifts = tokenized(engine.llm, asked), [], {}
    for pace in ({}, {"threshold": 0.9}):
        plain, label = {"block_length": SHORT_BLOCK} | pace, HEADLINE if pace else ONE_A_STEP
        without = engine.serve(prompts, plain, 16, ignore_eos=True)
        for name, refresh in {"none": {}, **REFRESHES}.items():
            extras = plain | ({} if name == "none" else {"cache": "dual"} | refresh)
            rows.append(measure_row(engine, asked, name, label, extras, 16, repeats)[0])
            print_row(rows[-1])
            if name != "none":
                share = share_differing(without, engine.serve(prompts, extras, 16, ignore_eos=True))
                drifts[f"{name}, {label}"] = round(share, 4)
                print(f"  drift {100 * share:.2f} % of {CANVAS * len(prompts)} tokens")
    return rows, drifts


# ---- what is printed


def table(result: dict[str, Any]) -> str:
    """The rows of a result that the headline figures compare, as Markdown."""
    lines = [
        "| checkpoint | decoder | unmasks | batch | right | NFE | TPF | tokens/s | KV blocks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for values in result["rows"]:
        row = Row(**values)
        if row.checkpoint in block_families.PACES or row.pace in (ONE_A_STEP, HEADLINE, "accept 0.9"):
            blocks = "" if row.kv_blocks is None else row.kv_blocks
            lines.append(
                f"| {row.checkpoint} | {row.decoder} | {row.pace} | {row.batch} | {row.accuracy:.1f} % | {row.nfe:.1f} "
                f"| {row.tokens_per_forward:.2f} | {row.tokens_per_second:.0f} | {blocks} |"
            )
    return "\n".join(lines)


def headline(rows: Sequence[Row]) -> dict[str, float | None]:
    """The figures to reach, each the worst over checkpoints (and batch sizes); None where nothing was run."""

    def find(checkpoint: str, decoder: str, pace: str, batch: int) -> Row:
        key = (checkpoint, decoder, pace, batch)
        return next(row for row in rows if (row.checkpoint, row.decoder, row.pace, row.batch) == key)

    full = sorted({row.checkpoint for row in rows if row.decoder == "reference"})
    dual = {(name, batch): find(name, "dual", HEADLINE, batch) for name in full for batch in (1, 16)}
    none = {(name, batch): find(name, "none", ONE_A_STEP, batch) for name in full for batch in (1, 16)}
    one_by_one = {name: find(name, "reference", ONE_A_STEP, 1).tokens_per_second for name in full}
    figures: dict[str, float | None] = {
        "dual_threshold_speedup": min(
            (dual[k].tokens_per_second / none[k].tokens_per_second for k in dual), default=None
        ),
        "dual_threshold_accuracy_drop": max(
            (none[k].accuracy - dual[k].accuracy for k in dual if k[1] == 16), default=None
        ),
        "batch16_speedup": min((dual[k, 16].tokens_per_second / rate for k, rate in one_by_one.items()), default=None),
        "d2f_tokens_per_forward": None,
        "d2f_accuracy_drop": None,
    }
    if any(row.decoder == "d2f" for row in rows):
        accepting = find("tiny-d2f", "d2f", "accept 0.9", 1)
        figures["d2f_tokens_per_forward"] = accepting.tokens_per_forward
        one, pipelined = (find("tiny-d2f", "d2f", pace, 16).accuracy for pace in (ONE_A_STEP, "accept 0.9"))
        figures["d2f_accuracy_drop"] = one - pipelined
    return {name: value if value is None else round(value, 3) for name, value in figures.items()}


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy over tokens per forward pass: a panel for each checkpoint, a line for each cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.checkpoint for row in rows))
    figure, panels = pyplot.subplots(1, len(names), figsize=(4.6 * len(names), 4), sharey=True, squeeze=False)
    markers = {"none": "o", "prefix": "s", "dual": "^", "d2f": "D", "reference": "*"}
    for panel, name in zip(panels[0], names, strict=True):
        for decoder, marker in markers.items():
            of_decoder = [r for r in rows if (r.checkpoint, r.decoder) == (name, decoder)]
            shown = [r for r in of_decoder if r.batch == (1 if decoder == "reference" else 16)]
            shown.sort(key=lambda row: row.tokens_per_forward)
            if shown:
                x, y = [row.tokens_per_forward for row in shown], [row.accuracy for row in shown]
                label = decoder if decoder in ("d2f", "reference") else f"cache {decoder}"
                panel.plot(x, y, marker=marker, label=label, alpha=0.75, linewidth=1, markersize=7)
        panel.set_title(name)
        panel.set_xlabel("tokens per forward pass")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower left", fontsize="small")
    panels[0][0].set_ylabel("exactly right answers, %")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"plot written to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=200, help="held-out questions (default: %(default)s)")
    parser.add_argument("--few", type=int, default=50, help="of them at batch 1 (default: %(default)s)")
    parser.add_argument("--block-length", type=int, default=8, help="of all strategies but d2f (default: %(default)s)")
    parser.add_argument("--d2f-block-length", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="best time of so many runs (default: %(default)s)")
    parser.add_argument(
        "--long-repeats", type=int, default=21, help="of prompts of 1,024 tokens (default: %(default)s)"
    )
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, action="append", help="may be repeated (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default: %(default)s)")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "accuracy_over_tpf.png", help="file to write")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--table", type=Path, help="print the table of this result as Markdown, measure nothing")
    parser.add_argument(
        "--refreshes", action="store_true", help="measure refreshes under full attention, and nothing else"
    )
    parser.add_argument("--quick", action="store_true", help="a few questions and one threshold: does it run at all?")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    if args.quick:
        args.questions, args.few, args.repeats, args.long_repeats = min(args.questions, 16), 2, 1, 1
    thresholds = (0.9,) if args.quick else (0.7, 0.8, 0.9, 0.95)
    wanted = args.checkpoint or CHECKPOINTS
    asked = questions("held_out", args.questions, args.seed)

    threads, block_length = torch.get_num_threads(), SHORT_BLOCK if args.refreshes else args.block_length
    print(f"float32, CPU with {threads} thread(s), torch {torch.__version__}, vLLM {vllm_version}")
    print(f"{len(asked)} questions, canvas of {CANVAS} in blocks of {block_length}, KV blocks of {PAGE} positions")
    print_heading()
    rows, drifts = [], {}
    for name in wanted:
        if name in block_families.PACES:
            continue
        engine = load(name)
        if engine is None:
            print(f"{name:<11} not run: the package has no such checkpoint")
            continue
        if args.refreshes:
            if name != "tiny-d2f":
                of_engine, drifts[name] = measure_refreshes(engine, asked, args.repeats)
                rows += of_engine
        elif name == "tiny-d2f":
            rows += measure_all(engine, d2f_paces(thresholds, args.d2f_block_length), asked, args.few, args.repeats)
        else:
            rows.append(measure_reference(engine, asked[: args.few], args.block_length, args.repeats))
            print_row(rows[-1])
            paces = full_attention_paces(thresholds, args.block_length)
            rows += measure_all(engine, paces, asked, args.few, args.repeats)
            drifts[name] = report_drift(engine, asked, args.block_length)
    result = {"drift": drifts} if args.refreshes else headline(rows) | {"drift": drifts}
    if rows and not args.refreshes:
        plot(rows, args.plot)
    of_blocks = [name for name in wanted if name in block_families.PACES and not args.refreshes]
    if of_blocks:
        block_rows, figures = block_families.measure_all(of_blocks, asked, args.few, args.repeats, args.long_repeats)
        rows += block_rows
        result |= figures
    result |= {"environment": measure.environment() | {"vllm": vllm_version}, "rows": [vars(row) for row in rows]}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
