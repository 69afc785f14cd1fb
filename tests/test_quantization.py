"""vLLM's own quantization serves both families: 8-bit weights and activations, in the compressed-tensors format."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engines import model_runner, new_engine
from vllm import SamplingParams

from dllm_plugin.checkpoints import path
from dllm_plugin.checkpoints.tasks import questions

UNQUANTIZED = {"tiny-llada": ("wte", "model.transformer.ff_out"), "tiny-dream": ("embed_tokens", "lm_head")}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}


def quantize(name: str, folder: Path, leave_out: str = "") -> Path:
    """A bundled checkpoint with int8 weights, one scale a row, as llm-compressor writes it."""
    shutil.copytree(path(name), folder)
    embedding, head = UNQUANTIZED[name]
    tensors = {}
    for tensor_name, weight in load_file(folder / "model.safetensors").items():
        module = tensor_name.removesuffix(".weight")
        if weight.dim() == 2 and not module.endswith(embedding) and module != head:
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            weight = (weight.float() / scale).round().to(torch.int8)
            tensors[f"{module}.weight_scale"] = scale
        tensors[tensor_name] = weight
    tensors.pop(leave_out, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    scheme = {
        "targets": ["Linear"],
        "weights": INT8 | {"strategy": "channel", "dynamic": False},
        "input_activations": INT8 | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": [head],  # the checkpoint's own name
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", UNQUANTIZED)
def test_answers_with_8_bits(name: str, tmp_path: Path):
    llm = new_engine(quantize(name, tmp_path / name), dtype="auto")
    block, head = model_runner(llm).model.decoder.blocks[0], model_runner(llm).model.decoder.head
    linears = (block.qkv_proj, block.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj)
    assert {type(linear.quant_method).__name__ for linear in linears} == {"CompressedTensorsLinearMethod"}
    assert head.weight.dtype == torch.bfloat16

    asked = questions("held_out", 60, seed=3)
    chats = [[{"role": "user", "content": question.text}] for question in asked]
    params = SamplingParams(
        temperature=0,
        max_tokens=32,
        extra_args={"diffusion_block_length": 8, "diffusion_threshold": 0.9, "diffusion_cache": "dual"},
    )
    together = [output.outputs[0].text for output in llm.chat(chats, params, use_tqdm=False)]
    alone = [llm.chat(chat, params, use_tqdm=False)[0].outputs[0].text for chat in chats[:8]]
    assert together[:8] == alone
    right = sum(text == question.answer for text, question in zip(together, asked, strict=True))
    assert right / len(asked) >= 0.85, f"{right} of {len(asked)}"  # 8 bits cost models this small some answers


def test_a_missing_tensor_is_named(tmp_path: Path):
    missing = "model.layers.2.mlp.up_proj.weight"
    folder = quantize("tiny-dream", tmp_path / "incomplete", leave_out=missing)
    with pytest.raises(ValueError, match=f"lacks 1 of its tensors: {missing}"):
        new_engine(folder, dtype="auto")
