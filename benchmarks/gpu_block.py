"""Times the denoising steps of block-diffusion models on a GPU, with random weights: python benchmarks/gpu_block.py

The shapes of SDAR-8B (dense, blocks of 4) and of LLaDA2.0-mini (256 experts, blocks of 32) in bfloat16. Requests of one
length run together, one token a step. Timed are the steps that forward a block of each request, from CUDA graphs, and the
step that computes prompts of 1,024 tokens together with the first denoising step of their answers. The floor is the time
to read the weights that a step touches at the bandwidth of a large copy: of experts, those that the routers chose in such a
step. Outputs are asked for at the end, as `LLM.generate` does. Random weights have no accuracy; this is about speed only. The
last line is one JSON object; `--json FILE` writes it too.
"""

import argparse
import gc
import json
import statistics
import tempfile
from pathlib import Path

import measure  # before torch and vLLM: it sets the environment
import torch
from gpu_engine import runner_of, sampling, seconds_a_step
from vllm import LLM
from vllm import __version__ as vllm_version

from dllm_plugin.models.experts import Experts

PROMPT, ANSWER = 1024, 64
CONFIGS = {
    "SDAR-8B": {
        "architectures": ["SDARForCausalLM"], "model_type": "sdar", "hidden_size": 4096, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12_288,
        "vocab_size": 151_936, "max_position_embeddings": 32_768, "rope_theta": 1_000_000, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "attention_bias": False, "hidden_act": "silu", "block_size": 4,
        "mask_token_id": 151_669, "eos_token_id": 151_643,
    },
    "LLaDA2.0-mini": {
        "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "hidden_size": 2048, "num_hidden_layers": 20,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 5120,
        "moe_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1,
        "n_group": 8, "topk_group": 4, "first_k_dense_replace": 1, "score_function": "sigmoid", "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "moe_router_enable_expert_bias": True, "router_dtype": "fp32",
        "use_qk_norm": True, "use_qkv_bias": False, "use_bias": False, "norm_head": False, "partial_rotary_factor": 0.5,
        "rope_theta": 600_000, "rope_scaling": None, "rms_norm_eps": 1e-6, "vocab_size": 157_184,
        "tie_word_embeddings": False, "max_position_embeddings": 32_768, "hidden_act": "silu", "pad_token_id": 156_892,
    },
}  # fmt: skip


def build(config: dict) -> LLM:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        return LLM(
            additional_config=measure.EXACT,
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048,
            max_num_seqs=32, max_num_batched_tokens=40_000, kv_cache_memory_bytes=12 << 30, enable_prefix_caching=False,
            gpu_memory_utilization=0.5,  # the model before is not gone without a trace
        )  # fmt: skip


def stacked_weights(module: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    return module.experts.w13_weight, module.experts.w2_weight


def spread_routes(llm: LLM) -> None:
    """vLLM's dummy weights are so small that every token would go to the same experts."""
    for module in runner_of(llm).model.modules():
        if isinstance(module, Experts):
            module.router.weight.data.normal_()


def touched_bytes(llm: LLM, batch: int, params) -> float:
    """Of the weights in a step that forwards one block of each request, the embedding's rows left out."""
    runner = runner_of(llm)
    model, chosen = runner.model, []
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    of_experts = {id(p) for module in experts for p in stacked_weights(module)}
    rest = sum(p.nbytes for p in model.parameters() if id(p) not in of_experts) - model.decoder.embedding.weight.nbytes
    hooks = [
        module.router.register_forward_hook(
            lambda router, _, logits: chosen.append(router.choose(logits)[1].unique().numel())
        )
        for module in experts
    ]
    runner.graphs.enabled = False
    seconds_a_step(llm, batch, PROMPT, params)
    runner.graphs.enabled = True
    for hook in hooks:
        hook.remove()
    # the first step forwards the prompts, and one in each block the block before it, too: the middle one is neither
    per_step = [sum(chosen[i : i + len(experts)]) for i in range(0, len(chosen), max(1, len(experts)))] or [0]
    of_one = sum(p.nbytes // len(p) for module in experts[:1] for p in stacked_weights(module))
    return rest + statistics.median(per_step) * of_one


def measure_model(name: str, limits: dict[str, float]) -> list[dict]:
    llm, rows = build(CONFIGS[name]), []
    spread_routes(llm)
    for batch in (1, 8, 32):
        params = sampling(ANSWER, streamed=False, remasking="sequential")  # one token a step
        for _ in range(2):
            seconds_a_step(llm, batch, PROMPT, params)  # compiles, records
        seconds = seconds_a_step(llm, batch, PROMPT, params)
        if len(seconds) != ANSWER:
            raise AssertionError(f"{ANSWER} steps unmask {ANSWER} positions one at a time, took {len(seconds)}")
        floor = touched_bytes(llm, batch, params) / limits["copy_bytes_per_s"]
        step = statistics.median(seconds[1:])
        rows.append({
            "model": name, "batch": batch, "block_step_ms": 1e3 * step, "floor_ms": 1e3 * floor,
            "over_floor": step / floor, "prompts_and_first_step_ms": 1e3 * seconds[0],
            "prompt_tokens_per_s": batch * PROMPT / seconds[0], "tokens_per_s": batch * ANSWER / sum(seconds),
        })  # fmt: skip
        print(rows[-1], flush=True)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, action="append", help="may be repeated (default: all)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_block.py needs a CUDA device; benchmarks/strategies.py measures block families on a CPU")
    limits = measure.ceilings()
    rows = [row for name in arguments.model or CONFIGS for row in measure_model(name, limits)]
    result = {"environment": measure.environment() | {"vllm": vllm_version}, "limits": limits, "steps": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
