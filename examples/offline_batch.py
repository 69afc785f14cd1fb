"""Offline batch: JSONL in, JSONL out, resumed where it stopped.

    python examples/offline_batch.py --model "$(dllm-plugin checkpoint tiny-llada)" --input in.jsonl --output out.jsonl

A line of the input is an object with ``prompt`` (text) or ``messages`` (chat), optionally ``id``, and optionally what
differs from the command line's sampling for this line: temperature, top_p, top_k, seed, max_tokens, stop, ignore_eos
and any ``diffusion_*`` parameter. A line without an id is called ``line-N``, N counting from 1.

A line of the output has the ``id`` and either ``text``, ``finish_reason``, ``prompt_tokens``, ``completion_tokens`` and
``forward_passes``, or ``error``. Lines come in the order in which requests finish, and are written at once: start the
same command again after an interruption, and it goes on with the ids the output lacks. A last line that was cut off in
the middle is removed first. A wrong line costs its own answer only; delete its error line to have it tried again.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

# Requests handed to the engine before the first has finished, for each it can run at once.
_QUEUE_FACTOR = 2
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "seed", "max_tokens", "stop", "ignore_eos")


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the input: what it asks, or why it cannot be read."""

    id: str
    fields: dict[str, Any]
    error: str = ""


def main() -> None:
    args = parse_args()
    done = repair_output(args.output)
    items = [item for item in read_items(args.input) if item.id not in done]
    print(f"{len(done)} lines are done, {len(items)} are left")
    if not items:
        return
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # an engine in this process starts sooner
    from vllm import LLM

    llm = LLM(model=args.model, max_num_seqs=args.max_num_seqs, **args.engine_args)
    defaults = {name: value for name in _SAMPLING_FIELDS if (value := getattr(args, name, None)) is not None}
    num_errors = 0
    with args.output.open("a") as output, tqdm(total=len(done) + len(items), initial=len(done)) as progress:
        for line in generate(llm, items, defaults | args.diffusion, _QUEUE_FACTOR * args.max_num_seqs):
            output.write(json.dumps(line, ensure_ascii=False) + "\n")
            output.flush()
            num_errors += "error" in line
            progress.update()
    print(f"{len(items)} lines written to {args.output}, {num_errors} of them errors")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="The docstring of this file describes both formats."
    )
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--input", type=Path, required=True, help="JSONL file to read")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to append to")
    sampling = parser.add_argument_group("sampling", "defaults of lines that do not say otherwise")
    sampling.add_argument("--max-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    sampling.add_argument("--temperature", type=float, default=0.0, help="(default: %(default)s)")
    sampling.add_argument("--top-p", type=float)
    sampling.add_argument("--top-k", type=int)
    sampling.add_argument("--seed", type=int)
    sampling.add_argument(
        "--diffusion", type=json.loads, default={}, metavar="JSON", help="JSON object of diffusion_* parameters"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--max-num-seqs", type=int, default=16, help="requests run at once (default: %(default)s)")
    engine.add_argument(
        "--engine-args",
        type=json.loads,
        default={},
        metavar="JSON",
        help='further arguments of vllm.LLM, such as \'{"dtype": "float32"}\'',
    )
    return parser.parse_args()


def repair_output(path: Path) -> set[str]:
    """Ids that the output has; a last line that was cut off is removed from the file."""
    if not path.exists():
        return set()
    *lines, tail = path.read_bytes().split(b"\n")
    if tail:
        with path.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines))
    return {json.loads(line)["id"] for line in lines if line}


def read_items(path: Path) -> Iterator[Item]:
    """The lines of the input; one that cannot be used becomes an item with an error."""
    seen: dict[str, int] = {}
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                yield Item(f"line-{number}", {}, f"not JSON: {error}")
                continue
            if not isinstance(fields, dict):
                yield Item(f"line-{number}", {}, f"must be a JSON object, got {line.strip()[:80]}")
                continue
            name = str(fields.pop("id", f"line-{number}"))
            if name in seen:
                yield Item(f"line-{number}", {}, f"id {name!r} is that of line {seen[name]} too; give it its own")
                continue
            seen[name] = number
            yield Item(name, fields)


def generate(llm: Any, items: list[Item], defaults: dict[str, Any], queue_length: int) -> Iterator[dict[str, Any]]:
    """Output lines as requests finish; the engine always has ``queue_length`` requests to choose from."""
    running: dict[str, Item] = {}
    left = iter(items)
    while True:
        while len(running) < queue_length and (item := next(left, None)):
            try:
                if item.error:
                    raise ValueError(item.error)
                enqueue(llm, item, defaults)
                running[item.id] = item
            except Exception as error:  # a chat template may raise anything, and it is this line's own fault
                yield {"id": item.id, "error": str(error) or repr(error)}
        if not running:
            return
        for output in llm.llm_engine.step():
            if output.finished:
                yield result(running.pop(output.request_id), output)


def enqueue(llm: Any, item: Item, defaults: dict[str, Any]) -> None:
    """Hand a line to the engine under its id. Raises what vLLM raises, or ValueError, where the line is wrong."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    prompt, messages = item.fields.get("prompt"), item.fields.get("messages")
    if (prompt is None) == (messages is None):
        raise ValueError('a line has either "prompt" or "messages"')
    options = defaults | {name: value for name, value in item.fields.items() if name not in ("prompt", "messages")}
    extras = {name: options.pop(name) for name in list(options) if name.startswith("diffusion_")}
    if unknown := options.keys() - set(_SAMPLING_FIELDS):
        known = ", ".join(("id", "prompt", "messages", *_SAMPLING_FIELDS))
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}; known: {known} and diffusion_*")
    tokenizer = llm.get_tokenizer()
    if messages is None:
        if not isinstance(prompt, str):
            raise ValueError(f'"prompt" must be a text, got {prompt!r}')
        token_ids = tokenizer.encode(prompt)
    else:
        if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f'"messages" must be a list of {{"role": ..., "content": ...}}, got {messages!r}')
        token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    sampling = SamplingParams(**options, extra_args=extras, output_kind=RequestOutputKind.FINAL_ONLY)
    llm.llm_engine.add_request(item.id, tokens_input(token_ids), sampling)


def result(item: Item, output: Any) -> dict[str, Any]:
    from dllm_plugin.metrics import num_forward_passes

    completion = output.outputs[0]
    if completion.finish_reason == "error":
        return {"id": item.id, "error": "the engine could not serve the request; its log says why"}
    return {
        "id": item.id,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(completion.token_ids),
        "forward_passes": num_forward_passes(completion),
    }


if __name__ == "__main__":
    main()
