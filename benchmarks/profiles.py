"""What the profiles give and cost on the held-out questions of the bundled checkpoints: the table of docs/profiles.md.

    python benchmarks/profiles.py                    # 200 questions a row
    python benchmarks/profiles.py --questions 8 --checkpoint tiny-llada

A row is a profile and nothing else: the request says no more. Batch 16, float32, greedy, in this process. Then how long a chat
of nothing but a message takes, asked of a server, as a multiple of the best of several explicit settings: `chat_over_best` of
the last line, which is one JSON object, the worst over the checkpoints.
"""

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import block_families
import measure
import openai
from rows import CANVAS, load, measure_row, print_heading, print_row

from dllm_plugin import checkpoints
from dllm_plugin.checkpoints.tasks import Question, questions
from dllm_plugin.params import PROFILES

# explicit settings that a user might find for a short answer
FULL = [
    {"block_length": 8},
    {"threshold": 0.9},
    {"threshold": 0.9, "block_length": 8},
    {"block_length": 16, "steps": 8},
]
BLOCK = [{"threshold": 0.9}, {"threshold": 0.8}]


def settings_of(name: str) -> dict[str, Any]:
    """An operator serves tiny-d2f with its strategy."""
    extras = checkpoints.DECODING.get(name, {})
    return {"diffusion": {key.removeprefix("diffusion_"): value for key, value in extras.items()}}


@contextmanager
def served(name: str) -> Iterator[openai.OpenAI]:
    """A client of a server of its own, with no flag that bears on decoding."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(checkpoints.path(name)), "--port", str(port)]
    command += ["--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", name]
    command += ["--no-enable-prefix-caching", "--additional-config", json.dumps(settings_of(name))]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        while True:
            if server.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with {server.returncode}")
            with suppress(openai.APIConnectionError):
                client.models.list()
                break
            time.sleep(0.5)
        yield client
    finally:
        server.terminate()
        server.wait()


def chat_over_best(name: str, asked: Sequence[Question], repeats: int) -> float:
    """Seconds of chats of nothing but a message over those with the best explicit settings, one request at a time."""
    ways: list[dict[str, Any]] = [
        {
            "max_tokens": CANVAS,
            "extra_body": {"vllm_xargs": {f"diffusion_{key}": value for key, value in extras.items()}},
        }
        for extras in (BLOCK if name in block_families.PACES else FULL)
    ]
    ways.insert(0, {})
    best = [math.inf] * len(ways)
    with served(name) as client:
        for _ in range(1 + repeats):  # the first one warms up
            for i, way in enumerate(ways):
                begin = time.perf_counter()
                for question in asked:
                    messages: Any = [{"role": "user", "content": question.text}]
                    client.chat.completions.create(model=name, messages=messages, **way)
                best[i] = min(best[i], time.perf_counter() - begin)
    return best[0] / min(best[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--checkpoint", action="append", choices=checkpoints.NAMES)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    asked = questions("held_out", args.questions, seed=0)
    print(", ".join(f"{name} {value}" for name, value in measure.environment().items()))
    print_heading()
    ratios = {}
    for name in args.checkpoint or checkpoints.NAMES:
        engine = load(name, additional_config=settings_of(name))
        assert engine is not None
        engine.names_policy = False
        for profile in PROFILES:
            row, _ = measure_row(engine, asked, "profile", profile, {"profile": profile}, 16, args.repeats)
            print_row(row)
        ratios[name] = round(chat_over_best(name, asked[:8], args.repeats), 2)
        print(f"{name}: a chat without parameters takes {ratios[name]} times the best explicit ones")
    print(json.dumps({"chat_over_best": max(ratios.values()), "by_checkpoint": ratios}))


if __name__ == "__main__":
    main()
