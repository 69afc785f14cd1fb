"""Two ranks of experts, which share the width of each expert or the experts themselves: the tokens are those of one rank.

Two ranks need processes of their own, so a script (this file, run by itself) starts the engines and decodes.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from support.cases import random_prompt
from support.checkpoints import write_checkpoint
from support.engines import new_engine
from vllm import EngineArgs, SamplingParams

WIDTH = 64  # of an expert
PROMPTS = [random_prompt(length, f"parallel-{length}") for length in (9, 4, 1, 22)]
NUM_CORES = len(os.sched_getaffinity(0))
# the writer of the checkpoint and its settings, those of the engine, and what one rank has and two have of a layer
RUNS = {
    "widths": (
        "llada2",
        {"num_experts": 8},
        {},
        [[8, 2 * WIDTH, 128], [8, 128, WIDTH], None],
        [[[8, WIDTH, 128], [8, 128, WIDTH // 2], None]] * 2,
    ),
    "experts": (
        "sdar-moe",
        {"num_experts": 7},
        {"enable_expert_parallel": True, "enable_ep_weight_filter": True},
        [[7, 2 * WIDTH, 128], [7, 128, WIDTH], None],
        [
            [[4, 2 * WIDTH, 128], [4, 128, WIDTH], [0, 1, 2, 3, -1, -1, -1]],
            [[3, 2 * WIDTH, 128], [3, 128, WIDTH], [-1, -1, -1, -1, 0, 1, 2]],
        ],
    ),
}


def decode(path: Path, **settings) -> tuple[list[list[int]], list]:
    """Tokens of every prompt, and what each rank has of the experts."""
    llm = new_engine(path, **settings)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], llm.collective_rpc(shares)


def shares(wrapper) -> list[list[int] | None]:
    """Asked of every rank: the shapes of its experts' weights in the last layer, and the places of all experts there."""
    experts = getattr(wrapper, "worker", wrapper).model_runner.model.decoder.blocks[-1].mlp.experts
    places = experts.places
    return [list(experts.w13_weight.shape), list(experts.w2_weight.shape), None if places is None else places.tolist()]


@pytest.mark.skipif(NUM_CORES < 2, reason="two ranks need two cores")
@pytest.mark.parametrize("of", RUNS)
def test_two_ranks_decode_as_one(of):
    writer, changes, settings, on_one, on_two = RUNS[of]
    path = write_checkpoint(writer, f"parallel-{of}", seed=3, moe_intermediate_size=WIDTH, **changes)
    cores = sorted(os.sched_getaffinity(0))
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions are sent to the ranks by pickle
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, __file__, str(path), json.dumps(settings)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"no result; exit status {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}"
    tokens, of_ranks = json.loads(lines[-1].removeprefix("RESULT "))
    alone, whole = decode(path)
    assert tokens == alone
    assert whole == [on_one] and of_ranks == on_two


def test_engines_do_not_step_together():
    """vLLM has them do so where a model has experts, and an idle one then waits for the others every 32 steps."""
    path = write_checkpoint("llada2", "engines", seed=3)
    args = EngineArgs(str(path), dtype="float32", skip_tokenizer_init=True, data_parallel_size=2)
    config = args.create_engine_config()
    assert config.model_config.get_num_experts() == 8
    assert not config.model_config.is_moe and not config.parallel_config.is_moe_model
    in_its_process = pickle.loads(pickle.dumps(config))
    in_its_process.parallel_config.reconfigure_for_independent_dp_rank()  # as vLLM does where it need not step with others
    assert in_its_process.model_config.is_moe  # its ranks are a group of experts


if __name__ == "__main__":
    result = decode(
        Path(sys.argv[1]), tensor_parallel_size=2, distributed_executor_backend="mp", **json.loads(sys.argv[2])
    )
    print("RESULT", json.dumps(result), flush=True)
