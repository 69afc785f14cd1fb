"""Times denoising steps of the real engine on a GPU, with an 8B LLaDA of random weights: python benchmarks/gpu_engine.py

The shape of GSAI-ML/LLaDA-8B-Instruct in bfloat16. First, prompts of 1,024 tokens, two blocks of 32 under the dual cache,
one token a step: the first step of a block forwards the whole sequence, the other 31 its block alone, and each kind is timed
by itself. Then one prompt of 100 and a canvas of 256 without a cache, two tokens a step. All with outputs asked for at the
end, as `LLM.generate` does, and the first also streamed, where each denoising step is an engine step of its own, and under a
threshold (which no random confidence passes), where the host must have seen a step before it launches the next; and with
CUDA graphs and without. Times are engine steps by the host's clock, divided by their denoising steps. Random weights have no
accuracy; this is about speed only. The last line is one JSON object; `--json FILE` writes it too.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import measure  # before torch and vLLM: it sets the environment
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from vllm import LLM, SamplingParams
from vllm import __version__ as vllm_version
from vllm.sampling_params import RequestOutputKind

PROMPT, BLOCK, CANVAS = 1024, 32, 64
CONFIG = {
    "architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": 4096, "n_layers": 32, "n_heads": 32,
    "n_kv_heads": 32, "mlp_hidden_size": 12_288, "vocab_size": 126_464, "embedding_size": 126_464,
    "max_sequence_length": 4096, "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu",
    "rope": True, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "weight_tying": False, "mask_token_id": 126_336,
    "eos_token_id": 126_081, "eot_token_id": 126_348,
}  # fmt: skip


def build() -> LLM:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIG))
        return LLM(
            additional_config=measure.EXACT,
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048,
            max_num_seqs=32, max_num_batched_tokens=40_000, kv_cache_memory_bytes=24 << 30,
        )  # fmt: skip


def sampling(max_tokens: int, streamed: bool, **extras: object) -> SamplingParams:
    return SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True,
        output_kind=RequestOutputKind.CUMULATIVE if streamed else RequestOutputKind.FINAL_ONLY,
        extra_args={f"diffusion_{name}": value for name, value in extras.items()},
    )  # fmt: skip


def runner_of(llm: LLM):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def seconds_a_step(llm: LLM, batch: int, prompt_length: int, params: SamplingParams) -> list[float]:
    """Seconds of every denoising step of `batch` requests that run together from beginning to end."""
    engine, runner = llm.llm_engine, runner_of(llm)
    generator = torch.Generator().manual_seed(batch)
    for number in range(batch):
        prompt = torch.randint(0, 126_000, (prompt_length,), generator=generator).tolist()
        engine.add_request(f"{batch}-{number}-{time.time_ns()}", {"prompt_token_ids": prompt}, params)
    seconds, launches, launch = [], [], runner.launch
    runner.launch = lambda *args: launches.append(None) or launch(*args)
    while engine.has_unfinished_requests():
        launches.clear()
        begin = time.perf_counter()
        engine.step()
        torch.cuda.synchronize()
        seconds += [(time.perf_counter() - begin) / len(launches)] * len(launches)
    del runner.launch
    return seconds


def measure_blocks(llm: LLM, batch: int, kind: str) -> dict:
    """Medians over the steps that forward a block, and over those that forward everything."""
    pace = {"threshold": 0.9} if kind == "threshold" else {"steps": CANVAS}
    params = sampling(CANVAS, kind == "streamed", cache="dual", block_length=BLOCK, **pace)
    for _ in range(2):
        seconds_a_step(llm, batch, PROMPT, params)  # compiles, records
    seconds = seconds_a_step(llm, batch, PROMPT, params)
    if len(seconds) != CANVAS:
        raise AssertionError(f"{CANVAS} steps unmask {CANVAS} positions one at a time, took {len(seconds)}")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds_a_step(llm, batch, PROMPT, params)
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    busy = sum(kernel.device_time_total for kernel in kernels) / 1e6  # of all steps, whole sequences included
    whole = [seconds[0], seconds[BLOCK]]
    return {
        "batch": batch,
        "kind": kind,
        "graphs": runner_of(llm).graphs.enabled,
        "block_step_ms": 1e3 * statistics.median(seconds[1:BLOCK] + seconds[BLOCK + 1 :]),
        "whole_step_ms": 1e3 * statistics.median(whole),
        "tokens_per_s": batch * CANVAS / sum(seconds),
        "gpu_busy": busy / sum(seconds),
    }


def measure_whole(llm: LLM) -> dict:
    """The reference decoder's way: every step forwards the whole sequence."""
    params = sampling(256, streamed=False, steps=128)
    for _ in range(2):
        seconds = seconds_a_step(llm, 1, 100, params)
    return {
        "graphs": runner_of(llm).graphs.enabled,
        "uncached_step_ms": 1e3 * statistics.median(seconds),
        "tokens_per_s": 256 / sum(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_engine.py needs a CUDA device; benchmarks/overhead.py measures the engine on a CPU")
    llm = build()
    result = {"environment": measure.environment() | {"vllm": vllm_version}, "steps": []}
    for graphs in (True, False):
        runner_of(llm).graphs.enabled = graphs
        for kind in ("at the end", "threshold", "streamed"):
            for batch in (1, 8, 32):
                result["steps"].append(measure_blocks(llm, batch, kind))
                print(result["steps"][-1], flush=True)
        result["steps"].append(measure_whole(llm))
        print(result["steps"][-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
