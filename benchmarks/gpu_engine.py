"""Times denoising steps of the real engine on a GPU, with an 8B LLaDA of random weights: python benchmarks/gpu_engine.py

The shape of GSAI-ML/LLaDA-8B-Instruct in bfloat16, prompts of 1,024 tokens, two blocks of 32 under the dual cache, one
token a step. The first step of a block forwards the whole sequence, the other 31 its block alone; each kind is timed by
itself, whole engine steps from the host's clock, and in them the time that the GPU is at work. Random weights have no
accuracy; this is about speed only. The last line is one JSON object; `--json FILE` writes it too.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from kernels import environment
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from vllm import LLM, SamplingParams
from vllm import __version__ as vllm_version

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
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048,
            max_num_seqs=32, max_num_batched_tokens=40_000, kv_cache_memory_bytes=24 << 30,
        )  # fmt: skip


def measure(llm: LLM, batch: int) -> dict:
    """Medians over the steps of `batch` requests that run together from beginning to end."""
    engine = llm.llm_engine
    params = SamplingParams(
        temperature=0.0, max_tokens=CANVAS, ignore_eos=True,
        extra_args={"diffusion_cache": "dual", "diffusion_block_length": BLOCK, "diffusion_steps": CANVAS},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(batch)

    def steps() -> list[float]:
        for number in range(batch):
            prompt = torch.randint(0, 126_000, (PROMPT,), generator=generator).tolist()
            engine.add_request(f"{batch}-{number}-{time.time_ns()}", {"prompt_token_ids": prompt}, params)
        seconds = []
        while engine.has_unfinished_requests():
            begin = time.perf_counter()
            engine.step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return seconds

    steps()  # compiles
    seconds = steps()
    if len(seconds) != CANVAS:
        raise AssertionError(f"{CANVAS} steps unmask {CANVAS} positions one at a time, took {len(seconds)}")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        steps()
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    busy = sum(kernel.device_time_total for kernel in kernels) / 1e6  # of all steps, whole sequences included
    whole = [seconds[0], seconds[BLOCK]]
    return {
        "batch": batch,
        "block_step_ms": 1e3 * statistics.median(set(seconds) - set(whole)),
        "whole_step_ms": 1e3 * statistics.median(whole),
        "tokens_per_s": batch * CANVAS / sum(seconds),
        "gpu_busy": busy / sum(seconds),
        "gpu_kernels_a_step": len(kernels) / CANVAS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_engine.py needs a CUDA device; benchmarks/overhead.py measures the engine on a CPU")
    llm = build()
    result = {"environment": environment() | {"vllm": vllm_version}, "steps": []}
    for batch in (1, 8, 32):
        result["steps"].append(measure(llm, batch))
        print({name: round(value, 2) for name, value in result["steps"][-1].items()}, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
