"""LoRA adapters in PEFT format: several and none in one batch equal the merged checkpoints, by the reference decoder."""

import json
from pathlib import Path

import pytest
import torch
from reference import block_checkpoints, checkpoints, d2f, fast_dllm, llada, model
from safetensors.torch import load_file, save_file
from support.engines import engine
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

RANK, ALPHA = 8, 16
# those that D2F trains, and one of the MLP
TARGETS = {
    "llada": ("q_proj", "k_proj", "v_proj", "attn_out", "ff_out"),
    "dream": ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
    "sdar": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"),
    "llada2": ("query_key_value", "dense"),  # experts have none
}
PROMPTS = [[11, 12, 13], [20, 21], [30] * 5, [40, 41, 42, 43], [50], [51, 9]]
ADAPTERS = [0, 1, 2, 1, 0, 2]  # 0: none


def write_adapter(family: str, base: Path, folder: Path, seed: int) -> Path:
    """A random adapter in ``folder``; returns the folder of the checkpoint it makes when merged."""
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    adapter, merged = {}, dict(weights)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        in_a_layer = ".blocks." in name or ".layers." in name
        if weight.dim() == 2 and in_a_layer and module.rpartition(".")[2] in TARGETS[family]:
            a = 0.05 * torch.randn(RANK, weight.shape[1], generator=generator)
            b = 0.05 * torch.randn(weight.shape[0], RANK, generator=generator)
            adapter[f"base_model.model.{module}.lora_A.weight"] = a
            adapter[f"base_model.model.{module}.lora_B.weight"] = b
            merged[name] = weight + ALPHA / RANK * (b @ a)
    assert adapter
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "bias": "none",
        "target_modules": list(TARGETS[family]),
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    whole = folder.with_name(f"{folder.name}-merged")
    whole.mkdir()
    save_file(merged, whole / "model.safetensors", metadata={"format": "pt"})
    (whole / "config.json").write_text((base / "config.json").read_text())
    return whole


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_adapters_equal_merged_weights(tmp_path_factory, family):
    root = tmp_path_factory.mktemp(family)
    base = checkpoints.WRITERS[family](root / "base", seed=3)
    models = [model.load(base)] + [
        model.load(write_adapter(family, base, root / f"adapter-{seed}", seed)) for seed in (1, 2)
    ]
    llm = engine(base, skip_tokenizer_init=True, enable_lora=True, max_loras=2, max_lora_rank=RANK)
    requests = [LoRARequest(f"a{i}", i, str(root / f"adapter-{i}")) if i else None for i in ADAPTERS]
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]

    def generate(extras):
        params = SamplingParams(
            temperature=0, max_tokens=24, ignore_eos=True, detokenize=False,
            extra_args={f"diffusion_{name}": value for name, value in extras.items()},
        )  # fmt: skip
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=requests)
        return [list(output.outputs[0].token_ids) for output in outputs]

    full = generate({"remasking": "low_confidence", "block_length": 8})
    expected = [llada.generate(models[i], p, 24, 24, 8).tokens for p, i in zip(PROMPTS, ADAPTERS, strict=True)]
    assert full == expected
    without = [llada.generate(models[0], p, 24, 24, 8).tokens for p in PROMPTS]
    assert all((a == b) == (i == 0) for a, b, i in zip(full, without, ADAPTERS, strict=True))

    # thresholds decide how many rows each of several steps in one engine step has, and each row is of an adapter
    pace = {"block_length": 12, "cache": "dual", "threshold": 0.4}
    generations = [fast_dllm.generate(models[i], p, 24, 24, **pace) for p, i in zip(PROMPTS, ADAPTERS, strict=True)]
    assert generate({"remasking": "low_confidence"} | pace) == [one.tokens for one in generations]
    assert len({one.num_forwards for one in generations}) > 2

    pipelined = generate({"strategy": "d2f", "block_length": 8, "d2f_accept_threshold": 0.02})
    for got, prompt, adapter in zip(pipelined, PROMPTS, ADAPTERS, strict=True):
        assert got == d2f.generate(models[adapter], prompt, 24, block_length=8, accept_threshold=0.02).tokens
    assert llm.llm_engine.list_loras() == {1, 2}

    llm.collective_rpc("reload_weights")
    assert generate({"remasking": "low_confidence", "block_length": 8}) == expected


@pytest.mark.parametrize("family", ["sdar", "llada2"])
def test_adapters_of_block_diffusion_equal_merged_weights(tmp_path_factory, family):
    """Stacked projections by their shards (SDAR), and one that the checkpoint itself has fused (LLaDA2)."""
    root = tmp_path_factory.mktemp(family)
    base = block_checkpoints.WRITERS[family](root / "base", seed=3)
    merged = [base] + [write_adapter(family, base, root / f"adapter-{seed}", seed) for seed in (1, 2)]
    params = greedy(16)

    def generate(llm, prompts, requests):
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=requests)
        return [list(output.outputs[0].token_ids) for output in outputs]

    llm = engine(base, skip_tokenizer_init=True, enable_lora=True, max_loras=2, max_lora_rank=RANK)
    got = generate(llm, PROMPTS, [LoRARequest(f"a{i}", i, str(root / f"adapter-{i}")) if i else None for i in ADAPTERS])
    of_model = [generate(engine(path), PROMPTS, None) for path in merged]
    assert got == [of_model[adapter][n] for n, adapter in enumerate(ADAPTERS)]
    assert all((got[n] == of_model[0][n]) == (adapter == 0) for n, adapter in enumerate(ADAPTERS))


def greedy(max_tokens, **extras):
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False,
        extra_args={f"diffusion_{name}": value for name, value in extras.items()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A base, and it with each of two adapters: the reference models, and the requests for the adapters."""
    root = tmp_path_factory.mktemp("adapted")
    base = checkpoints.WRITERS["llada"](root / "base", seed=3)
    merged = [write_adapter("llada", base, root / f"adapter-{seed}", seed) for seed in (1, 2)]
    requests = [None, *(LoRARequest(f"a{i}", i, str(root / f"adapter-{i}")) for i in (1, 2))]
    return base, [model.load(folder) for folder in (base, *merged)], requests


def test_guidance_beside_adapters(adapted):
    """Guidance forwards twice the tokens and windows that vLLM's LoRA layers count on."""
    base, models, requests = adapted
    llm = engine(
        base, skip_tokenizer_init=True, enable_lora=True, max_loras=1, max_lora_rank=RANK, max_num_seqs=3,
        max_model_len=128, max_num_batched_tokens=128,
    )  # fmt: skip
    long, params = [11] * 90, greedy(12, cfg_scale=1.0, remasking="low_confidence")
    for prompts, adapters in (([[11, 12, 13], [20, 21], [30]], (1, 0, 1)), ([long], (0,)), ([long], (1,))):
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False,
            lora_request=[requests[i] for i in adapters],
        )  # fmt: skip
        for output, prompt, i in zip(outputs, prompts, adapters, strict=True):
            expected = llada.generate(models[i], prompt, 12, 12, 12, cfg_scale=1.0).tokens
            assert list(output.outputs[0].token_ids) == expected


def test_whom_vllm_lets_pass_counts_against_the_budget(adapted, monkeypatch):
    """With room for one adapter, a request with another waits and vLLM admits who is behind it."""
    base, models, requests = adapted
    llm = engine(
        base, skip_tokenizer_init=True, enable_lora=True, max_loras=1, max_lora_rank=RANK, max_model_len=128,
        max_num_batched_tokens=128,
    )  # fmt: skip
    inside, forwarded = llm.llm_engine.engine_core.engine_core.scheduler, []
    schedule = inside.schedule

    def counted(*args, **kwargs):
        output = schedule(*args, **kwargs)
        forwarded.append(sum(window.end - window.start for window in output.steps[0].values()))
        return output

    monkeypatch.setattr(inside, "schedule", counted)
    asked = [([11] * 60, 24, 1), ([12] * 10, 8, 2), ([13] * 90, 20, 0)]  # the last does not fit beside the first
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _, _ in asked],
        [greedy(tokens, remasking="low_confidence") for _, tokens, _ in asked], use_tqdm=False,
        lora_request=[requests[i] for _, _, i in asked],
    )  # fmt: skip
    for output, (prompt, tokens, i) in zip(outputs, asked, strict=True):
        assert list(output.outputs[0].token_ids) == llada.generate(models[i], prompt, tokens, tokens, tokens).tokens
    assert 84 <= max(forwarded) <= 128


def test_the_lowest_rank(adapted):
    base, models, _ = adapted
    llm = engine(base, skip_tokenizer_init=True, enable_lora=True, max_loras=1, max_lora_rank=1)
    output = llm.generate([{"prompt_token_ids": [11, 12]}], greedy(6), use_tqdm=False)[0]
    assert list(output.outputs[0].token_ids) == llada.generate(models[0], [11, 12], 6, 6, 6).tokens
