"""Tensor parallelism of two over experts: the tokens are those of one rank, and each rank has a share of every expert.

Two ranks need processes of their own, so a script (this file, run by itself) starts the engines and decodes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reference import block_checkpoints
from support.cases import random_prompt
from support.checkpoints import temporary_folder
from support.engines import new_engine
from vllm import SamplingParams

WIDTH = 64  # of an expert
PROMPTS = [random_prompt(length, f"parallel-{length}") for length in (9, 4, 1, 22)]
NUM_CORES = len(os.sched_getaffinity(0))


def decode(path: Path, **settings) -> tuple[list[list[int]], list]:
    """Tokens of every prompt, and what each rank has of the experts."""
    llm = new_engine(path, **settings)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], llm.collective_rpc(shares)


def shares(wrapper) -> list[list[int]]:
    """Asked of every rank: the shapes of its experts' weights in the last layer."""
    mlp = getattr(wrapper, "worker", wrapper).model_runner.model.decoder.blocks[-1].mlp
    return [list(mlp.experts.w13_weight.shape), list(mlp.experts.w2_weight.shape)]


@pytest.mark.skipif(NUM_CORES < 2, reason="two ranks need two cores")
def test_two_ranks_decode_as_one():
    path = block_checkpoints.write_llada2(temporary_folder("parallel"), seed=3, moe_intermediate_size=WIDTH)
    cores = sorted(os.sched_getaffinity(0))
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions are sent to the ranks by pickle
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, __file__, str(path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"no result; exit status {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}"
    tokens, of_ranks = json.loads(lines[-1].removeprefix("RESULT "))
    alone, whole = decode(path)
    assert tokens == alone
    assert whole == [[[8, 2 * WIDTH, 128], [8, 128, WIDTH]]]
    assert of_ranks == [[[8, WIDTH, 128], [8, 128, WIDTH // 2]]] * 2


if __name__ == "__main__":
    result = decode(Path(sys.argv[1]), tensor_parallel_size=2, distributed_executor_backend="mp")
    print("RESULT", json.dumps(result), flush=True)
