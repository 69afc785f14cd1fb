"""The rows of the tables of `strategies.py`: an engine of a bundled checkpoint, and what a strategy costs and gives on it."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import measure  # sets the environment, before torch and vLLM are imported
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from dllm_plugin import checkpoints
from dllm_plugin.checkpoints.tasks import Question
from dllm_plugin.metrics import num_forward_passes

PAGE, CANVAS = 16, 32
_started: list[LLM] = []  # an engine that is closed takes vLLM's process groups from the others
ONE_A_STEP = "one a step"
# the policy that ranks by probability, which is what a threshold is about
POLICIES = {
    "tiny-llada": "low_confidence",
    "tiny-dream": "maskgit_plus",
    "tiny-d2f": "maskgit_plus",
    "tiny-sdar": "low_confidence",
    "tiny-llada2": "low_confidence",
}


@dataclass(frozen=True)
class Row:
    """One strategy on one checkpoint at one batch size. Means are over requests."""

    checkpoint: str
    decoder: str  # "reference", with or without a KV cache, a cache mode, "d2f" or "block"
    pace: str
    batch: int
    accuracy: float  # percent
    nfe: float
    tokens_per_forward: float
    tokens_per_second: float
    kv_blocks: int | None


class Answer(NamedTuple):
    tokens: list[int]  # without EOS
    text: str
    passes: int


@dataclass
class Engine:
    """An engine and what a request to it needs beyond its parameters."""

    name: str
    llm: LLM
    lora: LoRARequest | None = None
    num_requests: int = 0
    names_policy: bool = True  # a request says by what positions are ranked
    most_blocks: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Look at the KV cache whenever a step has been scheduled, before what ended in it is freed."""
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        pool, schedule = scheduler.kv_cache_manager.block_pool, scheduler.schedule
        num_free = pool.get_num_free_blocks()

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.most_blocks = max(self.most_blocks, num_free - pool.get_num_free_blocks())
            return output

        scheduler.schedule = counted

    def serve(self, prompts: Sequence[list[int]], extras: dict[str, Any], batch: int, **sampling: Any) -> list[Any]:
        """Completions of the prompts, ``batch`` of them running at any time; one that ends makes room for another."""
        self.most_blocks = 0
        settings = {f"diffusion_{name}": value for name, value in extras.items()}
        if self.names_policy:
            settings.setdefault("diffusion_remasking", POLICIES[self.name])
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": CANVAS} | sampling, extra_args=settings)
        engine, done, first = self.llm.llm_engine, {}, self.num_requests
        self.num_requests += len(prompts)
        waiting = [(f"{self.name}-{first + i}", prompt) for i, prompt in enumerate(prompts)][::-1]
        while len(done) < len(prompts):
            while waiting and engine.get_num_unfinished_requests() < batch:
                name, prompt = waiting.pop()
                engine.add_request(name, {"prompt_token_ids": prompt}, params, lora_request=self.lora)
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = output.outputs[0]
        return [done[f"{self.name}-{first + i}"] for i in range(len(prompts))]


def load(name: str, **settings: Any) -> Engine | None:
    """The engine of a bundled checkpoint; a LoRA adapter in PEFT format runs over tiny-dream. None: there is none."""
    if name not in checkpoints.NAMES or not checkpoints.path(name).is_dir():
        return None
    folder, lora = checkpoints.path(name), None
    settings["enable_prefix_caching"] = False  # every answer begins with its prompt
    if (folder / "adapter_config.json").exists():
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        lora = LoRARequest(name, 1, str(folder))
        folder = checkpoints.path("tiny-dream")
        settings |= {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}
    return Engine(name, start(folder, max_num_seqs=16, **settings), lora)


def start(model: str | Path, **settings: Any) -> LLM:
    llm = LLM(
        model=str(model),
        dtype="float32",
        kv_cache_memory_bytes=64 << 20,
        block_size=PAGE,
        use_tqdm_on_load=False,
        **{"additional_config": measure.EXACT} | settings,
    )
    _started.append(llm)
    return llm


def tokenized(llm: LLM, asked: Sequence[Question]) -> list[list[int]]:
    tokenizer = llm.get_tokenizer()
    chats = [[{"role": "user", "content": question.text}] for question in asked]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


def answers_of(
    engine: Engine, prompts: Sequence[list[int]], extras: dict[str, Any], batch: int, **sampling: Any
) -> list[Answer]:
    eos = engine.llm.get_tokenizer().eos_token_id
    return [
        Answer([token for token in done.token_ids if token != eos], done.text, num_forward_passes(done))
        for done in engine.serve(prompts, extras, batch, **sampling)
    ]


def measure_row(
    engine: Engine, asked: Sequence[Question], decoder: str, pace: str, extras: dict[str, Any], batch: int, repeats: int
) -> tuple[Row, list[list[int]]]:
    """A row of the table, and the tokens of every answer."""
    prompts = tokenized(engine.llm, asked)
    engine.serve(prompts[:batch], extras, batch)  # warm-up
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        answers = answers_of(engine, prompts, extras, batch)
        seconds.append(time.perf_counter() - begin)
    row = row_of(engine.name, decoder, pace, batch, asked, answers, min(seconds), engine.most_blocks)
    return row, [answer.tokens for answer in answers]


def row_of(
    checkpoint: str,
    decoder: str,
    pace: str,
    batch: int,
    asked: Sequence[Question],
    answers: Sequence[Answer],
    seconds: float,
    kv_blocks: int | None,
) -> Row:
    right = sum(answer.text == question.answer for answer, question in zip(answers, asked, strict=True))
    tokens, passes = (sum(numbers) for numbers in zip(*((len(a.tokens), a.passes) for a in answers), strict=True))
    return Row(
        checkpoint=checkpoint,
        decoder=decoder,
        pace=pace,
        batch=batch,
        accuracy=round(100 * right / len(answers), 2),
        nfe=round(passes / len(answers), 2),
        tokens_per_forward=round(tokens / passes, 3),
        tokens_per_second=round(tokens / seconds, 1),
        kv_blocks=kv_blocks,
    )


def print_heading() -> None:
    print(
        f"{'checkpoint':<11} {'decoder':<19} {'pace':<15} {'batch':>5} {'right %':>8} {'NFE':>6} {'TPF':>6} "
        f"{'tok/s':>8} KV blocks"
    )


def print_row(row: Row) -> None:
    blocks = "-" if row.kv_blocks is None else row.kv_blocks
    print(
        f"{row.checkpoint:<11} {row.decoder:<19} {row.pace:<15} {row.batch:>5} {row.accuracy:>8.1f} {row.nfe:>6.1f} "
        f"{row.tokens_per_forward:>6.2f} {row.tokens_per_second:>8.1f} {blocks:>9}",
        flush=True,
    )
