"""The ``dllm-plugin`` command: a demo through the real engine, bundled checkpoints, the parameter table."""

import argparse
import logging
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_plugin import checkpoints
from dllm_plugin.params import DESCRIPTIONS, PREFIX, RULES, DiffusionParams

if TYPE_CHECKING:
    from rich.console import Console
    from vllm import LLM


@dataclass(frozen=True, slots=True)
class Answer:
    """One question of the demo, and how the engine answered it."""

    question: str
    text: str
    is_right: bool
    num_tokens: int
    num_forward_passes: int
    seconds: float


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dllm-plugin", description="Serve diffusion language models with stock vLLM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="answer a few questions with the bundled checkpoints, in process")
    demo.add_argument(
        "--checkpoint",
        action="append",
        metavar="NAME_OR_DIR",
        help=f"bundled checkpoint or model folder, may be repeated (default: {' and '.join(checkpoints.NAMES)})",
    )
    demo.add_argument("--questions", type=int, default=6, help="held-out questions for each (default: %(default)s)")
    demo.add_argument("--max-tokens", type=int, default=32, help="of an answer (default: %(default)s)")
    demo.add_argument(
        "--steps", type=int, help="diffusion_steps (default: one a position); not for block-diffusion models"
    )
    demo.add_argument("--block-length", type=int, help="diffusion_block_length (default: the model's)")
    demo.set_defaults(run=run_demo)

    checkpoint = commands.add_parser("checkpoint", help="print the folder of a bundled checkpoint")
    checkpoint.add_argument("name", choices=checkpoints.NAMES)
    checkpoint.set_defaults(run=lambda args: print(checkpoints.path(args.name)))

    params = commands.add_parser("params", help="print the decoding parameters of a request")
    params.add_argument("--markdown", action="store_true", help="as the table of README.md")
    params.set_defaults(run=print_parameters)

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        print(f"dllm-plugin: {error}", file=sys.stderr)
        return 1
    return 0


def parameter_rows() -> list[tuple[str, str, str, str]]:
    """Key, accepted values, default and meaning of every decoding parameter; a default of ``-`` is told in words."""
    defaults = asdict(DiffusionParams())
    return [
        (PREFIX + name, str(rule), "-" if defaults[name] in (None, ()) else str(defaults[name]), DESCRIPTIONS[name])
        for name, rule in RULES.items()
    ]


def parameter_markdown() -> str:
    """`parameter_rows` as the table of README.md."""
    rows = [("parameter", "value", "default", "meaning"), ("---",) * 4]
    rows += [(f"`{key}`", value, default, meaning) for key, value, default, meaning in parameter_rows()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def print_parameters(args: argparse.Namespace) -> None:
    if args.markdown:
        print(parameter_markdown())
        return
    from rich.table import Table

    table = Table("parameter", "value", "default", "meaning", show_lines=True)
    for row in parameter_rows():
        table.add_row(*row)
    console().print(table)


def console() -> "Console":
    from rich.console import Console

    # a pipe has no width of its own, and a cut-off cell says nothing
    return Console(width=None if sys.stdout.isatty() else 120)


def run_demo(args: argparse.Namespace) -> None:
    """Load each checkpoint in turn, answer its questions one by one, print a table of answers."""
    quiet_vllm()
    started = time.perf_counter()
    extras = {PREFIX + name: value for name in ("steps", "block_length") if (value := getattr(args, name)) is not None}
    num_right = num_questions = 0
    for name in args.checkpoint or checkpoints.NAMES:
        loading = time.perf_counter()
        llm = load(name)
        loading = time.perf_counter() - loading
        decoding = checkpoints.DECODING.get(name, {}) | extras
        answers = [*answer_questions(llm, args.questions, args.max_tokens, decoding)]
        llm.llm_engine.engine_core.shutdown()
        print_answers(f"{name} (loaded in {loading:.1f} s)", answers)
        num_right += sum(answer.is_right for answer in answers)
        num_questions += len(answers)
    print(f"{num_right} of {num_questions} answers right, {time.perf_counter() - started:.0f} s in all")


def quiet_vllm() -> None:
    """Environment for an engine in this process that logs nothing but errors. Must run before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # vLLM says that Triton has no CPU backend before its own logging is set up
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    warnings.simplefilter("ignore", FutureWarning)


def load(name: str) -> "LLM":
    """The engine for a bundled checkpoint or a model folder. Raises ValueError where there is neither."""
    bundled = name in checkpoints.NAMES
    folder = checkpoints.path(name) if bundled else Path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"--checkpoint {name!r} is neither a bundled checkpoint ({', '.join(checkpoints.NAMES)}) nor a folder with "
            "a config.json; give one of these"
        )
    from vllm import LLM

    memory: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20} if bundled else {}
    return LLM(model=str(folder), max_num_seqs=8, use_tqdm_on_load=False, **memory)


def answer_questions(llm: "LLM", count: int, max_tokens: int, extras: dict[str, Any]) -> list[Answer]:
    """The answers to ``count`` held-out questions, one request at a time so that each has its own speed."""
    from vllm import SamplingParams

    from dllm_plugin.checkpoints.tasks import questions
    from dllm_plugin.metrics import num_forward_passes

    # Dream takes positions in a random order, at temperature 0 too
    sampling = SamplingParams(temperature=0, seed=0, max_tokens=max_tokens, extra_args=extras)
    answers = []
    for question in questions("held_out", count, seed=0):
        begin = time.perf_counter()
        chat: list[Any] = [{"role": "user", "content": question.text}]
        output = llm.chat(chat, sampling, use_tqdm=False)[0].outputs[0]
        seconds = time.perf_counter() - begin
        right, passes = output.text == question.answer, num_forward_passes(output)
        answers.append(Answer(question.text, output.text, right, len(output.token_ids), passes, seconds))
    return answers


def print_answers(title: str, answers: list[Answer]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("prompt", "answer", "right", title=title, title_justify="left")
    for heading in ("forward passes", "tokens per forward", "tokens per second"):
        table.add_column(heading, justify="right")
    for answer in answers:
        table.add_row(
            Text(answer.question),
            Text("".join(c if c.isprintable() else "�" for c in answer.text)),
            "yes" if answer.is_right else "no",
            str(answer.num_forward_passes),
            f"{answer.num_tokens / max(1, answer.num_forward_passes):.2f}",
            f"{answer.num_tokens / answer.seconds:.0f}",
        )
    console().print(table)


if __name__ == "__main__":
    sys.exit(main())
