"""What ranks, adapters and filters cost a denoising step on a GPU: python benchmarks/gpu_variants.py [--tensor-parallel-size 2]

The shape of GSAI-ML/LLaDA-8B-Instruct in bfloat16 with random weights, prompts of 1,024 tokens, two blocks of 32 under the dual
cache, one token a step, streamed, so that each engine step is one denoising step. A row is the median of the steps that
forward a block alone. Variants: `plain`; `top_p`, sampled; `adapter`, a random LoRA of rank 8 on the attention's projections,
in an engine of its own that also serves none (`adapter engine`). Each comes three times, of which the last is measured: the
first two compile and record. The last line is one JSON object; `--json FILE` writes it too. Random weights have no accuracy:
the tests compare tokens.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import measure  # before torch and vLLM: it sets the environment
import torch
from gpu_engine import BLOCK, CANVAS, CONFIG, PROMPT, sampling
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm import __version__ as vllm_version
from vllm.lora.request import LoRARequest

RANK = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "attn_out")


def build(folder: str, **settings: object) -> LLM:
    Path(folder, "config.json").write_text(json.dumps(CONFIG))
    return LLM(
            additional_config=measure.EXACT,
        model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048,
        max_num_seqs=32, max_num_batched_tokens=40_000, kv_cache_memory_bytes=24 << 30, **settings,
    )  # fmt: skip


def write_adapter(folder: Path) -> LoRARequest:
    width, generator = CONFIG["d_model"], torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(CONFIG["n_layers"]):
        for target in TARGETS:
            name = f"base_model.model.model.transformer.blocks.{layer}.{target}"
            for part, shape in (("lora_A", (RANK, width)), ("lora_B", (width, RANK))):
                tensors[f"{name}.{part}.weight"] = 0.01 * torch.randn(shape, generator=generator, dtype=torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(TARGETS)}))
    return LoRARequest("random", 1, str(folder))


def seconds_a_step(llm: LLM, batch: int, params: SamplingParams, adapter: LoRARequest | None) -> list[float]:
    engine, generator = llm.llm_engine, torch.Generator().manual_seed(batch)
    for number in range(batch):
        prompt = torch.randint(0, 126_000, (PROMPT,), generator=generator).tolist()
        request_id = f"{batch}-{number}-{time.time_ns()}"
        engine.add_request(request_id, {"prompt_token_ids": prompt}, params, lora_request=adapter)
    seconds = []
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
    return seconds


def measure_variant(
    llm: LLM, batch: int, variant: str, more: dict[str, float], adapter: LoRARequest | None = None
) -> dict[str, object]:
    params = sampling(CANVAS, streamed=True, cache="dual", block_length=BLOCK, steps=CANVAS)
    for name, value in more.items():
        setattr(params, name, value)
    runs = [seconds_a_step(llm, batch, params, adapter) for _ in range(3)]
    of_blocks = [second for number, second in enumerate(runs[-1]) if number % BLOCK and number < CANVAS]
    row = {"variant": variant, "batch": batch, "block_step_ms": 1e3 * statistics.median(of_blocks)}
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--adapter", action="store_true", help="measure an adapter, and nothing else")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_variants.py needs a CUDA device; benchmarks/overhead.py measures the engine on a CPU")
    ranks = arguments.tensor_parallel_size
    result = {"environment": measure.environment() | {"vllm": vllm_version, "ranks": ranks}, "steps": []}
    with tempfile.TemporaryDirectory() as folder:
        lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK} if arguments.adapter else {}
        llm = build(folder, tensor_parallel_size=ranks, **lora)
        sampled = {"temperature": 1.0, "seed": 1}
        for batch in arguments.batch:
            if arguments.adapter:
                result["steps"].append(measure_variant(llm, batch, "adapter engine", {}))
                adapter = write_adapter(Path(folder, f"adapter-{batch}"))
                result["steps"].append(measure_variant(llm, batch, "adapter", {}, adapter))
                continue
            result["steps"].append(measure_variant(llm, batch, "plain", {}))
            result["steps"].append(measure_variant(llm, batch, "sampled", sampled))
            result["steps"].append(measure_variant(llm, batch, "top_p", sampled | {"top_p": 0.9}))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
