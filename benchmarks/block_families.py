"""The block-diffusion families on a CPU, for `strategies.py`: rows of its table, and what long prompts cost.

Rows decode with tiny-sdar and tiny-llada2 in blocks of their own length, one prompt after the other with a reference decoder
and with the engine at batch 1 and 16, in turn and at the same settings. The engine's answers and numbers of forward passes
have to be the reference's. Its prefix cache is off, so that every answer begins with its prompt.

The reference decoder is the loop that the tests hold the engine to. It forwards the whole prefix in every pass, as LLaDA2's
published loop does, and ends with the answer, as the models' pages have a user run theirs. SDAR's published loop keeps keys
and values of final blocks instead and spends a pass on each block to write them: tiny-sdar has a row of that, too. Both are
timed once more on answers of 128 tokens that nothing ends.

Long prompts run on random weights of a larger shape, since the bundled checkpoints end at 512 positions. The first step of a
prompt is compared with the forward pass alone, of the engine's model or of the tests' reference model, whichever is faster.
The answers are unmasked from left to right there, so that the first token comes out in the first step: where random weights
rank positions, the step that settles the first one is chance.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import measure
import torch
import torch.nn.functional as F
from reference import block, block_checkpoints, block_models
from rows import CANVAS, ONE_A_STEP, PAGE, Answer, Engine, Row, answers_of, load, print_row, row_of, start, tokenized
from torch import Tensor
from vllm import SamplingParams

from dllm_plugin import checkpoints
from dllm_plugin.attention import WindowBatch
from dllm_plugin.checkpoints.tasks import Question
from dllm_plugin.kernels.window_attention import PagedWindows
from dllm_plugin.params import PRESETS
from dllm_plugin.settings import settings_of

# what the requests of a row ask for; no probability is above a threshold of 1
PACES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny-sdar": {ONE_A_STEP: {}, "threshold 0.9": {"threshold": 0.9}},
    "tiny-llada2": {
        ONE_A_STEP: {"threshold": 1.0},
        "threshold 0.95": {"threshold": 0.95},
        "preset quality": {"preset": "quality"},
        "preset speed": {"preset": "speed"},
    },
}
REFERENCE, CACHED = "reference", "reference, KV cache"
WHOLE = 128  # tokens of an answer that nothing ends
PROMPT, ANSWER, QUESTION = 1024, 32, 32
SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "intermediate_size": 768, "max_position_embeddings": 4096,
}  # fmt: skip
SHAPES = {  # of the family of each checkpoint, for long prompts
    "tiny-sdar": ("sdar", SHAPE),
    "tiny-llada2": ("llada2", SHAPE | {"moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 4}),
}


# ---- rows of the table


@dataclass
class Timed:
    """Runs of a decoder: the last one's answers, seconds of each, and the most KV blocks in use."""

    answers: list[Answer]
    seconds: list[float]
    kv_blocks: int | None

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)


class KeepsFinalBlocks:
    """A model for `block.generate` that forwards the open block alone, and each final one once more to keep its keys."""

    def __init__(self, model: block_models.BlockModel, length: int) -> None:
        self.model, self.length = model, length
        self.mask_token_id, self.shift = model.mask_token_id, model.shift
        self.cache, self.num_kept = model.new_cache(length), 0

    def logits(self, ids: Tensor, visible: Tensor) -> Tensor:
        """Logits [n, vocabulary] of ids [n]; NaN in the rows of final blocks."""
        visible = F.pad(visible, (0, self.length - len(ids)))
        start = (len(ids) - 1) // self.model.block_length * self.model.block_length
        if start > self.num_kept:
            self.model.forward(ids, self.num_kept, start, visible[self.num_kept : start], self.cache)
            self.num_kept = start
        rows = self.model.forward(ids, start, len(ids), visible[start:], self.cache)
        return F.pad(rows, (0, 0, start, 0), value=torch.nan)


@dataclass
class Decoders:
    """What is timed in turn on one checkpoint: reference decoders at batch 1, and the engine at batch 1 and 16."""

    engine: Engine
    model: block_models.BlockModel

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Decoder and batch size; the plain reference first."""
        cached = [(CACHED, 1)] if self.engine.name == "tiny-sdar" else []
        return [(REFERENCE, 1), *cached, ("block", 1), ("block", 16)]

    def answers(
        self, key: tuple[str, int], prompts: Sequence[list[int]], extras: dict[str, Any], max_tokens: int, ends: bool
    ) -> list[Answer]:
        decoder, batch = key
        if decoder == "block":
            return answers_of(self.engine, prompts, extras, batch, max_tokens=max_tokens, ignore_eos=not ends)
        return [self._reference(decoder, prompt, extras, max_tokens, ends) for prompt in prompts]

    def _reference(
        self, decoder: str, prompt: list[int], extras: dict[str, Any], max_tokens: int, ends: bool
    ) -> Answer:
        model, tokenizer = self.model, self.engine.llm.get_tokenizer()
        eos, turn_end = tokenizer.eos_token_id, settings_of(self.engine.llm.llm_engine.vllm_config).turn_end_token_id
        end = -(-(len(prompt) + max_tokens) // model.block_length) * model.block_length
        generation = block.generate(
            KeepsFinalBlocks(model, end) if decoder == CACHED else model,
            prompt,
            max_tokens,
            block_length=model.block_length,
            stop_ids=(eos, turn_end) if ends else (),
            **PRESETS.get(extras.get("preset", ""), {}),
            **{name: value for name, value in extras.items() if name != "preset"},
        )
        tokens = [token for token in generation.tokens if token != eos]
        text = tokenizer.decode([t for t in tokens if t != turn_end or not ends], skip_special_tokens=True)
        return Answer(tokens, text, generation.num_forwards)

    def in_turn(
        self, prompts: Sequence[list[int]], few: int, repeats: int, extras: dict[str, Any], max_tokens: int, ends: bool
    ) -> dict[tuple[str, int], Timed]:
        """Every decoder on the first few of the prompts, batch 16 on all of them. Raises AssertionError where they differ."""
        timed = {key: Timed([], [], None) for key in self.keys}
        for repeat in range(1 + repeats):
            for (decoder, batch), one in timed.items():
                some = prompts[: 2 if repeat == 0 else len(prompts) if batch > 1 else few]  # the first time to warm up
                begin = time.perf_counter()
                one.answers = self.answers((decoder, batch), some, extras, max_tokens, ends)
                one.seconds += [time.perf_counter() - begin] * (repeat > 0)
                one.kv_blocks = self.engine.most_blocks if decoder == "block" else None
        for key, one in timed.items():
            if one.answers[:few] != timed[REFERENCE, 1].answers:
                raise AssertionError(
                    f"{self.engine.name}, {extras}: {key} has other answers than the reference decoder"
                )
        return timed


def measure_rows(name: str, asked: Sequence[Question], few: int, repeats: int) -> tuple[list[Row], dict[str, dict]]:
    """Rows of a checkpoint, with the best times; and speedups of the engine at batch 16, medians of those of the repeats."""
    engine = load(name)
    assert engine is not None
    decoders, prompts = Decoders(engine, block_models.load(checkpoints.path(name))), tokenized(engine.llm, asked)
    rows, speedups = [], {}
    for pace, extras in PACES[name].items():
        timed = decoders.in_turn(prompts, few, repeats, extras, CANVAS, ends=True)
        for (decoder, batch), one in timed.items():
            shape = (name, decoder, pace, batch)
            rows.append(row_of(*shape, asked[: len(one.answers)], one.answers, min(one.seconds), one.kv_blocks))
            print_row(rows[-1])
        speedups[pace] = over_references(timed)
        print(f"{name}, {pace}: batch 16 over {speedups[pace]}")
    for pace, extras in [*PACES[name].items()][:2]:
        timed = decoders.in_turn(prompts[:16], 2, repeats, extras, WHOLE, ends=False)
        label = f"{pace}, {WHOLE} tokens"
        speedups[label] = over_references(timed)
        print(f"{name}, {label}: batch 16 over {speedups[label]}")
    return rows, speedups


def over_references(timed: dict[tuple[str, int], Timed]) -> dict[str, float]:
    """Tokens a second of the engine at batch 16 over those of each reference decoder."""
    ours, ratios = timed["block", 16], {}
    for (decoder, _), theirs in timed.items():
        if decoder != "block":
            share = ours.num_tokens / theirs.num_tokens
            of_repeats = [share * b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
            ratios[decoder] = round(statistics.median(of_repeats), 2)
    return ratios


# ---- long prompts


class LongPrompts:
    """An engine over random weights, whose prompts are new each time, and the same weights as the tests' reference model."""

    def __init__(self, family: str, shape: dict[str, int]) -> None:
        self.family, self.random, self.num_requests = family, random.Random(family), 0
        with tempfile.TemporaryDirectory() as folder:
            block_checkpoints.WRITERS[family](folder, **shape)
            self.reference = block_models.load(folder)
            settings = {"max_model_len": 2 * PROMPT, "max_num_batched_tokens": 2 * PROMPT, "max_num_seqs": 4}
            self.llm = start(folder, skip_tokenizer_init=True, enable_prefix_caching=True, **settings)
        core = self.llm.llm_engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.block_length = self.reference.block_length

    def new_tokens(self, number: int) -> list[int]:
        return [self.random.randrange(300) for _ in range(number)]

    def add(self, prompt: list[int]) -> str:
        # from left to right: with random weights it is chance in which step the first token is settled
        params = SamplingParams(
            temperature=0.0, max_tokens=ANSWER, ignore_eos=True, detokenize=False,
            extra_args={"diffusion_remasking": "sequential"},
        )  # fmt: skip
        self.num_requests += 1
        name = f"{self.family}-long-{self.num_requests}"
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def first_step(self) -> float:
        """Seconds of the step that forwards a new prompt and the first block of its answer."""
        engine = self.llm.llm_engine
        name = self.add(self.new_tokens(PROMPT))
        launches, launch = [], self.runner.launch
        self.runner.launch = lambda *args: launches.append(None) or launch(*args)
        begin = time.perf_counter()
        (output,) = engine.step()
        seconds = time.perf_counter() - begin
        del self.runner.launch
        engine.abort_request([name])
        if len(launches) != 1 or len(output.outputs[0].token_ids) != 1 or output.num_cached_tokens:
            raise AssertionError(f"a prompt of {PROMPT} and the first pass take one launch, took {len(launches)}")
        return seconds

    def bare_forward(self) -> Callable[[], object]:
        """The engine's model on PROMPT tokens, under the same attention over what the pages hold, and storing nothing."""
        one = {name: measure.int32([value], "cpu") for name, value in {
            "window_start": 0, "visible": PROMPT, "prefix_len": 0, "block_length": self.block_length,
        }.items()}  # fmt: skip
        table = measure.int32([*range(PROMPT // PAGE)], "cpu").view(1, -1)
        windows = PagedWindows(
            query_start_loc=measure.int32([0, PROMPT], "cpu"), max_query_len=PROMPT, block_table=table,
            max_visible=PROMPT, **one,
        )  # fmt: skip
        ids, positions = torch.tensor(self.new_tokens(PROMPT)), torch.arange(PROMPT)

        @torch.inference_mode()
        def forward() -> Tensor:
            with self.runner.attending(WindowBatch(0, None, windows)):
                return self.runner.model(ids, positions)

        return forward

    def reference_forward(self) -> Callable[[], object]:
        ids, visible = torch.tensor(self.new_tokens(PROMPT)), block_models.block_causal(PROMPT, self.block_length)
        return lambda: self.reference.logits(ids, visible)

    def prefill(self, repeats: int) -> dict[str, float]:
        """Median seconds of runs in turn."""
        bare, reference = self.bare_forward(), self.reference_forward()
        runs = {"first step": self.first_step, "engine's model": timed(bare), "reference model": timed(reference)}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(1 + repeats):
            for name, run in runs.items():
                taken = run()
                seconds[name] += [taken] * (i > 0)
        return {name: statistics.median(taken) for name, taken in seconds.items()}

    def turn(self, prompt: list[int]) -> tuple[float, list[int], int]:
        """Seconds from the request to its first token, the answer, and how many tokens of the prompt were cached."""
        engine = self.llm.llm_engine
        begin, first = time.perf_counter(), None
        self.add(prompt)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if first is None and output.outputs[0].token_ids:
                    first = time.perf_counter() - begin
        assert first is not None
        return first, output.outputs[0].token_ids, output.num_cached_tokens

    def chats(self, repeats: int) -> dict[str, float]:
        """Median seconds to the first token of first turns, PROMPT new tokens, and of second ones, which go on from there."""
        firsts, seconds = [], []
        for i in range(1 + repeats):
            prompt = self.new_tokens(PROMPT)
            first, answer, num_cached = self.turn(prompt)
            history = [*prompt, *answer]
            second, _, num_found = self.turn([*history, *self.new_tokens(QUESTION)])
            if num_cached or num_found < PROMPT:
                raise AssertionError(f"{num_cached} tokens of a new prompt and {num_found} of a history were cached")
            firsts += [first] * (i > 0)
            seconds += [second] * (i > 0)
        return {"first turn": statistics.median(firsts), "second turn": statistics.median(seconds), "found": num_found}


def timed(call: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return seconds


def measure_long(names: Sequence[str], repeats: int) -> dict[str, dict[str, float]]:
    """Of each family, medians in milliseconds, the two ratios, and how many tokens of a history were found."""
    report = {}
    for family, shape in (SHAPES[name] for name in names):
        engine = LongPrompts(family, shape)
        prefill, chats = engine.prefill(repeats), engine.chats(repeats)
        bare = min(prefill["engine's model"], prefill["reference model"])
        times = prefill | {name: chats[name] for name in ("first turn", "second turn")}
        report[family] = {f"{name}, ms": round(1e3 * value, 2) for name, value in times.items()} | {
            "prefill ratio": round(prefill["first step"] / bare, 3),
            "second turn ratio": round(chats["second turn"] / chats["first turn"], 3),
            "tokens found": chats["found"],
        }
        print(
            f"{family}, prompts of {PROMPT}: " + ", ".join(f"{name} {value}" for name, value in report[family].items())
        )
    return report


def measure_all(
    names: Sequence[str], asked: Sequence[Question], few: int, repeats: int, long_repeats: int
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of the checkpoints, and the figures to reach, each the worst over families and paces."""
    rows, speedups = [], {}
    for name in names:
        of_checkpoint, speedups[name] = measure_rows(name, asked, few, repeats)
        rows += of_checkpoint
    long = measure_long(names, long_repeats)
    return rows, {
        "block_batch16_speedup": min(
            of_pace[REFERENCE] for name in names for of_pace in (speedups[name][pace] for pace in PACES[name])
        ),
        "prefill_1024_ratio": max(row["prefill ratio"] for row in long.values()),
        "second_turn_ttft_ratio": max(row["second turn ratio"] for row in long.values()),
        "block_speedups": speedups,
        "long_prompts": long,
    }
