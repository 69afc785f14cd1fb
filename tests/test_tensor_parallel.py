"""Tensor parallelism of two on the CPU: the tokens and the number of forward passes are those of one rank.

Two ranks need processes of their own, so a script (this file, run by itself) starts the engines and decodes every case.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cases import PolicyCase, expected
from support.checkpoints import folder

CHECKPOINTS = ("llada-padded", "dream-tied")
CASES = [
    PolicyCase(checkpoint, **settings)
    for checkpoint in CHECKPOINTS
    for settings in (
        {"policy": "low_confidence", "max_tokens": 10, "block": 4, "steps": 6, "prompt": 5},
        {"policy": "entropy", "max_tokens": 10, "prompt": 12},
        {"policy": "topk_margin", "max_tokens": 9, "block": 5, "steps": 6, "prompt": 3, "canvas": 5},
        {"policy": "random", "max_tokens": 8, "steps": 4, "prompt": 1},
        {"policy": "low_confidence", "max_tokens": 8, "steps": 4, "prompt": 7, "cfg": 1.0},
        # sampling, with the noise that the seed stands for
        {"policy": "low_confidence", "max_tokens": 8, "prompt": 4, "temperature": 0.9, "seed": 5},
        {"policy": "entropy", "max_tokens": 8, "prompt": 4, "temperature": 1.1, "top_p": 0.9, "top_k": 30, "seed": 6},
        {"policy": "maskgit_plus", "max_tokens": 8, "prompt": 6, "temperature": 0.8, "alg_temp": 0.5, "seed": 7},
        # the ranks draw the same seed where none is given
        {"policy": "origin", "max_tokens": 8, "steps": 5, "prompt": 6, "temperature": 1.0, "seed": 8},
    )
]
NUM_CORES = len(os.sched_getaffinity(0))


def decode(checkpoint: str, path: str) -> None:
    """Runs in a process of its own: prints the tokens and forward passes of each case as JSON, one line."""
    from support.engines import new_engine, num_forwards

    llm = new_engine(Path(path), tensor_parallel_size=2, distributed_executor_backend="mp")
    prompts, params = zip(*(case.request for case in CASES if case.checkpoint == checkpoint), strict=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(prompts, list(params), use_tqdm=False)
    unseeded = params[-1].clone()
    unseeded.seed = None
    again = llm.generate(prompts[-1], unseeded, use_tqdm=False)
    workers = llm.collective_rpc(rank_and_heads)
    canvases = llm.collective_rpc(last_canvas)
    result = {
        "cases": [[list(output.outputs[0].token_ids), num_forwards(output)] for output in outputs],
        "unseeded": list(again[0].outputs[0].token_ids),
        "canvases": canvases,
        "workers": workers,
    }
    print("RESULT", json.dumps(result), flush=True)


def rank_and_heads(wrapper) -> tuple[int, str, int]:
    """Asked of every rank: which it is, and how many of the attention heads it has."""
    block = wrapper.worker.model_runner.model.decoder.blocks[0]
    return wrapper.worker.rank, type(wrapper.worker).__name__, block.num_heads


def last_canvas(wrapper) -> list[int]:
    """Asked of every rank: the sequence it decoded last, as it has it."""
    state = wrapper.worker.model_runner.state
    (slot,) = [request.slot for request in state.requests.values()] or state._free[-1:]
    return state.tokens[slot][~state.masked[slot]].tolist()


@pytest.fixture(scope="module", params=CHECKPOINTS)
def decoded(request):
    """(checkpoint, what two ranks made of its cases)."""
    if NUM_CORES < 2:
        pytest.skip(f"two ranks need two cores, and this process may use {NUM_CORES}")
    cores = sorted(os.sched_getaffinity(0))
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}",
        # functions are sent to the ranks by pickle
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run(
        [sys.executable, __file__, request.param, str(folder(request.param))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"no result; exit status {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}"
    return request.param, json.loads(lines[-1].removeprefix("RESULT "))


def test_two_ranks_share_the_heads(decoded):
    _, result = decoded
    assert result["workers"] == [[0, "DiffusionWorker", 2], [1, "DiffusionWorker", 2]]


@pytest.mark.parametrize("case", range(len(CASES) // 2), ids=lambda i: CASES[i].id.partition("-")[2])
def test_equals_the_reference(decoded, case):
    checkpoint, result = decoded
    want = expected([one for one in CASES if one.checkpoint == checkpoint][case])
    assert result["cases"][case] == [want.tokens, want.num_forwards]


def test_ranks_agree_without_a_seed(decoded):
    """Ranks that drew different noise would lose each other."""
    _, result = decoded
    assert len(result["unseeded"]) == CASES[-1].max_tokens
    first, second = result["canvases"]
    assert first == second and first[-len(result["unseeded"]) :] == result["unseeded"]


if __name__ == "__main__":
    decode(*sys.argv[1:])
