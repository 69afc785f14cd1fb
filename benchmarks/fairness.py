"""How fair the server is: what requests wait for beside heavy ones and in a crowd, and what that costs in throughput.

    python benchmarks/fairness.py
    python benchmarks/fairness.py --scenario throughput --baseline DIR    # another checkout, the two in alternation

A real vLLM server of tiny-llada on the loopback address, float32, asked over HTTP. Three scenarios:

beside: short requests of 8 tokens, one after another, alone and beside heavy requests that are renewed as they end. Asked:
  latency <= 3 * latency alone + steps * heavy step. A heavy step is the latency of one heavy request alone over its forward
  passes; a load step is that of all heavy requests of the row together, which gives a looser limit.
clients: a closed loop of clients with requests of random lengths and settings. Asked: p99 / median of latency <= 8. Read it
  with the median: where everybody waits in line the ratio is small, and the short wait as long as the long. The same ratio of
  forward passes says how unequal the requests are, and that of seconds per forward pass how unequally they were served: near 1
  where every request has its turn in every step. Who was cut off counts with what it waited.
throughput: tokens per second of a batch of equal requests that fills a step's budget, and of a batch of mixed ones. With
  `--baseline` the servers of both checkouts run at once and are asked in turn; the ratio is that of the medians.

A greedy request has to get the same tokens whenever it is asked, alone, in a crowd, of either checkout: every one that is asked
twice is compared, and a fixed set of questions is asked alone at the beginning, among the clients, and all at once at the end.
Prints tables and, last, one JSON object. Times are those of a machine and its hour: compare within one run.
"""

import argparse
import asyncio
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import measure  # before vLLM: it sets the environment
from rich.console import Console
from rich.table import Table
from vllm import __version__ as vllm_version

from dllm_plugin import checkpoints
from dllm_plugin.checkpoints.tasks import questions

ROOT = Path(__file__).parents[1]
MODEL, BUDGET = "tiny-llada", 2048
START_SECONDS, ANSWER_SECONDS = 400, 120
TIMES_ALONE, RATIO = 3, 8  # asked of beside and of clients
FIXED = [  # settings of the fixed questions
    {},
    {"diffusion_steps": 16},
    {"diffusion_cache": "prefix", "diffusion_block_length": 8},
    {"diffusion_cache": "dual", "diffusion_block_length": 8, "diffusion_threshold": 0.9},
    {"diffusion_cfg_scale": 0.5},
]


# ---- requests


def ask_for(prompt: Sequence[int], max_tokens: int, extras: dict[str, Any] | None = None, **sampling: Any) -> dict:
    """A request of exactly so many tokens, greedy, one a step and in one block where nothing else is said."""
    always = {"model": MODEL, "ignore_eos": True, "return_token_ids": True, "temperature": 0}
    one_a_step = dict.fromkeys(("diffusion_steps", "diffusion_block_length", "diffusion_canvas_length"), max_tokens)
    asked = {"prompt": list(prompt), "max_tokens": max_tokens, "vllm_xargs": one_a_step | (extras or {})}
    return always | asked | sampling


def fixed(prompts: Sequence[Sequence[int]]) -> list[dict]:
    return [ask_for(prompt, 24, extras) for prompt, extras in zip(prompts, FIXED, strict=True)]


def mixed(rng: random.Random, longest: int) -> dict:
    """A request of random lengths and settings. Without EOS the model is less sure, and a threshold takes more steps."""
    max_tokens, cache = rng.randint(4, longest), rng.choice(("none", "prefix", "dual"))
    extras = {"diffusion_eos_suppression": "logits", "diffusion_cache": cache, "diffusion_block_length": 32}
    steps = [{"diffusion_steps": math.ceil(max_tokens / tokens)} for tokens in (2, 4)]  # tokens a step
    extras |= rng.choice((*steps, {"diffusion_threshold": 0.9}))
    sampling = rng.choice(({}, {"temperature": 0.7, "seed": rng.randrange(1000)}, {"stream": True}))
    return ask_for(rng.choices(range(32, 127), k=rng.randint(4, 200)), max_tokens, extras, **sampling)


@dataclass(frozen=True)
class Answer:
    """Seconds until the last token or, without tokens, until nobody waited any more."""

    seconds: float
    tokens: tuple[int, ...] = ()
    passes: int = 0  # forward passes


# ---- the server


@dataclass(frozen=True)
class Server:
    url: str
    greedy: dict[str, list[tuple[int, ...]]]  # answers to every greedy request

    async def ask(self, request: dict, seconds: float | None = None) -> Answer:
        """The whole answer. After so many seconds one without tokens; where none are given, RuntimeError in the end."""
        begin, tokens, passes = time.monotonic(), [], 0
        if request.get("stream"):
            request = request | {"stream_options": {"include_usage": True}}
        try:
            async with asyncio.timeout(ANSWER_SECONDS if seconds is None else seconds), self.post(request) as response:
                async for line in response.content:
                    data = line.removeprefix(b"data: ").strip()
                    part = json.loads(data) if data not in (b"", b"[DONE]") else {}
                    if response.status != 200 or "error" in part:
                        raise RuntimeError(f"{response.status} {data[:500]!r} to {str(request)[:500]}")
                    tokens += [token for choice in part.get("choices", ()) for token in choice["token_ids"] or ()]
                    passes += ((part.get("metrics") or {}).get("speculative_decoding") or {}).get("num_spec_steps", 0)
        except TimeoutError:
            if seconds is None:
                raise RuntimeError(f"no answer within {ANSWER_SECONDS} s to {str(request)[:500]}") from None
            return Answer(time.monotonic() - begin)
        if len(tokens) != request["max_tokens"] or passes == 0:
            raise RuntimeError(f"{len(tokens)} tokens in {passes} forward passes to {str(request)[:500]}")
        if request["temperature"] == 0:
            key = json.dumps({name: value for name, value in request.items() if not name.startswith("stream")})
            self.greedy[key].append(tuple(tokens))
        return Answer(time.monotonic() - begin, tuple(tokens), passes)

    @asynccontextmanager
    async def post(self, request: dict, path: str = "/v1/completions") -> AsyncIterator[aiohttp.ClientResponse]:
        async with aiohttp.ClientSession(self.url) as http, http.post(path, json=request) as response:
            yield response

    async def tokenize(self, question: str) -> list[int]:
        chat = {"model": MODEL, "messages": [{"role": "user", "content": question}]}
        async with self.post(chat, "/tokenize") as response:
            return (await response.json())["tokens"]


@contextmanager
def serving(root: Path, budget: int, greedy: dict) -> Iterator[Server]:
    """A server of the package at `root`, up when the block begins and gone when it ends, however it ends."""
    if not (root / "dllm_plugin").is_dir():
        raise SystemExit(f"--baseline must be a checkout with a folder dllm_plugin, got {root}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(checkpoints.path(MODEL)), "--served-model-name", MODEL, "--dtype", "float32"]
    command += ["--max-num-batched-tokens", str(budget), "--max-model-len", "512", "--disable-uvicorn-access-log"]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": path}
    with tempfile.TemporaryFile("w+") as log:
        # with -m the folder it runs in comes before PYTHONPATH
        process = subprocess.Popen(
            command, cwd=root, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while not is_up(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server of {root} did not start within {START_SECONDS} s")
                time.sleep(0.2)
            yield Server(url, greedy)
        except Exception:
            log.seek(0)
            print(log.read()[-4000:], file=sys.stderr)
            raise
        finally:
            for how in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, how)
                    process.wait(30)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


def is_up(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


@asynccontextmanager
async def asking(*servers: Server) -> AsyncIterator[list[list[int]]]:
    """Prompts of the fixed questions, which every server answers one by one at the beginning, all at once at the end."""
    asked = questions("held_out", len(FIXED), seed=3)
    prompts = [await servers[0].tokenize(question.text) for question in asked]
    for server in servers:
        for request in fixed(prompts):
            await server.ask(request)
    yield prompts
    for server in servers:
        await asyncio.gather(*map(server.ask, fixed(prompts)))


# ---- beside heavy requests


@dataclass(frozen=True)
class Load:
    """Heavy requests: 500 tokens behind a prompt, without a cache, one token a step."""

    name: str
    count: int = 1
    prompt: int = 12  # with it four requests fill the budget, and so do two that are guided
    extras: dict[str, Any] = field(default_factory=dict)
    budget: int = BUDGET

    def request(self, **extras: Any) -> dict:
        return ask_for(range(40, 40 + self.prompt), 500, self.extras | extras)


LOADS = [
    Load("1 of 500 tokens"),
    Load("4 of 500 tokens", count=4),
    Load("2 guided of 500", count=2, extras={"diffusion_cfg_scale": 1.0}),
    Load("1 of 505, budget 512", prompt=5, budget=512),
]


@asynccontextmanager
async def under(load: Load, server: Server, seconds: float) -> AsyncIterator[None]:
    """The heavy requests run, each renewed as it ends."""

    async def renew() -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            await server.ask(load.request(), seconds)

    tasks = [asyncio.create_task(renew()) for _ in range(load.count)]
    try:
        await asyncio.sleep(1)  # until they run
        yield
        for task in tasks:
            if task.done():
                task.result()  # raises what ended it before its time
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def one_after_another(server: Server, requests: Sequence[dict], seconds: float) -> list[Answer]:
    """Answers within the time. The one that was cut off is among them only where none took longer."""
    deadline, answers = time.monotonic() + seconds, []
    for request in requests:
        answer = await server.ask(request, deadline - time.monotonic())
        if answer.tokens or answer.seconds > max((other.seconds for other in answers), default=0):
            answers.append(answer)
        if not answer.tokens:
            break
    return answers


async def beside(server: Server, load: Load, num_short: int, seconds: float, steps: int) -> dict[str, Any]:
    async with asking(server) as prompts:
        short = [ask_for(prompts[i % len(prompts)], 8) for i in range(num_short)]
        alone = await one_after_another(server, short, seconds)
        step = {}
        for count in {1, load.count}:
            heavy = await asyncio.gather(*[server.ask(load.request(diffusion_steps=steps)) for _ in range(count)])
            step[count] = statistics.median(answer.seconds / answer.passes for answer in heavy)
        async with under(load, server, seconds + ANSWER_SECONDS):
            answers = await one_after_another(server, short, seconds)
    row = {"beside": load.name, "answered": sum(bool(answer.tokens) for answer in answers), "of": num_short}
    row |= latencies(answers) | {"alone": latencies(alone)["median"], "steps": alone[0].passes}
    for name, seconds in {"heavy": step[1], "load": step[load.count]}.items():
        limit = TIMES_ALONE * row["alone"] + row["steps"] * seconds
        row |= {f"{name} step": seconds, f"{name} limit": limit, f"in {name} limit": row["median"] <= limit}
    return row


def latencies(answers: Sequence[Answer]) -> dict[str, float]:
    seconds = [answer.seconds for answer in answers]
    return {"median": statistics.median(seconds), "p99": percentile_99(seconds)}


def percentile_99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


# ---- a crowd of clients


async def clients(server: Server, num_clients: int, num_requests: int, longest: int, seconds: float) -> dict[str, Any]:
    async with asking(server) as prompts:
        rng = random.Random(0)
        requests = [mixed(rng, longest) for _ in range(num_requests)]
        for i in range(4, num_requests, 8):
            requests[i] = fixed(prompts)[i // 8 % len(FIXED)]
        waiting, answers, begin = iter(requests), [], time.monotonic()

        async def client() -> None:
            for request in waiting:
                left = max(1, begin + seconds - time.monotonic())
                answers.append(await server.ask(request, min(left, ANSWER_SECONDS)))

        await asyncio.gather(*[client() for _ in range(num_clients)])
        wall = time.monotonic() - begin
    done = [answer for answer in answers if answer.tokens]
    row = {"clients": num_clients, "requests": num_requests, "timed out": num_requests - len(done)} | latencies(answers)
    row["p99 / median"] = row["p99"] / row["median"]
    row["in limit"] = row["p99 / median"] <= RATIO and len(done) == num_requests
    shares = {
        "passes": [answer.passes for answer in done],
        "s per pass": [answer.seconds / answer.passes for answer in done],
    }
    row |= {f"{name}, p99 / median": percentile_99(each) / statistics.median(each) for name, each in shares.items()}
    return row | {"tokens/s": sum(len(answer.tokens) for answer in done) / wall, "seconds": wall}


# ---- throughput


async def throughput(servers: dict[str, Server], num_requests: int, longest: int, rounds: int) -> list[dict[str, Any]]:
    rng, extras, rows = random.Random(1), {"diffusion_eos_suppression": "logits"}, []
    equal = [ask_for(rng.choices(range(32, 127), k=32), 32, extras) for _ in range(num_requests)]
    batches = {"equal": equal, "mixed": [mixed(rng, longest) for _ in range(num_requests)]}
    async with asking(*servers.values()):
        for batch, requests in batches.items():
            speeds = {name: [] for name in servers}
            for _ in range(rounds):
                for name, server in servers.items():
                    begin = time.monotonic()
                    answers = await asyncio.gather(*map(server.ask, requests))
                    tokens = sum(len(answer.tokens) for answer in answers)
                    speeds[name].append(tokens / (time.monotonic() - begin))
            medians = {f"{name} tokens/s": statistics.median(values) for name, values in speeds.items()}
            row = {"batch": batch, "requests": num_requests, "rounds": rounds} | medians
            if "baseline" in servers:
                row["over baseline"] = medians["this tokens/s"] / medians["baseline tokens/s"]
            rows.append(row | {"all": speeds})
    return rows


# ---- what is printed


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*[f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()])
    Console(width=max(160, Console().width)).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=("beside", "clients", "throughput", "all"), default="all")
    parser.add_argument("--baseline", type=Path, help="another checkout, whose throughput is measured too")
    parser.add_argument("--quick", action="store_true", help="a few small requests: does it run at all?")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are stopped on the way out
    result = {
        "environment": measure.environment() | {"vllm": vllm_version, "cores": os.cpu_count(), "load": os.getloadavg()}
    }
    print(json.dumps(result["environment"]))
    greedy = defaultdict(list)

    def wanted(scenario: str) -> bool:
        return args.scenario in (scenario, "all")

    with ExitStack() as stack:
        server = stack.enter_context(serving(ROOT, BUDGET, greedy))
        if wanted("beside"):
            result["beside"] = []
            for load in LOADS[:1] if args.quick else LOADS:
                with ExitStack() as own:
                    its = server if load.budget == BUDGET else own.enter_context(serving(ROOT, load.budget, greedy))
                    sizes = (3, 10, 4) if args.quick else (50, 45, 32)
                    result["beside"].append(asyncio.run(beside(its, load, *sizes)))
            show("Short requests beside heavy ones, seconds", result["beside"])
        if wanted("clients"):
            result["clients"] = asyncio.run(clients(server, *((6, 12, 20, 60) if args.quick else (64, 96, 300, 200))))
            show("A closed loop of clients, seconds", [result["clients"]])
        if wanted("throughput"):
            servers = {"this": server}
            if args.baseline:
                servers["baseline"] = stack.enter_context(serving(args.baseline.resolve(), BUDGET, greedy))
            result["throughput"] = asyncio.run(throughput(servers, *((4, 16, 1) if args.quick else (32, 100, 3))))
            show("Throughput", result["throughput"])
    again = [answer == first for first, *later in greedy.values() for answer in later]
    result |= {"compared_answers": len(again), "changed_answers": again.count(False)}
    print(f"changed answers: {again.count(False)} of {len(again)} asked again")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
